"""Numbers of command-line options: what no command can use is one line, with exit code 2, before anything is imported."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import cli, demo
from pretrain.config.arguments import NumberType, endpoint, fractions, nonempty, nonempty_path, process_count, seconds, workers
from pretrain.data.train_tokenizer import MIN_VOCAB
from tests.support import ROOT
from tests.support.launches import run_mistakes

NOT_NUMBERS = (
    "", " ", "abc", "nan", ".nan", "inf", "-inf", ".inf", "1e400", "-1e400", "1_0", "0b1", "1,5", "1 0",
    "\u0661\u0662", "\uff15", "\u00b2", "\u00bd", "'3'", "3;", "None", "true", "${x}", "0x", "9" * 25, "9" * 5000,
    "\x1b[2J", "\udce9",
)  # fmt: skip
"""Words that are no number of any option: other scripts, shells' and YAML's habits, more than 64 bits, escape codes."""

IS_NUMBER = re.compile(r"N|N\|MIN:MAX|PX|S|X|SECONDS|A-B|A,B,\.\.\.|HOST:PORT")
"""Names that stand for numbers in the help."""


def iterate_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield a parser and those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from iterate_parsers(command)


PARSER = cli.build_parser()

OPTIONS = [
    (parser.prog.split()[1:], action)
    for parser in iterate_parsers(PARSER)
    for action in parser._actions
    if action.nargs != 0
    and (action.type not in (None, Path, nonempty, nonempty_path) or IS_NUMBER.fullmatch(str(action.metavar)))
]
"""(command, option) of each option that holds a number."""


BAD_WORDS = {
    "N": ("0", "-1", "4097", "1.5", "gpus8", "2:1"),
    "N|MIN:MAX": ("0", "-1", "1.5", "0:1", "5:2", "1:", ":2", "1:2:3", "1_0:20"),
    "A-B": ("0", "5", "3-2", "1-5", "0-1", "1-", "-2", "1-2-3", "1..2"),
    "A,B,...": ("-0.5", "1.5", "0,2", "0,,1", "0;1", "0,nan"),
    "HOST:PORT": ("host", "host:", "host:0", "host:65536", ":80", "a b:1", "http://host:80", "host:http", "host:-1"),
}
"""By the name in the help: words that options which hold more than a number cannot use."""


def bad_words(option: argparse.Action) -> Iterator[str]:
    """Yield words that are not valid for an option."""
    yield from NOT_NUMBERS
    number = option.type
    if isinstance(number, NumberType):
        if number.kind is int:
            yield from ("1.5", "1e3", "2.0")
        low, high = (float(bound) for bound in number.interval[1:-1].split(","))
        yield from (f"{low - 1:.0f}", f"{high * 2 + 1:.0f}", str(2**64))
        if number.interval[0] == "(":
            yield number.interval[1:-1].split(",")[0]
    else:
        yield from BAD_WORDS[str(option.metavar)]


def test_every_option_with_a_number_has_a_type_that_checks_it() -> None:
    names = {(*command, action.option_strings[0]) for command, action in OPTIONS}
    assert names > {
        ("pretrain", "--nproc"),
        ("pretrain", "--nodes"),
        ("finetune", "--grace"),
        ("embed", "--batch-size"),
        ("tokenizer", "--vocab"),
        ("plan", "--gpus"),
        ("attend", "--layer"),
        ("data", "scenes", "--things"),
        ("data", "check", "--workers"),
        ("evaluate", "--wise"),
    }
    assert len(names) > 30
    for parser in iterate_parsers(PARSER):
        for action in parser._actions:
            assert action.type not in (int, float), f"{parser.prog} {action.option_strings}: use a type of config/arguments.py"
    for package in ("launch", "pretrain", "finetune"):  # parsers that are no part of the command
        for file in (ROOT / package).rglob("*.py"):
            assert not re.search(r"add_argument\([^)]*type=(int|float)\b", file.read_text()), file


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids=lambda value: value if isinstance(value, str) else None)
def test_bad_numbers_are_one_line(command: list[str], option: argparse.Action, capsys: pytest.CaptureFixture[str]) -> None:
    name = option.option_strings[0]
    for word in bad_words(option):
        with pytest.raises(SystemExit) as done:
            PARSER.parse_known_args([*command, f"{name}={word}"])
        error = capsys.readouterr().err
        assert done.value.code == 2, word
        assert error.count("\n") == 1, error
        assert error.startswith(f"clipfuse {' '.join(command)}: argument {name}: "), error
        assert " must be " in error, error
        assert len(error) < 400, error
        assert error[:-1].isprintable(), error
    if option.default is not None and not isinstance(option.default, str):  # argparse does not check defaults
        assert isinstance(option.default, int | float | tuple | list)
        if isinstance(option.type, NumberType) and option.default:
            assert option.type(str(option.default)) == option.default


EMPTY = [
    "data pack * shards", "data pack images *", "data check *", "data check a *", "data scenes *", "tokenizer * dir",
    "tokenizer a *", "data check a --caption *", "evaluate * --data x", "evaluate run --data *",
    "embed * --data x --out y", "embed run --data * --out y", "embed run --data x --out *", "export * dir --format hf",
    "export run * --format hf", "report *", "attend * a.jpg b --out c",
]  # fmt: skip
"""Commands in which * stands for a variable of the shell that is not set."""


@pytest.mark.parametrize("command", EMPTY)
def test_an_empty_path_is_not_the_current_folder(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for empty in ("", " "):
        with pytest.raises(SystemExit) as done:
            PARSER.parse_args([empty if word == "*" else word for word in command.split()])
        assert done.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"{empty!r} is empty" in error


def test_numbers_within_their_range_are_taken() -> None:
    assert [workers(word) for word in ("1", "010", "4096", "0x10", "+2")] == [1, 10, 4096, 16, 2]
    assert [seconds(word) for word in ("0", "1e3", ".5", "7.")] == [0.0, 1000.0, 0.5, 7.0]
    assert isinstance(seconds("3"), float)
    assert fractions("0,0.5, 1") == [0.0, 0.5, 1.0]
    assert [process_count(word) for word in ("gpus", "8")] == ["gpus", "8"]
    assert [endpoint(word) for word in ("first-host:29500", "[::1]:1")] == ["first-host:29500", "[::1]:1"]
    assert NumberType(int, f"[{MIN_VOCAB}, 1000000]").interval == next(
        option.type.interval
        for _, option in OPTIONS
        if option.option_strings[0] == "--vocab" and isinstance(option.type, NumberType)
    )


def test_the_demo_refuses_a_time_before_it_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for word in ("0", "-1", "nan", "inf", "1e9"):
        with pytest.raises(SystemExit) as done:
            demo.main([f"--minutes={word}", "--out", str(tmp_path / "demo")])
        assert done.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "demo").exists()


MISTAKES = {
    "pretran scenes": "no 'pretran'; did you mean 'pretrain'?",
    "data pak a b": "no 'pak'; did you mean 'pack'?",
    "pretrain scenes --nprc 2": "--nprc is no option; did you mean '--nproc'?",
    "pretrain scenes --nprc=2": "--nprc is no option; did you mean '--nproc'?",
    "pretrain scenes --gpus 4": "--gpus is no option",  # not an abbreviation of --gpus-per-node
    "embed run --data x --ot y": "required: --out; --ot is no option; did you mean '--out'?",
    "export run out --format onix": "no 'onix'; did you mean 'onnx'?",
    "pretrain scenes --optim.lr=3": "settings have no dashes: optim.lr=3",
    "pretrain scenes --run=a": "settings have no dashes: run=a",
    "pretrain scenes --data.train x": "settings have no dashes: data.train=x",
    "pretrain scenes data.batch_size=8 --init --x": "unrecognized arguments: --init --x; settings have no dashes: init=...",
    "--verion": "--verion is no option; did you mean '--version'?",
    "data check x --workers 0": "--workers: '0' must be a whole number from 1 to 4096",
    "plan scenes --gpus 2 more": "'more' is not a setting; write key=value",
    "evaluate run more --data x": "unrecognized arguments: more",
}


def test_mistakes_are_one_line_before_torch_is_imported(tmp_path: Path) -> None:
    results = run_mistakes(list(MISTAKES), tmp_path)
    for (command, expected), (code, error, heavy) in zip(MISTAKES.items(), results, strict=True):
        assert code == 2, command
        assert error.count("\n") == 1, error
        assert error.startswith("clipfuse"), error
        assert expected in error, command
        assert not heavy, command
