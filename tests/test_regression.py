"""The regression check: passes on the same code, fails on injected faults, refuses what is not comparable."""

import json
import math
import re
import subprocess
from dataclasses import replace

import pytest
import torch

from bench.__main__ import main
from bench.suite import regression
from bench.suite.regression import compare, measure_cells, read_baseline, write_baseline
from tests.test_records import record
from transact.criteria import Activation

SETTINGS = {"calibration": "docstrings", "samples": 4, "evaluation": "docstrings", "windows": 6,
            "calibration_seq_len": 128, "evaluation_seq_len": 128, "dtype": "float32"}  # fmt: skip
CELLS = (("transact", 0.2),)


def some_records():
    dense = record("dense", 0.0, 20.0, calibration_sha256=None)
    return [dense, record("activation", 0.2, 30.0), record("random", 0.2, 90.0)]


def moved(one, nats: float, spread: float = 0.0):
    losses = tuple(loss + nats + sign * spread for loss, sign in zip(one.losses, (-1, 0, 1), strict=True))
    return replace(one, losses=losses)


def nearer(one, score: str, by: float, spread: float = 0.0):
    """The record with another KL divergence or agreement in every window."""
    if score == "greedy_agreement":
        return replace(one, greedy_agreement=tuple(share + by for share in one.greedy_agreement))
    first, second = one.texts[0][score]
    return replace(one, texts=(one.texts[0] | {score: (first + by - spread, second + by + spread)},))


def verdicts_after(change, tmp_path):
    path = tmp_path / "baseline.json"
    write_baseline(path, some_records())
    dense, first, second = some_records()
    return compare(read_baseline(path), [dense, change(first), second])


@pytest.mark.parametrize(
    ("change", "complaints"),
    [
        (lambda one: one, ["", "", ""]),
        (lambda one: moved(one, 0.009), ["", "", ""]),
        (lambda one: moved(one, 0.011), ["", "worse", ""]),
        (lambda one: moved(one, -0.011), ["", "better: bless it", ""]),
        (lambda one: moved(one, 0.05, spread=0.1), ["", "", ""]),  # three standard errors are 0.17
        (lambda one: moved(one, 0.03, spread=0.01), ["", "", ""]),  # of three windows 0.11 does as much
        (lambda one: moved(one, 0.25, spread=0.1), ["", "worse", ""]),
        (lambda one: moved(one, 0.12, spread=0.2), ["", "worse", ""]),  # never more than 10 %
        (lambda one: moved(one, 9.0), ["", "worse", ""]),
        (lambda one: replace(one, metrics={**one.metrics, "parameters": 999}), ["", "parameters were 1,000", ""]),
        (lambda one: nearer(one, "kl_nats", 0.009), ["", "", ""]),
        (lambda one: nearer(one, "kl_nats", 0.011), ["", "kl_nats worse", ""]),
        (lambda one: nearer(one, "kl_nats", -0.011), ["", "kl_nats better: bless it", ""]),
        (lambda one: nearer(one, "kl_nats", 0.05, spread=0.1), ["", "", ""]),  # three standard errors are 0.3
        (lambda one: nearer(one, "kl_nats", 0.11, spread=0.1), ["", "kl_nats worse", ""]),  # never more than 0.1
        (lambda one: nearer(one, "top1_agreement", -0.02), ["", "top1_agreement worse", ""]),
        (lambda one: nearer(one, "top1_agreement", 0.02), ["", "top1_agreement better: bless it", ""]),
        (lambda one: nearer(one, "greedy_agreement", -0.02), ["", "greedy_agreement worse", ""]),
        (lambda one: moved(nearer(one, "kl_nats", -0.5), 0.5), ["", "worse", ""]),  # perplexity first
    ],
)
def test_verdicts(change, complaints, tmp_path):
    assert [verdict.complaint for verdict in verdicts_after(change, tmp_path)] == complaints


def test_one_window_gives_no_verdict(tmp_path):
    one = [replace(each, losses=each.losses[:1], case=replace(each.case, evaluation_windows=1))
           for each in some_records()]  # fmt: skip
    with pytest.raises(ValueError, match="no verdict on 1 window, at least 2 are needed"):
        compare(regression.baseline_of(one), one)


def test_cells_without_a_perplexity_are_compared_by_their_losses(tmp_path):
    def shouting(one):
        metrics = one.metrics | {"perplexity": math.inf}
        return replace(moved(one, 800), metrics=metrics)

    path = tmp_path / "baseline.json"
    dense, first, second = some_records()
    write_baseline(path, [dense, shouting(first), second])
    assert json.loads(path.read_text())["cells"]["transact 0.2"]["perplexity"] is None
    assert "Infinity" not in path.read_text()
    same = compare(read_baseline(path), [dense, shouting(first), second])
    assert [verdict.complaint for verdict in same] == ["", "", ""]
    changed = compare(read_baseline(path), [dense, moved(shouting(first), 1), shouting(second)])
    assert [verdict.complaint for verdict in changed] == ["", "worse", "worse"]
    better = compare(read_baseline(path), [dense, first, second])
    assert [verdict.complaint for verdict in better] == ["", "better: bless it", ""]
    for verdicts in (same, changed, better):
        assert "inf" not in regression.table(verdicts)


def test_the_table_shows_how_near_to_the_dense_model(tmp_path):
    lines = regression.table(verdicts_after(lambda one: nearer(one, "kl_nats", 0.25), tmp_path)).splitlines()
    assert [line.index("KL nats") for line in lines[:1]]
    assert "0.150 -> 0.400  0.700 -> 0.700  0.500 -> 0.500" in lines[2]
    assert lines[2].endswith("kl_nats worse")
    assert lines[1].endswith("as before")


