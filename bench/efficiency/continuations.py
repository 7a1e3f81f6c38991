"""Greedy continuations of the same prompts in any engine: how fast they come, and how many tokens are the same."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from transact.modeling_transact import CACHE
from transact.texts import cut_windows, load_text, tokenise

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 6, 32, 48


@dataclass(frozen=True)
class Run:
    """What an engine made of the prompts: token ids after each, its speed, and the MiB of the weights that it read.

    `engine` is its name and, where it runs several, the type of the weights.
    """

    engine: str
    continuations: list[list[int]]
    tokens_per_s: float
    mib: float


def prompts_of(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of `PROMPTS` places in the embedded evaluation text."""
    text = tokenise(load_text("embedded", split="evaluation"), tokenizer)
    return cut_windows(text, length=PROMPT_TOKENS, count=PROMPTS, seed=0).tolist()


def greedy(stream: Callable[[list[int]], Iterator[int]], prompts: Sequence[list[int]]) -> tuple[list[list[int]], float]:
    """What `stream` says after each prompt, one by one, and the median of tokens a second after the first token."""
    continuations, speeds = [], []
    for prompt in prompts:
        tokens = stream(prompt)
        said = [next(tokens)]
        start = time.perf_counter()
        said += itertools.islice(tokens, NEW_TOKENS - 1)
        speeds.append((NEW_TOKENS - 1) / (time.perf_counter() - start))
        continuations.append(said)
    return continuations, statistics.median(speeds)


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Fraction of tokens that are the same, each continuation counted up to its first difference."""
    same = 0
    for mine, other in zip(ours, theirs, strict=True):
        differing = [mine_one != other_one for mine_one, other_one in zip(mine, other, strict=True)]
        same += differing.index(True) if any(differing) else len(mine)
    return same / sum(map(len, ours))


@torch.no_grad()
def transformers_stream(model: nn.Module, prompt: list[int]) -> Iterator[int]:
    """The greedy continuation of token ids, token by token, without end."""
    ids, cache = torch.tensor([prompt]), None
    while True:
        output = model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        ids, cache = output.logits[:, -1].argmax(dim=-1, keepdim=True), getattr(output, CACHE)
        yield ids.item()
