"""Checkpoint directories: a narrowed model, what was kept, and how it came about. Never half-written."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from .plan import Plan
from .widths import fraction_removed, widths_of

EXPORTED = "exported.json"  # marks a directory that `transact export` wrote
PLAN = Path("pruning", "plan.safetensors")  # in a folder: engines take all `*.safetensors` of a directory for weights
MARKS = {"gguf": (0, b"GGUF"), "executorch": (4, b"ET12")}  # of files: where in them, and which bytes


def check_destination(out: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """`out` as a path. Raises ValueError where it exists, or, with `overwrite`, where it is no checkpoint of ours."""
    out = Path(out)
    try:
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise ValueError(f"output {str(out)!r} exists and is not a directory")
        if out.exists() and not overwrite:
            raise ValueError(f"output directory {str(out)!r} exists; name another or pass --overwrite")
        if out.exists() and any(out.iterdir()) and not (out / "pruning.json").exists():
            raise ValueError(
                f"output directory {str(out)!r} holds no pruned checkpoint (pruning.json); it is not replaced"
            )
        if out.resolve() in (Path.cwd(), *Path.cwd().parents):
            raise ValueError(f"output directory {str(out)!r} is where this command runs; it is not replaced")
        _try_to_make(out)
    except OSError as error:
        raise ValueError(f"output directory {str(out)!r} cannot be made: {error.strerror}") from error
    return out


def _try_to_make(out: Path) -> None:
    """Raise OSError where nothing can be made beside `out`: trying is the only sure test."""
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    os.rmdir(tempfile.mkdtemp(dir=parent, prefix=f".partial-{out.name}-"))


def save_checkpoint(
    out: str | os.PathLike,
    model: PreTrainedModel,
    plan: Plan,
    pruning: dict,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """Write model, tokenizer, `pruning/plan.safetensors` and `pruning.json` into the directory `out`, all or nothing.

    Everything is written beside `out` and renamed at the end, so a killed run leaves at most a hidden `.partial-*`
    directory. Raises ValueError where `check_destination` does.
    """
    out = check_destination(out, overwrite=overwrite)
    with all_or_nothing(out) as partial:
        save_model(model, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        (partial / PLAN).parent.mkdir()
        save_file(plan.tensors(), partial / PLAN, metadata={"format": "pt"})
        (partial / "pruning.json").write_text(json.dumps(pruning, indent=2) + "\n", encoding="utf-8")
    return out


def save_model(model: PreTrainedModel, directory: Path) -> None:
    """Write configuration, weights and the generation settings, these as they are: see `plain_generation`."""
    with plain_generation(model) as settings:
        model.save_pretrained(directory)
    if settings is not None:
        settings.to_json_file(directory / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[GenerationConfig | None]:
    """The model can be saved meanwhile, without its own generation settings, which are yielded.

    transformers refuses to save some that it loads: many chat models have a temperature and do not sample.
    """
    settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield settings
    finally:
        model.generation_config = settings


@contextmanager
def all_or_nothing(out: Path, *, replace: bool = True) -> Iterator[Path]:
    """A path beside `out` to write a directory or file to; it takes `out`'s place when all went well.

    Unless it may `replace` what is there by then: another process may have been faster.
    """
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".partial-{out.name}-"))
    partial = holder / out.name
    try:
        yield partial
        for file in (partial, *partial.rglob("*")):  # some writers make files that only their owner can read
            file.chmod(0o755 if file.is_dir() else 0o644)
        if out.exists() and replace:
            out.rename(holder / f"replaced-{out.name}")
        if not out.exists():
            partial.rename(out)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def check_export_destination(out: str | os.PathLike, format: str, *, overwrite: bool = False) -> Path:
    """`out` as a path. Raises ValueError where it exists; with `overwrite`, where it is nothing that we exported."""
    out = Path(out)
    if out.exists() or out.is_symlink():
        is_ours = _begins_as(out, format) if format in MARKS else (out / EXPORTED).is_file()
        if not overwrite:
            raise ValueError(f"output {str(out)!r} exists; name another{' or pass --overwrite' if is_ours else ''}")
        if not is_ours or out.resolve() in (Path.cwd(), *Path.cwd().parents):
            raise ValueError(f"output {str(out)!r} is nothing that was exported: it is not replaced")
    try:
        _try_to_make(out)
    except OSError as error:
        raise ValueError(f"output {str(out)!r} cannot be made: {error.strerror}") from error
    return out


def _begins_as(path: Path, format: str) -> bool:
    """Whether it is a file of this format, by the mark in its first bytes."""
    place, mark = MARKS[format]
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(place + len(mark))[place:] == mark


# what a configuration class adds to the common one, but for what no figure depends on
NOT_COMPUTED_WITH = {"initializer_range", "use_cache", "pretraining_tp", *(f.name for f in fields(PreTrainedConfig))}


def model_hash(model: nn.Module) -> str:
    """SHA-256 of the configuration that is computed with, and of weights and buffers by name, in their dtype.

    Two models with the same hash compute the same. Paths, versions and the dtype that a file names are left out.
    """
    names = sorted({field.name for field in fields(model.config)} - NOT_COMPUTED_WITH)
    configuration = {"model_type": model.config.model_type} | {name: getattr(model.config, name) for name in names}
    numbers_alike = json.loads(json.dumps(configuration), parse_int=float)  # a base of 10000 is one of 10000.0
    digest = hashlib.sha256(json.dumps(numbers_alike, sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_plan(directory: str | os.PathLike) -> Plan:
    """The plan of a pruned checkpoint. Raises ValueError where the directory holds none."""
    places = (Path(directory) / PLAN, Path(directory) / PLAN.name)  # the second until version 0.3.0
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ValueError(f"{str(directory)!r} holds no {PLAN.as_posix()}: not a pruned checkpoint")
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors has an error of its own
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    return Plan.from_tensors(tensors)


def read_pruning(directory: str) -> dict:
    """What `transact prune` wrote beside a model. Raises ValueError where there is none or it is something else."""
    path = Path(directory) / "pruning.json"
    if not path.is_file():
        raise ValueError(f"{directory!r} is not a pruned checkpoint: it holds no pruning.json")
    try:
        pruning = json.loads(path.read_text(encoding="utf-8"))
        pruning["model"], [*pruning.get("recovery", [])]
        if not 0 <= pruning["fraction_removed"] <= 1:
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is not what `transact prune` writes") from error
    return pruning


def pruned_from(directory: str) -> str | None:
    """The model that a checkpoint was pruned from, where `pruning.json` says so."""
    said = _said_of_pruning(directory)
    return said and said["model"]


def fraction_removed_of(directory: str, config: PreTrainedConfig) -> float:
    """What a checkpoint lost, as `pruning.json` says, which knows the dense model; else as the configuration does."""
    if (said := _said_of_pruning(directory)) is not None:
        return said["fraction_removed"]
    return fraction_removed(config, widths_of(config))


def _said_of_pruning(directory: str) -> dict | None:
    """`pruning.json` where it says what was removed: callers of `save_checkpoint` state there what they like."""
    path = Path(directory) / "pruning.json"
    if path.is_file() and "fraction_removed" in path.read_text(encoding="utf-8"):
        return read_pruning(directory)
    return None
