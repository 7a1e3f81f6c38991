"""Models in ExecuTorch, by programs made of them: what a phone runs, on this machine's CPU."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from transact.export import write_program


def executorch_version() -> str:
    """The version of executorch. Raises ValueError, with what to do, where it is not installed."""
    try:
        return metadata.version("executorch")
    except metadata.PackageNotFoundError as error:
        raise ValueError("executorch is not installed: python -m pip install executorch==1.5.1") from error


def executorch_stream(path: Path) -> Callable[[list[int]], Iterator[int]]:
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


def continued_in_executorch(
    model: nn.Module, prompts: Sequence[list[int]], *, tokens: int = 48, kind: str = "f32"
) -> tuple[list[list[int]], float, float]:
    """Greedy token ids after each prompt, the median of tokens a second after the first, and the MiB of the program.

    The program has room for the longest prompt and its continuation. Raises ValueError as `write_program` does.
    """
    executorch_version()
    continuations, speeds = [], []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:  # Windows keeps mapped files
        path = Path(directory) / "model.pte"
        write_program(path, model, context=max(map(len, prompts)) + tokens, kind=kind)
        stream = executorch_stream(path)
        for prompt in prompts:
            said = stream(prompt)
            first = next(said)
            start = time.perf_counter()
            others = [*islice(said, tokens - 1)]
            speeds.append(len(others) / (time.perf_counter() - start))
            continuations.append([first, *others])
        return continuations, statistics.median(speeds), path.stat().st_size / 2**20
