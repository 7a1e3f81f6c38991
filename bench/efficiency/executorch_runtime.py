"""Models in ExecuTorch, by programs made of them: what a phone runs, on this machine's CPU."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from transact.export import PROGRAM_TYPES, write_program

from .continuations import NEW_TOKENS, Run, greedy


def executorch_version() -> str:
    """The version of executorch. Raises ValueError, with what to do, where it is not installed."""
    try:
        return metadata.version("executorch")
    except metadata.PackageNotFoundError as error:
        raise ValueError("executorch is not installed: python -m pip install executorch==1.5.1") from error


def runs_in_executorch(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]
) -> Iterator[Run]:
    """A model, dense or narrowed, in programs of every type, with room for the longest prompt and its continuation."""
    context = max(map(len, prompts)) + NEW_TOKENS
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:  # Windows keeps mapped files
        for kind in PROGRAM_TYPES:
            path = Path(directory) / f"{kind}.pte"
            write_program(path, model, context=context, kind=kind)
            yield Run(f"ExecuTorch {kind}", *greedy(program_stream(path), prompts), path.stat().st_size / 2**20)


def program_stream(path: Path) -> Callable[[list[int]], Iterator[int]]:
    """The greedy continuation of token ids by a program, token by token, for as long as it has room.

    On as many threads as torch has.
    """
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(torch.get_num_threads())
    method = Runtime.get().load_program(path).load_method("forward")

    def stream(prompt: list[int]) -> Iterator[int]:
        ids, start = torch.tensor([prompt]), 0
        while True:
            end = start + ids.shape[1]
            (logits,) = method.execute([ids, torch.arange(start, end)])
            ids, start = logits[:, -1].argmax(dim=-1, keepdim=True), end
            yield ids.item()

    return stream
