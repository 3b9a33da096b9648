"""How a subcommand is declared: its parser, its help, and the function that does its work."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Command = Callable[[argparse.Namespace], int]
"""Parsed arguments -> exit code."""
Subparsers = argparse._SubParsersAction  # argparse has no public name for it


def add_command(
    commands: Subparsers[argparse.ArgumentParser], name: str, work: Command, text: str, reads_runs: bool = False
) -> argparse.ArgumentParser:
    """Add the subcommand `name`, which calls `work`; `text` is its help. Return its parser, for its arguments.

    reads_runs: whether it loads run folders, which may name modules that the user has to allow.
    """
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(work=work)
    if reads_runs:
        parser.add_argument(
            "--allow-module",
            action="append",
            default=[],
            metavar="NAME",
            help="allow a run folder to name this module (my_package.my_tower), whose code is then run",
        )
    return parser
