"""Does an exported checkpoint run in llama.cpp as it does in transformers, and how fast beside the dense model?"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import transact
from transact.export import plain_llama, write_gguf
from transact.inputs import cut_windows, load_model, load_text, tokenise
from transact.recipe import PRESETS

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 6, 32, 48


def import_llama_cpp():
    """The package llama_cpp. Raises ValueError, with what to do, where it is not installed."""
    try:
        import llama_cpp
    except ImportError as error:
        raise ValueError("llama.cpp is not installed: `nox -s engines` builds llama-cpp-python (minutes)") from error
    return llama_cpp


@torch.no_grad()
def transformers_tokens(model: nn.Module, prompts: torch.Tensor) -> tuple[list[list[int]], float]:
    """Greedy continuations of `prompts` (count, length), one by one, and the median of decoded tokens a second."""
    continuations, speeds = [], []
    for prompt in prompts[:, None]:
        output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        tokens = [output.logits[0, -1].argmax().item()]
        start = time.perf_counter()
        while len(tokens) < NEW_TOKENS:
            output = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values)
            tokens.append(output.logits[0, -1].argmax().item())
        speeds.append((NEW_TOKENS - 1) / (time.perf_counter() - start))
        continuations.append(tokens)
    return continuations, statistics.median(speeds)


def llama_cpp_tokens(path: Path, prompts: torch.Tensor) -> tuple[list[list[int]], float]:
    """The same in llama.cpp, by a GGUF file, from the same token ids."""
    llama_cpp = import_llama_cpp()
    exact = {"type_k": 0, "type_v": 0} if path.stem == "f32" else {}  # a cache in float32 too, not in its usual float16
    engine = llama_cpp.Llama(
        str(path), n_ctx=512, n_threads=torch.get_num_threads(), n_gpu_layers=0, verbose=False, seed=0, **exact
    )
    continuations, speeds = [], []
    for prompt in prompts.tolist():
        stream = engine.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0, reset=True)
        tokens = [next(stream)]
        start = time.perf_counter()
        while len(tokens) < NEW_TOKENS:
            tokens.append(next(stream))
        speeds.append((NEW_TOKENS - 1) / (time.perf_counter() - start))
        continuations.append(tokens)
    engine.close()
    return continuations, statistics.median(speeds)


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
    recipe = replace(PRESETS["best"], allocation="plain")
    pruned = transact.prune(dense, windows, recipe=recipe, ratio=ratio, progress=True)
    text = tokenise(load_text("embedded", split="evaluation"), tokenizer)
    prompts = cut_windows(text, length=PROMPT_TOKENS, count=PROMPTS, seed=0)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name, narrow, plain in (
            ("dense", dense, dense), (f"best, plain, {ratio:.0%} removed", pruned.model, plain_llama(pruned.model)),
        ):  # fmt: skip
            expected, speed = transformers_tokens(narrow, prompts)
            exported, exported_speed = transformers_tokens(plain, prompts)
            common = {"model": name, "parameters": plain.num_parameters()}
            for engine, tokens, rate, size in (
                ("transformers", expected, speed, None), ("transformers, exported", exported, exported_speed, None),
            ):  # fmt: skip
                rows.append(common | {"engine": engine, "tokens_per_s": rate, "file_mib": size,
                                      "same_tokens": agreement(expected, tokens)})  # fmt: skip
            for kind in kinds:
                path = Path(directory) / f"{kind}.gguf"
                write_gguf(path, plain, tokenizer, kind=kind)
                tokens, rate = llama_cpp_tokens(path, prompts)
                rows.append(common | {"engine": f"llama.cpp {kind}", "tokens_per_s": rate,
                                      "file_mib": path.stat().st_size / 2**20,
                                      "same_tokens": agreement(expected, tokens)})  # fmt: skip
    return rows
