"""Models in llama.cpp, by GGUF files made of them."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from transact.export import llama_by_layer, write_gguf

from .continuations import Run, greedy

KINDS = ("f32", "f16", "q8_0")


def llama_cpp_version() -> str:
    """The version of llama-cpp-python. Raises ValueError, with what to do, where it is not installed."""
    try:
        import llama_cpp
    except ImportError as error:
        raise ValueError("llama.cpp is not installed: `nox -s engines` builds llama-cpp-python (minutes)") from error
    return llama_cpp.__version__


def runs_in_llama_cpp(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]
) -> Iterator[Run]:
    """A stock Llama, or a narrowed one with one head width, in GGUF files of every kind."""
    stated = model if model.config.model_type == "llama" else llama_by_layer(model)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:  # Windows keeps mapped files
        for kind in KINDS:
            path = Path(directory) / f"{kind}.gguf"
            write_gguf(path, stated, tokenizer, kind=kind)
            yield Run(f"llama.cpp {kind}", *greedy(_stream(path), prompts), path.stat().st_size / 2**20)


def _stream(path: Path) -> Callable[[list[int]], Iterator[int]]:
    """The greedy continuation of token ids by a GGUF file, token by token, without end."""
    from llama_cpp import Llama

    exact = {"type_k": 0, "type_v": 0} if path.stem == "f32" else {}  # a cache in float32 too, not in its usual float16
    engine = Llama(
        str(path), n_ctx=512, n_threads=torch.get_num_threads(), n_gpu_layers=0, verbose=False, seed=0, **exact
    )
    return partial(engine.generate, top_k=1, temp=0.0, repeat_penalty=1.0, reset=True)
