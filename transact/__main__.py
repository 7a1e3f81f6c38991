"""The command `transact`: prune a model into a checkpoint directory, or look into one."""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
import transformers

from . import __version__
from .calibration import calibrate
from .checkpoint import check_destination, save_checkpoint
from .criteria import CRITERIA, criterion_by_name
from .inputs import DTYPES, EMBEDDED_MODEL, TEXTS, cut_windows, load_model, load_text, read_config, tokenise
from .plan import (
    fraction_removed,
    kv_elements_per_token,
    linear_parameters,
    select,
    uniform_widths,
    widths_by_name,
    widths_of,
)
from .prune import apply_plan, check_prunable, score


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Parse and run the subcommand's `run`; a ValueError is the user's and ends in one line and exit code 2."""
    logging.basicConfig(format="%(message)s")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    return 0


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that every command with a model has."""
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="auto is the checkpoint's own")


def prune_command(options: argparse.Namespace) -> None:
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str):
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 3)

    by_name = options.mha_dim is not None or options.mlp_dim is not None
    if by_name and options.ratio is not None:
        raise ValueError("--ratio and --mha-dim/--mlp-dim both name widths; give one of them")
    check_ratio_given(options.ratio)
    criterion = criterion_by_name(options.criterion, seed=options.seed)
    out = check_destination(options.out, overwrite=options.overwrite)
    with stage("load"):
        dense, tokenizer = load_model(options.model, dtype=options.dtype, device=options.device)
        check_prunable(dense)
    if by_name:
        widths = widths_by_name(dense.config, mha_dim=options.mha_dim, mlp_dim=options.mlp_dim)
    else:
        widths = uniform_widths(dense.config, DEFAULT_RATIO if options.ratio is None else options.ratio)
    text = statistics = None
    if criterion.needs_statistics:
        with stage("text"):
            text = load_text(options.calibration)
            seq_len = min(2048, dense.config.max_position_embeddings) if options.seq_len is None else options.seq_len
            tokens = tokenise(text, tokenizer)
            windows = cut_windows(tokens, length=seq_len, count=options.samples, seed=options.seed)
        with stage("calibrate"):
            statistics = calibrate(dense, windows, progress=True)
    with stage("score"):
        scores = score(dense, criterion, statistics)
    with stage("plan"):
        plan = select(scores, widths)
    with stage("prune"):
        narrowed = apply_plan(dense, plan)

    parameters_before, parameters_after = dense.num_parameters(), narrowed.num_parameters()
    removed = fraction_removed(dense.config, plan.widths)
    pruning = {
        "model": options.model,
        "criterion": options.criterion,
        "ratio_asked": None if by_name else (DEFAULT_RATIO if options.ratio is None else options.ratio),
        "fraction_removed": removed,
        "linear_parameters_before": linear_parameters(dense.config, widths_of(dense.config)),
        "linear_parameters_after": linear_parameters(dense.config, plan.widths),
        "parameters_before": parameters_before,
        "parameters_after": parameters_after,
        "kv_elements_per_token_before": kv_elements_per_token(widths_of(dense.config)),
        "kv_elements_per_token_after": kv_elements_per_token(plan.widths),
        "layers": [vars(layer_widths) for layer_widths in plan.widths],
        "calibration": text
        and {
            "text": text.name,
            "sha256": text.sha256,
            "samples": options.samples,
            "seq_len": seq_len,
            "tokens": statistics.tokens,
        },
        "seed": options.seed,
        "dtype": str(dense.dtype).removeprefix("torch."),
        "device": str(dense.device),
        "seconds": seconds,
        "versions": {
            "transact": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
        },
    }
    save_checkpoint(out, narrowed, plan, pruning, tokenizer=tokenizer, overwrite=options.overwrite)
    print(
        f"{out}: {removed:.1%} of the decoder layers' linear parameters removed, "
        f"{parameters_before:,} -> {parameters_after:,} parameters in {sum(seconds.values()):.1f} s"
    )


DEFAULT_RATIO = 0.2


def check_ratio_given(ratio: float | None) -> None:
    """Refuse a ratio that no model can have before anything is loaded."""
    if ratio is not None and not 0 <= ratio < 1:
        raise ValueError(f"ratio is the fraction removed and must lie in [0, 1), got {ratio}")


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
        f"{fraction_removed(config, widths):.1%} of the linear parameters of {len(widths)} decoder layers "
        f"removed; 'all' counts embeddings and norms too; bytes at {str(config.dtype).removeprefix('torch.')}"
    )


def _parameters(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"


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
    prune.add_argument("--mha-dim", type=int, help="instead of a ratio: attention heads x kept dimensions per head")
    prune.add_argument("--mlp-dim", type=int, help="instead of a ratio: kept dimensions of every MLP")
    prune.add_argument("--criterion", default="activation", help=f"one of {', '.join(CRITERIA)} (activation)")
    prune.add_argument("--calibration", default="embedded", help=f"{', '.join(TEXTS)} or a text file (embedded)")
    prune.add_argument("--samples", type=int, default=128, help="calibration windows (128)")
    prune.add_argument("--seq-len", type=int, help="tokens of a calibration window (2048, or the model's context)")
    prune.add_argument("--seed", type=int, default=0, help="of the choice of windows and of the random criterion (0)")
    prune.add_argument("--overwrite", action="store_true", help="replace a pruned checkpoint at OUT")
    add_model_options(prune)

    inspect = command("inspect", inspect_command, "print widths, parameters and KV bytes per token of a checkpoint")
    inspect.add_argument("directory", help="a checkpoint directory, pruned or dense")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, or 2 for a mistake of the user's."""
    return run_command(build_parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
