"""Drawn scenes: true boxes, things that can be told apart, and the same bytes always."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from pretrain.data.scenes.dataset import (
    CLASSES,
    COLORS,
    PLACES,
    SIZES,
    SPLITS,
    VOCABULARY,
    contact_sheet,
    draw,
    draw_dataset,
    plan,
    split_sizes,
)
from pretrain.data.scenes.render import paint
from pretrain.data.shards.paths import expand_shards
from pretrain.data.vocabulary import find_vocabulary, load_builtin
from pretrain.errors import UserError
from pretrain.evaluation.zero_shot import class_names


@pytest.mark.parametrize(("size", "scale"), [(64, 1.0), (96, 1.0), (200, 1.0), (384, 0.25)])
def test_boxes_are_where_the_picture_changes_without_the_thing(size: int, scale: float) -> None:
    for index in range(12):
        scene = plan(3, "train", index, scale)
        whole, boxes = paint(scene, size)
        assert whole.size == (size, size)
        for i, box in enumerate(boxes):
            without, _ = paint(scene, size, skip=[i])
            rows, columns = np.nonzero(np.abs(np.int16(whole) - np.int16(without)).sum(axis=2))
            seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert max(abs(int(s) - b) for s, b in zip(seen, box, strict=True)) <= 1, (index, i, seen, box)


def test_every_thing_is_seen_whole_enough_and_in_the_picture() -> None:
    shares = []
    for index in range(80):
        scene = plan(1, "train", index)
        numbers = range(len(scene.things))
        whole, boxes = (np.int16(x) for x in paint(scene, 96))
        empty = np.int16(paint(scene, 96, skip=numbers)[0])
        for i in numbers:
            without = np.int16(paint(scene, 96, skip=[i])[0])
            alone = np.int16(paint(scene, 96, skip=[j for j in numbers if j != i])[0])
            shares.append(np.any(whole != without, axis=2).sum() / np.any(alone != empty, axis=2).sum())
            assert boxes[i].min() >= 1
            assert boxes[i].max() <= 95
    assert min(shares) > 0.5
    assert np.mean(shares) > 0.9


def test_every_colour_stands_out_everywhere_and_from_the_other_colours() -> None:
    shown: dict[tuple[str, str], list[float]] = defaultdict(list)
    mean: dict[str, list[np.ndarray]] = defaultdict(list)
    for index in range(400):
        scene = plan(2, "train" if index % 8 else "unseen", index, things=(1, 1))
        look = scene.things[0].look
        with_it, without = np.int16(paint(scene, 64)[0]), np.int16(paint(scene, 64, skip=[0])[0])
        change = np.abs(with_it - without).sum(axis=2)
        shown[look.color, scene.place].append(float(change[change > 0].mean()))
        if look.surface == "plain":
            mean[look.color].append(np.median(with_it[change > 40], axis=0))
    assert len(shown) == len(COLORS) * len(PLACES)
    assert min(np.mean(x) for x in shown.values()) > 60  # of 765
    typical = {color: np.median(x, axis=0) for color, x in mean.items()}
    for a in typical:
        assert all(np.abs(typical[a] - typical[b]).sum() > 70 for b in typical if b != a), a


def test_kinds_differ_in_shape() -> None:
    """Kinds, plain and of one colour on one place, are told apart by the nearest of a few examples of each."""
    examples: dict[str, list[np.ndarray]] = defaultdict(list)
    for index in range(1200):
        scene = plan(4, "train", index, things=(1, 1))
        if scene.things[0].look.surface != "plain":
            continue
        picture, (box,) = paint(scene, 96)
        without, _ = paint(scene, 96, skip=[0])
        mask = np.abs(np.int16(picture) - np.int16(without)).sum(axis=2) > 0
        cut = mask[box[1] : box[3], box[0] : box[2]]
        if scene.things[0].look.flip:
            cut = cut[:, ::-1]
        grid = cut[np.linspace(0, len(cut) - 1, 24).astype(int)][:, np.linspace(0, cut.shape[1] - 1, 24).astype(int)]
        shape = np.append(grid.ravel().astype(float), 12 * np.log(cut.shape[1] / cut.shape[0]))
        examples[scene.things[0].look.kind].append(shape)
    known = [(kind, x) for kind in CLASSES for x in examples[kind][:-5]]
    asked = [(kind, x) for kind in CLASSES for x in examples[kind][-5:]]
    right = [min(known, key=lambda k: float(np.abs(k[1] - x).sum()))[0] == kind for kind, x in asked]
    assert len(CLASSES) >= 12
    assert np.mean(right) > 0.95


def test_a_contact_sheet() -> None:
    sheet = contact_sheet(5, size=64)
    assert sheet.size == (3 * 68 + 4, 2 * 68 + 4)


def test_scenes_differ_between_splits_seeds_and_indices() -> None:
    firsts = {plan(seed, split, index).things for seed in range(3) for split in SPLITS for index in range(0, 80, 4)}
    assert len(firsts) == 3 * len(SPLITS) * 20


def test_number_of_things_and_sizes() -> None:
    scenes = [plan(0, "train", index) for index in range(1000)]
    counts = Counter(len(scene.things) for scene in scenes)
    assert set(counts) == {1, 2, 3, 4}
    assert min(counts.values()) > 180
    assert {thing.look.size for scene in scenes for thing in scene.things} == set(SIZES)
    assert {len(plan(0, "train", i, things=(1, 2)).things) for i in range(60)} == {1, 2}
    assert {len(plan(0, "hard", i, things=(1, 2)).things) for i in range(60)} == {2}
    assert {len(plan(0, "hard", i, things=(4, 4)).things) for i in range(8)} == {4}


# ---------------------------------------------------------------------------------------------------------------------
# The shards


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_same_bytes_for_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.data.scenes.dataset.SHARD", 60)
    sizes = {"train": 130, "unseen": 70}
    for workers in (1, 3):
        calls: list[tuple[int, int]] = []
        made = draw_dataset(tmp_path / f"w{workers}", sizes, 64, 7, workers, progress=lambda *x, calls=calls: calls.append(x))
        assert made == sizes
        assert calls[-1] == (200, 200)
        assert sorted(calls) == calls
    one = digests(tmp_path / "w1")
    assert one == digests(tmp_path / "w3")
    shards = [*(f"train-000{i}.tar" for i in range(3)), "unseen-0000.tar", "unseen-0001.tar"]
    assert sorted(one) == ["classes.txt", "scenes.json", *shards, "vocabulary.json"]
    # What is missing is drawn again, the rest is left alone
    (tmp_path / "w1" / "train-0001.tar").unlink()
    kept = (tmp_path / "w1" / "train-0000.tar").stat().st_mtime_ns
    draw_dataset(tmp_path / "w1", sizes, 64, 7, 1)
    assert digests(tmp_path / "w1") == one
    assert (tmp_path / "w1" / "train-0000.tar").stat().st_mtime_ns == kept


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # its open files
def test_shards_are_read_by_webdataset(tmp_path: Path) -> None:
    sizes = draw_dataset(tmp_path, 9, 80, workers=1, things=(1, 2))
    assert sizes == {"train": 9, "val": 9, "test": 9, "unseen": 9, "hard": 8} == split_sizes(9)
    for split in SPLITS:
        data = webdataset.WebDataset(str(tmp_path / f"{split}-0000.tar"), shardshuffle=False).decode("rgb8")
        samples = list(data)
        assert len(samples) == sizes[split]
        for index, sample in enumerate(samples):
            assert sample["__key__"] == f"{index:07d}"
            picture, said = draw(0, split, index, 80, things=(1, 2))
            assert sample["json"] == json.loads(json.dumps(said))
            assert sample["txt"] == said["captions"][0]
            assert sample["jpg"].shape == (80, 80, 3)
            assert np.abs(np.int16(sample["jpg"]) - np.int16(picture)).mean() < 4  # JPEG


def test_nothing_half_written_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_dataset(tmp_path, {"train": 60}, 64, workers=1, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes.json"]


def test_the_words_of_the_data_set_lie_beside_the_shards(tmp_path: Path) -> None:
    draw_dataset(tmp_path, {"train": 2}, 64, workers=1)
    vocabulary = find_vocabulary([f"{tmp_path}/train-0000.tar"])
    assert vocabulary == VOCABULARY == load_builtin("scenes")
    assert (tmp_path / "vocabulary.json").read_text() == VOCABULARY.to_json()
    assert class_names(str(tmp_path / "classes.txt")) == class_names("scenes") == class_names("Scenes") == list(CLASSES)
    assert expand_shards(str(tmp_path)) == [f"{tmp_path}/train-0000.tar"]
    # A folder drawn before these files existed has the same words, and gets the files when it is drawn again
    for name in ("classes.txt", "vocabulary.json"):
        (tmp_path / name).unlink()
    assert find_vocabulary([f"{tmp_path}/train-0000.tar"]) == VOCABULARY
    draw_dataset(tmp_path, {"train": 2}, 64, workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "classes.txt",
        "scenes.json",
        "train-0000.tar",
        "vocabulary.json",
    ]
    # What lies there already is left alone
    (tmp_path / "classes.txt").write_text("mine\nyours\n")
    draw_dataset(tmp_path, {"train": 2}, 64, workers=1)
    assert class_names(str(tmp_path / "classes.txt")) == ["mine", "yours"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 32}, "64 to 2048"),
        ({"num": 0}, "at least 1"),
        ({"num": {"trian": 5}}, "trian"),
        ({"scale": 3.0}, "scale 3.0"),
        ({"scale": 0.2, "size": 96}, "at least 48"),
        ({"things": (2, 5)}, "1 to 4"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw_dataset(tmp_path / "x", **{"num": 10, "workers": 1, **change})
    assert not (tmp_path / "x").exists()


def test_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    draw_dataset(tmp_path / "a", {"train": 2}, 64, workers=1)
    with pytest.raises(UserError, match="other settings"):
        draw_dataset(tmp_path / "a", {"train": 2}, 96, workers=1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train-0003.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"train-0003\.tar"):
        draw_dataset(tmp_path / "b", {"train": 2}, 64, workers=1)
    (tmp_path / "c").write_text("a file")
    with pytest.raises(UserError, match="cannot draw into"):
        draw_dataset(tmp_path / "c", {"train": 2}, 64, workers=1)
