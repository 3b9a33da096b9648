"""The rounded copy of an index's vectors: searches find what float64 finds, after changes, crashes and older versions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.search import exact_files, places, rounded
from finetune.search.fields import Field
from finetune.search.rounded import round_rows
from finetune.search.vector_index import Description, IndexedImage, VectorIndex
from tests.support import environment
from tests.support.vectors import draw, normalize, order

D = 32
DESCRIPTION = Description(D, {"fingerprint": "f"}, (Field("number", "int"),))
needs_bfloat16 = pytest.mark.skipif(not rounded.is_fast(), reason="this processor does not multiply bfloat16")


@pytest.fixture
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies from 1000 rows on."""
    monkeypatch.setattr(exact_files, "_WORTHWHILE", 1000 * 4 * D)


def upsert(index: VectorIndex, truth: dict[int, np.ndarray], numbers: Any, seed: int) -> None:
    vectors = draw("normal", len(numbers), D, seed)
    index.upsert([IndexedImage(f"k{i}", "", -1, 0, fields={"number": i}) for i in numbers], vectors)
    truth.update(zip(numbers, vectors, strict=True))


def check(index: VectorIndex, truth: dict[int, np.ndarray]) -> None:
    """Compare searches with a full sort in float64."""
    numbers = np.array(list(truth))
    rows = np.stack(list(truth.values()))
    assert index.count() == len(truth)
    queries = draw("normal", 3, D, 99)
    for condition, mask in ((None, numbers >= 0), ("number < 900", numbers < 900), ("number < 30", numbers < 30)):
        best, scores = order(queries, rows, mask, 8)
        for i, hits in enumerate([*index.search(queries, 8, condition), *index.search(queries[:1], 8, condition)]):
            assert [hit.image.key for hit in hits] == [f"k{number}" for number in numbers[best[i % 3]]]
            np.testing.assert_allclose([hit.score for hit in hits], scores[i % 3], rtol=0, atol=3e-7)


def read_copy(place: Path) -> np.ndarray | None:
    """The copy that the last commit names; None where it names none. Whatever there is must be of the vectors."""
    *_, line = (place / "commits.txt").read_text().splitlines()
    commit = json.loads(line.partition(" ")[2])
    generation, length = commit["generation"], commit.get("rounded", 0)
    if not length:
        return None
    copy = np.frombuffer((place / exact_files.name_file("rounded", generation)).read_bytes()[:length], np.uint16)
    vectors = np.fromfile(place / exact_files.name_file("vectors", generation), np.float32)
    np.testing.assert_array_equal(copy, round_rows(vectors[: len(copy)]))
    return copy.reshape(-1, D)


def forget_copies(place: Path) -> None:
    """Make an index what an older version writes."""
    lines = [json.loads(line.partition(" ")[2]) for line in (place / "commits.txt").read_text().splitlines()]
    for commit in lines:
        commit.pop("rounded", None)
    (place / "commits.txt").write_bytes(b"".join(map(exact_files.encode_commit, lines)))
    for path in place.glob("rounded*"):
        path.unlink()


@needs_bfloat16
@pytest.mark.usefixtures("small_copies")
def test_a_copy_follows_all_changes(tmp_path: Path) -> None:
    place, truth = tmp_path / "index", dict[int, np.ndarray]()
    rng = np.random.default_rng(0)
    with places.create_index(str(place), DESCRIPTION) as index:
        upsert(index, truth, range(700), 0)
        check(index, truth)
        assert read_copy(place) is None  # too few
        upsert(index, truth, range(700, 1300), 1)
        copy = read_copy(place)
        assert copy is not None
        assert copy.shape == (1300, D)
        check(index, truth)
    for seed in range(2, 8):
        with places.open_index(str(place), is_writable=True) as index:
            upsert(index, truth, sorted(rng.choice(1500, 80, replace=False).tolist()), seed)
            gone = rng.choice(list(truth), 20, replace=False).tolist()
            assert index.delete(keys=[f"k{number}" for number in gone]) == 20
            for number in gone:
                del truth[number]
            if seed == 4:
                assert index.compact() > 0
            if seed == 6:
                assert index.delete(filter="number >= 1000 and number < 1100") == sum(1000 <= i < 1100 for i in truth)
                truth = {number: row for number, row in truth.items() if not 1000 <= number < 1100}
            check(index, truth)
            copy = read_copy(place)
            assert copy is not None
            assert 2 * copy.nbytes == (place / exact_files.name_file("vectors", int(seed >= 4))).stat().st_size
    with places.open_index(str(place), is_writable=True) as index:
        index.delete(filter="number >= 900")
        truth = {number: row for number, row in truth.items() if number < 900}
        index.compact()
        check(index, truth)
        assert read_copy(place) is None  # too few again
        assert not list(place.glob("rounded*"))


