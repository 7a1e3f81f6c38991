"""`transact prune`: prune a model into a checkpoint directory, training after each shot where it is asked for."""

import argparse
import math
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers

from .. import __version__
from ..checkpoint import check_destination, save_checkpoint
from ..criteria import CRITERIA
from ..depth import DEPTHS
from ..devices import resolve_device
from ..engines import ENGINES
from ..entry import check_seed, counted
from ..export import check_exportable, check_tokenizer
from ..latency import TOKENS, Workload
from ..models import EMBEDDED_MODEL, lasting_name, load_model, read_config
from ..pipeline import DEFAULT_RATIO, Pruned, check_depth_task, check_speed_task, check_task, prune_checked, stage
from ..recipe import ALLOCATIONS, COMPENSATIONS, PRESETS, ROPES, Recipe, recipe_by_name
from ..recovery.held_out import held_out_loss
from ..sparsity import SPARSITIES, zero_fraction
from ..speedup import DEFAULT_CONTEXT, SpeedGoal, check_speedup, speed_goal
from ..texts import DEFAULT_CALIBRATION, SELF, TEXTS, Source, calibration_sources, mixed, source_names
from ..timing import Ratio
from ..widths import (
    GRANULARITIES,
    MODULES,
    check_ratio,
    fraction_removed,
    kv_elements_per_token,
    kv_fraction_removed,
    linear_parameters,
    widths_by_name,
    widths_of,
)
from .parser import add_model_options, add_output_options, add_subcommand, tell
from .training import ShotTraining, add_training_options, checkpoints_of, print_recovery, training_of

RECIPE_OPTIONS = ("criterion", "granularity", "modules", "allocation", "engine", "compensation", "rope", "shots",
                  "ridge", "measurements", "depth", "sparsity")  # fmt: skip
DEFAULT_SAMPLES, DEFAULT_SEQ_LEN = 128, 512


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = add_subcommand(commands, "prune", run, "prune a model into a checkpoint directory", "MODEL OUT")
    parser.add_argument("model", help=f"{EMBEDDED_MODEL} (embedded), a checkpoint directory or a Hugging Face id")
    parser.add_argument("out", help="directory to write; must not exist unless --overwrite is given")
    much = parser.add_argument_group("how much")
    much.add_argument(
        "--ratio", type=float, help=f"fraction of the decoder layers' linear parameters to remove ({DEFAULT_RATIO})"
    )
    much.add_argument(
        "--kv-ratio",
        metavar="RATIO",
        type=float,
        help="least fraction of the KV cache's bytes to remove as well (none)",
    )
    much.add_argument(
        "--mha-dim", metavar="N", type=int, help="instead of a ratio: attention heads x kept dimensions per head"
    )
    much.add_argument("--mlp-dim", metavar="N", type=int, help="instead of a ratio: kept dimensions of every MLP")
    much.add_argument(
        "--speedup",
        metavar="TIMES",
        type=float,
        help="instead of a ratio: how many times as fast, measured on this device",
    )
    much.add_argument("--speed-of", metavar="NAME", help=f"what is to be so fast: {', '.join(TOKENS)} ({TOKENS[0]})")
    much.add_argument("--speed-batch", metavar="N", type=int, help="of so many sequences (1)")
    much.add_argument(
        "--speed-context", metavar="N", type=int, help=f"with so many tokens each ({DEFAULT_CONTEXT}, or all that fit)"
    )
    what = parser.add_argument_group(
        "what goes, and what makes up for it", "a preset, and what is to differ from it (nothing)"
    )
    what.add_argument(
        "--preset",
        metavar="NAME",
        help=f"one of {', '.join(PRESETS)} (best; transact where a criterion, granularity, rope or depth is named)",
    )
    what.add_argument("--criterion", metavar="NAME", help=f"one of {', '.join(CRITERIA)}")
    what.add_argument("--granularity", metavar="NAME", help=f"what attention loses: {', '.join(GRANULARITIES)}")
    what.add_argument("--modules", metavar="NAMES", help=f"what may be narrowed, with commas: {','.join(MODULES)}")
    what.add_argument("--rope", metavar="NAME", help=f"what queries and keys keep: {', '.join(ROPES)}")
    what.add_argument(
        "--depth", metavar="NAME", help=f"instead of narrowing, whole layers go: {', '.join(('none', *DEPTHS))} (none)"
    )
    what.add_argument("--allocation", metavar="NAME", help=f"how widths are found: {', '.join(ALLOCATIONS)}")
    what.add_argument(
        "--drop-modules", action="store_true",
        help="searched widths may be 0: attention or an MLP goes altogether where that loses less",
    )  # fmt: skip
    what.add_argument("--measurements", metavar="N", type=int, help="rounds that correct searched widths (best: 3)")
    what.add_argument(
        "--for", dest="engine", metavar="ENGINE", help=f"what is to hold the model: {', '.join(ENGINES)} (transformers)"
    )
    what.add_argument("--compensation", metavar="NAME", help=f"what makes up for the loss: {', '.join(COMPENSATIONS)}")
    what.add_argument("--ridge", type=float, help="the one ridge of all least squares (the best on held-out tokens)")
    what.add_argument("--output-bias", action="store_true", help="least squares with an intercept")
    what.add_argument(
        "--sparsity", metavar="NAME", help=f"what becomes zero at last, widths staying: {', '.join(SPARSITIES)} (none)"
    )
    what.add_argument("--shots", metavar="N", type=int, help="prunings, with statistics taken afresh at each (1)")
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibration", metavar="TEXTS", default=DEFAULT_CALIBRATION,
        help=f"texts that give windows in turn, with commas: {SELF} (the model's own samples), {', '.join(TEXTS)} or "
             f"text files ({DEFAULT_CALIBRATION})",
    )  # fmt: skip
    calibration.add_argument(
        "--samples", metavar="N", type=int, default=DEFAULT_SAMPLES, help=f"windows ({DEFAULT_SAMPLES})"
    )
    calibration.add_argument(
        "--seq-len", metavar="N", type=int, help=f"tokens of one ({DEFAULT_SEQ_LEN}, or the model's context)"
    )
    calibration.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of their choice and of the random criterion (0)"
    )
    add_training_options(parser, required=False)
    add_output_options(parser, "replace a pruned checkpoint at OUT")
    add_model_options(parser).add_argument(
        "--layerwise", action="store_true", help="keep the model in host memory, one block at a time on the device"
    )


