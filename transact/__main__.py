"""The command `transact`: prune a model into a checkpoint directory, train it, export it, or look into it."""

import argparse
import json
import logging
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers

from . import __version__
from .checkpoint import (
    EXPORTED,
    all_or_nothing,
    check_destination,
    check_export_destination,
    load_plan,
    save_checkpoint,
    save_model,
)
from .criteria import CRITERIA
from .entry import check_vocabulary
from .export import FORMATS, GGUF_TYPES, check_exportable, check_tokenizer, plain_llama, write_gguf
from .inputs import (
    DTYPES,
    EMBEDDED_MODEL,
    TEXTS,
    Text,
    cut_windows,
    load_model,
    load_text,
    read_config,
    resolve_device,
    tokenise,
)
from .prune import check_prunable
from .recipe import ALLOCATIONS, COMPENSATIONS, PRESETS, ROPES, Pruned, Recipe, prune, recipe_by_name
from .recovery import (
    WAYS,
    NonFiniteLossError,
    Recovered,
    Training,
    check_checkpoints,
    check_recoverable,
    checkpoints_in,
    held_out_loss,
    hold_out,
    parse_tokens,
    recover,
    shot_budgets,
    shot_trainings,
)
from .sources import DEFAULT_CALIBRATION, SELF, Source, calibration_sources, mixed, source_names
from .widths import (
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


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Parse and run the subcommand's `run`; a ValueError is the user's and ends in one line and exit code 2."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry, twice
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *where, **how: print(f"warning: {message}", file=sys.stderr)
            code = options.run(options)
    except ValueError as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        hint = "; `transact prune --layerwise` keeps one block at a time on the device"
        print(f"{parser.prog}: error: {str(error).splitlines()[0]}{hint}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    return code or 0


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that every command with a model has."""
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="auto is the checkpoint's own")


RECIPE_OPTIONS = ("criterion", "granularity", "modules", "allocation", "compensation", "rope", "shots", "ridge",
                  "measurements")  # fmt: skip
DEFAULT_RATIO, DEFAULT_SAMPLES, DEFAULT_SEQ_LEN, DEFAULT_TRAINING_LENGTH = 0.2, 128, 512, 512


def chosen_recipe(options: argparse.Namespace) -> Recipe:
    """The preset with what the options change; a criterion or rope without a preset changes the paper's."""
    changes = {name: getattr(options, name) for name in RECIPE_OPTIONS if getattr(options, name) is not None}
    if "modules" in changes:
        changes["modules"] = tuple(changes["modules"].split(","))
    if options.output_bias:
        changes["output_bias"] = True
    if options.plain:
        if options.allocation not in (None, "plain"):
            raise ValueError(f"--plain is --allocation plain, not {options.allocation}: give one of them")
        changes["allocation"] = "plain"
    plain = {"criterion", "rope", "granularity"} & changes.keys()
    recipe = replace(recipe_by_name(options.preset or ("transact" if plain else "best")), **changes)
    recipe.check()
    return recipe


def training_of(options: argparse.Namespace) -> Training:
    """What the options say of training, checked."""
    if options.train_seq_len is not None and options.train_seq_len < 2:
        raise ValueError(f"train-seq-len must be at least 2, got {options.train_seq_len}")
    training = Training(
        tokens=parse_tokens(options.tokens), way=options.way, learning_rate=options.learning_rate, batch=options.batch,
        device_batch=options.device_batch, layer_weight=options.layer_weight, rank=options.rank,
        gradient_checkpointing=options.gradient_checkpointing, seed=options.seed,
    )  # fmt: skip
    training.check()
    return training


def training_windows(
    options: argparse.Namespace,
    training: Training,
    model: torch.nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    shots: int = 1,
) -> tuple[Text, torch.Tensor, torch.Tensor]:
    """The text to train on, its windows, and those held out."""
    context = model.config.max_position_embeddings
    length = min(DEFAULT_TRAINING_LENGTH, context) if options.train_seq_len is None else options.train_seq_len
    if length > context:
        raise ValueError(f"train-seq-len {length} is longer than the model's context of {context}")
    least = min(tokens for tokens, _ in shot_budgets(training.tokens, shots, 1.0))
    if least < length:
        share = f"in {shots} shots leave {least} for one of them, which is" if shots > 1 else "are"
        raise ValueError(f"tokens {training.tokens} {share} less than one window of {length}")
    text = load_text(options.text)
    windows = cut_windows(tokenise(text, tokenizer), length=length)
    check_vocabulary(model.config, windows)
    windows, held_out = hold_out(windows)
    tell(
        f"{training.tokens:,} tokens are {training.tokens / windows.numel():.2f} epochs of {text.name} "
        f"({windows.numel():,} tokens), in {training.steps(length):,} steps"
    )
    return text, windows, held_out


def tell(message: str) -> None:
    """Say it to the user, once: of several processes under a launcher only the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def checkpoints_of(out: Path) -> Path:
    """Where a run that makes `out` keeps its checkpoints until it is done."""
    return out.with_name(f"{out.name}.checkpoints")


def train_with_advice(checkpoints: Path, *arguments, **options) -> Recovered:
    """`recover`, with what to do next where the loss is not finite."""
    try:
        return recover(*arguments, checkpoints=checkpoints, **options)
    except NonFiniteLossError as error:
        kept = checkpoints_in(checkpoints)
        good = f"the last good checkpoint is {str(kept[-1])!r}" if kept else "there is no checkpoint yet"
        advice = f"Lower --learning-rate, and delete {str(checkpoints)!r} or name another output"
        raise ValueError(f"{error}: training stopped; {good}. {advice}") from error


def training_summary(
    training: Training, text: Text, windows: torch.Tensor, recovered: Recovered, teacher: str | None
) -> dict:
    """What `pruning.json` says of a training."""
    return {
        **asdict(training), "teacher": teacher, "tokens": recovered.tokens, "epochs": recovered.epochs,
        "text": text.name, "sha256": text.sha256, "seq_len": windows.shape[1],
        "seconds": round(recovered.seconds, 3), "history": recovered.history,
    }  # fmt: skip


def recover_command(options: argparse.Namespace) -> None:
    out = check_destination(options.out, overwrite=options.overwrite)
    check_checkpoints(checkpoints_of(out))
    training = training_of(options)
    config = read_config(options.directory)
    pruning = read_pruning(options.directory)
    model, tokenizer = load_model(options.directory, dtype=options.dtype, device=options.device)
    plan, teacher = load_plan(options.directory), None
    teacher_name = (options.teacher or pruning["model"]) if training.needs_teacher() else None
    if teacher_name:
        try:
            teacher = load_model(teacher_name, dtype=options.dtype, device=options.device)[0]
        except ValueError as error:
            hint = "" if options.teacher else " (what was pruned, as pruning.json says: --teacher says where it is now)"
            raise ValueError(f"teacher{hint}: {error}") from error
    check_recoverable(model, training, teacher)
    text, windows, held_out = training_windows(options, training, model, tokenizer)
    training = training.with_rate(config.hidden_size, windows.shape[1])
    recovered = train_with_advice(
        checkpoints_of(out), model, windows, training, teacher=teacher, progress=True,
        evaluate=lambda student: held_out_loss(student, held_out),
    )  # fmt: skip
    if not recovered.is_main:
        return
    trained = training_summary(training, text, windows, recovered, teacher_name and lasting_name(teacher_name))
    pruning["recovery"] = [*pruning.get("recovery", []), trained]
    save_checkpoint(out, recovered.model, plan, pruning, tokenizer=tokenizer, overwrite=options.overwrite)
    shutil.rmtree(checkpoints_of(out))
    print_recovery(out, recovered)


def print_recovery(out: Path, recovered: Recovered) -> None:
    before, after = held_out_perplexities(recovered)
    print(
        f"{out}: trained on {recovered.tokens:,} tokens ({recovered.epochs:.2f} epochs) in {recovered.seconds:.1f} s, "
        f"perplexity of held-out windows of the same text {before:,.2f} -> {after:,.2f}"
    )
    if after > before:
        tell("training has done harm: give more --tokens, or a smaller --learning-rate")


def held_out_perplexities(recovered: Recovered) -> tuple[float, float]:
    """Before and after training, infinite where no float holds it."""
    measured = [row["held_out_perplexity"] or math.inf for row in recovered.history if "held_out_perplexity" in row]
    return measured[0], measured[-1]


class ShotTraining:
    """Trains after each shot, by a part of the budget, and keeps what came of it."""

    def __init__(
        self,
        options: argparse.Namespace,
        shots: int,
        dense: torch.nn.Module,
        tokenizer: transformers.PreTrainedTokenizerBase,
        checkpoints: Path,
    ):
        training = training_of(options)
        check_checkpoints(checkpoints, allowed=["shot-*"])
        self.text, self.windows, self.held_out = training_windows(options, training, dense, tokenizer, shots)
        training = training.with_rate(dense.config.hidden_size, self.windows.shape[1])
        self.trainings = shot_trainings(training, shots)
        self.teacher = dense if training.needs_teacher() else None
        self.teacher_name = lasting_name(options.model) if training.needs_teacher() else None
        self.checkpoints = checkpoints
        self.recovered: list[Recovered] = []

    def __call__(self, model: torch.nn.Module, shot: int) -> torch.nn.Module:
        recovered = train_with_advice(
            self.checkpoints / f"shot-{shot}", model, self.windows, self.trainings[shot - 1], teacher=self.teacher,
            progress=True, evaluate=lambda student: held_out_loss(student, self.held_out),
        )  # fmt: skip
        self.recovered.append(recovered)
        return recovered.model

    def summaries(self) -> list[dict]:
        return [
            training_summary(training, self.text, self.windows, recovered, self.teacher_name)
            for training, recovered in zip(self.trainings, self.recovered, strict=True)
        ]


def check_prune_options(options: argparse.Namespace) -> None:
    """Raise ValueError for numbers that are not allowed and options that exclude each other."""
    if _names_widths(options) and (options.ratio is not None or options.kv_ratio is not None):
        raise ValueError("--ratio/--kv-ratio and --mha-dim/--mlp-dim both name widths; give one of them")
    check_ratio("ratio", _ratio(options))
    check_ratio("kv-ratio", options.kv_ratio)
    if options.samples < 1:
        raise ValueError(f"at least one window is needed, got --samples {options.samples}")
    if options.seq_len is not None and options.seq_len < 2:
        raise ValueError(f"seq-len must be at least 2, got {options.seq_len}")
    source_names(options.calibration)
    if options.seed < 0:
        raise ValueError(f"seed must be at least 0, got {options.seed}")
    if options.tokens is None:
        for name, default in options.training_defaults.items():
            if getattr(options, name) != default:
                raise ValueError(f"--{name.replace('_', '-')} is for training: give --tokens, the budget, as well")
    else:
        training_of(options)
        if options.layerwise:
            raise ValueError("--layerwise keeps the model off the device: it cannot be trained there, drop --tokens")


def _names_widths(options: argparse.Namespace) -> bool:
    return options.mha_dim is not None or options.mlp_dim is not None


def _ratio(options: argparse.Namespace) -> float:
    return DEFAULT_RATIO if options.ratio is None else options.ratio


def prune_command(options: argparse.Namespace) -> None:
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str):
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    check_prune_options(options)
    recipe = chosen_recipe(options)
    out = check_destination(options.out, overwrite=options.overwrite)
    device = resolve_device(options.device)
    if recipe.allocation == "plain":  # what it is for comes after it
        check_exportable(read_config(options.model))
    with stage("load"):
        home = "cpu" if options.layerwise else options.device
        dense, tokenizer = load_model(options.model, dtype=options.dtype, device=home)
        check_prunable(dense)
    widths = windows = train = None
    sources: list[Source] = []
    if _names_widths(options):
        widths = widths_by_name(
            dense.config, mha_dim=options.mha_dim, mlp_dim=options.mlp_dim, granularity=recipe.granularity
        )
    if recipe.needs_text():
        with stage("text"):
            seq_len = options.seq_len or min(DEFAULT_SEQ_LEN, dense.config.max_position_embeddings)
            sources = calibration_sources(
                options.calibration, dense, tokenizer, count=options.samples, length=seq_len, seed=options.seed,
                progress=True,
            )  # fmt: skip
            windows = mixed(sources, seed=options.seed)
    if options.tokens is not None:
        train = ShotTraining(options, recipe.shots, dense, tokenizer, checkpoints_of(out))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    pruned = prune(
        dense, windows, recipe=recipe, ratio=_ratio(options), kv_ratio=options.kv_ratio, widths=widths,
        seed=options.seed, device=device if options.layerwise else None, train=train, progress=True,
    )  # fmt: skip
    if train and not train.recovered[-1].is_main:
        return
    pruned.seconds = seconds | pruned.seconds
    if windows is not None:
        counts = ", ".join(f"{len(source.windows)} of {source.name}" for source in sources)
        tell(f"calibrated on {counts.replace(' of', ' windows of', 1)}")
    pruning = {
        "model": lasting_name(options.model),
        "preset": options.preset,
        "recipe": asdict(recipe),
        "criterion": recipe.criterion,
        "ratio_asked": None if widths else _ratio(options),
        "kv_ratio_asked": options.kv_ratio,
        **pruning_summary(dense, pruned),
        "recovery": train.summaries() if train else [],
        "calibration": calibration_summary(options.calibration, sources, windows) if sources else None,
        "seed": options.seed,
        "device": str(device),
        "layerwise": options.layerwise,
        "peak_device_memory_mib": torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None,
    }  # fmt: skip
    save_checkpoint(out, pruned.model, pruned.plan, pruning, tokenizer=tokenizer, overwrite=options.overwrite)
    if train:
        shutil.rmtree(checkpoints_of(out))
        for recovered in train.recovered:
            print_recovery(out, recovered)
    print(
        f"{out}: {pruning['fraction_removed']:.1%} of the decoder layers' linear parameters and "
        f"{pruning['kv_fraction_removed']:.1%} of the KV cache removed, {pruning['parameters_before']:,} -> "
        f"{pruning['parameters_after']:,} parameters in {sum(pruned.seconds.values()):.1f} s"
    )


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


def lasting_name(model: str) -> str:
    """The model's name, a directory's in full: it is looked for again from elsewhere."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


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


def export_command(options: argparse.Namespace) -> None:
    out = check_export_destination(options.out, options.format, overwrite=options.overwrite)
    check_exportable(read_config(options.directory), options.format)
    model, tokenizer = load_model(options.directory, device="cpu")
    if options.format == "gguf":
        check_tokenizer(tokenizer, model)
    plain = plain_llama(model, pad=options.pad)
    pruned, size = fraction_removed(model.config, widths_of(model.config)), plain.num_parameters()
    extra = size - model.num_parameters()
    with all_or_nothing(out) as partial:
        if options.format == "gguf":
            write_gguf(partial, plain, tokenizer, kind=options.type)
        else:
            save_model(plain, partial)
            tokenizer.save_pretrained(partial)
            origin = {"from": options.directory, "transact": __version__, "zeros_added": max(0, extra)}
            (partial / EXPORTED).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    print(
        f"{out}: {size:,} parameters ({pruned:.1%} of the linear ones removed"
        f"{f', {extra:,} zeros added' if extra > 0 else ''}), {plain.config.num_attention_heads} heads of "
        f"{plain.config.head_dim}, MLP {plain.config.intermediate_size}"
    )


def inspect_command(options: argparse.Namespace) -> None:
    config = read_config(options.directory)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    widths = widths_of(config)
    size = torch.empty(0, dtype=config.dtype or torch.float32).element_size()
    columns = ("layer", "kv heads", "qk head dim", "v head dim", "mlp", "parameters", "kv bytes/token")
    rows = [
        (index, w.kv_heads, w.qk_head_dim, w.v_head_dim, w.mlp, _parameters(layer), kv_elements_per_token([w]) * size)
        for index, (w, layer) in enumerate(zip(widths, model.model.layers, strict=True))
    ]
    rows.append(("all", "", "", "", "", _parameters(model), kv_elements_per_token(widths) * size))
    column_widths = [max(len(str(row[i])) for row in (columns, *rows)) for i in range(len(columns))]
    for row in (columns, *rows):
        print("  ".join(str(cell).rjust(width) for cell, width in zip(row, column_widths, strict=True)))
    print(
        f"{_fraction_removed(options.directory, config):.1%} of the linear parameters of {len(widths)} decoder layers "
        f"removed; 'all' counts embeddings and norms too; bytes at {str(config.dtype).removeprefix('torch.')}"
    )


def _fraction_removed(directory: str, config: transformers.PretrainedConfig) -> float:
    """As `pruning.json` says, which knows the dense model; else as the configuration does."""
    if (Path(directory) / "pruning.json").is_file():
        return read_pruning(directory)["fraction_removed"]
    return fraction_removed(config, widths_of(config))


def read_pruning(directory: str) -> dict:
    """What `transact prune` wrote beside a model. Raises ValueError where there is none or it is something else."""
    path = Path(directory) / "pruning.json"
    if not path.is_file():
        raise ValueError(f"{directory!r} is not a pruned checkpoint: it holds no pruning.json")
    try:
        pruning = json.loads(path.read_text(encoding="utf-8"))
        pruning["fraction_removed"], pruning["model"], [*pruning.get("recovery", [])]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is not what `transact prune` writes") from error
    return pruning


def _parameters(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"


def add_training_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """The options that commands which train have; `training_defaults` holds those of all but the budget."""
    parser.add_argument("--tokens", required=required, help="budget of training, in tokens seen: 500k, 2M ...")
    options = [
        parser.add_argument("--way", default=WAYS[0], help=f"{', '.join(WAYS)} ({WAYS[0]})"),
        parser.add_argument("--text", default="embedded",
                            help=f"to train on: {', '.join(TEXTS)} or a text file (embedded)"),
        parser.add_argument("--train-seq-len", type=int, help=f"tokens of its windows ({DEFAULT_TRAINING_LENGTH})"),
        parser.add_argument("--learning-rate", type=float,
                            help="highest one (5e-5 at width 4096; narrower more, few steps less)"),
        parser.add_argument("--batch", type=int, default=8, help="windows of a step (8)"),
        parser.add_argument("--device-batch", type=int, default=8, help="windows at once on a device (8)"),
        parser.add_argument("--layer-weight", type=float, default=0.0, help="of layer outputs in a distillation (0)"),
        parser.add_argument("--rank", type=int, default=16, help="of the adapters (16)"),
        parser.add_argument("--gradient-checkpointing", action="store_true",
                            help="compute activations twice, keep few"),
    ]  # fmt: skip
    parser.set_defaults(training_defaults={option.dest: option.default for option in options})


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="transact", description=__doc__)
    parser.add_argument("--version", action="version", version=f"transact {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable, description: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=description, description=description)
        sub.set_defaults(run=run)
        return sub

    prune = command("prune", prune_command, "prune a model into a checkpoint directory")
    prune.add_argument("model", help=f"{EMBEDDED_MODEL} (embedded), a checkpoint directory or a Hugging Face id")
    prune.add_argument("out", help="directory to write; must not exist unless --overwrite is given")
    prune.add_argument(
        "--ratio", type=float, help=f"fraction of the decoder layers' linear parameters to remove ({DEFAULT_RATIO})"
    )
    prune.add_argument("--kv-ratio", type=float, help="least fraction of the KV cache's bytes to remove as well")
    prune.add_argument("--mha-dim", type=int, help="instead of a ratio: attention heads x kept dimensions per head")
    prune.add_argument("--mlp-dim", type=int, help="instead of a ratio: kept dimensions of every MLP")
    prune.add_argument("--preset", help=f"one of {', '.join(PRESETS)} (best; transact where a criterion is named)")
    prune.add_argument("--criterion", help=f"one of {', '.join(CRITERIA)}")
    prune.add_argument("--granularity", help=f"what attention loses: {', '.join(GRANULARITIES)}")
    prune.add_argument("--modules", help=f"what may be narrowed, with commas: {','.join(MODULES)}")
    prune.add_argument("--allocation", help=f"how widths are found: {', '.join(ALLOCATIONS)}")
    prune.add_argument("--compensation", help=f"what makes up for the loss: {', '.join(COMPENSATIONS)}")
    prune.add_argument("--ridge", type=float, help="the one ridge of all least squares (the best on held-out tokens)")
    prune.add_argument("--output-bias", action="store_true", help="least squares with an intercept")
    prune.add_argument(
        "--plain", action="store_true", help="one head and MLP width and one set of RoPE pairs, for `transact export`"
    )
    prune.add_argument("--rope", help=f"what queries and keys keep: {', '.join(ROPES)}")
    prune.add_argument("--measurements", type=int, help="rounds that correct searched widths (best: 3)")
    prune.add_argument("--shots", type=int, help="prunings, with statistics taken afresh at each (1)")
    prune.add_argument(
        "--calibration", default=DEFAULT_CALIBRATION,
        help=f"texts that give windows in turn, with commas: {SELF} (the model's own samples), {', '.join(TEXTS)} or "
             f"text files ({DEFAULT_CALIBRATION})",
    )  # fmt: skip
    prune.add_argument("--samples", type=int, default=DEFAULT_SAMPLES, help=f"calibration windows ({DEFAULT_SAMPLES})")
    prune.add_argument("--seq-len", type=int, help=f"tokens of a window ({DEFAULT_SEQ_LEN}, or the model's context)")
    prune.add_argument("--seed", type=int, default=0, help="of the choice of windows and of the random criterion (0)")
    prune.add_argument(
        "--layerwise", action="store_true", help="keep the model in host memory, one block at a time on the device"
    )
    prune.add_argument("--overwrite", action="store_true", help="replace a pruned checkpoint at OUT")
    add_training_options(prune, required=False)
    add_model_options(prune)

    recover = command("recover", recover_command, "train a pruned checkpoint, on one device or under accelerate launch")
    recover.add_argument("directory", help="a pruned checkpoint directory")
    recover.add_argument("out", help="directory to write; must not exist unless --overwrite is given")
    add_training_options(recover, required=True)
    recover.add_argument("--teacher", help="dense model to distil from (the one that was pruned)")
    recover.add_argument("--seed", type=int, default=0, help="of the order of windows and of the adapters (0)")
    recover.add_argument("--overwrite", action="store_true", help="replace a pruned checkpoint at OUT")
    add_model_options(recover)

    export = command("export", export_command, "write a pruned checkpoint for tools that know only plain Llamas")
    export.add_argument("directory", help="a pruned checkpoint directory")
    export.add_argument("out", help="what to write: a directory (llama) or a file (gguf); must not exist")
    export.add_argument("--format", choices=FORMATS, default="llama",
                        help="llama: a checkpoint of LlamaForCausalLM; gguf: a file for llama.cpp (llama)")  # fmt: skip
    export.add_argument("--type", choices=[*GGUF_TYPES], default="f16", help="of matrices in a GGUF file (f16)")
    export.add_argument("--pad", action="store_true", help="pad with zeros up to the widest layer, whatever it costs")
    export.add_argument("--overwrite", action="store_true", help="replace what was exported to OUT")

    inspect = command("inspect", inspect_command, "print widths, parameters and KV bytes per token of a checkpoint")
    inspect.add_argument("directory", help="a checkpoint directory, pruned or dense")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, or 2 for a mistake of the user's."""
    return run_command(build_parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
