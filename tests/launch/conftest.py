"""What the tests of launchers share."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from filelock import FileLock

from tests.support import Small, read_losses
from tests.support.catalog import make_search_folder
from tests.support.launches import STEPS, clipfuse_command, start_launcher, tiny_run_args
from tests.support.sound_search import make_sound_folder


@pytest.fixture(scope="session")
def undisturbed(small: Small, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Step -> loss of a run of two processes that nobody stopped; one run for all of pytest's workers."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own
    kept = shared / "undisturbed.json"
    with FileLock(shared / "undisturbed.lock"):
        if not kept.exists():
            folder = tmp_path_factory.mktemp("undisturbed")
            words = tiny_run_args(small, folder / "run", f"train.steps={STEPS}")
            with start_launcher(*clipfuse_command("pretrain", "--nproc", "2", *words), cwd=folder) as run:
                run.wait_for_exit(0)
            kept.write_text(json.dumps(read_losses(folder / "run")))
    found = {int(step): loss for step, loss in json.loads(kept.read_text()).items()}
    assert list(found) == list(range(1, STEPS + 1))
    return found


@pytest.fixture(scope="session")
def folder(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a catalog to search, see tests/support/catalog.py."""
    root = tmp_path_factory.mktemp("search")
    make_search_folder(small, root)
    return root


@pytest.fixture(scope="session")
def sound_folder(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sounds to search, see tests/support/sound_search.py."""
    root = tmp_path_factory.mktemp("sounds")
    make_sound_folder(small, root)
    return root


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to the folder with the catalog."""
    monkeypatch.chdir(folder)
    return folder
