"""Near the calibration text and far from it, and what perplexity hides: frames of the methods on every text."""

import re
from collections.abc import Sequence

import pandas as pd

from bench.records import Record

from .rises import ON, interval_columns, mean_rise, rises_of_texts, text_named
from .sets import is_reference

NEARNESS = ("kl_nats", "top1_agreement", "greedy_agreement")
MEAN = "mean over texts"


def is_near(evaluation: str, calibration: str | None) -> bool:
    """Whether an evaluation text comes from the same source as the calibration text, or as a part of a mixture."""
    parts = re.split(r"[,+]", calibration or "")
    return text_named(evaluation) in {text_named(part.strip()) for part in parts}


def fullest(records: Sequence[Record]) -> list[Record]:
    """Of the records of the same method and ratios the one with most texts, the newest of these; presets, if any."""
    presets = [r for r in records if is_reference(r) or r.method != r.case.criterion]
    if any(not is_reference(record) for record in presets):
        records = presets
    chosen = {}
    for record in sorted(records, key=lambda record: len(record.texts)):
        chosen[record.method, record.case.ratio, record.case.kv_ratio] = record
    return list(chosen.values())


def texts_frame(records: Sequence[Record], dense: Record | None) -> pd.DataFrame:
    """One row for each pruned record with several texts: `on NAME` and its interval on each, their mean in nats."""
    records = [record for record in records if len(record.texts) > 1 and not is_reference(record)]
    rows = []
    for record, rises in zip(records, rises_of_texts(records, dense), strict=True):
        if len(rises) > 1:
            row = {name: getattr(record.case, name) for name in ("ratio", "kv_ratio", "calibration_text")}
            row |= {"method": record.method, "fraction_removed": record.metrics["fraction_removed"]}
            row |= interval_columns(rises)
            rows.append(row | {"mean_rise_nats": mean_rise(rises.values())})
    frame = pd.DataFrame(rows)
    return frame.sort_values(["ratio", "mean_rise_nats"], ignore_index=True) if len(frame) else frame


def texts_of(frame: pd.DataFrame) -> list[str]:
    """The texts that a frame has columns for."""
    return [name.removeprefix(ON) for name in frame if name.startswith(ON) and not name.endswith(("_low", "_high"))]


def fidelity_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row for each record: how near its predictions are to the dense model's, with standard errors."""
    rows = [
        {"method": record.method, "ratio": record.case.ratio, "kv_ratio": record.case.kv_ratio,
         "fraction_removed": record.metrics["fraction_removed"], "perplexity": record.metrics["perplexity"],
         **{column: value for name in NEARNESS for column, value in (
             (name, record.metrics[name]), (f"{name}_standard_error", record.standard_errors.get(name)))}}
        for record in records if all(name in record.metrics for name in NEARNESS)
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    return frame.sort_values(["ratio", "kl_nats"], ignore_index=True) if len(frame) else frame
