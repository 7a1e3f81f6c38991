"""What every ablation shares: options and profiles, one workbench, one record file, and the report at the end.

An ablation is a test function whose parameters decide one case, which it has measured by `record`. Its module states
the parameters' values in QUICK and FULL, each a tuple or a function of the model's configuration. Before anything is
measured the functions are called once with a `record` that only notes the case: so the grid is known, and can be
ordered, split into shards, handed to a cluster, or counted.
"""

import functools
import inspect
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from bench.quality.texts import EVALUATION_TEXTS
from bench.records import Case, Record, append_record, read_results, sole_writer
from bench.suite import cluster
from bench.suite.grid import estimate, in_order, shard_of
from bench.suite.workbench import Workbench
from reports.peers import read_peers
from reports.report import write_report, written
from transact.entry import counted
from transact.models import read_config
from transact.texts import SELF, TEXTS

from .options import Run, options_given, run_of, workbench_arguments
from .profiles import PROFILES

HERE = Path(__file__).parent
RUN, CASE = pytest.StashKey[Run](), pytest.StashKey[Case]()
REFUSED = 2  # the exit code
FIRST_QUESTION = "ablate_preset"  # that its table and pictures are there soon


def pytest_addoption(parser: pytest.Parser):
    group = parser.getgroup("ablations")
    group.addoption("--profile", default="quick", help=f"defaults of what follows: {', '.join(PROFILES)} (quick)")
    group.addoption("--ratios", help="fractions to remove, with commas, instead of each question's own")
    group.addoption("--presets", help="presets, with commas: only questions that compare presets, and only these")
    group.addoption("--model", help="embedded model, checkpoint directory or hub id")
    group.addoption("--calibration", help=f"texts in turn, with commas: {', '.join((SELF, *TEXTS))} or files")
    group.addoption("--domains", help="what ablate_domain and ablate_transfer calibrate on, with commas; in turn: A+B")
    group.addoption("--samples", type=int, help="calibration windows")
    texts = f"texts, with commas, the first the main one: {', '.join(EVALUATION_TEXTS)} or files"
    group.addoption("--evaluation", help=texts)
    group.addoption("--windows", type=int, help="evaluation windows of the first text; 0: all")
    group.addoption("--other-windows", type=int, help="evaluation windows of each other text; 0: all")
    everywhere = "other texts for every cell, not only presets"
    group.addoption("--everywhere", action="store_true", default=None, help=everywhere)
    group.addoption("--compared", type=int, help="windows of each text compared with the dense model; 0: all")
    group.addoption("--seq-len", type=int, help="tokens of a window")
    group.addoption("--windowing", default="blocks", help="blocks, or rolling as lm-eval's")
    group.addoption("--bos", action="store_true", help="begin each block with a BOS token")
    group.addoption("--tasks", help="tasks of ablate_capability, separated by commas; name@25: shots")
    group.addoption("--tasks-path", type=Path, help="a folder of lm-eval task files")
    group.addoption("--limit", type=int, help="the first N items of each task; 0: all")
    group.addoption("--seed", type=int, default=0, help="of the calibration windows and the random criterion")
    group.addoption("--device", default="auto", help="auto, cpu, cuda ...")
    group.addoption("--dtype", default="auto", help="auto (bfloat16 where it is fast), float32, bfloat16, float16")
    group.addoption("--results", default="results", help="directory of the records, tables and pictures")
    group.addoption("--shard", help="i/n: measure only the i-th of n parts, into a record file of its own")
    group.addoption("--ray", metavar="ADDRESS", help="measure on a Ray cluster: auto, local, host:port")
    group.addoption("--gpus-per-cell", type=float, help="GPUs that a cell takes of the Ray cluster (1; on CPUs 0)")


def exit_with(error: Exception | str):
    """End the run with one line and exit code 2."""
    pytest.exit(f"ablations: error: {' '.join(str(error).split())}", returncode=REFUSED)


def pytest_configure(config: pytest.Config):
    try:
        config.stash[RUN] = run_of(config.getoption)
    except ValueError as error:
        exit_with(error)


def pytest_generate_tests(metafunc: pytest.Metafunc):
    """Parameters by the module's QUICK or FULL, ratios, presets and domains by the options."""
    run = metafunc.config.stash[RUN]
    settings = run.settings
    grid = getattr(metafunc.module, settings["grid"], {})
    for name in [name for name in grid if name in metafunc.fixturenames]:
        values = settings.get(f"{name}s") or grid[name]
        if callable(values):
            values = values_for(run, values)
        metafunc.parametrize(name, values, ids=str)


