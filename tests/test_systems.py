"""What other systems lack, and what pytest's settings for tests must not do to users of the other sessions."""

import collections
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import psutil
import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler

from bench.__main__ import main
from bench.efficiency import memory, speed
from bench.efficiency.costs import Roofline
from bench.efficiency.speed import run_grid
from transact.gradients import free_memory

ROOT = Path(__file__).parents[1]
BENCHMARK = """
import warnings

def test_something(benchmark):
    warnings.warn("said at the end")
    benchmark.pedantic(sum, args=((1, 2),), rounds=1)
"""


@pytest.mark.parametrize("saved", [False, True])
def test_a_comparison_with_no_saved_run_or_one_of_another_machine_goes_on(saved, tmp_path):
    (tmp_path / "bench_one.py").write_text(BENCHMARK)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), str(tmp_path / "bench_one.py"), "-q",
               "--benchmark-only", "--benchmark-storage", str(tmp_path / "saved")]  # fmt: skip
    if saved:
        subprocess.run([*command, "--benchmark-save", "one"], capture_output=True, cwd=tmp_path, check=True)
        [file] = (tmp_path / "saved").rglob("*one.json")
        file.write_text(file.read_text().replace('"machine_info": {', '"machine_info": {"another": "machine",'))
    done = subprocess.run([*command, "--benchmark-compare"], capture_output=True, text=True, cwd=tmp_path)
    assert "INTERNALERROR" not in done.stdout + done.stderr
    assert (done.returncode, "1 passed" in done.stdout) == (0, True), done.stdout


def test_warnings_are_errors_in_these_tests():
    with pytest.raises(UserWarning, match="ours"):
        warnings.warn("ours", stacklevel=1)


@pytest.fixture
def windows(monkeypatch, tmp_path):
    """What Windows has not: the module `resource`, /proc, and names of `sysconf`; psutil has its peak."""
    info = collections.namedtuple("info", "rss peak_wset")
    process = type("Process", (), {"memory_info": lambda self: info(3 * 2**20, 5 * 2**20)})
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(psutil, "Process", process)
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "none")
    monkeypatch.delattr("os.sysconf")


def test_windows_has_a_peak_without_the_module_resource(windows):
    runpy.run_path(memory.__file__)  # imports
    memory.reset_peak_memory(torch.device("cpu"))
    assert memory.peak_memory_mib(torch.device("cpu")) == 5


@pytest.fixture
def roof(monkeypatch):
    """A made-up roofline: measuring one takes seconds."""
    monkeypatch.setattr(speed, "measure_roofline", lambda *arguments: Roofline(1e9, 1e9))


def test_speed_is_measured_without_the_names_of_linux(windows, roof, tiny_directory):
    options = {"lengths": ((8, 2),), "dtype": "float32", "device": "cpu", "repeats": 1}
    [record] = run_grid([str(tiny_directory)], **options)
    assert record["status"] == "success"
    assert record["metrics"]["peak_memory_mib"] == 5
    assert free_memory(torch.device("cpu")) > 2**20
    assert speed.memory_of(torch.device("cpu")) > 2**20


def test_macos_has_a_peak_in_bytes(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    monkeypatch.setattr(sys, "platform", "darwin")
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrusage", lambda who: type("usage", (), {"ru_maxrss": 7 * 2**20}))
    assert memory.peak_memory_mib(torch.device("cpu")) == 7


def test_without_a_compiler_the_cells_that_need_one_say_so_and_the_grid_goes_on(tiny_directory, roof, monkeypatch,
                                                                                 tmp_path, capsys):  # fmt: skip
    measure = speed.measure_speed

    def without_compiler(model, case, *arguments, **options):
        if case.mode == "graphs":
            raise InvalidCxxCompiler
        return measure(model, case, *arguments, **options)

    monkeypatch.setattr(speed, "measure_speed", without_compiler)
    options = {"lengths": ((8, 2), (16, 2)), "modes": ("graphs", "eager"), "dtype": "float32", "device": "cpu"}
    records = list(run_grid([str(tiny_directory)], repeats=1, **options))
    assert [record["status"] for record in records] == ["failed", "failed", "success", "success"]
    assert records[0]["error"].startswith("InvalidCxxCompiler: No working C++ compiler found")
    assert "\n" not in records[0]["error"]
    monkeypatch.setitem(speed.GRIDS, "quick", ((8, 2),))
    arguments = ["speed", str(tiny_directory), "--modes", "graphs", "--device", "cpu", "--repeats", "1"]
    assert main([*arguments, "--results", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "8+2 tokens, batch 1, graphs: failed: InvalidCxxCompiler: No working" in captured.err
    assert "No working C++ compiler" in (tmp_path / "speed.md").read_text(encoding="utf-8")
