"""Windows that are not trained on, and the loss there."""

import math

import torch
from torch import nn
from torch.nn import functional

from ..calibration import held_out_split
from ..entry import counted

HELD_OUT_EVERY = 16


def hold_out(windows: torch.Tensor, every: int = HELD_OUT_EVERY, most: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to train on, and every 16th, at most 32, to judge by. Raises ValueError for fewer than 16 windows."""
    if len(windows) < every:
        raise ValueError(
            f"the text is too short: {counted(len(windows), 'window')} of {windows.shape[1]} tokens, at least {every} "
            "are needed, of which one is held out"
        )
    return held_out_split(windows, every, most)


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: torch.Tensor) -> dict[str, float | None]:
    """Mean loss of the next token in windows (N, T), in nats, and the perplexity it is (None: no float holds it)."""
    total = 0.0
    for ids in windows.split(4):
        ids = ids.to(next(model.parameters()).device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += token_losses(logits, ids[:, 1:]).sum().item()
    loss = total / windows[:, 1:].numel()
    perplexity = perplexity_of(loss)
    return {"held_out_loss": loss, "held_out_perplexity": perplexity if perplexity < math.inf else None}


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss in nats of each target (N, T) by float32 logits (N, T, V) of their places, float64 on the CPU."""
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).double().cpu()


def perplexity_of(loss: float) -> float:
    """The perplexity that a mean loss in nats is; infinite where no float holds it."""
    return torch.tensor(loss, dtype=torch.float64).exp().item()
