"""Questions about images on the page: answers and maps are those of the model."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import clipfuse
import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from finetune.search import places
from finetune.search.query import Searcher, load_query_model
from launch import cli
from launch.serve.app import build_app

QUESTION = "what colour is the car?"


def test_answers_and_maps_are_those_of_the_model(here: Path, client: TestClient, records: list[dict[str, Any]]) -> None:
    results = client.get("/", params={"q": "car", "k": "2"}).text
    address = re.findall(r'<a href="(/ask\?key=[^"]+)">ask about it</a>', results)[0]
    blank = client.get(address)
    assert blank.status_code == 200
    assert "A question about the image" in blank.text
    key = address.removeprefix("/ask?key=")
    page = client.get("/ask", params={"key": key, "question": QUESTION}).text
    model = clipfuse.load("runs/vqa")
    assert isinstance(model, clipfuse.FinetunedModel)
    expected = model.predict(f"hostile/{key}", QUESTION)[0]
    answers = client.get("/api/ask", params={"key": key, "question": QUESTION}).json()["answers"]
    assert [answer["answer"] for answer in answers] == [name for name, _ in expected]
    np.testing.assert_allclose([answer["probability"] for answer in answers], [value for _, value in expected], atol=1e-5)
    assert re.findall(r"<li><b>([^<]+)</b>", page)[0] == expected[0][0]
    assert re.findall(r'<label for="w\d+">([^<]+)</label>', page) == ["what", "colour", "is", "the", "car"]
    tiles = dict(model.attend(f"hostile/{key}", QUESTION).tiles(320))
    address = re.findall(r'src="(/map\?[^"]+word=1)"', page)[0].replace("&amp;", "&")
    drawn = Image.open(io.BytesIO(client.get(address).content))
    difference = np.asarray(drawn, float) - np.asarray(tiles["colour"].convert("RGB").resize(drawn.size), float)
    assert np.abs(difference).mean() < 8
    assert records[-1]["question"] == QUESTION
    assert not re.search(r"<script|javascript:|\son\w+=|https?://|\sstyle=", page)


def test_an_upload_can_be_asked(here: Path, client: TestClient) -> None:
    file = {"image": ("p07.jpg", Path("products/p07.jpg").read_bytes())}
    page = client.post("/", files=file).text
    address = re.findall(r'<a href="(/ask\?upload=\w+)">', page)[0]
    asked = client.get(f"{address}&question={QUESTION}")
    assert asked.status_code == 200
    assert "<li><b>" in asked.text
    same = client.get("/api/ask", params={"key": "products/p07.jpg", "question": QUESTION}).json()["answers"]
    assert client.post("/api/ask", files=file, data={"question": QUESTION}).json()["answers"] == same


def test_questions_that_are_none(here: Path, client: TestClient) -> None:
    for parameters, message in (
        ({"key": "gone", "question": QUESTION}, "has no image gone"),
        ({"question": QUESTION}, "has no image"),
        ({"key": "products/p01.jpg", "question": "???"}, "has no word to draw a map for"),
        ({"upload": "0" * 32, "question": QUESTION}, "no longer in memory"),
    ):
        for path in ("/ask", "/api/ask"):
            answer = client.get(path, params=parameters)
            assert answer.status_code == 400
            assert message in answer.text
    assert client.get("/api/ask", params={"key": "products/p01.jpg"}).json()["error"] == "the question is empty"
    broken = client.post("/api/ask", files={"image": ("a.jpg", b"no image")}, data={"question": QUESTION})
    assert (broken.status_code, "is not a usable image" in broken.text) == (400, True)
    hostile = client.get("/ask", params={"key": "products/p00.jpg", "question": "<script>alert(1)</script>"}).text
    assert "<script>" not in hostile
    long = client.get("/ask", params={"key": "products/p01.jpg", "question": "what colour " * 500})
    assert "the question has" in long.text
    assert len(long.text) < 100_000


def test_a_page_without_those_runs(here: Path, client: TestClient, capsys: pytest.CaptureFixture[str]) -> None:
    with places.open_index("catalog") as opened:
        searcher = Searcher(opened, load_query_model(opened, None), torch.device("cpu"))
        with TestClient(build_app(searcher), base_url="http://127.0.0.1") as plain:
            page = plain.get("/", params={"q": "car"}).text
            assert "/ask?" not in page
            assert '<svg class="orders' not in page
            assert 'type="radio"' not in page
            refused = plain.get("/api/ask", params={"key": "products/p01", "question": QUESTION})
            assert refused.status_code == 400
            assert "started without --vqa RUN" in refused.text
            assert plain.get("/map", params={"key": "products/p01", "q": "car", "word": "0"}).status_code == 404
    for words, message in (
        (["--vqa", "runs/retrieval"], "is a run of retrieval; questions need one of vqa"),
        (["--vqa", "runs/first"], "holds encoders without a task"),
        (["--vqa", "runs/gone"], "no run or checkpoint at runs/gone"),
        (["--rerank", "runs/vqa"], "is a run of vqa; re-ranking needs one of retrieval"),
    ):
        capsys.readouterr()
        assert cli.main(["serve", "catalog", *words]) in (1, 2)
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
