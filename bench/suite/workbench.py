"""One model, one calibration, many cases: what every ablation measures on."""

import copy
import hashlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

import transact
from transact.checkpoint import model_hash
from transact.depth import layers_to_drop
from transact.pipeline import check_depth_task, check_sparsity, check_task
from transact.sparsity import zero_fraction
from transact.texts import SELF, Source, Text, calibration_sources, mixed, source_names

from ..efficiency.memory import kv_bytes_per_token, peak_memory_mib, reset_peak_memory, weight_bytes
from ..efficiency.quantise import check_format, packed_weight_bytes, quantised, torchao_version
from ..efficiency.semi_structured import semi_structured
from ..efficiency.speed import PREFIX, decode_rate, speedup_metrics
from ..environment import code_hash, environment, fast_dtype
from ..quality.texts import load_evaluation_texts, windows_of
from ..records import Case, Record
from .calibrations import Calibrations
from .cases import ids_hash, is_plain_preset, method_of, pruning_of, recipe_fields, recipe_of, untrained_of
from .qualities import Qualities
from .training import PEAKS, trainer_of


def plain_text(calibration: str) -> str | None:
    """The name of the one text that `calibration` is; None for the model's own samples and for mixtures."""
    names = set(source_names(calibration))
    return names.pop() if len(names) == 1 and SELF not in names else None


LEAST_TRAINED, MOST_TRAINED = 8, 1024  # windows that are trained on where there is no end of text


