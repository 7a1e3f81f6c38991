"""Zero-shot and few-shot accuracy by lm-evaluation-harness, used as a library and as it is."""

import difflib
import hashlib
import itertools
import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import nn
from transformers import PreTrainedTokenizerBase

from transact.entry import check_vocabulary, counted, in_one_line
from transact.models import hub_or_cache

from ..records import version_text
from .probes import PROBES, probes_directory

PAPER_TASKS = (
    "wikitext", "lambada_openai", "arc_easy", "boolq", "logiqa", "openbookqa", "piqa", "truthfulqa_mc1",
    "truthfulqa_mc2", "arc_challenge@25", "hellaswag@10", "winogrande@5", "triviaqa",
)  # fmt: skip
FEWSHOT_SEED = 1234  # lm-eval's own
PROFILES = {"probes": tuple(PROBES), "paper": PAPER_TASKS}


@dataclass(frozen=True)
class TaskResult:
    """What a model scores on a task: every metric by itself, over all items, with its standard error (or None).

    `scores` holds each item's score by metric, in the order of the items; `sha256` is of what the items ask.
    `version` is what the task's file says, "none" where it says nothing.
    `capability` is what a bundled probe tests, `chance` the accuracy of guessing where it is known.
    """

    version: str
    shots: int
    items: int
    sha256: str
    capability: str | None
    chance: float | None
    metrics: Mapping[str, float]
    standard_errors: Mapping[str, float | None]
    scores: Mapping[str, Sequence[float]]


class _CheckedModel(HFLM):
    """A model that refuses items longer than its context, which lm-eval would cut, and what it has no numbers for.

    That is tokens beyond its vocabulary, and losses that are not a number.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, progress: bool):
        # log-likelihoods of 16 bits would be told apart by eighths and quarters
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=32, softmax_dtype="float32")
        self.hide_progress = not progress

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        return super().loglikelihood(requests, disable_tqdm or self.hide_progress)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        for text, context, continuation in requests:
            self._check([*context, *continuation[:-1]], text)
            check_vocabulary(self.model.config, torch.tensor(continuation))
        results = super()._loglikelihood_tokens(requests, disable_tqdm or self.hide_progress, override_bs)
        for (text, *_), (loss, _) in zip(requests, results, strict=True):
            if math.isnan(loss):
                raise ValueError(f"the model's loss is not a number on the item {_shortened(text)}")
        return results

    def generate_until(self, requests, disable_tqdm: bool = False):
        for request in requests:
            # lm-eval cuts the prompt to make room for all that may be generated
            new = request.args[1].get("max_gen_toks", self.max_gen_toks)
            self._check(self.tok_encode(request.args[0]), request.args, new)
        return super().generate_until(requests, disable_tqdm or self.hide_progress)

    def _check(self, ids: Sequence[int], text: tuple | None, new: int = 0) -> None:
        check_vocabulary(self.model.config, torch.tensor(ids))
        tokens = len(ids) + new
        if tokens > self.max_length:
            raise ValueError(
                f"the item {_shortened(text)} takes {tokens} tokens, the model's context is {self.max_length}"
            )


def _shortened(text: tuple | None) -> str:
    """Enough of an item's text to find it."""
    text = " ".join(str(text[0] if text else "").split())
    return repr(text if len(text) <= 60 else f"{text[:40]} ... {text[-15:]}")


def resolve_tasks(names: Sequence[str], tasks_path: Path | None = None) -> dict[str, object]:
    """lm-eval's tasks by name: profiles (`probes`, `paper`), tags and `name@shots`; {name@shots: task}.

    Bundled probes and the tasks of the folder `tasks_path` need no hub; lm-eval's own tasks are looked up where a name
    is none of these. Raises ValueError, in one line, for a name that is not known (the nearest is named), a task file
    that cannot be read, or a data set that cannot be loaded.
    """
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ValueError(f"no tasks are named, allowed: {', '.join(PROFILES)}, or names of tasks")
    folders = [probes_directory()]
    if tasks_path is not None:
        check_task_files(tasks_path, taken=set(PROBES))
        folders.append(tasks_path)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)
    wanted = [name for entry in names for name in PROFILES.get(entry, (entry,))]
    if any(name.split("@")[0] not in manager.all_tasks for name in wanted):
        manager = TaskManager(include_path=[str(folder) for folder in folders])
    resolved = {}
    for entry in wanted:
        name, at, shots = entry.partition("@")
        if at and not shots.isdecimal():
            raise ValueError(f"task {entry!r}: shots must be a whole number, as in arc_challenge@25")
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, {*manager.all_tasks, *PROFILES}, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the bundled ones are {', '.join(PROBES)}"
            raise ValueError(f"unknown task {name!r}; {hint}")
        is_local = (manager.task_index[name].cfg or {}).get("dataset_path") in ("json", "csv", "parquet", "text")
        try:
            with nullcontext() if is_local else hub_or_cache():
                tasks = manager.load([name])["tasks"]
        except Exception as error:  # data sets and task files raise whatever they like
            hint = "data sets of the hub need the network: without it name bundled probes or local tasks"
            if is_local:
                cause = error.__cause__ or error
                hint = f"its data are local: are the files there, with an item a line? {in_one_line(cause)}"
            raise ValueError(f"task {name!r} cannot be loaded ({in_one_line(error)}); {hint}") from error
        for task_name, task in tasks.items():
            if not task.aggregation():
                raise ValueError(f"task {task_name!r} measures nothing: it names no metrics")
            if shots:
                _check_shots(task, int(shots))
                task.set_config("num_fewshot", int(shots))
            elif task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            resolved[f"{task_name}@{shots}" if shots else task_name] = task
    return resolved


