"""Records: nothing is lost, nothing is repeated, a torn line stops nobody."""

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import filelock
import pytest

from bench.output.tables import markdown_table
from bench.quality.significance import check_comparable
from bench.records import Case, Record, append_record, read_records, read_results, sole_writer, version_text
from reports.frames import records_frame
from reports.report import write_report

CASE = Case(
    model="tiny", model_hash="0" * 16, criterion="activation", granularity="dims", modules="qk+vo+mlp",
    allocation="uniform", compensation="none", output_bias=False, rope="pairs", shots=1, ratio=0.2, kv_ratio=None,
    seed=0, calibration_text="words",
    calibration_sha256="a" * 64, calibration_samples=2, calibration_seq_len=8, evaluation_text="words",
    evaluation_sha256="b" * 64, evaluation_windows=3, evaluation_seq_len=8,
    evaluation_windowing="blocks", evaluation_bos=False, tasks="", task_limit=None, dtype="float32", device="cpu",
    code="c",
)  # fmt: skip


def record(criterion: str = "activation", ratio: float = 0.2, perplexity: float = 30.0, **changes) -> Record:
    metrics = {
        "perplexity": perplexity, "bits_per_byte": 1.2, "fraction_removed": ratio,
        "kv_fraction_removed": ratio, "parameters": 1000,
        "weight_bytes": 4000, "kv_bytes_per_token": 64,
    }  # fmt: skip
    environment = {"device": "cpu", "torch": "2", "transformers": "5", "transact": "0"}
    case = replace(CASE, criterion=criterion, ratio=ratio, **changes)
    losses = tuple(math.log(perplexity) + change for change in (-0.1, 0.0, 0.1))
    text = {"name": case.evaluation_text, "sha256": case.evaluation_sha256, "tokens": 21, "loss_nats": losses[1],
            "losses": losses, "kl_nats": (0.1, 0.2), "top1_agreement": (0.8, 0.6)}  # fmt: skip
    return Record(
        case, criterion, metrics, {"perplexity": 1.0}, environment, losses=losses, texts=(text,),
        greedy_agreement=(0.5, 1.0, 0.0),
    )  # fmt: skip


METRICS, ENVIRONMENT, TEXT = record().metrics, record().environment, record().texts[0]
WIDTHS = {"kv_heads": 2, "qk_head_dim": 8, "v_head_dim": 8, "mlp": 40}
TASK = {"version": "2", "shots": 0, "items": 1, "sha256": "d" * 64, "capability": None, "chance": None,
        "metrics": {"acc": 1.0}, "standard_errors": {"acc": None}, "scores": {"acc": [1.0]}}  # fmt: skip


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "records.jsonl"
    written = [record(), record("dense", 0.0, 20.0)]
    for one in written:
        append_record(path, one)
    read, complaints = read_records(path)
    assert [one.case for one in read] == [one.case for one in written]
    assert [dict(one.metrics) for one in read] == [dict(one.metrics) for one in written]
    assert complaints == []


def test_versions_of_tasks_are_text_in_older_records_too(tmp_path):
    older, newer = (replace(record(), tasks={"words": TASK | {"version": version}}) for version in (2.0, "2"))
    append_record(tmp_path / "r.jsonl", older)
    append_record(tmp_path / "r.jsonl", newer)
    read, complaints = read_records(tmp_path / "r.jsonl")
    assert complaints == []
    assert [one.tasks["words"]["version"] for one in read] == ["2", "2"]
    check_comparable(*read)


def test_records_from_before_other_texts_are_read(tmp_path):
    path = tmp_path / "r.jsonl"
    append_record(path, record())
    older = json.loads(path.read_text())
    del older["texts"], older["greedy_agreement"]
    for name in ("other_texts", "other_sha256", "other_windows", "compared_windows"):
        del older["case"][name]
    path.write_text(json.dumps(older) + "\n")
    [read], complaints = read_records(path)
    assert complaints == []
    assert (read.case, read.texts, read.greedy_agreement) == (CASE, (), ())
    assert "30.00" in write_report([read], tmp_path)[0]


def test_not_a_number_becomes_null(tmp_path):
    append_record(tmp_path / "r.jsonl", record(perplexity=float("nan")))
    assert json.loads((tmp_path / "r.jsonl").read_text())["metrics"]["perplexity"] is None


