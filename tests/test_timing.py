"""Ratios of paired times, their intervals and verdicts; nothing here depends on how fast a machine is."""

import math
import random

import pytest
import torch

from transact.timing import Ratio, in_turn, ratio_of, seconds_of


def test_the_interval_lies_between_order_statistics_of_the_pairs():
    times = [1.0] * 15
    ratio = ratio_of([1 + place / 100 for place in range(15)], times)
    assert ratio == Ratio(1.07, 1.03, 1.11)  # the fourth from either end: 3.5 % lie beyond
    assert ratio_of([1.1, 1.2, 1.3, 1.4, 1.5, 1.6], times[:6]) == Ratio(pytest.approx(1.35), 1.1, 1.6)
    assert math.isnan(ratio_of([1.1] * 5, times[:5]).low)
    with pytest.raises(ValueError, match="2 and 1 times cannot be paired"):
        ratio_of([1.0, 2.0], [1.0])


def test_intervals_hold_the_median_as_often_as_they_say():
    generator, held = random.Random(0), 0
    for _ in range(1000):
        skewed = [1.2 * generator.paretovariate(3) / 2 ** (1 / 3) for _ in range(11)]  # of median 1.2
        ratio = ratio_of(skewed, [1.0] * 11)
        held += ratio.low <= 1.2 <= ratio.high
    assert held >= 950


@pytest.mark.parametrize(
    ("times", "verdict"),
    [
        ([1.2, 1.3, 1.25, 1.22, 1.28, 1.3, 1.26], "faster"),
        ([0.8, 0.7, 0.75, 0.72, 0.78, 0.7, 0.74], "slower"),
        ([1.2, 0.9, 1.1, 1.3, 0.8, 1.2, 1.1], "inconclusive"),
        ([2.0, 2.0, 2.0], "inconclusive"),  # so few say nothing, however far apart
    ],
)
def test_verdicts(times, verdict):
    assert ratio_of(times, [1.0] * len(times)).verdict == verdict


def test_runs_take_turns_in_both_directions():
    order = []
    runs = [lambda name=name: order.append(name) or name for name in "abc"]
    assert in_turn(runs, 3) == [["a"] * 3, ["b"] * 3, ["c"] * 3]
    assert "".join(order) == "abccbaabc"


def test_drift_falls_on_both_alike():
    """A machine that slows down by a tenth with every run: the ratio of the same work stays about one."""
    clock = iter(1.1**step for step in range(100))
    first, second = in_turn([lambda: next(clock), lambda: next(clock)], 8)
    ratio = ratio_of(first, second)
    assert ratio.median == pytest.approx(1, abs=0.01)
    assert ratio.verdict == "inconclusive"


def test_a_run_is_timed(device):
    assert seconds_of(lambda: torch.ones(10, device=device).sum(), device) > 0