def chosen_preset(options: argparse.Namespace) -> str:
    """The preset named, or best; where a criterion, granularity, rope or depth is named without one, the paper's."""
    papers = (options.criterion, options.granularity, options.rope, options.depth)
    return options.preset or ("transact" if any(name is not None for name in papers) else "best")


def chosen_recipe(options: argparse.Namespace) -> Recipe:
    """The preset's recipe with what the options change."""
    changes = {name: getattr(options, name) for name in RECIPE_OPTIONS if getattr(options, name) is not None}
    if "modules" in changes:
        changes["modules"] = tuple(changes["modules"].split(","))
    changes |= {name: True for name in ("output_bias", "drop_modules") if getattr(options, name)}
    recipe = replace(recipe_by_name(chosen_preset(options)), **changes)
    recipe.check()
    return recipe


def check_prune_options(options: argparse.Namespace) -> None:
    """Raise ValueError for numbers that are not allowed and options that exclude each other."""
    if _names_widths(options) and (options.ratio is not None or options.kv_ratio is not None):
        raise ValueError("--ratio/--kv-ratio and --mha-dim/--mlp-dim both name widths; give one of them")
    if _names_widths(options):
        _check_nothing_is_found(options)
    if options.speedup is None:
        for name in ("speed_of", "speed_batch", "speed_context"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is for a speed-up: give --speedup as well")
    else:
        check_speedup(options.speedup)
        if options.ratio is not None or _names_widths(options):
            raise ValueError("--speedup and --ratio or --mha-dim/--mlp-dim both say how much goes; give one of them")
        if options.layerwise:
            raise ValueError("--speedup is measured of a model that runs as a whole: drop --layerwise")
    check_ratio("ratio", _ratio(options))
    check_ratio("kv-ratio", options.kv_ratio)
    if options.samples < 1:
        raise ValueError(f"at least one window is needed, got --samples {options.samples}")
    if options.seq_len is not None and options.seq_len < 2:
        raise ValueError(f"seq-len must be at least 2, got {options.seq_len}")
    source_names(options.calibration)
    check_seed(options.seed)
    if options.tokens is None:
        for name, default in options.training_defaults.items():
            if getattr(options, name) != default:
                raise ValueError(f"--{name.replace('_', '-')} is for training: give --tokens, the budget, as well")
    else:
        training_of(options)
        source_names(options.text)
        if options.layerwise:
            raise ValueError("--layerwise keeps the model off the device: it cannot be trained there, drop --tokens")


def _check_nothing_is_found(options: argparse.Namespace) -> None:
    """Raise ValueError for an option that says how widths are found, which would be ignored: they are named."""
    for name, is_given in (
        ("drop-modules", options.drop_modules), ("modules", options.modules is not None),
        ("allocation", options.allocation not in (None, "uniform")), ("measurements", options.measurements),
    ):  # fmt: skip
        if is_given:
            raise ValueError(f"--{name} says which widths are found, --mha-dim/--mlp-dim name them; give one of them")


def _names_widths(options: argparse.Namespace) -> bool:
    return options.mha_dim is not None or options.mlp_dim is not None


def _ratio(options: argparse.Namespace) -> float | None:
    """The ratio asked for, or by default where nothing else says how much goes."""
    return DEFAULT_RATIO if options.ratio is None and options.speedup is None else options.ratio


def speed_settings(options: argparse.Namespace) -> dict:
    """What is to be so fast, as `speed_goal` takes it."""
    batch = 1 if options.speed_batch is None else options.speed_batch
    return {"tokens": options.speed_of or TOKENS[0], "batch": batch, "context": options.speed_context}


def check_speed_settings(options: argparse.Namespace, recipe: Recipe) -> None:
    """Raise ValueError where a speed-up does not go with the recipe or the model, before that is loaded."""
    check_speed_task(recipe, options.speedup, options.ratio, None)
    settings = speed_settings(options)
    Workload(**settings | {"context": 1 if settings["context"] is None else settings["context"]}).check(
        read_config(options.model)
    )


def check_depth_options(options: argparse.Namespace, recipe: Recipe) -> None:
    """Raise ValueError where whole layers are to go and an option is for narrowing, before the model is loaded."""
    check_depth_task(recipe, options.kv_ratio, _names_widths(options))
    if recipe.depth != "none" and options.tokens is not None and options.layer_weight:
        raise ValueError(f"--layer-weight compares layer by layer, and depth {recipe.depth!r} drops some: leave it out")


def goal_of(options: argparse.Namespace, dense: torch.nn.Module, recipe: Recipe) -> SpeedGoal:
    """The speed-up asked for, once it is measured that it can be had."""
    return speed_goal(
        dense, options.speedup, modules=recipe.modules, drop_modules=recipe.drop_modules, progress=True,
        **speed_settings(options),
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    seconds: dict[str, float] = {}
    check_prune_options(options)
    recipe = chosen_recipe(options)
    out = check_destination(options.out, overwrite=options.overwrite)
    device = resolve_device(options.device)
    check_depth_options(options, recipe)
    if options.speedup is not None:
        check_speed_settings(options, recipe)
    if (format := ENGINES[recipe.engine].format) is not None:  # before it is loaded
        check_exportable(read_config(options.model), format)
    with stage(seconds, "load"):
        home = "cpu" if options.layerwise else options.device
        dense, tokenizer = load_model(options.model, dtype=options.dtype, device=home)
    if format == "gguf":
        check_tokenizer(tokenizer, dense)
    widths = windows = train = None
    sources: list[Source] = []
    if _names_widths(options):
        widths = widths_by_name(
            dense.config, mha_dim=options.mha_dim, mlp_dim=options.mlp_dim, granularity=recipe.granularity
        )
    check_task(dense, recipe, ratio=_ratio(options), kv_ratio=options.kv_ratio, widths=widths, speedup=options.speedup)
    goal = None
    if options.speedup is not None:
        with stage(seconds, "time"):
            goal = goal_of(options, dense, recipe)
    if options.layerwise and recipe.measures(None):
        tell("--layerwise: the pruned model never runs as a whole, so no measurements correct the searched widths")
    if options.tokens is not None:
        train = ShotTraining(options, recipe.shots, dense, tokenizer, checkpoints_of(out))
    if recipe.needs_text():
        with stage(seconds, "text"):
            seq_len = options.seq_len or min(DEFAULT_SEQ_LEN, dense.config.max_position_embeddings)
            sources = calibration_sources(
                options.calibration, dense, tokenizer, count=options.samples, length=seq_len, seed=options.seed,
                progress=True,
            )  # fmt: skip
            windows = mixed(sources, seed=options.seed)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    pruned = prune_checked(
        dense, windows, recipe=recipe, ratio=_ratio(options), kv_ratio=options.kv_ratio, widths=widths,
        speedup=goal, seed=options.seed, device=device if options.layerwise else None, train=train, progress=True,
    )  # fmt: skip
    if train and not train.recovered[-1].is_main:
        return
    pruned.seconds = seconds | {name: seconds.get(name, 0) + value for name, value in pruned.seconds.items()}
    with_zeros = None
    if train and recipe.sparsity != "none":  # which were made of what was trained
        with_zeros = held_out_loss(pruned.model, train.held_out)["held_out_perplexity"] or math.inf
    if windows is not None:
        first, *others = (len(source.windows) for source in sources)
        counts = [counted(first, "window"), *map(str, others)]
        parts = (f"{count} of {source.name}" for count, source in zip(counts, sources, strict=True))
        tell(f"calibrated on {', '.join(parts)}")
    pruning = {
        "model": lasting_name(options.model),
        "preset": chosen_preset(options),
        "recipe": asdict(recipe),
        "criterion": recipe.criterion if recipe.depth == "none" else None,
        "ratio_asked": None if widths else _ratio(options),
        "kv_ratio_asked": options.kv_ratio,
        "speed": speed_summary(goal, pruned.speed) if goal else None,
        **pruning_summary(dense, pruned),
        "recovery": train.summaries() if train else [],
        "held_out_perplexity_with_zeros": with_zeros if with_zeros != math.inf else None,
        "calibration": calibration_summary(options.calibration, sources, windows) if sources else None,
        "seed": options.seed,
        "device": str(device),
        "layerwise": options.layerwise,
        "peak_device_memory_mib": torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None,
    }  # fmt: skip
    save_checkpoint(out, pruned.model, pruned.plan, pruning, tokenizer=tokenizer, overwrite=options.overwrite)
    if train:
        shutil.rmtree(checkpoints_of(out))
        *earlier, last = train.recovered
        for recovered in earlier:
            print_recovery(out, recovered)
        print_recovery(out, last, with_zeros)
    print(
        f"{out}: {pruning['fraction_removed']:.1%} of the decoder layers' linear parameters and "
        f"{pruning['kv_fraction_removed']:.1%} of the KV cache removed, {pruning['parameters_before']:,} -> "
        f"{pruning['parameters_after']:,} parameters in {sum(pruned.seconds.values()):.1f} s"
    )
    if recipe.sparsity != "none":
        print(
            f"{out}: {pruning['zeros']:.1%} of the linear weights that are left are zero, {recipe.sparsity}: stored "
            "and multiplied as before, so nothing is smaller or, on CPUs, faster by them"
        )
    if goal:
        print_speed(out, goal, pruned.speed)


def speed_summary(goal: SpeedGoal, measured: Ratio) -> dict:
    """What `pruning.json` says of a speed-up: asked for, measured with its interval, of what, and where."""
    return {
        "speedup_asked": goal.speedup, "speedup": measured.median, "low": measured.low, "high": measured.high,
        "verdict": measured.verdict, "met": goal.is_met(measured), **asdict(goal.workload),
        **{name: goal.conditions[name] for name in ("device", "threads", "dtype")},
    }  # fmt: skip


def print_speed(out: Path, goal: SpeedGoal, measured: Ratio) -> None:
    """Print the measured speed-up; warn where it is not the one asked for."""
    print(
        f"{out}: {goal.workload.tokens} of {goal.workload.batch} x {goal.workload.context} tokens is "
        f"{measured.median:.2f} times as fast as the dense model's ({measured.low:.2f} to {measured.high:.2f} at "
        f"95 %: {measured.verdict}), asked for {goal.speedup:g}"
    )
    if not goal.is_met(measured):
        tell(f"warning: the speed-up of {goal.speedup:g} is missed by more than the noise of its measurement")


def calibration_summary(calibration: str, sources: list[Source], windows: torch.Tensor) -> dict:
    """What `pruning.json` says of the windows that a model was calibrated on; the hash where they are of one text."""
    return {
        "text": ",".join(source_names(calibration)),
        "sha256": sources[0].sha256 if len(sources) == 1 else None,
        "sources": [{"text": one.name, "sha256": one.sha256, "samples": len(one.windows)} for one in sources],
        "samples": len(windows),
        "seq_len": windows.shape[1],
        "tokens": windows.numel(),
    }


def pruning_summary(dense: torch.nn.Module, pruned: Pruned) -> dict:
    """What `pruning.json` says of the models before and after, of time and of versions."""
    before, after = widths_of(dense.config), pruned.plan.widths
    return {
        "fraction_removed": fraction_removed(dense.config, after),
        "kv_fraction_removed": kv_fraction_removed(dense.config, after),
        "linear_parameters_before": linear_parameters(dense.config, before),
        "linear_parameters_after": linear_parameters(dense.config, after),
        "parameters_before": dense.num_parameters(),
        "parameters_after": pruned.model.num_parameters(),
        "kv_elements_per_token_before": kv_elements_per_token(before),
        "kv_elements_per_token_after": kv_elements_per_token(after),
        "layers": [vars(layer_widths) for layer_widths in after],
        "layers_before": len(before),
        "kept_layers": pruned.plan.kept_layers,
        "zeros": zero_fraction(pruned.model),
        "ridges": pruned.ridges,
        "dtype": str(dense.dtype).removeprefix("torch."),
        "seconds": {name: round(value, 3) for name, value in pruned.seconds.items()},
        "versions": {
            "transact": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
        },
    }
