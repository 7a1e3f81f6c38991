"""Does an exported checkpoint run in llama.cpp as it does in transformers, and how fast beside the dense model?"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import transact
from transact.export import plain_llama, write_gguf
from transact.models import load_model
from transact.recipe import PRESETS
from transact.texts import cut_windows, load_text, tokenise

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 6, 32, 48


def import_llama_cpp():
    """The package llama_cpp. Raises ValueError, with what to do, where it is not installed."""
    try:
        import llama_cpp
    except ImportError as error:
        raise ValueError("llama.cpp is not installed: `nox -s engines` builds llama-cpp-python (minutes)") from error
    return llama_cpp


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


@torch.no_grad()
def transformers_stream(model: nn.Module, prompt: list[int]) -> Iterator[int]:
    """The greedy continuation of token ids, token by token, without end."""
    ids, cache = torch.tensor([prompt]), None
    while True:
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = output.logits[:, -1].argmax(dim=-1, keepdim=True), output.past_key_values
        yield ids.item()


def llama_cpp_stream(path: Path) -> Callable[[list[int]], Iterator[int]]:
    """The same in llama.cpp, by a GGUF file, from the same token ids."""
    exact = {"type_k": 0, "type_v": 0} if path.stem == "f32" else {}  # a cache in float32 too, not in its usual float16
    engine = import_llama_cpp().Llama(
        str(path), n_ctx=512, n_threads=torch.get_num_threads(), n_gpu_layers=0, verbose=False, seed=0, **exact
    )
    return partial(engine.generate, top_k=1, temp=0.0, repeat_penalty=1.0, reset=True)


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Fraction of tokens that are the same, each continuation counted up to its first difference."""
    same = 0
    for mine, other in zip(ours, theirs, strict=True):
        differing = [mine_one != other_one for mine_one, other_one in zip(mine, other, strict=True)]
        same += differing.index(True) if any(differing) else len(mine)
    return same / sum(map(len, ours))


def compare_engines(
    model: str = "smollm2-135m", *, ratio: float = 0.3, samples: int = 32, kinds: Sequence[str] = ("f32", "f16", "q8_0")
) -> list[dict]:
    """Rows for the dense model and the one pruned by `best` with a plain plan, in transformers and by GGUF files."""
    import_llama_cpp()
    dense, tokenizer = load_model(model, dtype="float32", device="cpu")
    windows = cut_windows(tokenise(load_text("embedded"), tokenizer), length=256, count=samples, seed=0)
    recipe = replace(PRESETS["best"], engine="plain")
    pruned = transact.prune(dense, windows, recipe=recipe, ratio=ratio, progress=True)
    text = tokenise(load_text("embedded", split="evaluation"), tokenizer)
    prompts = cut_windows(text, length=PROMPT_TOKENS, count=PROMPTS, seed=0).tolist()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name, narrow, plain in (
            ("dense", dense, dense), (f"best, plain, {ratio:.0%} removed", pruned.model, plain_llama(pruned.model)),
        ):  # fmt: skip
            measured = {
                "transformers": greedy(partial(transformers_stream, narrow), prompts),
                "transformers, exported": greedy(partial(transformers_stream, plain), prompts),
            }
            sizes = {}
            for kind in kinds:
                path, engine = Path(directory) / f"{kind}.gguf", f"llama.cpp {kind}"
                write_gguf(path, plain, tokenizer, kind=kind)
                sizes[engine] = path.stat().st_size / 2**20
                measured[engine] = greedy(llama_cpp_stream(path), prompts)
            expected, _ = measured["transformers"]
            for engine, (tokens, rate) in measured.items():
                rows.append({
                    "model": name, "parameters": plain.num_parameters(), "engine": engine, "tokens_per_s": rate,
                    "file_mib": sizes.get(engine), "same_tokens": agreement(expected, tokens),
                })  # fmt: skip
    return rows
