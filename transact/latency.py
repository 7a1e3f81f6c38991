"""What a layer's modules take by their widths: read off whole models on the device, kept in the user's cache."""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
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
from .modeling_transact import CACHE, TransActForCausalLM
from .prune import features_of, narrowed_config
from .timing import Ratio, in_turn, ratio_of, seconds_of
from .widths import MODULES, Widths, dense_widths, head_dim_of, linear_parameters, widths_of

TOKENS = ("decode", "prefill")
STEPS = 8  # tokens decoded in one timed run of a model
TABLE_REPEATS, MODEL_REPEATS, WARM_UP = 11, 15, 2
LEAST_REPEATS = 9  # of fewer pairs one that was disturbed is an end of the interval
LONG_ENOUGH = 30.0  # seconds; what takes longer in all its repeats has fewer of them
MOST_SECONDS = 3600.0  # that a part of one layer takes
LEAST_BYTES = 256 * 2**20  # of the layers of a model that a table is read off: more than caches hold


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
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} to be timed must be at least 1, got {value!r}")
        most = longest_context(config, self.tokens)
        if self.context > most:
            raise ValueError(f"context to be timed must be at most {most} tokens with this model, got {self.context}")


def longest_context(config: PretrainedConfig, tokens: str) -> int:
    """The most tokens that can be timed in a model's context."""
    return config.max_position_embeddings - (STEPS if tokens == "decode" else 0)


@dataclass(frozen=True)
class LatencyTable:
    """Seconds that a layer's attention and MLP add by being there, and each dimension of a head or of the MLP."""

    attention: float
    query_key_dim: float
    value_dim: float
    mlp: float
    mlp_dim: float

    def prices(self, widths: Widths) -> tuple[float, float]:
        """Seconds of a layer's attention and of its MLP, as `transact.allocate.Prices`; none of what is dropped."""
        attention = self.attention + self.query_key_dim * widths.qk_head_dim + self.value_dim * widths.v_head_dim
        mlp = self.mlp + self.mlp_dim * widths.mlp
        return attention if widths.has_attention else 0.0, mlp if widths.has_mlp else 0.0


