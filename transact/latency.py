"""What a layer's modules take by their widths: measured at a few on the device, kept in the user's cache."""

import copy
import hashlib
import itertools
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import DynamicCache, PretrainedConfig

from . import modeling_transact
from .allocate import allowed_widths
from .cache import cache_directory
from .checkpoint import all_or_nothing
from .configuration_transact import TransActConfig
from .devices import device_name
from .engines import engine_by_name
from .entry import undisturbed
from .modeling_transact import TransActAttention, TransActForCausalLM, TransActMLP
from .prune import features_of, narrowed_config
from .timing import Ratio, cache_flusher, in_turn, ratio_of, seconds_of
from .widths import MODULES, Widths, dense_widths, head_dim_of, widths_of

TOKENS = ("decode", "prefill")
STEPS = 8  # tokens decoded in one timed run of a model
COPIES = 2  # of a module, called after each other in one timed run
MODULE_REPEATS, MODEL_REPEATS, WARM_UP = 31, 15, 2

Line = tuple[tuple[int, float], ...]  # widths, rising, and seconds


@dataclass(frozen=True)
class Workload:
    """What is timed: `tokens` "decode", one more for each of `batch` sequences of `context` tokens, or "prefill", the
    reading of these; as `generate` does, with a growing cache."""

    tokens: str = "decode"
    batch: int = 1
    context: int = 512

    def check(self, config: PretrainedConfig) -> None:
        """Raise ValueError for what cannot be timed of a model."""
        if self.tokens not in TOKENS:
            raise ValueError(f"tokens to be timed must be one of {', '.join(TOKENS)}, got {self.tokens!r}")
        for name in ("batch", "context"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name} to be timed must be at least 1, got {value!r}")
        most = longest_context(config, self.tokens)
        if self.context > most:
            raise ValueError(f"context to be timed must be at most {most} tokens with this model, got {self.context}")


def longest_context(config: PretrainedConfig, tokens: str) -> int:
    """The most tokens that can be timed in a model's context."""
    return config.max_position_embeddings - (STEPS if tokens == "decode" else 0)


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one layer's attention and MLP by their widths: measured at a few, rising, and straight in between.

    `equal`: attention whose query-key and value heads are as wide as each other. `unequal`: for some query-key widths,
    by value widths; these go another way through attention, so that one is no point on the line of the other.
    """

    equal: Line
    unequal: tuple[tuple[int, Line], ...]
    mlp: Line

    def prices(self, widths: Widths) -> tuple[float, float]:
        """Seconds of a layer's attention and of its MLP, as `transact.allocate.Prices`; none of what is dropped."""
        query, value = widths.qk_head_dim, widths.v_head_dim
        if not widths.has_attention:
            attention = 0.0
        elif query == value:
            attention = on_line(query, self.equal)
        else:
            attention = on_line(query, [(width, on_line(value, line)) for width, line in self.unequal])
        return attention, on_line(widths.mlp, self.mlp) if widths.has_mlp else 0.0


def on_line(width: int, points: Sequence[tuple[int, float]]) -> float:
    """Seconds at a width: straight between the points and beyond their ends, never less than a narrower point has."""
    widths = [point[0] for point in points]
    seconds = [*itertools.accumulate((point[1] for point in points), max)]
    if len(points) == 1:
        return seconds[0]
    right = min(max(bisect_right(widths, width), 1), len(points) - 1)
    slope = (seconds[right] - seconds[right - 1]) / (widths[right] - widths[right - 1])
    return max(0.0, seconds[right] + slope * (width - widths[right]))


def conditions(dense: nn.Module, workload: Workload) -> dict[str, str | int | float | None]:
    """All that latencies depend on: device, threads, dtype, shapes, what is timed, versions."""
    config = dense.config
    shapes = {name: getattr(config, name) for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "hidden_act", "vocab_size",
    )}  # fmt: skip
    return {
        "device": device_name(dense.device), "threads": torch.get_num_threads(), "dtype": str(dense.dtype),
        **asdict(workload), **shapes, "head_dim": head_dim_of(config), **features_of(config),
        "attention": config._attn_implementation, "torch": torch.__version__,
        "transformers": transformers.__version__, "repeats": MODULE_REPEATS,
        "modules": hashlib.sha256(Path(modeling_transact.__file__).read_bytes()).hexdigest()[:12],
    }  # fmt: skip


