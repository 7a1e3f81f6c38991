"""A Ray cluster gives the records that one process gives; a worker killed in mid-cell costs nothing but time.

Each test starts a cluster of two CPUs of its own, in a process of its own.
"""

import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest

from bench.records import append_record, read_records
from bench.suite.cluster import check_address, measure_cell, workbench_of
from tests.test_records import record

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")

RUN_ON_A_CLUSTER = """
import os, subprocess, sys, warnings
warnings.simplefilter("ignore")
import ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
address = ray.get_runtime_context().gcs_address
done = subprocess.run([sys.executable, "-m", "pytest", *sys.argv[1:], "--ray", address], capture_output=True, text=True)
print(done.stdout, done.stderr)
ray.shutdown()
sys.exit(done.returncode)
"""


@needs_ray
@pytest.mark.slow
def test_a_cluster_gives_the_same_records(tiny_directory, tiny_text, tmp_path, capsys):
    arguments = [
        "ablations", "-q", "--model", str(tiny_directory), "--calibration", str(tiny_text), "--evaluation",
        str(tiny_text), "--samples", "8", "--windows", "4", "--seq-len", "32", "--device", "cpu", "--dtype", "float32",
        "-k", "test_granularity or (test_preset and not shortgpt and not replaceme)",  # a tiny model has two layers
        "--results",
    ]  # fmt: skip
    command = [sys.executable, "-c", RUN_ON_A_CLUSTER, *arguments, str(tmp_path / "cluster")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert pytest.main([*arguments, str(tmp_path / "local")]) == 0, capsys.readouterr().out
    there, here = (
        {one.case: one for one in read_records(tmp_path / where / "records.jsonl")[0]} for where in ("cluster", "local")
    )
    assert there.keys() == here.keys()
    assert len(here) == 14
    for case, one in here.items():
        assert there[case].losses == pytest.approx(one.losses, rel=1e-5)
        assert there[case].widths == one.widths
        assert there[case].metrics.keys() == one.metrics.keys()


KILLED_ONCE = """
import os, signal, sys
from pathlib import Path
from bench.suite import cluster
from bench.records import append_record, read_records
sentinel, template, path = map(Path, sys.argv[1:])
[record], _ = read_records(template)

def measure(case):
    if case.ratio == 0.2:
        with sentinel.open("a") as file:
            file.write(f"{os.getpid()}\\n")
        if len(sentinel.read_text().splitlines()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    if case.ratio == 0.3:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(record, case=case)

from dataclasses import replace
ray = cluster.connect("local")
cases = [replace(record.case, ratio=ratio) for ratio in (0.1, 0.2, 0.3, 0.4)]
for one in cluster.records_from(ray, measure, cases):
    append_record(path, one)
ray.shutdown()
"""


@needs_ray
@pytest.mark.slow
def test_a_killed_worker_is_retried_and_one_that_always_dies_is_recorded(tmp_path):
    append_record(tmp_path / "template.jsonl", record())
    files = [str(tmp_path / name) for name in ("sentinel", "template.jsonl", "records.jsonl")]
    done = subprocess.run([sys.executable, "-c", KILLED_ONCE, *files], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    outcomes = {one.case.ratio: one for one in read_records(tmp_path / "records.jsonl")[0]}
    assert {ratio: one.status for ratio, one in outcomes.items()} == {
        0.1: "success", 0.2: "success", 0.3: "failed", 0.4: "success",
    }  # fmt: skip
    assert "ActorDiedError" in outcomes[0.3].error
    assert len((tmp_path / "sentinel").read_text().split()) == 2


GPUS = """
import os, sys
from dataclasses import replace
from pathlib import Path
import ray
from bench.suite import cluster
from bench.records import append_record, read_records
template, path = map(Path, sys.argv[1:])
[record], _ = read_records(template)

def measure(case):
    where = f"{os.getpid()} {os.environ['CUDA_VISIBLE_DEVICES']}"
    return replace(record, case=case, environment={**record.environment, "device": where})

ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
cases = [replace(record.case, ratio=ratio / 10) for ratio in range(1, 9)]
for one in cluster.records_from(ray, measure, cases, gpus_per_cell=1):
    append_record(path, one)
ray.shutdown()
"""


@needs_ray
@pytest.mark.slow
def test_cells_of_a_gpu_share_a_process_that_keeps_it(tmp_path):
    append_record(tmp_path / "template.jsonl", record())
    files = [str(tmp_path / name) for name in ("template.jsonl", "records.jsonl")]
    done = subprocess.run([sys.executable, "-c", GPUS, *files], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    records = read_records(tmp_path / "records.jsonl")[0]
    assert sorted(one.case.ratio for one in records) == [ratio / 10 for ratio in range(1, 9)]
    where = {tuple(one.environment["device"].split()) for one in records}
    assert len({gpu for _, gpu in where}) == len({process for process, _ in where}) == len(where) <= 2


def test_a_worker_with_other_code_measures_nothing(tiny_directory, tiny_text):
    settings = {
        "model": str(tiny_directory), "calibration": str(tiny_text), "evaluation": str(tiny_text), "samples": 8,
        "windows": 4, "calibration_seq_len": 32, "evaluation_seq_len": 32, "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    settings = tuple(settings.items())
    case = workbench_of(settings).case("transact", 0.2)
    assert measure_cell(settings, case).status == "success"
    refused = measure_cell(settings, replace(case, code="older"))
    assert refused.status == "failed"
    assert refused.error == f"ValueError: the worker's code is {case.code}, the driver's older"
    refused = measure_cell(settings, replace(case, other_sha256="f" * 64))
    assert refused.error == f"ValueError: the worker's other_sha256 is , the driver's {'f' * 64}"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1: .*refused"),
        ("ray://127.0.0.1:1", "no Ray cluster at ray://127.0.0.1:1: .*refused"),
        ("127.0.0.1:99999", "no Ray cluster at"),
        ("somewhere", "ray address must be auto, local, host:port or ray://host:port, got 'somewhere'"),
    ],
)
def test_an_unreachable_cluster_is_one_line(address, message):
    with pytest.raises(ValueError, match=message):
        check_address(address)
