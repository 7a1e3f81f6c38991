"""Windows that are not trained on, and the loss there."""

import math

import torch
from torch import nn
from torch.nn import functional

HELD_OUT_EVERY = 16


def hold_out(windows: torch.Tensor, every: int = HELD_OUT_EVERY, most: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to train on, and every 16th, at most 32, to judge by. Raises ValueError for fewer than 16 windows."""
    if len(windows) < every:
        raise ValueError(
            f"the text is too short: {len(windows)} windows of {windows.shape[1]} tokens, at least {every} are needed, "
            "of which one is held out"
        )
    held_out = torch.arange(len(windows)) % every == every - 1
    held_out &= held_out.cumsum(dim=0) <= most
    return windows[~held_out], windows[held_out]


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: torch.Tensor) -> dict[str, float | None]:
    """Mean loss of the next token in windows (N, T), in nats, and the perplexity it is (None: no float holds it)."""
    total = 0.0
    for ids in windows.split(4):
        ids = ids.to(next(model.parameters()).device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").double().item()
    loss = total / windows[:, 1:].numel()
    perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()
    return {"held_out_loss": loss, "held_out_perplexity": perplexity if perplexity < math.inf else None}