def values_for(run: Run, values: Callable) -> Sequence:
    """What a function of the model's configuration gives; none where the model has a problem, told after collection."""
    if run.problem is None:
        try:
            return values(read_config(run.settings["model"]))
        except ValueError as error:
            run.problem = error
    return ()


@pytest.hookimpl(trylast=True)  # after -k has chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]):
    """Note the case of every item, put them in the order of `in_order`, and leave those of other shards out."""
    run = config.stash[RUN]
    mine = [item for item in items if item.path.parent == HERE]
    mine.sort(key=lambda item: item.path.stem != FIRST_QUESTION)
    if "presets" in run.settings:
        dropped = [item for item in mine if "preset" not in item.fixturenames and item.originalname != "test_dense"]
        leave_out(config, items, dropped)
        mine = [item for item in mine if item not in dropped]
    if run.problem is not None:
        exit_with(run.problem)
    if not mine:
        return
    try:
        run.arguments = workbench_arguments(config.getoption, run)
        with outside_capture(config):  # the model's own samples are made here, and tell how far they are
            run.workbench = planning_workbench(config.getoption, run.arguments)
            for item in mine:
                note_case(item, run.workbench)
    except ValueError as error:
        exit_with(error)
    noted = [item.stash[CASE] for item in mine if CASE in item.stash]
    run.cases = tuple(in_order(shard_of(noted, *run.shard) if run.shard else noted))
    if run.shard and not run.cases:
        run.notes.append(f"shard {run.shard[0]}/{run.shard[1]} of {counted(len(set(noted)), 'cell')} holds none")
    given = options_given(config.getoption, config._parser.parse_known_args([]))
    for item in mine:
        if CASE in item.stash:
            command = shlex.join(["python", "-m", "pytest", item.nodeid, *given])
            run.commands.setdefault(item.stash[CASE], command)
    places = {case: place for place, case in enumerate(run.cases)}
    leave_out(config, items, [item for item in mine if CASE in item.stash and item.stash[CASE] not in places])
    items.sort(key=lambda item: places.get(item.stash.get(CASE, None), -1))


def outside_capture(config: pytest.Config) -> AbstractContextManager[None]:
    """What is written in this context, progress bars above all, reaches the terminal."""
    return config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled()


def leave_out(config: pytest.Config, items: list[pytest.Item], dropped: list[pytest.Item]) -> None:
    """Deselect items as pytest does."""
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


def planning_workbench(option: Callable, arguments: dict) -> Workbench:
    """The workbench that cases are made with. For GPUs of a cluster, which this machine may lack, on the CPU."""
    if not option("gpus_per_cell"):
        return Workbench(**arguments)
    dtype = "bfloat16" if option("dtype") == "auto" else option("dtype")
    bench = Workbench(**arguments | {"device": "cpu", "dtype": dtype})
    bench.dense_case = replace(bench.dense_case, device="cuda")
    return bench


def note_case(item: pytest.Function, bench: Workbench) -> None:
    """Put the case that an item would have measured into its stash; mark it as skipped where there can be none."""
    if item.get_closest_marker("skip"):  # as pytest marks what it makes of a list without parameters
        return
    noted, params = [], item.callspec.params if hasattr(item, "callspec") else {}
    arguments = {"workbench": bench, "with_tasks": with_tasks_of(bench), "record": noted.append, **params}
    try:
        item.function(**{name: arguments[name] for name in inspect.signature(item.function).parameters})
    except pytest.skip.Exception as reason:
        item.add_marker(pytest.mark.skip(reason=str(reason)))
    except ValueError as error:  # this model or text cannot give the cell
        item.add_marker(pytest.mark.skip(reason=str(error)))
    else:
        [item.stash[CASE]] = noted


def with_tasks_of(bench: Workbench) -> Callable[[Case], Case]:
    """A function that has a case measured on the tasks as well."""

    def extended(case: Case) -> Case:
        try:
            return bench.with_tasks(case)
        except ValueError as error:
            exit_with(error)

    return extended


@pytest.fixture(scope="session")
def workbench(request: pytest.FixtureRequest) -> Workbench:
    return request.config.stash[RUN].workbench


@pytest.fixture(scope="session")
def with_tasks(workbench: Workbench) -> Callable[[Case], Case]:
    return with_tasks_of(workbench)


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest, workbench: Workbench):
    """A function that has a case measured and its record appended, unless there is a successful one already."""
    run = request.config.stash[RUN]
    try:
        with sole_writer(run.file):
            kept = {old.case: old for old in results_of(run)[0] if old.status == "success"}
            measured = measure_there if request.config.getoption("ray") else measure_here
            yield measured(request.config, kept)
    except ValueError as error:
        exit_with(error)
    except OSError as error:
        exit_with(f"results {str(run.results)!r} cannot be written: {error.strerror}")


