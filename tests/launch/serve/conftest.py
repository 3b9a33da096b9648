"""The page of a small catalog whose first caption holds a script, with a re-ranker and a run that answers questions."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from finetune import loading
from finetune.search import places
from finetune.search.answering import Answerer
from finetune.search.query import Searcher, load_query_model
from launch import cli
from launch.serve.app import build_app
from tests.support import Small
from tests.support.catalog import finetune_words, index_words


@pytest.fixture(scope="session")
def records() -> list[dict[str, Any]]:
    """What the page logs."""
    return []


@pytest.fixture(scope="session")
def client(folder: Path, small: Small, records: list[dict[str, Any]]) -> Iterator[TestClient]:
    """A client of the page."""
    with contextlib.chdir(folder):  # not while tests run: the fixture outlives this folder's tests
        shutil.copytree("products", "hostile/products")
        Path("hostile/products/p00.txt").write_text('<script>alert(1)</script> a red car & "more"')
        assert cli.main(index_words("hostile/products", "hostile/db")) == 0
        assert cli.main(finetune_words(small, "vqa", "task.types=[colour, kind]")) == 0
    device = torch.device("cpu")
    with places.open_index(str(folder / "hostile/db")) as opened:
        searcher = Searcher(opened, load_query_model(opened, None), device, loading.load(str(folder / "runs/retrieval")))
        app = build_app(searcher, log=records.append, answerer=Answerer(loading.load(str(folder / "runs/vqa")), device))
        with TestClient(app, base_url="http://127.0.0.1:8000") as client:
            yield client


@pytest.fixture(scope="session")
def sound_client(sound_folder: Path) -> Iterator[TestClient]:
    """A client of the page of an index of sounds, whose runs have no image tower."""
    with contextlib.chdir(sound_folder):
        words = ["index", "runs/two", "--data", "sounds.tar", "--db", "page", "--rerank", "runs/heard"]
        assert cli.main(words) == 0
    device = torch.device("cpu")
    with places.open_index(str(sound_folder / "page")) as opened:
        searcher = Searcher(opened, load_query_model(opened, None), device, loading.load(str(sound_folder / "runs/heard")))
        with TestClient(build_app(searcher), base_url="http://127.0.0.1:8000") as client:
            yield client
