"""Answers that change: right before and wrong now, wrong before and right now. Never imports torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Flips:
    """Of `items` answers `lost` were right and are wrong, `won` were wrong and are right."""

    items: int
    lost: int
    won: int

    @property
    def p_value(self) -> float:
        """The exact p of McNemar's test (McNemar 1947), two-sided: were losing and winning an item equally likely?"""
        flips, fewer = self.lost + self.won, min(self.lost, self.won)
        tail = sum(math.comb(flips, count) for count in range(fewer + 1))
        return min(1.0, 2 * tail / 2**flips)

    def __add__(self, other: "Flips") -> "Flips":
        return Flips(self.items + other.items, self.lost + other.lost, self.won + other.won)


def flips(scores: Sequence[float], reference: Sequence[float]) -> Flips | None:
    """How the answers of the same items changed; None where a score is neither 0 nor 1.

    Raises ValueError where there are not as many of both.
    """
    if len(scores) != len(reference):
        raise ValueError(f"{len(scores)} and {len(reference)} scores cannot be paired")
    if not {*scores, *reference} <= {0, 1}:
        return None
    pairs = list(zip(scores, reference, strict=True))
    return Flips(len(pairs), lost=pairs.count((0, 1)), won=pairs.count((1, 0)))
