"""How a subcommand is declared: its parser, its help, and the function that does its work."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Command = Callable[[argparse.Namespace], int]
"""Parsed arguments -> exit code."""
Subparsers = argparse._SubParsersAction  # argparse has no public name for it


def add_command(commands: Subparsers[argparse.ArgumentParser], name: str, work: Command, text: str) -> argparse.ArgumentParser:
    """Add the subcommand `name`, which calls `work`; `text` is its help. Return its parser, for its arguments."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(work=work)
    return parser
