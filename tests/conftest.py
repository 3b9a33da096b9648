"""Fixtures of all tests: a small data set with a tokenizer, and an empty working folder."""

import gc
import os
import sys
from pathlib import Path

import pytest

# Tiny models gain nothing from a second thread, and threads of two test processes would compete for two cores. Those that wait
# must not spin: three processes with two threads each took 39 seconds for a loop, 8 without spinning, 3 with one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tests.support import Small, make_small

gc.disable()  # until the tests are imported, see below


def pytest_collection_finish() -> None:
    """Collect garbage from now on, but do not look at modules again: each collection would walk through 400,000 objects."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first: started last, they would run while other processes are idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked gpu on a machine without a GPU. Compute with one thread, whatever the last test chose."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """300 training scenes of 64 px, 64 each for val and test, and a tokenizer of at most 400 tokens."""
    return make_small(tmp_path_factory.mktemp("small"))


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty working folder and return it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
