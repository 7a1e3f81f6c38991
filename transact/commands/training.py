"""What the commands that train share: their options, the text, what is said of a training."""

import argparse
import math
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from ..entry import check_vocabulary, counted
from ..models import lasting_name
from ..recovery import (
    HELD_OUT_EVERY,
    WAYS,
    NonFiniteLossError,
    Recovered,
    Training,
    check_budget,
    check_checkpoints,
    checkpoints_in,
    held_out_loss,
    hold_out,
    parse_tokens,
    recover,
    shot_trainings,
)
from ..texts import (
    DEFAULT_CALIBRATION,
    SELF,
    TEXTS,
    Source,
    calibration_sources,
    mixed,
    source_names,
    text_source,
)
from .parser import tell

DEFAULT_TRAINING_LENGTH = 512
MOST_WINDOWS_IN_TURN = 512  # sampling them costs half of what training on them does


def add_training_options(parser: argparse.ArgumentParser, *, required: bool) -> argparse._ArgumentGroup:
    """The group of the options of commands that train; `training_defaults` holds those of all but the budget."""
    group = parser.add_argument_group("training", None if required else "after each shot, where --tokens is given")
    group.add_argument(
        "--tokens", metavar="N", required=required, help="budget of training, in tokens seen: 500k, 2M ..."
    )
    options = [
        group.add_argument("--way", metavar="NAME", default=WAYS[0], help=f"{', '.join(WAYS)} ({WAYS[0]})"),
        group.add_argument("--text", metavar="TEXTS", default=DEFAULT_CALIBRATION,
                           help=f"to train on, with commas: {SELF} (the dense model's own samples), "
                                f"{', '.join(TEXTS)} or text files ({DEFAULT_CALIBRATION})"),
        group.add_argument("--train-seq-len", metavar="N", type=int,
                           help=f"tokens of its windows ({DEFAULT_TRAINING_LENGTH})"),
        group.add_argument("--learning-rate", metavar="RATE", type=float,
                           help="highest one (5e-5 at width 4096; narrower more, few steps less)"),
        group.add_argument("--batch", metavar="N", type=int, default=8, help="windows of a step (8)"),
        group.add_argument("--device-batch", metavar="N", type=int, default=8, help="windows at once on a device (8)"),
        group.add_argument("--layer-weight", metavar="WEIGHT", type=float, default=0.0,
                           help="of layer outputs in a distillation (0)"),
        group.add_argument("--rank", metavar="N", type=int, help="of the adapters (16), or of lozo's directions (2)"),
        group.add_argument("--refresh", metavar="N", type=int,
                           help="steps that lozo keeps half of its directions for (50)"),
        group.add_argument("--perturbation", metavar="SIZE", type=float,
                           help="how far lozo tries its directions (1e-3)"),
        group.add_argument("--gradient-checkpointing", action="store_true",
                           help="compute activations twice, keep few"),
    ]  # fmt: skip
    parser.set_defaults(training_defaults={option.dest: option.default for option in options})
    return group


def training_of(options: argparse.Namespace) -> Training:
    """What the options say of training, checked."""
    if options.train_seq_len is not None and options.train_seq_len < 2:
        raise ValueError(f"train-seq-len must be at least 2, got {options.train_seq_len}")
    training = Training(
        tokens=parse_tokens(options.tokens), way=options.way, learning_rate=options.learning_rate, batch=options.batch,
        device_batch=options.device_batch, layer_weight=options.layer_weight, rank=options.rank,
        refresh=options.refresh, perturbation=options.perturbation,
        gradient_checkpointing=options.gradient_checkpointing, seed=options.seed,
    )  # fmt: skip
    training.check()
    return training


def training_windows(
    options: argparse.Namespace,
    training: Training,
    dense: torch.nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    shots: int = 1,
) -> tuple[list[Source], torch.Tensor, torch.Tensor]:
    """The sources to train on, their windows, and those held out.

    One text gives all its windows. Own samples, and several texts in turn, give as many as the budget sees, up to
    `MOST_WINDOWS_IN_TURN`.
    """
    context = dense.config.max_position_embeddings
    length = min(DEFAULT_TRAINING_LENGTH, context) if options.train_seq_len is None else options.train_seq_len
    if length > context:
        raise ValueError(f"train-seq-len {length} is longer than the model's context of {context}")
    check_budget(training.tokens, length, shots)
    names = source_names(options.text)
    if len(names) > 1 or names == [SELF]:
        seen = math.ceil(training.tokens / length * HELD_OUT_EVERY / (HELD_OUT_EVERY - 1))
        count = min(MOST_WINDOWS_IN_TURN, max(HELD_OUT_EVERY, seen))
        sources = calibration_sources(
            options.text, dense, tokenizer, count=count, length=length, seed=options.seed, progress=True
        )
    else:
        sources = [text_source(names[0], tokenizer, length=length)]
    windows = mixed(sources, seed=options.seed)
    check_vocabulary(dense.config, windows)
    windows, held_out = hold_out(windows)
    tell(
        f"{training.tokens:,} tokens are {training.tokens / windows.numel():.2f} epochs of {names_of(sources)} "
        f"({windows.numel():,} tokens), in {counted(training.steps(length), 'step')}"
    )
    return sources, windows, held_out


def names_of(sources: list[Source]) -> str:
    return ", ".join(source.name for source in sources)


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
    training: Training, sources: list[Source], windows: torch.Tensor, recovered: Recovered, teacher: str | None
) -> dict:
    """What `pruning.json` says of a training."""
    return {
        **asdict(training), "teacher": teacher, "tokens": recovered.tokens, "epochs": recovered.epochs,
        "text": names_of(sources), "sha256": sources[0].sha256 if len(sources) == 1 else None,
        "seq_len": windows.shape[1],
        "seconds": round(recovered.seconds, 3), "history": recovered.history,
    }  # fmt: skip


def print_recovery(out: Path, recovered: Recovered, with_zeros: float | None = None) -> None:
    """Print what training gained; `with_zeros`: the held-out perplexity once weights were set to zero after it."""
    before, after = held_out_perplexities(recovered)
    print(
        f"{out}: trained on {recovered.tokens:,} tokens ({recovered.epochs:.2f} epochs) in {recovered.seconds:.1f} s, "
        f"perplexity of held-out windows of the same texts {before:,.2f} -> {after:,.2f}"
        + ("" if with_zeros is None else f", and {with_zeros:,.2f} with the zeros made after it")
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
        self.sources, self.windows, self.held_out = training_windows(options, training, dense, tokenizer, shots)
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
            training_summary(training, self.sources, self.windows, recovered, self.teacher_name)
            for training, recovered in zip(self.trainings, self.recovered, strict=True)
        ]