def latency_table(dense: nn.Module, workload: Workload, *, progress: bool = False) -> LatencyTable:
    """The table of a model's modules: from the user's cache if all conditions are the same, or measured and kept."""
    current = conditions(dense, workload)
    digest = hashlib.sha256(json.dumps(current, sort_keys=True).encode()).hexdigest()
    path = cache_directory() / "latency" / f"{digest[:16]}.json"
    if (kept := _kept_table(path, current)) is not None:
        return kept
    table = measured_table(dense, workload, progress=progress)
    with suppress(OSError), all_or_nothing(path) as partial:  # a cache that cannot be written costs time, no more
        partial.write_text(json.dumps({"conditions": current, "table": asdict(table)}, indent=1), encoding="utf-8")
    return table


def _kept_table(path: Path, current: dict) -> LatencyTable | None:
    """The table of a file, unless it is torn or of other conditions than the current ones."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["conditions"] != current:
            return None
        lines = kept["table"]
        return LatencyTable(
            _line(lines["equal"]), tuple((width, _line(line)) for width, line in lines["unequal"]), _line(lines["mlp"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _line(points: Sequence[Sequence]) -> Line:
    return tuple((int(width), float(seconds)) for width, seconds in points)


def spaced(widths: Sequence[int], count: int) -> list[int]:
    """So many of the widths, evenly over them, with both ends; all where there are fewer."""
    last = len(widths) - 1
    return [widths[place] for place in sorted({round(part * last / (count - 1)) for part in range(count)})]


def measured_table(dense: nn.Module, workload: Workload, *, progress: bool = False) -> LatencyTable:
    """Runs in turn of the narrowed model's own modules, with random weights that no cache holds any more.

    What else a machine does only adds to a run, often twice what it takes: of each module the time that a quarter of
    its runs stay below counts, and over rising widths the nearest times that never fall (isotonic regression).
    """
    whole = dense_widths(dense.config)[0]
    queries, values, mlps = allowed_widths(dense.config, whole, MODULES, engine_by_name("transformers"))
    few, mlps = spaced(queries, 3), spaced(mlps, 5)
    others = spaced([width for width in values if width not in few], 3)
    equal = spaced([width for width in queries if width in values], 5)
    heads = [*((width, width) for width in equal), *itertools.product(few, others)]
    flush = cache_flusher(dense.device)
    with undisturbed(dense), torch.no_grad():
        timers = [
            _attention_timer(dense, replace(whole, qk_head_dim=query, v_head_dim=value), workload, flush)
            for query, value in heads
        ]
        timers += [_mlp_timer(dense, replace(whole, mlp=width), workload, flush) for width in mlps]
        in_turn(timers, WARM_UP)
        times = in_turn(timers, MODULE_REPEATS, bar="latency" if progress else "")
    seconds = dict(zip([*heads, *mlps], (lower_quartile(one) for one in times), strict=True))
    return LatencyTable(
        never_falling((width, seconds[width, width]) for width in equal),
        tuple((query, never_falling((value, seconds[query, value]) for value in others)) for query in few),
        never_falling((width, seconds[width]) for width in mlps),
    )


def lower_quartile(seconds: Sequence[float]) -> float:
    return torch.tensor(seconds, dtype=torch.float64).quantile(0.25).item()


def never_falling(points: Iterable[tuple[int, float]]) -> Line:
    """The nearest seconds, in least squares, that do not fall with the width."""
    from scipy.optimize import isotonic_regression  # takes a quarter of a second to import

    widths, seconds = zip(*points, strict=True)
    return tuple(zip(widths, isotonic_regression(seconds).x.tolist(), strict=True))


def _attention_timer(
    dense: nn.Module, widths: Widths, workload: Workload, flush: Callable[[], None]
) -> Callable[[], float]:
    """A function that gives the seconds of one layer's attention at these widths."""
    config = config_of_widths(dense, (widths,) * dense.config.num_hidden_layers)
    copies = min(COPIES, config.num_hidden_layers)
    with made_as(dense):
        modules = [TransActAttention(config, layer).eval() for layer in range(copies)]
        hidden = torch.randn(workload.batch, 1 if workload.tokens == "decode" else workload.context, config.hidden_size)
        first = workload.context if workload.tokens == "decode" else 0
        places = torch.arange(first, first + hidden.shape[1])[None]
    tables = copy.deepcopy(dense.model.rotary_emb)(hidden, position_ids=places)
    filled = filled_cache(dense, config, workload)

    def run() -> float:
        cache = copy.deepcopy(filled)

        def attend() -> None:
            for module in modules:
                module(hidden, position_embeddings=tables, attention_mask=None, past_key_values=cache)

        flush()
        return seconds_of(attend, dense.device) / copies

    return run


