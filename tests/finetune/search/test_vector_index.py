"""One suite for every backend of the index, held against closed forms, and Milvus against `exact` under random changes."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.search import places
from finetune.search.backends.nearest import find_nearest
from finetune.search.fields import Field
from finetune.search.vector_index import Description, IndexedItem, NoIndexError, VectorIndex
from pretrain.errors import ConfigError, UserError
from tests.support import environment

D = 4
FIELDS = (Field("price", "float"), Field("count", "int"), Field("room", "str"), Field("sold", "bool"))
DESCRIPTION = Description(D, {"fingerprint": "abc", "from": "runs/first", "step": 8}, FIELDS)
TEXTS = ["living", "a%b", "it's", 'say "hi"', "two\nlines", "\\", "", '" or price > 0 --', "猫🐈"]


def row(number: int, **fields: Any) -> IndexedItem:
    values = {"price": None, "count": None, "room": None, "sold": None, **fields}
    return IndexedItem(
        f"shard/{number}",
        "/data/shard.tar",
        512 * number,
        100 + number,
        f"picture {number}",
        values,
        b"\xff\xd8" + bytes([number]),
    )


def vector(*numbers: float) -> np.ndarray:
    return np.array(numbers, dtype=np.float32)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Milvus server: that of Milvus Lite, which speaks the same protocol."""
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    server, database, port = start_server_in_thread(str(tmp_path_factory.mktemp("server") / "x.db"), host="127.0.0.1", port=0)
    yield f"http://127.0.0.1:{port}"
    server.stop(grace=0)
    database.close()


