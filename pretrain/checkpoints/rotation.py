"""Which checkpoints are deleted or set aside: rotation after a save, and what a run leaves when it resumes from an earlier one.

Call everything here on rank 0 alone, while it holds the run's lock.
"""

from __future__ import annotations

import itertools
import os
import shutil
from contextlib import suppress
from pathlib import Path

from pretrain.checkpoints.store import find_newest, list_complete, list_folders, parse_step, point_to, read_pointer
from pretrain.errors import ConfigError
from pretrain.runtime.console import log_info
from pretrain.runtime.files import write_text

_ABANDONED = "abandoned"
_BRANCH_STEP = "branch_step"
"""File in the folder of abandoned checkpoints: the step at which the branch that left them begins."""


def rotate(checkpoints: Path, keep: int, good: Path | None, in_use: Path | None = None) -> None:
    """Delete all but the newest `keep` checkpoints, the best one, `good` and `in_use`; keep <= 0 deletes none.

    What cannot be deleted stays, with a line: the new checkpoint is written, and the run goes on.
    """
    if keep <= 0:
        return
    branch_step = _branch_step(checkpoints)
    if good is not None and good.parent == checkpoints and branch_step is not None and parse_step(good) > branch_step:
        _delete_abandoned(checkpoints / _ABANDONED)
    with suppress(OSError):
        (checkpoints / _ABANDONED).rmdir()  # where a deletion was killed at its end, it is empty
    best = read_pointer(checkpoints, "best")
    newest = list_complete(checkpoints)[-keep:]
    for folder in list_folders(checkpoints):
        if folder not in (best, good, in_use) and parse_step(folder) < parse_step(newest[0]):
            delete(folder)


def delete(folder: Path) -> None:
    """Delete a folder if it is there; of a link, only the link."""
    try:
        if folder.is_symlink():  # somebody moved the checkpoint to another disk: what lies there is not ours to delete
            folder.unlink()
        elif folder.exists():
            # The manifest goes first: an interrupted deletion leaves no folder that looks complete.
            (folder / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(folder)
    except OSError as error:
        log_info(f"{folder} cannot be deleted and stays: {error}")


def _delete_abandoned(folder: Path) -> None:
    """Delete the abandoned checkpoints, and last the file that says when they may be deleted."""
    for path in folder.iterdir():
        if path.name != _BRANCH_STEP:
            delete(path)
    if [path.name for path in folder.iterdir()] == [_BRANCH_STEP]:
        delete(folder)


def _branch_step(checkpoints: Path) -> int | None:
    """Return the step at which the branch begins that left the abandoned checkpoints.

    None where no file states it, as of earlier versions: whether a checkpoint is of that branch is then not known.
    """
    try:
        return int((checkpoints / _ABANDONED / _BRANCH_STEP).read_text())
    except (OSError, ValueError):
        return None


def refuse_foreign_origin(checkpoints: Path, origin: Path | str) -> None:
    """Refuse to resume from the checkpoint of another run in a folder that has checkpoints of its own.

    Such a folder's checkpoints would all be set aside; most likely, `run` was forgotten. Damaged ones do not count.
    origin: a folder, or the url of a store. Raises ConfigError.
    """
    if isinstance(origin, Path) and checkpoints.resolve() in origin.resolve().parents:
        return
    newest = find_newest(checkpoints, lambda line: None)
    if newest is not None:
        raise ConfigError(
            f"resume={origin} lies outside the run folder {checkpoints.parent}, which has its own checkpoints (newest "
            f"{newest.name}): resume=auto goes on with them, another run=NAME starts from {origin}"
        )


def set_aside(checkpoints: Path, origin: Path, step: int) -> list[Path]:
    """Move the checkpoints that a run leaves behind when it resumes from `origin` into checkpoints/abandoned; return them.

    They are those of later steps, or all where `origin` lies elsewhere. Left where they are, they would outlive the new
    checkpoints at the next rotation, and the run would resume from them. None is replaced: what an earlier branch has left
    under the same name stays, and the new one goes to checkpoints/abandoned/2, 3, ... Call it on rank 0. Raises OSError.

    Args:
        origin: a checkpoint folder, in `checkpoints` or elsewhere.
        step: its step.
    """
    folders = list_folders(checkpoints)
    is_inside = origin.resolve() in [folder.resolve() for folder in folders]
    abandoned = [folder for folder in folders if not is_inside or parse_step(folder) > step]
    if read_pointer(checkpoints, "best") in abandoned:
        (checkpoints / "best").unlink()
    if abandoned:
        (checkpoints / _ABANDONED).mkdir(exist_ok=True)
        write_text(checkpoints / _ABANDONED / _BRANCH_STEP, str(step), sync=True)
    for folder in reversed(abandoned):  # the newest first, so that an interruption leaves the oldest of them
        parents = (checkpoints / _ABANDONED / ("" if i == 1 else str(i)) for i in itertools.count(1))
        target = next(parent / folder.name for parent in parents if not os.path.lexists(parent / folder.name))
        target.parent.mkdir(exist_ok=True)
        folder.rename(target)
    if not is_inside:
        (checkpoints / "latest").unlink(missing_ok=True)
    elif abandoned:
        point_to(checkpoints, "latest", origin)
    return abandoned
