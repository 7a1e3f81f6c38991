"""Paired bootstrap: intervals that hold what they should, and comparisons that are refused."""

from dataclasses import replace

import numpy as np
import pytest

from bench.significance import differences, paired_difference
from reports.report import pairs_frame, records_frame, tasks_frame, write_report
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
        "version": 1.0, "shots": 0, "items": 4, "sha256": "d" * 64, "capability": "syntax", "chance": 0.5,
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


@pytest.mark.parametrize("changes", [{"version": 2.0}, {"sha256": "e" * 64}, {"shots": 5}])
def test_other_task_versions_are_refused(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} .* of task 'probe'"):
        differences(with_tasks(record()), with_tasks(record("dense", 0.0), **changes))


def test_tables_mark_what_is_within_noise(tmp_path):
    dense = with_tasks(record("dense", 0.0, 20.0))
    worse = with_tasks(record("activation", 0.2, 30.0), scores=(0.0, 0.0, 1.0, 1.0))
    same = replace(record("random", 0.2, 30.0), losses=tuple(x + y for x, y in zip(worse.losses, (-0.1, 0.2, -0.1),
                                                                                   strict=True)))  # fmt: skip
    frame = records_frame([dense, worse, same]).set_index("method")
    assert frame.loc["activation", "loss_over_dense"] == "+0.405 [+0.405, +0.405]"
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
