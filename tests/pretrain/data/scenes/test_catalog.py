"""`clipfuse data scenes --catalog`: judgments follow from the json fields, and the bytes from the seed."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from pretrain.data.filter_parser import parse_filter

SHOWN = ("thing", "color", "material", "size", "place")
PLACE = re.compile(r" (on|in|at|under) ")


def draw(folder: Path, *more: str) -> int:
    return cli.main(["data", "scenes", str(folder), "--catalogue", "--num", "60", "--size", "64", "--workers", "1", *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalog") / "shop"
    assert draw(folder) == 0
    return folder


def read_members(shard: Path, extension: str) -> dict[str, bytes]:
    """Return the files of a shard with this extension, by the keys that an index gives its samples."""
    with tarfile.open(shard) as tar:
        members = [member for member in tar if member.name.endswith(extension)]
        return {f"{shard.stem}/{m.name.removesuffix(extension)}": tar.extractfile(m).read() for m in members}  # type: ignore[union-attr]


def read_products(shard: Path) -> dict[str, dict[str, Any]]:
    return {key: json.loads(content) for key, content in read_members(shard, ".json").items()}


def test_judgments_are_those_of_the_rule_applied_to_every_pair(folder: Path) -> None:
    products = read_products(folder / "catalog-0000.tar")
    queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    assert len(products) == 60
    assert 50 < len(queries) == len({query["id"] for query in queries})
    expected = {}
    for query in queries:
        condition = parse_filter(query["filter"], "filter") if "filter" in query else None
        for key, product in products.items():
            wrong = [name for name, value in query["attributes"].items() if product[name] != value]
            if len(wrong) < 2 and (condition is None or condition.matches(product)):
                expected[query["id"], key] = 1 if wrong else 3
    lines = [line.split("\t") for line in (folder / "qrels.tsv").read_text().splitlines()]
    assert {(query, key): int(grade) for query, _, key, grade in lines} == expected
    assert len(lines) == len(expected)
    assert {query for (query, _), grade in expected.items() if grade == 3} == {query["id"] for query in queries}
    assert 10 < sum("filter" in query for query in queries) < 25


def test_texts_say_what_they_should(folder: Path) -> None:
    """Words of captions and queries are those of the attributes; a negative caption is wrong in the one that it names."""
    products, vocabulary = read_products(folder / "train-0000.tar"), json.loads((folder / "vocabulary.json").read_text())
    values = {name: {product[name] for product in products.values()} for name in SHOWN}
    assert all(len(values[name]) > 2 for name in SHOWN)
    values["place"] -= {"room"}
    phrases = {"room": r"in (a|the) room", "grass": r"grass|meadow"}

    def mentions(text: str, name: str) -> set[str]:
        return {value for value in values[name] if re.search(phrases.get(value, rf"\b{value}\b"), text)}

    for product in products.values():
        assert all(mentions(product["captions"][0], name) == {product[name]} for name in SHOWN if product[name] in values[name])
        for caption in product["captions"]:
            assert all(mentions(caption, name) <= {product[name]} for name in SHOWN)
        assert [foil["changed"] for foil in product["foils"]] == list(SHOWN)
        assert len(product["caption_foils"]) == 2 * len(product["captions"])
        pairs = [(product["captions"][0], foil) for foil in product["foils"]]
        pairs += [(product["captions"][i // 2], foil) for i, foil in enumerate(product["caption_foils"])]
        for caption, foil in pairs:
            wrong = {name for name in SHOWN if not mentions(foil["caption"], name) <= {product[name]}}
            assert wrong <= {foil["changed"]}
            assert wrong or foil["changed"] == "place"  # "in a room" is not among the values
            # It names what its caption names, so that only a look at the image tells which of the two is wrong.
            named, expected = (
                [bool(set(text.split()) & set(vocabulary[name])) for name in ("name", "color", "surface", "size")]
                + [bool(PLACE.search(text))]
                for text in (foil["caption"], caption)
            )
            assert named == expected
    for line in (folder / "queries.jsonl").read_text().splitlines():
        query = json.loads(line)
        for name in SHOWN:
            asked = {query["attributes"].get(name)} - {None, "room"}
            assert mentions(query["text"], name) == asked


def test_the_seed_decides_and_other_settings_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("catalog-0000.tar", "queries.jsonl", "qrels.tsv")
    before = [(folder / name).read_bytes() for name in names]
    assert draw(folder) == 0  # nothing is missing
    for name in names:
        (folder / name).unlink()
    assert draw(folder) == 0
    assert [(folder / name).read_bytes() for name in names] == before
    capsys.readouterr()
    assert draw(folder, "--seed", "1") == 1
    assert "drawn with other settings" in capsys.readouterr().err
    assert cli.main(["data", "scenes", str(folder), "--num", "60", "--size", "64"]) == 1
    assert "holds other shards (train-0000.tar)" in capsys.readouterr().err
    assert draw(tmp_path / "x", "--things", "1-2") == 2
    assert "--things does not go with --catalog" in capsys.readouterr().err
    assert draw(tmp_path / "x", "--scale", "0.2") == 1
    assert "too small to recognize" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
