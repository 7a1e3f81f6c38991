"""Cases, records, and the file that they are kept in: one JSON object a line, appended and flushed.

Never imports torch: reports are made from records alone.
"""

import json
import math
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar, get_args, get_type_hints

from filelock import FileLock, Timeout

T = TypeVar("T")
SCHEMA, SPEED_SCHEMA, SCALE_SCHEMA, GPU_SCHEMA = 4, 1, 1, 1  # of records of quality, speed, scale, a GPU run
ENGINES_SCHEMA = 1  # and of models in other engines
PEERS_SCHEMA = 1  # and of models that other packages pruned
HIGHEST_LOSS = math.log(sys.float_info.max)  # in nats: no float holds the perplexity of a higher one


@dataclass(frozen=True)
class Case:
    """Everything that decides a result and nothing else. `criterion` is "dense" for the unpruned model.

    From `granularity` to `shots` these are the fields of a recipe, `modules` joined by "+", as are `ridge`,
    `measurements`, `engine`, `depth`, `sparsity` and `drop_modules`. So are `tasks` joined, each with its shots where
    they are not the task's own (`name@shots`), and measured on the first `task_limit` items.

    `mha_dim` and `mlp_dim` name widths where there is no ratio; `speedup` asks for so many times the dense model's
    decoding speed, reached by a `budget` of "latency" or "parameters". `only_layer` is the one layer that is narrowed,
    by `ratio` of its own parameters; the multiples are what widths are rounded to (None: what fits the model), `ridge`
    the one ridge of the refit (None: the best of several on held-out tokens). `decode_tokens` is how many were
    generated to time it. `recovery` is how it was trained ("": not), on `recovery_tokens` of the text with that hash,
    `recovery_frugal` with one window at once and activations recomputed; `quantisation` the format of linear weights
    ("": the dtype).

    `model_hash` is of configuration and weights; `evaluation_ids`, `calibration_ids` and `recovery_ids` are hashes of
    what the tokeniser makes of the texts (see `suite.cases.ids_hash`; empty in records older than these fields).
    `other_texts` are evaluation texts beside the first, names and hashes joined by "+", on `other_windows` of each (0:
    all); on the first `compared_windows` of every text (0: all) predictions are compared with the dense model's.
    """

    model: str
    model_hash: str
    criterion: str
    granularity: str
    modules: str
    allocation: str
    compensation: str
    output_bias: bool
    rope: str
    shots: int
    ratio: float
    kv_ratio: float | None
    seed: int
    calibration_text: str | None
    calibration_sha256: str | None
    calibration_samples: int
    calibration_seq_len: int
    evaluation_text: str
    evaluation_sha256: str
    evaluation_windows: int
    evaluation_seq_len: int
    evaluation_windowing: str
    evaluation_bos: bool
    tasks: str
    task_limit: int | None
    dtype: str
    device: str
    code: str
    mha_dim: int | None = None
    mlp_dim: int | None = None
    only_layer: int | None = None
    head_multiple: int | None = None
    mlp_multiple: int | None = None
    ridge: float | None = None
    decode_tokens: int = 0
    recovery: str = ""
    recovery_tokens: int = 0
    recovery_sha256: str | None = None
    learning_rate: float | None = None
    quantisation: str = ""
    measurements: int = 0
    evaluation_ids: str = ""
    calibration_ids: str | None = None
    recovery_ids: str | None = None
    other_texts: str = ""
    other_sha256: str = ""
    other_windows: int = 0
    compared_windows: int = 0
    engine: str = "transformers"
    speedup: float | None = None
    budget: str = ""
    depth: str = "none"
    recovery_frugal: bool = False
    sparsity: str = "none"
    drop_modules: bool = False


@dataclass(frozen=True)
class Record:
    """A case and what was measured: metrics with units in their names, standard errors, environment, status.

    `method` is what tables call the recipe: the preset's name, or the criterion's. `losses` are those of each window
    in nats. `texts` holds of each evaluation text, the first among them, what `suite.qualities.TextQuality` does: name,
    hash, mean loss, and of each window the loss, and KL divergence from and agreement with the dense model;
    `greedy_agreement` that of each greedy continuation. `tasks` holds by name what `quality.zero_shot.TaskResult` does:
    version, shots, items and their hash, each metric with its standard error, and the scores of all items. `history`
    is what training measured on its way: tokens seen, seconds, losses. `command` measures the cell again.
    """

    case: Case
    method: str
    metrics: Mapping[str, float]
    standard_errors: Mapping[str, float]
    environment: Mapping[str, str | int]
    status: str = "success"
    error: str | None = None
    losses: tuple[float, ...] = ()
    widths: tuple[Mapping[str, int], ...] = ()
    tasks: Mapping[str, Mapping] = field(default_factory=dict)
    history: tuple[Mapping[str, float], ...] = ()
    texts: tuple[Mapping, ...] = ()
    greedy_agreement: tuple[float, ...] = ()
    command: str = ""
    schema: int = field(default=SCHEMA)


def append_record(path: str | os.PathLike, record: Record) -> None:
    """Append the record as one line; see `append_line`."""
    append_line(path, asdict(record))


