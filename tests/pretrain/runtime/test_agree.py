"""An error of one rank is every rank's: the same type, the same line, and nobody waits."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoints import store
from pretrain.data import config
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.tar import DamagedTarError
from pretrain.errors import ConfigError, UserError
from pretrain.runtime import distributed
from pretrain.runtime.agree import gather_or_raise, on_all, on_main
from pretrain.training.run_dir import RunFolder
from tests.support import world


class TwoWordsError(ConfigError):
    """Pickle calls its constructor with one argument: it cannot travel as it is."""

    def __init__(self, key: str, value: str) -> None:
        super().__init__(f"{key}={value}")


ERRORS: list[Exception] = [
    UserError("no samples in a.tar"),
    ConfigError("data.train matches no file"),
    DamagedTarError("a.tar is damaged at byte 512"),
    OSError(errno.ENOSPC, "No space left on device", "runs/first"),
    PermissionError(errno.EACCES, "Permission denied", "runs/first"),
    OSError("said without a number"),
]


def outcome(work: Callable[[], Any]) -> tuple[str, str, Any]:
    """(kind, message, detail) of what happened, as plain values."""
    try:
        return "result", "", work()
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "errno", None)


def fail(error: Exception) -> Any:
    raise error


def fail_on(rank: int, error: Exception) -> Any:
    return fail(error) if distributed.rank() == rank else f"rank {distributed.rank()}"


def seen() -> dict[str, Any]:
    """What each function did on this rank."""
    distributed.set_timeout(20)
    kept: list[UserError] = []
    own = UserError("mine")
    try:
        on_all(lambda: fail_on(0, own))
    except UserError as error:
        kept.append(error)
    return {
        "main": outcome(lambda: on_main(lambda: ["from", distributed.rank()])),
        "main fails": [outcome(lambda error=error: on_main(lambda: fail(error))) for error in ERRORS],
        "all": outcome(lambda: on_all(lambda: distributed.rank())),
        "all, not picklable": outcome(lambda: on_all(lambda: lambda: 3)())[2],
        "one of all fails": [
            [outcome(lambda error=error, rank=rank: on_all(lambda: fail_on(rank, error))) for error in ERRORS]
            for rank in range(distributed.world_size())
        ],
        "all fail": outcome(lambda: on_all(lambda: fail(UserError(f"rank {distributed.rank()}")))),
        "gathered": outcome(lambda: gather_or_raise(lambda: distributed.rank() * 10)),
        "one of gathered fails": [
            [outcome(lambda error=error, rank=rank: gather_or_raise(lambda: fail_on(rank, error))) for error in ERRORS]
            for rank in range(distributed.world_size())
        ],
        "rebuilt": outcome(lambda: on_all(lambda: fail_on(0, TwoWordsError("batch", "7")))),
        "its own object": kept[0] is own,
        "in step": distributed.gather_objects(distributed.rank()),
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_errors_and_results_are_shared(processes: int) -> None:
    expected = [outcome(lambda error=error: fail(error)) for error in ERRORS]
    ranks = world.run(seen, processes) if processes > 1 else [seen()]
    for rank, got in enumerate(ranks):
        assert got["main"] == ("result", "", ["from", 0])
        assert got["main fails"] == expected
        assert got["all"] == ("result", "", rank)
        assert got["all, not picklable"] == 3
        assert got["one of all fails"] == [expected] * processes
        assert got["all fail"] == ("UserError", "rank 0", None)
        assert got["gathered"] == ("result", "", [10 * i for i in range(processes)])
        assert got["one of gathered fails"] == [expected] * processes
        assert got["rebuilt"][:2] == ("TwoWordsError" if rank == 0 else "ConfigError", "batch=7")
        assert got["its own object"] == (rank == 0)
        assert got["in step"] == list(range(processes))


def unexpected() -> tuple[tuple[str, str, Any], list[int]]:
    """A bug on rank 0 alone: it does not hide behind a line, and needs no other rank to be raised."""
    return outcome(lambda: on_all(lambda: fail(ZeroDivisionError("bug")))), distributed.gather_objects(distributed.rank())


def test_an_unexpected_error_is_raised_as_it_is() -> None:
    for rank in world.run(unexpected, 2):
        assert rank == (("ZeroDivisionError", "bug", None), [0, 1])


# ---------------------------------------------------------------------------------------------------------------------
# Places where the other ranks used to wait


def a_file_in_the_way(folder: str) -> list[tuple[str, str, Any]]:
    """Rank 0 cannot make the folder of a checkpoint; then writing fails on rank 1 alone; then it succeeds."""
    distributed.set_timeout(20)
    weights = {"w": torch.zeros(1)}

    def save(where: str, state: Callable[[Path], Any]) -> Any:
        return str(store.save(Path(folder) / where, 1, weights, lambda _: None, state, keep=0).name)

    return [
        outcome(lambda: save("file", lambda _: None)),
        outcome(lambda: save("folder", lambda _: fail_on(1, OSError(errno.ENOSPC, "No space left on device")))),
        outcome(lambda: save("folder", lambda _: fail_on(1, UserError("no state")))),
        outcome(lambda: save("folder", lambda _: None)),
    ]


def test_a_checkpoint_that_one_rank_cannot_write_fails_on_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder").mkdir()
    first, second = world.run(a_file_in_the_way, 2, str(tmp_path))
    assert first == second
    blocked, full, stateless, written = first
    assert blocked[0] == "UserError"
    assert blocked[1].startswith(f"cannot write the checkpoint of step 1 into {tmp_path / 'file'}: ")
    assert "Not a directory" in blocked[1]
    assert full[0] == "UserError"
    assert "No space left on device; older ones are intact" in full[1]
    assert stateless[:2] == ("UserError", "no state")
    assert written == ("result", "", "step-0000001")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["latest", "step-0000001"]


def disk_full(folder: str) -> list[tuple[str, str, Any]]:
    """Counting and taking the run folder, where the disk of rank 0 answers with an error."""
    distributed.set_timeout(20)
    full = OSError(errno.ENOSPC, "No space left on device")
    kept, config.count_samples = config.count_samples, lambda paths, cache: fail(full)
    try:
        counted = outcome(lambda: config.count_samples_once(["a.tar"], ShardCache(), "data.train"))
        config.count_samples = lambda paths, cache: fail(ConfigError("data.cache is no folder"))
        configured = outcome(lambda: config.count_samples_once(["a.tar"], ShardCache(), "data.train"))
    finally:
        config.count_samples = kept
    run = RunFolder(f"{folder}/file/run")
    return [counted, configured, outcome(run.open)]


def test_counting_and_the_run_folder_fail_on_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    first, second = world.run(disk_full, 2, str(tmp_path))
    assert first == second
    assert first[0] == ("OSError", "[Errno 28] No space left on device", errno.ENOSPC)
    assert first[1][:2] == ("ConfigError", "data.cache is no folder")
    assert first[2][0] == "UserError"
    assert first[2][1].startswith(f"cannot write into the run folder {tmp_path / 'file' / 'run'}: Not a directory")
