"""Models in ExecuTorch, by programs made of them: what a phone runs, on this machine's CPU."""

import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
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
    """The greedy continuation of token ids by a program, token by token, as long as it has room."""
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(torch.get_num_threads())
    method = Runtime.get().load_program(path).load_method("forward")

    def stream(prompt: list[int]) -> Iterator[int]:
        ids, start = torch.tensor([prompt]), 0
        while True:
            (logits,) = method.execute([ids, torch.arange(start, start + ids.shape[1])])
            start += ids.shape[1]
            ids = logits[:, -1].argmax(dim=-1, keepdim=True)
            yield ids.item()

    return stream