def append_line(path: str | os.PathLike, fields: Mapping) -> None:
    """Append one line of strict JSON, flushed to the disk.

    A torn last line, left by a killed run, is first cut off by a line end. Where the line cannot be written whole (a
    full disk) the file is cut back to its former end and OSError is raised.
    """
    line = json.dumps(finite(fields), allow_nan=False) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end and not _ends_with_newline(file):
            line = "\n" + line
        try:
            left = line.encode()
            while left:
                left = left[file.write(left) :]  # a disk that fills up takes the beginning and refuses the rest
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(end)
            raise


@contextmanager
def sole_writer(path: str | os.PathLike) -> Iterator[None]:
    """Hold the record file (made where there is none), so that no other run writes it until this one ends, however.

    The lock is the operating system's, on a hidden file beside it: a killed process leaves none behind. Where the file
    system knows no locks nothing is held. Raises ValueError, in one line, where another run holds the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("ab").close()
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"record file {str(path)!r} is being written by another run: wait for it, or name other --results"
        ) from error
    except (OSError, NotImplementedError):
        pass  # no locks here (some network file systems)
    try:
        yield
    finally:
        lock.release()


def _ends_with_newline(file) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def finite(value):
    """JSON has no NaN: a figure that is not a number is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def version_text(version) -> str:
    """A task's version as text, "none" where there is none: lm-eval's are numbers or texts like 1.0.2."""
    if isinstance(version, float) and version.is_integer():
        version = int(version)
    return "none" if version in (None, "") else str(version)


class _UnusableError(ValueError):
    """A record that is whole but of no use; its message says why."""


def read_records(path: str | os.PathLike) -> tuple[list[Record], list[str]]:
    """All records of a file, and one complaint for each line that is none (torn, or of another schema)."""

    def record_of(fields: dict) -> Record:
        _check_kinds(fields)
        if fields["status"] == "success":
            metrics = fields["metrics"]
            if metrics.get("perplexity") is None and (metrics.get("loss_nats") or 0) > HIGHEST_LOSS:
                metrics["perplexity"] = math.inf  # a float that JSON does not know
            _check_success(fields)
        for result in fields["tasks"].values():
            result["version"] = version_text(result["version"])
        return Record(**fields | {"case": Case(**fields["case"])})

    return read_lines(path, SCHEMA, record_of)


NUMBER, NUMBER_OR_NULL = int | float, int | float | None
# what a record's parts are in JSON, by which reports handle them: a type, [that of items], {name: that of its value}
PARTS = {
    "method": str, "status": str, "command": str, "metrics": {str: NUMBER_OR_NULL},
    "standard_errors": {str: NUMBER_OR_NULL}, "environment": {str: str | int | None}, "losses": [NUMBER_OR_NULL],
    "widths": [dict.fromkeys(("kv_heads", "qk_head_dim", "v_head_dim", "mlp"), int)],
    "texts": [{"name": str, "sha256": str, "losses": [NUMBER_OR_NULL], "kl_nats": [NUMBER_OR_NULL]}],
    "greedy_agreement": [NUMBER_OR_NULL], "history": [{str: NUMBER_OR_NULL}],
    "tasks": {str: {"items": int, "shots": int, "capability": str | None, "chance": NUMBER_OR_NULL,
                    "metrics": {str: NUMBER_OR_NULL}, "standard_errors": {str: NUMBER_OR_NULL},
                    "scores": {str: [NUMBER_OR_NULL]}}},
}  # fmt: skip
# and of lines of speed, of scale, and of parts and cards of a GPU run
MACHINE = {"device": str, "torch": str}
SPEED_PARTS = {
    "case": {"model": str, "prefix": int, "decode": int, "batch": int, "mode": str, "dtype": str, "device": str},
    "status": str, "environment": MACHINE, "metrics": {str: NUMBER_OR_NULL},
}  # fmt: skip
SCALE_PARTS = {
    "case": {"shape": str, "way": str, "samples": int, "seq_len": int, "dtype": str, "device": str},
    "status": str, "environment": MACHINE, "parameters": int,
}  # fmt: skip
GPU_PARTS = {"part": str, "code": str, "status": str, "seconds": NUMBER}
CARD_PARTS = {"environment": MACHINE | {"transformers": str, "python": str}}
ENGINES_PARTS = {
    "case": {"model": str, "engine": str, "base": str, "ratio": NUMBER}, "environment": {"device": str, "threads": int},
    "row": {"tokens_per_s": NUMBER, "mib": NUMBER, "same_tokens": NUMBER},
}  # fmt: skip
FIELDS = {name: kind | int if float in (kind, *get_args(kind)) else kind for name, kind in get_type_hints(Case).items()}
# within what figures lie: shares, what may be below zero (if only by rounding), and all others; what stands inside of a
# part that is named here lies where that does, unless it is named itself
HIGHEST = sys.float_info.max
SHARE, ANY, OTHERS = (0, 1), (-HIGHEST, HIGHEST), (0, HIGHEST)
BOUNDS = {
    **dict.fromkeys(("ratio", "kv_ratio", "fraction_removed", "kv_fraction_removed", "zeros", "chance"), SHARE),
    **dict.fromkeys(("top1_agreement", "greedy_agreement", "same_tokens"), SHARE),
    **dict.fromkeys(("kl_nats", "history", "tasks", "scores"), ANY),
    "items": OTHERS,
    "perplexity": (1, HIGHEST),
}


