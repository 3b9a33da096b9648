"""Commands in this process, and what they print."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launch import cli


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """Run a command; return what it printed, to stderr where it must fail."""
    capsys.readouterr()
    assert cli.main(list(words)) == code
    out = capsys.readouterr()
    return out.out if code == 0 else out.err


def search(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    """Run `clipfuse search` with these words and return its results."""
    results: list[dict[str, Any]] = json.loads(run(capsys, "search", *words, "--json"))["results"]
    return results
