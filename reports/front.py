"""One front of all methods: how many times as fast as the dense model each is, and by how many nats worse."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.output.figures import FAINT
from bench.quality.significance import Difference
from bench.records import Record

from .answers import Answer, percent, removed_words
from .drawing import INTERVALS, bars_of, highest_rise, legend, name_removed, style_number
from .findings import by_interval, is_on_front, listed, plain
from .plots import plot_dots
from .rises import interval_column, interval_of, lead_over, other_losses, paired, text_named, with_interval
from .sets import SPEEDUP
from .texts import is_near

SPEEDS = (1.05, 1.1, 1.2, 1.3, 1.5)  # times the dense model's, at each of which a winner is named
PREFILL_SPEEDUP = "prefill_speedup"
METHOD = ["family", "method"]  # two rows with the same are one method asked for more or for less
# what is named where it is not this; of a recipe without a name of its own, the second as well
ASKED = {"engine": "transformers", "mha_dim": None, "mlp_dim": None, "only_layer": None, "head_multiple": None,
         "mlp_multiple": None, "ridge": None, "budget": ""}  # fmt: skip
RECIPE = {"granularity": "dims", "modules": "qk+vo+mlp", "allocation": "uniform", "compensation": "none",
          "rope": "pairs", "shots": 1, "measurements": 0, "output_bias": False}  # fmt: skip
# which of the common colours a family has; the dense model keeps its own
FAMILIES = {"dense": 6, "width": 0, "depth": 1, "width and depth": 2, "2:4": 3, "int8": 4, "width, int8": 5,
            "width, 2:4": 9, "int4": 7}  # fmt: skip
ANY_OTHER = 8


def label(record: Record) -> str:
    """The method with all that it was asked beside a ratio: "best", "dense, int8", "transact, head multiple 8"."""
    case = record.case
    is_named = record.method.partition(", ")[0] != case.criterion  # drops and sparsity stand behind any name
    unsaid = ASKED if is_named else RECIPE | ASKED
    values = {name: getattr(case, name) for name in unsaid}
    words = [f"{name.replace('_', ' ')} {value}" for name, value in values.items() if value != unsaid[name]]
    return ", ".join([record.method, *words, *filter(None, [case.quantisation])])


def point_name(record: Record) -> str:
    """The label in quotation marks, and the fractions or the speed that were asked for."""
    case = record.case
    alone = case.only_layer is not None  # which loses a fraction of its own
    removed = case.ratio if alone else record.metrics["fraction_removed"]
    asked = [removed_words(case.ratio, removed)] if case.ratio else []
    asked += [f"{percent(case.kv_ratio)} of the KV cache removed"] if case.kv_ratio else []
    asked += [f"{case.speedup:g} times the speed asked for"] if case.speedup else []
    return f"“{label(record)}”{f' with {listed(asked)}' if asked else ''}"


def front_frame(found: Answer) -> pd.DataFrame:
    """The rows whose loss can be compared with the dense model's, by their places in `found.records`.

    Beside the columns of the answer: `name`, and `others` with its interval, the rise on the other texts.
    """
    others = [None if one is found.dense else _lead(one, found.dense, on_others(found)) for one in found.records]
    columns = [
        {"name": point_name(record), **interval_of("others", rise)}
        for record, rise in zip(found.records, others, strict=True)
    ]
    frame = found.frame.join(pd.DataFrame(columns, index=found.frame.index)).dropna(subset=["rise"])
    speeds = [name for name in frame if name.startswith((SPEEDUP, PREFILL_SPEEDUP))]
    return frame.astype(dict.fromkeys(speeds, float))  # JSON has null where there is no interval


def on_first(record: Record) -> Sequence[float] | None:
    return record.losses


def on_others(found: Answer) -> Callable[[Record], Sequence[float] | None]:
    return lambda record: other_losses(record, found.dense)


def _lead(record: Record, reference: Record | None, losses: Callable) -> Difference | None:
    """By how many nats the record is worse than the reference; None where they cannot be paired."""
    mine, theirs = (None if one is None else losses(one) for one in (record, reference))
    return paired(mine, theirs)


@dataclass(frozen=True)
class Win:
    """Of all rows measured at least so many times as fast: the `best`, and the `next` of another method, if any, with
    by how many nats it is worse. `speeds`: all of `SPEEDS` at which these two are the same; `of_all`: whether all rows
    that are so fast have that loss."""

    speeds: tuple[float, ...]
    best: pd.Series
    next: pd.Series | None
    lead: Difference | None
    of_all: bool


def wins(found: Answer, loss: str, losses: Callable) -> list[Win]:
    """Who loses least at each of `SPEEDS` that anything reaches, by the column `loss`; leads are paired by `losses`."""
    frame = front_frame(found).dropna(subset=[SPEEDUP]).sort_values(loss, kind="stable")
    frame, lacking = frame[frame[loss].notna()], frame[frame[loss].isna()]
    speeds_of: dict[tuple, list[float]] = {}
    for speed in SPEEDS:
        fast = frame[frame[SPEEDUP] >= speed]
        if len(fast):
            rivals = fast[(fast[METHOD] != fast[METHOD].iloc[0]).any(axis=1)]
            of_all = not (lacking[SPEEDUP] >= speed).any()
            speeds_of.setdefault((fast.index[0], rivals.index[0] if len(rivals) else None, of_all), []).append(speed)
    return [
        Win(
            tuple(speeds), frame.loc[best], None if rival is None else frame.loc[rival],
            None if rival is None else _lead(found.records[rival], found.records[best], losses), of_all,
        )
        for (best, rival, of_all), speeds in speeds_of.items()
    ]  # fmt: skip


def front(found: Answer) -> list[str]:
    """Which method loses least at which speed and whether its lead is more than chance, on each side of the picture."""
    if found.dense is None:
        return ["No record of the dense model: no loss can be compared with it."]
    if not len(frame := front_frame(found)):
        return ["No loss can be paired with the dense model's, window by window."]
    first, others = text_titles(found)
    if len(found.frame) == 1:
        return [_only(frame.iloc[0], first, others)]
    won = wins(found, "rise", on_first)
    sentences = [_sentence(win, first, "rise") for win in won]
    reached = [speed for win in won for speed in win.speeds]
    if slow := [f"{speed:g}" for speed in SPEEDS if speed not in reached]:
        sentences.append(f"Nothing decodes {listed(slow).replace(' and ', ' or ')} times as fast as the dense model.")
    return sentences + [_sentence(win, others, "others") for win in wins(found, "others", on_others(found))]


def _only(row: pd.Series, first: str, others: str) -> str:
    """What is said where nothing but one cell was timed beside the dense model."""
    speed = _speed_words(row, 0).replace("its", "the dense model's")
    losses = [f"{by_interval(row, loss)} on {text}" for loss, text in (("rise", first), ("others", others))
              if pd.notna(row[loss])]  # fmt: skip
    return f"One cell alone was timed beside the dense model, {row['name']}: at {speed} it loses {listed(losses)}."


def _sentence(win: Win, text: str, loss: str) -> str:
    speeds = listed(f"{speed:g}" for speed in win.speeds)
    fast = f"Of all that decode at least {speeds} times as fast as the dense model"
    measured = f", {win.best['name']} loses least on {text}" if win.of_all else (
        f" and were measured on {text}, {win.best['name']} loses least")  # fmt: skip
    words = f"{fast}{measured}: {by_interval(win.best, loss)}, at {_speed_words(win.best, win.speeds[-1])}; "
    if win.next is None:
        return words + f"no other method {'' if win.of_all else 'that was measured there '}is that fast."
    unpaired = "the next, " if win.lead is None else ""
    return words + f"{unpaired}{lead_over(win.next['name'], win.lead)}."


def _speed_words(row: pd.Series, wanted: float) -> str:
    """How fast a row is, in what interval, and whether that is as fast as wanted for sure."""
    low, high = row[f"{SPEEDUP}_low"], row[f"{SPEEDUP}_high"]
    words = f"{plain(row[SPEEDUP], 3)} times its speed"
    if pd.isna(low):
        return f"{words} (in too few runs for an interval)"
    unsure = ", so perhaps less than that" if low < wanted else ""
    return f"{words} ({plain(low, 3)} to {plain(high, 3)}{unsure})"


def front_table(found: Answer) -> pd.DataFrame:
    """The wins on the first text, a row each: what `front` says in words."""
    rows = []
    for win in wins(found, "rise", on_first):
        best = win.best.to_frame().T
        rows.append({
            "times_as_fast": ", ".join(f"{speed:g}" for speed in win.speeds), "loses_least": win.best["name"],
            "loss_over_dense": interval_column(best, "rise")[0],
            "speedup": _speed_words(win.best, win.speeds[-1]).replace(" its speed", ""),
            "next": None if win.next is None else win.next["name"],
            "behind_by": None if win.lead is None else with_interval(win.lead),
        })  # fmt: skip
    return pd.DataFrame(rows).dropna(axis="columns", how="all")


def text_titles(found: Answer) -> tuple[str, str]:
    """What the first text is called, and the other ones together."""
    texts = [text_named(text["name"]) for text in found.dense.texts] if found.dense else []
    first = text_named(found.records[0].case.evaluation_text)
    return first, f"the mean of {listed(texts[1:])}" if len(texts) > 2 else "".join(texts[1:])


def plot_front(found: Answer) -> Figure:
    """Rise in loss against speed-up, on the first text and on the others; below, against that of prefill where timed.

    What is far above the others leaves the picture and is named.
    """
    frame = front_frame(found)
    if not len(frame):
        return plot_dots(found)
    calibration = next(iter(frame["calibration_text"].dropna()), None)
    first, others = text_titles(found)
    near = is_near(found.records[0].case.evaluation_text, calibration)
    titles = {"rise": f"{first} ({'near' if near else 'far'})", "others": others}
    titles = {loss: words for loss, words in titles.items() if frame[loss].notna().any()}
    speeds = {SPEEDUP: "decoding", PREFILL_SPEEDUP: "prefill"}
    speeds = {speed: words for speed, words in speeds.items() if speed in frame and frame[speed].notna().any()}
    figure = Figure(figsize=(6.5, 0.9 + 2.8 * len(speeds)), layout="constrained")
    panels = figure.subplots(len(speeds), len(titles), squeeze=False, sharex="row", sharey="col")
    methods = ["dense", *frame.sort_values("family", key=_legend_order)["method"]]
    markers = {method: style_number(number)[1] for number, method in enumerate(dict.fromkeys(methods))}
    fronts = []
    for row, (speed, words) in zip(panels, speeds.items(), strict=True):
        best = [draw_points(axes, frame, speed, loss, markers) for axes, loss in zip(row, titles, strict=True)]
        fronts += [(*drawn, speed, loss) for *drawn, loss in zip(row, best, titles, strict=True)]
        row[0].set(ylabel="rise in loss (nats)", xlim=_limits(frame, pd.concat(best), speed))
        for axes in row:
            axes.set_xlabel(f"{words}: times as fast as dense")
    beyond: list[str] = []
    for axes, (loss, title) in zip(panels[0], titles.items(), strict=True):
        highest = max(0.01, highest_rise(frame[loss]))
        shown = frame[frame[loss] <= highest]
        beyond += frame["name"][frame[loss] > highest].tolist()
        axes.set(title=title.removeprefix("the "), ylim=_limits(shown, shown, loss))
    for axes, best, speed, loss in fronts:
        name_removed(axes, best, speed, loss)
    above = f"\nabove the picture: {listed(beyond)}" if beyond else ""
    figure.suptitle(f"{INTERVALS}; in small: the fraction removed from there on{above}", fontsize=9, color=FAINT,
                    wrap=True)  # fmt: skip
    legend(figure, panels[0, 0])
    return figure


def _limits(points: pd.DataFrame, whole: pd.DataFrame, name: str) -> tuple[float, float]:
    """The ends of an axis that shows the dense model, the points, and of the `whole` ones their intervals.

    One interval that a busy machine made wide would press all points into a line.
    """
    dense = 1.0 if name.endswith("speedup") else 0.0
    low = np.nanmin([dense, points[name].min(), whole[f"{name}_low"].min()])
    high = np.nanmax([dense, points[name].max(), whole[f"{name}_high"].max()])
    margin = 0.05 * max(high - low, 0.1)
    return low - margin, high + margin


def draw_points(axes: Axes, frame: pd.DataFrame, speed: str, loss: str, markers: Mapping[str, str]) -> pd.DataFrame:
    """Points in the colours of their families and the markers of their methods, and the front from the dense model on.

    Returns the front's rows.
    """
    dense = pd.DataFrame([{"family": "dense", "method": "dense", "fraction_removed": 0.0, speed: 1.0, loss: 0.0}])
    shown = [*METHOD, "fraction_removed", *(f"{name}{end}" for name in (speed, loss) for end in ("", "_low", "_high"))]
    points = pd.concat([dense, frame[shown].dropna(subset=[speed, loss])], ignore_index=True)
    points = points.sort_values("family", key=_legend_order)
    best = points[is_on_front(points, (loss,), (speed,))].sort_values(speed)
    axes.plot(best[speed], best[loss], color=FAINT, linewidth=1, zorder=1, label="beaten by no other")
    for (family, method), rows in points.groupby(METHOD, sort=False):
        axes.errorbar(rows[speed], rows[loss], xerr=bars_of(rows, speed), yerr=bars_of(rows, loss), linestyle="none",
                      label=method if family == "dense" else f"{family}: {method}", markersize=5, capsize=2,
                      color=style_number(FAMILIES.get(family, ANY_OTHER))[0], elinewidth=0.8,
                      marker=markers[method])  # fmt: skip
    axes.grid()
    return best


def _legend_order(families: pd.Series) -> pd.Series:
    """Families of one part before those of several, unknown ones last."""
    known = list(FAMILIES)
    return families.map(lambda family: known.index(family) if family in known else len(known))
