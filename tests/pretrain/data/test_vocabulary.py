"""Tests of vocabularies: their file, finding the file of a data set, and building one from objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.data.vocabulary import (
    Vocabulary,
    builtin_names,
    find_vocabulary,
    load_builtin,
    merge_vocabularies,
    parse_vocabulary,
    vocabulary_from_objects,
)
from pretrain.errors import UserError

FARM = Vocabulary(("tractor", "sheep"), {"color": ("turquoise",)}, {"sheep": "sheep"})


def test_a_vocabulary_is_written_and_parsed() -> None:
    assert parse_vocabulary(FARM.to_json().encode(), "x") == FARM
    assert parse_vocabulary(b"{}", "x") == Vocabulary() == parse_vocabulary(Vocabulary().to_json().encode(), "x")
    assert parse_vocabulary(b'{"name": [" Hay Bale "], "size": ["HUGE"]}', "x") == Vocabulary(
        ("hay bale",), {"size": ("huge",)}
    )
    assert FARM.name_forms == {
        "tractor": "tractor", "tractors": "tractor", "tractores": "tractor", "sheep": "sheep", "sheepes": "sheep",
    }  # fmt: skip
    assert FARM.attribute_fields == {"turquoise": "color"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "x.json is not valid json"),
        ("[]", "x.json must hold a json object"),
        ({"colour": ["red"]}, "unknown key 'colour'; valid keys are name, color, surface, size, plural"),
        ({"name": "car"}, "'name' must be words"),
        ({"color": ["red", 3]}, "'color' must be words"),
        ({"color": [" "]}, "'color' must be words"),
        ({"plural": ["fish"]}, "'plural' must be words"),
        ({"plural": {"fish": None}}, "'plural' must be words"),
    ],
)
def test_invalid_files_are_refused(content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_vocabulary((content if isinstance(content, str) else json.dumps(content)).encode(), "x.json")


def test_vocabularies_are_built_from_objects_and_merged() -> None:
    objects = [{"name": "Tractor", "color": "turquoise", "on": 3}, {"name": "tractor", "size": 4}, "sheep", {"color": "beige"}]
    assert vocabulary_from_objects(objects) == Vocabulary(("tractor",), {"color": ("turquoise", "beige")})
    assert merge_vocabularies([FARM, vocabulary_from_objects(objects)]) == Vocabulary(
        ("tractor", "sheep"), {"color": ("turquoise", "beige")}, {"sheep": "sheep"}
    )
    assert merge_vocabularies([]) == Vocabulary()


def test_every_folder_of_shards_needs_a_vocabulary(tmp_path: Path) -> None:
    for name in ("a", "b", "old"):
        (tmp_path / name).mkdir()
    a, b, old = (f"{tmp_path}/{name}/0.tar" for name in ("a", "b", "old"))
    (tmp_path / "a" / "vocabulary.json").write_text(FARM.to_json())
    (tmp_path / "old" / "scenes.json").write_text("{}")
    assert find_vocabulary([a, f"{tmp_path}/a/1.tar"]) == FARM
    assert find_vocabulary([b]) is None
    assert find_vocabulary([a, b]) is None
    assert find_vocabulary([]) is None
    assert find_vocabulary(["pipe:cat 0.tar"]) is None
    assert find_vocabulary([old]) == load_builtin("scenes")
    assert find_vocabulary([a, old]) == merge_vocabularies([FARM, load_builtin("scenes")])
    (tmp_path / "b" / "vocabulary.json").mkdir()
    with pytest.raises(UserError, match="cannot read"):
        find_vocabulary([b])


def test_vocabulary_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vocabulary.json").write_text(FARM.to_json())
    assert find_vocabulary(["0.tar"]) == FARM


def test_builtin_vocabularies() -> None:
    assert builtin_names() == ["scenes"]
    assert len(load_builtin("scenes").names) == 16
