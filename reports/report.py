"""Records in; Markdown and CSV tables and a plot of perplexity against the fraction removed out."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from bench.records import Record

COLUMNS = ["model", "method", "ratio", "fraction_removed", "kv_fraction_removed", "perplexity",
           "perplexity_standard_error",
           "times_dense", "bits_per_byte", "parameters", "weight_mib", "kv_bytes_per_token", "prune_s",
           "perplexity_s", "peak_memory_mib", "dtype", "device"]  # fmt: skip
TABLE_FORMATS = {
    "fraction_removed": "{:.3f}", "kv_fraction_removed": "{:.3f}",
    "perplexity": "{:,.2f}", "perplexity_standard_error": "{:,.2f}",
    "times_dense": "{:,.2f}", "bits_per_byte": "{:.3f}", "parameters": "{:,.0f}", "weight_mib": "{:.1f}",
    "prune_s": "{:.2f}", "perplexity_s": "{:.1f}", "peak_memory_mib": "{:,.0f}",
}  # fmt: skip
# Okabe and Ito's colour-blind-safe colours; markers and dashes tell the lines apart in print
STYLES = [("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"),
          ("#E69F00", "v", "-"), ("#56B4E9", "P", "--"), ("#000000", "X", "-.")]  # fmt: skip


def comparable(record: Record) -> tuple:
    """What two records must share for their figures to be compared: model, text, windows, dtype and device."""
    case = record.case
    return (case.model, case.model_hash, case.evaluation_sha256, case.evaluation_windows, case.evaluation_seq_len,
            case.dtype, case.device)  # fmt: skip


def same_calibration(record: Record, other: Record) -> bool:
    """Whether both were calibrated on the same text in the same way with the same seed; what needs neither is."""
    names = ("seed", "calibration_sha256", "calibration_samples", "calibration_seq_len")
    mine, theirs = (tuple(getattr(one.case, name) for name in names) for one in (record, other))
    if record.case.calibration_sha256 is None or other.case.calibration_sha256 is None:
        return "random" not in (record.case.criterion, other.case.criterion) or mine[0] == theirs[0]
    return mine == theirs


def records_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row for each successful case, the newest record of it, sorted by method and ratio.

    `times_dense` is the perplexity over that of the dense model measured on the same text in the same way; it is left
    empty where there is none.
    """
    newest = {record.case: record for record in records if record.status == "success"}.values()
    dense = {comparable(r): r.metrics["perplexity"] for r in newest if r.method == "dense"}
    rows = []
    for record in newest:
        reference = dense.get(comparable(record))
        rows.append({
            **vars(record.case),
            "method": record.method,
            **record.metrics,
            "perplexity_standard_error": record.standard_errors.get("perplexity"),
            "times_dense": record.metrics["perplexity"] / reference if reference else None,
            "weight_mib": record.metrics["weight_bytes"] / 2**20,
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    for column in COLUMNS:
        if column not in frame:
            frame[column] = None
    return frame.sort_values(["model", "method", "ratio"], key=_dense_first, kind="stable", ignore_index=True)


def _dense_first(column: pd.Series) -> pd.Series:
    return column.where(column != "dense", "") if column.name == "method" else column


def markdown_table(frame: pd.DataFrame, columns: Sequence[str]) -> str:
    """The columns as a Markdown table, aligned so that it reads in a terminal as well."""

    def cell(name, value):
        return "" if pd.isna(value) else TABLE_FORMATS.get(name, "{}").format(value)  # fmt: skip

    rows = [list(columns), *([cell(name, row[name]) for name in columns] for _, row in frame.iterrows())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    is_text = [name in ("model", "method", "dtype", "device") for name in columns]
    rows.insert(
        1, ["-" * width if text else "-" * (width - 1) + ":" for width, text in zip(widths, is_text, strict=True)]
    )
    return "\n".join(
        "| " + " | ".join(value.ljust(width) if text else value.rjust(width)
                          for value, width, text in zip(row, widths, is_text, strict=True)) + " |"
        for row in rows
    )  # fmt: skip


def plot_perplexity(frame: pd.DataFrame) -> Figure:
    """Perplexity (logarithmic) against the fraction removed, one line for each method, error bars of one error."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    dense = frame[frame["method"] == "dense"]
    pruned = frame[frame["method"] != "dense"]
    for (method, group), (colour, marker, dashes) in zip(pruned.groupby("method"), _styles(), strict=False):
        points = pd.concat([dense, group]).sort_values("fraction_removed")
        axes.errorbar(points["fraction_removed"] * 100, points["perplexity"], yerr=points["perplexity_standard_error"],
                      label=method, color=colour, marker=marker, linestyle=dashes, capsize=3)  # fmt: skip
    if len(dense):
        axes.axhline(dense["perplexity"].iloc[0], color="0.5", linewidth=1, zorder=0)
        axes.annotate("dense", (axes.get_xlim()[1], dense["perplexity"].iloc[0]), color="0.4",
                      ha="right", va="bottom", xytext=(-3, 2), textcoords="offset points")  # fmt: skip
    axes.set(yscale="log", xlabel="decoder linear parameters removed (%)", ylabel="perplexity (log scale)")
    axes.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    axes.grid(alpha=0.25, which="both")
    first = frame.iloc[0]
    windows = f"{first['evaluation_windows']} windows of {first['evaluation_seq_len']} tokens"
    axes.set_title(f"{first['model']}, {windows} of {first['evaluation_text']}, {first['dtype']}", fontsize=10)
    if len(pruned):
        figure.legend(title="method", frameon=False, loc="outside right upper")
    return figure


def _styles():
    while True:
        yield from STYLES


def write_report(records: Sequence[Record], directory: str | os.PathLike) -> tuple[str, list[Path]]:
    """Write tables and pictures of the newest comparable set of records; returns the table and the files.

    Records that cannot be compared with the newest one (other model, text, windows, calibration, dtype, device or code)
    are left out of the tables and stay in the record file.
    """
    directory = Path(directory)
    successes = [record for record in records if record.status == "success"]
    if not successes:
        return "no successful record yet", []
    newest = next((r for r in reversed(successes) if r.case.calibration_sha256), successes[-1])
    same = [
        r
        for r in successes
        if comparable(r) == comparable(newest) and r.case.code == newest.case.code and same_calibration(r, newest)
    ]
    frame = records_frame(same)
    table = markdown_table(frame, COLUMNS[1:13])
    note = _provenance(newest)
    files = [directory / "perplexity.md", directory / "perplexity.csv"]
    directory.mkdir(parents=True, exist_ok=True)
    files[0].write_text(f"# Perplexity against the fraction removed\n\n{note}\n\n{table}\n", encoding="utf-8")
    frame[COLUMNS].to_csv(files[1], index=False)
    figure = plot_perplexity(frame)
    for suffix in ("png", "svg"):
        files.append(directory / f"perplexity.{suffix}")
        with matplotlib.rc_context({"svg.hashsalt": "transact"}):  # the same records give the same file
            figure.savefig(files[-1], dpi=160, metadata={"Date": None} if suffix == "svg" else None)
    return table, files


def _provenance(record: Record) -> str:
    case, where = record.case, record.environment
    return (
        f"Model {case.model} ({case.model_hash}); {case.evaluation_windows} windows of {case.evaluation_seq_len} "
        f"tokens of {case.evaluation_text} (SHA-256 {case.evaluation_sha256[:12]}); calibrated on "
        f"{case.calibration_samples} windows of {case.calibration_seq_len} of {case.calibration_text}, "
        f"seed {case.seed}; {case.dtype} on "
        f"{where['device']}; torch {where['torch']}, transformers {where['transformers']}, "
        f"transact {where['transact']} (code {case.code})."
    )
