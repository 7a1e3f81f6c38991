"""The command `transact`: prune a model into a checkpoint directory, train it, export it, or look into it."""

import argparse
import sys
from collections.abc import Sequence

from . import __version__
from .commands import export, inspect, prune, recover
from .commands.parser import OneLineParser, run_command


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="transact", description=__doc__)
    parser.add_argument("--version", action="version", version=f"transact {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (prune, recover, export, inspect):
        command.add_command(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, or 2 for a mistake of the user's."""
    return run_command(build_parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