@needs_bfloat16
@pytest.mark.usefixtures("small_copies")
def test_the_first_search_of_an_older_index_makes_the_copy(tmp_path: Path) -> None:
    place, truth = tmp_path / "index", dict[int, np.ndarray]()
    with places.create_index(str(place), DESCRIPTION) as index:
        upsert(index, truth, range(2500), 0)
    forget_copies(place)
    with places.open_index(str(place), is_writable=True) as index:
        upsert(index, truth, range(2400, 2600), 1)  # lacks too much to be made up for here
        assert read_copy(place) is None
        with places.open_index(str(place)) as reader:
            check(reader, truth)  # another process writes
        assert read_copy(place) is None
    with places.open_index(str(place)) as reader, places.open_index(str(place)) as other:
        check(reader, truth)
        copy = read_copy(place)
        assert copy is not None
        assert len(copy) == 2700
        check(other, truth)  # of the state before, which is not changed
        assert len((place / "commits.txt").read_text().splitlines()) == 3
    with places.open_index(str(place), is_writable=True) as index:
        upsert(index, truth, range(2600, 2650), 2)
        copy = read_copy(place)
        assert copy is not None
        assert len(copy) == 2750
    for damage in ("removed", "cut off"):
        path = place / "rounded.bf16"
        path.unlink() if damage == "removed" else os.truncate(path, 1000)
        with places.open_index(str(place)) as reader:
            check(reader, truth)
        assert read_copy(place) is not None


@needs_bfloat16
@pytest.mark.usefixtures("small_copies")
def test_an_older_version_may_write_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commits do not mention the copy, and what it writes over rows that were never committed is not in it."""
    place, truth = tmp_path / "index", dict[int, np.ndarray]()
    with places.create_index(str(place), DESCRIPTION) as index:
        upsert(index, truth, range(1200), 0)
        before = (place / "commits.txt").read_bytes()
        upsert(index, dict(truth), range(1200, 1300), 1)
    (place / "commits.txt").write_bytes(before)  # killed before the commit
    with places.open_index(str(place), is_writable=True) as index, monkeypatch.context() as patch:
        patch.setattr(exact_files, "_WORTHWHILE", 1 << 40)
        upsert(index, truth, range(1200, 1250), 2)
    *lines, last = (place / "commits.txt").read_text().splitlines()
    commit = json.loads(last.partition(" ")[2])
    del commit["rounded"]
    (place / "commits.txt").write_bytes("".join(f"{line}\n" for line in lines).encode() + exact_files.encode_commit(commit))
    content = bytearray((place / "rounded.bf16").read_bytes())
    content[0] ^= 1  # a mark: rows that other processes may be reading are not written again
    (place / "rounded.bf16").write_bytes(content)
    with places.open_index(str(place)) as reader:
        check(reader, truth)
    marked = bytearray((place / "rounded.bf16").read_bytes())
    assert marked[0] == content[0]
    marked[0] ^= 1
    (place / "rounded.bf16").write_bytes(marked)
    copy = read_copy(place)
    assert copy is not None
    assert len(copy) == 1250


def kill_before(step: int, action: Callable[[], Any]) -> bool:
    """Act in a process that kills itself before the step-th flush, rename or removal; return whether it came to an end."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
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
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code == 0


@needs_bfloat16
@pytest.mark.usefixtures("small_copies")
@pytest.mark.parametrize("kind", ["upsert", "search", "compact"])
def test_a_kill_at_any_step(tmp_path: Path, kind: str) -> None:
    original, truth = tmp_path / "original", dict[int, np.ndarray]()
    with places.create_index(str(original), DESCRIPTION) as index:
        upsert(index, truth, range(900), 0)
        if kind != "upsert":
            upsert(index, truth, range(800, 1200), 1)
    if kind == "search":
        forget_copies(original)
    after = dict(truth)
    if kind == "upsert":
        after.update(zip(range(800, 1100), draw("normal", 300, D, 2), strict=True))
    kills = 0
    for step in range(30):
        place = tmp_path / str(step)
        shutil.copytree(original, place)

        def act(place: Path = place) -> None:
            torch.set_num_threads(1)  # threads do not survive a fork
            with places.open_index(str(place), is_writable=kind != "search") as index:
                if kind == "upsert":
                    upsert(index, {}, range(800, 1100), 2)
                elif kind == "search":
                    index.search(draw("normal", 1, D, 3), 5)
                else:
                    index.compact()

        if kill_before(step, act):
            break
        kills += 1
        with places.open_index(str(place), is_writable=True) as index:
            check(index, after if index.count() == len(after) else truth)
            read_copy(place)
            upsert(index, {}, range(800, 1100), 2)
            expected = {**truth, **dict(zip(range(800, 1100), draw("normal", 300, D, 2), strict=True))}
            check(index, expected)
            assert read_copy(place) is not None
        shutil.rmtree(place)
    assert 3 <= kills < 29


WITHOUT_TORCH = """
import sys
import numpy as np
from finetune.search import exact_files, places
from finetune.search.vector_index import Description, IndexedImage
exact_files._WORTHWHILE = 1
vectors = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)
with places.create_index(sys.argv[1], Description(8, {})) as index:
    index.upsert([IndexedImage(str(i), "", -1, 0) for i in range(2000)], vectors)
    found = index.search(vectors[:2], 5)
assert "torch" not in sys.modules
print([[hit.image.key for hit in hits] for hits in found])
"""


def test_neither_writing_nor_comparing_imports_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "index")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    vectors = normalize(np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32))
    best, _ = order(vectors[:2], vectors, np.ones(2000, np.bool_), 5)
    assert json.loads(done.stdout.replace("'", '"')) == best.astype(str).tolist()
    assert (tmp_path / "index" / "rounded.bf16").stat().st_size == 2000 * 8 * 2
