"""One front of speed and quality: what lies on it, in which family, what is said of it, and what is not."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from bench.output.figures import write_figure
from bench.records import Record
from reports.answers import answer, table_of
from reports.families import family_of
from reports.front import front_table, label, plot_front, point_name
from reports.plots import draw
from reports.questions import QUESTIONS
from reports.report import write_report
from reports.rises import other_losses
from reports.sets import newest_set
from tests.synthetic import BASE, DENSE, PRESETS, Maker

[FRONT] = [question for question in QUESTIONS if question.name == "front"]
NEAR, OTHERS = np.linspace(3, 4, 12), {"sources": np.linspace(2, 3, 6), "probes": np.linspace(2.5, 3, 6)}


def measured(case, rise: float, *, spread: float = 0.01, others: float | None = None) -> Record:
    """A record of the case whose losses are higher than the dense model's by `rise`, on the other texts by `others`."""
    others = rise if others is None else others
    uneven = np.random.default_rng(len(str(case))).normal(0, spread, 12)
    losses = NEAR + rise + uneven - uneven.mean()
    far = {name: dense + others + uneven[:6] - uneven[:6].mean() for name, dense in OTHERS.items()}
    texts = tuple({"name": f"{name}:evaluation", "sha256": name[0] * 64, "tokens": 9, "loss_nats": float(one.mean()),
                   "losses": one.tolist(), "kl_nats": [0.1] * 6, "top1_agreement": [0.9] * 6}
                  for name, one in {"embedded": losses, **far}.items())  # fmt: skip
    one = Maker(windows=2).record(case)
    metrics = {**one.metrics, "loss_nats": float(losses.mean()), "perplexity": float(np.exp(losses.mean()))}
    return replace(one, losses=tuple(losses.tolist()), texts=texts, metrics=metrics)


def timed(preset: str, ratio: float, rise: float, faster: float, *, interval=(0.02, 0.02), prefill=None, spread=0.01,
          others=None, **fields) -> Record:  # fmt: skip
    """A record of a preset that decodes so many times as fast as the dense model."""
    base = DENSE if preset == "dense" else replace(BASE, ratio=ratio, **PRESETS[preset])
    one = measured(replace(base, decode_tokens=8, **fields), rise, spread=spread, others=others)
    low, high = (np.nan, np.nan) if interval is None else (faster - interval[0], faster + interval[1])
    speeds = {"decode_speedup": faster, "decode_speedup_low": low, "decode_speedup_high": high}
    if prefill:
        speeds |= {"prefill_speedup": prefill, "prefill_speedup_low": prefill, "prefill_speedup_high": prefill}
    return replace(one, metrics=one.metrics | speeds)


@pytest.fixture
def drawn(monkeypatch):
    """The names of pictures that are laid out and not written: that takes seconds."""
    names = []

    def noted(stem, figure):
        names.append(stem.name)
        stem.with_suffix(".svg").write_text('<svg width="1" height="1"></svg>', encoding="utf-8")
        return []

    monkeypatch.setattr("reports.report.write_figure", noted)
    return names


def dense() -> Record:
    return measured(replace(DENSE, decode_tokens=8), 0, spread=0)


def found_of(*records: Record):
    return answer(FRONT, newest_set([dense(), *records]))


def said(*records: Record) -> list[str]:
    return FRONT.find(found_of(*records))


def test_the_least_loss_at_each_speed_and_a_clear_lead():
    sentences = said(
        timed("best", 0.1, 0.1, 1.07), timed("best", 0.3, 0.4, 1.25), timed("flap", 0.3, 0.6, 1.32),
        timed("shortgpt", 0.3, 0.9, 1.4),
    )  # fmt: skip
    assert len(sentences) == 3 + 1 + 3
    assert sentences[0].startswith(
        "Of all that decode at least 1.05 times as fast as the dense model, “best” with 10 % removed loses least on "
        "embedded: +0.100 ["
    )
    assert "at 1.07 times its speed (1.05 to 1.09); its lead over “flap” with 30 % removed, +0.500 [" in sentences[0]
    assert sentences[0].endswith("nats, is beyond chance.")
    assert sentences[1].startswith("Of all that decode at least 1.1 and 1.2 times as fast")
    assert "“best” with 30 % removed loses least on embedded: +0.400" in sentences[1]
    assert "“flap” with 30 % removed loses least" in sentences[2]
    assert "its lead over “shortgpt” with 30 % removed, +0.300" in sentences[2]
    assert sentences[3] == "Nothing decodes 1.5 times as fast as the dense model."


