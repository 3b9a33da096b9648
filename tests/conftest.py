"""Fixtures that many rooms share: a few drawn scenes and a tokenizer trained on them."""

import os
from pathlib import Path

import pytest

# Tiny models gain nothing from a second thread, and two test processes on two cores would wait for each other's.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support import Small, make_small


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: started last, they would run alone at the end while the other processes are idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """300 training scenes of 64 px, the other splits, and a tokenizer of 300 words."""
    return make_small(tmp_path_factory.mktemp("small"))


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
