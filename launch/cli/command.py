"""How a subcommand is declared: its parser, its help, and the function that does its work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from pretrain.errors import closest
from pretrain.printable import one_safe_line
from pretrain.runtime.entrypoint import STOPPED, USAGE

Command = Callable[[argparse.Namespace], int]
"""Parsed arguments -> exit code."""
_SETTINGS = ("init", "resume", "run", "seed")
"""Settings without a dot that are easily taken for options."""
Subparsers = argparse._SubParsersAction  # argparse has no public name for it


def run_resumable(work: Command, args: argparse.Namespace, stays: str) -> int:
    """Call `work`; Ctrl-C ends it with exit code 75 and one line. stays: what is kept for the same command, in words."""
    try:
        return work(args)
    except KeyboardInterrupt:
        print(f"clipfuse: interrupted; {stays}: run the same command again to resume", file=sys.stderr, flush=True)
        return STOPPED


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line: the command, what was given, and the nearest name where one is misspelled.

    Options are written out: `--gpus 4` must not stand for `--gpus-per-node 4`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self._words: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the options that are known, as argparse does; the words are kept for the message of an error."""
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line and end the command with exit code 2."""
        unknown = [word for word in self._words if word.startswith("--") and not self._is_option(word)]
        if unknown and message.startswith("the following arguments are required"):
            message += self.explain_unknown(unknown[0])
        self.exit(USAGE, f"{one_safe_line(f'{self.prog}: {message}; see {self.prog} --help')}\n")

    def explain_unknown(self, word: str) -> str:
        """Return the end of an error message about a word that is no option: the nearest option, or the setting it may be."""
        name, equals, value = word.partition("=")
        key = name.lstrip("-")
        is_setting = "." in key or key in _SETTINGS
        options = [option for option in self._option_string_actions if option.startswith("--")]
        hint = f"; {name} is no option{closest(name, options)}" if word.startswith("-") and not is_setting else ""
        if "settings" in [action.dest for action in self._actions] and (equals or is_setting):
            after = self._words[self._words.index(word) + 1 :] if word in self._words else []
            if not equals:
                value = after[0] if after and not after[0].startswith("-") and "=" not in after[0] else "..."
            hint += f"; settings have no dashes: {key}={value}"
        return hint

    def _is_option(self, word: str) -> bool:
        return word == "--" or word.partition("=")[0] in self._option_string_actions

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is not among the choices, with the nearest one."""
        choices = action.choices
        if choices is not None and value not in choices:
            names = [str(choice) for choice in choices]
            message = f"no {str(value)[:100]!r}{closest(str(value), names)}; the choices are {', '.join(names)}"
            raise argparse.ArgumentError(action, message)


def add_command(
    commands: Subparsers[argparse.ArgumentParser], name: str, work: Command, text: str, reads_runs: bool = False
) -> argparse.ArgumentParser:
    """Add the subcommand `name`, which calls `work`; `text` is its help. Return its parser, for its arguments.

    reads_runs: whether it loads run folders, which may name modules that the user has to allow.
    """
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(work=work, parser=parser)
    if reads_runs:
        parser.add_argument(
            "--allow-module",
            action="append",
            default=[],
            metavar="NAME",
            help="allow a run folder to name this module (my_package.my_tower), whose code is then run",
        )
    return parser
