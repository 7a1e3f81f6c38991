"""Windows to calibrate on, of one text or of several in turn: the model's own samples, documentation, code, files."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..cache import cache_directory
from ..entry import counted
from .named import TEXTS, Text, cut_windows, load_text, tokenise
from .samples import own_samples

SELF = "self"
DEFAULT_CALIBRATION = "self,embedded,self,sources,self,self,self,self"  # three quarters are own samples


@dataclass(frozen=True)
class Source:
    """Windows (count, length) of one text, its name, and the SHA-256 of the text (of own samples: of their ids)."""

    name: str
    sha256: str
    windows: torch.Tensor


def source_names(calibration: str) -> list[str]:
    """The names in `calibration`, which stand between commas; a file may have commas in its own name.

    Raises ValueError for one that is no text.
    """
    names = [calibration] if Path(calibration).is_file() else [name.strip() for name in calibration.split(",")]
    for name in names:
        if name != SELF and name not in TEXTS and not Path(name).is_file():
            allowed = f"{SELF}, {', '.join(TEXTS)}, or a text file"
            raise ValueError(f"no text {name!r}" + f" in {calibration!r}" * (len(names) > 1) + f", allowed: {allowed}")
    return names


def calibration_sources(
    calibration: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    seed: int = 0,
    progress: bool = False,
    read: Callable[[str], tuple[Text, torch.Tensor]] | None = None,
) -> list[Source]:
    """The sources of `count` windows of `length` tokens that the names in `calibration` give in turn.

    A name that stands there twice has two turns in each round. Windows of a text are chosen by the seed; those of
    `self` are the model's own samples, kept in the user's cache. `read` gives a text by its name, and its tokens, where
    they are at hand (read and tokenised here otherwise). Raises ValueError, naming the source, where one is
    missing, too short for its turns, or left without any.
    """
    names = source_names(calibration)
    turns = Counter(names[index % len(names)] for index in range(count))
    if left_out := [name for name in names if not turns[name]]:
        few = counted(count, "window")
        raise ValueError(f"{len(names)} turns need more than {few}: none would be of {left_out[0]!r}")
    sources = []
    for name, windows in turns.items():
        try:
            sources.append(_source(name, model, tokenizer, windows, length, seed, progress, read))
        except ValueError as error:
            raise ValueError(f"text {name!r}: {error}") from error
    return sources


def _source(
    name: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    seed: int,
    progress: bool,
    read: Callable[[str], tuple[Text, torch.Tensor]] | None,
) -> Source:
    if name == SELF:
        windows = own_samples(
            model, tokenizer, count=count, length=length, seed=seed, cache=cache_directory() / "samples",
            progress=progress,
        )  # fmt: skip
        return Source(SELF, hashlib.sha256(windows.numpy().tobytes()).hexdigest(), windows)
    if read is None:
        return text_source(name, tokenizer, count=count, length=length, seed=seed)
    return _cut(*read(name), count=count, length=length, seed=seed)


def text_source(
    name: str, tokenizer: PreTrainedTokenizerBase, *, length: int, count: int | None = None, seed: int = 0
) -> Source:
    """Windows of `length` tokens of a text, `count` of them chosen by the seed, or all. Raises as `load_text` does."""
    text = load_text(name)
    return _cut(text, tokenise(text, tokenizer), length=length, count=count, seed=seed)


def _cut(text: Text, tokens: torch.Tensor, *, length: int, count: int | None, seed: int) -> Source:
    return Source(text.name, text.sha256, cut_windows(tokens, length=length, count=count, seed=seed))


def mixed(sources: list[Source], *, seed: int = 0) -> torch.Tensor:
    """Windows (count, length) of all sources; of several in an order by the seed, so that every part is of all."""
    windows = torch.cat([source.windows for source in sources])
    if len(sources) == 1:
        return windows
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]


def calibration_windows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    calibration: str = DEFAULT_CALIBRATION,
    *,
    count: int = 64,
    length: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> torch.Tensor:
    """Windows (count, length) of token ids to calibrate on; see `calibration_sources` for what `calibration` names."""
    sources = calibration_sources(
        calibration, model, tokenizer, count=count, length=length, seed=seed, progress=progress
    )
    return mixed(sources, seed=seed)
