"""One model, one calibration, many cases: what every ablation measures on."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

import transact

from .environment import code_hash, environment
from .memory import kv_bytes_per_token, peak_memory_mib, reset_peak_memory, weight_bytes
from .perplexity import evaluation_windows, measure_perplexity
from .records import Case, Record


def model_hash(model: nn.Module) -> str:
    """SHA-256 of the weights by name, in their dtype: two models with the same hash compute the same."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def recipe_fields(recipe: transact.Recipe) -> dict:
    """The recipe's fields as a case holds them."""
    return asdict(recipe) | {"modules": "+".join(recipe.modules)}


def recipe_of(case: Case) -> transact.Recipe:
    """The recipe of a case."""
    names = [field.name for field in fields(transact.Recipe)]
    return transact.Recipe(
        **{name: getattr(case, name) for name in names} | {"modules": tuple(case.modules.split("+"))}
    )


def method_of(case: Case) -> str:
    """What tables call a case: dense, its preset if it has one, or its criterion (that of the paper's preset)."""
    if case.criterion == "dense":
        return "dense"
    recipe = recipe_of(case)
    presets = [name for name, preset in transact.PRESETS.items() if preset == recipe]
    return presets[0] if presets else case.criterion


class Workbench:
    """A model with its windows of text. The statistics are made on first use and serve every case."""

    def __init__(
        self,
        model: str,
        *,
        calibration: str = "embedded",
        samples: int = 64,
        calibration_seq_len: int = 256,
        evaluation: str = "embedded",
        windows: int = 48,
        evaluation_seq_len: int = 256,
        evaluation_windowing: str = "blocks",
        evaluation_bos: bool = False,
        tasks: Sequence[str] = (),
        tasks_path: Path | None = None,
        task_limit: int | None = None,
        seed: int = 0,
        dtype: str = "auto",
        device: str = "auto",
    ):
        dtype = fast_dtype(device) if dtype == "auto" else dtype
        self.dense, self.tokenizer = transact.load_model(model, dtype=dtype, device=device)
        transact.check_prunable(self.dense)
        calibration_text = transact.load_text(calibration, split="calibration")
        evaluation_text = transact.load_text(evaluation, split="evaluation")
        context = self.dense.config.max_position_embeddings
        if max(calibration_seq_len, evaluation_seq_len) > context:
            longest = max(calibration_seq_len, evaluation_seq_len)
            raise ValueError(f"seq-len {longest} is longer than the model's context of {context}")
        self.calibration_windows = transact.cut_windows(
            transact.tokenise(calibration_text, self.tokenizer), length=calibration_seq_len, count=samples, seed=seed
        )
        self.evaluation_windows = evaluation_windows(
            evaluation_text, self.tokenizer, length=evaluation_seq_len, count=windows, windowing=evaluation_windowing,
            bos=evaluation_bos,
        )  # fmt: skip
        self.task_names, self.tasks_path, self.task_limit = tuple(tasks), tasks_path, task_limit
        self.dense_case = Case(
            model=Path(model).name,
            model_hash=model_hash(self.dense),
            **recipe_fields(transact.Recipe()) | {"criterion": "dense"},
            ratio=0.0,
            kv_ratio=None,
            seed=0,
            calibration_text=None,
            calibration_sha256=None,
            calibration_samples=0,
            calibration_seq_len=0,
            evaluation_text=evaluation_text.name,
            evaluation_sha256=evaluation_text.sha256,
            evaluation_windows=windows,
            evaluation_seq_len=evaluation_seq_len,
            evaluation_windowing=evaluation_windowing,
            evaluation_bos=evaluation_bos,
            tasks="",
            task_limit=None,
            dtype=dtype,
            device=self.dense.device.type,
            code=code_hash(),
        )
        self._statistics: dict[tuple, tuple[transact.Statistics, float]] = {}
        self.calibrated_fields = {
            "seed": seed,
            "calibration_text": calibration_text.name,
            "calibration_sha256": calibration_text.sha256,
            "calibration_samples": samples,
            "calibration_seq_len": calibration_seq_len,
        }

    def case(self, recipe: str | transact.Recipe, ratio: float, *, kv_ratio: float | None = None) -> Case:
        """The case of a recipe, or of a preset by name, at a ratio; one that takes no text does not name any."""
        recipe = transact.recipe_by_name(recipe) if isinstance(recipe, str) else recipe
        text = self.calibrated_fields if recipe.needs_text() else {}
        if recipe.criterion == "random":
            text = {**text, "seed": self.calibrated_fields["seed"]}
        return replace(self.dense_case, **recipe_fields(recipe), ratio=ratio, kv_ratio=kv_ratio, **text)

    def with_tasks(self, case: Case) -> Case:
        """The same case with the workbench's tasks measured as well."""
        return replace(case, tasks="+".join(self.tasks), task_limit=self.task_limit)

    @cached_property
    def tasks(self) -> dict[str, object]:
        """The tasks that the workbench was made with, loaded on first use."""
        from .zero_shot import resolve_tasks  # lm-eval takes seconds to import

        return resolve_tasks(self.task_names, self.tasks_path)

    def statistics(self, recipe: transact.Recipe) -> tuple[transact.Statistics, float]:
        """Statistics with all that the recipe needs, made once, and the seconds that took."""
        key = recipe.needs_moments(), recipe.gradients()
        if key not in self._statistics:
            start = time.perf_counter()
            statistics = transact.calibrate(
                self.dense, self.calibration_windows, second_moments=key[0], gradients=key[1], progress=True
            )
            self._statistics[key] = statistics, time.perf_counter() - start
        return self._statistics[key]

    def environment(self) -> dict[str, str | int]:
        return environment(self.dense.device)

    def measure(self, case: Case) -> Record:
        """The record of one case: prune, then measure. Errors are the caller's to record."""
        reset_peak_memory(self.dense.device)
        if case.criterion == "dense":
            return self.measure_model(self.dense, case, {})
        recipe = recipe_of(case)
        seconds: dict[str, float] = {}
        statistics = windows = None
        if recipe.needs_text():
            windows = self.calibration_windows
            statistics, seconds["calibrate_s"] = self.statistics(recipe)
        start = time.perf_counter()
        pruned = transact.prune(
            self.dense, windows, recipe=recipe, ratio=case.ratio, kv_ratio=case.kv_ratio, statistics=statistics,
            seed=case.seed, progress=True,
        )  # fmt: skip
        seconds["prune_s"] = time.perf_counter() - start
        return self.measure_model(pruned.model, case, seconds)

    def measure_model(self, model: nn.Module, case: Case, seconds: Mapping[str, float]) -> Record:
        """The record of a model: quality on the evaluation text, and sizes. Peak memory counts the dense model too."""
        start = time.perf_counter()
        quality = measure_perplexity(model, self.evaluation_windows, progress=True)
        seconds = {**seconds, "perplexity_s": time.perf_counter() - start}
        tasks = {}
        if case.tasks:
            from .zero_shot import evaluate_tasks

            start = time.perf_counter()
            tasks = dict(evaluate_tasks(model, self.tokenizer, self.tasks, limit=case.task_limit, progress=True))
            seconds["tasks_s"] = time.perf_counter() - start
        widths = transact.widths_of(model.config)
        metrics = {
            "perplexity": quality.perplexity,
            "bits_per_byte": quality.bits_per_byte,
            "loss_nats": quality.loss,
            "tokens": quality.tokens,
            "fraction_removed": transact.fraction_removed(self.dense.config, widths),
            "kv_fraction_removed": transact.kv_fraction_removed(self.dense.config, widths),
            "parameters": model.num_parameters(),
            "weight_bytes": weight_bytes(model),
            "kv_bytes_per_token": kv_bytes_per_token(model),
            "peak_memory_mib": peak_memory_mib(model.device),
            **seconds,
        }
        standard_errors = {
            "loss_nats": quality.standard_error,
            "perplexity": quality.perplexity * quality.standard_error,  # delta method: perplexity is exp(loss)
            "bits_per_byte": quality.bits_per_byte * quality.standard_error / quality.loss,
        }
        return Record(
            case=case,
            method=method_of(case),
            metrics=metrics,
            standard_errors=standard_errors,
            environment=self.environment(),
            losses=quality.losses,
            widths=tuple(asdict(layer) for layer in widths),
            tasks={name: asdict(result) for name, result in tasks.items()},
        )
