"""Runs of the grid: what has a record is not measured again, shards make one grid, and nothing is lost on the way."""

import functools
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from ablations.conftest import report_on_the_way
from ablations.options import Run
from bench.records import append_record, read_records, read_results, sole_writer
from tests.synthetic import BASE, DENSE, Maker

CHOSEN = "test_granularity or test_layer or test_dense and criterion"  # six cells


@pytest.fixture
def arguments(tiny_directory, tiny_text) -> list[str]:
    """Arguments of a run of the ablations on the tiny model, but for `--results`."""
    return [
        "ablations", "-q", "--model", str(tiny_directory), "--calibration", str(tiny_text), "--evaluation",
        str(tiny_text), "--samples", "8", "--windows", "4", "--seq-len", "32", "--device", "cpu", "--dtype", "float32",
        "-k", CHOSEN,
    ]  # fmt: skip


@pytest.fixture
def ablations(arguments, capsys):
    """A function that runs the ablations in this process: the exit code and what was printed."""

    def run(results, *more: str) -> tuple[int, str]:
        capsys.readouterr()
        code = pytest.main([*arguments, "--results", str(results), *more])
        return code, capsys.readouterr().out

    return run


def figures(directory) -> dict:
    return {one.case: one.losses for one in read_results(directory)[0]}


def test_shards_measure_the_grid_once_and_a_later_run_measures_nothing(ablations, tmp_path):
    whole, split = tmp_path / "whole", tmp_path / "split"
    code, printed = ablations(whole)
    assert code == 0, printed
    records, complaints = read_records(whole / "records.jsonl")
    assert complaints == []
    assert len({one.case for one in records}) == len(records) == 6
    for index in ("1/2", "2/2"):
        code, printed = ablations(split, "--shard", index)
        assert code == 0, printed
    parts = [read_records(split / f"records-{index}of2.jsonl")[0] for index in (1, 2)]
    assert sorted(map(len, parts)) == [3, 3]
    assert figures(split) == figures(whole)
    before = {path: path.read_bytes() for path in split.glob("*.jsonl")}
    code, printed = ablations(split, "--collect-only")
    assert "6 cells, all measured already" in printed
    code, printed = ablations(split)  # not sharded: the shards' records count
    assert code == 0, printed
    assert (split / "records.jsonl").read_bytes() == b""
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_every_question_is_collected_and_one_that_a_profile_leaves_out_is_skipped(ablations, tmp_path, profile):
    code, printed = ablations(tmp_path / "none", "--profile", profile, "-k", "test_", "--collect-only")
    assert code == 0, printed
    assert "ablate_drops.py::test_drops[" in printed
    assert " with records; the other " in printed


def test_each_record_names_the_command_that_measures_it_alone(ablations, tmp_path, capsys):
    code, printed = ablations(tmp_path / "first", "--ratios", "0.25", "-k", "test_layer or test_recovery and lora")
    assert code == 0, printed
    records = read_results(tmp_path / "first")[0]
    assert len(records) == 3
    for number, record in enumerate(records):
        words = shlex.split(record.command)
        assert words[:3] == ["python", "-m", "pytest"]
        assert pytest.main([*words[3:], "-q", "--results", str(tmp_path / f"again-{number}")]) == 0
        [again] = read_results(tmp_path / f"again-{number}")[0]
        assert again.case == record.case
        assert again.losses == record.losses
        assert again.command == record.command


def test_a_shard_without_cells_is_no_failure_and_skips_say_why(ablations, tmp_path):
    code, printed = ablations(tmp_path, "--shard", "9/9", "-k", "test_layer and not 1")
    assert code == 0, printed
    assert "shard 9/9 of 1 cell holds none" in printed
    code, printed = ablations(tmp_path, "--ratios", "0.999", "-k", "test_granularity and heads")
    assert code == 0, printed
    assert "test_granularity[heads-0.999]: ratio 0.999 is out of reach" in printed


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="directories stand in for files that cannot be read")
def test_a_record_file_that_cannot_be_read_is_one_line(ablations, tmp_path):
    (tmp_path / "records.jsonl").mkdir()
    code, printed = ablations(tmp_path)
    assert code == 2
    assert "records.jsonl' cannot be read: Is a directory" in printed
    assert "INTERNALERROR" not in printed


def test_a_run_killed_in_mid_grid_goes_on_where_it_was(ablations, arguments, tmp_path):
    path = tmp_path / "records.jsonl"
    command = [sys.executable, "-m", "pytest", *arguments, "--results", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(read_records(path)[0]) < 2:
            time.sleep(0.005)
        process.kill()
    kept, _ = read_records(path)
    assert 2 <= len(kept) < 6
    assert ablations(tmp_path)[0] == 0
    records, _ = read_records(path)
    assert records[: len(kept)] == kept
    assert len({one.case for one in records}) == len(records) == 6


def test_a_second_writer_is_sent_away_in_one_line(ablations, tmp_path):
    with sole_writer(tmp_path / "records.jsonl"):
        code, printed = ablations(tmp_path)
    assert code == 2
    assert printed.count("is being written by another run: wait for it, or name other --results") == 1
    assert "Traceback" not in printed
    assert "results" not in printed.split("is being written")[0]  # nothing was measured: no report


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits stand in for a full disk")
def test_a_full_disk_ends_a_run_in_one_line_and_the_next_goes_on(ablations, arguments, tmp_path):
    import resource

    command = [sys.executable, "-m", "pytest", *arguments, "--results", str(tmp_path)]
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (9000, 9000))
    full = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert full.returncode == 2, full.stdout
    assert full.stdout.count("all records before this cell are kept: make room and run again") == 1
    assert "Traceback" not in full.stdout + full.stderr
    kept, complaints = read_records(tmp_path / "records.jsonl")
    assert complaints == []
    assert 0 < len(kept) < 6
    assert ablations(tmp_path)[0] == 0
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert len(lines) == len({json.dumps(json.loads(line)["case"]) for line in lines}) == 6


def test_a_model_that_cannot_be_read_is_told_once(ablations, tmp_path):
    code, printed = ablations(tmp_path / "results", "--model", str(tmp_path))
    assert code == 2
    assert printed.count("ablations: error: no model") == 1
    assert "ERROR" not in printed
    assert not (tmp_path / "results").exists()


def test_the_first_report_comes_with_the_first_pruned_model_and_the_next_when_the_run_is_twice_as_old(tmp_path, capsys):
    maker, file, run = Maker(), tmp_path / "records.jsonl", Run({}, tmp_path, tmp_path / "records.jsonl", None)
    run.started -= 100
    dense, pruned = maker.record(DENSE), maker.record(BASE)
    append_record(file, dense)
    report_on_the_way(run, dense)
    report_on_the_way(run, replace(pruned, status="failed", error="out of memory"))
    assert not (tmp_path / "report.html").exists()
    append_record(file, pruned)
    report_on_the_way(run, pruned)
    assert capsys.readouterr().out.strip().endswith(f"open {tmp_path / 'report.html'}")
    report_on_the_way(run, pruned)
    assert capsys.readouterr().out == ""
    run.report_due -= 200
    report_on_the_way(run, dense)
    assert capsys.readouterr().out.startswith("so far")