def test_another_ratio_of_the_same_method_is_no_rival():
    sentences = said(timed("best", 0.1, 0.1, 1.3), timed("best", 0.2, 0.2, 1.4))
    assert sentences[0].endswith("nats, at 1.3 times its speed (1.28 to 1.32, so perhaps less than that); no other "
                                 "method is that fast.")  # fmt: skip


def test_one_cell_beside_the_dense_model_is_a_front(tmp_path, drawn):
    one = timed("best", 0.3, 0.4, 1.2, others=0.7)
    [sentence] = said(one)
    assert sentence.startswith(
        "One cell alone was timed beside the dense model, “best” with 30 % removed: at 1.2 times the dense model's "
        "speed (1.18 to 1.22) it loses +0.400 ["
    )
    assert "] nats on embedded and +0.700 [" in sentence
    assert sentence.endswith("] nats on the mean of sources and probes.")
    axes = draw(plot_front, found_of(one)).axes[0]
    assert {text.get_text() for text in axes.figure.legends[0].get_texts()} == {
        "beaten by no other", "dense", "width: best",
    }  # fmt: skip
    write_report([dense(), one], tmp_path)
    assert "front" in drawn
    assert "One cell alone" in (tmp_path / "report.html").read_text(encoding="utf-8")
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "times_as_fast" in summary
    assert "behind_by" not in summary


def test_one_cell_without_interval_or_other_texts_or_dense_model():
    one = timed("best", 0.3, 0.4, 1.2, interval=None)
    one = replace(one, texts=one.texts[:1])
    [sentence] = said(one)
    assert "at 1.2 times the dense model's speed (in too few runs for an interval) it loses +0.400 [" in sentence
    assert sentence.endswith("] nats on embedded.")
    assert FRONT.find(answer(FRONT, newest_set([one])))[0].startswith("No record of the dense model")
    assert said(replace(one, losses=())) == ["No loss can be paired with the dense model's, window by window."]


def test_a_lead_within_noise_is_inconclusive():
    sentences = said(timed("best", 0.3, 0.40, 1.2, spread=0.2), timed("flap", 0.3, 0.41, 1.2, spread=0.3))
    assert "its lead over “flap” with 30 % removed, +0.010 [" in sentences[0]
    assert sentences[0].endswith("] ≈ nats, is inconclusive.")


def test_a_lead_of_one_window_is_inconclusive():
    records = [replace(one, losses=one.losses[:1]) for one in (
        dense(), timed("best", 0.3, 0.4, 1.2), timed("flap", 0.3, 0.6, 1.2))]  # fmt: skip
    sentence = FRONT.find(answer(FRONT, newest_set(records)))[0]
    assert sentence.endswith("[too few to tell] nats, is inconclusive.")


def test_nothing_that_fast():
    sentences = said(timed("best", 0.3, 0.4, 1.02), timed("flap", 0.3, 0.6, 0.9))
    assert sentences == ["Nothing decodes 1.05, 1.1, 1.2, 1.3 or 1.5 times as fast as the dense model."]
    sentences = said(timed("best", 0.3, 0.4, 1.35), timed("flap", 0.3, 0.6, 1.36))
    assert sentences[1] == "Nothing decodes 1.5 times as fast as the dense model."


def test_speeds_that_may_be_lower_are_said_to_be():
    sentences = said(timed("best", 0.3, 0.4, 1.22, interval=(0.3, 0.1)), timed("flap", 0.3, 0.6, 1.22))
    assert "at 1.22 times its speed (0.92 to 1.32, so perhaps less than that)" in sentences[0]
    sentences = said(timed("best", 0.3, 0.4, 1.22, interval=None), timed("flap", 0.3, 0.6, 1.22))
    assert "at 1.22 times its speed (in too few runs for an interval)" in sentences[0]


def test_the_other_texts_have_winners_of_their_own():
    sentences = said(timed("best", 0.3, 0.4, 1.2, others=0.7), timed("flap", 0.3, 0.6, 1.2, others=0.5))
    assert "“best” with 30 % removed loses least on embedded: +0.400" in sentences[0]
    assert "“flap” with 30 % removed loses least on the mean of sources and probes: +0.500" in sentences[-1]
    assert "its lead over “best” with 30 % removed, +0.200" in sentences[-1]


