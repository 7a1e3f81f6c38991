"""Other packages beside ours, as `python -m bench peers` recorded them: table, words, and their points on the front."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd

from bench.quality.significance import Difference
from bench.records import HIGHEST_LOSS, NUMBER, NUMBER_OR_NULL, PEERS_SCHEMA, Record, is_of_kind, read_lines

from .answers import asked_words, counted
from .findings import listed, plain
from .rises import paired, text_named, verdict_on, with_interval
from .sets import SPEEDUP, TIMES, RecordSet, is_reference, is_timed

SETTINGS = ("base", "calibration", "samples", "seq_len", "windows")  # that rows share which are compared
SAME = 1e-3  # nats by which two machines differ on the same window
# what a line must hold, as `bench.records` states kinds
PARTS = {
    "case": {"base": str, "method": str, "ratio": NUMBER, "calibration": str, "samples": int, "seq_len": int,
             "windows": int | None},
    "row": {"method": str, "fraction_removed": NUMBER, "losses": {str: [NUMBER]}}, "environment": {"device": str},
}  # fmt: skip


def read_peers(directories: Iterable[Path]) -> tuple[list[dict], list[str]]:
    """The lines of each `peers.jsonl`, the newest of each case, that share the last one's settings; and complaints."""

    def parse(fields: dict) -> dict:
        row = fields.get("row")
        if not is_of_kind(fields, PARTS) or not row["losses"] or not all(row["losses"].values()):
            raise ValueError("no losses, or parts of another kind")
        if not all(is_of_kind(row[name], NUMBER_OR_NULL) for name in row if name.startswith(("prune_s", *TIMES))):
            raise ValueError("times of another kind")
        key = tuple(fields["case"][name] for name in (*SETTINGS, "method", "ratio"))
        return {**fields, "key": key}

    lines, complaints = [], []
    for directory in directories:
        read, complained = read_lines(directory / "peers.jsonl", PEERS_SCHEMA, parse)
        lines += read
        complaints += complained
    newest = {line["key"]: line for line in lines}.values()
    return [line for line in newest if line["key"][: len(SETTINGS)] == lines[-1]["key"][: len(SETTINGS)]], complaints


def is_package(method: str) -> bool:
    """Whether a row is of another package, which is named with its version; presets of ours are one word."""
    return " " in method


def dense_line(lines: Sequence[Mapping]) -> Mapping | None:
    return next((line for line in lines if line["row"]["method"] == "dense"), None)


def perplexity_of(losses: Sequence[float]) -> float:
    """Infinite above what a float holds."""
    loss = fmean(losses)
    return math.exp(loss) if loss < HIGHEST_LOSS else math.inf


def difference(line: Mapping, other: Mapping | None, text: str) -> Difference | None:
    """By how many nats a line's loss on a text is higher; None where there is nothing to pair it with."""
    if other is None or other is line:
        return None
    mine, theirs = (one["row"]["losses"].get(text, ()) for one in (line, other))
    return paired(mine, theirs)


def best_of(lines: Sequence[Mapping], ratio: float, text: str) -> Mapping:
    """The line of the least loss on a text at a ratio."""
    there = [line for line in lines if line["case"]["ratio"] == ratio and text in line["row"]["losses"]]
    return min(there, key=lambda line: fmean(line["row"]["losses"][text]))


def peers_frame(lines: Sequence[Mapping]) -> pd.DataFrame:
    """One row for each method, ratio and text: its loss over the dense model's and over the best at that ratio."""
    rows, dense = [], dense_line(lines)
    for line in sorted(lines, key=lambda line: line["case"]["ratio"]):
        row, ratio = line["row"], line["case"]["ratio"]
        for text, losses in row["losses"].items():
            over, behind = difference(line, dense, text), difference(line, best_of(lines, ratio, text), text)
            rows.append({
                "method": row["method"], "ratio": ratio, "fraction_removed": row["fraction_removed"],
                "text": text_named(text), "perplexity": perplexity_of(losses),
                "loss_over_dense": with_interval(over) if over else None,
                "loss_over_best": with_interval(behind) if behind else None,
                **{name: value for name, value in row.items() if name.startswith(TIMES)},
                "prune_s": row.get("prune_s"),
            })  # fmt: skip
    return pd.DataFrame(rows)


