"""The help of every subcommand: options in groups, with their defaults."""

import argparse

import pytest

from transact.__main__ import build_parser

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
