"""Fixtures that many rooms share: a few drawn scenes and a tokenizer trained on them."""

import os
from pathlib import Path

import pytest

# Tiny models gain nothing from a second thread, and two test processes on two cores would wait for each other's.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support import Small, make_small


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """300 training scenes of 64 px, the other splits, and a tokenizer of 300 words."""
    return make_small(tmp_path_factory.mktemp("small"))


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