def check_task_files(folder: Path, *, taken: set[str] = frozenset()) -> None:
    """Raise ValueError unless `folder` holds task files, each readable as YAML with a name that is not `taken`."""
    files = sorted(folder.rglob("*.yaml")) if folder.is_dir() else []
    if not files:
        raise ValueError(f"tasks-path {str(folder)!r} is no folder with task files (*.yaml)")

    class Loader(yaml.SafeLoader):
        """Reads lm-eval's `!function` tags as plain text: nothing is run here."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: str(node.value))
    taken = set(taken)
    for file in files:
        try:
            config = yaml.load(file.read_text(encoding="utf-8"), Loader)  # a SafeLoader
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"task file {str(file)!r} cannot be read: {in_one_line(error)}") from error
        if not isinstance(config, dict) or not {"task", "group", "include", "class"} & config.keys():
            raise ValueError(f"task file {str(file)!r} is no task: it has neither 'task' nor 'group'")
        if isinstance(name := config.get("task"), str):
            if name in taken:
                raise ValueError(f"task file {str(file)!r}: there is another task {name!r}, give it a name of its own")
            taken.add(name)


def _check_shots(task, shots: int) -> None:
    examples = task.fewshot_docs() or ()
    available = len(examples if hasattr(examples, "__len__") else list(examples))
    if shots >= available:
        raise ValueError(
            f"task {task.task_name!r} has {counted(available, 'example')} to show, {counted(shots, 'shot')} asked for"
        )


def evaluate_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, object],
    *,
    limit: int | None = None,
    progress: bool = False,
) -> Iterator[tuple[str, TaskResult]]:
    """Name and result of one task after the other, on the first `limit` items of each.

    Few-shot examples are drawn with lm-eval's own seeds. Raises ValueError, naming the task, where it has no items, an
    item does not fit the model's context, or a loss is not a number.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    checked = _CheckedModel(model.eval(), tokenizer, progress=progress)
    for name, task in tasks.items():
        try:
            result = _evaluate(checked, task, limit)
        except torch.OutOfMemoryError:  # of the device, not of the task
            raise
        except Exception as error:  # a task file may do anything with its items
            raise ValueError(f"task {name!r}: {in_one_line(error)}") from error
        yield name, result


def _evaluate(model: HFLM, task, limit: int | None) -> TaskResult:
    if not len(task.eval_docs):
        raise ValueError("it has no items")
    for number, doc in enumerate(itertools.islice(task.eval_docs, limit)):
        try:
            task.doc_to_text(doc), task.doc_to_target(doc)
            if task.OUTPUT_TYPE == "multiple_choice":
                _check_answer(task, doc)
        except Exception as error:  # templates may do anything with an item's columns
            raise ValueError(f"item {number}: {in_one_line(error)}") from error
    name = task.task_name
    task.set_fewshot_seed(FEWSHOT_SEED)  # each model sees the same examples, whichever was evaluated before it
    loaded = {"tasks": {name: task}, "groups": {}, "group_map": {}}
    outcome = evaluate(model, loaded, limit=limit, bootstrap_iters=0)
    figures, samples = outcome["results"][name], outcome["samples"][name]
    metrics, standard_errors, scores = {}, {}, {}
    for key, value in figures.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr"):
            continue
        label = metric if kind == "none" else f"{metric} ({kind})"
        metrics[label], standard_errors[label] = float(value), None
        items = [sample[metric] for sample in samples if sample["filter"] == kind]
        if all(isinstance(item, int | float) for item in items):  # not so for sums that lm-eval weighs by length
            scores[label] = tuple(float(item) for item in items)
            if len(items) > 1:
                error = statistics.stdev(scores[label]) / len(items) ** 0.5
                standard_errors[label] = error * value if metric == "perplexity" else error  # exp of the mean
    metadata = task.config.metadata if isinstance(task.config.metadata, dict) else {}
    capability, chance = metadata.get("capability"), metadata.get("chance")  # task files may say anything there
    hashes = sorted({(s["doc_id"], s["doc_hash"], s["prompt_hash"], s["target_hash"]) for s in samples})
    return TaskResult(
        version=version_text(None if task.VERSION == "Yaml" else task.VERSION),  # lm-eval's word for none
        shots=int(outcome["n-shot"][name]),
        items=len(hashes),
        sha256=hashlib.sha256(repr(hashes).encode()).hexdigest(),
        capability=capability if isinstance(capability, str) else None,
        chance=chance if isinstance(chance, int | float) and 0 <= chance <= 1 else None,
        metrics=metrics,
        standard_errors=standard_errors,
        scores=scores,
    )


def _check_answer(task, doc: dict) -> None:
    """Raise ValueError unless the answer is a choice, or several, by index or text; lm-eval scores others as wrong."""
    choices = task.doc_to_choice(doc)
    # where contexts are the choices (WinoGrande), the answer is what `doc_to_text` gives
    target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError(f"its choices must be texts, got {choices!r}")
    for answer in target if isinstance(target, list) else [target]:
        is_index = isinstance(answer, int) and 0 <= answer < len(choices)
        if not is_index and answer not in choices:
            raise ValueError(f"its answer {answer!r} is none of its {len(choices)} choices")