def _check_kinds(fields: Mapping) -> None:
    """Raise _UnusableError where a part of a record, or a field of its case, is of another kind than it is written in.

    Parts that are left out are for `Record` to complain of.
    """
    for kinds, parts in ((PARTS, fields), (FIELDS, fields["case"])):
        for name, kind in kinds.items():
            if name in parts and not is_of_kind(parts[name], kind):
                raise _UnusableError(f"its {name} is of another kind than this version writes")


def is_of_kind(value, kind) -> bool:
    """Whether a value of JSON is of a kind as `PARTS` states them; a dict of {str: kind} has any names."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(is_of_kind(item, kind[0]) for item in value)
    if isinstance(kind, dict):
        kinds = dict.fromkeys(value, kind[str]) if isinstance(value, dict) and str in kind else kind
        return isinstance(value, dict) and all(name in value and is_of_kind(value[name], kinds[name]) for name in kinds)
    return isinstance(value, kind)


def _check_figures(value, place: str = "its", bounds: tuple[float, float] = OTHERS, known: Mapping = BOUNDS) -> None:
    """Raise _UnusableError, naming place, value and what is allowed, for a figure of a record that cannot be.

    What is not known is null; JSON of other writers may have NaN and Infinity.
    """
    if isinstance(value, dict):
        for name, part in value.items():
            is_error = name == "standard_errors"  # whose names are those of what they are errors of
            inside = (OTHERS, {}) if is_error else (known.get(name, bounds), known)
            _check_figures(part, f"{place} {name}", *inside)
    elif isinstance(value, list):
        for part in value:
            _check_figures(part, place, bounds, known)
    elif isinstance(value, int | float) and not bounds[0] <= value <= bounds[1]:
        low, high = bounds
        allowed = "finite numbers" if bounds == ANY else f"{low} and more" if high == HIGHEST else f"{low} to {high}"
        raise _UnusableError(f"{place} is {reprlib.repr(value)}, allowed: {allowed}")


def line_of(fields: Mapping, kinds: Mapping, **others) -> Mapping:
    """The fields of a line whose parts are of these kinds; `others` are kinds of parts that it may lack.

    Raises ValueError where one is of another kind.
    """
    if not is_of_kind(fields, kinds) or not all(
        is_of_kind(fields[name], others[name]) for name in others if name in fields
    ):
        raise ValueError("parts of another kind than this version writes")
    return fields


def _check_success(fields: Mapping) -> None:
    """Raise _UnusableError where a cell that succeeded lacks what every report shows."""
    for name in ("perplexity", "fraction_removed", "kv_fraction_removed", "weight_bytes"):
        if not isinstance(fields["metrics"].get(name), float | int):
            raise _UnusableError(f"its {name} is no number")
    if fields["metrics"].get("loss_nats", 0.0) is None:
        raise _UnusableError("its loss_nats is no number")
    texts = [text["losses"] for text in fields.get("texts", ())]
    if not all(texts):
        raise _UnusableError("one of its texts has no losses")
    if any(None in losses for losses in (fields.get("losses", ()), *texts)):
        raise _UnusableError("one of its losses is no number")
    for name in ("device", "torch", "transformers", "transact"):
        if fields["environment"].get(name) is None:
            raise _UnusableError(f"its environment does not say {name}")


def read_results(directory: str | os.PathLike) -> tuple[list[Record], list[str]]:
    """All records of a directory: of `records.jsonl` and of every shard's file beside it; and the complaints."""
    records, complaints = [], []
    for path in sorted(Path(directory).glob("records*.jsonl")):
        read, complained = read_records(path)
        records += read
        complaints += complained
    return records, complaints


def read_lines(path: str | os.PathLike, schema: int, parse: Callable[[dict], T]) -> tuple[list[T], list[str]]:
    """What `parse` makes of each line's fields, and one complaint for each line that is no record of this `schema`."""
    path = Path(path)
    if not path.exists():
        return [], []
    parsed, complaints = [], []
    lines = enumerate(path.read_bytes().split(b"\n"), start=1)
    # files that were joined: the first record of one may stand behind the torn last line of another
    parts = ((number, part) for number, line in lines for part in re.split(rb'(?=\{"case": \{)', line))
    for number, line in parts:
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if fields["schema"] == schema:
                _check_figures(fields)
                parsed.append(parse(fields))
                continue
            complaint = f"schema {fields['schema']}, this version reads {schema}"
        except _UnusableError as error:
            complaint = f"{error}, passed over"
        except (ValueError, TypeError, KeyError, RecursionError):
            complaint = "not a record (torn line?), passed over"
        complaints.append(f"{path}:{number}: {complaint}")
    return parsed, complaints
