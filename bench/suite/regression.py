"""Has pruning become worse, or better, than the baseline that is kept in the repository?

A baseline is a text file to be reviewed: perplexity, parameters, the loss of each window, and how near predictions are
to the dense model's, by preset and ratio, on the embedded model and on text that every installation of the pinned
packages has.
"""

import json
import math
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.special import ndtr, stdtrit

from transact import PRESETS

from ..quality.significance import FEW, paired_difference
from ..records import Case, Record, finite
from .cases import method_of
from .workbench import Workbench

BASELINE = Path(__file__).parents[2] / "reports" / "baseline.json"
CELLS = (("best", 0.2), ("best", 0.5), ("transact", 0.3), ("transact-released", 0.3), ("flap", 0.3), ("wanda-sp", 0.3))
SETTINGS = {"calibration": "docstrings", "samples": 32, "evaluation": "docstrings", "windows": 24, "dtype": "float32"}
LEAST_TOLERANCE, MOST_TOLERANCE = 0.01, 0.1  # of perplexity as a fraction, of KL in nats, of shares of tokens
SCORES = ("losses", "kl_nats", "top1_agreement", "greedy_agreement")  # of each window or continuation


@dataclass(frozen=True)
class Nearness:
    """How near a cell is to the dense model, before and now: nats of KL, or a share of tokens."""

    name: str
    before: float
    now: float
    tolerance: float

    @property
    def complaint(self) -> str:
        """What is wrong, or nothing."""
        change = self.now - self.before
        if abs(change) <= self.tolerance:
            return ""
        is_worse = (change > 0) == (self.name == "kl_nats")
        return f"{self.name} worse" if is_worse else f"{self.name} better: bless it"


@dataclass(frozen=True)
class Verdict:
    """One cell against the baseline: `change` and `tolerance` are fractions of perplexity (None: no float holds it)."""

    cell: str
    perplexity_before: float | None
    perplexity: float | None
    change: float
    tolerance: float
    parameters_before: int
    parameters: int
    nearness: tuple[Nearness, ...]

    @property
    def complaint(self) -> str:
        """What is wrong, or nothing."""
        if self.parameters != self.parameters_before:
            return f"parameters were {self.parameters_before:,}"
        if abs(self.change) > self.tolerance:
            return "worse" if self.change > 0 else "better: bless it"
        return next(filter(None, (one.complaint for one in self.nearness)), "")


def measure_cells(
    model: str = "smollm2-135m",
    *,
    cells: Sequence[tuple[str, float]] = CELLS,
    settings: Mapping = SETTINGS,
    device: str = "auto",
    baseline: Mapping | None = None,
) -> list[Record]:
    """Records of the dense model and of every cell, a preset and a ratio.

    Raises ValueError, before anything is measured, where a `baseline` is of another model, text or cells.
    """
    bench = Workbench(model, **settings, device=device)
    cases = [bench.dense_case, *(bench.case(PRESETS[preset], ratio) for preset, ratio in cells)]
    if baseline is not None:
        check_comparable(baseline, cases)
    return [bench.measure(case) for case in cases]


def _header(cases: Sequence[Case]) -> dict:
    """What all cells share."""
    case = next((case for case in cases if case.calibration_sha256), cases[0])
    kept = ("model", "model_hash", "calibration_text", "calibration_sha256", "calibration_ids", "calibration_samples",
            "evaluation_text", "evaluation_sha256", "evaluation_ids", "evaluation_windows", "evaluation_seq_len",
            "compared_windows", "dtype")  # fmt: skip
    return {name: getattr(case, name) for name in kept}


def check_comparable(baseline: Mapping, cases: Sequence[Case]) -> None:
    """Raise ValueError where model, text or cells are not the baseline's, or one window leaves no verdict."""
    if cases[0].evaluation_windows < 2:
        raise ValueError(f"no verdict on {cases[0].evaluation_windows} window, at least 2 are needed")
    for name, value in _header(cases).items():
        if baseline.get(name) != value:
            raise ValueError(
                f"this run cannot be compared with the baseline: {name.replace('_', ' ')} is {value}, "
                f"the baseline has {baseline.get(name)} (packages as pinned in constraints.txt?)"
            )
    cells = [_cell(case) for case in cases]
    if list(baseline["cells"]) != cells:
        raise ValueError(f"the baseline has the cells {', '.join(baseline['cells'])}; run: {', '.join(cells)}")


def baseline_of(records: Sequence[Record]) -> dict:
    """What a baseline file holds of the records."""
    return {
        **_header([record.case for record in records]),
        "environment": records[0].environment,
        "cells": {
            _cell(record.case): {
                "perplexity": finite(record.metrics["perplexity"]),
                "parameters": record.metrics["parameters"],
                "losses": list(record.losses),
                "kl_nats": list(record.texts[0]["kl_nats"]),
                "top1_agreement": list(record.texts[0]["top1_agreement"]),
                "greedy_agreement": list(record.greedy_agreement),
            }
            for record in records
        },
    }


