"""Pruning by a recipe: calibrate, score, plan, prune and compensate, once or in several shots."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .allocate import (
    allowed_widths,
    global_widths,
    parameter_prices,
    searched_widths,
    shared_pairs,
    spread,
    weighed,
    widths_within,
)
from .calibration import Statistics, iterate_statistics, set_aside
from .compensate import compensate_by_bias, compensate_on_dense_inputs, compensate_on_pruned_inputs
from .criteria import criterion_by_name
from .depth import (
    clustered_layers,
    fold_factors,
    fold_map,
    layers_to_drop,
    least_influential,
    linear_map,
    nearest_run,
    warn_of_whole_layers,
    without_layers,
)
from .devices import resolve_device
from .engines import check_held, engine_by_name
from .entry import check_in_one_place, check_seed, check_trainable, checked_windows, undisturbed
from .gradients import loss_gradients
from .latency import compared
from .measured import measured_scores
from .modeling_transact import TransActForCausalLM
from .plan import Plan, select
from .prune import apply_plan, check_computed, check_prunable, narrowed_config
from .recipe import PRESETS, Recipe, recipe_by_name
from .room import check_room_to_prune, pruned_home
from .scores import LayerScores
from .sparsity import check_sparse_widths, make_sparse
from .speedup import SpeedGoal, check_in_reach_of_a_clock, check_speedup, speed_goal, widths_at_speed
from .timing import Ratio
from .whitelist import check_exportable
from .widths import (
    Widths,
    check_modules,
    check_ratio,
    check_widths,
    dense_widths,
    fraction_removed,
    head_dim_of,
    uniform_widths,
    widths_after_shot,
    widths_of,
)

DEFAULT_RATIO = 0.2


@dataclass
class Pruned:
    """A narrowed model, its plan in terms of the dense one, seconds of each stage and the ridges of the refit.

    Where whole layers go it is a stock model of the dense one's class. `speed`: how many times as fast as the dense
    model it was measured to be, where a speed-up was asked for.
    """

    model: TransActForCausalLM | PreTrainedModel
    plan: Plan
    seconds: dict[str, float] = field(default_factory=dict)
    ridges: list[dict[str, float | None]] = field(default_factory=list)
    speed: Ratio | None = None


@contextmanager
def stage(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add what passes meanwhile to the seconds of that name."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def prune(
    dense: nn.Module,
    windows: torch.Tensor | None = None,
    *,
    recipe: str | Recipe = "best",
    ratio: float | None = None,
    kv_ratio: float | None = None,
    widths: Sequence[Widths] | None = None,
    speedup: float | SpeedGoal | None = None,
    statistics: Statistics | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    train: Callable[[TransActForCausalLM, int], TransActForCausalLM] | None = None,
    progress: bool = False,
) -> Pruned:
    """Prune a model of the Llama family by a recipe, or the name of a preset.

    `windows` (samples, length) of token ids, of any integers or lists of rows, are what it is calibrated on; they may
    be left out where the recipe needs no text. `ratio` is the fraction removed of the dense decoder layers' linear
    parameters (0.2), `kv_ratio` the least fraction removed of the KV bytes per token; `widths` names them instead.
    `speedup` asks for a model so many times as fast instead of a ratio, at decoding one sequence with 512 tokens of
    context; a goal of `speed_goal` says otherwise, or serves several prunings. The result's `speed` is then measured.
    `statistics`, if there already, serve the first shot: those of the windows that the recipe scores on
    (`Recipe.scored`). `train` is called after each shot with the narrowed model and the shot's number from 1 on, and
    gives the model that the next shot prunes. A `device` computes one block at a time there, for models larger than it.
    What keeps everything (a ratio of 0) is the dense model, bit for bit. The result is in the dense model's mode, or in
    that in which `train` left it. It lies with the dense model, or, where a CUDA device does not hold both beside what
    a single shot without training or a speed-up needs, in host memory: then a UserWarning says so.

    Raises ValueError for what cannot be pruned, budgets out of reach, and settings that exclude each other.
    """
    recipe = recipe_by_name(recipe) if isinstance(recipe, str) else recipe
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe must be a Recipe or one of {', '.join(PRESETS)}, got {recipe!r}")
    check_seed(seed)
    device = None if device is None else resolve_device(str(device))
    widths = None if widths is None else tuple(widths)
    check_in_one_place(dense, device)
    if speedup is not None and device is not None:
        raise ValueError(
            "speedup is measured of a model that runs as a whole, not block by block on a device: drop one"
        )
    check_task(dense, recipe, ratio=ratio, kv_ratio=kv_ratio, widths=widths, speedup=speedup)
    return prune_checked(
        dense, windows, recipe=recipe, ratio=ratio, kv_ratio=kv_ratio, widths=widths, speedup=speedup,
        statistics=statistics, seed=seed, device=device, train=train, progress=progress,
    )  # fmt: skip


def prune_checked(
    dense: nn.Module,
    windows: torch.Tensor | None = None,
    *,
    recipe: Recipe,
    ratio: float | None = None,
    kv_ratio: float | None = None,
    widths: tuple[Widths, ...] | None = None,
    speedup: float | SpeedGoal | None = None,
    statistics: Statistics | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    train: Callable[[TransActForCausalLM, int], TransActForCausalLM] | None = None,
    progress: bool = False,
) -> Pruned:
    """What `prune` gives, of a task that `check_task` has passed: that runs the model, and is not done twice."""
    if recipe.depth != "none" and statistics is not None:
        raise ValueError(f"statistics are for narrowing, depth {recipe.depth!r} drops whole layers: leave them out")
    if recipe.depth != "none" and windows is None:
        raise ValueError(f"depth {recipe.depth!r} needs windows of text")
    if recipe.needs_text() and windows is None:
        raise ValueError(
            f"criterion {recipe.criterion}, compensation {recipe.compensation} and sparsity {recipe.sparsity} need "
            "windows of text"
        )
    ratio = DEFAULT_RATIO if ratio is None else ratio
    if speedup is None and widths is None and not ratio and not kv_ratio:
        widths = dense_widths(dense.config)
    if statistics is not None:
        _check_statistics(statistics, recipe, dense)
    with undisturbed(dense):
        if windows is not None:
            windows = checked_windows(dense, windows)
        if recipe.depth != "none":
            result = _in_depth(dense, windows, recipe, ratio, device, train, progress)
        else:
            home = None
            if recipe.needs_text() and statistics is None and widths != dense_widths(dense.config):
                kept = 0.0 if speedup is not None else 1 - ratio
                if widths is not None:
                    kept = 1 - fraction_removed(dense.config, widths)
                if device is None and speedup is None and train is None and recipe.shots == 1:
                    home = pruned_home(dense, recipe, windows, kept)
                check_room_to_prune(dense, recipe, windows.numel(), kept, device, home)
            criterion = criterion_by_name(recipe.criterion, seed=seed, drops=recipe.drop_modules)
            goal = speedup
            if speedup is not None and not isinstance(speedup, SpeedGoal):
                goal = speed_goal(
                    dense, speedup, modules=recipe.modules, drop_modules=recipe.drop_modules, progress=progress
                )
            result = _in_shots(
                dense, windows, recipe, criterion, ratio, kv_ratio, widths, goal, statistics, device, home, train,
                progress,
            )  # fmt: skip
    if train is None:
        result.model.train(dense.training)
    return result


def check_task(
    dense: nn.Module,
    recipe: Recipe,
    *,
    ratio: float | None = None,
    kv_ratio: float | None = None,
    widths: Sequence[Widths] | None = None,
    speedup: float | SpeedGoal | None = None,
) -> None:
    """Raise ValueError where this model cannot be pruned so, whatever it is calibrated on: see `prune`."""
    recipe.check()
    check_ratio("ratio", ratio)
    check_ratio("kv-ratio", kv_ratio)
    check_depth_task(recipe, kv_ratio, widths is not None)
    if speedup is not None:
        check_speed_task(recipe, speedup, ratio, widths)
    ratio = DEFAULT_RATIO if ratio is None else ratio
    check_prunable(dense)
    if (format := engine_by_name(recipe.engine).format) is not None:  # what it is for comes after it
        check_exportable(dense.config, format)
    check_modules(dense.config, recipe.modules, recipe.granularity)
    if recipe.depth != "none":
        layers_to_drop(dense.config, ratio)
        check_computed(dense)
        return
    if recipe.gradients():
        check_trainable(dense)
    if speedup is not None:
        check_in_reach_of_a_clock(dense)
        if isinstance(speedup, SpeedGoal):
            speedup.check(dense, recipe.modules, recipe.drop_modules)
        widths_within(dense.config, _placeholder_scores(dense), parameter_prices(dense.config), math.inf,
                      kv_ratio=kv_ratio, modules=recipe.modules, drop_modules=recipe.drop_modules)  # fmt: skip
    elif widths is not None:
        check_widths(dense.config, widths, drop_modules=recipe.drop_modules)
        narrowed_config(dense.config, widths, rope=recipe.rope)
        check_held(recipe.engine, widths)
    elif ratio or kv_ratio:  # whether widths can be found does not hang on scores
        with undisturbed(dense):
            _target_widths(recipe, dense, dense, _placeholder_scores(dense), ratio=ratio, kv_ratio=kv_ratio)
    else:
        check_held(recipe.engine, dense_widths(dense.config))
    check_sparsity(dense.config, recipe, ratio=ratio, kv_ratio=kv_ratio, widths=widths, speedup=speedup)
    check_computed(dense)


def check_depth_task(recipe: Recipe, kv_ratio: float | None, by_widths: bool) -> None:
    """Raise ValueError for a recipe that drops whole layers beside what only narrowing can meet."""
    if recipe.depth == "none":
        return
    if by_widths:
        raise ValueError(f"widths are for narrowing, depth {recipe.depth!r} drops whole layers: give a ratio")
    if kv_ratio is not None:
        raise ValueError(f"kv-ratio is for narrowing, depth {recipe.depth!r} drops whole layers: leave it out")


def check_sparsity(
    config: PretrainedConfig,
    recipe: Recipe,
    *,
    ratio: float | None = None,
    kv_ratio: float | None = None,
    widths: Sequence[Widths] | None = None,
    speedup: float | SpeedGoal | None = None,
) -> None:
    """Raise ValueError where a sparsity does not go with some widths that the recipe may find."""
    if recipe.sparsity == "none":
        return
    if widths is None and speedup is None and not ratio and not kv_ratio:
        widths = dense_widths(config)
    if widths is None and recipe.allocation == "uniform":
        widths = uniform_widths(
            config, ratio, kv_ratio=kv_ratio, granularity=recipe.granularity, modules=recipe.modules
        )
    if widths is None:  # searched: each may become any
        dense = dense_widths(config)[0]
        _, *narrower = allowed_widths(config, dense, recipe.modules, engine_by_name(recipe.engine))
        widths = [replace(dense, v_head_dim=values, mlp=mlp) for values, mlp in itertools.product(*narrower)]
    check_sparse_widths(recipe.sparsity, config, widths)


def check_speed_task(
    recipe: Recipe, speedup: float | SpeedGoal, ratio: float | None, widths: Sequence[Widths] | None
) -> None:
    """Raise ValueError for a speed-up beside another budget, or with a recipe that does not search widths."""
    check_speedup(speedup.speedup if isinstance(speedup, SpeedGoal) else speedup)
    if ratio is not None or widths is not None:
        raise ValueError("speedup and ratio or widths both say how much goes: give one of them")
    if recipe.depth != "none":
        raise ValueError(f"a speedup is reached by widths that are searched, not by depth {recipe.depth!r}")
    if recipe.allocation != "searched":
        raise ValueError(f"a speedup is reached by widths that are searched, not by allocation {recipe.allocation!r}")
    if recipe.engine != "transformers":
        raise ValueError(f"a speedup is measured in transformers, not in engine {recipe.engine!r}: give one of them")
    if recipe.shots > 1:
        raise ValueError(f"a speedup is reached in one shot, got shots {recipe.shots}")


def _check_statistics(statistics: Statistics, recipe: Recipe, dense: nn.Module) -> None:
    """Raise ValueError unless they are of this model and hold what the recipe needs of them."""
    sizes = [(len(layer.key), layer.key.shape[1], layer.values.shape[1], len(layer.mlp)) for layer in statistics.layers]
    if sizes != [tuple(vars(width).values()) for width in dense_widths(dense.config)]:
        raise ValueError("statistics are not of this model: take them of it by calibrate")
    layer = statistics.layers[0]
    if layer.attention_moments is None and recipe.needs_moments():
        raise ValueError("statistics hold no second moments: calibrate with second_moments=True")
    if layer.gradients is None and recipe.gradients():
        raise ValueError(f"statistics hold no gradients: calibrate with gradients={recipe.gradients()!r}")


def _in_shots(
    dense: nn.Module,
    windows: torch.Tensor | None,
    recipe: Recipe,
    criterion: object,
    ratio: float,
    kv_ratio: float | None,
    widths: Sequence[Widths] | None,
    goal: SpeedGoal | None,
    statistics: Statistics | None,
    device: torch.device | None,
    home: torch.device | None,
    train: Callable[[TransActForCausalLM, int], TransActForCausalLM] | None,
    progress: bool,
) -> Pruned:
    """`home`: where the narrowed model lies, if not with the dense one."""
    result = Pruned(dense, None)
    keeps_all = widths is not None and tuple(widths) == dense_widths(dense.config)
    scored = None if windows is None else recipe.scored(windows, dense.config)
    for shots_left in range(recipe.shots, 0, -1):
        before = result.model.eval()
        with stage(result.seconds, "calibrate and score"):
            if keeps_all:
                scores, layers = _placeholder_scores(before), []
            else:
                scores, layers = _scores(before, scored, recipe, criterion, statistics, device, progress)
            if not engine_by_name(recipe.engine).own_pairs:
                scores = shared_pairs(scores)
        with stage(result.seconds, "plan"):
            tokens = None if scored is None else scored.numel()
            if statistics is not None:
                tokens = statistics.tokens
            find_widths = partial(
                _target_widths, recipe, before, dense, ratio=ratio, kv_ratio=kv_ratio, goal=goal, tokens=tokens
            )
            corrected = scores
            if recipe.measures(device) and not widths:
                corrected = measured_scores(
                    before, scores, layers, windows, find_widths, rounds=recipe.measurements, home=home,
                    progress=progress,
                )  # fmt: skip
            if goal is not None:
                target = widths_at_speed(dense, goal, partial(find_widths, corrected), progress=progress)
            else:
                target = widths or find_widths(corrected)
            current = widths_of(before.config)
            wanted = [widths_after_shot(*pair, shots_left) for pair in zip(current, target, strict=True)]
            nothing_goes = wanted == [*current]
            plan = select(_placeholder_scores(before) if nothing_goes else scores, wanted, rope=recipe.rope)
            if recipe.compensation not in ("bias", "dense"):
                layers = []  # large, and of use no more
        with stage(result.seconds, "prune"):
            result.model = apply_plan(before, plan, rope=recipe.rope, home=home)
        if home is not None:
            device = before.device  # from now on it computes one block of the narrowed model at a time
        with stage(result.seconds, "compensate"):
            if not nothing_goes:
                result.ridges = _compensate(recipe, result.model, before, plan, layers, windows, device, progress)
        if train is not None:
            with stage(result.seconds, "train"):
                result.model = train(result.model, recipe.shots - shots_left + 1)
        result.plan = plan.after(result.plan, head_dim_of(dense.config)) if result.plan else plan
        statistics = None
    if recipe.sparsity != "none":
        with stage(result.seconds, "sparsify"):
            make_sparse(result.model, recipe.sparsity, windows, device=device, progress=progress)
    if goal is not None:  # of what is handed over: trained, and with its zeros
        with stage(result.seconds, "time"):
            result.speed = compared(dense, result.model, goal.workload, progress=progress)
    return result


def _in_depth(
    dense: nn.Module,
    windows: torch.Tensor,
    recipe: Recipe,
    ratio: float,
    device: torch.device | None,
    train: Callable[[PreTrainedModel, int], PreTrainedModel] | None,
    progress: bool,
) -> Pruned:
    """Whole layers dropped, once."""
    seconds, options = {}, {"device": device, "progress": progress}
    count, layers = layers_to_drop(dense.config, ratio), range(dense.config.num_hidden_layers)
    warn_of_whole_layers(dense.config, ratio)
    dropped, ridges = {}, []
    with stage(seconds, "calibrate and score"):
        if count and recipe.depth == "influence":
            repair = recipe.compensation == "magnitude"
            dropped = least_influential(dense, windows, count, repair=repair, **options)
        elif count and recipe.depth == "run":
            dropped = nearest_run(dense, windows, count, **options)
        elif count:
            dropped = set(layers) - set(clustered_layers(dense, windows, count, **options))
    with stage(seconds, "plan"):
        kept = tuple(layer for layer in layers if layer not in dropped)
        plan = select([_placeholder_scores(dense)[layer] for layer in kept], dense_widths(dense.config)[: len(kept)])
        plan = replace(plan, kept_layers=kept)
    with stage(seconds, "prune"):
        model = without_layers(dense, kept)
    with stage(seconds, "compensate"):
        if count and recipe.compensation == "magnitude":
            fold_factors(model, kept, dropped)
        if count and recipe.compensation == "linear":
            fit = linear_map(dense, windows, dropped, ridge=recipe.ridge, **options)
            fold_map(model.model.layers[dropped.start - 1].mlp.down_proj, fit.weight)
            ridges = [{"down_proj": fit.ridge} if layer == dropped.start - 1 else {} for layer in kept]
    if train is not None:
        with stage(seconds, "train"):
            model = train(model, 1)
    return Pruned(model, plan, seconds, ridges)


def _scores(
    model: nn.Module,
    windows: torch.Tensor | None,
    recipe: Recipe,
    criterion: object,
    statistics: Statistics | None,
    device: torch.device | None,
    progress: bool,
) -> tuple[list[LayerScores], list]:
    """Scores of all layers, and their statistics where the compensation needs them (they are large)."""
    layers, is_given = model.model.layers, statistics is not None
    if not recipe.needs_text():
        return [criterion.score(layer, index, None) for index, layer in enumerate(layers)], []
    if is_given:
        streamed = iter(statistics.layers)
    else:
        gradients = None
        if recipe.gradients():
            gradients = loss_gradients(model, windows, of=recipe.gradients(), device=device, progress=progress)
        streamed = iterate_statistics(
            model, windows, second_moments=recipe.needs_moments(), gradients=gradients and _taken(gradients),
            device=device, progress=progress,
        )  # fmt: skip
    scores, kept = [], []
    for layer_statistics in streamed:
        index = len(scores)
        scores.append(criterion.score(layers[index], index, layer_statistics))
        if (parts := recipe.parts_kept(device)) is not None:
            kept.append(layer_statistics if is_given else set_aside(layer_statistics, parts))
        del layer_statistics  # before the next layer's are summed; `enumerate` and `zip` would hold them as well
    return scores, kept


def _taken(items: list) -> Iterator:
    """The items in order; the list loses each of them."""
    items.reverse()
    while items:
        yield items.pop()


def _placeholder_scores(dense: nn.Module) -> list[LayerScores]:
    """Scores on the CPU, rising with the index and cumulative, of the shapes that the criteria give."""
    return [
        LayerScores(
            torch.arange(width.qk_head_dim // 2.0).repeat(width.kv_heads, 1),
            torch.arange(float(width.v_head_dim)).repeat(width.kv_heads, 1),
            torch.arange(float(width.mlp)),
            torch.arange(float(width.kv_heads)),
        )
        for width in widths_of(dense.config)
    ]


def _target_widths(
    recipe: Recipe,
    model: nn.Module,
    dense: nn.Module,
    scores: list[LayerScores],
    budget: float | None = None,
    *,
    ratio: float,
    kv_ratio: float | None,
    goal: SpeedGoal | None = None,
    tokens: int | None = None,
) -> tuple[Widths, ...]:
    """The widths that the ratio asks for, or, with a goal, that cost its budget (or another one).

    `tokens`: how many the scores are of; None where they only stand in for scores.
    """
    if recipe.allocation == "searched":
        scores = scores if tokens is None else weighed(dense.config, scores, tokens)
        options = {"kv_ratio": kv_ratio, "modules": recipe.modules, "drop_modules": recipe.drop_modules}
        if goal is not None:
            budget = goal.budget if budget is None else budget
            widths = widths_within(model.config, scores, goal.prices, budget, **options)
        else:
            widths = searched_widths(model.config, scores, ratio, engine=recipe.engine, **options)
        return widths if tokens is None else spread(model.config, widths, scores, engine=recipe.engine)
    if recipe.allocation == "global":
        return global_widths(model.config, scores, ratio, kv_ratio=kv_ratio)
    return uniform_widths(
        dense.config, ratio, kv_ratio=kv_ratio, granularity=recipe.granularity, modules=recipe.modules
    )


def _compensate(
    recipe: Recipe,
    narrowed: nn.Module,
    before: nn.Module,
    plan: Plan,
    statistics: list,
    windows: torch.Tensor | None,
    device: torch.device | None,
    progress: bool,
) -> list[dict[str, float | None]]:
    if recipe.compensation == "bias":
        compensate_by_bias(narrowed, before, plan, statistics)
    if recipe.compensation == "dense":
        return compensate_on_dense_inputs(
            narrowed, before, plan, statistics, bias=recipe.output_bias, ridge=recipe.ridge
        )
    if recipe.compensation == "pruned":
        return compensate_on_pruned_inputs(
            narrowed, before, windows, bias=recipe.output_bias, ridge=recipe.ridge, device=device, progress=progress
        )
    return []
