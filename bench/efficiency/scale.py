"""What pruning takes at each size: seconds by stage and peaks of memory, on random weights.

Neither depends on the weights' values. What a machine has no time for is measured on a few layers and extrapolated:
seconds and bytes are those of what does not depend on the layers and of each layer.
"""

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_type_hints

import torch
from transformers import PretrainedConfig

from transact import prune
from transact.devices import resolve_device
from transact.entry import in_one_line
from transact.models import DTYPES
from transact.widths import dense_widths, linear_parameters

from ..environment import code_hash, environment, fast_dtype
from ..records import SCALE_SCHEMA, line_of, read_lines
from .costs import measure_roofline, weight_elements
from .memory import peak_memory_mib, release, reset_peak_memory, weight_bytes
from .shapes import random_model, shape_by_name

SIZES = ("llama2-7b", "smollm2-135m", "llama3-1b", "llama3-3b", "llama3-8b")  # the one most asked for first
SIZES_OF_A_CPU = ("smollm2-135m",)
WAYS = ("best", "layerwise")
WINDOWS = {"cuda": (128, 2048), "cpu": (8, 512)}  # samples, tokens
RATIO = 0.2
FEWER_SAMPLES = (128, 32, 8)  # of these the most that there is time for
FEW_LAYERS = (2, 4)  # measured where there is no time for all of them
SHARE = 0.6  # of the time left that one cell may take
HOST = torch.device("cpu")
EFFICIENCY = (0.5, 0.7, 0.3)  # of large matrix products' rate in the model's dtype, float32 and float64
SECONDS_OF_A_LAYER = 0.8  # on a GPU, whatever its width: many small kernels


@dataclass(frozen=True)
class ScaleCase:
    """Everything that decides what a pruning takes. `way`: "best", the preset, the model on the device; "layerwise",
    the same with the model in host memory and one block at a time on the device."""

    shape: str
    way: str
    ratio: float
    samples: int
    seq_len: int
    dtype: str
    device: str
    code: str