def _mlp_timer(dense: nn.Module, widths: Widths, workload: Workload, flush: Callable[[], None]) -> Callable[[], float]:
    """A function that gives the seconds of one layer's MLP at these widths."""
    config = config_of_widths(dense, (widths,) * dense.config.num_hidden_layers)
    with made_as(dense):
        modules = [TransActMLP(config, 0).eval() for _ in range(COPIES)]
        hidden = torch.randn(workload.batch, 1 if workload.tokens == "decode" else workload.context, config.hidden_size)

    def run() -> float:
        flush()
        return seconds_of(lambda: [module(hidden) for module in modules], dense.device) / COPIES

    return run


def config_of_widths(dense: nn.Module, widths: Sequence[Widths]) -> TransActConfig:
    """The configuration of a model narrowed to these widths, which attends as the dense one does."""
    config = narrowed_config(dense.config, widths)
    config._attn_implementation = dense.config._attn_implementation
    return config


@contextmanager
def made_as(dense: nn.Module) -> Iterator[None]:
    """New tensors are on the model's device and in its dtype meanwhile, where nothing else is said."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dense.dtype)
    try:
        with dense.device:
            yield
    finally:
        torch.set_default_dtype(before)


def filled_cache(dense: nn.Module, config: PretrainedConfig, workload: Workload) -> DynamicCache:
    """The cache of a model of this configuration before what is timed: with the context, or empty before a prefill."""
    cache = DynamicCache(config=config)
    if workload.tokens == "decode":
        with made_as(dense):
            for entry, widths in enumerate(one for one in widths_of(config) if one.has_attention):
                shape = workload.batch, widths.kv_heads, workload.context
                cache.update(torch.ones(*shape, widths.qk_head_dim), torch.ones(*shape, widths.v_head_dim), entry)
    return cache


def model_of_widths(dense: nn.Module, widths: Sequence[Widths]) -> TransActForCausalLM:
    """A model of these widths where the dense one is, with random weights: how long it takes hangs on shapes alone."""
    with undisturbed(dense), made_as(dense):
        return TransActForCausalLM(config_of_widths(dense, widths)).eval().requires_grad_(False)


def compared(dense: nn.Module, narrowed: nn.Module, workload: Workload) -> Ratio:
    """How many times as fast as the dense model the narrowed one is from end to end, timed in turn."""
    with undisturbed(dense, narrowed), torch.no_grad():
        timers = [_model_timer(model, workload) for model in (dense, narrowed)]
        in_turn(timers, WARM_UP)
        return ratio_of(*in_turn(timers, MODEL_REPEATS))


def _model_timer(model: nn.Module, workload: Workload) -> Callable[[], float]:
    """A function that gives the seconds of one prefill, or of decoding `STEPS` tokens one by one."""
    is_decode = workload.tokens == "decode"
    ids = torch.zeros(workload.batch, 1 if is_decode else workload.context, dtype=torch.int64, device=model.device)
    filled = filled_cache(model, model.config, workload)

    def run() -> float:
        cache = copy.deepcopy(filled)

        def steps() -> None:
            for _ in range(STEPS if is_decode else 1):
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

        return seconds_of(steps, model.device)

    return run
