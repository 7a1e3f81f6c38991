"""Records of speed in; tables and pictures of latency, throughput, memory, roofline, engines out. Without torch."""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from transact.entry import counted

from ..output.figures import INK, STYLES, write_figure
from ..output.tables import markdown_table, write_table
from ..records import (
    ENGINES_PARTS,
    ENGINES_SCHEMA,
    NUMBER_OR_NULL,
    SCALE_PARTS,
    SCALE_SCHEMA,
    SPEED_PARTS,
    SPEED_SCHEMA,
    line_of,
    read_lines,
)

T = TypeVar("T")
COLUMNS = ["model", "mode", "prefix", "decode", "batch", "latency_s", "prefill_s", "decode_s", "decode_tokens_per_s",
           "decode_speedup", "decode_speedup_low", "decode_speedup_high", "decode_verdict", "prefill_verdict",
           "prefill_roofline_fraction", "decode_roofline_fraction", "weight_mib", "kv_bytes_per_token",
           "peak_memory_mib", "warm_up_s", "reference", "dtype", "device", "status", "error"]  # fmt: skip
# of a cell that was measured: without them there is nothing to draw
DRAWN = ("prefill_s", "decode_s", "decode_tokens_per_s", "weight_bytes", "kv_bytes_per_token", "prefill_operations",
         "prefill_bytes", "decode_operations_per_token", "decode_bytes_per_token", "copy_bytes_per_s",
         "matrix_operations_per_s")  # fmt: skip
ENGINE_COLUMNS = ["model", "engine", "tokens_per_s", "mib", "same_tokens"]
HATCHES = ("", "///", "...")


def read_speed(path: str | os.PathLike) -> tuple[pd.DataFrame, list[str]]:
    """One row a cell of the last machine, the newest record of it, and complaints of lines that are none or of others.

    Models are called by their dtype as well where there are several.
    """

    def row_of(record: dict) -> tuple[str, dict]:
        line_of(record, SPEED_PARTS, verdicts={str: str}, reference=str | None, error=str | None)
        case, metrics = record["case"], record["metrics"]
        if record["status"] == "success" and not all((metrics.get(name) or 0) > 0 for name in DRAWN):
            raise ValueError("a figure is missing")
        row = {**metrics, **case, "status": record["status"], "error": record.get("error")}
        row |= {f"{name}_verdict": verdict for name, verdict in record.get("verdicts", {}).items()}
        row |= {"reference": record.get("reference"), "torch": record["environment"]["torch"]}
        return json.dumps(case), row | machine_of(record)

    rows, complaints = read_lines(path, SPEED_SCHEMA, row_of)
    alike, others = of_last_machine(rows, lambda row: row[1]["machine"])
    frame = pd.DataFrame(list(dict(alike).values()))
    if "weight_bytes" in frame:
        frame["weight_mib"] = frame["weight_bytes"].astype(float) / 2**20
    for column in COLUMNS:
        if len(frame) and column not in frame:
            frame[column] = None
    if len(frame) and frame["dtype"].nunique() > 1:
        frame["model"] += ", " + frame["dtype"]
    return frame, [*complaints, *(f"{path}: {words}" for words in others)]


def machine_of(record: Mapping) -> dict[str, str]:
    """What a line was measured on: its `hardware`, and the `machine`, with the threads where these compute."""
    where, hardware = record["environment"], record["environment"]["device"]
    threads = f", {where.get('threads')} threads" if record["case"]["device"] == "cpu" else ""
    return {"hardware": hardware, "machine": hardware + threads}


def of_last_machine(rows: Sequence[T], machine: Callable[[T], str]) -> tuple[list[T], list[str]]:
    """The rows of the machine that measured last, and one sentence for each other: speeds cannot be compared."""
    if not rows:
        return [], []
    last = machine(rows[-1])
    others = Counter(machine(row) for row in rows if machine(row) != last)
    words = [f"{counted(count, 'record')} of {name} left out, the last is of {last}"
             for name, count in others.items()]  # fmt: skip
    return [row for row in rows if machine(row) == last], words


