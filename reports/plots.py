"""Pictures in one style: colour-blind-safe, markers and dashes for print, units on every axis, bars of errors."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.output.figures import FAINT, LOOK, STYLES

from .answers import ON, Answer, percent
from .findings import is_on_front
from .texts import MEAN, NEARNESS, is_near, texts_of

METHODS = ("best", "flap", "transact", "transact-released", "wanda-sp", "llm-pruner", "dense", "magnitude", "random")
BARS = "bars: one standard error"


def style_of(method: str, others: Sequence[str] = ()) -> tuple[str, str, str]:
    """Colour, marker and dashes of a method, the same in every picture; `others` are those that METHODS lacks."""
    known = [*METHODS, *sorted(set(others) - set(METHODS))]
    return style_number(known.index(method))


def style_number(number: int) -> tuple[str, str, str]:
    """Colour, marker and dashes of the line of that number; beyond ten, colours come again with other markers."""
    colour, _, dashes = STYLES[number % len(STYLES)]
    return colour, STYLES[(number + number // len(STYLES)) % len(STYLES)][1], dashes


def styles_of(labels: Sequence[str], methods: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """The style of each label: a method's own where labels are methods, else in order."""
    labels = list(dict.fromkeys(labels))
    if set(labels) <= set(methods):
        return {label: style_of(label, labels) for label in labels}
    return {label: style_number(number) for number, label in enumerate(labels)}


def draw(picture: Callable[..., Figure], found: Answer | pd.DataFrame, *arguments) -> Figure:
    """The picture in the common style; perplexities that no float holds are missing in it, no axis being so long."""
    if isinstance(found, Answer):
        found = replace(found, frame=found.frame.replace(np.inf, np.nan))
    else:
        found = found.replace(np.inf, np.nan)
    with matplotlib.rc_context(LOOK):
        return picture(found, *arguments)


def plain_number(value: float, _=None) -> str:
    return "more than 1e308" if np.isnan(value) else f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def plain_log_axis(axis: Axis, low: float, high: float) -> None:
    """Ticks in plain numbers: as many as a logarithmic axis from `low` to `high` has room for."""
    span = np.log10(high / low) if low > 0 else 1
    subs = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if span < 0.7 else (1, 2, 5) if span < 2.5 else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=50))
    axis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=50) if span >= 2.5 else NullLocator())
    axis.set_major_formatter(FuncFormatter(plain_number))
    axis.set_minor_formatter(NullFormatter())


def perplexity_axis(axes: Axes, values: pd.Series, which: str = "y", bars: str = f"; {BARS}") -> None:
    """Make it a logarithmic axis of perplexity in plain numbers."""
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}label")(f"perplexity (log scale{bars})")
    plain_log_axis(getattr(axes, f"{which}axis"), values.min(), values.max())
    if values.isna().all():
        getattr(axes, f"set_{which}lim")(1, 10)  # a logarithmic axis without data has no ticks to find


