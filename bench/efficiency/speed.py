"""Latency, throughput and memory of generation, prefill and decode apart, at a fixed number of tokens."""

import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import DynamicCache, PretrainedConfig, StaticCache

from transact.devices import resolve_device
from transact.entry import in_one_line
from transact.gradients import free_memory
from transact.modeling_transact import CACHE
from transact.models import DTYPES, load_model, read_config
from transact.timing import Ratio, in_turn, ratio_of, seconds_of

from ..environment import environment, fast_dtype
from ..records import SPEED_SCHEMA
from .costs import (
    Costs,
    Roofline,
    decode_costs,
    largest_batch,
    longest_context,
    measure_roofline,
    memory_needed,
    prefill_costs,
)
from .memory import kv_bytes_per_token, peak_memory_mib, release, reset_peak_memory, weight_bytes
from .shapes import SHAPES, random_model, shape_by_name

REPEATS = 7  # of which an interval can be told, from the least to the largest
PREFIX = 64  # tokens before those whose decoding is timed
MODES = ("eager", "static", "captured", "graphs")
# (prefix, decoded) tokens: the paper's figure, and one that two CPU cores finish
GRIDS = {
    "paper": ((64, 64), (128, 64), (256, 64), (512, 64), (960, 64), (256, 128), (256, 256), (256, 512), (256, 768)),
    "quick": ((64, 16), (256, 16), (960, 16)),
}


@dataclass(frozen=True)
class SpeedCase:
    """Everything that decides a speed. `mode`: "eager" with a growing cache, "static" with one of fixed size,
    "captured" its step recorded once as a CUDA graph (as "static" without a GPU), "graphs" the same compiled (and
    recorded, on a GPU)."""

    model: str
    prefix: int
    decode: int
    batch: int
    mode: str
    dtype: str
    device: str


@torch.no_grad()
def generate_timed(model: nn.Module, ids: torch.Tensor, decode: int, step, cache) -> tuple[float, float]:
    """Seconds of the prefill of `ids` (batch, prefix), which gives the first token, and of `decode` tokens after it."""
    device, following = model.device, []

    def prefill():
        output = model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        following.append(output.logits[:, -1:].argmax(dim=-1))

    def decode_all():
        token = following[0]
        for _ in range(decode):
            token = step(token, cache)

    return seconds_of(prefill, device), seconds_of(decode_all, device)


def decode_step(model: nn.Module, mode: str):
    """A function from a token (batch, 1) and the cache to the next token."""

    def step(token: torch.Tensor, cache) -> torch.Tensor:
        output = model(input_ids=token, **{CACHE: cache}, use_cache=True)
        return output.logits[:, -1:].argmax(dim=-1)

    if mode == "captured" and model.device.type == "cuda":
        return CapturedStep(step)
    if mode != "graphs":
        return step
    compiled = torch.compile(step, mode="reduce-overhead" if model.device.type == "cuda" else "default", dynamic=False)

    def marked(token: torch.Tensor, cache) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(token, cache).clone()  # the graph's own output is overwritten by the next step

    return marked


def forget_compiled() -> None:
    """Forget what was compiled: of a second shape torch would compile one for all shapes, of a ninth nothing more."""
    with warnings.catch_warnings(action="ignore"):  # torch's own, about names that it uses itself
        torch.compiler.reset()


class CapturedStep:
    """A decoding step recorded as a CUDA graph at its second call: the same kernels, launched all at once from then on.

    The first call sets up what must not be set up while recording. The cache must be static and always the same.
    """

    def __init__(self, step):
        self.step, self.calls, self.graph = step, 0, None

    def __call__(self, token: torch.Tensor, cache) -> torch.Tensor:
        self.calls += 1
        if self.calls == 1:
            return self.step(token, cache)
        if self.graph is None:
            self.graph, self.given = torch.cuda.CUDAGraph(), token.clone()
            with torch.cuda.graph(self.graph):
                self.following = self.step(self.given, cache)
        self.given.copy_(token)
        self.graph.replay()
        return self.following.clone()