def test_a_perplexity_that_is_no_number_does_not_replace_one_that_is(tmp_path):
    append_record(tmp_path / "r.jsonl", record())
    append_record(tmp_path / "r.jsonl", record(perplexity=float("nan")))
    read, complaints = read_records(tmp_path / "r.jsonl")
    assert [one.metrics["perplexity"] for one in read] == [30.0]
    assert "r.jsonl:2: its perplexity is no number" in complaints[0]


def test_torn_and_foreign_lines_are_passed_over(tmp_path):
    path = tmp_path / "r.jsonl"
    append_record(path, record())
    newer = json.loads(path.read_text()) | {"schema": 99}
    with path.open("a") as file:
        file.write(json.dumps(newer) + "\nnonsense\n" + path.read_text()[:50])  # the last one torn, without line end
    append_record(path, record(ratio=0.3))
    read, complaints = read_records(path)
    assert [one.case.ratio for one in read] == [0.2, 0.3]
    assert len(complaints) == 3
    assert "schema 99" in complaints[0]


WRITE_FOR_EVER = """
import itertools, sys
from bench.records import append_record, read_records, sole_writer
from dataclasses import replace
path, template = sys.argv[1:]
[record], _ = read_records(template)
with sole_writer(path):
    first = len(read_records(path)[0])
    for count in itertools.count(first):
        append_record(path, replace(record, case=replace(record.case, ratio=count / 1e6)))
        print(count, flush=True)
"""


