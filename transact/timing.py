"""Timing that can be believed: runs in turn, ratios of pairs, intervals that assume nothing of how times scatter."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from tqdm.auto import tqdm

T = TypeVar("T")


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios, and its interval at 95 % (NaN of fewer than six pairs, which give none)."""

    median: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What a ratio of the old time to the new says: "faster", "slower", or "inconclusive" where it may be one."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "inconclusive"

    @property
    def spread(self) -> float:
        """How far the interval's ends lie from each other, as a factor; infinite where there is none."""
        return math.inf if math.isnan(self.low) else self.high / self.low


def ratio_of(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """The ratio of two series of times that were taken in pairs.

    Its interval lies between order statistics of the pairs' ratios: as many of them are above the true median as coins
    show heads, whatever the distribution. Raises ValueError where the two cannot be paired.
    """
    if len(numerators) != len(denominators) or not len(numerators):
        raise ValueError(f"{len(numerators)} and {len(denominators)} times cannot be paired")
    ratios = sorted(first / second for first, second in zip(numerators, denominators, strict=True))
    heads = itertools.accumulate(math.comb(len(ratios), count) for count in range(len(ratios)))
    outside = sum(ways <= 0.025 * 2 ** len(ratios) for ways in heads)  # pairs beyond either end of the interval, and it
    low, high = (ratios[outside - 1], ratios[-outside]) if outside else (math.nan, math.nan)
    return Ratio(statistics.median(ratios), low, high)


def in_turn(runs: Sequence[Callable[[], T]], repeats: int, *, bar: str = "") -> list[list[T]]:
    """What each run gives in every repeat, run after run: forwards, then backwards, so that drift meets all alike.

    A progress bar of that name shows the repeats.
    """
    results = [[] for _ in runs]
    for repeat in tqdm(range(repeats), desc=bar, unit="round", disable=None if bar else True):
        for place in range(len(runs)) if repeat % 2 == 0 else reversed(range(len(runs))):
            results[place].append(runs[place]())
    return results


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: by the device's own events on CUDA, by the clock elsewhere."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # events are recorded on the current one
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)  # or work queued before would hide the launches of what is timed
            start.record()
            run()
            end.record()
            torch.cuda.synchronize(device)
            return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
