"""The clipfuse command. Each subcommand parses its arguments and calls one function of the package that does the work.

parser.py     the parser of all commands; command.py: how one is declared
data.py       data scenes | pack | check, tokenizer; data_filter.py: data filter
train.py      pretrain, finetune, plan
evaluate.py   evaluate, attend; evaluate_index.py: of an index
outputs.py    embed, export, report
search.py     index, search, serve
runs.py       RUN and --task are checked before torch is imported
progress.py   progress bars
__main__.py   python -m launch.cli

Heavy libraries are imported inside the functions, so that `clipfuse --help` answers at once. May import everything below.
"""

from __future__ import annotations

import os

from launch.cli.command import Command, Parser
from launch.cli.parser import build_parser
from pretrain.registry import MODULES_VARIABLE
from pretrain.runtime.entrypoint import run_with_exit_code


def main(argv: list[str] | None = None) -> int:
    """Run the console command and return its exit code: 0 done, 1 failed, 2 wrong usage, 75 stopped and resumable."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # child processes import nothing from the current folder
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse cannot mix `key=value` arguments with options; what it leaves over are settings, or mistakes.
    unknown = [word for word in rest if word.startswith("-") or not hasattr(args, "settings")]
    if unknown:
        command = getattr(args, "parser", parser)
        assert isinstance(command, Parser)
        command.error(f"unrecognized arguments: {' '.join(unknown)}{command.explain_unknown(unknown[0])}")
    if rest:
        args.settings = [*args.settings, *rest]
    if getattr(args, "allow_module", None):  # child processes inherit it
        before = [os.environ[MODULES_VARIABLE]] if MODULES_VARIABLE in os.environ else []
        os.environ[MODULES_VARIABLE] = ",".join([*before, *args.allow_module])
    work: Command = args.work
    return run_with_exit_code(work, args)