@pytest.fixture(params=["exact", "lite", "server"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "server":
        return f"{request.getfixturevalue('server')}/c{request.node.name.partition('[')[0]}"
    return str(tmp_path / ("catalog.db" if request.param == "lite" else "catalog"))


@pytest.fixture
def index(place: str) -> Iterator[VectorIndex]:
    with places.create_index(place, DESCRIPTION) as index:
        yield index


def keys(hits: list[Any]) -> list[str]:
    return [hit.item.key for hit in hits]


def test_the_contract(index: VectorIndex, place: str) -> None:
    rows = [
        row(0, price=100.0, room="living", count=3, sold=True),
        row(1, price=900.0, room='a "b" \\ c'),
        row(2, room="bed", sold=False),
        row(3),
    ]
    vectors = np.stack([vector(2, 0, 0, 0), vector(1, 1, 0, 0), vector(0, 3, 0, 0), vector(0, 0, -1, 1)])
    assert index.count() == 0
    assert index.search(vectors[:2], 5) == [[], []]  # an empty index
    index.upsert(rows, vectors)
    assert index.count() == 4
    hits = index.search(np.stack([vector(1, 0, 0, 0), vector(0, 0.5, 0, 0)]), 2)
    assert [keys(of_query) for of_query in hits] == [["shard/0", "shard/1"], ["shard/2", "shard/1"]]
    np.testing.assert_allclose([[hit.score for hit in of_query] for of_query in hits], [[1, math.sqrt(0.5)]] * 2, atol=1e-6)
    assert hits[0][0].item == IndexedItem("shard/0", "/data/shard.tar", 0, 100, "picture 0", rows[0].fields)
    assert len(index.search(vectors[:1], 100)[0]) == 4  # k above the count

    assert keys(index.search(vector(0, 1, 0, 0)[None], 4, "price < 900 and room == 'living'")[0]) == ["shard/0"]
    assert index.count("exists price") == 2
    assert index.count("not exists price") == 2
    assert index.count("room == 'a \"b\" \\\\ c'") == 1
    assert index.count("room != 'living'") == 2  # null is neither equal nor unequal
    assert index.count("not sold") == 1
    assert index.count("key in ['shard/1', 'shard/3']") == 2
    assert index.count("caption like 'picture _'") == 4
    assert index.count("price > 1000") == 0
    assert index.search(vectors[:1], 3, "price > 1000") == [[]]

    assert index.list_values("room", 3) == ['a "b" \\ c', "bed", "living"]
    assert index.list_values("room", 2) == []  # there are more

    fetched = index.get(["shard/1", "nowhere", "shard/0"])
    assert fetched[1] is None
    assert fetched[0] is not None
    assert (fetched[0].key, fetched[0].thumbnail, fetched[0].offset) == ("shard/1", rows[1].thumbnail, 512)
    assert fetched[0].fields == rows[1].fields
    assert fetched[0].vector is not None
    np.testing.assert_allclose(fetched[0].vector, vectors[1] / math.sqrt(2), atol=1e-6)

    changed = row(1, price=5.0)
    index.upsert([row(1, price=4.0), changed], np.stack([vector(0, 0, 1, 0), vector(0, 0, 0, 1)]))  # the last one counts
    assert index.count() == 4
    assert keys(index.search(vector(0, 0, 0, 1)[None], 1)[0]) == ["shard/1"]
    assert index.count("price == 5") == 1
    assert index.list_values("room", 3) == ["bed", "living"]  # not of what was replaced
    assert index.delete(keys=["shard/3", "nowhere", "shard/3"]) == 1
    assert index.delete(filter="price >= 5") == 2
    assert index.count() == 1
    index.close()
    with places.open_index(place) as again:
        assert again.describe() == DESCRIPTION
        assert again.count() == 1
        assert keys(again.search(vectors[:1], 5)[0]) == ["shard/2"]


def test_captions_are_found_by_their_words(index: VectorIndex, place: str) -> None:
    captions = ["a red car", "A blue CAR on a long bridge", "", "red, red-painted bridge", "dog"]
    rows = [row(number, price=float(number)) for number in range(5)]
    for image, caption in zip(rows, captions, strict=True):
        image.caption = caption
    assert index.search_captions("car", 5) == []  # an empty index
    index.upsert(rows, np.eye(5, D, k=-1, dtype=np.float32) + np.ones((5, D), np.float32))
    found = index.search_captions("Car", 5)
    assert keys(found) == ["shard/0", "shard/1"]  # the shorter caption first
    assert found[0].score > found[1].score > 0
    assert found[0].item == IndexedItem("shard/0", "/data/shard.tar", 0, 100, "a red car", rows[0].fields)
    assert set(keys(index.search_captions("red bridge", 5))) == {"shard/0", "shard/1", "shard/3"}
    assert keys(index.search_captions("red bridge", 1)) == ["shard/3"]
    assert keys(index.search_captions("red bridge", 5, "price < 1")) == ["shard/0"]
    assert index.search_captions("zebra", 5) == index.search_captions(" ", 5) == []
    rows[4].caption = "a red dog"
    index.upsert(rows[4:], np.ones((1, D), np.float32))
    index.delete(keys=["shard/3"])
    assert set(keys(index.search_captions("red", 5))) == {"shard/0", "shard/4"}
    index.close()
    with places.open_index(place) as again:
        assert set(keys(again.search_captions("red", 5))) == {"shard/0", "shard/4"}
    with pytest.raises(ConfigError, match="must be from 1"):
        again.search_captions("red", 0)


def test_what_no_backend_gets_to_see(index: VectorIndex) -> None:
    good = vector(1, 0, 0, 0)
    for bad, message in (
        (vector(1, math.nan, 0, 0), "the embedding of shard/0 is not finite"),
        (vector(1, math.inf, 0, 0), "the embedding of shard/0 is not finite"),
        (vector(0, 0, 0, 0), "the embedding of shard/0 is all zero"),
        (vector(1, 0, 0), "holds embeddings of 4 numbers"),
    ):
        with pytest.raises(UserError, match=message):
            index.upsert([row(0)], bad[None])
        with pytest.raises(UserError, match=message.replace("shard/0", "query 0")):
            index.search(bad[None], 1)
    for wrong, message in (
        (row(0, price="cheap"), "price='cheap' of shard/0 is no float"),
        (row(0, price=math.nan), "is no float"),
        (row(0, count=2**63), "is no int"),
        (row(0, weight=1.0), "has no field 'weight'"),
        (row(0, room="x" * 65536), "room of shard/0 is longer than 65,535 bytes"),
        (row(0, room="é" * 40000), "longer than 65,535 bytes"),
        (IndexedItem("", "", -1, 0), "the key '' must have 1 to 1,024 bytes"),
        (IndexedItem("k" * 1025, "", -1, 0), "must have 1 to 1,024 bytes"),
    ):
        with pytest.raises(UserError, match=message):
            index.upsert([wrong], good[None])
    with pytest.raises(UserError, match="bytes of UTF-8"):
        index.upsert([IndexedItem("\udcff", "", -1, 0)], good[None])
    for k in (0, 16385):
        with pytest.raises(ConfigError, match="must be from 1 to 16,384"):
            index.search(good[None], k)
    for condition, message in (("prise < 1", "no field 'prise'; did you mean 'price'"), ("price <", "column 8")):
        with pytest.raises(ConfigError, match=message):
            index.search(good[None], 1, condition)
    assert index.count() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Random changes


def changes() -> st.SearchStrategy[list[tuple[str, Any]]]:
    one = st.tuples(
        st.integers(0, 11),
        st.lists(st.integers(-3, 3), min_size=D, max_size=D).filter(any),
        st.none() | st.sampled_from([0.0, 1.5, -2.0, 900.0]),
        st.none() | st.integers(-2, 2),
        st.none() | st.sampled_from(TEXTS),
        st.none() | st.booleans(),
    )
    conditions = st.sampled_from(
        ["price < 900", "not (room like '%o%')", "exists count and count != 1", "room == '\" or price > 0 --'",
         "sold or count < 0.5", "room in ['it\\'s', \"two\\nlines\", '\\\\']", "not exists room", "not (sold or price > 1)"]
    )  # fmt: skip
    return st.lists(
        st.tuples(st.just("upsert"), st.lists(one, min_size=1, max_size=6))
        | st.tuples(st.just("delete"), st.lists(st.integers(0, 11), min_size=1, max_size=3))
        | st.tuples(st.just("delete matching"), conditions)
        | st.tuples(st.just("count"), conditions)
        | st.tuples(st.just("restart"), st.none()),
        min_size=4,
        max_size=10,
    )


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes(), st.lists(st.integers(-3, 3), min_size=D, max_size=D).filter(any))
def test_milvus_holds_what_exact_holds(tmp_path_factory: pytest.TempPathFactory, steps: list[Any], query: list[int]) -> None:
    folder = tmp_path_factory.mktemp("changes")
    names = [str(folder / "exact"), str(folder / "lite.db")]
    indexes = [places.create_index(name, DESCRIPTION) for name in names]
    try:
        for step, argument in [*steps, ("restart", None)]:
            if step == "upsert":
                rows = [row(n, price=p, count=c, room=r, sold=s) for n, _, p, c, r, s in argument]
                outcomes: list[Any] = [
                    index.upsert(rows, np.array([values[1] for values in argument], np.float32)) for index in indexes
                ]
            elif step == "delete":
                outcomes = [index.delete(keys=[f"shard/{n}" for n in argument]) for index in indexes]
            elif step == "delete matching":
                outcomes = [index.delete(filter=argument) for index in indexes]
            elif step == "count":
                outcomes = [index.count(argument) for index in indexes]
            else:
                for index in indexes:
                    index.close()
                indexes = [places.open_index(name, is_writable=True) for name in names]
                outcomes = []
            outcomes += [index.count() for index in indexes]
            assert len(set(outcomes[-2:])) == 1
            assert len(set(map(str, outcomes[:-2]))) <= 1
            exact, lite = (
                {hit.item.key: hit for hit in index.search(np.array([query], np.float32), 12)[0]} for index in indexes
            )
            assert exact.keys() == lite.keys()
            assert {key: hit.item for key, hit in exact.items()} == {key: hit.item for key, hit in lite.items()}
            np.testing.assert_allclose([exact[key].score for key in exact], [lite[key].score for key in exact], atol=1e-6)
    finally:
        for index in indexes:
            index.close()


def test_nearest_are_those_of_a_full_sort() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.integers(-2, 3, (3000, D)).astype(np.float32)  # with many ties
    for share in (1.0, 0.5, 0.01):
        mask = rng.random(3000) < share
        queries = rng.integers(-2, 3, (3, D)).astype(np.float32)
        rows, scores = find_nearest(queries, vectors, mask, 50)
        for i, query in enumerate(queries):
            candidates = np.flatnonzero(mask)
            order = sorted(candidates, key=lambda row: (-float(vectors[row] @ query), row))[:50]
            assert rows[i].tolist() == order
            assert scores[i].tolist() == [float(vectors[row] @ query) for row in order]


# ---------------------------------------------------------------------------------------------------------------------
# Crashes


WRITER = """
import sys
import numpy as np
from finetune.search import places
from finetune.search.vector_index import Description, IndexedItem
with places.create_index(sys.argv[1], Description(16, {})) as index:
    for batch in range(1000):
        rows = [IndexedItem(f"{batch}/{i}", "/a.tar", 0, 9, thumbnail=bytes(2000)) for i in range(8)]
        index.upsert(rows, np.random.default_rng(batch).normal(size=(8, 16)).astype(np.float32))
        print(batch, flush=True)
"""


@pytest.mark.parametrize("name", ["catalog", "catalog.db"])
def test_what_upsert_has_returned_survives_a_kill(tmp_path: Path, name: str) -> None:
    """The writer is killed at some moment after its 20th batch, and nothing that it reported is missing."""
    place = str(tmp_path / name)
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, place], env=environment(), stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        reported = [writer.stdout.readline() for _ in range(20)]
        writer.kill()
        reported += writer.stdout.read().splitlines()
    last = int(reported[-1])
    with places.open_index(place, is_writable=True) as index:
        assert index.count() in (8 * (last + 1), 8 * (last + 2))  # the batch in progress is there as a whole, or not at all
        for batch in (0, last):
            images = index.get([f"{batch}/{i}" for i in range(8)])
            vectors = np.random.default_rng(batch).normal(size=(8, 16))
            for image, expected in zip(images, vectors, strict=True):
                assert image is not None
                assert image.thumbnail == bytes(2000)
                assert image.vector is not None
                np.testing.assert_allclose(image.vector, expected / np.linalg.norm(expected), atol=1e-6)
        index.upsert([IndexedItem("after", "", -1, 0)], np.ones((1, 16), np.float32))
        assert index.get(["after"])[0] is not None


