"""What the tests of launchers share."""

from __future__ import annotations

import pytest

from tests.launch.worlds import STEPS, clipfuse_words, started, tiny
from tests.support import Small, losses


@pytest.fixture(scope="session")
def undisturbed(small: Small, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Step -> loss of a run of two processes that nobody stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    words = tiny(small, folder / "run", f"train.steps={STEPS}")
    with started(*clipfuse_words("pretrain", "--nproc", "2", *words), cwd=folder) as run:
        run.end(0)
    found = losses(folder / "run")
    assert list(found) == list(range(1, STEPS + 1))
    return found
