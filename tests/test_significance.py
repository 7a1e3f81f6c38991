"""Paired differences: intervals that hold what they should, and comparisons that are refused."""

from dataclasses import replace

import numpy as np
import pytest

from bench.quality.significance import differences, paired_difference, paired_differences
from reports.frames import pairs_frame, records_frame, tasks_frame
from reports.report import write_report
from reports.rises import with_interval
from tests.test_records import record


def test_the_interval_is_that_of_the_mean():
    generator = np.random.default_rng(0)
    reference = generator.normal(3, 1, 400)
    scores = reference + generator.normal(0.1, 0.2, 400)
    difference = paired_difference(scores, reference)
    assert difference.mean == pytest.approx((scores - reference).mean())
    expected = 1.96 * (scores - reference).std(ddof=1) / 20
    assert difference.high - difference.mean == pytest.approx(expected, rel=0.1)
    assert difference.mean - difference.low == pytest.approx(expected, rel=0.1)
    assert difference == paired_difference(scores, reference)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(1)
    held = [
        paired_difference(generator.normal(0, 1, 60), np.zeros(60), seed=seed).is_noise for seed in range(300)
    ]  # fmt: skip
    assert 0.9 < np.mean(held) < 0.985


@pytest.mark.parametrize("count", [2, 3, 5, 8, 10, 20])
def test_of_twenty_comparisons_of_equals_about_one_is_beyond_chance(count):
    scores = np.random.default_rng(3).normal(3, 1, (4000, count))
    false = np.mean([one.is_sure for one in paired_differences(scores, np.full_like(scores, 3))])
    assert 0.035 < false < 0.065


def test_one_pair_tells_nothing():
    one = paired_difference([3.0], [2.0])
    assert one.mean == 1
    assert one.is_unknown
    assert not one.is_sure
    assert not one.is_noise
    assert with_interval(one) == "+1.000 [too few to tell]"


@pytest.mark.parametrize(("count", "is_told"), [(2, False), (5, False), (6, True), (40, True)])
def test_a_few_differences_that_are_all_the_same_tell_nothing(count, is_told):
    """Two items that one model gets right and another wrong are no certainty: half of all fair coins do the same."""
    assert paired_difference([0.0] * count, [1.0] * count).is_sure == is_told
    shifted = np.random.default_rng(0).normal(3, 1, count)
    assert paired_difference(shifted + 0.3, shifted).is_sure == is_told
    same = paired_difference([1.0] * count, [1.0] * count)
    assert (same.is_noise, same.low, same.high) == (True, 0, 0)


def test_pairing_finds_what_unpaired_errors_hide():
    reference = np.random.default_rng(2).normal(3, 1, 50)
    assert not paired_difference(reference + 0.02, reference).is_noise
    assert paired_difference(reference, reference).is_noise


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(ValueError, match="3 and 2 scores cannot be paired"):
        paired_difference([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference([], [])


def with_tasks(one, scores=(1.0, 0.0, 1.0, 1.0), **changes):
    task = {
        "version": "1", "shots": 0, "items": 4, "sha256": "d" * 64, "capability": "syntax", "chance": 0.5,
        "metrics": {"acc": sum(scores) / 4}, "standard_errors": {"acc": 0.25}, "scores": {"acc": scores},
    }  # fmt: skip
    return replace(one, case=replace(one.case, tasks="probe"), tasks={"probe": task | changes})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"evaluation_sha256": "f" * 64}, "evaluation sha256"),
        ({"model_hash": "1" * 16}, "model hash"),
        ({"evaluation_ids": "1" * 16}, "evaluation ids"),
        ({"evaluation_windowing": "rolling"}, "evaluation windowing blocks and rolling"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_other_text_or_model_is_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        differences(record(), record("dense", 0.0, **changes))


@pytest.mark.parametrize("changes", [{"version": "1.0.2"}, {"sha256": "e" * 64}, {"shots": 5}])
def test_other_task_versions_are_refused(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} .* of task 'probe'"):
        differences(with_tasks(record()), with_tasks(record("dense", 0.0), **changes))


def changed(one, *changes):
    """The record with the losses of its three windows changed so."""
    return replace(one, losses=tuple(loss + change for loss, change in zip(one.losses, changes, strict=True)))


def test_tables_mark_what_is_within_noise(tmp_path):
    dense = with_tasks(record("dense", 0.0, 20.0))
    worse = with_tasks(record("activation", 0.2, 30.0), scores=(0.0, 0.0, 1.0, 1.0))
    worse = changed(worse, -0.01, 0.0, 0.01)
    same = changed(record("random", 0.2, 30.0), -0.1, 0.2, -0.1)
    frame = records_frame([dense, worse, same]).set_index("method")
    assert frame.loc["activation", "loss_over_dense"] == "+0.405 [+0.381, +0.430]"
    assert frame["loss_over_dense"].isna()["dense"]
    pairs = pairs_frame([dense, worse, same])
    assert pairs["verdict"].tolist() == ["within noise"]
    assert pairs["loss_higher_by"].iloc[0].endswith("≈")
    tasks = tasks_frame([dense, worse]).set_index("method")
    assert tasks.loc["activation", "over_dense"].startswith("-0.250 [")
    assert tasks.loc["activation", "over_dense"].endswith("≈")
    table, files = write_report([dense, worse, same], tmp_path)
    assert "-0.250" in table
    assert {"tasks.png", "tasks.csv", "differences.md"} <= {file.name for file in files}


def on_one_window(one):
    return replace(one, losses=one.losses[:1], case=replace(one.case, evaluation_windows=1))


def test_a_report_of_one_window_gives_no_verdict(tmp_path):
    dense = with_tasks(record("dense", 0.0, 20.0), scores=(1.0,))
    first = with_tasks(record("activation", 0.2, 30.0), scores=(0.0,))
    records = [on_one_window(one) for one in (dense, first, record("random", 0.2, 900.0))]
    records += [on_one_window(replace(record("wanda", 0.2, 90.0), case=replace(record().case, only_layer=layer,
                                                                               criterion="wanda")))
                for layer in (0, 1, 2)]  # fmt: skip
    assert set(pairs_frame(records[:3])["verdict"]) == {"too few to tell"}
    assert records_frame(records[:3])["loss_over_dense"].dropna().str.endswith("[too few to tell]").all()
    assert tasks_frame(records[:2])["over_dense"].dropna().tolist() == ["-1.000 [too few to tell]"]
    printed, _ = write_report(records, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    everything = printed + page.replace("“Beyond chance” means", "")
    assert "One window gives no interval" in page
    assert "activation" in everything
    assert ", and nothing tells whether that is chance" in everything
    for verdict in ("beyond chance.", "beyond chance in", ", beyond chance, on 1", "within noise of", "is better"):
        assert verdict not in everything


def test_a_report_of_few_windows_says_how_its_intervals_are_made(tmp_path):
    write_report([record("dense", 0.0, 20.0), record(), record("random", 0.2, 900.0)], tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Student's t over these windows" in page
    assert "bootstrap" not in page