def test_the_mean_of_texts_counts_each_text_once_whatever_its_windows():
    texts = [{"name": name, "sha256": name[0] * 64, "losses": losses} for name, losses in
             (("first", [9.0]), ("long", [1.0, 1.0, 1.0]), ("short", [5.0]))]  # fmt: skip
    one = replace(dense(), texts=tuple(texts))
    assert np.mean(other_losses(one, one)) == pytest.approx(3)
    assert other_losses(replace(one, texts=one.texts[:2]), one) is None
    assert other_losses(one, replace(one, texts=one.texts[:1])) is None
    assert other_losses(one, None) is None


def test_without_speeds_nothing_is_drawn_or_said(tmp_path, drawn):
    records = [measured(DENSE, 0), measured(replace(BASE, **PRESETS["best"]), 0.4), measured(BASE, 0.6)]
    assert answer(FRONT, newest_set(records)) is None
    write_report(records, tmp_path)
    assert "front" not in drawn
    assert not list(tmp_path.glob("front*"))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "ablations/ablate_front.py" in page[page.index('id="silent"') :]
    assert "times_as_fast" not in (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_without_the_dense_model_no_loss_is_compared(tmp_path, drawn):
    records = [timed("best", 0.3, 0.4, 1.2), timed("flap", 0.3, 0.6, 1.3)]
    found = answer(FRONT, newest_set(records))
    assert FRONT.find(found) == ["No record of the dense model: no loss can be compared with it."]
    assert not len(front_table(found))
    write_report(records, tmp_path)
    assert "front" in drawn


def test_trained_models_are_left_out():
    trained = {"recovery": "lora", "recovery_tokens": 9, "recovery_sha256": "f" * 64, "learning_rate": 0.1}
    untrained = timed("best", 0.3, 0.4, 1.2), timed("flap", 0.3, 0.5, 1.2)
    found = found_of(*untrained, timed("best", 0.3, 0.1, 1.2, **trained))
    assert {record.case for record in found.records} == {record.case for record in untrained}


def test_a_recipe_of_any_kind_is_on_the_front_once():
    records = [
        timed("best", 0.3, 0.4, 1.2), timed("best", 0.3, 0.41, 1.1, quantisation="int8"),
        timed("dense", 0, 0.001, 0.8, quantisation="int8"), timed("best", 0.0, 0.3, 1.0, sparsity="wanda-2:4"),
        timed("replaceme", 0.3, 0.7, 1.3), timed("transact", 0.3, 0.6, 1.1, head_multiple=8, mlp_multiple=64),
        timed("best", 0.0, 0.5, 1.3, speedup=1.3, budget="latency"),
    ]  # fmt: skip
    again = timed("best", 0.3, 0.4, 1.19)
    found = found_of(again, *records)
    assert len(found.records) == len(records)
    names = [point_name(record) for record in found.records]
    assert len(set(names)) == len(names)
    assert {"“dense, int8”", "“best, int8” with 30 % removed", "“replaceme” with 30 % removed"} <= {*names}
    assert "“best, budget latency” with 1.3 times the speed asked for" in names
    assert "“transact, head multiple 8, mlp multiple 64” with 30 % removed" in names
    table = table_of(found)
    assert {"family", "ratio", "decode_speedup"} <= {*table}
    assert set(table["front"]) == {label(record) for record in records}


@pytest.mark.parametrize(
    ("preset", "ratio", "fields", "family"),
    [
        ("dense", 0.0, {}, "dense"),
        ("dense", 0.0, {"quantisation": "int8"}, "int8"),
        ("best", 0.3, {}, "width"),
        ("flap", 0.3, {"quantisation": "int4"}, "width, int4"),
        ("best", 0.0, {"sparsity": "wanda-2:4"}, "2:4"),
        ("best", 0.3, {"sparsity": "wanda-2:4"}, "width, 2:4"),
        ("shortgpt", 0.3, {}, "depth"),
        ("crash", 0.3, {"quantisation": "int8"}, "depth, int8"),
    ],
)
def test_families(preset, ratio, fields, family):
    assert family_of(timed(preset, ratio, 0.1, 1.1, **fields)) == family


@pytest.mark.parametrize("gone", [{"mlp": 0}, {"qk_head_dim": 0, "v_head_dim": 0}, {"kv_heads": 0}])
def test_layers_without_attention_or_mlp_are_width_and_depth_both(gone):
    one = timed("best", 0.3, 0.1, 1.1)
    layer = one.widths[0]
    assert family_of(replace(one, widths=(layer, {**layer, **gone}))) == "width and depth"


@pytest.mark.parametrize(("others", "labels"), [
    ([("flap", 0.2, 0.2, 1.2)], ["10 %", "20 %", "30 %"]),
    ([("flap", 0.2, 0.38, 1.39)], ["10 %", "20 %, 30 %"]),
    # near by the extent of a front that leaves the picture, apart in it
    ([("flap", 0.2, 0.3, 1.11), ("wanda-sp", 0.3, 9.9, 1.9)], ["10 %", "20 %", "30 %"]),
])  # fmt: skip
def test_labels_that_would_lie_on_each_other_are_one(others, labels):
    figure = draw(plot_front, found_of(
        timed("best", 0.1, 0.1, 1.1), *(timed(*other) for other in others), timed("best", 0.3, 0.4, 1.4)
    ))  # fmt: skip
    assert [text.get_text() for text in figure.axes[0].texts] == labels


def lines_of(figure):
    return [next(line for line in axes.get_lines() if line.get_label() == "beaten by no other").get_xydata().tolist()
            for axes in figure.axes]  # fmt: skip


def test_the_line_goes_through_what_no_other_beats_from_the_dense_model_on():
    figure = draw(plot_front, found_of(
        timed("best", 0.1, 0.1, 1.1, prefill=1.2), timed("flap", 0.3, 0.6, 1.4), timed("wanda-sp", 0.3, 0.7, 1.3),
        timed("dense", 0, 0.01, 0.7, quantisation="int8", prefill=0.5),
    ))  # fmt: skip
    near, others, prefill, _ = lines_of(figure)
    assert near == [[1, 0], [1.1, pytest.approx(0.1)], [1.4, pytest.approx(0.6)]]
    assert np.allclose(near, others)
    assert prefill == [[1, 0], [1.2, pytest.approx(0.1)]]
    assert figure.get_size_inches()[0] == 6.5
    assert [axes.get_title() for axes in figure.axes[:2]] == ["embedded (near)", "mean of sources and probes"]
    assert {axes.get_xlabel() for axes in figure.axes} == {
        "decoding: times as fast as dense", "prefill: times as fast as dense",
    }  # fmt: skip
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {
        "beaten by no other", "dense", "width: best", "width: flap", "width: wanda-sp", "int8: dense",
    }  # fmt: skip


def test_no_two_methods_of_a_family_share_a_marker():
    found = found_of(dense(), *(timed(preset, 0.3, 0.5, 1.2) for preset in ("best", "flap", "transact")),
                     timed("best", 0.3, 0.6, 1.3, drop_modules=True))  # fmt: skip
    axes, *_ = draw(plot_front, found).axes
    markers = {bars.get_label(): bars.lines[0].get_marker() for bars in axes.containers}
    assert len(set(markers.values())) == len(markers) == 5


def test_a_method_has_one_marker_in_all_panels():
    alone = timed("flap", 0.3, 0.3, 1.3, prefill=1.1)
    found = found_of(timed("best", 0.3, 0.4, 1.2, prefill=1.1), replace(alone, texts=alone.texts[:1]),
                     timed("transact", 0.3, 0.5, 1.2))  # fmt: skip
    markers = {}
    for axes in draw(plot_front, found).axes:
        for bars in axes.containers:
            markers.setdefault(bars.get_label(), set()).add(bars.lines[0].get_marker())
    assert len(markers) == 4
    assert all(len(of_method) == 1 for of_method in markers.values())


def test_without_prefill_or_other_texts_there_is_one_panel():
    records = [replace(one, texts=one.texts[:1]) for one in (
        dense(), timed("best", 0.3, 0.4, 1.2), timed("flap", 0.3, 0.6, 1.2))]  # fmt: skip
    found = answer(FRONT, newest_set(records))
    assert len(draw(plot_front, found).axes) == 1
    assert len(FRONT.find(found)) == 2


def test_what_is_far_above_is_named_and_leaves_the_picture():
    figure = draw(plot_front, found_of(
        timed("best", 0.3, 0.4, 1.2), timed("flap", 0.3, 0.6, 1.2), timed("transact-released", 0.3, 4.6, 1.3)
    ))  # fmt: skip
    assert figure.axes[0].get_ylim()[1] < 1
    assert "above the picture: “transact-released” with 30 % removed" in figure.get_suptitle()


def test_what_is_above_is_named_within_the_picture(tmp_path):
    near = [timed(preset, ratio, ratio, 1.2) for preset in ("best", "flap", "transact") for ratio in (0.1, 0.2, 0.3)]
    presets = ("transact-released", "llm-pruner", "wanda-sp", "shortgpt")
    above = [timed(preset, 0.3, 4.6, 1.3) for preset in presets]
    figure = draw(plot_front, found_of(*near, *above))
    assert figure.get_suptitle().count("with 30 % removed") == 4
    write_figure(tmp_path / "front", figure)
    box = figure._suptitle.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_the_summary_has_the_winners_in_a_table(tmp_path, drawn):
    write_report([dense(), timed("best", 0.3, 0.4, 1.25), timed("flap", 0.3, 0.6, 1.6)], tmp_path)
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    rows = [line for line in summary.splitlines() if line.startswith(("| 1.05, 1.1, 1.2 ", "| 1.3, 1.5 "))]
    assert len(rows) == 2
    assert "“best” with 30 % removed" in rows[0].split("|")[2]
    assert "1.25 times (1.23 to 1.27)" in rows[0]
    assert summary.count("\n") < 40
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'id="front"' in page
    assert (tmp_path / "front.csv").exists()


def test_quick_takes_two_cells_that_no_other_question_has():
    from ablations import ablate_front, ablate_quantisation, ablate_speed  # with torch

    front, speed, formats = ablate_front.QUICK, ablate_speed.QUICK, ablate_quantisation.QUICK
    assert front["decode_tokens"] == speed["decode_tokens"] == formats["decode_tokens"]
    assert front["ratio"] == speed["ratio"]
    assert len(set(front["preset"]) - set(speed["preset"])) <= 2
    assert set(front["narrowed"]) <= set(formats["ratio"])
    assert "int8" in formats["quantisation"]
    assert front["sparse"] == ()


def test_recipes_without_a_name_are_told_apart():
    ways = product(("dims", "heads"), (1, 2))
    cases = [replace(BASE, decode_tokens=8, granularity=one, shots=shots) for one, shots in ways]
    records = [replace(measured(case, 0.1), method="activation") for case in cases]
    assert [label(record) for record in records] == [
        "activation", "activation, shots 2", "activation, granularity heads",
        "activation, granularity heads, shots 2",
    ]  # fmt: skip


def test_what_is_as_fast_and_as_good_as_the_dense_model_can_be_drawn():
    found = found_of(*(timed(name, 0.3, 0, 1, interval=None, spread=0) for name in ("best", "flap")))
    axes = draw(plot_front, found).axes[0]
    assert axes.get_xlim()[0] < 1 < axes.get_xlim()[1]
    assert axes.get_ylim()[0] < 0 < axes.get_ylim()[1]


def test_what_was_not_measured_on_the_other_texts_is_not_spoken_of():
    only_first = timed("flap", 0.3, 0.3, 1.3)
    only_first = replace(only_first, texts=only_first.texts[:1])
    first, *_, others = said(only_first, timed("best", 0.3, 0.4, 1.25))
    assert first.startswith("Of all that decode at least 1.05, 1.1 and 1.2 times as fast as the dense model, “flap” ")
    assert others.startswith(
        "Of all that decode at least 1.05, 1.1 and 1.2 times as fast as the dense model and were measured on the mean "
        "of sources and probes, “best” with 30 % removed loses least: "
    )
    assert others.endswith("; no other method that was measured there is that fast.")


def test_a_point_is_named_by_what_was_removed():
    one = timed("shortgpt", 0.3, 0.4, 1.2)
    assert point_name(replace(one, metrics=one.metrics | {"fraction_removed": 0.302})) == "“shortgpt” with 30 % removed"
    coarse = replace(one, metrics=one.metrics | {"fraction_removed": 0.2})
    assert point_name(coarse) == "“shortgpt” with 20 % removed (30 % asked for)"


def test_recipes_without_a_name_that_drop_or_are_sparse_are_told_apart():
    recipes = [{"measurements": 0}, {"measurements": 1}, {"measurements": 0, "output_bias": True}]
    cases = [replace(BASE, decode_tokens=8, **PRESETS["best"] | one, drop_modules=True) for one in recipes]
    names = [label(replace(measured(case, 0.1), method="predicted-loss, drops")) for case in cases]
    assert len(set(names)) == 3
    assert names[1] == "predicted-loss, drops, allocation searched, compensation pruned, measurements 1"
    named = timed("best", 0.3, 0.1, 1.1, drop_modules=True)
    assert label(named) == "best, drops"