class Workbench:
    """A model with its windows of text. The statistics are made on first use and serve every case of the same windows.

    The statistics, the pruned model and its quality that were made last are kept: cases in the order of
    `suite.grid.in_order` make each once. `domains` are other calibration texts that cases may name. Each is a text, the
    model's own samples (`self`), or several in turn with commas between them, as for `transact.calibration_windows`.

    `evaluation` names texts with commas between them: `windows` of the first, on which everything is measured, and
    `other_windows` of each other, for presets or, with `other_texts_everywhere`, for every case. On `compared_windows`
    of each text predictions are compared with the dense model's (None: all).
    """

    def __init__(
        self,
        model: str,
        *,
        calibration: str = "embedded",
        domains: Sequence[str] = (),
        samples: int = 64,
        calibration_seq_len: int = 256,
        evaluation: str = "embedded",
        windows: int | None = 48,
        evaluation_seq_len: int = 256,
        evaluation_windowing: str = "blocks",
        evaluation_bos: bool = False,
        other_windows: int | None = 8,
        other_texts_everywhere: bool = False,
        compared_windows: int | None = 8,
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
        evaluation_texts = load_evaluation_texts(evaluation)
        context = self.dense.config.max_position_embeddings
        if max(calibration_seq_len, evaluation_seq_len) > context:
            longest = max(calibration_seq_len, evaluation_seq_len)
            raise ValueError(f"seq-len {longest} is longer than the model's context of {context}")
        self.calibration = calibration, samples, calibration_seq_len
        self.domains, self.seed = tuple(domains), seed
        self._texts: dict[str, tuple[Text, torch.Tensor]] = {}
        self.ids_hashes: dict[str, str] = {}
        self._sources: dict[tuple[str, int, int], list[Source]] = {}
        self._identities: dict[tuple[str, int, int], tuple[str, str, str]] = {}
        self.calibration_windows(*self.calibration)  # what is wrong with the text is known at once
        counts = windows, *[other_windows] * (len(evaluation_texts) - 1)
        self.evaluation_texts = [
            (text, windows_of(text, self.tokenizer, length=evaluation_seq_len, count=count,
                              windowing=evaluation_windowing, bos=evaluation_bos))
            for text, count in zip(evaluation_texts, counts, strict=True)
        ]  # fmt: skip
        evaluation_text, self.evaluation_windows = self.evaluation_texts[0]
        if compared_windows is not None and compared_windows < 1:
            raise ValueError(f"compared-windows must be at least 1, got {compared_windows}")
        self.other_texts_everywhere = other_texts_everywhere
        self.task_names, self.tasks_path, self.task_limit = tuple(tasks), tasks_path, task_limit
        dense_case = Case(
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
            evaluation_windows=len(self.evaluation_windows.ids),
            evaluation_seq_len=evaluation_seq_len,
            evaluation_windowing=evaluation_windowing,
            evaluation_bos=evaluation_bos,
            tasks="",
            task_limit=None,
            dtype=dtype,
            device=self.dense.device.type,
            code=code_hash(),
            evaluation_ids=ids_hash(self.evaluation_windows.ids, self.tokenizer),
            compared_windows=compared_windows or 0,
        )
        others = [text for text, _ in self.evaluation_texts[1:]]
        self._others = {
            "other_texts": "+".join(text.name for text in others),
            "other_sha256": "+".join(text.sha256 for text in others),
            "other_windows": (other_windows or 0) if others else 0,
        }
        self.dense_case = self.with_other_texts(dense_case)
        self._calibrations = Calibrations(self.dense)
        self._pruned: tuple[Case, nn.Module, dict[str, float], list[dict[str, float]]] | None = None
        self._trained: tuple[Case, nn.Module, dict[str, float], list[dict[str, float]]] | None = None
        self._qualities = Qualities(self.dense, self.evaluation_texts, compared_windows or 0)

    def text(self, name: str) -> tuple[Text, torch.Tensor]:
        """A calibration text and its tokens, read once. Raises ValueError where it cannot be read."""
        if name not in self._texts:
            text = transact.load_text(name, split="calibration")
            self._texts[name] = text, transact.tokenise(text, self.tokenizer)
        return self._texts[name]

    def ids_of(self, name: str) -> str:
        """The hash of a calibration text's token ids, made once."""
        if name not in self.ids_hashes:
            self.ids_hashes[name] = ids_hash(self.text(name)[1], self.tokenizer)
        return self.ids_hashes[name]

    def sources(self, name: str, samples: int, seq_len: int) -> list[Source]:
        """The sources of calibration windows (samples, seq_len), chosen by the seed, made once.

        Raises ValueError where one is missing, too short, or the model's own samples are refused.
        """
        given = name, samples, seq_len
        if given not in self._sources:
            try:
                self._sources[given] = calibration_sources(
                    name, self.dense, self.tokenizer, count=samples, length=seq_len, seed=self.seed, progress=True,
                    read=self.text,
                )  # fmt: skip
            except ValueError as error:
                raise ValueError(f"calibration {error}") from error
        return self._sources[given]

    def calibration_windows(self, name: str, samples: int, seq_len: int) -> torch.Tensor:
        """Windows (samples, seq_len) of a calibration text, see `sources`."""
        return mixed(self.sources(name, samples, seq_len), seed=self.seed)

    def identity(self, name: str, samples: int, seq_len: int) -> tuple[str, str, str]:
        """What records know a calibration text by: its name, its SHA-256, and a hash of token ids.

        A text is known as a whole; samples and mixtures by the windows that they give. Found once.
        """
        given = name, samples, seq_len
        if given not in self._identities:
            self._identities[given] = self._identity(*given)
        return self._identities[given]

    def _identity(self, name: str, samples: int, seq_len: int) -> tuple[str, str, str]:
        if (plain := plain_text(name)) is not None:
            text = self.text(plain)[0]
            return text.name, text.sha256, self.ids_of(plain)
        sources = self.sources(name, samples, seq_len)
        counts = " ".join(f"{source.sha256}:{len(source.windows)}" for source in sources)
        sha256 = sources[0].sha256 if len(sources) == 1 else hashlib.sha256(counts.encode()).hexdigest()
        ids = ids_hash(self.calibration_windows(name, samples, seq_len), self.tokenizer)
        return " + ".join(source.name for source in sources), sha256, ids

    def case(
        self,
        recipe: str | transact.Recipe,
        ratio: float = 0.0,
        *,
        kv_ratio: float | None = None,
        mha_dim: int | None = None,
        mlp_dim: int | None = None,
        only_layer: int | None = None,
        head_multiple: int | None = None,
        mlp_multiple: int | None = None,
        speedup: float | None = None,
        budget: str = "",
        decode_tokens: int = 0,
        quantisation: str = "",
        recovery: str = "",
        recovery_tokens: int = 0,
        recovery_frugal: bool = False,
        calibration: str | None = None,
        samples: int | None = None,
        seq_len: int | None = None,
        everywhere: bool = False,
    ) -> Case:
        """The case of a recipe, or of a preset by name; one that takes no text does not name any.

        See `Case` for what the widths mean. With `everywhere` it is measured on the other evaluation texts, as presets
        are. `calibration`, `samples` and `seq_len` are the workbench's own where they are left out. `speedup` is asked
        for instead of a ratio, by a `budget` of `transact.speed_goal`, at the context that decoding is timed at. Raises
        ValueError, before anything is measured, for what this model or text cannot give.
        """
        recipe = transact.recipe_by_name(recipe) if isinstance(recipe, str) else recipe
        recipe.check()
        fields = {}
        if recipe.needs_text():
            given = calibration, samples, seq_len
            name, samples, seq_len = (
                own if value is None else value for own, value in zip(self.calibration, given, strict=True)
            )
            if seq_len > self.dense.config.max_position_embeddings:
                context = self.dense.config.max_position_embeddings
                raise ValueError(f"seq-len {seq_len} is longer than the model's context of {context}")
            self.calibration_windows(name, samples, seq_len)
            text, sha256, ids = self.identity(name, samples, seq_len)
            fields = {"seed": self.seed, "calibration_text": text, "calibration_sha256": sha256,
                      "calibration_samples": samples, "calibration_seq_len": seq_len,
                      "calibration_ids": ids}  # fmt: skip
        if recipe.criterion == "random":
            fields["seed"] = self.seed
        case = replace(
            self.dense_case, **recipe_fields(recipe), ratio=ratio, kv_ratio=kv_ratio, mha_dim=mha_dim,
            mlp_dim=mlp_dim, only_layer=only_layer, head_multiple=head_multiple, mlp_multiple=mlp_multiple,
            speedup=speedup, budget=budget, decode_tokens=decode_tokens, **fields,
        )  # fmt: skip
        if speedup is not None:
            check_task(self.dense, recipe, kv_ratio=kv_ratio, speedup=speedup)
        if recipe.depth != "none":
            named = only_layer, mha_dim, mlp_dim, head_multiple, mlp_multiple
            check_depth_task(recipe, kv_ratio, any(width is not None for width in named))
            layers_to_drop(self.dense.config, ratio)
        check_sparsity(
            self.dense.config, recipe, ratio=ratio, kv_ratio=kv_ratio, widths=self.widths(case), speedup=speedup
        )
        case = self.with_other_texts(case, everywhere=everywhere)
        case = self.with_recovery(case, recovery, recovery_tokens, frugal=recovery_frugal)
        return self.with_quantisation(case, quantisation)

    def with_recovery(self, case: Case, way: str, tokens: int, *, frugal: bool = False) -> Case:
        """The same case trained ("": not) on so many tokens of the calibration text, at the default learning rate.

        With several shots, a part of the budget after each. `frugal`: in as little memory as the way can do with.
        Raises ValueError for an unknown way.
        """
        if not way:
            return case
        training = transact.Training(tokens=tokens, way=way)
        training.check()
        rate = training.with_rate(self.dense.config.hidden_size, self.calibration[2]).learning_rate
        _, sha256, ids = self.identity(*self._trained_on(tokens))
        return replace(case, recovery=way, recovery_tokens=tokens, recovery_sha256=sha256, recovery_ids=ids,
                       learning_rate=rate, recovery_frugal=frugal)  # fmt: skip

    def _trained_on(self, tokens: int) -> tuple[str, int, int]:
        """The calibration text and its windows that a budget of training needs where there is no end of text."""
        name, _, length = self.calibration
        return name, min(max(math.ceil(tokens / length), LEAST_TRAINED), MOST_TRAINED), length

    def _trainer(self, case: Case, history: list[dict[str, float]], peaks: dict[str, float]) -> Callable | None:
        """What `transact.prune` calls after each shot to train the case's model; None where it is not trained.

        `history` receives the loss and perplexity of the evaluation windows on the way, by tokens trained in all.
        `peaks` receives the most memory held before and in training.
        """
        if not case.recovery:
            return None
        name, count, length = self._trained_on(case.recovery_tokens)
        if (plain := plain_text(name)) is not None:
            windows = transact.cut_windows(self.text(plain)[1], length=length)
        else:
            windows = self.calibration_windows(name, count, length)
        whole = transact.Training(tokens=case.recovery_tokens, way=case.recovery, learning_rate=case.learning_rate,
                                  device_batch=1 if case.recovery_frugal else 4, seed=self.seed)  # fmt: skip
        if case.recovery_frugal and not whole.is_zeroth_order():
            whole = replace(whole, gradient_checkpointing=True)
        teacher = self.dense if whole.needs_teacher() else None
        return trainer_of(whole, case.shots, windows, teacher, self.evaluation_windows, history, peaks)

    def with_quantisation(self, case: Case, name: str) -> Case:
        """The same case with linear weights in a format ("": the dtype). Raises ValueError where it cannot be had."""
        if name:
            check_format(name)
        return replace(case, quantisation=name)

    def with_other_texts(self, case: Case, *, everywhere: bool = False) -> Case:
        """The same case measured on the other evaluation texts too, or on none of them; see `Workbench`."""
        measured = everywhere or self.other_texts_everywhere or is_plain_preset(case)
        return replace(case, **self._others if measured else {name: type(v)() for name, v in self._others.items()})

    def with_tasks(self, case: Case) -> Case:
        """The same case with the workbench's tasks measured as well."""
        return replace(case, tasks="+".join(self.tasks), task_limit=self.task_limit)

    @cached_property
    def tasks(self) -> dict[str, object]:
        """The tasks that the workbench was made with, loaded on first use."""
        from ..quality.zero_shot import resolve_tasks  # lm-eval takes seconds to import

        return resolve_tasks(self.task_names, self.tasks_path)

    def widths(self, case: Case) -> tuple[transact.Widths, ...] | None:
        """The widths that a case names; None where scores decide, or whole layers go.

        Raises ValueError for widths out of reach.
        """
        config, recipe = self.dense.config, recipe_of(case)
        narrowed = {"granularity": recipe.granularity, "modules": recipe.modules}
        if case.only_layer is not None:
            return transact.widths_of_one_layer(config, case.only_layer, case.ratio, **narrowed)
        if case.mha_dim is not None or case.mlp_dim is not None:
            return transact.widths_by_name(
                config, mha_dim=case.mha_dim, mlp_dim=case.mlp_dim, granularity=recipe.granularity
            )
        if recipe.allocation == "uniform" and recipe.depth == "none":
            return transact.uniform_widths(
                config, case.ratio, kv_ratio=case.kv_ratio, head_multiple=case.head_multiple,
                mlp_multiple=case.mlp_multiple, **narrowed,
            )  # fmt: skip
        return None

    def windows_of(self, case: Case) -> torch.Tensor:
        """The calibration windows of a case. Raises ValueError where none of the workbench's texts is the case's."""
        names = dict.fromkeys((self.calibration[0], *(name for name, _, _ in self._sources), *self.domains))
        for name in names:
            given = name, case.calibration_samples, case.calibration_seq_len
            try:
                sha256 = self.identity(*given)[1]
            except ValueError:  # it has no such windows: the case is of another
                continue
            if sha256 == case.calibration_sha256:
                return self.calibration_windows(*given)
        raise ValueError(
            f"no calibration text here is {case.calibration_text!r} with SHA-256 {case.calibration_sha256}; here are "
            f"{'; '.join(names)}"
        )

    def environment(self) -> dict[str, str | int]:
        return environment(self.dense.device)

    def measure(self, case: Case) -> Record:
        """The record of one case: prune, quantise, then measure. Errors are the caller's to record."""
        start = time.perf_counter()
        reset_peak_memory(self.dense.device)
        model, seconds, history = self.pruned(case)
        if case.quantisation:
            quantising = time.perf_counter()
            model = quantised(model, case.quantisation)
            seconds = {**seconds, "quantise_s": time.perf_counter() - quantising}
        record = self.measure_model(model, seconds, case)
        metrics = {**record.metrics, "cell_s": time.perf_counter() - start}
        return replace(record, metrics=metrics, history=tuple(history))

    def pruned(self, case: Case) -> tuple[nn.Module, dict[str, float], list[dict[str, float]]]:
        """The model of a case before it is quantised, figures (seconds, peaks, zeros) and history of making it.

        The last one is kept, and the last before training: ways of training begin with the same model.
        """
        if case.criterion == "dense":
            return self.dense, {}, []
        made, before = pruning_of(case), untrained_of(case)
        if self._trained is not None and self._trained[0] == made:
            return self._trained[1:]
        self._trained = None  # before the next one takes memory
        if self._pruned is None or self._pruned[0] != before:
            self._pruned = None
            self._pruned = before, *self._prune(before)
        if made == before:
            return self._pruned[1:]
        _, model, seconds, _ = self._pruned
        start, history, peaks = time.perf_counter(), [], {}
        model = self._trainer(made, history, peaks)(copy.deepcopy(model), 1)
        seconds = {**seconds, **peaks, "prune_s": seconds["prune_s"] + time.perf_counter() - start}
        self._trained = made, model, seconds, history
        return self._trained[1:]

    def _prune(self, case: Case) -> tuple[nn.Module, dict[str, float], list[dict[str, float]]]:
        recipe, seconds, history, peaks = recipe_of(case), {}, [], {}
        statistics = windows = None
        if recipe.needs_text():
            windows = self.windows_of(case)
        if recipe.needs_statistics():
            statistics, seconds["calibrate_s"] = self._calibrations.statistics(windows, recipe)
        start = time.perf_counter()
        goal = None
        if case.speedup is not None:
            goal = transact.speed_goal(
                self.dense, case.speedup, context=PREFIX, modules=recipe.modules,
                budget=case.budget, drop_modules=recipe.drop_modules, progress=True,
            )  # fmt: skip
        pruned = transact.prune(
            self.dense, windows, recipe=recipe, ratio=None if goal else case.ratio, kv_ratio=case.kv_ratio,
            widths=self.widths(case), speedup=goal,
            statistics=statistics, seed=case.seed, train=self._trainer(case, history, peaks), progress=True,
        )  # fmt: skip
        seconds["prune_s"] = time.perf_counter() - start
        if case.sparsity != "none":
            seconds["zeros"] = zero_fraction(pruned.model)
        return pruned.model, seconds | peaks, history

    def _as_timed(self, model: nn.Module, case: Case) -> nn.Module:
        """The model, or where kernels skip the zeros of a sparse one, a copy for these; else why not is said."""
        if case.sparsity == "none" or case.quantisation:
            return model
        try:
            return semi_structured(model)
        except ValueError as error:
            print(error, file=sys.stderr)
            return model

    def measure_model(self, model: nn.Module, seconds: Mapping[str, float], case: Case) -> Record:
        """The record of a model: quality on the evaluation texts, and sizes. Peak memory counts the dense model too."""
        figures, measuring = self._qualities.figures(model, case)
        seconds, tasks = {**seconds, **measuring}, {}
        if case.tasks:
            from ..quality.zero_shot import evaluate_tasks

            start = time.perf_counter()
            tasks = dict(evaluate_tasks(model, self.tokenizer, self.tasks, limit=case.task_limit, progress=True))
            seconds["tasks_s"] = time.perf_counter() - start
        widths = transact.widths_of(model.config)
        metrics = figures["metrics"]
        metrics |= {
            "fraction_removed": transact.fraction_removed(self.dense.config, widths),
            "kv_fraction_removed": transact.kv_fraction_removed(self.dense.config, widths),
            "parameters": model.num_parameters(),
            "weight_bytes": weight_bytes(model),
            "kv_bytes_per_token": kv_bytes_per_token(model),
            "peak_memory_mib": max(peak_memory_mib(model.device), *(seconds.get(peak, 0) for peak in PEAKS)),
            **seconds,
        }
        environment = self.environment()
        if case.quantisation:
            metrics["packed_weight_bytes"] = packed_weight_bytes(model)
            environment = {**environment, "torchao": torchao_version()}
        if case.decode_tokens:
            model = self._as_timed(model, case)
            reference = None if case.criterion == "dense" and not case.quantisation else self.dense
            rate, error, ratios = decode_rate(model, case.decode_tokens, reference=reference)
            metrics["decode_tokens_per_s"], figures["standard_errors"]["decode_tokens_per_s"] = rate, error
            metrics |= speedup_metrics(ratios)
        return Record(
            case=case,
            method=method_of(case),
            environment=environment,
            widths=tuple(asdict(layer) for layer in widths),
            tasks={name: asdict(result) for name, result in tasks.items()},
            **figures,
        )
