"""What every ablation shares: options, one workbench, one record file, and the report at the end."""

from pathlib import Path

import pytest

from bench.records import Record, append_record, read_records
from bench.workbench import Workbench, method_of
from reports.report import write_report, written
from transact.inputs import TEXTS


def pytest_addoption(parser: pytest.Parser):
    group = parser.getgroup("ablations")
    group.addoption("--model", default="smollm2-135m", help="embedded model, checkpoint directory or hub id")
    group.addoption("--calibration", default="embedded", help=f"text: {', '.join(TEXTS)} or a file")
    group.addoption("--samples", type=int, default=64, help="calibration windows")
    group.addoption("--evaluation", default="embedded", help=f"text: {', '.join(TEXTS)} or a file")
    group.addoption("--windows", type=int, default=48, help="evaluation windows")
    group.addoption("--seq-len", type=int, default=256, help="tokens of a window")
    group.addoption("--windowing", default="blocks", help="blocks, or rolling as lm-eval's")
    group.addoption("--bos", action="store_true", help="begin each block with a BOS token")
    group.addoption("--tasks", default="probes", help="tasks of ablate_capability, separated by commas; name@25: shots")
    group.addoption("--tasks-path", type=Path, help="a folder of lm-eval task files")
    group.addoption("--limit", type=int, default=80, help="the first N items of each task; 0: all")
    group.addoption("--seed", type=int, default=0, help="of the calibration windows and the random criterion")
    group.addoption("--device", default="auto", help="auto, cpu, cuda ...")
    group.addoption("--dtype", default="auto", help="auto (bfloat16 where it is fast), float32, bfloat16, float16")
    group.addoption("--results", default="results", help="directory of the records, tables and pictures")


@pytest.fixture(scope="session")
def workbench(request: pytest.FixtureRequest) -> Workbench:
    option = request.config.getoption
    try:
        return Workbench(
            option("model"),
            calibration=option("calibration"),
            samples=option("samples"),
            calibration_seq_len=option("seq_len"),
            evaluation=option("evaluation"),
            windows=option("windows"),
            evaluation_seq_len=option("seq_len"),
            evaluation_windowing=option("windowing"),
            evaluation_bos=option("bos"),
            tasks=option("tasks").split(","),
            tasks_path=option("tasks_path"),
            task_limit=option("limit") or None,
            seed=option("seed"),
            dtype=option("dtype"),
            device=option("device"),
        )
    except ValueError as error:
        pytest.exit(f"ablations: error: {error}", returncode=2)


@pytest.fixture(scope="session")
def with_tasks(workbench: Workbench):
    """A function that has a case measured on the tasks as well."""

    def extended(case):
        try:
            return workbench.with_tasks(case)
        except ValueError as error:
            pytest.exit(f"ablations: error: {error}", returncode=2)

    return extended


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest, workbench: Workbench):
    """A function that measures a case and appends its record, unless the file already has a successful one."""
    path = records_path(request.config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        pytest.exit(f"ablations: error: results {str(path.parent)!r} cannot be made: {error.strerror}", returncode=2)
    capture = request.config.pluginmanager.getplugin("capturemanager")
    done = {kept.case for kept in read_records(path)[0] if kept.status == "success"}

    def measure(case):
        if case in done:
            return
        try:
            with capture.global_and_fixture_disabled():  # progress bars reach the terminal
                result = workbench.measure(case)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            environment = workbench.environment()
            append_record(path, Record(case, method_of(case), {}, {}, environment, status="failed", error=failure))
            raise
        append_record(path, result)
        done.add(case)

    return measure


def records_path(config: pytest.Config) -> Path:
    return Path(config.getoption("results")) / "records.jsonl"


def pytest_terminal_summary(terminalreporter, config: pytest.Config):
    """The table and where the pictures lie, after the last cell."""
    records, complaints = read_records(records_path(config))
    for complaint in complaints:
        terminalreporter.write_line(complaint, yellow=True)
    if not records:
        return
    table, files = write_report(records, Path(config.getoption("results")))
    terminalreporter.section("results")
    terminalreporter.write_line(table)
    if files:
        terminalreporter.write_line(written(files))
