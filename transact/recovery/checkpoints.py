"""Checkpoints of a run, from which the same run goes on: whose they are, and which are whole."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import nn

from ..checkpoint import model_hash
from .schedule import Training

SETTINGS = "recovery.json"  # what the checkpoints of a run belong to


def settings_of(model: nn.Module, windows: torch.Tensor, training: Training, teacher: nn.Module | None) -> dict:
    """What must be the same for a run to go on from its checkpoints."""
    return {
        **asdict(training),
        "windows": list(windows.shape),
        "text": hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest()[:16],
        "weights": model_hash(model),
        "teacher": None if teacher is None else model_hash(teacher),
    }


def last_checkpoint(directory: Path, settings: dict) -> str | None:
    """The newest whole checkpoint of the run with these settings; the directory is made where there is none.

    Raises ValueError where it holds those of another run, or anything else. What a killed run left half-written is
    deleted, and what a run without any checkpoint was set to does not bind the next.
    """
    check_checkpoints(directory)
    directory.mkdir(parents=True, exist_ok=True)
    found = checkpoints_in(directory)
    whole = [path for path in found if _is_whole(path)]
    for path in set(found) - set(whole):
        shutil.rmtree(path, ignore_errors=True)  # another process may be at it
    settings_file = directory / SETTINGS
    if not whole:  # several processes may do this at the same time, with the same content
        partial = directory.parent / f".{directory.name}-{SETTINGS}-{os.getpid()}"
        partial.write_text(json.dumps(settings), encoding="utf-8")
        partial.replace(settings_file)
        return None
    try:
        kept = json.loads(settings_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(settings_file)!r} cannot be read ({error}): delete {str(directory)!r}") from error
    other = [f"{name} {kept.get(name)} (now {new})" for name, new in settings.items() if kept.get(name) != new]
    if other:
        raise ValueError(f"{str(directory)!r} holds checkpoints of another run: {', '.join(other)}; delete it first")
    return str(whole[-1])


def check_checkpoints(directory: Path, allowed: Sequence[str] = (SETTINGS, "checkpoint-*")) -> None:
    """Raise ValueError where a directory for checkpoints is a file or holds anything but such."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{str(directory)!r}, where checkpoints go, is a file: move it, or name another output")
    names = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
    others = [name for name in names if not any(fnmatch(name, pattern) for pattern in allowed)]
    if others:
        raise ValueError(
            f"{str(directory)!r}, where checkpoints go, holds something else ({others[0]}): move it, or name another "
            "output"
        )


def checkpoints_in(directory: Path) -> list[Path]:
    """What Trainer has saved there, the newest last."""
    return sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def _is_whole(checkpoint: Path) -> bool:
    try:  # Trainer writes its state last
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
