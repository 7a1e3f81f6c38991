"""Records in; tables and plots of perplexity, of tasks, and of what differs by more than chance out."""

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from bench.records import Record
from bench.significance import COMPARED, Difference, differences

COLUMNS = ["model", "method", "ratio", "fraction_removed", "kv_fraction_removed", "perplexity",
           "perplexity_standard_error", "times_dense", "loss_over_dense", "bits_per_byte", "parameters", "weight_mib",
           "kv_bytes_per_token", "prune_s", "perplexity_s", "peak_memory_mib", "dtype", "device"]  # fmt: skip
TABLE_FORMATS = {
    "fraction_removed": "{:.3f}", "kv_fraction_removed": "{:.3f}",
    "perplexity": "{:,.2f}", "perplexity_standard_error": "{:,.2f}",
    "times_dense": "{:,.2f}", "perplexity_times": "{:,.3f}", "value": "{:.3f}", "standard_error": "{:.3f}",
    "chance": "{:.2f}", "version": "{:g}", "latency_s": "{:.3f}", "prefill_s": "{:.3f}", "decode_s": "{:.3f}",
    "decode_tokens_per_s": "{:,.1f}", "prefill_roofline_fraction": "{:.2f}", "decode_roofline_fraction": "{:.2f}",
    "warm_up_s": "{:.1f}", "kv_bytes_per_token": "{:,.0f}", "tokens_per_s": "{:.1f}", "file_mib": "{:.0f}",
    "same_tokens": "{:.3f}", "bits_per_byte": "{:.3f}", "parameters": "{:,.0f}", "weight_mib": "{:.1f}",
    "prune_s": "{:.2f}", "perplexity_s": "{:.1f}", "peak_memory_mib": "{:,.0f}",
}  # fmt: skip
# Okabe and Ito's colour-blind-safe colours; markers and dashes tell the lines apart in print
STYLES = [("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"),
          ("#E69F00", "v", "-"), ("#56B4E9", "P", "--"), ("#000000", "X", "-."), ("#8C510A", "<", ":"),
          ("#666666", ">", "-"), ("#01665E", "h", "--")]  # fmt: skip


def comparable(record: Record) -> tuple:
    """What two records must share for their figures to be compared: model, text, windows, dtype and device."""
    return tuple(getattr(record.case, name) for name in ("model", *COMPARED))


def same_calibration(record: Record, other: Record) -> bool:
    """Whether both were calibrated on the same text in the same way with the same seed; what needs neither is."""
    names = ("seed", "calibration_sha256", "calibration_samples", "calibration_seq_len")
    mine, theirs = (tuple(getattr(one.case, name) for name in names) for one in (record, other))
    if record.case.calibration_sha256 is None or other.case.calibration_sha256 is None:
        return "random" not in (record.case.criterion, other.case.criterion) or mine[0] == theirs[0]
    return mine == theirs


def newest_by_case(records: Sequence[Record]) -> list[Record]:
    """The newest successful record of each case; whether tasks were measured as well makes no other case."""
    successes = (record for record in records if record.status == "success")
    return list({replace(record.case, tasks="", task_limit=None): record for record in successes}.values())


def records_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row for each successful case, the newest record of it, sorted by method and ratio.

    `times_dense` is the perplexity over that of the dense model measured on the same text in the same way, and
    `loss_over_dense` by how many nats its loss is higher, with the paired bootstrap interval at 95 %; both are left
    empty where there is none.
    """
    newest = newest_by_case(records)
    dense = {comparable(r): r for r in newest if r.method == "dense"}
    rows = []
    for record in newest:
        reference = dense.get(comparable(record))
        rows.append({
            **vars(record.case),
            "method": record.method,
            **record.metrics,
            "perplexity_standard_error": record.standard_errors.get("perplexity"),
            "times_dense": record.metrics["perplexity"] / reference.metrics["perplexity"] if reference else None,
            "loss_over_dense": with_interval(differences(record, reference)["loss_nats"])
                               if reference and reference is not record else None,
            "weight_mib": record.metrics["weight_bytes"] / 2**20,
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    for column in COLUMNS:
        if column not in frame:
            frame[column] = None
    return frame.sort_values(["model", "method", "ratio"], key=_dense_first, kind="stable", ignore_index=True)


def with_interval(difference: Difference) -> str:
    """The difference with its interval, marked with ≈ where that holds zero: it may be chance."""
    mark = " ≈" if difference.is_noise else ""
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]{mark}"


def tasks_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row for each newest case, task and metric that has scores; `over_dense` as in `records_frame`.

    Only records with the tasks, and the items, of the last one that has any.
    """
    with_tasks = [record for record in records if record.status == "success" and record.tasks]
    if not with_tasks:
        return pd.DataFrame()
    last = with_tasks[-1].case
    same = {r.case: r for r in with_tasks if (r.case.tasks, r.case.task_limit) == (last.tasks, last.task_limit)}
    dense = next((record for record in reversed(same.values()) if record.method == "dense"), None)
    rows = []
    for record in same.values():
        changes = differences(record, dense) if dense and record is not dense else {}
        for task, result in record.tasks.items():
            for metric, value in result["metrics"].items():
                change = changes.get(f"{task} {metric}")
                rows.append({
                    "capability": result["capability"], "task": task, "version": result["version"],
                    "shots": result["shots"], "items": result["items"], "metric": metric, "chance": result["chance"],
                    "method": record.method, "ratio": record.case.ratio, "value": value,
                    "standard_error": result["standard_errors"][metric],
                    "over_dense": with_interval(change) if change and metric != "perplexity" else None,
                })  # fmt: skip
    frame = pd.DataFrame(rows)
    order = {task: position for position, task in enumerate(with_tasks[-1].tasks)}

    def in_order(column: pd.Series) -> pd.Series:
        return column.map(order) if column.name == "task" else _dense_first(column)

    columns = ["task", "metric", "method", "ratio"]
    return frame.sort_values(columns, key=in_order, kind="stable", ignore_index=True)


