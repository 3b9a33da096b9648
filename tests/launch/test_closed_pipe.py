"""`clipfuse ... | head`: who reads the output may go."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import Small, environment


@pytest.mark.timeout(60)
@pytest.mark.parametrize("words", [["data", "check"], ["data", "check", "--json"], ["data", "filter", "--min-words", "2"]])
def test_a_closed_pipe_ends_a_command_without_a_traceback(small: Small, tmp_path: Path, words: list[str]) -> None:
    more = [small.val, str(tmp_path / "out")] if "filter" in words else [small.val]
    command = [sys.executable, "-m", "launch.cli", *words, *more]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read().decode()
        code = process.wait(50)
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors
    assert code == 128 + signal.SIGPIPE, errors
