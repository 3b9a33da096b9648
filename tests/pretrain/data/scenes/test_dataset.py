"""Drawn scenes: boxes are correct, objects are distinguishable, and the bytes never change."""

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
    BACKGROUNDS,
    CLASSES,
    COLORS,
    SIZES,
    SPLITS,
    VOCABULARY,
    build_scene,
    compute_split_sizes,
    draw_contact_sheet,
    draw_dataset,
    draw_scene,
)
from pretrain.data.scenes.render import render_scene
from pretrain.data.shards.paths import expand_shards
from pretrain.data.vocabulary import find_vocabulary, load_builtin
from pretrain.errors import UserError
from pretrain.evaluation.zero_shot import load_class_names


@pytest.mark.parametrize(("size", "scale"), [(64, 1.0), (96, 1.0), (200, 1.0), (384, 0.25)])
def test_a_box_is_where_the_image_changes_without_the_object(size: int, scale: float) -> None:
    for index in range(12):
        scene = build_scene(3, "train", index, scale)
        whole, boxes = render_scene(scene, size)
        assert whole.size == (size, size)
        for i, box in enumerate(boxes):
            without, _ = render_scene(scene, size, skip=[i])
            rows, columns = np.nonzero(np.abs(np.int16(whole) - np.int16(without)).sum(axis=2))
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert max(abs(int(e) - b) for e, b in zip(expected, box, strict=True)) <= 1, (index, i, expected, box)


def test_most_of_every_object_is_visible_inside_the_image() -> None:
    visible_fractions = []
    for index in range(80):
        scene = build_scene(1, "train", index)
        indices = range(len(scene.objects))
        whole, boxes = (np.int16(x) for x in render_scene(scene, 96))
        empty = np.int16(render_scene(scene, 96, skip=indices)[0])
        for i in indices:
            without = np.int16(render_scene(scene, 96, skip=[i])[0])
            alone = np.int16(render_scene(scene, 96, skip=[j for j in indices if j != i])[0])
            visible_fractions.append(np.any(whole != without, axis=2).sum() / np.any(alone != empty, axis=2).sum())
            assert boxes[i].min() >= 1
            assert boxes[i].max() <= 95
    assert min(visible_fractions) > 0.5
    assert np.mean(visible_fractions) > 0.9


def test_every_color_differs_from_all_backgrounds_and_other_colors() -> None:
    contrasts: dict[tuple[str, str], list[float]] = defaultdict(list)
    medians: dict[str, list[np.ndarray]] = defaultdict(list)
    for index in range(400):
        scene = build_scene(2, "train" if index % 8 else "unseen", index, num_objects=(1, 1))
        spec = scene.objects[0].spec
        whole, without = np.int16(render_scene(scene, 64)[0]), np.int16(render_scene(scene, 64, skip=[0])[0])
        change = np.abs(whole - without).sum(axis=2)
        contrasts[spec.color, scene.background].append(float(change[change > 0].mean()))
        if spec.surface == "plain":
            medians[spec.color].append(np.median(whole[change > 40], axis=0))
    assert len(contrasts) == len(COLORS) * len(BACKGROUNDS)
    assert min(np.mean(x) for x in contrasts.values()) > 60  # of 765
    typical = {color: np.median(x, axis=0) for color, x in medians.items()}
    for a in typical:
        assert all(np.abs(typical[a] - typical[b]).sum() > 70 for b in typical if b != a), a


def test_kinds_differ_in_shape() -> None:
    """The nearest of the known shapes has the same kind as the query, for plain objects."""
    examples: dict[str, list[np.ndarray]] = defaultdict(list)
    for index in range(1200):
        scene = build_scene(4, "train", index, num_objects=(1, 1))
        if scene.objects[0].spec.surface != "plain":
            continue
        image, (box,) = render_scene(scene, 96)
        without, _ = render_scene(scene, 96, skip=[0])
        mask = np.abs(np.int16(image) - np.int16(without)).sum(axis=2) > 0
        crop = mask[box[1] : box[3], box[0] : box[2]]
        if scene.objects[0].spec.flip:
            crop = crop[:, ::-1]
        grid = crop[np.linspace(0, len(crop) - 1, 24).astype(int)][:, np.linspace(0, crop.shape[1] - 1, 24).astype(int)]
        shape = np.append(grid.ravel().astype(float), 12 * np.log(crop.shape[1] / crop.shape[0]))
        examples[scene.objects[0].spec.kind].append(shape)
    known = [(kind, x) for kind in CLASSES for x in examples[kind][:-5]]
    queries = [(kind, x) for kind in CLASSES for x in examples[kind][-5:]]
    is_correct = [min(known, key=lambda k: float(np.abs(k[1] - x).sum()))[0] == kind for kind, x in queries]
    assert len(CLASSES) >= 12
    assert np.mean(is_correct) > 0.95


def test_size_of_a_contact_sheet() -> None:
    sheet = draw_contact_sheet(5, size=64)
    assert sheet.size == (3 * 68 + 4, 2 * 68 + 4)


def test_scenes_differ_between_splits_seeds_and_indices() -> None:
    scenes = {build_scene(seed, split, index).objects for seed in range(3) for split in SPLITS for index in range(0, 80, 4)}
    assert len(scenes) == 3 * len(SPLITS) * 20