def write_speed_report(frame: pd.DataFrame, directory: str | os.PathLike) -> tuple[str, list[Path]]:
    """Tables and pictures of a frame of `read_speed`; returns the table and the files."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    hardware = ", ".join(sorted(frame["hardware"].unique()))
    note = (
        f"{hardware}; torch {', '.join(sorted(frame['torch'].unique()))}. Medians; random weights where a shape. "
        "Speed-ups are medians of runs in turn with the reference, with intervals at 95 %; inconclusive: 1 lies within."
    )
    files = write_table(directory / "speed", "Latency, throughput and memory", note, frame, COLUMNS)
    done = frame[frame["status"] == "success"]
    if len(done):
        single = done[done["batch"] == done["batch"].min()]
        files += write_figure(directory / "latency", plot_latency(single, hardware))
        files += write_figure(directory / "memory", plot_memory(done, hardware))
        files += write_figure(directory / "roofline", plot_roofline(done, hardware))
        if done["batch"].nunique() > 1:
            files += write_figure(directory / "throughput", plot_throughput(done, hardware))
    return markdown_table(frame, COLUMNS[:14]), files


def _lines(frame: pd.DataFrame):
    """Each model and mode with its label, a style whose colour is the model's and marker and dashes are the mode's, and
    the mode's hatches."""
    models, modes = [*frame["model"].unique()], [*frame["mode"].unique()]
    for (model, mode), group in frame.groupby(["model", "mode"], sort=False):
        _, marker, dashes = STYLES[modes.index(mode) % len(STYLES)]
        colour = STYLES[models.index(model) % len(STYLES)][0]
        yield f"{model}, {mode}", group, (colour, marker, dashes), HATCHES[modes.index(mode) % len(HATCHES)]


def dtypes(frame: pd.DataFrame) -> str:
    return ", ".join(frame["dtype"].unique())


def plot_latency(frame: pd.DataFrame, hardware: str) -> Figure:
    """Bars of prefill and decode seconds for each pair of lengths, as in the paper's figure."""
    lengths = sorted(set(zip(frame["prefix"], frame["decode"], strict=True)), key=lambda pair: (sum(pair), pair))
    lines = list(_lines(frame))
    figure = Figure(figsize=(max(7, 1.1 * len(lengths) + 2), 4.5), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(lines)
    for number, (label, group, (colour, *_), hatch) in enumerate(lines):
        by_length = group.set_index(["prefix", "decode"])
        known = [pair for pair in lengths if pair in by_length.index]
        places = [lengths.index(pair) + (number - (len(lines) - 1) / 2) * width for pair in known]
        prefill = [by_length.loc[pair, "prefill_s"] for pair in known]
        decode = [by_length.loc[pair, "decode_s"] for pair in known]
        axes.bar(places, prefill, width, color=colour, alpha=0.45, edgecolor=colour)
        axes.bar(places, decode, width, bottom=prefill, color=colour, label=label, hatch=hatch, edgecolor="white")
    axes.set_xticks(range(len(lengths)), [f"{prefix}+{decode}" for prefix, decode in lengths])
    axes.set(xlabel="tokens read + tokens generated", ylabel="seconds (light: prefill, solid: decode)")
    axes.set_title(f"Latency, batch {frame['batch'].iloc[0]}, {dtypes(frame)}, {hardware}", fontsize=10)
    axes.grid(alpha=0.25, axis="y")
    figure.legend(frameon=False, loc="outside upper center", ncols=2)
    return figure


def plot_throughput(frame: pd.DataFrame, hardware: str) -> Figure:
    """Decoded tokens a second of all sequences against the batch, at the longest of the lengths measured most."""
    longest = frame.assign(total=frame["prefix"] + frame["decode"])
    cells = longest["total"].value_counts()
    longest = longest[longest["total"] == cells[cells == cells.max()].index.max()]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, group, (colour, marker, dashes), _ in _lines(longest):
        group = group.sort_values("batch")
        axes.plot(group["batch"], group["decode_tokens_per_s"], label=label, color=colour, marker=marker,
                  linestyle=dashes)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="sequences in the batch", ylabel="decoded tokens per second")
    axes.set_xscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_minor_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    first = longest.iloc[0]
    axes.set_title(f"Throughput, {first['prefix']}+{first['decode']} tokens, {dtypes(frame)}, {hardware}", fontsize=10)
    axes.grid(alpha=0.25, which="both")
    figure.legend(frameon=False, loc="outside upper center", ncols=2)
    return figure


