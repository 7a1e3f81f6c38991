"""Is a difference more than chance? Paired bootstrap over windows of text or items of a task, Student's t of a few.

Never imports torch: reports are made from records alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import ndtr, stdtrit

from ..records import Record

RESAMPLES = 2000
FEW = 10  # pairs, below which resamples are too much alike
LEAST_EQUAL = 6  # pairs that differ by the same: of five, one fair coin in sixteen does as much
CHUNK = 256  # rows resampled at once, so that thousands need little memory
# what two cases must share for their figures to be compared
COMPARED = ("model_hash", "evaluation_sha256", "evaluation_ids", "evaluation_windows", "evaluation_seq_len",
            "evaluation_windowing", "evaluation_bos", "dtype", "device")  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, its interval at 95 % (NaN where too few pairs give none), and its standard error."""

    mean: float
    low: float
    high: float
    standard_error: float

    @property
    def is_noise(self) -> bool:
        """Whether the interval holds zero."""
        return self.low <= 0 <= self.high

    @property
    def is_sure(self) -> bool:
        """Whether the interval leaves out zero: a difference beyond chance."""
        return self.low > 0 or self.high < 0

    @property
    def is_unknown(self) -> bool:
        """Whether there is no interval."""
        return not (self.is_noise or self.is_sure)


def paired_difference(scores: Sequence[float], reference: Sequence[float], *, seed: int = 0) -> Difference:
    """`scores` less `reference`, pair by pair, both (n,).

    The interval of ten pairs or more is the percentile bootstrap's (Efron and Tibshirani 1993) over 2,000 resamples of
    the pairs, with a seed of its own, so the same records give the same figures; its percentiles lie further out, by
    what Student's t and the bias of a resample's variance ask for (expanded percentiles, Hesterberg 2015). Of fewer
    pairs it is Student's t's. One pair has none, nor have fewer than six that all differ by the same.
    Raises ValueError where the two cannot be paired.
    """
    if len(scores) != len(reference) or not len(scores):
        raise ValueError(f"{len(scores)} and {len(reference)} scores cannot be paired")
    return paired_differences(np.array([scores], np.float64), np.array([reference], np.float64), seed=seed)[0]


def paired_differences(scores: np.ndarray, references: np.ndarray, *, seed: int = 0) -> list[Difference]:
    """`paired_difference` of each row, both (rows, n): much faster for many rows at once."""
    differences = scores - references
    count, found = differences.shape[1], []
    for rows in np.split(differences, range(CHUNK, len(differences), CHUNK)):
        mean = rows.mean(axis=1)
        errors = rows.std(axis=1, ddof=1) / count**0.5 if count > 1 else np.full(len(rows), np.nan)
        low, high = _by_student(rows, mean, errors) if count < FEW else _by_bootstrap(rows, seed)
        found += map(Difference, *(column.tolist() for column in (mean, low, high, errors)))
    return found


def _by_student(rows: np.ndarray, mean: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count = rows.shape[1]
    half = stdtrit(count - 1, 0.975) * errors
    if count < LEAST_EQUAL:
        half[(np.ptp(rows, axis=1) <= 1e-9 * abs(mean)) & (mean != 0)] = np.nan
    return mean - half, mean + half


def _by_bootstrap(rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    count = rows.shape[1]
    outside = 100 * ndtr(stdtrit(count - 1, 0.025) * (count / (count - 1)) ** 0.5)
    return tuple(np.percentile(rows @ _drawn(count, seed).T / count, (outside, 100 - outside), axis=1))


@lru_cache(maxsize=16)  # a report pairs thousands of records of the same few numbers of windows and items
def _drawn(count: int, seed: int) -> np.ndarray:
    """How often each of `count` pairs is drawn in each resample: (RESAMPLES, count)."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return drawn.astype(np.float64)


def check_comparable(record: Record, other: Record) -> None:
    """Raise ValueError, naming the first thing that differs, where figures of two records cannot be compared."""
    for name in COMPARED:
        mine, theirs = getattr(record.case, name), getattr(other.case, name)
        if mine != theirs:
            what = f"{name.replace('_', ' ')} {mine} and {theirs}"
            raise ValueError(f"records of {record.method!r} and {other.method!r} cannot be compared: {what}")
    for task in record.tasks.keys() & other.tasks.keys():
        for name in ("version", "shots", "sha256"):
            mine, theirs = record.tasks[task][name], other.tasks[task][name]
            if mine != theirs:
                raise ValueError(
                    f"records of {record.method!r} and {other.method!r} cannot be compared: "
                    f"{name} {mine} and {theirs} of task {task!r}"
                )


def differences(record: Record, reference: Record) -> dict[str, Difference]:
    """`record` less `reference`: "loss_nats", and "task metric" for every metric that has a score for each item.

    Raises ValueError as `check_comparable` does.
    """
    check_comparable(record, reference)
    found = {"loss_nats": paired_difference(record.losses, reference.losses)}
    for task, result in record.tasks.items():
        if task in reference.tasks:
            for metric, scores in result["scores"].items():
                found[f"{task} {metric}"] = paired_difference(scores, reference.tasks[task]["scores"][metric])
    return found