@dataclass(frozen=True)
class Taken:
    """Seconds by stage, and MiB: of the weights, and the most held on the device and by the process on the host."""

    seconds: dict[str, float]
    mib: dict[str, float]

    def at(self, layers: int, fewer: "Taken", measured: tuple[int, int]) -> "Taken":
        """What `layers` would take, by a line through this one and `fewer`, of `measured[1]` and `measured[0]`."""
        times = (layers - measured[1]) / (measured[1] - measured[0])

        def line(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
            return {name: value + times * max(0.0, value - theirs[name]) for name, value in ours.items()}

        return Taken(line(self.seconds, fewer.seconds), line(self.mib, fewer.mib))


def first_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The shape with fewer layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    return config


def take(config: PretrainedConfig, case: ScaleCase, device: torch.device) -> Taken:
    """What pruning random weights of this shape takes, measured now."""
    start = time.perf_counter()
    model = random_model(config, dtype=case.dtype, device=device)
    if case.way == "layerwise":
        model.to(HOST)
    windows = torch.randint(
        0, config.vocab_size, (case.samples, case.seq_len), generator=torch.Generator().manual_seed(0)
    )
    made = time.perf_counter() - start
    release(device)
    for where in {device, HOST}:
        reset_peak_memory(where)
    start = time.perf_counter()
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of few tokens: weights are random anyway
        pruned = prune(model, windows, ratio=case.ratio, device=device if case.way == "layerwise" else None)
    total = time.perf_counter() - start
    mib = {"weights": weight_bytes(model) / 2**20, "host": peak_memory_mib(HOST)}
    if device.type == "cuda":
        mib["device"] = peak_memory_mib(device)
    return Taken({"make": made, **pruned.seconds, "total": total}, mib)


def rates_of(device: torch.device, dtype: str) -> tuple[float, ...]:
    """Operations a second that pruning reaches in the model's dtype, in float32 and in float64, measured now."""
    dtypes = (DTYPES[dtype], torch.float32, torch.float64)
    rates = [measure_roofline(device, one).operations_per_second for one in dtypes]
    release(device)
    return tuple(part * rate for part, rate in zip(EFFICIENCY, rates, strict=True))


def estimated_seconds(config: PretrainedConfig, tokens: int, rates: Sequence[float], device: torch.device) -> float:
    """About how long `best` takes on so many tokens, at the rates of `rates_of`."""
    width, layers = dense_widths(config)[0], config.num_hidden_layers
    attention, hidden = config.num_attention_heads * width.v_head_dim, config.hidden_size
    forward = 3.5 * 2 * linear_parameters(config, dense_widths(config)) * tokens  # statistics, gradients, refit
    products = layers * tokens * sum(3 * n**2 + 2 * n * hidden for n in (attention, width.mlp))  # statistics, refit
    products += layers * 2 * width.mlp**2 * (width.mlp + hidden)  # greedy removal
    solving = layers * sum(8 * n**3 for n in (attention, width.mlp, hidden))
    launching = SECONDS_OF_A_LAYER * layers if device.type == "cuda" else 0.0
    return sum(part / rate for part, rate in zip((forward, products, solving), rates, strict=True)) + launching


NOTHING = (False, 0)  # what a cell without a record is worth


@dataclass(frozen=True)
class Choice:
    """How a cell is measured: on how many windows, and on which numbers of layers; the seconds that it should take."""

    samples: int
    layers: tuple[int, ...]
    seconds: float


def choose(seconds: Callable[[int, int], float], most: int, layers: int, allowed: float) -> Choice | None:
    """The most windows, up to `most`, with all `layers` within the `allowed` seconds; else a few layers; else None.

    `seconds` says what so many windows and layers take.
    """
    counts = [most, *(count for count in FEWER_SAMPLES if count < most)]
    ways = [(layers,)] if layers <= FEW_LAYERS[-1] else [(layers,), FEW_LAYERS]
    for measured in ways:
        for samples in counts:
            needed = sum(seconds(samples, number) for number in measured)
            if needed <= allowed:
                return Choice(samples, measured, needed)
    return None


def run_scale(
    shapes: Sequence[str] | None = None,
    *,
    ways: Sequence[str] = WAYS,
    samples: int | None = None,
    seq_len: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    seconds: float | None = None,
    path: Path | None = None,
) -> Iterator[dict]:
    """A record of every cell, as it is measured, and one that says why of each that is not.

    `seconds` bounds the whole: cells take fewer windows, then fewer layers, then are skipped. Cells of which `path`
    holds a record that is worth as much as one made now are left out. Shapes, samples and length that are not given
    are those of the device. On a CPU there is no "layerwise". Raises ValueError for what is not allowed.
    """
    where = resolve_device(device)
    samples, seq_len = (given or usual for given, usual in zip((samples, seq_len), WINDOWS[where.type], strict=True))
    configs = {name: shape_by_name(name) for name in shapes or (SIZES if where.type == "cuda" else SIZES_OF_A_CPU)}
    for name, config in configs.items():
        if seq_len > config.max_position_embeddings:
            raise ValueError(
                f"seq-len {seq_len} is longer than the context of {name}: {config.max_position_embeddings}"
            )
    dtype = fast_dtype(device) if dtype == "auto" else dtype
    rates = rates_of(where, dtype)
    end, slower = None if seconds is None else time.monotonic() + seconds, 1.0
    shared = {"schema": SCALE_SCHEMA, "environment": environment(where)}
    known = recorded(path)
    for way in ways:
        for name, config in configs.items():
            case = ScaleCase(name, way, RATIO, samples, seq_len, dtype, where.type, code_hash())
            layers = config.num_hidden_layers
            facts = {"layers": layers, "parameters": parameters_of(config)}
            if way == "layerwise" and where.type != "cuda":
                continue

            def expected(count: int, number: int, config: PretrainedConfig = config) -> float:
                few = first_layers(config, number)
                return estimated_seconds(few, count * seq_len, rates, where)

            allowed = float("inf") if end is None else SHARE * (end - time.monotonic())
            choice = choose(expected, samples, layers, allowed / slower)
            best = known.get(replace(case, samples=0), NOTHING)
            if best > NOTHING and best >= worth(choice, layers):
                continue
            if choice is None:
                least = slower * sum(expected(min(samples, FEWER_SAMPLES[-1]), number) for number in FEW_LAYERS)
                reason = f"a few layers would take about {least:.0f} s, it may take {max(0.0, allowed):.0f} s"
                yield shared | {"case": asdict(case), "status": "skipped", "error": reason, **facts}
                continue
            case = replace(case, samples=choice.samples)
            start = time.monotonic()
            outcome = _outcome(config, case, where, choice.layers)
            yield shared | {"case": asdict(case), **facts} | outcome
            if outcome["status"] == "success":  # the next estimate is of this machine
                slower = max(0.2, min(5.0, (time.monotonic() - start) / choice.seconds))


def _outcome(config: PretrainedConfig, case: ScaleCase, device: torch.device, measured: tuple[int, ...]) -> dict:
    """The fields of a record that say how it went; nothing of a failure stays on the device."""
    try:
        taken = [take(first_layers(config, number), case, device) for number in measured]
    except torch.OutOfMemoryError as error:
        outcome = {"status": "out of memory", "error": str(error).splitlines()[0]}
    except Exception as error:  # the next size may do
        outcome = {"status": "failed", "error": f"{type(error).__name__}: {in_one_line(error)}"}
    else:
        whole = taken[0] if len(measured) == 1 else taken[1].at(config.num_hidden_layers, taken[0], measured)
        how = "measured" if len(measured) == 1 else "extrapolated"
        outcome = {"status": "success", "how": how, "layers_measured": list(measured), **asdict(whole)}
    release(device)
    return outcome


def parameters_of(config: PretrainedConfig) -> int:
    """Parameters of a dense shape, tied ones once."""
    embeddings = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return weight_elements(config, dense_widths(config)) + embeddings


def worth(choice: Choice | None, layers: int) -> tuple[bool, int]:
    """What orders records of a cell: whether all layers were measured, and on how many windows."""
    return NOTHING if choice is None else (choice.layers == (layers,), choice.samples)


def recorded(path: Path | None) -> dict[ScaleCase, tuple[bool, int]]:
    """What the best record of each case is worth, the case's own `samples` set to 0."""
    known: dict[ScaleCase, tuple[bool, int]] = {}
    if path is None:
        return known

    def parse(fields: dict) -> tuple[ScaleCase, tuple[bool, int]]:
        line_of(fields, {"case": get_type_hints(ScaleCase), "status": str}, how=str)
        case = ScaleCase(**fields["case"])
        has_figures = fields["status"] == "success"
        return replace(case, samples=0), (fields["how"] == "measured", case.samples) if has_figures else NOTHING

    for case, value in read_lines(path, SCALE_SCHEMA, parse)[0]:
        known[case] = max(known.get(case, NOTHING), value)
    return known
