"""What all commands share: errors in one line, exit codes, the options of a model."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence

import torch
import transformers

from ..models import DTYPES


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it, and whose options are whole words.

    Of parts of words `--output DIR` would switch on `--output-bias`, and take the directory for another argument.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)

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
        print(f"{parser.prog}: error: {str(error).splitlines()[0]}{less_memory(options)}", file=sys.stderr)
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


def less_memory(options: argparse.Namespace) -> str:
    """Which of a command's own options need less memory; nothing where it has none."""
    if getattr(options, "tokens", None) is not None:
        return "; a smaller --device-batch, --gradient-checkpointing and --way lora or lozo need less"
    if not hasattr(options, "layerwise"):
        return ""
    if options.speedup is not None:
        return "; a smaller --speed-batch and --speed-context need less, and --ratio instead of --speedup"
    if options.layerwise:
        return "; fewer --samples and a smaller --seq-len need less"
    return "; --layerwise keeps one block at a time on the device"


def add_subcommand(
    commands: argparse._SubParsersAction, name: str, run: Callable, description: str, given: str
) -> argparse.ArgumentParser:
    """The parser of a subcommand that `run` carries out; `given` is what must be given, for the line of usage."""
    usage = f"transact {name} {given} [options]"
    parser = commands.add_parser(name, help=description, description=description, usage=usage)
    parser.set_defaults(run=run)
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The group of the options that every command with a model has."""
    group = parser.add_argument_group("device")
    group.add_argument(
        "--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:1 ... (auto: CUDA where there is one)"
    )
    group.add_argument(
        "--dtype", metavar="NAME", default="auto", choices=["auto", *DTYPES],
        help=f"{', '.join(DTYPES)} (auto: the checkpoint's own)",
    )  # fmt: skip
    return group


def add_output_options(parser: argparse.ArgumentParser, overwrite: str) -> None:
    """The option that every command with a directory or file to write has."""
    parser.add_argument_group("output").add_argument("--overwrite", action="store_true", help=overwrite)


def tell(message: str) -> None:
    """Say it to the user, once: of several processes under a launcher only the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)
