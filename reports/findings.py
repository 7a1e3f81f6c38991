"""What was found, in words, and how sure that is: computed from paired differences and nothing else."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from bench.quality.flips import Flips
from bench.quality.significance import Difference

from .answers import Answer, asked_words, counted, is_met, percent, removed_words
from .rises import ON, difference, lead_over, with_interval
from .sets import SPEED, SPEEDUP
from .texts import is_near, texts_of

UNTOLD = "and nothing tells whether that is chance"


def plain(value: float, digits: int) -> str:
    """The value with so many significant digits, or all those before the point; never as a power of ten."""
    if value == np.inf:
        return "more than 1e308"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def listed(words) -> str:
    """ "a", "a and b", "a, b and c", each once."""
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def some(number: int, word: str) -> str:
    """ "none is", "1 is", "2 are" or "2 have", by the word in the plural."""
    return f"{number or 'none'} {word if number > 1 else {'are': 'is', 'have': 'has'}[word]}"


def settings_listed(settings) -> str:
    """ "10 %, 20 % and 30 % removed" or "asked for": what all end with is said once."""
    settings = list(settings)
    if len(settings) > 6:
        return f"{len(settings)} settings"
    for end in (" removed", " asked for"):
        if all(setting.endswith(end) for setting in settings):
            return listed(setting.removesuffix(end) for setting in settings) + end
    return listed(settings)


def by_interval(row, name: str = "behind") -> str:
    """The nats of a row with the interval at 95 %."""
    if pd.isna(row[name]):
        return "a loss that cannot be paired"
    return with_interval(Difference(row[name], row[f"{name}_low"], row[f"{name}_high"], 0.0)) + " nats"


def is_noise(row, name: str = "behind") -> bool:
    """Whether the row's interval holds zero; without one that cannot be told."""
    return row[f"{name}_low"] <= 0 <= row[f"{name}_high"]


def is_sure(row, name: str = "behind") -> bool:
    """Whether the row's interval leaves out zero; without one that cannot be told."""
    return row[f"{name}_low"] > 0 or row[f"{name}_high"] < 0


def perplexity_of(row) -> str:
    words = f"perplexity {plain(row['perplexity'], 4)}"
    if pd.isna(row["times_dense"]):
        return words
    times = plain(row["times_dense"], 3)
    return f"{words} ({'1.00' if times == '1' else times} times dense)"  # of the dense model itself, or nearly


def alternatives(found: Answer) -> list[str]:
    """Which value of the subject loses least, where, beyond chance or not; then figures of the hardest setting.

    With the first what did not lose as much as was asked for: a summary takes no more.
    """
    groups = [_races(group) for _, group in found.frame.groupby("group", sort=False)]
    return [" ".join([_winner(races), *_otherwise(races)]) for races in groups] + [_figures(races) for races in groups]


def ways(found: Answer, labels: Sequence[str]) -> list[str]:
    """What `alternatives` says of a question about these labels, after which of them no cell tells of, and where."""
    settings = list(dict.fromkeys(found.frame["setting"]))
    missing = []
    for label in labels:
        there = set(found.frame["setting"][found.frame["label"] == label])
        if lacking := [setting for setting in settings if setting not in there]:
            missing.append(f"“{label}”{f' at {settings_listed(lacking)}' if there else ''}")
    first, *others = alternatives(found)
    return [f"Not measured: {listed(missing)}. {first}" if missing else first, *others]