def conditions(dense: nn.Module, workload: Workload) -> dict[str, str | int | float | None]:
    """All that latencies depend on: device, threads, dtype, precision, shapes, what is timed, versions."""
    config = dense.config
    matmul = torch.backends.cuda.matmul if dense.device.type == "cuda" else torch.backends.mkldnn.matmul
    shapes = {name: getattr(config, name) for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "hidden_act", "vocab_size",
    )}  # fmt: skip
    return {
        "device": device_name(dense.device), "threads": torch.get_num_threads(), "dtype": str(dense.dtype),
        "precision": matmul.fp32_precision, **asdict(workload), **shapes, "head_dim": head_dim_of(config),
        **features_of(config), "attention": config._attn_implementation, "torch": torch.__version__,
        "transformers": transformers.__version__, "repeats": TABLE_REPEATS,
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
    """The table of a file, unless it is torn, of other conditions than the current ones, or holds what is no time."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        table = LatencyTable(**kept["table"])
        times = asdict(table).values()
        are_times = all(type(value) is float and 0 <= value < MOST_SECONDS for value in times) and any(times)
        return table if kept["conditions"] == current and are_times else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def measured_table(dense: nn.Module, workload: Workload, *, progress: bool = False) -> LatencyTable:
    """The table by which the seconds of some models of the dense one's shapes, timed in turn, are told best.

    A module that is timed by itself takes another time than in a model, whose weights lie in no cache and whose calls
    follow each other: so models of random weights are timed, without their heads, each narrowed in another way. What
    else a machine does only adds to a run, often twice what it takes: of each model the time that a quarter of its runs
    stay below counts. Least squares over parts none of which takes less than nothing.
    """
    with undisturbed(dense), torch.no_grad():
        plans = table_plans(dense)
        timers = [
            _model_timer(model_of_widths(dense, widths, with_vocabulary=False), workload, with_head=False)
            for widths in plans
        ]
        times = _times_in_turn(timers, TABLE_REPEATS, bar="latency" if progress else "")
    return fitted_table(plans, np.quantile(times, 0.25, axis=1))


def table_plans(dense: nn.Module) -> list[tuple[Widths, ...]]:
    """Widths of as many layers as a table is read off, in ways that tell its parts from each other."""
    whole = dense_widths(dense.config)[0]
    queries, values, mlps = allowed_widths(dense.config, whole, MODULES, engine_by_name("transformers"))
    layer_bytes = linear_parameters(dense.config, [whole]) * dense.dtype.itemsize
    layers = min(dense.config.num_hidden_layers, max(2, math.ceil(LEAST_BYTES / layer_bytes)))
    query, value, mlp = ((widths[0], widths[len(widths) // 2]) for widths in (queries, values, mlps))
    everywhere = [
        {"qk_head_dim": query[0]}, {"v_head_dim": value[0]}, {"mlp": mlp[0]}, {"mlp": mlp[1]},
        *({"qk_head_dim": query[part], "v_head_dim": value[part]} for part in range(2)),
        {"qk_head_dim": query[1], "v_head_dim": value[1], "mlp": mlp[1]},
    ]  # fmt: skip
    in_every_second = [{"qk_head_dim": 0, "v_head_dim": 0}, {"mlp": 0}]
    barely = barely_narrowed(dense, MODULES)
    return [
        barely[:layers],
        *((replace(whole, **changes),) * layers for changes in everywhere),
        *(((barely[0], replace(whole, **changes)) * layers)[:layers] for changes in in_every_second),
    ]


def barely_narrowed(dense: nn.Module, modules: Sequence[str]) -> tuple[Widths, ...]:
    """Dense widths, but for one step of the first layer: what keeps everything may be computed in another way."""
    first, *others = whole = dense_widths(dense.config)
    allowed = allowed_widths(dense.config, first, modules, engine_by_name("transformers"))
    for part, widths in zip(("mlp", "v_head_dim", "qk_head_dim"), reversed(allowed), strict=True):
        if len(widths) > 1:
            return replace(first, **{part: widths[-2]}), *others
    return whole


def fitted_table(plans: Sequence[Sequence[Widths]], seconds: Sequence[float]) -> LatencyTable:
    """The table nearest, in least squares, to the seconds of models of these widths; what else they take is alike."""
    from scipy.optimize import nnls  # takes a quarter of a second to import

    rows = [
        [1, sum(one.has_attention for one in widths), sum(one.qk_head_dim for one in widths),
         sum(one.v_head_dim for one in widths), sum(one.has_mlp for one in widths), sum(one.mlp for one in widths)]
        for widths in plans
    ]  # fmt: skip
    counts = np.array(rows, dtype=np.float64)
    scale = counts.max(axis=0)
    parts, _ = nnls(counts / scale, seconds)
    return LatencyTable(*(parts / scale).tolist()[1:])


def config_of_widths(dense: nn.Module, widths: Sequence[Widths]) -> TransActConfig:
    """The configuration of a model of layers of these widths, which attends as the dense one does."""
    fewer = copy.deepcopy(dense.config)
    fewer.num_hidden_layers = len(widths)
    config = narrowed_config(fewer, widths)
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


def model_of_widths(dense: nn.Module, widths: Sequence[Widths], *, with_vocabulary: bool = True) -> TransActForCausalLM:
    """A model of these widths where the dense one is, with random weights: how long it takes hangs on shapes alone.

    It has as many layers as there are widths. Without the vocabulary it knows one token, and
    embedding and head, which may weigh more than a few layers, take no memory.
    """
    config = config_of_widths(dense, widths)
    if not with_vocabulary:
        vars(config).update(vocab_size=1, pad_token_id=None)  # not as attributes, which are checked one by one
    with undisturbed(dense), made_as(dense):
        return TransActForCausalLM(config).eval().requires_grad_(False)


def compared(dense: nn.Module, narrowed: nn.Module, workload: Workload, *, progress: bool = False) -> Ratio:
    """How many times as fast as the dense model the narrowed one is from end to end, timed in turn."""
    with undisturbed(dense, narrowed), torch.no_grad():
        timers = [_model_timer(model, workload) for model in (dense, narrowed)]
        return ratio_of(*_times_in_turn(timers, MODEL_REPEATS, bar="compare" if progress else ""))


def _times_in_turn(timers: Sequence[Callable[[], float]], most: int, *, bar: str = "") -> list[list[float]]:
    """Seconds of warm models in turn, of `most` rounds or of as many as are long enough."""
    round_seconds = max(1e-9, sum(min(times) for times in in_turn(timers, WARM_UP)))
    repeats = min(most, max(LEAST_REPEATS, math.ceil(LONG_ENOUGH / round_seconds)))
    return in_turn(timers, repeats, bar=bar)


def _model_timer(model: nn.Module, workload: Workload, *, with_head: bool = True) -> Callable[[], float]:
    """A function that gives the seconds of one prefill, or of decoding `STEPS` tokens one by one."""
    is_decode = workload.tokens == "decode"
    ids = torch.zeros(workload.batch, 1 if is_decode else workload.context, dtype=torch.int64, device=model.device)
    filled = filled_cache(model, model.config, workload)

    def run() -> float:
        cache = copy.deepcopy(filled)

        def steps() -> None:
            for _ in range(STEPS if is_decode else 1):
                if with_head:
                    model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
                else:
                    model.model(input_ids=ids, **{CACHE: cache}, use_cache=True)

        return seconds_of(steps, model.device)

    return run