def _cell(case: Case) -> str:
    method = method_of(case)
    return method if method == "dense" else f"{method} {case.ratio:g}"


def compare(baseline: Mapping, records: Sequence[Record]) -> list[Verdict]:
    """A verdict on every cell of the baseline.

    Perplexity may move by 3 standard errors of the paired differences of the windows' losses (of fewer than ten windows
    by as many as are passed no more often, by Student's t), or by 1 %, whichever is more, and never by more than 10 %;
    so may KL divergence in nats, and agreements as shares of tokens. Raises ValueError as `check_comparable` does.
    """
    check_comparable(baseline, [record.case for record in records])
    now = baseline_of(records)
    verdicts = []
    for name, cell in now["cells"].items():
        before = baseline["cells"][name]
        difference = paired_difference(cell["losses"], before["losses"])
        error = math.expm1(min(errors_allowed(len(cell["losses"])) * difference.standard_error, 50))
        verdicts.append(
            Verdict(
                cell=name,
                perplexity_before=before["perplexity"],
                perplexity=cell["perplexity"],
                change=math.expm1(min(difference.mean, 50)),
                tolerance=min(max(error, LEAST_TOLERANCE), MOST_TOLERANCE),
                parameters_before=before["parameters"],
                parameters=cell["parameters"],
                nearness=tuple(_nearness(score, cell[score], before[score]) for score in SCORES[1:]),
            )
        )
    return verdicts


def errors_allowed(windows: int) -> float:
    """Standard errors that chance passes once in 370 times: 3, or more of few windows."""
    return 3.0 if windows >= FEW else float(stdtrit(windows - 1, ndtr(3.0)))


def _nearness(name: str, now: Sequence[float], before: Sequence[float]) -> Nearness:
    difference = paired_difference(now, before)
    error = errors_allowed(len(now)) * difference.standard_error if len(now) > 1 else 0.0
    tolerance = min(max(error, LEAST_TOLERANCE), MOST_TOLERANCE)
    return Nearness(name, statistics.fmean(before), statistics.fmean(now), tolerance)


def table(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as lines of text."""
    lines = [
        f"{'cell':24} {'baseline':>10} {'now':>10} {'change':>9} {'tolerance':>9}  "
        f"{'KL nats':>15} {'top-1 agreement':>15} {'greedy the same':>15}  verdict"
    ]
    for v in verdicts:
        lines.append(
            f"{v.cell:24} {_number(v.perplexity_before)} {_number(v.perplexity)} "
            f"{f'{v.change:+9.2%}' if v.change < 10 else '  > +999%'} {v.tolerance:9.2%}  "
            + "".join(f"{one.before:6.3f} -> {one.now:<5.3f} " for one in v.nearness)
            + f" {v.complaint or 'as before'}"
        )
    return "\n".join(lines)


def _number(perplexity: float | None) -> str:
    return f"{'> 1e308':>10}" if perplexity is None else f"{perplexity:10.3f}"


def read_baseline(path: Path) -> dict:
    """Raises ValueError where there is none or it cannot be read."""
    try:
        baseline = json.loads(path.read_text(encoding="utf-8"))
        for name, cell in baseline["cells"].items():
            cell["perplexity"], cell["parameters"], cell["losses"][0]
            if missing := [score for score in SCORES if not cell.get(score)]:
                raise ValueError(f"cell {name!r} has no {missing[0]}: --bless writes a new baseline")
        return baseline
    except FileNotFoundError as error:
        raise ValueError(f"there is no baseline {str(path)!r}; --bless writes one") from error
    except (OSError, ValueError, TypeError, KeyError, LookupError, AttributeError) as error:
        raise ValueError(f"baseline {str(path)!r} cannot be read: {type(error).__name__}: {error}") from error


def write_baseline(path: Path, records: Sequence[Record]) -> None:
    """One line for each cell, so that a review shows what moved; all or nothing."""
    baseline = baseline_of(records)
    cells = ",\n".join(f"    {json.dumps(name)}: {json.dumps(cell)}" for name, cell in baseline.pop("cells").items())
    head = json.dumps(baseline, indent=2).removesuffix("\n}")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(f'{head},\n  "cells": {{\n{cells}\n  }}\n}}\n', encoding="utf-8")
    partial.replace(path)


def check_clean_tree(path: Path) -> None:
    """Raise ValueError unless `path` lies in a git working tree in which nothing else is changed."""
    command = ["git", "-C", str(path.parent), "status", "--porcelain", "--", ":/", f":(exclude){path.name}"]
    try:
        status = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"a baseline is blessed in a git working tree, {str(path.parent)!r} is none") from error
    if status:
        changed = status.split()[1]
        raise ValueError(f"the tree has changes that are not committed ({changed} ...): commit them, then bless")
