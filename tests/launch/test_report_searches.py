"""Searches on the page of a run: those of `clipfuse search`, with its re-ranker where the run is one of retrieval."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from launch import cli


@pytest.mark.parametrize("run", ["first", "retrieval"])
def test_searches_are_those_of_the_command(here: Path, capsys: pytest.CaptureFixture[str], run: str) -> None:
    texts = ["a red <car>", "a dog", "a blue house"]
    words = [word for text in texts for word in ("--search", text)]
    assert cli.main(["report", f"runs/{run}", "--db", "catalog", *words]) == 0
    page = Path(f"runs/{run}/report.html").read_text()
    section = page[page.index("<h2>Searches</h2>") : page.index("<h2>Training</h2>")]
    assert "a red &lt;car&gt;" in section
    assert "24 images" in section
    shown = re.split("<article", section)[1:]
    for text, article in zip(texts, shown, strict=True):
        capsys.readouterr()
        rerank = ["--rerank", "runs/retrieval"] if run == "retrieval" else []
        assert cli.main(["search", "catalog", text, "--k", "5", "--json", *rerank]) == 0
        results = json.loads(capsys.readouterr().out)["results"]
        scores = [result["match"] if rerank else result["score"] for result in results]
        assert re.findall(r"<figcaption><b>\d+</b> <span>(-?[\d.]+)</span>", article) == [f"{score:.2f}" for score in scores]
        assert article.count('<img src="data:image/jpeg;base64,') == 5


def test_what_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--search", "car"], "--search needs --db PLACE"),
        (["--db", "nowhere", "--search", "car"], "nowhere is no index"),
        (["--db", "catalog"], "--search TEXT says for what"),
    ):
        capsys.readouterr()
        assert cli.main(["report", "runs/first", *words]) in (1, 2)
        assert message in capsys.readouterr().err