def runner(model: nn.Module, case: SpeedCase) -> Callable[[], tuple[float, float]]:
    """A function that generates as the case says and gives the seconds of prefill and of decoding."""
    ids = torch.randint(0, model.config.vocab_size, (case.batch, case.prefix), device=model.device)
    step, length = decode_step(model, case.mode), case.prefix + case.decode + 1
    static = None if case.mode == "eager" else StaticCache(config=model.config, max_cache_len=length)

    def run() -> tuple[float, float]:
        if static is None:
            return generate_timed(model, ids, case.decode, step, DynamicCache(config=model.config))
        if static.layers and static.layers[0].is_initialized:
            static.reset()
        return generate_timed(model, ids, case.decode, step, static)

    return run


def measure_speed(
    model: nn.Module,
    case: SpeedCase,
    roofline: Roofline,
    *,
    repeats: int = REPEATS,
    warm_up: int = 1,
    reference: nn.Module | None = None,
) -> dict:
    """Metrics and raw samples of a case: medians of `repeats` runs after `warm_up`, which is reported apart.

    With a `reference` both run in turn; metrics say how many times as fast as that the model is, and `verdicts` whether
    it is faster, slower, or that is inconclusive.
    """
    if case.mode == "graphs":
        forget_compiled()
    run = runner(model, case)
    reset_peak_memory(model.device)
    start = time.perf_counter()
    for _ in range(warm_up):
        run()
    warm_up_s = time.perf_counter() - start
    if reference is None:
        [samples], ratios = in_turn([run], repeats), {}
        peak = peak_memory_mib(model.device)
    else:
        peak = max(0.0, peak_memory_mib(model.device) - weight_bytes(reference) / 2**20)  # that lies there too
        beside = runner(reference, case)
        for _ in range(warm_up):
            beside()
        samples, references = in_turn([run, beside], repeats)
        ratios = speedups(references, samples)
    prefill_s, decode_s = (statistics.median(column) for column in zip(*samples, strict=True))
    size = model.dtype.itemsize
    middle = decode_costs(model.config, context=case.prefix + case.decode // 2, batch=case.batch, element_size=size)
    whole = Costs(middle.operations * case.decode, middle.bytes * case.decode)
    prompt = prefill_costs(model.config, length=case.prefix, batch=case.batch, element_size=size)
    return {
        "metrics": {
            "prefill_s": prefill_s,
            "decode_s": decode_s,
            "latency_s": statistics.median(sum(pair) for pair in samples),
            "decode_tokens_per_s": case.batch * case.decode / decode_s,
            "prefill_tokens_per_s": case.batch * case.prefix / prefill_s,
            "prefill_roofline_fraction": roofline.seconds(prompt) / prefill_s,
            "decode_roofline_fraction": roofline.seconds(whole) / decode_s,
            "decode_bytes_per_token": middle.bytes,
            "decode_operations_per_token": middle.operations,
            "prefill_bytes": prompt.bytes,
            "prefill_operations": prompt.operations,
            "warm_up_s": warm_up_s,
            "weight_bytes": weight_bytes(model),
            "kv_bytes_per_token": kv_bytes_per_token(model),
            "peak_memory_mib": peak,
            "copy_bytes_per_s": roofline.bytes_per_second,
            "matrix_operations_per_s": roofline.operations_per_second,
            **speedup_metrics(ratios),
        },
        "samples": {"prefill_s": [pair[0] for pair in samples], "decode_s": [pair[1] for pair in samples]},
        "verdicts": {name: ratio.verdict for name, ratio in ratios.items()},
    }


def speedups(references: Sequence[tuple[float, float]], samples: Sequence[tuple[float, float]]) -> dict[str, Ratio]:
    """Of "prefill" and of "decode" how many times as fast the samples are as the references that ran beside them."""
    pairs = zip(zip(*references, strict=True), zip(*samples, strict=True), strict=True)
    return dict(zip(("prefill", "decode"), (ratio_of(*pair) for pair in pairs), strict=True))


def speedup_metrics(ratios: Mapping[str, Ratio]) -> dict[str, float]:
    """Speed-ups by name and their intervals as metrics of a record."""
    metrics = {}
    for name, ratio in ratios.items():
        metrics |= {f"{name}_speedup": ratio.median, f"{name}_speedup_low": ratio.low}
        metrics[f"{name}_speedup_high"] = ratio.high
    return metrics


def decode_rate(
    model: nn.Module, tokens: int, *, prefix: int = PREFIX, repeats: int = REPEATS, reference: nn.Module | None = None
) -> tuple[float, float, dict[str, Ratio]]:
    """Decoded tokens per second, the median of `repeats` after one that warms up, and its standard error.

    One sequence, `tokens` after `prefix`, with a growing cache; on a GPU with steps that are captured, as servers do:
    eager ones take there what their launches take, however narrow the model is. The standard error of a median is 1.25
    times that of a mean where samples scatter normally. With a `reference` both run in turn; how many times as fast the
    model is, in "prefill" of the prefix and in "decode", comes third.
    """
    mode = "captured" if model.device.type == "cuda" else "eager"
    case = SpeedCase("", prefix, tokens, 1, mode, str(model.dtype), model.device.type)
    models = [model] if reference is None else [model, reference]
    samples, *beside = [column[1:] for column in in_turn([runner(one, case) for one in models], repeats + 1)]
    rates = [tokens / decode_s for _, decode_s in samples]
    error = 1.25 * statistics.stdev(rates) / repeats**0.5
    return statistics.median(rates), error, speedups(*beside, samples) if beside else {}


def config_of(name: str) -> PretrainedConfig:
    """The configuration of a shape by name or of a checkpoint directory. Raises ValueError for anything else."""
    return read_config(name) if Path(name).is_dir() else shape_by_name(name)


def memory_of(device: torch.device) -> int:
    """Bytes of the device's memory, or of the host's that are free."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return free_memory(device)


def run_grid(
    models: Sequence[str],
    *,
    lengths: Sequence[tuple[int, int]],
    batches: Sequence[int] = (1,),
    modes: Sequence[str] = ("eager",),
    dtype: str = "auto",
    device: str = "auto",
    repeats: int = REPEATS,
) -> Iterator[dict]:
    """A record of every cell, as it is measured; of what does not fit or fails one that says so, and the grid goes on.

    A model that ran out of memory at a batch is not tried at larger ones of the same length. The first model, without
    which nothing begins, is the reference: where memory holds both, each other one runs in turn with it, and its
    record says how much faster it is.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    where = resolve_device(device)
    dtype = fast_dtype(device) if dtype == "auto" else dtype
    configs = {name: config_of(name) for name in models}
    names = [Path(name).name for name in models]
    if len(set(names)) < len(names):
        raise ValueError(f"models are told apart by their last names, two are called the same: {', '.join(names)}")
    roofline, memory = None, memory_of(where)
    shared = {"schema": SPEED_SCHEMA, "environment": environment(where)}
    cells = [*itertools.product(dict.fromkeys(modes), lengths, sorted({*batches}))]
    with tqdm(total=len(models) * len(cells), desc="speed", unit="cell", disable=None) as bar:
        reference = None
        for name, config in configs.items():
            model, full = None, set()
            for mode, (prefix, decode), batch in cells:
                case = SpeedCase(Path(name).name, prefix, decode, batch, mode, dtype, where.type)
                outcome = {"status": "success"}
                try:
                    if reason := _misfit(config, case, memory, full):
                        outcome = _without_figures("skipped", reason)
                    else:
                        roofline = roofline or measure_roofline(where, DTYPES[dtype])
                        model = model or _model(name, config, dtype, where)
                        beside = reference if _fits_beside(config, configs[models[0]], case, memory) else None
                        outcome |= _measured(model, case, roofline, repeats, beside)
                        outcome["reference"] = names[0] if outcome.get("verdicts") else None
                except torch.OutOfMemoryError as error:
                    full.add((mode, prefix, decode))
                    outcome = _without_figures("out of memory", str(error).splitlines()[0])
                    release(where)
                except ValueError as error:  # it cannot be read
                    if name == models[0]:
                        raise
                    outcome = _without_figures("failed", str(error))
                yield shared | {"case": asdict(case)} | outcome
                bar.update()
            reference = model if name == models[0] and len(models) > 1 else reference
            del model
            if "graphs" in modes:
                forget_compiled()
            release(where)


def _misfit(config: PretrainedConfig, case: SpeedCase, memory: int, full: set[tuple]) -> str | None:
    """Why a cell is not tried, or None; `full` holds the modes and lengths that ran out of memory."""
    tokens = case.prefix + case.decode
    needed = memory_needed(config, context=tokens, batch=case.batch, element_size=DTYPES[case.dtype].itemsize)
    if tokens > config.max_position_embeddings:
        return f"{tokens} tokens are more than its context"
    if needed > memory:
        return f"needs {needed / 2**30:.1f} GiB of {memory / 2**30:.1f}"
    if (case.mode, case.prefix, case.decode) in full:
        return "a smaller batch ran out of memory"
    return None


def _fits_beside(config: PretrainedConfig, other: PretrainedConfig, case: SpeedCase, memory: int) -> bool:
    """Whether memory holds two models and their caches at once."""
    size, tokens = DTYPES[case.dtype].itemsize, case.prefix + case.decode
    needed = (memory_needed(one, context=tokens, batch=case.batch, element_size=size) for one in (config, other))
    return sum(needed) <= memory and tokens <= other.max_position_embeddings


def _measured(model: nn.Module, case: SpeedCase, roofline: Roofline, repeats: int, reference: nn.Module | None) -> dict:
    """What `measure_speed` gives, or why it failed: compilation may, where there is no compiler, and only then.

    Where memory does not hold it beside the reference, it is measured alone.
    """
    try:
        return measure_speed(model, case, roofline, repeats=repeats, reference=reference)
    except torch.OutOfMemoryError:
        if reference is None:
            raise
        release(model.device)
        return _measured(model, case, roofline, repeats, None)
    except Exception as error:  # compilers raise whatever they like
        return _without_figures("failed", f"{type(error).__name__}: {in_one_line(error)}")


def _without_figures(status: str, error: str) -> dict:
    return {"status": status, "error": error, "metrics": {}, "samples": {}}


def _model(name: str, config: PretrainedConfig, dtype: str, device: torch.device) -> nn.Module:
    if name in SHAPES and not Path(name).is_dir():
        return random_model(config, dtype=dtype, device=device)
    return load_model(name, dtype=dtype, device=str(device))[0]


def fitting(models: Sequence[str], memory_gib: float, *, context: int = 4096, element_size: int = 2) -> list[dict]:
    """For each model: weights, KV bytes a token, and what fits in a memory of this size, computed."""
    if not 0 < memory_gib * 2**30 < math.inf:
        raise ValueError(f"memory must be a positive number of GiB, got {memory_gib}")
    if context < 1:
        raise ValueError(f"context must be at least 1 token, got {context}")
    rows, memory = [], int(memory_gib * 2**30)
    for name in models:
        config = config_of(name)
        whole = memory_needed(config, context=0, batch=1, element_size=element_size)
        each = memory_needed(config, context=1, batch=1, element_size=element_size) - whole
        rows.append({
            "model": Path(name).name, "memory_gib": memory_gib, "weight_bytes": whole, "kv_bytes_per_token": each,
            "longest_context": longest_context(config, memory, element_size=element_size),
            "largest_batch": largest_batch(config, memory, context=context, element_size=element_size),
            "batch_context": context,
        })  # fmt: skip
    return rows
