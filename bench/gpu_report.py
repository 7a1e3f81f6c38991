"""What a run of `bench gpu` found: its tables, pictures and one page. torch is never imported."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from .efficiency.report import read_scale, read_speed, write_scale_report, write_speed_report
from .output.files import write_whole
from .output.tables import markdown_table
from .records import CARD_PARTS, GPU_PARTS, GPU_SCHEMA, line_of, read_lines

CARD = {
    "memory_gib": "{} GiB", "driver": "driver {}", "cuda": "CUDA {}", "capability": "compute capability {}",
    "copy_gb_per_s": "{} GB/s copied", "bfloat16_tflops": "{} TFLOP/s in bfloat16", "cores": "{} CPU cores",
    "float32_tflops": "{} TFLOP/s in float32", "host_memory_gib": "{} GiB of host memory",
}  # fmt: skip


def write_gpu_report(out: Path) -> list[Path]:
    """Tables and pictures of every part's records, and `gpu.md`, which shows them on one page; returns the files."""
    files, page = [], ["# What was measured on this machine", "", card_of(out / "card.jsonl")]
    parts, _ = read_lines(out / "gpu.jsonl", GPU_SCHEMA, part_of)
    newest = {record["part"]: record for record in parts}
    if newest:
        page += ["## Parts", parts_table([*newest.values()])]
    for name, title in (("latency", "Decoding, the paper's shapes"), ("smollm2", "Decoding, SmolLM2-135M")):
        frame, _ = read_speed(out / name / "speed.jsonl")
        if len(frame):
            files += write_speed_report(frame, out / name)[1]
            page += [f"## {title}", "Milliseconds a token of one sequence, and how many times less than the first "
                     f"model's; all figures: `{name}/speed.md`.", decode_table(frame)]  # fmt: skip
    frame, _ = read_scale(out / "scale" / "scale.jsonl")
    if len(frame):
        table, made = write_scale_report(frame, out / "scale")
        files += made
        page += ["## What pruning takes by size", table]
    if {"passed", "not_run", "failed"} <= newest.get("tests", {}).keys():
        page += ["## Tests on this device", tests_of(newest["tests"])]
    if (out / "quality" / "report.html").exists():
        page += ["## Quality", "`quality/report.html`"]
    return [*files, write_whole(out / "gpu.md", "\n\n".join(filter(None, page)) + "\n")]


def part_of(fields: dict) -> dict:
    """The record of a part, that of the tests with their outcomes or without. Raises ValueError for anything else."""
    return line_of(fields, GPU_PARTS, error=str | None, passed=int, not_run=int, failed=[str])


def card_of(path: Path) -> str:
    """One line of what the machine is."""
    cards, _ = read_lines(path, GPU_SCHEMA, lambda fields: line_of(fields, CARD_PARTS))
    if not cards:
        return ""
    facts = cards[-1]
    known = [words.format(facts[name]) for name, words in CARD.items() if facts.get(name) is not None]
    versions = (f"{name} {facts['environment'][name]}" for name in ("torch", "transformers", "python"))
    return f"{facts['environment']['device']}: {', '.join(known)}; {', '.join(versions)}."


def parts_table(records: Sequence[dict]) -> str:
    """What became of each part."""
    rows = [{name: record.get(name) for name in ("part", "status", "seconds", "error")} for record in records]
    return markdown_table(pd.DataFrame(rows), ["part", "status", "seconds", "error"])


def decode_table(frame: pd.DataFrame) -> str:
    """A row for each mode, lengths and batch, a column for each model: milliseconds a token, and times faster."""
    done = frame[frame["status"] == "success"]
    models = list(dict.fromkeys(done["model"]))
    rows = []
    for (mode, prefix, decode, batch), group in done.groupby(["mode", "prefix", "decode", "batch"], sort=False):
        each = dict(zip(group["model"], 1000 * group["decode_s"] / group["decode"], strict=True))
        first = each.get(models[0])
        row = {"tokens": f"{prefix}+{decode}", "batch": batch, "mode": mode}
        for model in models:
            times = f" ({first / each[model]:.2f} x)" if first and model in each else ""
            row[model] = f"{each[model]:.2f}{times}" if model in each else ""
        rows.append(row)
    return markdown_table(pd.DataFrame(rows), ["tokens", "batch", "mode", *models]) if rows else "No cell succeeded."


def tests_of(record: dict) -> str:
    """How many passed, and the names of those that did not."""
    failed = "".join(f"\n- `{name}`" for name in record["failed"])
    return f"{record['passed']} passed, {record['not_run']} skipped, {len(record['failed'])} failed.{failed}"