def test_a_baseline_of_an_older_version_asks_for_a_new_one(tmp_path):
    path = tmp_path / "baseline.json"
    write_baseline(path, some_records())
    older = json.loads(path.read_text())
    for cell in older["cells"].values():
        del cell["kl_nats"]
    path.write_text(json.dumps(older))
    with pytest.raises(ValueError, match="cell 'dense' has no kl_nats: --bless writes a new baseline"):
        read_baseline(path)


def test_a_baseline_can_be_reviewed(tmp_path):
    write_baseline(tmp_path / "baseline.json", some_records())
    lines = (tmp_path / "baseline.json").read_text().splitlines()
    assert sum('"losses"' in line for line in lines) == 3
    assert list(tmp_path.iterdir()) == [tmp_path / "baseline.json"]


@pytest.mark.parametrize("changes", [{"evaluation_sha256": "f" * 64}, {"model_hash": "1" * 16},
                                     {"evaluation_ids": "1" * 16}])  # fmt: skip
def test_other_text_or_model_is_refused(changes, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be compared with the baseline: .* the baseline has"):
        verdicts_after(lambda one: replace(one, case=replace(one.case, **changes)), tmp_path)


def test_other_cells_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the baseline has the cells dense, transact 0\.2, random 0\.2; run: "):
        verdicts_after(lambda one: replace(one, case=replace(one.case, ratio=0.4)), tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"cells": {"dense": {}}}', '{"cells": 3}'])
def test_a_baseline_that_is_torn_is_named(content, tmp_path, capsys):
    (tmp_path / "baseline.json").write_text(content)
    assert main(["regression", "--baseline", str(tmp_path / "baseline.json")]) == 2
    error = capsys.readouterr().err
    assert "cannot be read" in error
    assert error.count("\n") == 1
    assert main(["regression", "--baseline", str(tmp_path / "none.json")]) == 2
    assert "--bless writes one" in capsys.readouterr().err


def test_a_foreign_baseline_is_refused_before_anything_is_measured(tiny_directory, tiny_text, monkeypatch):
    monkeypatch.setattr("bench.suite.workbench.Workbench.measure", lambda *arguments: pytest.fail("measured"))
    settings = {"calibration": str(tiny_text), "evaluation": str(tiny_text), "samples": 2, "windows": 2,
                "calibration_seq_len": 16, "evaluation_seq_len": 16}  # fmt: skip
    baseline = json.loads(json.dumps(regression.baseline_of(some_records())))
    with pytest.raises(ValueError, match=r"model hash is .*, the baseline has 0000"):
        measure_cells(str(tiny_directory), cells=CELLS, settings=settings, baseline=baseline | {"model": "tiny"})


@pytest.fixture
def quick(monkeypatch):
    """The command with made-up measurements."""
    monkeypatch.setattr(regression, "measure_cells", lambda **options: some_records())


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_bless_wants_a_clean_tree(quick, tmp_path, capsys):
    path = tmp_path / "reports" / "baseline.json"
    path.parent.mkdir()
    arguments = ["regression", "--baseline", str(path)]
    assert main([*arguments, "--bless"]) == 2
    assert "git working tree" in capsys.readouterr().err
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("")
    assert main([*arguments, "--bless"]) == 2
    assert "not committed (code.py ...)" in capsys.readouterr().err
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "all")
    assert main([*arguments, "--bless"]) == 0
    assert main([*arguments, "--bless"]) == 0  # the baseline itself may be new
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("as before") == 3
    path.write_text(re.sub(r'"parameters": \d+', '"parameters": 7', path.read_text()))
    assert main(arguments) == 1
    assert "parameters were 7" in capsys.readouterr().out


@pytest.fixture(scope="module")
def blessed(embedded, tmp_path_factory):
    path = tmp_path_factory.mktemp("baseline") / "baseline.json"
    write_baseline(path, measure_cells(cells=CELLS, settings=SETTINGS, device="cpu"))
    return read_baseline(path)


@pytest.mark.slow
def test_the_same_code_gives_the_same_digits(blessed):
    records = measure_cells(cells=CELLS, settings=SETTINGS, device="cpu")
    again = json.loads(json.dumps(regression.baseline_of(records)))
    assert again["cells"] == blessed["cells"]


def keep_the_least_important(monkeypatch):
    score = Activation.score

    def negated(self, layer, index, statistics):
        scores = score(self, layer, index, statistics)
        return replace(scores, mlp_dims=-scores.mlp_dims)

    monkeypatch.setattr(Activation, "score", negated)


def shift_one_rope_pair(monkeypatch):
    """In every head of the narrowed model one kept pair turns at its neighbour's frequency."""
    import transact.pipeline as module

    apply_plan = module.apply_plan

    def shifted(dense, plan, **options):
        narrowed = apply_plan(dense, plan, **options)
        with torch.no_grad():
            for name, buffer in narrowed.named_buffers():
                if name.endswith("rope_pairs"):
                    buffer[..., 0] += 1
        return narrowed

    monkeypatch.setattr(module, "apply_plan", shifted)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [keep_the_least_important, shift_one_rope_pair])
def test_faults_in_the_core_are_found(fault, blessed, monkeypatch):
    fault(monkeypatch)
    dense, pruned = compare(blessed, measure_cells(cells=CELLS, settings=SETTINGS, device="cpu"))
    assert dense.complaint == ""
    assert pruned.complaint == "worse"
