"""Pictures in one style: colour-blind-safe, markers and dashes for print, units on every axis, bars of errors."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.output.figures import FAINT, LOOK

from .answers import Answer, percent
from .drawing import (
    BARS,
    INTERVALS,
    bars_of,
    draw_dense,
    draw_front,
    draw_line,
    finish_lines,
    legend,
    line_names,
    perplexity_axis,
    perplexity_bars,
    plain_log_axis,
    plain_number,
    style_number,
    styles_of,
    with_dense,
)
from .findings import speed_column
from .rises import ON
from .sets import SPEED, SPEEDUP
from .texts import is_near, texts_of


def draw(picture: Callable[..., Figure], found: Answer | pd.DataFrame, *arguments) -> Figure:
    """The picture in the common style; perplexities that no float holds are missing in it, no axis being so long."""
    if isinstance(found, Answer):
        found = replace(found, frame=found.frame.replace(np.inf, np.nan))
    else:
        found = found.replace(np.inf, np.nan)
    with matplotlib.rc_context(LOOK):
        return picture(found, *arguments)


def _dense_perplexity(found: Answer) -> float | None:
    perplexity = found.dense.metrics["perplexity"] if found.dense else np.inf
    return perplexity if perplexity < np.inf else None


def plot_lines(found: Answer) -> Figure:
    """Perplexity against the fraction removed, one line for each value; dots where each has one fraction only."""
    frame = found.frame.assign(line=line_names(found.frame))
    if frame["kv_ratio"].notna().any():
        budgets = frame["kv_ratio"].map(lambda ratio: "" if pd.isna(ratio) else f", KV cache {percent(ratio)}")
        frame["line"] += budgets
    if frame.groupby("line")["ratio"].nunique().max() < 2 or frame["line"].nunique() > 24:
        return plot_dots(found)
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    styles = styles_of(frame["line"], frame["method"])
    for line, points in frame.groupby("line", sort=False):
        draw_line(axes, points.sort_values("fraction_removed"), "fraction_removed", line, styles[line], scale=100)
    finish_lines(figure, axes, frame, _dense_perplexity(found), "line")
    return figure


PANELS = {"perplexity": "perplexity", SPEED: "decoded tokens per second", "weight_mib": "weights (MiB)",
          SPEEDUP: "times as fast as dense"}  # fmt: skip


def plot_dots(found: Answer, metrics: Sequence[str] = ("perplexity",), most: int = 40) -> Figure:
    """One row for each group, setting and value, one panel for each metric; the `most` rows of the least perplexity."""
    frame = found.frame
    metrics = [speed_column(frame) if name == SPEED else name for name in metrics]
    left_out = len(frame) - most
    if left_out > 0:
        frame = frame.nsmallest(most, "perplexity").sort_index()
    metrics = [name for name in metrics if name == "perplexity" or (name in frame and frame[name].notna().any())]
    several = frame[["group", "setting"]].drop_duplicates().shape[0] > 1
    rows = frame[["label"]] if not several else frame[["group", "setting", "label"]]
    names = [", ".join(filter(None, row)) for row in rows.itertuples(index=False)]
    figure = Figure(figsize=(7, 1.3 + 0.3 * len(frame)), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    styles = styles_of(frame["label"], frame["method"])
    for axes, metric in zip(panels, metrics, strict=True):
        bars = perplexity_bars(frame) if metric == "perplexity" else bars_of(frame, metric)
        for place, (label, value) in enumerate(zip(frame["label"], frame[metric], strict=True)):
            colour, marker, _ = styles[label]
            axes.errorbar(value, place, xerr=bars[:, place : place + 1], color=colour, marker=marker, capsize=3)
        if metric == "perplexity":
            values = with_dense(found.frame["perplexity"], _dense_perplexity(found))
            perplexity_axis(axes, values, "x", f";\n{BARS}" if len(metrics) > 1 else f"; {BARS}")
            draw_dense(axes, _dense_perplexity(found), "x")
        else:
            words = INTERVALS if metric == SPEEDUP else BARS
            axes.set_xlabel(PANELS[metric] + (f"\n({words})" if bars.any() else ""))
            axes.set_xlim(0, (frame[metric] + bars[1]).max() * 1.05)
        axes.grid(which="both")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    if left_out > 0:
        figure.suptitle(f"the {most} of the least perplexity; the table has {left_out} more", fontsize=10)
    return figure


def plot_heat_map(found: Answer) -> Figure:
    """Perplexity over the dense model's: what is removed of attention across, of the MLP upwards."""
    frame = found.frame.dropna(subset=["attention_removed", "mlp_removed"])
    value, words = ("times_dense", "times the dense model's") if found.dense else ("perplexity", "log scale")
    if frame[value].isna().all():
        return plot_dots(found)
    groups = list(frame.groupby("group", sort=False))
    figure = Figure(figsize=(max(7, 5 * len(groups)), 4.4), layout="constrained")
    norm = LogNorm(frame[value].min(), max(frame[value].max(), frame[value].min() * 1.01))
    for axes, (group, rows) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        grid = rows.assign(x=(rows["attention_removed"] * 100).round(1), y=(rows["mlp_removed"] * 100).round(1))
        grid = grid.pivot_table(index="y", columns="x", values=value, aggfunc="last")
        mesh = axes.pcolormesh(np.ma.masked_invalid(grid.to_numpy()), cmap="cividis_r", norm=norm, edgecolor="white")
        for y, x in np.ndindex(grid.shape):
            number = grid.iat[y, x]
            if not np.isnan(number) and grid.size <= 150:
                colour = "#000000" if norm(number) < 0.5 else "#ffffff"
                axes.text(x + 0.5, y + 0.5, f"{number:,.3g}", ha="center", va="center", color=colour, fontsize=9)
        axes.set_xticks(np.arange(grid.shape[1]) + 0.5, [f"{x:g}" for x in grid.columns])
        axes.set_yticks(np.arange(grid.shape[0]) + 0.5, [f"{y:g}" for y in grid.index])
        axes.set(xlabel="attention removed (% of its width)", ylabel="MLP removed (% of its width)", title=group)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=figure.axes, label=f"perplexity ({words})")
    bar.outline.set_visible(False)
    bar.solids.set(rasterized=False, edgecolor="face")
    plain_log_axis(bar.ax.yaxis, norm.vmin, norm.vmax)
    return figure


