"""The options of a run: profiles give defaults, and what is not allowed or contradicts itself is refused."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.quality.texts import EVALUATION_TEXTS, text_names, unreadable
from bench.records import Case
from bench.suite.cluster import check_address
from bench.suite.grid import parse_shard
from bench.suite.workbench import Workbench
from transact.recipe import recipe_by_name
from transact.texts import DEFAULT_CALIBRATION, SELF, TEXTS, load_text, source_names
from transact.widths import check_ratio

from .profiles import PROFILES


@dataclass
class Run:
    """What the options ask for; once they are known, the workbench and its arguments, the grid, and what to say."""

    settings: dict
    results: Path
    file: Path
    shard: tuple[int, int] | None
    problem: ValueError | None = None  # with the model, met while parameters were read off its configuration
    arguments: dict = field(default_factory=dict)
    workbench: Workbench | None = None
    cases: tuple[Case, ...] = ()
    commands: dict[Case, str] = field(default_factory=dict)  # that measure each case alone
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    report_due: float | None = None  # by the monotonic clock; None: with the first pruned model


def run_of(option: Callable) -> Run:
    """What the options ask for. Raises ValueError where one is not allowed or two contradict each other."""
    if option("profile") not in PROFILES:
        raise ValueError(f"unknown profile {option('profile')!r}, allowed: {', '.join(PROFILES)}")
    settings = dict(PROFILES[option("profile")])
    for name in ("model", "samples", "windows", "other_windows", "everywhere", "compared", "seq_len", "tasks", "limit"):
        if option(name) is not None:
            settings[name] = option(name)
    if settings["model"] is None:
        raise ValueError(f"profile {option('profile')!r} has no model of its own: name one by --model")
    least_allowed = {"windows": 0, "other_windows": 0, "compared": 0, "limit": 0, "samples": 1, "seq_len": 2}
    for name, least in least_allowed.items():
        if settings[name] < least:
            words = "0 (all) or more" if least == 0 else f"at least {least}"
            raise ValueError(f"{name.replace('_', '-')} must be {words}, got {settings[name]}")
    for name in ("ratios", "presets", "domains"):
        if option(name) is not None:
            settings[name] = tuple(part.strip() for part in option(name).split(","))
    for preset in settings.get("presets", ()):
        recipe_by_name(preset)
    settings["domains"] = tuple(mixture(name) for name in settings["domains"])
    for calibration in (option("calibration") or DEFAULT_CALIBRATION, *settings["domains"]):
        for name in source_names(calibration):
            if name != SELF and name not in TEXTS:
                load_text(name)  # a file that cannot be read
    if "ratios" in settings:
        try:
            settings["ratios"] = tuple(map(float, settings["ratios"]))
        except ValueError:
            raise ValueError(f"ratios must be numbers with commas, got {option('ratios')!r}") from None
        for ratio in settings["ratios"]:
            check_ratio("ratio", ratio)
    shard = parse_shard(option("shard")) if option("shard") is not None else None
    if shard and option("ray"):
        raise ValueError("--shard and --ray exclude each other: the cluster spreads all cells by itself")
    if option("gpus_per_cell") is not None and not option("ray"):
        raise ValueError("--gpus-per-cell is for --ray")
    if (option("gpus_per_cell") or 0) < 0:
        raise ValueError(f"gpus-per-cell must be 0 or more, got {option('gpus_per_cell')}")
    if option("ray"):
        check_address(option("ray"))
    results = Path(option("results"))
    if results.exists() and not results.is_dir():
        raise ValueError(f"results {str(results)!r} is no directory")
    file = f"records-{shard[0]}of{shard[1]}.jsonl" if shard else "records.jsonl"
    return Run(settings, results, results / file, shard)


def workbench_arguments(option: Callable, run: Run) -> dict:
    """Arguments of the workbench that hold for any process: paths are absolute."""
    settings = run.settings
    return {
        "model": absolute(settings["model"]),
        "calibration": absolute_sources(
            option("calibration") or settings["calibration"] or first_present(run, "calibration")
        ),
        "domains": tuple(absolute_sources(domain) for domain in settings["domains"]),
        "samples": settings["samples"],
        "calibration_seq_len": settings["seq_len"],
        "evaluation": evaluation(option("evaluation"), run),
        "windows": settings["windows"] or None,
        "other_windows": settings["other_windows"] or None,
        "other_texts_everywhere": settings["everywhere"],
        "compared_windows": settings["compared"] or None,
        "evaluation_seq_len": settings["seq_len"],
        "evaluation_windowing": option("windowing"),
        "evaluation_bos": option("bos"),
        "tasks": tuple(settings["tasks"].split(",")),
        "tasks_path": option("tasks_path") and option("tasks_path").resolve(),
        "task_limit": settings["limit"] or None,
        "seed": option("seed"),
        "dtype": option("dtype"),
        "device": option("device"),
    }


# those that decide which cells there are, and what a cell is
IDENTIFYING = ("profile", "ratios", "presets", "model", "calibration", "domains", "samples", "evaluation", "windows",
               "other_windows", "everywhere", "compared", "seq_len", "windowing", "bos", "tasks", "tasks_path", "limit",
               "seed", "device", "dtype")  # fmt: skip


def options_given(option: Callable, defaults: object) -> list[str]:
    """The words of those options that are not what `defaults` has as attributes."""
    words = []
    for name in IDENTIFYING:
        value = option(name)
        if value != getattr(defaults, name):
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def absolute(name: str) -> str:
    """A path of a file or directory, absolute; any other name as it is."""
    return os.path.abspath(name) if Path(name).exists() and name not in EVALUATION_TEXTS else name


def absolute_sources(calibration: str) -> str:
    """The texts that give windows in turn, with commas, and paths of files absolute."""
    return ",".join(name if name == SELF else absolute(name) for name in source_names(calibration))


def mixture(domain: str) -> str:
    """A domain's texts with commas between them, which stand between domains: it has "+" instead."""
    return domain if Path(domain).is_file() else domain.replace("+", ",")


def evaluation(given: str | None, run: Run) -> str:
    """The evaluation texts, with commas: those `given`, or the profile's that can be read, with notes on the others."""
    if given is not None:
        return ",".join(absolute(name) for name in text_names(given))
    main = first_present(run, "evaluation")
    others = [name for name in run.settings["others"] if name != main]
    for name, reason in unreadable(others).items():
        run.notes.append(f"{name!r} is no evaluation text: {reason}")
        others.remove(name)
    return ",".join([main, *others])


def first_present(run: Run, split: str) -> str:
    """The first of the profile's texts that can be read, with a note on those that cannot; the last one unread."""
    *preferred, last = run.settings["texts"]
    for name in preferred:
        try:
            load_text(name, split=split)
        except ValueError as error:
            run.notes.append(f"{split} text is not {name!r}: {error}")
        else:
            return name
    return last
