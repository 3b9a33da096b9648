"""make demo, shortened: every command it shows runs, and the page is there."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, environment, lines


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_runs_from_nothing_to_a_report(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.demo", "--minutes", "0.1", "--out", "demo"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for command in ("data scenes", "tokenizer", "pretrain scenes", "evaluate", "report"):
        assert f"$ clipfuse {command}" in done.stdout
    losses = [line["loss"] for line in lines(tmp_path / "demo/run/metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]
    assert "<svg" in (tmp_path / "demo/run/report.html").read_text()


def test_the_makefile_starts_it_as_the_readme_says() -> None:
    text = (ROOT / "Makefile").read_text()
    assert "-m launch.demo --minutes $(MINUTES)" in text
    assert "MINUTES=1" in (ROOT / "README.md").read_text()
