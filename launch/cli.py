"""clipfuse: the one command. Each subcommand parses its words here and calls one function of the room that does the work.

Heavy libraries are imported by the functions, so that `clipfuse --help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from pretrain.__main__ import DONE, FAILED, USAGE, guarded
from pretrain.config import ConfigError

Command = Callable[[argparse.Namespace], int]


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console command; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse cannot mix `key=value` words with options; what it leaves over are settings, or mistakes.
    strange = [word for word in rest if word.startswith("-") or not hasattr(args, "settings")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        args.settings = [*args.settings, *rest]
    work: Command = args.work
    return guarded(lambda: work(args))


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="clipfuse",
        description="Contrastive image-text pretraining: from shards to aligned encoders.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped and resumable.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _data(commands.add_parser("data", help="draw, pack and check shards"))

    p = _command(commands, "tokenizer", _tokenizer, "train a byte-level BPE tokenizer on the captions of shards")
    p.add_argument("shards", metavar="SHARDS", help="glob, brace pattern, folder or url")
    p.add_argument("dir", metavar="DIR", type=Path, help="folder to save the tokenizer in, in transformers' format")
    p.add_argument("--vocab", type=int, default=8192, metavar="N", help="size of the vocabulary (default 8192)")
    p.add_argument("--caption", default="txt", metavar="FIELD", help="txt, or a field of the json (default txt)")

    p = _command(commands, "pretrain", _pretrain, "shards -> aligned encoders")
    p.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped one")
    p.add_argument("--dry-run", action="store_true", help="print configuration, parameters and samples, and exit")
    p.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the file's")

    p = _command(commands, "evaluate", _evaluate, "retrieval recall, zero-shot accuracy, linear probe")
    p.add_argument("run", metavar="RUN", help="a run folder or a checkpoint folder")
    p.add_argument("--data", required=True, metavar="SHARDS", help="shards to evaluate on")
    p.add_argument("--task", default="retrieval", choices=["retrieval", "zero_shot", "linear_probe"])
    p.add_argument("--train-data", metavar="SHARDS", help="linear_probe: labelled shards the probe is trained on")
    p.add_argument("--classes", metavar="NAMES", help="zero_shot: imagenet, a comma list, or a file with a name a line")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")

    p = _command(commands, "report", _report, "curves, recalls and a gallery in one HTML file")
    p.add_argument("run", metavar="RUN", help="a run folder")
    p.add_argument("--data", metavar="SHARDS", help="shards of the gallery (default: the run's data.val)")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, work: Command, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(work=work)
    return parser