def test_a_change_that_was_not_written_to_its_end_does_not_count(tmp_path: Path) -> None:
    """As after a loss of power: the files end at any byte behind the last commit; the next change overwrites it."""
    first, second = np.eye(2, D, dtype=np.float32)[:, None]
    whole, before = tmp_path / "whole", tmp_path / "before"
    with places.create_index(str(whole), DESCRIPTION) as index:
        index.upsert([row(1, price=1.0)], first)
        shutil.copytree(whole, before)
        index.upsert([row(2, price=2.0), row(1, price=3.0)], np.concatenate([second, first]))
    files = ["vectors.f32", "thumbnails.bin", "rows.arrow", "commits.txt"]
    for number, file in enumerate(files):
        for share in (0.0, 0.5, 0.99):
            broken = tmp_path / f"broken {number} {share}"
            shutil.copytree(before, broken)
            for earlier in files[:number]:
                shutil.copyfile(whole / earlier, broken / earlier)
            begin, end = (before / file).stat().st_size, (whole / file).stat().st_size
            (broken / file).write_bytes((whole / file).read_bytes()[: begin + int(share * (end - begin))])
            with places.open_index(str(broken), is_writable=True) as index:
                assert index.count() == index.count("price == 1") == 1
                index.upsert([row(2, price=2.0), row(1, price=3.0)], np.concatenate([second, first]))
            for name in files:
                assert (broken / name).read_bytes() == (whole / name).read_bytes()