def plot_layers(found: Answer) -> Figure:
    """By how many nats the loss rises when one layer is narrowed, with intervals at 95 %, against the layer."""
    frame = found.frame.dropna(subset=["rise"])
    if not len(frame):
        return plot_dots(found)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, ((group, setting), rows) in enumerate(frame.groupby(["group", "setting"], sort=False)):
        rows = rows.sort_values("only_layer")
        colour, marker, dashes = style_number(number)
        bars = (rows["rise"] - rows["rise_low"], rows["rise_high"] - rows["rise"])
        axes.errorbar(rows["only_layer"].astype(int), rows["rise"], yerr=np.clip(bars, 0, None), color=colour,
                      marker=marker, markersize=5, linestyle=dashes, linewidth=1, capsize=2,
                      label=", ".join(filter(None, (group, setting.replace(" %", " % of the layer", 1)))))  # fmt: skip
    axes.axhline(0, color=FAINT, linewidth=1, zorder=0)
    axes.set(xlabel="the one layer that is narrowed", ylabel="rise in loss (nats; bars: 95 % interval)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid()
    legend(figure, axes)
    return figure


def plot_budget(found: Answer) -> Figure:
    """Perplexity against the calibration tokens, one line for each length of windows."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    frame = found.frame
    keys = ["group", "setting", "calibration_seq_len"]
    for number, ((group, setting, length), rows) in enumerate(frame.groupby(keys, sort=False)):
        name = ", ".join(filter(None, (group, setting, f"windows of {length}")))
        draw_line(axes, rows.sort_values("calibration_tokens"), "calibration_tokens", name, style_number(number))
    axes.set_xscale("log", base=2)
    ticks = sorted(set(frame["calibration_tokens"]))
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: 1 + len(ticks) // 9]))
    axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
    axes.xaxis.set_minor_locator(NullLocator())
    perplexity_axis(axes, frame["perplexity"])
    axes.set_xlabel("calibration tokens (log scale)")
    axes.grid(which="both")
    legend(figure, axes)
    return figure


def plot_trade_off(found: Answer) -> Figure:
    """Perplexity against what is removed of the parameters, and of the KV cache, with the front of each."""
    frame = found.frame.assign(line=line_names(found.frame))
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    styles = styles_of(frame["line"], ())
    for axes, x, words in zip(
        panels, ("fraction_removed", "kv_fraction_removed"), ("decoder linear parameters", "KV cache"), strict=True
    ):
        draw_front(axes, frame.dropna(subset=[x]), x, 100, styles)
        axes.set_xlabel(f"{words} removed (%)")
    panels[1].set_ylabel("")
    legend(figure, panels[0])
    return figure


def plot_speed(found: Answer) -> Figure:
    """Perplexity against decoding speed, with the front; small figures: the fraction removed."""
    frame = found.frame.assign(line=line_names(found.frame))
    dense, column = found.dense, speed_column(frame)
    if dense and SPEED in dense.metrics:
        row = {"line": "dense", "label": "dense", "method": "dense", "ratio": 0.0, SPEEDUP: 1.0, **dense.metrics}
        row |= {f"{name}_standard_error": error for name, error in dense.standard_errors.items()}
        frame = pd.concat([pd.DataFrame([row]), frame], ignore_index=True).replace(np.inf, np.nan)
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    draw_front(axes, frame, column, 1, styles_of(frame["line"], frame["method"]))
    axes.set_xlabel(f"{PANELS[column]} ({BARS if column == SPEED else INTERVALS})")
    legend(figure, axes)
    return figure


def plot_training(found: Answer) -> Figure:
    """Held-out perplexity against the tokens trained on, a curve for each way; each begins at the untrained model."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    names, number, highest, lowest = line_names(found.frame), 0, 0.0, np.inf
    for place, record in enumerate(found.records):
        points = [(one["tokens"], _history_perplexity(one)) for one in record.history]
        points = [(tokens, value) for tokens, value in points if value < np.inf]
        if not points:
            continue
        row = found.frame.loc[place]
        name = ", ".join(filter(None, (names[place], row["setting"])))
        colour, marker, dashes = style_number(number)
        tokens, values = zip(*points, strict=True)
        axes.plot(tokens, values, label=name, color=colour, marker=marker, markersize=4, linestyle=dashes)
        number, highest, lowest = number + 1, max(highest, *values), min(lowest, *values)
    if not number:
        return plot_dots(found)
    draw_dense(axes, _dense_perplexity(found))
    dense = _dense_perplexity(found)
    perplexity_axis(axes, with_dense(pd.Series([highest, lowest]), dense), bars="")
    axes.set_ylabel("held-out perplexity (log scale)")
    axes.set_xlabel("tokens trained on")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(which="both")
    legend(figure, axes)
    return figure


def _history_perplexity(point: dict) -> float:
    with np.errstate(over="ignore"):
        return float(point.get("perplexity") or np.exp(point["loss_nats"]))


def plot_transfer(found: Answer) -> Figure:
    """Nats over the dense model: calibration texts by evaluation texts, a heat map for each preset and fraction.

    A column of panels has one scale of colours; bold: the text's source is the calibration text's.
    """
    frame, texts = found.frame, texts_of(found.frame)
    columns = [*(f"{ON}{text}" for text in texts), "mean_rise_nats"]
    groups, settings, labels = (list(dict.fromkeys(frame[name])) for name in ("group", "setting", "label"))
    size = (max(7, 1 + len(settings) * (0.7 + 0.75 * len(columns))), 1.6 + len(groups) * (0.5 + 0.4 * len(labels)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(groups), len(settings), squeeze=False, sharex=True, sharey=True)
    for across, setting in enumerate(settings):
        at_setting = frame[frame["setting"] == setting]
        values = at_setting[columns].to_numpy(dtype=float)
        norm = Normalize(min(0, np.nanmin(values)), max(np.nanmax(values), 0.01))
        for down, group in enumerate(groups):
            axes = panels[down, across]
            rows = at_setting[at_setting["group"] == group].drop_duplicates("label", keep="last").set_index("label")
            grid = rows[columns].reindex(labels).to_numpy(dtype=float)
            mesh = axes.pcolormesh(np.ma.masked_invalid(grid), cmap="cividis_r", norm=norm, edgecolor="white")
            for y, x in np.argwhere(~np.isnan(grid)):
                near = x < len(texts) and is_near(texts[x], rows["calibration_text"][labels[y]])
                axes.text(x + 0.5, y + 0.5, f"{grid[y, x]:.2f}", ha="center", va="center", fontsize=9,
                          color="#000000" if norm(grid[y, x]) < 0.5 else "#ffffff",
                          fontweight="bold" if near else "normal")  # fmt: skip
            axes.set_title(", ".join(filter(None, (group, setting))))
            axes.set_xticks(np.arange(len(columns)) + 0.5, [*texts, "mean"], rotation=20, ha="right")
            axes.set_yticks(np.arange(len(labels)) + 0.5, labels)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        bar = figure.colorbar(mesh, ax=panels[:, across], orientation="horizontal", aspect=30, shrink=0.9)
        bar.set_label("rise in loss over the dense model (nats)")
        bar.outline.set_visible(False)
        bar.solids.set(rasterized=False, edgecolor="face")
    panels[0, 0].invert_yaxis()
    figure.supylabel("calibrated on", fontsize=10)
    figure.suptitle("evaluated on (bold: near the calibration text)", fontsize=10)
    return figure