def plot_memory(frame: pd.DataFrame, hardware: str) -> Figure:
    """Bars of weights and of KV bytes a token of each model."""
    models = frame.drop_duplicates("model")
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(models)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (values, title, colour) in zip(
        panels,
        ((models["weight_bytes"] / 2**20, "weights (MiB)", STYLES[0][0]),
         (models["kv_bytes_per_token"] / 2**10, "KV cache (KiB per token)", STYLES[1][0])),
        strict=True,
    ):  # fmt: skip
        bars = axes.barh(models["model"], values, color=colour)
        axes.bar_label(bars, fmt="{:,.1f}", padding=3, fontsize=8)
        axes.margins(x=0.25)
        axes.set(xlabel=title)
        axes.grid(alpha=0.25, axis="x")
    panels[0].invert_yaxis()
    figure.suptitle(f"Memory, {dtypes(frame)}", fontsize=10)
    return figure


def plot_roofline(frame: pd.DataFrame, hardware: str) -> Figure:
    """Operations a second reached against operations a byte, under the measured roof; open: prefill, filled: decode."""
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.subplots()
    bandwidth, rate = frame["copy_bytes_per_s"].median(), frame["matrix_operations_per_s"].median()
    intensities = []
    for label, group, (colour, marker, _), _ in _lines(frame):
        prefill = group["prefill_operations"] / group["prefill_bytes"]
        decode = group["decode_operations_per_token"] / group["decode_bytes_per_token"]
        intensities += [*prefill, *decode]
        axes.plot(prefill, group["prefill_operations"] / group["prefill_s"] / 1e9, marker, color=colour,
                  markerfacecolor="none")  # fmt: skip
        reached = group["decode_operations_per_token"] * group["decode"] / group["decode_s"] / 1e9
        axes.plot(decode, reached, marker, color=colour, label=label)
    span = [min(intensities) / 2, max([*intensities, rate / bandwidth]) * 2]
    points = [span[0], rate / bandwidth, span[1]]
    axes.plot(points, [min(rate, bandwidth * point) / 1e9 for point in points], color="0.4", linewidth=1.5)
    axes.annotate("measured roof", (points[1], rate / 1e9), xytext=(0, -12), textcoords="offset points", color="0.4",
                  fontsize=9)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="operations per byte moved", ylabel="billion operations per second")
    axes.set_title(f"Roofline, {dtypes(frame)}, {hardware} (open: prefill, filled: decode)", fontsize=10)
    axes.grid(alpha=0.25, which="both")
    figure.legend(frameon=False, loc="outside upper center", ncols=2)
    return figure