def highest_shown(perplexities: pd.Series, gap: float = 4) -> float:
    """The perplexity above which lines leave the picture: the last before a wide gap in the upper half, or the highest
    (NaN where there is none).

    One criterion that breaks the model would press all the others into one line.
    """
    values = np.sort(perplexities.dropna().to_numpy(dtype=float))
    wide = [place for place in range(len(values) // 2, len(values) - 1) if values[place + 1] > gap * values[place]]
    return values[wide[0]] if wide else max(values, default=np.nan)


def cut_above(axes: Axes, frame: pd.DataFrame, highest: float, names: str) -> None:
    """End the axis above `highest`, and name what lies beyond with its perplexities."""
    beyond = frame[~(frame["perplexity"] <= highest)]
    if not len(beyond):
        return
    if highest > 0:
        axes.set_ylim(min(frame["perplexity"].min(), *axes.yaxis.get_data_interval()) / 1.15, highest * 1.25)
    words = [
        f"{name} {', '.join(map(plain_number, rows.sort_values('fraction_removed')['perplexity']))}"
        for name, rows in beyond.groupby(names, sort=False)
    ]
    axes.set_title("\n".join(["above the picture:", *words]), fontsize=8, color=FAINT, loc="left")


def fraction_axis(axes: Axes, frame: pd.DataFrame) -> None:
    """Ticks across where something was measured, as long as these are few."""
    axes.set_xlabel("decoder linear parameters removed (%)")
    ratios = sorted(set(frame["ratio"]))
    if len(ratios) <= 8:
        axes.set_xticks([ratio * 100 for ratio in ratios], [f"{ratio * 100:.3g}" for ratio in ratios])


def draw_dense(axes: Axes, perplexity: float | None, which: str = "y") -> None:
    """A grey line where the dense model is."""
    if perplexity is None or np.isnan(perplexity):
        return
    line = axes.axhline if which == "y" else axes.axvline
    line(perplexity, color=FAINT, linewidth=1, zorder=0)
    if which == "y":
        place, transform, offset, vertical = (1, perplexity), axes.get_yaxis_transform(), (3, 0), "center"
    else:
        place, transform, offset, vertical = (perplexity, 1), axes.get_xaxis_transform(), (2, 1), "bottom"
    axes.annotate("dense", place, xycoords=transform, color=FAINT, ha="left", va=vertical, xytext=offset,
                  textcoords="offset points")  # fmt: skip


def _dense_perplexity(found: Answer) -> float | None:
    perplexity = found.dense.metrics["perplexity"] if found.dense else np.inf
    return perplexity if perplexity < np.inf else None


def line_names(frame: pd.DataFrame) -> pd.Series:
    """What a legend calls each row's line: its group and label."""
    return frame["group"].where(frame["group"] == "", frame["group"] + ": ") + frame["label"]


def legend(figure: Figure, axes: Axes) -> None:
    """A legend below the data, in as many columns as its longest label leaves room for; it lengthens the figure."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = min(max(84 // (max(map(len, labels)) + 8), 1), 4)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        figure.set_figheight(figure.get_figheight() + 0.22 * max(0, -(-len(labels) // columns) - 2))


def plot_perplexity(frame: pd.DataFrame, title: str = "") -> Figure:
    """Perplexity (logarithmic) against the fraction removed, one line for each method, error bars of one error."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    dense = frame[frame["method"] == "dense"]
    pruned = frame[frame["method"] != "dense"]
    for method, group in pruned.groupby("method"):
        points = pd.concat([dense, group]).sort_values("fraction_removed")
        draw_line(axes, points, "fraction_removed", method, style_of(method, frame["method"]), scale=100)
    figure.suptitle(title, fontsize=10)
    finish_lines(figure, axes, frame, dense["perplexity"].iloc[0] if len(dense) else None, "method")
    return figure


def finish_lines(figure: Figure, axes: Axes, frame: pd.DataFrame, dense: float | None, names: str) -> None:
    """What lines of perplexity over the fraction removed stand in; the column `names` names the lines."""
    draw_dense(axes, dense)
    highest = highest_shown(frame["perplexity"])
    perplexity_axis(axes, with_dense(frame["perplexity"], dense).clip(upper=highest if highest > 0 else None))
    fraction_axis(axes, frame)
    axes.grid(which="both")
    cut_above(axes, frame, highest, names)
    legend(figure, axes)


def perplexity_bars(frame: pd.DataFrame) -> np.ndarray:
    """What one standard error of the loss takes from the perplexity and adds to it, (2, rows): never below zero."""
    perplexity = frame["perplexity"].to_numpy(dtype=float)
    if "perplexity_standard_error" not in frame:
        return np.zeros((2, len(frame)))
    relative = np.nan_to_num(frame["perplexity_standard_error"].to_numpy(dtype=float) / perplexity)
    return np.stack([perplexity * -np.expm1(-relative), perplexity * np.expm1(relative)])


def draw_line(axes: Axes, points: pd.DataFrame, x: str, name: str, style: tuple, scale: float = 1) -> None:
    """Perplexity of the points with bars of one standard error, joined in the order of the frame."""
    colour, marker, dashes = style
    every = 1 + len(points) // 30  # of thousands of points not every one is marked
    axes.errorbar((points[x] * scale).astype(float), points["perplexity"].astype(float),
                  yerr=perplexity_bars(points), label=name, color=colour, marker=marker, markersize=5,
                  linestyle=dashes, linewidth=1.5, capsize=3, markevery=every, errorevery=every)  # fmt: skip


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


def with_dense(perplexities: pd.Series, dense: float | None) -> pd.Series:
    return pd.concat([perplexities, pd.Series([] if dense is None else [dense], dtype=float)])


PANELS = {"perplexity": "perplexity", "decode_tokens_per_s": "decoded tokens per second", "weight_mib": "weights (MiB)"}


def plot_dots(found: Answer, metrics: Sequence[str] = ("perplexity",), most: int = 40) -> Figure:
    """One row for each group, setting and value, one panel for each metric; the `most` rows of the least perplexity."""
    frame = found.frame
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
        errors = frame.get(f"{metric}_standard_error", pd.Series(0.0, frame.index)).astype(float).fillna(0)
        bars = perplexity_bars(frame) if metric == "perplexity" else np.stack([errors, errors])
        for place, (label, value) in enumerate(zip(frame["label"], frame[metric], strict=True)):
            colour, marker, _ = styles[label]
            axes.errorbar(value, place, xerr=bars[:, place : place + 1], color=colour, marker=marker, capsize=3)
        if metric == "perplexity":
            values = with_dense(found.frame["perplexity"], _dense_perplexity(found))
            perplexity_axis(axes, values, "x", f";\n{BARS}" if len(metrics) > 1 else f"; {BARS}")
            draw_dense(axes, _dense_perplexity(found), "x")
        else:
            axes.set_xlabel(PANELS[metric] + (f"\n({BARS})" if (errors > 0).any() else ""))
            axes.set_xlim(0, frame[metric].max() * 1.1)
        axes.grid(which="both")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    if left_out > 0:
        figure.suptitle(f"the {most} of the least perplexity; {left_out} more are in the table", fontsize=10)
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
                      label=", ".join(filter(None, (group, f"{setting} of the layer" if setting else ""))))  # fmt: skip
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


def draw_front(axes: Axes, frame: pd.DataFrame, x: str, scale: float, styles: dict) -> None:
    """Points of each label, and a line through those that no other beats, with the fraction removed beside these."""
    frame = frame.dropna(subset=["perplexity"])
    front = frame[is_on_front(frame, ("perplexity",), (x,))].sort_values(x) if len(frame) else frame
    axes.plot(front[x] * scale, front["perplexity"], color=FAINT, linewidth=1, linestyle="-", zorder=1,
              drawstyle="default", label="beaten by no other")  # fmt: skip
    for line, points in frame.groupby("line", sort=False):
        colour, marker, _ = styles[line]
        errors = points.get(f"{x}_standard_error")
        across = None if errors is None else errors.astype(float).fillna(0) * scale
        axes.errorbar(points[x] * scale, points["perplexity"], xerr=across, yerr=perplexity_bars(points), label=line,
                      color=colour, marker=marker, markersize=6, linestyle="none", capsize=2, elinewidth=1)  # fmt: skip
    for place, ratio, perplexity in zip(front[x] * scale, front["ratio"], front["perplexity"], strict=True):
        if ratio:
            axes.annotate(percent(ratio), (place, perplexity), xytext=(6, -11), textcoords="offset points", fontsize=8)
    perplexity_axis(axes, frame["perplexity"])
    axes.grid(which="both")


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
    """Perplexity against decoded tokens per second, with the front; small figures: the fraction removed."""
    frame = found.frame.assign(line=line_names(found.frame))
    dense = found.dense
    if dense and "decode_tokens_per_s" in dense.metrics:
        row = {"line": "dense", "label": "dense", "method": "dense", "ratio": 0.0, **dense.metrics}
        row |= {f"{name}_standard_error": error for name, error in dense.standard_errors.items()}
        frame = pd.concat([pd.DataFrame([row]), frame], ignore_index=True).replace(np.inf, np.nan)
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    draw_front(axes, frame, "decode_tokens_per_s", 1, styles_of(frame["line"], frame["method"]))
    axes.set_xlabel(f"decoded tokens per second ({BARS})")
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


def plot_tasks(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy of every task, one marker for each method with a bar of one standard error; guessing as a grey tick."""
    frame = frame[frame["metric"] == "acc"]
    tasks = list(dict.fromkeys(frame["task"]))
    figure = Figure(figsize=(7.5, 1.4 + 0.42 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(zip(frame["method"], frame["ratio"], strict=True)))
    markers = cycle("osD^vP")
    for number, (method, ratio) in enumerate(methods):
        colour, marker, _ = style_of(method, frame["method"])
        group = frame[(frame["method"] == method) & (frame["ratio"] == ratio)]
        if [one for one, _ in methods].count(method) > 1:  # the same method at several fractions
            marker = next(markers)
        offset = 0.5 * (number / max(1, len(methods) - 1) - 0.5)
        places = [tasks.index(task) + offset for task in group["task"]]
        label = method if method == "dense" else f"{method}, {percent(ratio)} removed"
        axes.errorbar(group["value"], places, xerr=group["standard_error"], label=label, color=colour, marker=marker,
                      linestyle="none", markersize=5, capsize=2)  # fmt: skip
    for place, task in enumerate(tasks):
        chance = frame[frame["task"] == task]["chance"].iloc[0]
        if pd.notna(chance):
            axes.plot([chance, chance], [place - 0.35, place + 0.35], color=FAINT, linewidth=1.5, zorder=3,
                      label="guessing" if place == 0 else None)  # fmt: skip
    capabilities = frame.drop_duplicates("task").set_index("task")["capability"]
    labels = [f"{task} ({capabilities[task]})" if pd.notna(capabilities[task]) else task for task in tasks]
    axes.set_yticks(range(len(tasks)), labels)
    axes.invert_yaxis()
    axes.set(xlabel=f"accuracy ({BARS})", xlim=(-0.02, 1.02))
    axes.set_title(title)
    axes.grid()
    legend(figure, axes)
    return figure


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


def plot_texts(frame: pd.DataFrame, title: str = "") -> Figure:
    """The rise over the dense model in nats against the fraction removed, a panel for each text and their mean."""
    texts = texts_of(frame)
    calibration = next(iter(frame["calibration_text"].dropna()), None)  # some methods need none
    near = [text for text in texts if is_near(text, calibration)]
    columns = {f"{ON}{text}": f"{text} ({'near' if text in near else 'far'})" for text in texts}
    columns |= {"mean_rise_nats": MEAN}
    down = -(-len(columns) // 2)
    figure = Figure(figsize=(7.5, 0.8 + 2.7 * down), layout="constrained")
    panels = figure.subplots(down, 2, squeeze=False, sharex=True, sharey=True).flatten()
    highest = highest_rise(pd.concat([frame[name] for name in columns]))
    for axes, (name, words) in zip(panels, columns.items(), strict=False):
        draw_methods(axes, frame, name, 0.0)
        axes.set(title=words, ylim=(min(0, frame[list(columns)].min().min()) - 0.03 * highest, highest * 1.06))
    for axes in panels[len(columns) :]:
        axes.set_visible(False)
    for axes in panels[::2]:
        axes.set_ylabel("rise in loss (nats)")
    for axes in panels[len(columns) - 2 :]:
        fraction_axis(axes, frame)
        axes.tick_params(labelbottom=True)
    beyond = frame[(frame[list(columns)] > highest).any(axis=1)]
    words = [f"above the picture: {', '.join(dict.fromkeys(beyond['method']))}"] if len(beyond) else []
    figure.suptitle("\n".join([title, *words]), fontsize=10)
    legend(figure, panels[0])
    return figure


def highest_rise(nats: pd.Series) -> float:
    """The rise above which lines leave the picture, as `highest_shown` has it for the perplexities."""
    nats = nats.dropna().astype(float)
    return nats[np.exp(nats) <= highest_shown(np.exp(nats))].max()


def draw_methods(axes: Axes, frame: pd.DataFrame, y: str, dense: float) -> None:
    """A line for each method of the column `y` over the fraction removed, from the dense model's value at nothing."""
    errors = f"{y}_standard_error"
    for method, rows in frame.groupby("method", sort=False):
        rows = rows.sort_values("fraction_removed")
        colour, marker, dashes = style_of(method, frame["method"])
        bars = [0, *rows[errors].astype(float).fillna(0)] if errors in rows else None
        removed, every = [0, *rows["fraction_removed"] * 100], 1 + len(rows) // 30
        axes.errorbar(
            removed,
            [dense, *rows[y]],
            yerr=bars,
            label=method,
            color=colour,
            marker=marker,
            markersize=5,
            linestyle=dashes,
            linewidth=1.5,
            capsize=2,
            markevery=every,
            errorevery=every,
        )
    axes.grid()


def plot_fidelity(frame: pd.DataFrame, title: str = "") -> Figure:
    """KL divergence, top-1 agreement and greedy agreement against the fraction removed, a panel each."""
    words = {"kl_nats": "KL from the dense model (nats)", "top1_agreement": "same likeliest token (%)",
             "greedy_agreement": "greedy tokens the same (%)"}  # fmt: skip
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    pruned = frame[frame["method"] != "dense"]
    highest = highest_rise(pruned["kl_nats"])
    for axes, name in zip(figure.subplots(1, 3), NEARNESS, strict=True):
        is_share, both = name != "kl_nats", [name, f"{name}_standard_error"]
        scaled = pruned.assign(**(pruned[both].astype(float) * (100 if is_share else 1)))
        draw_methods(axes, scaled, name, 100 if is_share else 0)
        fraction_axis(axes, pruned)
        axes.set_xlabel("parameters removed (%)")
        axes.set_ylabel(words[name])
        axes.set_ylim((-3, 103) if is_share else (-0.03 * highest, highest * 1.12))
        if not is_share and (beyond := list(dict.fromkeys(pruned["method"][pruned[name] > highest]))):
            axes.set_title(f"above the picture: {', '.join(beyond)}", fontsize=8, color=FAINT)
    figure.suptitle(f"{title}; {BARS}" if title else BARS, fontsize=10)
    legend(figure, figure.axes[0])
    return figure
