"""Which records may be compared: the newest set of the same model, text, windows, dtype, device and code."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from bench.quality.significance import COMPARED
from bench.records import Case, Record

SHARED = ("model", *COMPARED, "code")
CALIBRATION = ("calibration_text", "calibration_sha256", "calibration_ids", "calibration_samples",
               "calibration_seq_len", "seed")  # fmt: skip
SPEED, SPEEDUP = "decode_tokens_per_s", "decode_speedup"
TIMES = "decode_", "prefill_"  # how metrics begin that depend on the machine
# measured on the side: they change no other figure
ASIDE = ("tasks", "task_limit", "decode_tokens", "other_texts", "other_sha256", "other_windows", "compared_windows")
QUALITY = attrgetter(*(name for name in Case.__dataclass_fields__ if name not in ASIDE))

_shared, _calibration = attrgetter(*SHARED), attrgetter(*CALIBRATION)


def comparable(record: Record) -> tuple:
    """What two records must share for their figures to be compared."""
    return _shared(record.case)


def is_reference(record: Record) -> bool:
    """Whether it is the dense model as it came."""
    return record.case.criterion == "dense" and not record.case.recovery and not record.case.quantisation


def quality(record: Record) -> tuple[float, float]:
    """Perplexity, then loss where that is beyond what a float holds: less is better."""
    return record.metrics["perplexity"], record.metrics.get("loss_nats", 0.0)


def is_timed(record: Record) -> bool:
    """Whether its decoding speed was measured: a clock that gave no number left null."""
    return bool(record.metrics.get(SPEED))


def newest_by_case(records: Sequence[Record]) -> list[Record]:
    """The newest successful record of each case; what else was measured (tasks, speed) makes no other case."""
    return list({QUALITY(record.case): record for record in records if record.status == "success"}.values())


@dataclass(frozen=True)
class RecordSet:
    """Records that may be compared, all successful, oldest first; `failed` holds cells that have no success since.

    `calibration` is what most of them were calibrated on (None: nothing was), as `CALIBRATION` names it, and
    `left_out` counts by reason the records that cannot be compared with these.
    """

    records: tuple[Record, ...]
    failed: tuple[Record, ...]
    calibration: tuple | None
    left_out: dict[str, int]

    @property
    def newest(self) -> Record:
        return self.records[-1]

    def is_calibrated_alike(self, record: Record, but: Sequence[str] = ()) -> bool:
        """Whether it was calibrated as most were, or needs no text (nor, but for random choice, a seed).

        `but` names fields in which it may differ.
        """
        case = record.case
        if case.calibration_sha256 is None:
            return case.criterion != "random" or self.calibration is None or case.seed == self.calibration[-1]
        pairs = zip(CALIBRATION, _calibration(case), self.calibration, strict=True)
        return all(mine == theirs or name in but for name, mine, theirs in pairs)


def newest_set(records: Sequence[Record]) -> RecordSet | None:
    """The records that may be compared with the last successful one; None where none was successful."""
    newest = next((record for record in reversed(records) if record.status == "success"), None)
    if newest is None:
        return None
    shared = comparable(newest)
    same, left_out = [], Counter()
    for record in records:
        theirs = comparable(record)
        if theirs == shared:
            same.append(record)
        else:
            left_out[_reason(theirs, shared)] += 1
    same, others = _timed_alike(same)
    left_out.update(others)
    last = {record.case: record for record in same}  # whether a cell failed is what its last record says
    failed = tuple(record for record in last.values() if record.status != "success")
    successes = tuple(record for record in same if record.status == "success")
    counts = Counter(_calibration(r.case) for r in reversed(successes) if r.case.calibration_sha256)
    return RecordSet(successes, failed, next((key for key, _ in counts.most_common(1)), None), dict(left_out))


def _timed_alike(records: Sequence[Record]) -> tuple[list[Record], Counter]:
    """The records with decoding speeds of one machine only, the last that has any; and how many lost theirs, by reason.

    Losses of two machines can be compared, speeds cannot.
    """
    timed = [record for record in records if is_timed(record)]
    if not timed:
        return list(records), Counter()
    machine, others, kept = machine_of(timed[-1]), Counter(), []
    for record in records:
        if is_timed(record) and machine_of(record) != machine:
            others[f"speed, measured on {machine_of(record)}"] += 1
            metrics, errors = ({name: value for name, value in one.items() if not name.startswith(TIMES)}
                               for one in (record.metrics, record.standard_errors))  # fmt: skip
            record = replace(record, metrics=metrics, standard_errors=errors)
        kept.append(record)
    return kept, others


def machine_of(record: Record) -> str:
    """What a speed is of: the device, and of a processor how many of its cores."""
    threads = record.environment.get("threads") if record.case.device == "cpu" else None
    return record.environment["device"] + ("" if threads is None else f", {threads} threads")


def _reason(theirs: tuple, shared: tuple) -> str:
    name, value = next((n, a) for n, a, b in zip(SHARED, theirs, shared, strict=True) if a != b)
    return f"{name.replace('_', ' ')} {str(value)[:40]}"