def test_killed_at_any_moment_a_run_loses_at_most_the_record_it_was_writing(tmp_path):
    path, template = tmp_path / "r.jsonl", tmp_path / "template.jsonl"
    append_record(template, record())
    moments, kills = random.Random(0), 25
    for _ in range(kills):
        command = [sys.executable, "-c", WRITE_FOR_EVER, str(path), str(template)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            first = process.stdout.readline()  # the lock that the killed process held is free
            time.sleep(moments.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
            acknowledged = [int(line) for line in [first, *process.stdout] if line.endswith("\n")]
        ratios = [one.case.ratio for one in read_records(path)[0]]
        assert len(ratios) - 1 - acknowledged[-1] in (0, 1)  # the last may have been written and not yet said
        assert ratios == [count / 1e6 for count in range(len(ratios))]  # each once, none lost
    complaints = read_records(path)[1]
    assert len(complaints) <= kills
    assert all("torn line" in complaint for complaint in complaints)


def test_a_torn_end_is_cut_off_at_every_byte(tmp_path):
    path = tmp_path / "r.jsonl"
    append_record(path, record())
    whole = path.read_bytes()
    for length in range(0, len(whole) + 1, 7):
        path.write_bytes(whole + whole[:length])
        append_record(path, record(ratio=0.3))
        assert [one.case.ratio for one in read_records(path)[0]][-1] == 0.3


def test_a_record_file_has_one_writer(tmp_path):
    path = tmp_path / "deep" / "r.jsonl"
    with sole_writer(path):
        append_record(path, record())
        with pytest.raises(ValueError, match=r"r\.jsonl' is being written by another run: wait for it, or name other"):
            sole_writer(path).__enter__()
    with sole_writer(path):
        append_record(path, record(ratio=0.3))
    assert len(read_records(path)[0]) == 2


def test_a_file_system_without_locks_holds_nothing_and_goes_on(tmp_path, monkeypatch):
    def refused(self, *arguments, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", refused)
    with sole_writer(tmp_path / "r.jsonl"), sole_writer(tmp_path / "r.jsonl"):
        append_record(tmp_path / "r.jsonl", record())
    assert len(read_records(tmp_path / "r.jsonl")[0]) == 1


def test_a_lock_touches_no_record_and_no_other_file(tmp_path):
    append_record(tmp_path / "records.jsonl", record())
    with sole_writer(tmp_path / "records.jsonl"):
        assert len(read_results(tmp_path)[0]) == 1
    assert len(read_results(tmp_path)[0]) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"records.jsonl", ".records.jsonl.lock"}


FILL = """
import resource, signal, sys
from bench.records import append_record, read_records
from dataclasses import replace
path, template = sys.argv[1:]
[record], _ = read_records(template)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # the kernel takes the beginning of a line and refuses the rest
for count in range(100):
    try:
        append_record(path, replace(record, case=replace(record.case, ratio=count / 1e6)))
    except OSError:
        sys.exit(count)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits stand in for a full disk")
def test_a_full_disk_loses_nothing_that_was_written(tmp_path):
    path, template = tmp_path / "r.jsonl", tmp_path / "template.jsonl"
    append_record(template, record())
    kept = subprocess.run([sys.executable, "-c", FILL, str(path), str(template)]).returncode
    read, complaints = read_records(path)
    assert 0 < len(read) == kept < 100
    assert complaints == []
    assert path.read_bytes().endswith(b"\n")
    append_record(path, record(ratio=0.9))  # there is room again
    assert read_records(path)[0][-1].case.ratio == 0.9


def test_shards_in_one_file_or_beside_each_other_are_the_same_records(tmp_path):
    shards = [tmp_path / f"records-{index}of3.jsonl" for index in (1, 2, 3)]
    for index, path in enumerate(shards):
        append_record(path, record(ratio=index / 10))
        append_record(path, record("random", ratio=index / 10))
    one = tmp_path / "cat" / "records.jsonl"
    one.parent.mkdir()
    one.write_bytes(b"".join(path.read_bytes() for path in shards))
    together, complaints = read_records(one)
    assert complaints == []
    assert together == read_results(tmp_path)[0] == read_results(one.parent)[0]
    assert len(together) == 6
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[: len(whole) // 2 + 40])  # killed while it wrote its second record
    one.write_bytes(b"".join(path.read_bytes() for path in shards))
    rest, complaints = read_records(one)
    assert rest == [together[0], *together[2:]]
    assert len(complaints) == 1


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"metrics": {"perplexity": 30.0}}, "its fraction_removed is no number"),
        ({"metrics": {"perplexity": None}}, "its perplexity is no number"),
        ({"metrics": {**METRICS, "loss_nats": None}}, "its loss_nats is no number"),
        ({"losses": (1.0, math.nan)}, "one of its losses is no number"),
        ({"texts": ({**TEXT, "losses": (math.nan, 2.0)},)}, "one of its losses is no number"),
        ({"texts": ({**TEXT, "losses": ()},)}, "one of its texts has no losses"),
        ({"environment": {}}, "its environment does not say device"),
        ({"environment": {**ENVIRONMENT, "device": None}}, "its environment does not say device"),
    ],
)
def test_a_record_that_lacks_what_reports_show_is_passed_over(tmp_path, broken, reason):
    append_record(tmp_path / "r.jsonl", replace(record(), **broken))
    append_record(tmp_path / "r.jsonl", record())
    read, [complaint] = read_records(tmp_path / "r.jsonl")
    assert [one.case for one in read] == [record().case]
    assert reason in complaint


def test_report_compares_only_what_is_comparable(tmp_path):
    records = [record("dense", 0.0, 20.0), record("activation", 0.2, 30.0), record("random", 0.2, 900.0)]
    other_text = record("random", 0.2, 1.0, evaluation_sha256="f" * 64)
    older_code = record("random", 0.3, 2.0, code="older")
    table, files = write_report([other_text, older_code, *records], tmp_path)
    assert "900.00" in table
    assert " 1.50 " in table  # activation over dense
    assert " 2.00 " not in table
    kinds = {"perplexity": ("md", "csv", "tex", "png", "svg"), "differences": ("md", "csv", "tex")}
    names = [f"{stem}.{kind}" for stem, suffixes in kinds.items() for kind in suffixes]
    assert [file.name for file in files][: len(names)] == names
    assert files[-1].name == "report.html"
    assert all(file.stat().st_size > 0 for file in files)
    rows = (tmp_path / "perplexity.csv").read_text().splitlines()
    assert len(rows) == 4
    assert rows[1].startswith("tiny,dense,0.0")


def test_failed_records_are_not_in_the_table(tmp_path):
    failed = replace(record("random", 0.5), metrics={}, standard_errors={}, status="failed", error="out of memory")
    assert write_report([failed], tmp_path) == ("no successful record yet", [])
    assert "0.5" not in write_report([failed, record()], tmp_path)[0]


def test_without_a_dense_record_there_is_nothing_to_divide_by():
    frame = records_frame([record()])
    assert frame["times_dense"].isna().all()
    assert "|             |" in markdown_table(frame, ["times_dense"])


def test_reports_never_import_torch():
    program = "import sys, reports.__main__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "MPLBACKEND": "agg"})


def test_report_command(tmp_path):
    command = [sys.executable, "-m", "reports"]
    missing = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True)
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    append_record(tmp_path / "r.jsonl", record())
    done = subprocess.run([*command, str(tmp_path / "r.jsonl")], capture_output=True, text=True, check=True)
    assert "activation" in done.stdout
    assert (tmp_path / "perplexity.png").exists()


def test_versions_of_tasks_that_are_dates_are_told_apart():
    assert version_text(20240101) != version_text(20240102)
    assert [version_text(one) for one in (20240101, 2.0, 0.25, 3, "1.0.2", None)] == [
        "20240101", "2", "0.25", "3", "1.0.2", "none",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [("metrics", []), ("tasks", None), ("tasks", [1]), ("losses", "text"), ("widths", 5), ("texts", {"a": 1}),
     ("history", None), ("method", None), ("environment", []), ("metrics", {**METRICS, "decode_speedup": "fast"}),
     ("metrics", {**METRICS, "decode_speedup_low": [1]}), ("standard_errors", {"perplexity": "small"}),
     ("losses", [1.0, "2"]), ("widths", [1]), ("widths", [{}]), ("widths", [{**WIDTHS, "mlp": "whole"}]),
     ("texts", ["words"]), ("texts", [{}]), ("texts", [{**TEXT, "losses": None}]), ("texts", [{**TEXT, "sha256": 5}]),
     ("texts", [{**TEXT, "name": None}]), ("texts", [{**TEXT, "kl_nats": 0.1}]), ("greedy_agreement", ["same"]),
     ("history", [5]), ("history", [{"tokens": "many"}]), ("environment", {**ENVIRONMENT, "device": []}),
     ("command", None), ("tasks", {"words": {}}), ("tasks", {"words": {**TASK, "scores": {"acc": ["right"]}}}),
     ("tasks", {"words": {**TASK, "metrics": [1]}}), ("tasks", {"words": {**TASK, "items": None}})],
)  # fmt: skip
def test_lines_whose_parts_are_of_another_kind_are_passed_over(name, value, tmp_path):
    assert name in assert_passed_over(tmp_path / "records.jsonl", {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("ratio", None), ("ratio", "0.3"), ("ratio", [0.3]), ("kv_ratio", "half"), ("model", None), ("seed", {}),
     ("criterion", 5), ("evaluation_text", None), ("decode_tokens", None), ("quantisation", None), ("depth", 5),
     ("drop_modules", "yes"), ("speedup", "1.3"), ("code", [])],
)  # fmt: skip
def test_lines_whose_cases_are_of_another_kind_are_passed_over(name, value, tmp_path):
    written = asdict(record())["case"]
    assert name in assert_passed_over(tmp_path / "records.jsonl", {"case": written | {name: value}})


def assert_passed_over(path, changes) -> str:
    """What is said of a record with these changes, written before one that is read."""
    append_record(path, record())
    path.write_text(json.dumps(json.loads(path.read_text()) | changes) + "\n" + path.read_text())
    read, [complaint] = read_records(path)
    assert [one.case for one in read] == [CASE]
    assert complaint.startswith(f"{path}:1: its ")
    return complaint


def test_whole_figures_and_those_that_are_no_number_are_read(tmp_path):
    """JSON of other writers has 1 for 1.0; a text's divergences and a metric on the side may be no number."""
    written = record(ratio=0)
    unknown = {**written.texts[0], "kl_nats": (math.nan, 0.2)}
    written = replace(written, metrics={**written.metrics, "decode_speedup_low": math.nan}, texts=(unknown,),
                      losses=(3, 3, 3), tasks={"words": {**TASK, "chance": 0}})  # fmt: skip
    append_record(tmp_path / "r.jsonl", written)
    [read], complaints = read_records(tmp_path / "r.jsonl")
    assert complaints == []
    assert read.metrics["decode_speedup_low"] is None
    assert read.texts[0]["kl_nats"] == [None, 0.2]


IMPOSSIBLE = (
    ({"standard_errors": {"perplexity": -1.0}}, "standard_errors perplexity is -1.0, allowed: 0 and more"),
    ({"standard_errors": {"kl_nats": -1e-9}}, "standard_errors kl_nats is -1e-09, allowed: 0 and more"),
    ({"standard_errors": {"loss_nats": math.inf}}, "standard_errors loss_nats is inf, allowed: 0 and more"),
    ({"standard_errors": {"loss_nats": math.nan}}, "standard_errors loss_nats is nan, allowed: 0 and more"),
    ({"metrics": {**METRICS, "prune_s": -2}}, "metrics prune_s is -2, allowed: 0 and more"),
    ({"metrics": {**METRICS, "peak_memory_mib": -1.5}}, "metrics peak_memory_mib is -1.5, allowed: 0 and more"),
    ({"metrics": {**METRICS, "decode_speedup": math.inf}}, "metrics decode_speedup is inf, allowed: 0 and more"),
    ({"metrics": {**METRICS, "weight_bytes": 10**400}}, "metrics weight_bytes is 100000000000000000...00000"),
    ({"metrics": {**METRICS, "kl_nats": -math.inf}}, "metrics kl_nats is -inf, allowed: finite numbers"),
    ({"metrics": {**METRICS, "perplexity": 0.0}}, "metrics perplexity is 0.0, allowed: 1 and more"),
    ({"metrics": {**METRICS, "fraction_removed": 1.5}}, "metrics fraction_removed is 1.5, allowed: 0 to 1"),
    ({"losses": [1.0, -1.0]}, "losses is -1.0, allowed: 0 and more"),
    ({"greedy_agreement": [0.5, 2]}, "greedy_agreement is 2, allowed: 0 to 1"),
    ({"texts": [{**TEXT, "top1_agreement": [-0.5]}]}, "texts top1_agreement is -0.5, allowed: 0 to 1"),
    ({"texts": [{**TEXT, "losses": [math.nan]}]}, "texts losses is nan, allowed: 0 and more"),
    ({"widths": [{**WIDTHS, "mlp": -8}]}, "widths mlp is -8, allowed: 0 and more"),
    ({"case": {**asdict(CASE), "ratio": -0.2}}, "case ratio is -0.2, allowed: 0 to 1"),
    ({"case": {**asdict(CASE), "calibration_samples": -2}}, "case calibration_samples is -2, allowed: 0 and more"),
    ({"tasks": {"words": {**TASK, "items": -1}}}, "tasks words items is -1, allowed: 0 and more"),
    ({"tasks": {"words": {**TASK, "standard_errors": {"acc": -0.1}}}}, "tasks words standard_errors acc is -0.1"),
    ({"tasks": {"words": {**TASK, "scores": {"acc": [math.inf]}}}}, "tasks words scores acc is inf"),
    ({"history": [{"tokens": 8, "loss_nats": math.nan}]}, "history loss_nats is nan, allowed: finite numbers"),
)  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), IMPOSSIBLE, ids=[words for _, words in IMPOSSIBLE])
def test_figures_that_cannot_be_are_passed_over_and_named(changes, words, tmp_path):
    complaint = assert_passed_over(tmp_path / "records.jsonl", changes)
    assert complaint.startswith(f"{tmp_path / 'records.jsonl'}:1: its {words}")
    assert complaint.endswith(", passed over")


def test_scores_divergences_and_training_may_be_below_zero(tmp_path):
    one = record()
    one = replace(one, metrics={**one.metrics, "kl_nats": -1e-9}, history=({"tokens": 8, "loss": -1e-9},),
                  texts=({**TEXT, "kl_nats": [-1e-9]},),
                  tasks={"words": {**TASK, "metrics": {"acc": -2.0}, "scores": {"acc": [-2.0]}}})  # fmt: skip
    append_record(tmp_path / "r.jsonl", one)
    read, complaints = read_records(tmp_path / "r.jsonl")
    assert (len(read), complaints) == (1, [])


def test_a_line_of_brackets_is_no_record(tmp_path):
    append_record(tmp_path / "r.jsonl", record())
    with (tmp_path / "r.jsonl").open("a") as file:
        file.write("[" * 100_000 + "\n")
    read, [complaint] = read_records(tmp_path / "r.jsonl")
    assert len(read) == 1
    assert complaint.endswith("not a record (torn line?), passed over")
