"""The demo, shortened: every command that it prints succeeds, and the pages hold what they say."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from finetune.search import places
from launch import demo
from tests.support import ROOT, environment, forked, read_jsonl


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_runs_from_nothing_to_a_report(tmp_path: Path) -> None:
    process = forked.run("launch.demo", ["--minutes", "0.1", "--out", "demo"], tmp_path, 550)
    assert process.returncode == 0, process.stderr[-3000:]
    commands = ("data scenes", "tokenizer", "pretrain scenes-conv", "evaluate", "export", "embed", "index", "report")
    for command in (*commands, "finetune vqa"):
        assert f"$ clipfuse {command}" in process.stdout
    for run in ("run", "answers"):
        losses = [line["loss"] for line in read_jsonl(tmp_path / f"demo/{run}/metrics.jsonl") if "loss" in line]
        assert losses[-1] < losses[0]
    # Answers and heat maps, of the types of questions that were trained.
    answers_page = (tmp_path / "demo/answers/report.html").read_text()
    assert "what colour is the" in answers_page
    assert "how many" in answers_page
    assert "left of" not in answers_page
    metrics = [line for line in read_jsonl(tmp_path / "demo/answers/metrics.jsonl") if "val/accuracy" in line][-1]
    assert {name for name in metrics if name.startswith("val/accuracy_")} == {
        f"val/accuracy_{kind}" for kind in ("colour", "kind", "count")
    }
    page = (tmp_path / "demo/run/report.html").read_text()
    assert "<svg" in page
    # Three searches in the index that is left, each with images inside the page; and how to open its page.
    searches = page[page.index("<h2>Searches</h2>") : page.index("<h2>Training</h2>")]
    assert re.findall(r"<q [^>]*>([^<]+)</q>", searches) == list(demo.SEARCHES)
    assert searches.count('<img src="data:image/jpeg;base64,') == 15
    assert "`clipfuse serve demo/index --vqa demo/answers` opens a page" in process.stdout
    with places.open_index(str(tmp_path / "demo/index")) as index:
        manifest = json.loads((tmp_path / "demo/run/embeddings/_manifest.json").read_text())
        assert index.count() == manifest["rows"]
    # The Python code that the page shows for the export and for the embeddings runs.
    load_code, read_code = (html.unescape(code) for code in re.findall(r'<pre class="python">(.*?)</pre>', page, re.S))
    Image.new("RGB", (120, 90), "red").save(tmp_path / "picture.jpg")
    script = f"{load_code}\n{read_code}\nprint(table.num_rows)\n"
    check = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment(PYTHONPATH=""),
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stderr[-3000:]
    scores, rows = check.stdout.strip().splitlines()
    assert re.match(r"\[\[ ?-?0\.\d", scores)
    manifest = json.loads((tmp_path / "demo/run/embeddings/_manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["rows"] == manifest["data"]["samples"] == int(rows)


def test_the_makefile_starts_the_demo_as_the_readme_says() -> None:
    text = (ROOT / "Makefile").read_text()
    assert "-m launch.demo --minutes $(MINUTES)" in text
    assert "MINUTES=1" in (ROOT / "README.md").read_text()