def pairs_frame(records: Sequence[Record]) -> pd.DataFrame:
    """Every two methods at the same ratios: by how many nats the loss of the first is higher, and is it chance?"""
    rows = []
    by_ratio: dict[tuple, list[Record]] = {}
    for record in newest_by_case(records):
        by_ratio.setdefault((record.case.ratio, record.case.kv_ratio), []).append(record)
    for (ratio, kv_ratio), group in sorted(by_ratio.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        group.sort(key=lambda record: record.metrics["perplexity"])
        for better, worse in combinations(group, 2):
            change = differences(worse, better)["loss_nats"]
            rows.append({
                "ratio": ratio, "kv_ratio": kv_ratio, "method": worse.method, "than": better.method,
                "loss_higher_by": with_interval(change),
                "perplexity_times": worse.metrics["perplexity"] / better.metrics["perplexity"],
                "verdict": "within noise" if change.is_noise else f"{better.method} is better",
            })  # fmt: skip
    return pd.DataFrame(rows)


def _dense_first(column: pd.Series) -> pd.Series:
    return column.where(column != "dense", "") if column.name == "method" else column


def markdown_table(frame: pd.DataFrame, columns: Sequence[str]) -> str:
    """The columns as a Markdown table, aligned so that it reads in a terminal as well."""

    def cell(name, value):
        return "" if pd.isna(value) else TABLE_FORMATS.get(name, "{}").format(value)  # fmt: skip

    rows = [list(columns), *([cell(name, row[name]) for name in columns] for _, row in frame.iterrows())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    is_text = [frame[name].map(lambda value: isinstance(value, str) or pd.isna(value)).all() for name in columns]
    rows.insert(
        1, ["-" * width if text else "-" * (width - 1) + ":" for width, text in zip(widths, is_text, strict=True)]
    )
    return "\n".join(
        "| " + " | ".join(value.ljust(width) if text else value.rjust(width)
                          for value, width, text in zip(row, widths, is_text, strict=True)) + " |"
        for row in rows
    )  # fmt: skip


METHODS = ("best", "flap", "transact", "transact-released", "wanda-sp", "llm-pruner", "dense", "magnitude", "random")


def style_of(method: str, others: Sequence[str] = ()) -> tuple[str, str, str]:
    """Colour, marker and dashes of a method, the same in every picture; `others` are those that METHODS lacks."""
    known = [*METHODS, *sorted(set(others) - set(METHODS))]
    return STYLES[known.index(method) % len(STYLES)]


def plot_perplexity(frame: pd.DataFrame) -> Figure:
    """Perplexity (logarithmic) against the fraction removed, one line for each method, error bars of one error."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    dense = frame[frame["method"] == "dense"]
    pruned = frame[frame["method"] != "dense"]
    for method, group in pruned.groupby("method"):
        colour, marker, dashes = style_of(method, frame["method"])
        points = pd.concat([dense, group]).sort_values("fraction_removed")
        axes.errorbar(points["fraction_removed"] * 100, points["perplexity"], yerr=points["perplexity_standard_error"],
                      label=method, color=colour, marker=marker, linestyle=dashes, capsize=3)  # fmt: skip
    if len(dense):
        axes.axhline(dense["perplexity"].iloc[0], color="0.5", linewidth=1, zorder=0)
        axes.annotate("dense", (axes.get_xlim()[1], dense["perplexity"].iloc[0]), color="0.4",
                      ha="right", va="bottom", xytext=(-3, 2), textcoords="offset points")  # fmt: skip
    axes.set(yscale="log", xlabel="decoder linear parameters removed (%)",
             ylabel="perplexity (log scale; bars: one standard error)")  # fmt: skip
    axes.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    few_decades = frame["perplexity"].max() < 50 * frame["perplexity"].min()
    axes.yaxis.set_minor_locator(matplotlib.ticker.LogLocator(subs=(2, 3, 5) if few_decades else range(2, 10)))
    minor = matplotlib.ticker.StrMethodFormatter("{x:,.0f}") if few_decades else matplotlib.ticker.NullFormatter()
    axes.yaxis.set_minor_formatter(minor)
    axes.grid(alpha=0.25, which="both")
    first = frame.iloc[0]
    windows = f"{first['evaluation_windows']} windows of {first['evaluation_seq_len']} tokens"
    axes.set_title(f"{first['model']}, {windows} of {first['evaluation_text']}, {first['dtype']}", fontsize=10)
    if len(pruned):
        figure.legend(title="method", frameon=False, loc="outside right upper")
    return figure


def plot_tasks(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy of every task, one marker for each method with a bar of one standard error; guessing as a grey tick."""
    frame = frame[frame["metric"] == "acc"]
    tasks = list(dict.fromkeys(frame["task"]))
    figure = Figure(figsize=(8, 1.4 + 0.42 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(zip(frame["method"], frame["ratio"], strict=True)))
    for number, (method, ratio) in enumerate(methods):
        colour, marker, _ = style_of(method, frame["method"])
        group = frame[(frame["method"] == method) & (frame["ratio"] == ratio)]
        offset = 0.5 * (number / max(1, len(methods) - 1) - 0.5)
        places = [tasks.index(task) + offset for task in group["task"]]
        label = method if method == "dense" else f"{method}, {ratio:.0%} removed"
        axes.errorbar(group["value"], places, xerr=group["standard_error"], label=label, color=colour, marker=marker,
                      linestyle="none", markersize=5, capsize=2)  # fmt: skip
    for place, task in enumerate(tasks):
        chance = frame[frame["task"] == task]["chance"].iloc[0]
        if pd.notna(chance):
            axes.plot([chance, chance], [place - 0.35, place + 0.35], color="0.5", linewidth=1.5, zorder=3,
                      label="guessing" if place == 0 else None)  # fmt: skip
    capabilities = frame.drop_duplicates("task").set_index("task")["capability"]
    labels = [f"{task} ({capabilities[task]})" if pd.notna(capabilities[task]) else task for task in tasks]
    axes.set_yticks(range(len(tasks)), labels)
    axes.invert_yaxis()
    axes.set(xlabel="accuracy (bars: one standard error)", xlim=(-0.02, 1.02))
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    return figure


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
    frame, note = records_frame(same), _provenance(newest)
    table = markdown_table(frame, COLUMNS[1:14])
    directory.mkdir(parents=True, exist_ok=True)
    files = write_table(directory / "perplexity", "Perplexity against the fraction removed", note, frame, COLUMNS)
    files += write_figure(directory / "perplexity", plot_perplexity(frame))
    pairs = pairs_frame(same)
    if len(pairs):
        files += write_table(directory / "differences", "Which method is better, and is it chance?",
                              f"{note} {NOISE}", pairs, list(pairs))  # fmt: skip
    tasks = tasks_frame(same)
    if len(tasks):
        files += write_table(directory / "tasks", "What a pruned model loses", f"{note} {NOISE}", tasks, list(tasks))
        if (tasks["metric"] == "acc").any():
            case = newest.case
            title = f"{case.model}, {case.dtype}, calibrated on {case.calibration_text or 'nothing'}"
            items = sorted(set(tasks["items"]))
            several = f"{items[0]}" if len(items) == 1 else f"{items[0]} to {items[-1]}"
            files += write_figure(directory / "tasks", plot_tasks(tasks, f"{title}\n{several} items a task"))
        shown = ["task", "items", "method", "ratio", "value", "standard_error", "over_dense"]
        table += "\n\n" + markdown_table(tasks[tasks["metric"] == "acc"], shown)
    return table, files


NOISE = "Differences with paired bootstrap intervals at 95 %; ≈: within noise."


def write_table(stem: Path, title: str, note: str, frame: pd.DataFrame, columns: Sequence[str]) -> list[Path]:
    """The columns as a Markdown table under its title and note, and as CSV; returns the files."""
    files = [stem.with_suffix(".md"), stem.with_suffix(".csv")]
    files[0].write_text(f"# {title}\n\n{note}\n\n{markdown_table(frame, columns)}\n", encoding="utf-8")
    frame[list(columns)].to_csv(files[1], index=False)
    return files


def write_figure(stem: Path, figure: Figure) -> list[Path]:
    """The figure as PNG and SVG; returns the files."""
    files = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    for file in files:
        with matplotlib.rc_context({"svg.hashsalt": "transact"}):  # the same records give the same file
            figure.savefig(file, dpi=160, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files


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
