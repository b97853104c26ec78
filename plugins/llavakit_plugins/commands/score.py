"""`llava-run score`: scores files of answers or reviews."""

from __future__ import annotations

import argparse

from llavakit.contracts.commands import Commands


def add(commands: Commands) -> None:
    score = commands.add_parser("score", help="score files of answers or reviews", add_help=False)
    score.set_defaults(command=_score, reads_flags=True, parser_class=type(score))


def _score(arguments: argparse.Namespace) -> int:
    from llavakit import Registry
    from llavakit_plugins.commands.scoring import score_command

    return score_command(arguments.flags, Registry.installed(), arguments.parser_class)