def findings(lines: Sequence[Mapping]) -> list[str]:
    """Which method loses least at each ratio and on each text, and how far each package is behind."""
    sentences = []
    for ratio in sorted({line["case"]["ratio"] for line in lines if line["row"]["method"] != "dense"}):
        for text in next(line for line in lines if line["case"]["ratio"] == ratio)["row"]["losses"]:
            best, parts = best_of(lines, ratio, text), []
            alike = [line for line in lines if line["case"]["ratio"] == ratio]
            for line in alike:
                if is_package(line["row"]["method"]) and line is not best:
                    gap = difference(line, best, text)
                    parts.append(f"“{line['row']['method']}” is behind by {_gap_words(gap)}")
            perplexity = plain(perplexity_of(best["row"]["losses"][text]), 4)
            asked = asked_words(ratio, (line["row"]["fraction_removed"] for line in alike))
            words = f"With {asked} “{best['row']['method']}” loses least on {text_named(text)}"
            sentences.append(f"{words}, with perplexity {perplexity}{'; ' + listed(parts) if parts else ''}.")
    return sentences


def _gap_words(gap: Difference | None) -> str:
    if gap is None:
        return "what cannot be paired"
    return f"{with_interval(gap)} nats, {verdict_on(gap)}"


def about(lines: Sequence[Mapping]) -> str:
    """On what they were calibrated and measured."""
    case = lines[-1]["case"]
    windows = "all windows" if case["windows"] is None else counted(case["windows"], "window")
    return (
        "Each is asked for the same share by `nox -s rivals` and calibrated on "
        f"{counted(case['samples'], 'window')} of {case['seq_len']} tokens of {case['calibration']}, without training; "
        f"perplexity of {windows}, {case['base']}."
    )


def peer_records(lines: Sequence[Mapping], chosen: RecordSet) -> list[Record]:
    """Records of the packages that were timed on the machine of the others, for the front.

    Only of the same model and windows, those on which the dense model has the same losses, and calibrated on as many
    windows of the same texts.
    """
    dense = max(filter(is_reference, chosen.records), key=lambda record: len(record.texts), default=None)
    theirs = dense_line(lines)
    if dense is None or theirs is None:
        return []
    machines = {record.environment["device"] for record in chosen.records if is_timed(record)}
    cases = [record.case for record in chosen.records]
    calibrations = {(case.calibration_text, case.calibration_samples, case.calibration_seq_len) for case in cases}
    found = []
    for line in lines:
        row, asked = line["row"], line["case"]
        if not is_package(row["method"]) or row.get(SPEEDUP) is None:
            continue
        if (asked["calibration"], asked["samples"], asked["seq_len"]) not in calibrations:
            continue
        if line["environment"]["device"] not in machines:
            continue
        texts = tuple(
            {**text, "losses": row["losses"][text["name"]][: len(text["losses"])]} for text in dense.texts
            if _same_windows(text["losses"], theirs["row"]["losses"].get(text["name"]))
            and len(row["losses"].get(text["name"], ())) >= len(text["losses"])
        )  # fmt: skip
        if not texts or texts[0]["name"] != dense.texts[0]["name"]:
            continue
        losses = tuple(texts[0]["losses"])
        metrics = {name: value for name, value in row.items() if name.startswith(TIMES)}
        metrics |= {"fraction_removed": row["fraction_removed"], "loss_nats": fmean(losses),
                    "perplexity": perplexity_of(losses)}  # fmt: skip
        case = replace(dense.case, criterion=row["method"], ratio=line["case"]["ratio"])
        found.append(Record(case, row["method"], metrics, {}, line["environment"], losses=losses, texts=texts))
    return found


def _same_windows(losses: Sequence[float], others: Sequence[float] | None) -> bool:
    """Whether the first of the others are these."""
    return others is not None and len(others) >= len(losses) and np.allclose(losses, others[: len(losses)], atol=SAME)
