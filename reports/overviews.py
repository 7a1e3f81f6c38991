"""Pictures of all methods at once: perplexity, every text, tasks, nearness to the dense model."""

from itertools import cycle

import pandas as pd
from matplotlib.figure import Figure

from bench.output.figures import FAINT

from .answers import percent
from .drawing import (
    BARS,
    draw_line,
    draw_methods,
    finish_lines,
    fraction_axis,
    highest_rise,
    legend,
    style_of,
)
from .rises import ON
from .texts import MEAN, NEARNESS, is_near, texts_of


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
    figure.suptitle("\n".join([title, *words]), fontsize=10, wrap=True)
    legend(figure, panels[0])
    return figure


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
