"""Perplexity and bits per byte of a text, every token predicted at most once, summed in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from transact.entry import check_vocabulary, counted
from transact.recovery.held_out import perplexity_of, token_losses
from transact.texts import Text, cut_windows, tokenise

from .token_bytes import token_bytes

WINDOWINGS = ("blocks", "rolling")


@dataclass(frozen=True)
class Windows:
    """Rows of token ids (count, length): in each all but the first are predicted; of the last, only its `in_last` last.

    `bytes` are the UTF-8 bytes of the text that the predicted tokens stand for; None where they are not known.
    """

    ids: torch.Tensor
    in_last: int
    bytes: int | None

    @classmethod
    def of_blocks(cls, ids: torch.Tensor, bytes: int | None = None) -> "Windows":
        """Rows (count, length) that stand by themselves: of each all but the first token are predicted."""
        return cls(ids, ids.shape[1] - 1, bytes)

    @property
    def predicted(self) -> int:
        return (len(self.ids) - 1) * (self.ids.shape[1] - 1) + self.in_last


@dataclass(frozen=True)
class Perplexity:
    """What a model makes of a text. `losses` holds each window's mean negative log-likelihood in nats.

    `perplexity` = exp(mean loss over all predicted tokens), infinite above 709 nats (null in JSON). `bits_per_byte`
    divides the same sum by the UTF-8 bytes of the predicted tokens, so models with different tokenisers compare (NaN
    where these are not known). `standard_error` is that of the mean loss over windows, in nats (NaN for one window):
    perplexity moves by that fraction.
    """

    perplexity: float
    bits_per_byte: float
    loss: float
    standard_error: float
    tokens: int
    bytes: int | None
    losses: tuple[float, ...]


def evaluation_windows(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int | None = None,
    windowing: str = "blocks",
    bos: bool = False,
) -> Windows:
    """Windows of a text to measure perplexity on; the first `count`, or all.

    "blocks": windows of `length` tokens that do not overlap, each by itself; its first token is only read, or, with
    `bos`, comes after a BOS token and is predicted too. "rolling": as lm-eval's `loglikelihood_rolling`, in windows of
    `length` predictions every token of the text is predicted once, the first after the BOS token (EOS where the
    tokeniser has none), and every later window reads the token before it.

    Raises ValueError where the text is too short or the tokeniser has no token to begin with.
    """
    if windowing not in WINDOWINGS:
        raise ValueError(f"unknown windowing {windowing!r}, allowed: {', '.join(WINDOWINGS)}")
    tokens = tokenise(text, tokenizer)
    if windowing == "blocks":
        ids = cut_windows(tokens, length=length, count=count)
        bytes_each = token_bytes(text.content, tokenizer, tokens)
        if bytes_each is not None:
            bytes_each = cut_windows(bytes_each, length=length, count=count)[:, 0 if bos else 1 :].sum().item()
        if bos:
            ids = torch.cat((torch.full((len(ids), 1), _first_token(tokenizer)), ids), dim=1)
        return Windows.of_blocks(ids, bytes_each)
    if bos:
        raise ValueError("bos is for windowing blocks: rolling windows begin with one, and read the token before them")
    if length < 2 or len(tokens) == 0:
        raise ValueError(
            f"rolling windows need text and a seq-len of at least 2, got {counted(len(tokens), 'token')} and {length}"
        )
    length = min(length, len(tokens))
    available = -(-len(tokens) // length)
    if count is not None and count < 1:
        raise ValueError(f"at least one window is needed, got {count}")
    if count is not None and count > available:
        raise ValueError(f"the text has {counted(available, 'window')} of {length} tokens, {count} asked for")
    if count is None or count == available:
        text_bytes = len(text.content.encode())
    else:
        bytes_each = token_bytes(text.content, tokenizer, tokens)
        text_bytes = None if bytes_each is None else bytes_each[: count * length].sum().item()
        tokens = tokens[: count * length]
    stream = torch.cat((torch.tensor([_first_token(tokenizer, or_eos=True)]), tokens))
    rows = stream.unfold(0, length + 1, length)
    in_last = len(tokens) % length or length
    if in_last < length:  # as lm-eval's: the last window is as long as the others and reads more
        rows = torch.cat((rows, stream[None, -(length + 1) :]))
    return Windows(rows, in_last, text_bytes)


def _first_token(tokenizer: PreTrainedTokenizerBase, *, or_eos: bool = False) -> int:
    token = tokenizer.bos_token_id
    if token is None and or_eos:
        token = tokenizer.eos_token_id
    if token is None:
        raise ValueError(f"the tokeniser has no BOS{' or EOS' if or_eos else ''} token to begin a window with")
    return token


@torch.no_grad()
def measure_perplexity(
    model: nn.Module,
    windows: Windows,
    *,
    tokens_per_batch: int = 2048,
    on_logits: Callable[[torch.Tensor], None] | None = None,
    progress: bool = False,
) -> Perplexity:
    """Perplexity over windows of a text. `on_logits` is handed the logits of each batch, (windows, length, vocabulary).

    Raises ValueError where a loss is not finite, where a window is longer than the model's context, or where it holds
    tokens that the model does not know.
    """
    count, length = len(windows.ids), windows.ids.shape[1] - 1
    if length > model.config.max_position_embeddings:
        raise ValueError(
            f"windows read {length} tokens, longer than the model's context of {model.config.max_position_embeddings}"
        )
    check_vocabulary(model.config, windows.ids)
    model.eval()
    batches = windows.ids.split(max(1, tokens_per_batch // length))
    losses = []
    for batch in tqdm(batches, desc="perplexity", unit="batch", disable=None if progress else True):
        batch = batch.to(model.device)
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()
        if on_logits is not None:
            on_logits(logits)
        losses.append(token_losses(logits, batch[:, 1:]))
    each = torch.cat(losses)
    nats, tokens = each.sum(dim=1), torch.full((count,), length)
    nats[-1], tokens[-1] = each[-1, -windows.in_last :].sum(), windows.in_last
    per_window = nats / tokens
    if not per_window.isfinite().all():
        raise ValueError(f"the loss of window {int((~per_window.isfinite()).nonzero()[0])} is not finite")
    loss = nats.sum().item() / windows.predicted
    return Perplexity(
        perplexity=perplexity_of(loss),
        bits_per_byte=math.nan if windows.bytes is None else nats.sum().item() / math.log(2) / windows.bytes,
        loss=loss,
        standard_error=per_window.std().item() / math.sqrt(count) if count > 1 else math.nan,
        tokens=windows.predicted,
        bytes=windows.bytes,
        losses=tuple(per_window.tolist()),
    )