def test_a_damaged_index_is_refused_in_one_line(tmp_path: Path) -> None:
    place = tmp_path / "catalog"
    with places.create_index(str(place), DESCRIPTION) as index:
        index.upsert([row(1), row(2)], np.eye(2, D, dtype=np.float32))
        with pytest.raises(UserError, match="is being written by another process"):
            places.open_index(str(place), is_writable=True)
        with places.open_index(str(place)) as reader:  # reads what is there, while the other writes
            index.upsert([row(3)], np.ones((1, D), np.float32))
            assert (reader.count(), index.count()) == (2, 3)
            with pytest.raises(UserError, match="open for reading only"):
                reader.delete(keys=["shard/1"])
    for file, content, message in (
        ("vectors.f32", b"short", "vectors.f32 has 5 bytes, and 48 were written: it is damaged"),
        (
            "commits.txt",
            (place / "commits.txt").read_bytes().replace(b'"removed": []', b'"removed": [0]', 1),
            "is damaged in line 1",
        ),
        ("index.json", b"{}", "is no index of clipfuse, or its description is damaged"),
        ("index.json", (place / "index.json").read_bytes().replace(b"index 1", b"index 9"), "is not of clipfuse index 1"),
    ):
        broken = tmp_path / "broken"
        shutil.copytree(place, broken)
        (broken / file).write_bytes(content)
        with pytest.raises(UserError, match=message) as refused:
            places.open_index(str(broken))
        assert "\n" not in str(refused.value)
        shutil.rmtree(broken)
    with pytest.raises(NoIndexError):
        places.open_index(str(tmp_path / "nowhere"))
