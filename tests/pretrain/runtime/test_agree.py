"""An error on one rank is raised on every rank with the same type and message, and no rank waits."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoints import writing
from pretrain.data import config
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.tar import DamagedTarError
from pretrain.errors import ConfigError, UserError
from pretrain.runtime import distributed
from pretrain.runtime.agree import gather_or_raise, on_all, on_main
from pretrain.training.run_dir import RunFolder
from tests.support import world


class TwoWordsError(ConfigError):
    """Pickle cannot rebuild it: it calls the constructor with one argument, which takes two."""

    def __init__(self, key: str, value: str) -> None:
        super().__init__(f"{key}={value}")


ERRORS: list[Exception] = [
    UserError("no samples in a.tar"),
    ConfigError("data.train matches no file"),
    DamagedTarError("a.tar is damaged at byte 512"),
    OSError(errno.ENOSPC, "No space left on device", "runs/first"),
    PermissionError(errno.EACCES, "Permission denied", "runs/first"),
    OSError("an error without a number"),
]


def outcome(work: Callable[[], Any]) -> tuple[str, str, Any]:
    """Call `work` and return (kind, message, result or errno), as plain values."""
    try:
        return "result", "", work()
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "errno", None)


def fail(error: Exception) -> Any:
    """Raise `error`."""
    raise error


def fail_on(rank: int, error: Exception) -> Any:
    """Raise `error` on one rank; return the rank on the others."""
    return fail(error) if distributed.rank() == rank else f"rank {distributed.rank()}"


def collect_outcomes() -> dict[str, Any]:
    """Call each function with work that succeeds and work that fails; return the outcomes on this rank."""
    distributed.set_timeout(20)
    caught: list[UserError] = []
    original = UserError("original")
    try:
        on_all(lambda: fail_on(0, original))
    except UserError as error:
        caught.append(error)
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
        "original object": caught[0] is original,
        "collectives still match": distributed.gather_objects(distributed.rank()),
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_errors_and_results_are_shared(processes: int) -> None:
    expected = [outcome(lambda error=error: fail(error)) for error in ERRORS]
    ranks = world.run(collect_outcomes, processes) if processes > 1 else [collect_outcomes()]
    for rank, outcomes in enumerate(ranks):
        assert outcomes["main"] == ("result", "", ["from", 0])
        assert outcomes["main fails"] == expected
        assert outcomes["all"] == ("result", "", rank)
        assert outcomes["all, not picklable"] == 3
        assert outcomes["one of all fails"] == [expected] * processes
        assert outcomes["all fail"] == ("UserError", "rank 0", None)
        assert outcomes["gathered"] == ("result", "", [10 * i for i in range(processes)])
        assert outcomes["one of gathered fails"] == [expected] * processes
        assert outcomes["rebuilt"][:2] == ("TwoWordsError" if rank == 0 else "ConfigError", "batch=7")
        assert outcomes["original object"] == (rank == 0)
        assert outcomes["collectives still match"] == list(range(processes))


def raise_unexpected() -> tuple[tuple[str, str, Any], list[int]]:
    """Raise an unexpected error, which each rank raises by itself, without a collective."""
    return outcome(lambda: on_all(lambda: fail(ZeroDivisionError("bug")))), distributed.gather_objects(distributed.rank())


def test_an_unexpected_error_is_raised_unchanged() -> None:
    for outcomes in world.run(raise_unexpected, 2):
        assert outcomes == (("ZeroDivisionError", "bug", None), [0, 1])


# ---------------------------------------------------------------------------------------------------------------------
# Calls in which the other ranks used to wait


def save_checkpoints(folder: str) -> list[tuple[str, str, Any]]:
    """Save four times on rank 0: it cannot create the folder; it fails to write twice; the last succeeds."""
    distributed.set_timeout(20)

    def save(name: str, write: Callable[[Path], Any] = Path.touch) -> Any:
        return str(writing.save(Path(folder) / name, 1, {"a": Path.touch, "state/b": write}, keep=0).name)

    return [
        outcome(lambda: save("file")),
        outcome(lambda: save("folder", lambda _: fail(OSError(errno.ENOSPC, "No space left on device")))),
        outcome(lambda: save("folder", lambda _: fail(UserError("no state")))),
        outcome(lambda: save("folder")),
    ]


def test_a_checkpoint_that_rank_0_cannot_write_fails_on_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder").mkdir()
    first, second = world.run(save_checkpoints, 2, str(tmp_path))
    assert first == second
    no_folder, disk_full, no_state, saved = first
    assert no_folder[0] == "SaveError"
    assert no_folder[1].startswith(f"cannot write the checkpoint of step 1 into {tmp_path / 'file'}: ")
    assert "Not a directory" in no_folder[1]
    assert disk_full[0] == "SaveError"
    assert "No space left on device; older ones are intact" in disk_full[1]
    assert no_state[:2] == ("UserError", "no state")
    assert saved == ("result", "", "step-0000001")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["latest", "step-0000001"]


def count_and_open_on_a_full_disk(folder: str) -> list[tuple[str, str, Any]]:
    """Count shards on a full disk and with a wrong cache folder; open a run folder below a file."""
    distributed.set_timeout(20)
    full = OSError(errno.ENOSPC, "No space left on device")
    original_counts, config.count_samples = config.count_samples, lambda paths, cache: fail(full)
    try:
        counted = outcome(lambda: config.count_samples_once(["a.tar"], ShardCache(), "data.train"))
        config.count_samples = lambda paths, cache: fail(ConfigError("data.cache is no folder"))
        configured = outcome(lambda: config.count_samples_once(["a.tar"], ShardCache(), "data.train"))
    finally:
        config.count_samples = original_counts
    run = RunFolder(f"{folder}/file/run")
    return [counted, configured, outcome(run.open)]


def test_counting_and_the_run_folder_fail_on_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    first, second = world.run(count_and_open_on_a_full_disk, 2, str(tmp_path))
    assert first == second
    assert first[0] == ("OSError", "[Errno 28] No space left on device", errno.ENOSPC)
    assert first[1][:2] == ("ConfigError", "data.cache is no folder")
    assert first[2][0] == "UserError"
    assert first[2][1].startswith(f"cannot write into the run folder {tmp_path / 'file' / 'run'}: Not a directory")
