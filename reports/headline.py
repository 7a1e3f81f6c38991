"""One screen of what was found, and figures that a history of runs can be kept of."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from bench.output.files import write_whole
from bench.output.tables import markdown_table
from bench.records import Record

from .answers import counted, is_met, percent, removed_words
from .frames import records_frame
from .page import Section
from .rises import other_rises
from .sets import SPEED, is_reference, newest_by_case
from .texts import fullest

MOST_ROWS, MOST_SENTENCES = 12, 6  # that are read at a glance
SHOWN = ["method", "ratio", "perplexity", "loss_over_dense", "other_texts_rise_nats", "kl_nats", "decode_tokens_per_s"]


def write_summary(
    records: Sequence[Record], sections: Sequence[Section], directory: Path, note: str, won: pd.DataFrame
) -> Path:
    """Write `summary.md`: the first picture, the methods at the largest fraction that most share, and words.

    `records` are those of the methods, `sections` the page's; of each answered one the first sentence is taken. `won`
    says what loses least at which speed, where that was measured.
    """
    frame = records_frame(fullest(records))
    counts = frame[frame["method"] != "dense"]["ratio"].value_counts()
    if len(counts):
        ratio = counts[counts == counts.max()].index.max()
        frame = frame[(frame["method"] == "dense") | (frame["ratio"] == ratio)]
    frame = frame.sort_values("perplexity", ignore_index=True)
    met = all(map(is_met, frame["ratio"], frame["fraction_removed"]))
    columns = SHOWN if met else [*SHOWN[:2], "fraction_removed", *SHOWN[2:]]
    shown = [name for name in columns if name in frame and frame[name].notna().any()]
    sentences = [f"**{section.title}** {section.sentences[0]}" for section in sections if section.sentences]
    pictured = next((section for section in sections if section.picture), None)
    parts = [
        f"# {frame['model'].iloc[0]}: what pruning costs",
        f"![{pictured.title}]({pictured.picture.with_suffix('.png').name})" if pictured else "",
        markdown_table(frame.head(MOST_ROWS), shown),
        markdown_table(won, list(won)) if len(won) else "",
        "\n".join(f"- {sentence}" for sentence in sentences[:MOST_SENTENCES]),
        f"{note} All questions: report.html.",
    ]
    return write_whole(directory / "summary.md", "\n\n".join(filter(None, parts)) + "\n")


def write_benchmark(records: Sequence[Record], directory: Path) -> Path:
    """Write `benchmark.json`: one object a figure, smaller is better, as github-action-benchmark reads them.

    The loss of every method in nats a token with its standard error as `range`, the mean rise over the dense model on
    the other texts, and milliseconds a decoded token, where they were measured.
    """
    records = newest_by_case(fullest(records))
    dense = next(filter(is_reference, records), None)
    rises = other_rises(records, dense)
    figures = [figure for record, rise in zip(records, rises, strict=True) for figure in _figures(record, rise)]
    return write_whole(directory / "benchmark.json", json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


def _figures(record: Record, rise: float) -> list[dict]:
    case, metrics = record.case, record.metrics
    name = f"{case.model} {record.method}"
    if not is_reference(record):
        name += f", {removed_words(case.ratio, metrics['fraction_removed'])}"
    if case.kv_ratio is not None:
        name += f", {percent(case.kv_ratio)} of the KV cache"
    rate, error = metrics.get(SPEED), record.standard_errors.get("loss_nats")
    figures = [
        (f"{name}: loss", "nats/token", metrics.get("loss_nats", math.nan), error),
        (f"{name}: rise on other texts", "nats/token", rise, None),
        (f"{name}: decoding", "ms/token", 1e3 / rate if rate else math.nan, None),
    ]
    device = record.environment["device"]
    about = f"{counted(case.evaluation_windows, 'window')} of {case.evaluation_text}, {case.dtype} on {device}"
    return [
        {"name": title, "unit": unit, "value": round(value, 5), "extra": about}
        | ({"range": f"± {spread:.5f}"} if spread is not None else {})
        for title, unit, value, spread in figures
        if math.isfinite(value)
    ]
