"""Sounds to search: a shard and a folder of them, runs with and without an image tower, and a run that re-ranks sounds."""

from __future__ import annotations

import contextlib
import tarfile
from pathlib import Path

from launch import cli
from tests.support import Small
from tests.support.catalog import QUIET
from tests.support.sounds import AUDIO, write_shard

COUNT = 12
TRAINING = ["data.train=train.tar", "data.val=null", "data.batch_size=8", "train.eval_every=0"]


def make_sound_folder(small: Small, root: Path) -> None:
    """runs/three (image, text, audio), runs/two (text, audio), runs/heard (re-ranks sounds), sounds/ and sounds.tar.

    heard.log has what the last run printed.
    """
    with contextlib.chdir(root):
        write_shard(Path("train.tar"), 16)
        write_shard(Path("sounds.tar"), COUNT, seed=1000)
        with tarfile.open("sounds.tar") as tar:
            tar.extractall("sounds", filter="data")
        more = [*TRAINING, *QUIET, *AUDIO, "text.pool=avg"]
        assert cli.main(["pretrain", "scenes", *small.settings("three", *more, "data.incomplete=keep")]) == 0
        two = [setting for setting in small.settings("two", *more) if not setting.startswith("image.")]
        assert cli.main(["pretrain", "scenes", *two, "image=null"]) == 0
        words = ["init=runs/two", "run=heard", "fusion.context=audio", "task.foils=null", *TRAINING, *QUIET]
        with open("heard.log", "w") as log, contextlib.redirect_stderr(log):
            assert cli.main(["finetune", "retrieval", *words]) == 0


def list_files() -> list[str]:
    """The sounds of the folder, in the order of the shard."""
    return [f"sounds/{i:05d}.flac" for i in range(COUNT)]