def _races(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each setting, best first."""
    races = dict(list(frame.sort_values(["perplexity", "loss_nats"], kind="stable").groupby("setting", sort=False)))
    return [(setting, races[setting]) for setting in dict.fromkeys(frame["setting"])]


def _of(races: list[tuple[str, pd.DataFrame]]) -> str:
    group = races[0][1]["group"].iloc[0]
    return f"{group}: " if group else ""


def _winner(races: list[tuple[str, pd.DataFrame]]) -> str:
    wins: dict[str, list[str]] = {}
    for setting, rows in races:
        wins.setdefault(rows.iloc[0]["label"], []).append(setting)
    sure = sum(is_sure(rows.iloc[1]) for _, rows in races)
    untold = not sure and not any(is_noise(rows.iloc[1]) for _, rows in races)
    if len(races) == 1:
        first, second = races[0][1]["label"].iloc[:2]
        if len(races[0][1]) == 2:
            verdict = "beyond chance" if sure else UNTOLD if untold else "but within noise"
            return f"{_of(races)}“{first}” loses less than “{second}”, {verdict}."
        verdict = "beyond chance" if sure else UNTOLD if untold else "but within noise of the next"
        return f"{_of(races)}“{first}” loses least, {verdict}."
    lead = f"the lead over the next is beyond chance in {sure or 'none'} of {len(races)} comparisons"
    lead = UNTOLD if untold else lead
    if len(wins) == 1:
        return f"{_of(races)}“{next(iter(wins))}” loses least everywhere; {lead}."
    parts = "; ".join(f"“{label}” at {settings_listed(settings)}" for label, settings in wins.items())
    return f"{_of(races)}{'Which loses least depends' if sure else 'No clear winner'}: {parts}; {lead}."


def _figures(races: list[tuple[str, pd.DataFrame]]) -> str:
    """Best, next and last at the setting that compares most, the largest fraction removed among such."""
    setting, rows = max(races, key=lambda race: (len(race[1]), race[1]["ratio"].iloc[0]))
    best, second, last = rows.iloc[0], rows.iloc[1], rows.iloc[-1]
    worst = f", “{last['label']}” is last at {by_interval(last)}" if len(rows) > 2 else ""
    at = f"With {setting}, " if setting else ""
    return (
        f"{_of(races)}{at}“{best['label']}” has {perplexity_of(best)}; “{second['label']}” follows at "
        f"{by_interval(second)}{worst}."
    )


def _otherwise(races: list[tuple[str, pd.DataFrame]]) -> list[str]:
    """For each label what it removed where that is not what was asked for."""
    found: dict[str, list[str]] = {}
    for setting, rows in races:
        if not setting.endswith(" asked for"):
            continue
        for _, row in rows.iterrows():
            if not is_met(row["ratio"], row["fraction_removed"]):
                words = f"{percent(round(row['fraction_removed'], 3))} where {setting.replace(' asked', ' was asked')}"
                found.setdefault(row["label"], []).append(words)
    return [f"{_of(races)}“{label}” removed {', and '.join(words)}." for label, words in found.items()]


def budget(found: Answer) -> list[str]:
    """How many calibration tokens are enough: the fewest that are within noise of the best."""
    sentences = []
    for (group, setting), rows in found.frame.groupby(["group", "setting"], sort=False):
        rows = rows.sort_values(["calibration_tokens", "perplexity"])
        best = rows.sort_values(["perplexity", "loss_nats"], kind="stable").iloc[0]
        enough = next(row for _, row in rows.iterrows() if row["perplexity"] == best["perplexity"] or is_noise(row))
        least = rows.iloc[0]
        of = ", ".join(filter(None, (group, setting)))
        words = f"{of}: " if of else ""
        words += f"Of {len(rows)} budgets “{best['label']}” is best, with {perplexity_of(best)}"
        if enough is not best and enough["label"] != best["label"]:
            words += f"; “{enough['label']}” is within noise of it"
        if least["label"] != best["label"]:
            words += f"; the smallest, “{least['label']}”, costs {by_interval(least)}"
        sentences.append(words + ".")
    return sentences


def redundancy(found: Answer) -> list[str]:
    """What removing the same share of attention alone and of the MLP alone costs."""
    sentences = []
    for group, rows in found.frame.dropna(subset=["attention_removed"]).groupby("group", sort=False):
        near = 0.02
        attention = rows[rows["mlp_removed"] < near].sort_values("attention_removed")
        mlp = rows[rows["attention_removed"] < near].sort_values("mlp_removed")
        for place, row in attention[attention["attention_removed"] >= near].iterrows():
            same = mlp[(mlp["mlp_removed"] - row["attention_removed"]).abs() < 0.05]
            if not len(same):
                continue
            other = same.iloc[0]
            gap = difference(found.records[place], found.records[other.name])
            if gap is None:
                continue
            dearer = "attention" if gap.mean > 0 else "the MLP"
            sure = "within noise of each other" if gap.is_noise else f"{dearer} is dearer, "
            sure += "" if gap.is_noise else UNTOLD if gap.is_unknown else "beyond chance"
            of = f"{group}: " if group else ""
            sentences.append(
                f"{of}Removing {percent(row['attention_removed'])} of attention alone gives {perplexity_of(row)}, "
                f"{percent(other['mlp_removed'])} of the MLP alone {perplexity_of(other)}: {sure} "
                f"(attention less MLP {with_interval(gap)} nats; {percent(row['fraction_removed'])} and "
                f"{percent(other['fraction_removed'])} of the parameters)."
            )
    if len(sentences) > 3:
        sentences = [sentences[0], sentences[len(sentences) // 2], sentences[-1]]
    return sentences or alternatives(found)


def layers(found: Answer) -> list[str]:
    """Which layer bears narrowing least and most."""
    sentences = []
    for (group, setting), rows in found.frame.dropna(subset=["rise"]).groupby(["group", "setting"], sort=False):
        rows = rows.sort_values("rise")
        least, most = rows.iloc[0], rows.iloc[-1]
        quiet = sum(is_noise(row, "rise") for _, row in rows.iterrows())
        told = f"Of {counted(len(rows), 'layer')} {some(quiet, 'are')} within noise of the dense model"
        if rows["rise_low"].isna().any():
            told = "So few windows do not tell which layers differ from the dense model by chance"
        of = ", ".join(filter(None, (group, setting.replace(" %", " % of the layer", 1))))
        sentences.append(
            f"{of + ': ' if of else ''}Layer {most['only_layer']:.0f} suffers most from being narrowed alone, "
            f"{by_interval(most, 'rise')}; layer {least['only_layer']:.0f} least, {by_interval(least, 'rise')}. "
            f"{told}."
        )
    return sentences


def is_on_front(frame: pd.DataFrame, smaller: tuple[str, ...], larger: tuple[str, ...] = ()) -> np.ndarray:
    """Which rows no other row beats: at least as good in all columns and better in one; (rows,) of bool."""
    values = np.column_stack([*(frame[name] for name in smaller), *(-frame[name] for name in larger)]).astype(float)
    return np.array([not ((values <= row).all(axis=1) & (values < row).any(axis=1)).any() for row in values])


def trade_off(found: Answer) -> list[str]:
    """Which allocations lie on the front of parameters, KV cache and perplexity; then what `alternatives` says."""
    front = found.frame[is_on_front(found.frame, ("perplexity",), ("fraction_removed", "kv_fraction_removed"))]
    counts = Counter(front["label"])
    return [
        f"Of {counted(len(found.frame), 'cell')} {some(len(front), 'are')} beaten by no other in parameters, KV cache "
        f"and perplexity at once: {listed(f'{count} of “{label}”' for label, count in counts.most_common())}.",
        *alternatives(found),
    ]


def speed_column(frame: pd.DataFrame) -> str:
    """By what cells are told to be faster: how they ran in turn with the dense model, where all did.

    Tokens per second of cells that ran at different times differ by what else the machine did.
    """
    return SPEEDUP if SPEEDUP in frame and frame[SPEEDUP].notna().all() else SPEED


def speed(found: Answer) -> list[str]:
    """Which cells no other beats in perplexity and decoding speed at once, and what the fastest costs."""
    frame, column = found.frame, speed_column(found.frame)
    front = frame[is_on_front(frame, ("perplexity",), (column,))].sort_values(column)
    fastest = front.iloc[-1]
    dense = found.dense.metrics.get("decode_tokens_per_s") if found.dense else None
    times = f" ({plain(fastest['decode_tokens_per_s'] / dense, 3)} times the dense model's)" if dense else ""
    if not pd.isna(fastest.get("decode_speedup", np.nan)):
        times = f" ({speedup_of(fastest)})"
    error = fastest.get("decode_tokens_per_s_standard_error", np.nan)
    error = "" if pd.isna(error) else f" ± {error:.2g}"
    names = listed(f"“{row['label']}” with {row['setting']}" for _, row in front.iterrows())
    return [
        f"Of {counted(len(frame), 'cell')} {some(len(front), 'are')} beaten by no other in quality and speed at once: "
        f"{names}.",
        f"The fastest of them, “{fastest['label']}” with {fastest['setting']}, decodes "
        f"{plain(fastest['decode_tokens_per_s'], 3)}{error} tokens per second{times} at {perplexity_of(fastest)}.",
        *verdicts(frame),
    ]


def speedup_of(row) -> str:
    """How many times as fast as the dense model, run in turn, with the interval at 95 %."""
    if pd.isna(row["decode_speedup_low"]):
        return f"{plain(row['decode_speedup'], 3)} times the dense model's, in too few runs for an interval"
    return (f"{plain(row['decode_speedup'], 3)} times the dense model's, {plain(row['decode_speedup_low'], 3)} to "
            f"{plain(row['decode_speedup_high'], 3)}")  # fmt: skip


def verdicts(frame: pd.DataFrame) -> list[str]:
    """How many cells are faster than the dense model, slower, or neither for sure; nothing where none ran in turn."""
    if "decode_speedup" not in frame or frame["decode_speedup"].isna().all():
        return []
    timed = frame[frame["decode_speedup"].notna()]
    faster, slower = timed["decode_speedup_low"] > 1, timed["decode_speedup_high"] < 1
    counts = {"faster": faster.sum(), "slower": slower.sum(), "inconclusive": (~faster & ~slower).sum()}
    parts = listed(f"{some(count, 'are')} {name}" for name, count in counts.items() if count)
    return [f"Run in turn with the dense model, of {counted(len(timed), 'cell')} {parts}."]


def budgets(found: Answer) -> list[str]:
    """Which budget loses least at the same speed, and what speed each was measured at."""
    reached = [f"“{row['label']}” asked for {row['setting']} decodes at {speedup_of(row)}"
               for _, row in found.frame.iterrows() if not pd.isna(row.get("decode_speedup", np.nan))]  # fmt: skip
    return [*alternatives(found), *(["; ".join(reached) + "."] if reached else [])]


def training(found: Answer) -> list[str]:
    """Which way of training gives back most, then what each does for the same model untrained."""
    sentences = alternatives(found)
    for (group, setting), rows in found.frame.groupby(["group", "setting"], sort=False):
        for _, before in rows[rows["recovery"] == ""].iterrows():
            for place, row in rows[rows["recovery"] != ""].iterrows():
                gain = difference(found.records[place], found.records[before.name])
                of = ", ".join(filter(None, (group, setting)))
                sentences.append(
                    f"{of}: “{row['label']}” brings perplexity from {plain(before['perplexity'], 4)} to "
                    f"{plain(row['perplexity'], 4)} ({with_interval(gain) + ' nats' if gain else 'not paired'})."
                )
    return [*sentences[:8], *memory(found)]


FORWARD_ONLY = ("lozo", "lozo-distillation")
SAME = 1.05  # by how much peaks of the same work differ


def memory(found: Answer) -> list[str]:
    """What each way of training holds at most, and which loses least in the memory of forward passes alone."""
    if "recovery_peak_mib" not in found.frame:
        return []
    sentences = []
    measured = found.frame[(found.frame["recovery"] != "") & found.frame["recovery_peak_mib"].notna()]
    for (group, setting), rows in measured.sort_values("recovery_peak_mib").groupby(["group", "setting"], sort=False):
        of = ", ".join(filter(None, (group, setting)))
        peaks = listed(f"{row['recovery_peak_mib']:,.0f} MiB by “{row['label']}”" for _, row in rows.iterrows())
        sentences.append(f"{of}: the most memory held in training, with all else that lay there: {peaks}.")
        forward = rows["recovery_peak_mib"][rows["recovery"].isin(FORWARD_ONLY)].min()
        within = rows[rows["recovery_peak_mib"] <= SAME * forward].sort_values(["perplexity", "loss_nats"])
        if len(within):
            best = within.iloc[0]
            sentences.append(
                f"{of}: in the memory of forward passes alone, {forward:,.0f} MiB, “{best['label']}” loses least, with "
                f"{perplexity_of(best)}; {_behind(found, within)}."
            )
    return sentences


def _behind(found: Answer, rows: pd.DataFrame) -> str:
    """By how much the second of the rows is behind the first, and whether that is more than chance."""
    if len(rows) < 2:
        return "nothing else fits"
    best, second = rows.index[:2]
    return lead_over(f"“{rows['label'][second]}”", difference(found.records[second], found.records[best]))


def tasks(frame: pd.DataFrame) -> list[str]:
    """For each pruned method: on how many tasks it is worse than dense beyond chance, and where it falls furthest."""
    scored = frame[(frame["metric"] == "acc") & frame["over_dense_mean"].notna()]
    sentences = []
    for (method, ratio), rows in scored.groupby(["method", "ratio"], sort=False):
        removed = removed_words(ratio, rows["fraction_removed"].iloc[0])
        worse, untold = (rows["over_dense_high"] < 0).sum(), rows["over_dense_high"].isna().sum()
        few = f" ({some(untold, 'have')} too few items to tell)" if untold else ""
        row = rows.loc[rows["over_dense_mean"].idxmin()]
        falls = "falls on none"
        if row["over_dense_mean"] < 0:
            falls = f"falls furthest on {row['task']}: {row['over_dense']}, to {row['value']:.2f}"
        sentences.append(
            f"“{method}” with {removed} is less accurate than the dense model, beyond chance, on "
            f"{worse} of {counted(len(rows), 'task')}{few}; it {falls}."
        )
    return sentences


def flips(frame: pd.DataFrame) -> list[str]:
    """For each pruned method: how many answers of all tasks changed, in both directions, and whether that is chance."""
    flipped = frame[(frame["metric"] == "acc") & frame["lost"].notna()]
    sentences = []
    for (method, ratio), rows in flipped.groupby(["method", "ratio"], sort=False):
        removed = removed_words(ratio, rows["fraction_removed"].iloc[0])
        lost, won = int(rows["lost"].sum()), int(rows["won"].sum())
        all_of_them = Flips(int(rows["items"].sum()), lost, won)
        p_value = plain(all_of_them.p_value, 2) if all_of_them.p_value >= 1e-4 else "< 0.0001"
        sentences.append(
            f"“{method}” with {removed} answers {lost + won} of {counted(all_of_them.items, 'item')} otherwise than "
            f"the dense model: {lost} wrong where that is right, {won} right where that is wrong (McNemar's exact "
            f"p {p_value})."
        )
    return sentences


def texts(frame: pd.DataFrame) -> list[str]:
    """Which method rises least over the dense model on each text and on their mean, at each fraction removed."""
    names, sentences = texts_of(frame), []
    for ratio, rows in frame.groupby("ratio"):
        if len(rows) < 2:
            continue
        least: dict[str, list[str]] = {}
        for name in names:
            least.setdefault(rows.loc[rows[f"{ON}{name}"].idxmin(), "method"], []).append(name)
        best, second = rows.iloc[0], rows.iloc[1]
        where = "; ".join(f"“{method}” on {listed(found)}" for method, found in least.items())
        sentences.append(
            f"With {asked_words(ratio, rows['fraction_removed'])} the mean rise over {len(names)} texts is least with "
            f"{_method(best)}, {best['mean_rise_nats']:.3f} nats; "
            f"{_method(second)} follows with {second['mean_rise_nats']:.3f}. "
            f"Least on each: {where}."
        )
    return sentences


def _method(row) -> str:
    """The method in quotation marks, with what it removed where that is not what was asked for."""
    removed = row["fraction_removed"]
    return f"“{row['method']}”{'' if is_met(row['ratio'], removed) else f' ({percent(round(removed, 3))} removed)'}"


def fidelity(frame: pd.DataFrame) -> list[str]:
    """Which method stays nearest to the dense model at each fraction removed, and how near that is."""
    sentences = []
    for ratio, rows in frame[frame["method"] != "dense"].groupby("ratio"):
        if len(rows) < 2:
            continue
        row = rows.loc[rows["kl_nats"].idxmin()]
        sentences.append(
            f"With {asked_words(ratio, rows['fraction_removed'])} {_method(row)} is nearest to the dense model: "
            f"KL divergence {row['kl_nats']:.3f} nats, the same likeliest token at "
            f"{percent(row['top1_agreement'])} of all places, and the same greedy continuation for "
            f"{percent(row['greedy_agreement'])} of its tokens."
        )
    return sentences


def transfer(found: Answer) -> list[str]:
    """What calibration on each text costs near it and far from it, and which text is best on the mean of all."""
    names = texts_of(found.frame)
    sentences = []
    for setting, rows in found.frame.groupby("setting", sort=False):
        best = rows.loc[rows["mean_rise_nats"].idxmin()]
        near, far = (
            [row[f"{ON}{name}"] for _, row in rows.iterrows() for name in names
             if is_near(name, row["calibration_text"]) == is_it]
            for is_it in (True, False)
        )  # fmt: skip
        which = ", ".join(filter(None, (best["group"], f"calibrated on {best['label']}")))
        words = f"the mean rise over {len(names)} texts is least with “{which}”, {best['mean_rise_nats']:.3f} nats"
        sides = f"; {np.nanmean(near):.3f} near and {np.nanmean(far):.3f} far on average" if near and far else ""
        sentences.append(f"{f'With {setting} ' if setting else ''}{words}{sides}.")
    for (group, setting), rows in found.frame.groupby(["group", "setting"], sort=False):
        parts = ", ".join(f"“{row['label']}” {row['mean_rise_nats']:.3f}" for _, row in rows.iterrows())
        sentences.append(f"{', '.join(filter(None, (group, setting)))}: by calibration text the mean rise is {parts}.")
    return sentences[:8]
