"""The parser of all commands, in the order that `clipfuse --help` lists them."""

from __future__ import annotations

import argparse
from importlib import metadata

from launch.cli import data, evaluate, outputs, search, train
from launch.cli.command import Parser


def build_parser() -> argparse.ArgumentParser:
    """Build the parser. What it returns has `work`, the function of the chosen command."""
    parser: argparse.ArgumentParser = Parser(
        prog="clipfuse",
        description="Contrastive image-text pretraining: from shards to aligned encoders.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped and resumable.",
    )
    parser.add_argument("--version", action="version", version=f"clipfuse {metadata.version('clipfuse')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    data.add_commands(commands)
    train.add_commands(commands)
    evaluate.add_commands(commands)
    outputs.add_commands(commands)
    search.add_commands(commands)
    train.add_plan(commands)
    outputs.add_report(commands)
    return parser
