"""Compaction of rows that were replaced: nothing is lost, space comes back, and a kill at any write leaves old or new."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.search import places
from finetune.search.backends.exact import ExactIndex
from finetune.search.item_sources import Location
from finetune.search.token_store import ItemTokens, Layout, TokenStore
from finetune.search.vector_index import Description, IndexedItem, VectorIndex
from pretrain.towers import TokenSequence

DESCRIPTION = Description(4, {"fingerprint": "f", "from": "runs/x", "step": 1}, ())


def build(place: Path, rounds: int = 4, count: int = 6) -> VectorIndex:
    """An index whose images were replaced `rounds` - 1 times; the last image was removed."""
    index = places.create_index(str(place), DESCRIPTION)
    for number in range(rounds):
        generator = np.random.default_rng(number)
        rows = [IndexedItem(f"k{i}", "s", i, 1, f"caption {i} of {number}", {}, bytes([i, number]) * 50) for i in range(count)]
        index.upsert(rows, generator.normal(size=(count, 4)).astype(np.float32))
    index.delete(keys=[f"k{count - 1}"])
    return index


def describe(index: VectorIndex, count: int = 6) -> list[Any]:
    """All that an index says: rows, vectors, thumbnails, searches, captions."""
    images = index.get([f"k{i}" for i in range(count)])
    rows = [
        (x.key, x.caption, x.thumbnail, x.offset, x.vector.tolist()) if x and x.vector is not None else None for x in images
    ]
    hits = index.search(np.eye(4, dtype=np.float32), 10)
    by_caption = index.search_captions("caption 3", 10)
    return [
        index.count(),
        rows,
        [[(h.item.key, round(h.score, 6)) for h in hit] for hit in hits],
        [h.item.key for h in by_caption],
    ]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_space_comes_back_and_all_else_stays(tmp_path: Path) -> None:
    place = tmp_path / "index"
    with build(place) as index:
        before = describe(index)
        reader = places.open_index(str(place))  # opened the state before
        size = size_of(place)
        assert index.compact(least=0.9) == 0  # 19 of 24 rows are dead
        assert index.compact() == 19
        assert describe(index) == before
        assert describe(reader) == before
        assert size_of(place) < size / 2
        assert index.compact() == 0  # nothing is dead
        index.upsert([IndexedItem("new", "s", 0, 1, "a new caption")], np.ones((1, 4), np.float32))
    with places.open_index(str(place), is_writable=True) as again:
        assert again.count() == 6
        assert [hit.item.key for hit in again.search_captions("new", 3)] == ["new"]
        assert again.delete(keys=["new"]) == 1
        assert describe(again) == before
        again.delete(filter="key like 'k%'")
        assert again.compact() == 6
        assert (again.count(), again.search(np.eye(4, dtype=np.float32), 3)) == (0, [[]] * 4)
    with places.open_index(str(place)) as empty:
        assert empty.count() == 0


def run_and_die(place: Path, kind: str, step: int) -> bool:
    """Compact in a process that kills itself before the step-th flush or rename; return whether it came to an end."""
    pid = os.fork()
    if pid == 0:
        calls = iter(range(1000))

        def counted(function: Any) -> Any:
            def call(*args: Any, **more: Any) -> Any:
                if next(calls) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **more)

            return call

        for name in ("fsync", "replace", "rename", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            if kind == "index":
                places.open_index(str(place), is_writable=True).compact()
            else:
                TokenStore(place).compact()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_kill_while_an_index_is_compacted(tmp_path: Path) -> None:
    kills = 0
    for step in range(30):
        place = tmp_path / f"index{step}"
        with build(place) as index:
            before = describe(index)
        if run_and_die(place, "index", step):
            break
        kills += 1
        with places.open_index(str(place)) as reader:
            assert describe(reader) == before
        with places.open_index(str(place), is_writable=True) as index:
            index.compact()
            assert describe(index) == before
            assert index.compact() == 0
        assert len(list(place.glob("vectors*"))) == 1  # what the killed process left is gone
    assert 4 <= kills < 29


def features(*numbers: int) -> ItemTokens:
    states = torch.tensor(numbers, dtype=torch.float32)[:, None, None].expand(-1, 4, 8).contiguous()
    mask = torch.ones(len(numbers), 4, dtype=torch.bool)
    embedding = torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, 3).contiguous()
    return ItemTokens(TokenSequence(states, mask, (2, 2), states[:, 0]), embedding)


def build_store(folder: Path) -> TokenStore:
    store = TokenStore.create(folder, Layout("f", "runs/x", 1, 1, 4, 8, 3, (2, 2)))
    for start in (0, 100, 200):
        store.put([f"k{i}" for i in range(5)], [Location("s", i, 1) for i in range(5)], features(*range(start, start + 5)))
    store.remove(["k4"])
    return store


def read(store: TokenStore) -> list[float]:
    rows = store.find([f"k{i}" for i in range(4)], [Location("s", i, 1) for i in range(4)])
    return [float(x) for x in store.read([row for row in rows if row is not None]).tokens.states[:, 0, 0]]


def test_a_token_store_is_compacted_while_others_read(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    store = build_store(folder)
    reader = TokenStore(folder)
    rows = reader.find(["k3"], [Location("s", 3, 1)])
    assert store.compact(least=0.9) == 0
    assert store.compact() == 11
    assert float(reader.read([row for row in rows if row is not None]).tokens.states[0, 0, 0]) == 203  # of the state it found
    assert read(store) == read(reader) == [200, 201, 202, 203]
    assert store.find(["k4"], [Location("s", 4, 1)]) == [None]
    assert len(list(folder.glob("rows*"))) == 1
    assert next(folder.glob("rows*")).stat().st_size == 4 * store.layout.row.itemsize
    assert store.compact() == 0
    store.put(["k0"], [Location("s", 0, 1)], features(7))
    assert read(reader) == [7, 201, 202, 203]
    reader.close()
    store.close()


def test_a_kill_while_a_token_store_is_compacted(tmp_path: Path) -> None:
    for step in range(20):
        folder = tmp_path / f"tokens{step}"
        build_store(folder).close()
        ended = run_and_die(folder, "tokens", step)
        with TokenStore(folder) as store:
            assert read(store) == [200, 201, 202, 203]
            store.compact()
            assert read(store) == [200, 201, 202, 203]
            store.put(["k9"], [Location("s", 9, 1)], features(9))
            assert len(list(folder.glob("rows*"))) == 1
        if ended:
            break
    assert 1 <= step < 19


def test_a_full_disk_leaves_the_index_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.errors import UserError

    place = tmp_path / "index"
    with build(place) as index:
        before = describe(index)

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(UserError, match=r"cannot write into .*: No space left on device"):
                index.compact()
        assert describe(index) == before
        assert isinstance(index, ExactIndex)
        assert index.compact() == 19
        assert describe(index) == before