def test_numbers_and_sizes_of_objects() -> None:
    scenes = [build_scene(0, "train", index) for index in range(1000)]
    counts = Counter(len(scene.objects) for scene in scenes)
    assert set(counts) == {1, 2, 3, 4}
    assert min(counts.values()) > 180
    assert {item.spec.size for scene in scenes for item in scene.objects} == set(SIZES)
    assert {len(build_scene(0, "train", i, num_objects=(1, 2)).objects) for i in range(60)} == {1, 2}
    assert {len(build_scene(0, "hard", i, num_objects=(1, 2)).objects) for i in range(60)} == {2}
    assert {len(build_scene(0, "hard", i, num_objects=(4, 4)).objects) for i in range(8)} == {4}


# ---------------------------------------------------------------------------------------------------------------------
# Writing shards


def compute_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 digest of each file in a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_any_number_of_processes_writes_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.data.scenes.writer.SHARD_SIZE", 60)
    sizes = {"train": 130, "unseen": 70}
    for workers in (1, 3):
        calls: list[tuple[int, int]] = []
        counts = draw_dataset(tmp_path / f"w{workers}", sizes, 64, 7, workers, progress=lambda *x, calls=calls: calls.append(x))
        assert counts == sizes
        assert calls[-1] == (200, 200)
        assert sorted(calls) == calls
    expected = compute_digests(tmp_path / "w1")
    assert expected == compute_digests(tmp_path / "w3")
    shards = [*(f"train-000{i}.tar" for i in range(3)), "unseen-0000.tar", "unseen-0001.tar"]
    assert sorted(expected) == ["classes.txt", "scenes.json", *shards, "vocabulary.json"]
    # A missing shard is drawn again; the others are not touched
    (tmp_path / "w1" / "train-0001.tar").unlink()
    modified = (tmp_path / "w1" / "train-0000.tar").stat().st_mtime_ns
    draw_dataset(tmp_path / "w1", sizes, 64, 7, 1)
    assert compute_digests(tmp_path / "w1") == expected
    assert (tmp_path / "w1" / "train-0000.tar").stat().st_mtime_ns == modified


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset leaves files open
def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    sizes = draw_dataset(tmp_path, 9, 80, workers=1, num_objects=(1, 2))
    assert sizes == {"train": 9, "val": 9, "test": 9, "unseen": 9, "hard": 8} == compute_split_sizes(9)
    for split in SPLITS:
        data = webdataset.WebDataset(str(tmp_path / f"{split}-0000.tar"), shardshuffle=False).decode("rgb8")
        samples = list(data)
        assert len(samples) == sizes[split]
        for index, sample in enumerate(samples):
            assert sample["__key__"] == f"{index:07d}"
            image, content = draw_scene(0, split, index, 80, num_objects=(1, 2))
            assert sample["json"] == json.loads(json.dumps(content))
            assert sample["txt"] == content["captions"][0]
            assert sample["jpg"].shape == (80, 80, 3)
            assert np.abs(np.int16(sample["jpg"]) - np.int16(image)).mean() < 4  # levels of 255, because JPEG is lossy


def test_an_interrupted_run_leaves_no_partial_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_dataset(tmp_path, {"train": 60}, 64, workers=1, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes.json"]


def test_the_vocabulary_is_written_next_to_the_shards(tmp_path: Path) -> None:
    draw_dataset(tmp_path, {"train": 2}, 64, workers=1)
    vocabulary = find_vocabulary([f"{tmp_path}/train-0000.tar"])
    assert vocabulary == VOCABULARY == load_builtin("scenes")
    assert (tmp_path / "vocabulary.json").read_text() == VOCABULARY.to_json()
    assert (
        load_class_names(str(tmp_path / "classes.txt"))
        == load_class_names("scenes")
        == load_class_names("Scenes")
        == list(CLASSES)
    )
    assert expand_shards(str(tmp_path)) == [f"{tmp_path}/train-0000.tar"]
    # Without these files the vocabulary is the same, and drawing again writes them
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
    # An existing file is not overwritten
    (tmp_path / "classes.txt").write_text("first\nsecond\n")
    draw_dataset(tmp_path, {"train": 2}, 64, workers=1)
    assert load_class_names(str(tmp_path / "classes.txt")) == ["first", "second"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 32}, "64 to 2048"),
        ({"num": 0}, "at least 1"),
        ({"num": {"trian": 5}}, "trian"),
        ({"scale": 3.0}, "scale 3.0"),
        ({"scale": 0.2, "size": 96}, "at least 48"),
        ({"num_objects": (2, 5)}, "1 to 4"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw_dataset(tmp_path / "x", **{"num": 10, "workers": 1, **options})
    assert not (tmp_path / "x").exists()


def test_a_folder_with_other_content_is_refused(tmp_path: Path) -> None:
    draw_dataset(tmp_path / "a", {"train": 2}, 64, workers=1)
    with pytest.raises(UserError, match="other settings"):
        draw_dataset(tmp_path / "a", {"train": 2}, 96, workers=1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train-0003.tar").write_bytes(b"other")
    with pytest.raises(UserError, match=r"train-0003\.tar"):
        draw_dataset(tmp_path / "b", {"train": 2}, 64, workers=1)
    (tmp_path / "c").write_text("a file")
    with pytest.raises(UserError, match="cannot draw into"):
        draw_dataset(tmp_path / "c", {"train": 2}, 64, workers=1)
