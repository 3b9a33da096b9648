"""make demo, shortened: every command it shows runs, and the page is there."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support import ROOT, environment, read_jsonl


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_runs_from_nothing_to_a_report(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.demo", "--minutes", "0.1", "--out", "demo"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = ("data scenes", "tokenizer", "pretrain scenes-conv", "evaluate", "export", "embed", "report", "finetune vqa")
    for command in told:
        assert f"$ clipfuse {command}" in done.stdout
    for run in ("run", "answers"):
        losses = [line["loss"] for line in read_jsonl(tmp_path / f"demo/{run}/metrics.jsonl") if "loss" in line]
        assert losses[-1] < losses[0]
    # Answers and maps, of the questions that were learnt.
    asked = (tmp_path / "demo/answers/report.html").read_text()
    assert "what colour is the" in asked
    assert "how many" in asked
    assert "left of" not in asked
    figures = [line for line in read_jsonl(tmp_path / "demo/answers/metrics.jsonl") if "val/accuracy" in line][-1]
    assert {name for name in figures if name.startswith("val/accuracy_")} == {
        f"val/accuracy_{kind}" for kind in ("colour", "kind", "count")
    }
    page = (tmp_path / "demo/run/report.html").read_text()
    assert "<svg" in page
    # What the page says of the export and of the embeddings is true.
    load, read = (html.unescape(code) for code in re.findall(r'<pre class="python">(.*?)</pre>', page, re.S))
    Image.new("RGB", (120, 90), "red").save(tmp_path / "picture.jpg")
    script = f"{load}\n{read}\nprint(table.num_rows)\n"
    shown = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment(PYTHONPATH=""),
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    shares, rows = shown.stdout.strip().splitlines()
    assert re.match(r"\[\[ ?-?0\.\d", shares)
    manifest = json.loads((tmp_path / "demo/run/embeddings/_manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["rows"] == manifest["data"]["samples"] == int(rows)


def test_the_makefile_starts_it_as_the_readme_says() -> None:
    text = (ROOT / "Makefile").read_text()
    assert "-m launch.demo --minutes $(MINUTES)" in text
    assert "MINUTES=1" in (ROOT / "README.md").read_text()
