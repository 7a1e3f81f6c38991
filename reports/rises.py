"""By how many nats losses differ from those of another record, on each text, with their intervals."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import numpy as np
import pandas as pd

from bench.quality.significance import Difference, paired_difference, paired_differences
from bench.records import Record

ON = "on "  # before a text's name: the rise over the dense model on it


def difference(record: Record, reference: Record | None) -> Difference | None:
    """By how many nats the record's loss is higher; None where there is nothing to pair it with."""
    return differences([record], [reference])[0]


def differences(records: Sequence[Record], references: Sequence[Record | None]) -> list[Difference | None]:
    """`difference` of each record and its reference."""
    found: list[Difference | None] = [None] * len(records)
    by_count: dict[int, list[int]] = {}
    for place, (record, reference) in enumerate(zip(records, references, strict=True)):
        if (
            reference is not None
            and reference is not record
            and record.losses
            and len(record.losses) == len(reference.losses)
        ):
            by_count.setdefault(len(record.losses), []).append(place)
    for places in by_count.values():
        scores, others = (np.array([one[place].losses for place in places], dtype=np.float64)
                          for one in (records, references))  # fmt: skip
        for place, one in zip(places, paired_differences(scores, others), strict=True):
            found[place] = one
    return found


def losses_on(record: Record, text: Mapping) -> Sequence[float] | None:
    """The record's losses on the same windows as a text of another record has; None where it has none."""
    key = text["sha256"], len(text["losses"])
    return next((one["losses"] for one in record.texts if (one["sha256"], len(one["losses"])) == key), None)


def rises_of_texts(records: Sequence[Record], dense: Record | None) -> list[dict[str, Difference]]:
    """By how many nats each record's loss is above the dense model's on each text of both, the first one first."""
    found: list[dict[str, Difference]] = [{} for _ in records]
    for place, text in enumerate(dense.texts if dense else ()):
        mine = [losses_on(record, text) for record in records]
        known = [index for index, losses in enumerate(mine) if losses is not None]
        if not known:
            continue
        scores = np.array([mine[index] for index in known], dtype=np.float64)
        references = np.broadcast_to(np.array(text["losses"], dtype=np.float64), scores.shape)
        label = text_label(place, dense)
        for index, change in zip(known, paired_differences(scores, references), strict=True):
            found[index][label] = change
    return found


def text_label(place: int, record: Record) -> str:
    """What tables call an evaluation text of a record: its name, and its hash where another has the same name."""
    names = [text_named(text["name"]) for text in record.texts]
    digest = record.texts[place]["sha256"][:6]
    return names[place] if names.count(names[place]) == 1 else f"{names[place]} {digest}"


def interval_columns(rises: Mapping[str, Difference]) -> dict:
    """The columns `on NAME`, and those of its interval, of the rise on each text."""
    return {name: value for text, rise in rises.items() for name, value in interval_of(f"{ON}{text}", rise).items()}


def mean_rise(rises: Iterable[Difference]) -> float:
    """The mean over texts in nats, NaN where there is none."""
    means = [rise.mean for rise in rises]
    return fmean(means) if means else math.nan


def other_rises(records: Sequence[Record], dense: Record | None) -> list[float]:
    """The mean rise over the dense model on the texts beside the first, in nats; NaN where there is none."""
    expected = [(text, fmean(text["losses"])) for text in (dense.texts[1:] if dense else ())]
    found = []
    for record in records:
        mine = [(losses_on(record, text), loss) for text, loss in expected if record is not dense]
        rises = [fmean(losses) - loss for losses, loss in mine if losses is not None]
        found.append(fmean(rises) if rises else math.nan)
    return found


def other_losses(record: Record, dense: Record | None) -> list[float] | None:
    """The record's losses on all windows of the dense model's texts beside the first; None where any is missing.

    They are weighted so that their mean is the mean over texts, however many windows each has.
    """
    found = [losses_on(record, text) for text in (dense.texts[1:] if dense else ())]
    if not found or None in found:
        return None
    windows = sum(map(len, found))
    return [loss * windows / (len(found) * len(losses)) for losses in found for loss in losses]


def interval_of(name: str, found: Difference | None) -> dict:
    mean, low, high = (found.mean, found.low, found.high) if found else (np.nan, np.nan, np.nan)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def paired(losses: Sequence[float] | None, others: Sequence[float] | None) -> Difference | None:
    """By how many nats losses are higher than others, window by window; None where they cannot be paired."""
    return paired_difference(losses, others) if losses and others and len(losses) == len(others) else None


def verdict_on(gap: Difference) -> str:
    """Whether one difference is more than chance, in words."""
    return "beyond chance" if gap.is_sure else "inconclusive"


def lead_over(name: str, gap: Difference | None) -> str:
    """How far the best is ahead of the next by name, `gap` nats, and whether that is more than chance."""
    if gap is None:
        return f"{name} cannot be paired with it"
    return f"its lead over {name}, {with_interval(gap)} nats, is {verdict_on(gap)}"


def with_interval(found: Difference) -> str:
    """The difference with its interval, marked with ≈ where that holds zero: it may be chance."""
    if found.is_unknown:
        return f"{found.mean:+.3f} [too few to tell]"
    mark = " ≈" if found.is_noise else ""
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]{mark}"


def interval_column(frame: pd.DataFrame, name: str) -> list[str | None]:
    """The columns NAME, NAME_low and NAME_high as the text of `with_interval`."""
    triples = zip(*(frame[column] for column in (name, f"{name}_low", f"{name}_high")), strict=True)
    return [None if pd.isna(mean) else with_interval(Difference(mean, low, high, 0.0)) for mean, low, high in triples]


def text_named(name: str) -> str:
    """The name that a text, or several in turn, was asked for by: a record's also says which part of it was taken."""
    return re.sub(":(calibration|evaluation)(?=$| ?[,+])", "", name)
