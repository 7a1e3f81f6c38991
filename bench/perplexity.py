"""Perplexity and bits per byte over non-overlapping windows, summed in float64."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Perplexity:
    """What a model makes of a text. `losses` holds each window's mean negative log-likelihood in nats.

    `perplexity` = exp(mean loss over all predicted tokens). `bits_per_byte` divides the same sum by the UTF-8 bytes of
    the predicted tokens, so models with different tokenisers compare. `standard_error` is that of the mean loss over
    windows, in nats (NaN for one window): perplexity moves by that fraction.
    """

    perplexity: float
    bits_per_byte: float
    loss: float
    standard_error: float
    tokens: int
    bytes: int
    losses: tuple[float, ...]


@torch.no_grad()
def measure_perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    windows: torch.Tensor,
    *,
    tokens_per_batch: int = 2048,
    progress: bool = False,
) -> Perplexity:
    """Perplexity over `windows` (count, length): each is scored by itself, without BOS, from its second token on.

    Raises ValueError where a loss is not finite, or where a window is longer than the model's context.
    """
    count, length = windows.shape
    if length > model.config.max_position_embeddings:
        raise ValueError(
            f"seq-len {length} is longer than the model's context of {model.config.max_position_embeddings}"
        )
    model.eval()
    batches = windows.split(max(1, tokens_per_batch // length))
    nats = []
    for batch in tqdm(batches, desc="perplexity", unit="batch", disable=None if progress else True):
        batch = batch.to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        nats.append(losses.view(len(batch), -1).double().sum(dim=1).cpu())
    per_window = torch.cat(nats) / (length - 1)
    if not per_window.isfinite().all():
        raise ValueError(f"the loss of window {int((~per_window.isfinite()).nonzero()[0])} is not finite")
    loss = per_window.mean().item()
    predicted = count * (length - 1)
    text_bytes = sum(len(piece.encode()) for piece in tokenizer.batch_decode(windows[:, 1:]))
    return Perplexity(
        perplexity=math.exp(loss),
        bits_per_byte=loss * predicted / math.log(2) / text_bytes,
        loss=loss,
        standard_error=per_window.std().item() / math.sqrt(count) if count > 1 else math.nan,
        tokens=predicted,
        bytes=text_bytes,
        losses=tuple(per_window.tolist()),
    )
