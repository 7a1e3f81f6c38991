"""What pictures are drawn of: styles, axes in plain numbers, lines with their errors, legends."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.output.figures import FAINT, STYLES

from .answers import percent
from .findings import is_on_front

LABEL = 0.09, 0.06  # width and height of a small label, as parts of the panel's
METHODS = ("best", "flap", "transact", "transact-released", "wanda-sp", "llm-pruner", "dense", "magnitude", "random",
           "shortgpt", "replaceme", "crash")  # fmt: skip
BARS, INTERVALS = "bars: one standard error", "bars: 95 % interval"


def style_of(method: str, others: Sequence[str] = ()) -> tuple[str, str, str]:
    """Colour, marker and dashes of a method, the same in every picture; `others` are those that METHODS lacks."""
    known = [*METHODS, *sorted(set(others) - set(METHODS))]
    return style_number(known.index(method))


def style_number(number: int) -> tuple[str, str, str]:
    """Colour, marker and dashes of the line of that number; colours that come again have other markers and dashes."""
    _, marker, dashes = STYLES[(number + number // len(STYLES)) % len(STYLES)]
    return STYLES[number % len(STYLES)][0], marker, dashes


def styles_of(labels: Sequence[str], methods: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """The style of each label: a method's own where labels are methods, else in order."""
    labels = list(dict.fromkeys(labels))
    if set(labels) <= set(methods):
        return {label: style_of(label, labels) for label in labels}
    return {label: style_number(number) for number, label in enumerate(labels)}


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


def with_dense(perplexities: pd.Series, dense: float | None) -> pd.Series:
    return pd.concat([perplexities, pd.Series([] if dense is None else [dense], dtype=float)])


def bars_of(frame: pd.DataFrame, name: str) -> np.ndarray:
    """How far a metric's bars reach below and above it, (2, rows): its interval, or one standard error; 0: unknown."""
    if f"{name}_low" in frame:
        bars = [frame[name] - frame[f"{name}_low"], frame[f"{name}_high"] - frame[name]]
    else:
        bars = [frame.get(f"{name}_standard_error", pd.Series(0.0, frame.index))] * 2
    return np.stack([one.astype(float).fillna(0).clip(lower=0) for one in bars])


def draw_front(axes: Axes, frame: pd.DataFrame, x: str, scale: float, styles: dict) -> None:
    """Points of each label, and a line through those no other beats, with the fraction removed where it changes."""
    frame = frame.dropna(subset=["perplexity"])
    front = frame[is_on_front(frame, ("perplexity",), (x,))].sort_values(x) if len(frame) else frame
    axes.plot(front[x] * scale, front["perplexity"], color=FAINT, linewidth=1, linestyle="-", zorder=1,
              drawstyle="default", label="beaten by no other")  # fmt: skip
    for line, points in frame.groupby("line", sort=False):
        colour, marker, _ = styles[line]
        across = bars_of(points, x) * scale
        axes.errorbar(points[x] * scale, points["perplexity"], xerr=across, yerr=perplexity_bars(points), label=line,
                      color=colour, marker=marker, markersize=6, linestyle="none", capsize=2, elinewidth=1)  # fmt: skip
    perplexity_axis(axes, frame["perplexity"])
    name_removed(axes, front.assign(place=front[x] * scale), "place", "perplexity")
    axes.grid(which="both")


def name_removed(axes: Axes, front: pd.DataFrame, x: str, y: str) -> None:
    """Below the points of a front, in its order, the fraction removed where it changes; scales and limits stand by now.

    Points whose labels would lie on each other share one.
    """
    removed = front["fraction_removed"].round(2)
    changed = front.assign(share=removed)[(removed.diff() != 0) & (removed != 0)]
    places = changed[[x, y]].to_numpy(dtype=float)
    axes.get_xlim()  # from which limits follow the data
    shown = (axes.transScale + axes.transLimits).transform(places)
    named = []
    for number, share in enumerate(changed["share"].map(percent)):
        if number and np.all(abs(shown[number] - shown[number - 1]) < LABEL):
            named[-1][1] += f", {share}"
        else:
            named.append([places[number], share])
    for place, shares in named:
        axes.annotate(shares, place, xytext=(5, -10), textcoords="offset points", fontsize=8)


def highest_rise(nats: pd.Series) -> float:
    """The rise above which lines leave the picture, as `highest_shown` has it; texts differ, so gaps are narrower."""
    nats = nats.dropna().astype(float)
    return nats[np.exp(nats) <= highest_shown(np.exp(nats), gap=2)].max()


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
