"""A small catalog to search: 24 products, an index of them, and the runs that search, re-rank and answer questions."""

from __future__ import annotations

import contextlib
import json
import tarfile
from pathlib import Path

from launch import cli
from tests.support import Small

QUIET = ["data.workers=0", "eval.workers=0", "train.trackers=[]", "train.threads=1", "train.steps=2", "train.epochs=0"]


def make_search_folder(small: Small, root: Path) -> None:
    """runs/first and another run, runs/retrieval, products/ (24 images with json), products.tar, and `catalog`."""
    with contextlib.chdir(root):
        assert cli.main(["pretrain", "scenes", *small.settings("first", "train.steps=2")]) == 0
        assert cli.main(["pretrain", "scenes", *small.settings("other", "train.steps=1")]) == 0
        assert cli.main(finetune_words(small, "retrieval", "task.foils=null")) == 0
        make_products(small, Path("products"))
        with tarfile.open("products.tar", "w") as tar:
            for path in sorted(Path("products").rglob("*.*")):
                tar.add(path, path.name)
        assert cli.main(index_words("products.tar", "catalog")) == 0


def finetune_words(small: Small, task: str, *more: str) -> list[str]:
    """The command that fine-tunes runs/first for two steps, into runs/TASK."""
    shards = [f"data.train={small.train}", "data.val=null", "train.eval_every=0", "data.batch_size=8"]
    return ["finetune", task, "init=runs/first", f"run={task}", *shards, *QUIET, *more]


def make_products(small: Small, folder: Path) -> None:
    """24 validation scenes as files; price and room in json, missing in every fifth."""
    folder.mkdir()
    with tarfile.open(next(small.root.glob("scenes/val-*.tar"))) as tar:
        jpegs = [name for name in tar.getnames() if name.endswith(".jpg")][:24]
        for i, name in enumerate(jpegs):
            for extension in ("jpg", "txt"):
                file = tar.extractfile(name.replace(".jpg", f".{extension}"))
                assert file is not None
                (folder / f"p{i:02d}.{extension}").write_bytes(file.read())
            values = {} if i % 5 == 0 else {"price": 100.0 * i, "room": ["living", "bed", "o\"b'c"][i % 3]}
            (folder / f"p{i:02d}.json").write_text(json.dumps(values))


def index_words(data: str, place: str, *more: str) -> list[str]:
    """The command that indexes products."""
    return ["index", "runs/first", "--data", data, "--db", place, "--fields", "price:float,room:str", *more]
