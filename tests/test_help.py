"""The help of every subcommand: options in groups, with their defaults."""

import argparse

import pytest

from bench.__main__ import build_parser as build_bench_parser
from transact.__main__ import build_parser, main

SUBCOMMANDS = next(
    action.choices for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)
)


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_options_stand_in_groups_with_their_defaults(name):
    parser = SUBCOMMANDS[name]
    assert [action.dest for action in parser._optionals._group_actions] == ["help"]
    for action in parser._actions:
        assert action.help
        if action.option_strings and action.default not in (None, False, argparse.SUPPRESS):
            shown = f"{action.default:g}" if isinstance(action.default, float) else str(action.default)
            assert f"({shown}" in action.help, action.dest
    assert all(len(line) <= 80 for line in parser.format_usage().splitlines())


def test_parts_of_options_are_none(capsys):
    """Of `--output DIR` there was a model with output biases, written where nobody asked for it."""
    with pytest.raises(SystemExit, match="2"):
        main(["prune", "smollm2-135m", "--output", "here"])
    assert "unrecognized arguments: --output" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        build_bench_parser().parse_args(["perplexity", "smollm2-135m", "--window", "3"])
    assert "unrecognized arguments: --window 3" in capsys.readouterr().err