def read_engines(path: str | os.PathLike) -> tuple[pd.DataFrame, list[str]]:
    """One row a model and engine, the newest record of it, beside what it is of the dense model's; complaints."""

    def row_of(record: dict) -> tuple[tuple, dict]:
        line_of(record, ENGINES_PARTS)
        case, where = record["case"], record["environment"]
        row = {name: case[name] for name in ENGINE_COLUMNS[:2]}
        row |= {name: float(record["row"][name]) for name in ENGINE_COLUMNS[2:]}
        if case["ratio"]:
            row["model"] = f"{case['model']}, {case['ratio']:.0%} removed"
        row |= {"base": case["base"], "hardware": f"{where['device']}, {counted(where['threads'], 'thread')}"}
        return json.dumps(case), row

    rows, complaints = read_lines(path, ENGINES_SCHEMA, row_of)
    frame = pd.DataFrame(list(dict(rows).values()))
    if len(frame):
        same = ["base", "engine", "hardware"]  # speeds elsewhere are none to compare with
        dense = frame[frame["model"] == "dense"].set_index(same)
        for name in ("tokens_per_s", "mib"):
            own = pd.MultiIndex.from_frame(frame[same])
            frame[f"{name}_over_dense"] = frame[name] / dense[name].reindex(own).to_numpy()
    return frame, complaints


def write_engines_report(frame: pd.DataFrame, directory: str | os.PathLike) -> tuple[str, list[Path]]:
    """Table and picture of a frame of `read_engines`; returns the table and the files."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    hardware = "; ".join(sorted(frame["hardware"].unique()))
    note = (
        f"{', '.join(frame['base'].unique())}; {hardware}. Greedy continuations of the embedded evaluation text; "
        "`same_tokens`: as the same model's in transformers in float32, each continuation counted up to its first "
        "difference; `mib`: of the weights, or of the file that holds them."
    )
    files = write_table(directory / "engines", "Pruned models in other engines", note, frame, ENGINE_COLUMNS)
    files += write_figure(directory / "engines", plot_engines(frame, hardware))
    return markdown_table(frame, ENGINE_COLUMNS), files


def plot_engines(frame: pd.DataFrame, hardware: str) -> Figure:
    """Bars of speed and of bytes over the dense model's in the same engine, and how many tokens are the same."""
    apart = [name for name in ("base", "hardware") if frame[name].nunique() > 1]
    frame = frame.assign(engine=frame[["engine", *apart]].agg(", ".join, axis=1))
    engines, models = [*frame["engine"].unique()], [*frame["model"].unique()]
    figure = Figure(figsize=(9, 1.6 + 0.3 * len(engines) * len(models)), layout="constrained")
    panels, width = figure.subplots(1, 2, sharey=True), 0.8 / len(models)
    for number, model in enumerate(models):
        group = frame[frame["model"] == model]
        places = [engines.index(engine) + (number - (len(models) - 1) / 2) * width for engine in group["engine"]]
        colour, said = STYLES[number % len(STYLES)][0], [f"{same:.0%}" for same in group["same_tokens"]]
        for axes, name, words in zip(panels, ("tokens_per_s", "mib"), (said, None), strict=True):
            bars = axes.barh(places, group[f"{name}_over_dense"].fillna(0.0), width, color=colour, label=model)
            axes.bar_label(bars, labels=words, fmt="{:.2f}", padding=3, fontsize=8)
    speed = "tokens a second over dense (beside: same greedy tokens)"
    for axes, label in zip(panels, (speed, "bytes over dense"), strict=True):
        axes.axvline(1, color=INK, linewidth=0.8)
        axes.margins(x=0.2)
        axes.set(xlabel=label, axisbelow=True)
        axes.grid(alpha=0.25, axis="x")
    panels[0].set_yticks(range(len(engines)), engines)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=min(3, len(models)))
    figure.suptitle(f"Pruned models in other engines, {hardware}", fontsize=10)
    return figure


SCALE_COLUMNS = ["shape", "parameters", "way", "windows", "how", "calibrate_s", "plan_s", "narrow_s", "compensate_s",
                 "total_s", "weight_gib", "device_gib", "host_gib", "dtype", "device", "status", "error"]  # fmt: skip
STAGES = {"calibrate and score": "calibrate_s", "plan": "plan_s", "prune": "narrow_s", "compensate": "compensate_s",
          "total": "total_s"}  # fmt: skip


