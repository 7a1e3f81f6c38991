"""`transact recover`: train a pruned checkpoint."""

import argparse
import shutil

from ..checkpoint import check_destination, load_plan, read_pruning, save_checkpoint
from ..models import lasting_name, load_model, read_config
from ..recovery import check_checkpoints, check_recoverable, held_out_loss
from ..texts import SELF, source_names
from .parser import add_model_options, add_output_options, add_subcommand
from .training import (
    add_training_options,
    checkpoints_of,
    print_recovery,
    train_with_advice,
    training_of,
    training_summary,
    training_windows,
)


def add_command(commands: argparse._SubParsersAction) -> None:
    description = "train a pruned checkpoint, on one device or under accelerate launch"
    parser = add_subcommand(commands, "recover", run, description, "DIRECTORY OUT --tokens N")
    parser.add_argument("directory", help="a pruned checkpoint directory")
    parser.add_argument("out", help="directory to write; must not exist unless --overwrite is given")
    training = add_training_options(parser, required=True)
    training.add_argument(
        "--teacher", metavar="MODEL", help="dense model to distil from and to sample (the one that was pruned)"
    )
    training.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the order of windows and of the adapters (0)"
    )
    add_output_options(parser, "replace a pruned checkpoint at OUT")
    add_model_options(parser)


def run(options: argparse.Namespace) -> None:
    out = check_destination(options.out, overwrite=options.overwrite)
    check_checkpoints(checkpoints_of(out))
    training = training_of(options)
    is_sampled = SELF in source_names(options.text)
    config = read_config(options.directory)
    pruning = read_pruning(options.directory)
    model, tokenizer = load_model(options.directory, dtype=options.dtype, device=options.device)
    plan, dense = load_plan(options.directory), None
    dense_name = options.teacher or pruning["model"]
    if training.needs_teacher() or is_sampled:
        try:
            dense = load_model(dense_name, dtype=options.dtype, device=options.device)[0]
        except ValueError as error:
            hint = "" if options.teacher else " (what was pruned, as pruning.json says: --teacher says where it is now)"
            raise ValueError(f"teacher{hint}: {error}") from error
    teacher = dense if training.needs_teacher() else None
    check_recoverable(model, training, teacher)
    sources, windows, held_out = training_windows(options, training, dense or model, tokenizer)
    training = training.with_rate(config.hidden_size, windows.shape[1])
    recovered = train_with_advice(
        checkpoints_of(out), model, windows, training, teacher=teacher, progress=True,
        evaluate=lambda student: held_out_loss(student, held_out),
    )  # fmt: skip
    if not recovered.is_main:
        return
    trained = training_summary(training, sources, windows, recovered, lasting_name(dense_name) if teacher else None)
    pruning["recovery"] = [*pruning.get("recovery", []), trained]
    save_checkpoint(out, recovered.model, plan, pruning, tokenizer=tokenizer, overwrite=options.overwrite)
    shutil.rmtree(checkpoints_of(out))
    print_recovery(out, recovered)
