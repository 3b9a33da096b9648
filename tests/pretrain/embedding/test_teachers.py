"""data.teachers: folders of embeddings are checked, turned into arrays, and found by key and caption."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pretrain.data.batch import Batch
from pretrain.data.captions import caption_id
from pretrain.data.teachers import TeacherDecoder, count_covered
from pretrain.embedding.teachers import build_readers, find_teachers, prepare
from pretrain.errors import ConfigError, UserError

KEYS = [f"t-{i % 3}/{i:03}" for i in range(40)]


def vectors(kind: str, key: str, place: int = 0, width: int = 6) -> np.ndarray:
    """An embedding that only its kind, key and place decide."""
    seed = int.from_bytes(f"{kind}{key}{place}".encode(), "big") % 2**32
    return np.random.default_rng(seed).standard_normal(width).astype(np.float16)


def caption(key: str, place: int) -> str:
    return f"Caption {place} of {key}"


def to_column(rows: list[np.ndarray]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(rows)), len(rows[0]))


def write(path: Path, keys: list[str], widths: dict[str, int], captions: int = 1) -> None:
    """Write a Parquet file as `clipfuse embed` does; sample i has 1 to `captions` captions."""
    columns: dict[str, Any] = {"key": pa.array(keys)}
    places = [range(1 + i % captions) for i in range(len(keys))]
    if "image" in widths:
        columns["image"] = to_column([vectors("image", key, width=widths["image"]) for key in keys])
    if "text" in widths:
        items = [(key, place) for key, own in zip(keys, places, strict=True) for place in own]
        text = to_column([vectors("text", key, place, widths["text"]) for key, place in items])
        texts = pa.array([caption(*item) for item in items])
        if captions > 1:
            offsets = pa.array(np.cumsum([0, *map(len, places)]), pa.int32())
            columns |= {"text": pa.ListArray.from_arrays(offsets, text), "captions": pa.ListArray.from_arrays(offsets, texts)}
        else:
            columns |= {"text": text, "caption": texts}
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)


def look_up(folders: Any, keys: list[str], ids: torch.Tensor | None) -> Batch:
    teachers = find_teachers(folders)
    prepare(teachers)
    decoder = pickle.loads(pickle.dumps(TeacherDecoder(build_readers(teachers))))  # as it reaches a worker
    batch = Batch({}, {}, keys, {} if ids is None else {"caption_id": ids})
    decoder.complete(batch, {})
    return batch


@pytest.mark.parametrize("captions", [1, 3])
def test_embeddings_are_found_by_key_and_caption(tmp_path: Path, captions: int) -> None:
    for part in range(3):
        write(tmp_path / "teacher" / f"{part}.parquet", KEYS[part::3], {"image": 6, "text": 6}, captions)
    keys = [KEYS[7], "t-0/none", KEYS[0], KEYS[39], KEYS[7]]
    drawn = [(KEYS[7], 0), ("t-0/none", 0), (KEYS[0], 0), (KEYS[0], 0), (KEYS[7], 5)]
    batch = look_up(str(tmp_path / "teacher"), keys, torch.tensor([caption_id(caption(*item).upper()) for item in drawn]))
    teacher = batch.targets["teachers"]["0"]
    assert teacher["image_mask"].tolist() == [True, False, True, True, True]
    assert teacher["text_mask"].tolist() == [True, False, True, False, False]  # the fourth caption is another sample's
    for i, key in enumerate(keys):
        expected = vectors("image", key) if teacher["image_mask"][i] else np.zeros(6)
        assert np.array_equal(teacher["image"][i].numpy(), expected)
        expected = vectors("text", key) if teacher["text_mask"][i] else np.zeros(6)
        assert np.array_equal(teacher["text"][i].numpy(), expected)
    assert count_covered(batch) == {"image": (4, 5), "text": (2, 5)}


def test_each_of_the_captions_drawn_is_found(tmp_path: Path) -> None:
    write(tmp_path / "teacher/0.parquet", KEYS, {"text": 4}, captions=3)
    ids = torch.tensor([[caption_id(caption(key, place)) for place in (2, 0)] for key in KEYS])
    teacher = look_up([str(tmp_path / "teacher")], KEYS, ids).targets["teachers"]["0"]
    assert set(teacher) == {"text", "text_mask"}
    assert teacher["text_mask"].tolist() == [[i % 3 == 2, True] for i in range(len(KEYS))]
    assert np.array_equal(teacher["text"][5, 0].numpy(), vectors("text", KEYS[5], 2, 4))
    assert np.array_equal(teacher["text"][5, 1].numpy(), vectors("text", KEYS[5], 0, 4))


def test_several_teachers_of_different_widths(tmp_path: Path) -> None:
    write(tmp_path / "a/0.parquet", KEYS, {"image": 6})
    write(tmp_path / "b/0.parquet", KEYS[:10], {"image": 3, "text": 3})
    teachers = look_up([str(tmp_path / "a"), str(tmp_path / "b")], KEYS, None).targets["teachers"]
    assert [teacher["image"].shape[1] for teacher in teachers.values()] == [6, 3]
    assert [int(teacher["image_mask"].sum()) for teacher in teachers.values()] == [40, 10]


def test_arrays_are_made_anew_when_a_file_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "teacher/0.parquet"
    write(path, KEYS[:5], {"image": 6})
    assert look_up(str(path.parent), KEYS, None).targets["teachers"]["0"]["image_mask"].sum() == 5
    made = (path.parent / "_teacher/image.npy").stat().st_mtime_ns
    look_up(str(path.parent), KEYS, None)
    assert (path.parent / "_teacher/image.npy").stat().st_mtime_ns == made
    write(path, KEYS[:9], {"image": 6})
    assert look_up(str(path.parent), KEYS, None).targets["teachers"]["0"]["image_mask"].sum() == 9


def test_a_folder_that_cannot_be_a_teacher_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    manifest = {
        "format": "clipfuse embeddings 1",
        "complete": False,
        "model": {"fingerprint": "", "from": "", "step": 0},
        "data": {"fingerprint": "", "samples": 0, "shards": 0},
        "settings": {},
        "per_file": 1,
        "files": [],
    }
    (tmp_path / "begun/_manifest.json").write_text(json.dumps(manifest))
    write(tmp_path / "spaces/0.parquet", KEYS, {"image": 6, "text": 4})
    write(tmp_path / "widths/0.parquet", KEYS, {"image": 6})
    write(tmp_path / "widths/1.parquet", KEYS, {"image": 8})
    write(tmp_path / "none/0.parquet", KEYS, {})
    pq.write_table(pa.table({"image": [1.0]}), tmp_path / "empty/_hidden.parquet")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/0.parquet").write_bytes(b"PAR1 and no more")
    for name, message in (
        ("absent", "there is no such folder"),
        ("empty", "holds no embeddings"),
        ("begun", "is not complete"),
        ("spaces", "image embeddings of 6 numbers and text embeddings of 4 numbers"),
        ("widths", r"1.parquet holds image embeddings of 8 numbers, 0.parquet image embeddings of 6"),
        ("none", "has no column `image`"),
        ("damaged", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            find_teachers(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    for value in (3, ["a", "a"], [""], [], {"a": "b"}):
        with pytest.raises(ConfigError, match=r"data\.teachers"):
            find_teachers(value)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "teacher/0.parquet", KEYS, {"image": 6})
    (tmp_path / "teacher/_teacher").write_text("in the way")
    with pytest.raises(UserError, match="its arrays cannot be written"):
        prepare(find_teachers(str(tmp_path / "teacher")))