def read_scale(path: str | os.PathLike) -> tuple[pd.DataFrame, list[str]]:
    """One row a shape, way, dtype and device, of several records the one of most layers and windows; complaints."""

    def row_of(record: dict) -> tuple[tuple, dict]:
        numbers = {str: NUMBER_OR_NULL}
        line_of(record, SCALE_PARTS, seconds=numbers, mib=numbers, how=str, error=str | None)
        case, seconds, mib = record["case"], record.get("seconds", {}), record.get("mib", {})
        row = {name: case[name] for name in ("shape", "way", "dtype", "device")}
        row |= {"parameters": record["parameters"], "windows": f"{case['samples']} x {case['seq_len']}"}
        row |= {"how": record.get("how", ""), "status": record["status"], "error": record.get("error")}
        row |= {column: seconds.get(stage) for stage, column in STAGES.items()}
        gib = {"weight_gib": "weights", "device_gib": "device", "host_gib": "host"}
        row |= {column: mib[name] / 2**10 if name in mib else None for column, name in gib.items()}
        row |= {"hardware": record["environment"]["device"], "torch": record["environment"]["torch"]}
        return (record["status"] == "success", row["how"] == "measured", case["samples"]), row

    rows, complaints = read_lines(path, SCALE_SCHEMA, row_of)
    best: dict[tuple, tuple] = {}
    for worth, row in rows:
        key = row["shape"], row["way"], row["dtype"], row["hardware"]
        if key not in best or worth >= best[key][0]:
            best[key] = worth, row
    ordered = sorted((row for _, row in best.values()), key=lambda row: (row["way"], row["parameters"]))
    return pd.DataFrame(ordered), complaints


def write_scale_report(frame: pd.DataFrame, directory: str | os.PathLike) -> tuple[str, list[Path]]:
    """Tables and a picture of a frame of `read_scale`; returns the table and the files."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    hardware = ", ".join(sorted(frame["hardware"].unique()))
    note = (
        f"{hardware}; torch {', '.join(sorted(frame['torch'].unique()))}. `best` at a ratio of 0.2, random weights; "
        "seconds, and the most GiB held by tensors on the device and by the whole process on the host. `extrapolated`: "
        "a few layers were measured."
    )
    files = write_table(directory / "scale", "What pruning takes by size", note, frame, SCALE_COLUMNS)
    done = frame[frame["status"] == "success"]
    if len(done):
        files += write_figure(directory / "scale", plot_scale(done, hardware))
    return markdown_table(frame, SCALE_COLUMNS), files


def plot_scale(frame: pd.DataFrame, hardware: str) -> Figure:
    """Bars of seconds by stage, and of memory, of each shape and way."""
    apart = [name for name in ("dtype", "hardware") if frame[name].nunique() > 1]
    labels = frame[["shape", "way", *apart]].agg(", ".join, axis=1)
    figure = Figure(figsize=(9, 1.8 + 0.45 * len(frame)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    start = pd.Series(0.0, index=frame.index)
    for (stage, column), (colour, *_) in zip([*STAGES.items()][:-1], STYLES, strict=False):
        seconds = frame[column].fillna(0.0).astype(float)
        panels[0].barh(labels, seconds, left=start, color=colour, label=stage)
        start = start + seconds
    panels[0].set(xlabel="seconds")
    figure.legend(
        *panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower left", ncols=len(STAGES) - 1
    )
    memory = "device_gib" if frame["device_gib"].notna().any() else "host_gib"
    bars = panels[1].barh(labels, frame[memory].fillna(0.0).astype(float), color=STYLES[4][0])
    panels[1].bar_label(bars, fmt="{:,.1f}", padding=3, fontsize=8)
    panels[1].margins(x=0.15)  # the words beside the longest bar
    panels[1].set(xlabel=f"GiB at most on the {memory.removesuffix('_gib')}")
    panels[0].invert_yaxis()
    for axes in panels:
        axes.grid(alpha=0.25, axis="x")
    figure.suptitle(f"What pruning takes, {hardware}", fontsize=10)
    return figure