def measure_here(config: pytest.Config, kept: dict[Case, Record]) -> Callable[[Case], None]:
    """A function that measures a case in this process."""
    run = config.stash[RUN]

    def measure(case: Case) -> None:
        if case in kept:
            return
        with outside_capture(config):
            record = cluster.measured(run.workbench, case)
            append(run, record)
        if record.status == "failed":  # not the error itself: pytest would keep it, and it all tensors of the cell
            pytest.fail(record.error, pytrace=False)
        kept[case] = record

    return measure


def measure_there(config: pytest.Config, kept: dict[Case, Record]) -> Callable[[Case], None]:
    """A function that waits for the record of a case; all are handed to the cluster at once, and kept as they come."""
    run, option = config.stash[RUN], config.getoption
    left = [case for case in run.cases if case not in kept]
    records = iter(())
    if left:
        ray = cluster.connect(option("ray"))
        config.add_cleanup(ray.shutdown)
        arguments, gpus = run.arguments, option("gpus_per_cell")
        if run.workbench.dense_case.device == "cuda":
            gpus = 1 if gpus is None else gpus
            arguments = arguments | {"device": "cuda"}  # a worker sees the GPU that it is given, and no other
        cell = functools.partial(cluster.measure_cell, tuple(arguments.items()))
        records = cluster.records_from(ray, cell, left, gpus_per_cell=gpus or 0)

    def measure(case: Case) -> None:
        while case not in kept:
            record = next(records)
            append(run, record)
            kept[record.case] = record
        if kept[case].status == "failed":
            pytest.fail(kept[case].error, pytrace=False)

    return measure


def append(run: Run, record: Record) -> None:
    """Append a record with its command; a disk that takes no more ends the run in one line."""
    try:
        append_record(run.file, replace(record, command=run.commands[record.case]))
    except OSError as error:
        exit_with(
            f"{str(run.file)!r} cannot be written: {error.strerror}; all records before this cell are kept: make room "
            "and run again"
        )
    report_on_the_way(run, record)


def report_on_the_way(run: Run, record: Record) -> None:
    """Write the report and say where, when it is due.

    At first with the record of a pruned model, beside which there is something to compare; then each time that the run
    is twice as old.
    """
    is_first = run.report_due is None and record.status == "success" and record.case.criterion != "dense"
    if not is_first and (run.report_due is None or time.monotonic() < run.report_due):
        return
    try:
        _, files = write_report(results_of(run)[0], run.results, read_peers([run.results])[0])
    except OSError:  # told at the end, where it is tried again
        files = []
    run.report_due = 2 * time.monotonic() - run.started
    if files:
        print(f"so far: {written(files)}", flush=True)


def results_of(run: Run) -> tuple[list[Record], list[str]]:
    """The records that there are, and the complaints; a file that cannot be read ends the run in one line."""
    try:
        return read_results(run.results)
    except OSError as error:
        exit_with(f"{error.filename!r} cannot be read: {error.strerror}")


def notes_and_cost(run: Run) -> list[str]:
    """What to say of a grid before it is measured."""
    if not run.cases:
        return run.notes
    records, _ = results_of(run)
    return [*run.notes, str(estimate(run.cases, records, run.workbench.dense.num_parameters()))]


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    return [] if config.option.collectonly else notes_and_cost(config.stash[RUN])


def pytest_sessionfinish(session: pytest.Session, exitstatus: int):
    """A shard without cells is no failure: its grid has fewer cells than shards."""
    run = session.config.stash[RUN]
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and run.commands and not run.cases:
        session.exitstatus = pytest.ExitCode.OK


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config):
    """What the grid will cost, or what was skipped, the table and where the pictures lie, after the last cell."""
    run = config.stash[RUN]
    if config.option.collectonly:
        for line in notes_and_cost(run):
            terminalreporter.write_line(line)
        return
    if exitstatus == REFUSED and not terminalreporter.stats.get("passed"):
        return
    for report in terminalreporter.stats.get("skipped", ()):
        terminalreporter.write_line(f"skipped {report.nodeid}: {report.longrepr[2].removeprefix('Skipped: ')}")
    records, complaints = results_of(run)
    for complaint in complaints:
        terminalreporter.write_line(complaint, yellow=True)
    if not records:
        return
    try:
        beside, complaints = read_peers([run.results])
        table, files = write_report(records, run.results, beside)
    except OSError as error:
        terminalreporter.write_line(f"no report: {error.filename}: {error.strerror}", red=True)
        return
    for complaint in complaints:
        terminalreporter.write_line(complaint, yellow=True)
    terminalreporter.section("results")
    terminalreporter.write_line(table)
    if files:
        terminalreporter.write_line(written(files))
