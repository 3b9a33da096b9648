"""A batch holds the picture that its embedding is of, and the embedding of exactly the caption that was drawn."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.data import BadSample
from pretrain.data.batch import Batch
from pretrain.data.images import AugmentConfig, ImageDecoder
from pretrain.data.loader import DataConfig, Loader, build_loader
from pretrain.data.reinforced.augmentation import OPERATIONS
from pretrain.data.reinforced.decoders import ReinforcedImageDecoder, SampleTeacherDecoder
from pretrain.data.shards.paths import RawSample
from pretrain.data.teachers import count_covered, count_numbers
from pretrain.data.text import TextDecoder, load_tokenizer
from pretrain.data.train_tokenizer import train_tokenizer_on
from pretrain.data.training_captions import TrainingCaptions
from pretrain.errors import ConfigError
from tests.pretrain.data.reinforced.test_augmentation import reference
from tests.support import reinforced
from tests.support.reinforced import AUGMENTATIONS, SYNTHETIC, WIDTH, embedding

SIZE, SAMPLES = 32, 26
BOTH = "txt+syn.json:syn_text"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reinforced")
    reinforced.write_shards(path, SAMPLES)
    train_tokenizer_on(
        [text for i in range(SAMPLES) for text in reinforced.captions(f"{i:04}")], path / "tokenizer", 400, lowercase=False
    )
    return path


def build(folder: Path, draw: int = 1, caption: str = BOTH, widths: Any = (), labels: bool = False, **changes: Any) -> Loader:
    settings = {"train": str(folder), "batch_size": 13, "window": 2, "caption": caption, "teachers": "samples", "draw": draw}
    config = DataConfig(**{**settings, "workers": 0, "teacher_widths": list(widths), **changes})
    config.check()
    text = TextDecoder(load_tokenizer(folder / "tokenizer"), 48, caption, draw=draw)
    decoders = {
        "image": ReinforcedImageDecoder(ImageDecoder(SIZE)),
        "text": TrainingCaptions(text, None, "none", 1) if labels else text,
        "teachers": SampleTeacherDecoder(caption, widths),
    }
    return build_loader(config, decoders, seed=3)


def take(loader: Loader, count: int) -> list[Batch]:
    batches = iter(loader)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_equal(a[name], b[name]) for name in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def find_row(vector: torch.Tensor, key: str, kind: str, count: int) -> int:
    """Return which embedding of a sample a vector is."""
    (row,) = [r for r in range(count) if np.array_equal(vector.numpy(), embedding(key, kind, r).astype(np.float32))]
    return row


def check_batch(batch: Batch, text: TextDecoder, draw: int) -> tuple[Counter[int], Counter[Any]]:
    """Compare each image and caption with those whose embedding the batch has; return which were drawn."""
    teacher = batch.targets["teachers"]["0"]
    assert teacher["image_mask"].all()
    assert teacher["text_mask"].all()
    assert teacher["text"].shape == (*batch.targets["caption_id"].shape, WIDTH)
    ids, vectors = (
        x.reshape(len(batch), draw, -1)
        for x in (batch.inputs["text"][:, :draw] if draw > 1 else batch.inputs["text"], teacher["text"])
    )
    drawn_augmentations, drawn_rows = Counter[int](), Counter[Any]()
    for b, key in enumerate(name.split("/")[1] for name in batch.keys):
        augmentation = find_row(teacher["image"][b], key, "image", AUGMENTATIONS)
        box, operations = reinforced.augmentations(int(key))[augmentation]
        expected = reference(reinforced.pixels(int(key)), box, [(OPERATIONS[n], m) for n, m in operations], SIZE)
        assert np.array_equal(batch.inputs["image"][b].permute(1, 2, 0).numpy(), expected)
        rows = []
        for k in range(draw):
            rows.append(find_row(vectors[b, k], key, "text", 1 + SYNTHETIC))
            tokens = text.encode([reinforced.captions(key)[rows[-1]]])[0][0]
            length = int((tokens != text.pad_id).sum())
            assert torch.equal(ids[b, k, :length], tokens[:length])
        drawn_augmentations[augmentation] += 1
        drawn_rows[tuple(rows)] += 1
    return drawn_augmentations, drawn_rows


@pytest.mark.parametrize(("draw", "labels"), [(1, False), (2, False), (2, True)])
def test_images_and_captions_are_those_that_the_embeddings_are_of(folder: Path, draw: int, labels: bool) -> None:
    loader = build(folder, draw, labels=labels)
    augmentations, rows = Counter[int](), Counter[Any]()
    for batch in take(loader, 12):
        drawn = check_batch(batch, loader.decoders["text"], draw)  # type: ignore[arg-type]
        augmentations += drawn[0]
        rows += drawn[1]
    assert set(augmentations) == set(range(AUGMENTATIONS))
    if draw == 1:  # either source has half of the turns
        assert 0.38 < rows[0,] / rows.total() < 0.62
        assert set(rows) == {(row,) for row in range(1 + SYNTHETIC)}
    else:  # one of each
        assert set(rows) == {(0, row) for row in range(1, 1 + SYNTHETIC)}


def test_a_single_source(folder: Path) -> None:
    for caption, expected in (("txt", {(0,)}), ("syn.json:syn_text", {(1,), (2,), (3,)})):
        loader = build(folder, caption=caption)
        drawn = [check_batch(batch, loader.decoders["text"], 1)[1] for batch in take(loader, 3)]  # type: ignore[arg-type]
        assert set().union(*drawn) == expected


def test_workers_and_a_resumed_run_read_the_same(folder: Path) -> None:
    whole = take(build(folder, 3), 5)
    assert len({tuple(batch.targets["caption_id"].flatten().tolist()) for batch in whole}) == 5
    others = take(build(folder, 3, workers=2), 5)
    loader = build(folder, 3)
    loader.load_state_dict({**loader.state_dict(), "position": 39})
    for one, two in [*zip(whole, others, strict=True), *zip(whole[3:], take(loader, 2), strict=True)]:
        assert one.keys == two.keys
        assert is_equal(one.inputs, two.inputs)
        assert is_equal(one.targets, two.targets)


def test_several_teachers_stand_side_by_side(folder: Path) -> None:
    (whole,), (parts,) = take(build(folder), 1), take(build(folder, widths=(4, 2)), 1)
    teachers = parts.targets["teachers"]
    for name in ("image", "text"):
        joined = torch.cat([teachers["0"][name], teachers["1"][name]], dim=-1)
        assert torch.equal(joined, whole.targets["teachers"]["0"][name])
    assert count_numbers(parts) == count_numbers(whole) == WIDTH
    assert count_covered(parts) == {"image": (26, 26), "text": (26, 26)}
    assert teachers["1"]["image"].shape == (13, 2)


def test_sentences_have_no_embedding_of_their_own() -> None:
    content = reinforced.members(0, "a")
    content["txt"] = b"One thing. Another thing."
    text = SampleTeacherDecoder()(RawSample("s/a", content), np.random.default_rng(0), True)
    batch = Batch({}, {}, ["s/a"] * 2, {"caption_id": torch.tensor([1, 2])})
    SampleTeacherDecoder().complete(batch, {"teachers": [text, text], "text": ["One thing.", "One thing. Another thing."]})
    teacher = batch.targets["teachers"]["0"]
    assert teacher["text_mask"].tolist() == [False, True]
    assert not teacher["text"][0].any()


def spoil(**changes: Any) -> dict[str, bytes]:
    """Return the members of a sample with some replaced; None = removed."""
    content = {**reinforced.members(0, "a"), **{name.replace("_", "."): data for name, data in changes.items()}}
    return {name: data for name, data in content.items() if data is not None}


MATRIX = np.ones((AUGMENTATIONS, WIDTH), np.float16)
TEXT = np.ones((1 + SYNTHETIC, WIDTH), np.float16)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (spoil(npz=None), "no teacher embeddings"),
        (spoil(npz=None, pth_gz=b"x"), "no teacher embeddings: .*KEY.pth.gz is a pickle"),
        (spoil(npz=b"PK\x03\x04"), "teacher embeddings unreadable"),
        (spoil(npz=reinforced.to_npz(image_emb=MATRIX)), "no teacher embeddings: KEY.npz has no array text_emb"),
        (spoil(npz=reinforced.to_npz(image_emb=MATRIX, text_emb=TEXT[:, :5])), "teacher embeddings of another width"),
        (spoil(npz=reinforced.to_npz(image_emb=MATRIX[:, :5], text_emb=TEXT[:, :5])), "of another width: .* not 6"),
        (spoil(npz=reinforced.to_npz(image_emb=MATRIX[1:], text_emb=TEXT)), "teacher embeddings of another number"),
        (spoil(npz=reinforced.to_npz(image_emb=MATRIX, text_emb=TEXT[1:])), "teacher embeddings of another number"),
        (spoil(npz=reinforced.to_npz(image_emb=MATRIX * np.nan, text_emb=TEXT)), "teacher embeddings not finite"),
        (spoil(npz=reinforced.to_npz(image_emb=MATRIX.astype(object), text_emb=TEXT)), "image_emb holds object"),
        (spoil(paug_json=None), "no augmentations"),
        (spoil(paug_json=b"{"), "json unreadable"),
        (spoil(paug_json=json.dumps({"param_aug": [[[0, 0, 999, 9]]] * AUGMENTATIONS}).encode()), "outside the image"),
        (spoil(syn_json=b'{"syn_text": 3}', txt=None), "teacher embeddings of another number"),
        (spoil(syn_json=b"[[", txt=b"x"), "json unreadable"),
        (spoil(syn_json=None, txt=None), "no caption"),
        (spoil(png=None), "no image"),
        (spoil(png=b"GIF89a"), "image unreadable|image truncated"),
    ],
)
def test_what_cannot_be_used_is_a_bad_sample(content: dict[str, bytes], reason: str) -> None:

    def decode() -> None:
        for decoder in (ReinforcedImageDecoder(ImageDecoder(SIZE)), SampleTeacherDecoder(BOTH, [WIDTH])):
            decoder(RawSample("s/a", content), np.random.default_rng(0), True)

    with pytest.raises(BadSample, match=reason):
        decode()


def test_bad_samples_are_replaced_and_counted(folder: Path, tmp_path: Path) -> None:
    def change(i: int, content: dict[str, bytes]) -> None:
        if i % 5 == 0:
            content["npz"] = reinforced.to_npz(image_emb=MATRIX[:, :3], text_emb=TEXT[:, :3])

    reinforced.write_shards(tmp_path / "shards", SAMPLES, change=change)
    loader = build(folder, widths=[WIDTH], train=str(tmp_path / "shards"), max_bad_rate=1.0)
    for batch in take(loader, 2):
        assert not any(int(key.split("/")[1]) % 5 == 0 for key in batch.keys)
        check_batch(batch, loader.decoders["text"], 1)  # type: ignore[arg-type]
    assert set(loader.bad) == {"teacher embeddings of another width"}


def test_a_photo_is_cropped_as_it_is_stored(tmp_path: Path) -> None:
    """An EXIF orientation does not turn it: the box and the embedding are of the stored pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG"):
        file = io.BytesIO()
        Image.fromarray(reinforced.pixels(8)).save(file, kind, exif=exif)
        stored = np.array(Image.open(file).convert("RGB"))
        box = [4, 9, 30, 55]
        content = {"jpg": file.getvalue(), "paug.json": json.dumps({"param_aug": [[box, [[5, 20.0]]]]}).encode()}
        image = ReinforcedImageDecoder(ImageDecoder(SIZE))(RawSample("s/a", content), np.random.default_rng(0), True)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), reference(stored, box, [("Rotate", 20.0)], SIZE))


def test_settings_that_do_not_go_together_are_refused() -> None:
    for settings, message in (
        ({"teachers": "samples", "augment": AugmentConfig(flip=True)}, r"data\.augment=.*augmented as their teachers"),
        ({"teachers": "samples", "caption": "txt+caption+syn.json:syn_text"}, r"one source beside syn\.json:syn_text"),
        ({"teachers": "folder", "teacher_widths": [3]}, r"data\.teacher_widths=\[3\] is for data\.teachers=samples"),
        ({"teachers": "samples", "teacher_widths": [0]}, r"data\.teacher_widths=\[0\] must be at least 1"),
        ({"teachers": ["samples", "x"]}, r"samples goes with no folders; the folder of this name is \./samples"),
        ({"teachers": "samples", "train": "synthetic"}, r"needs shards"),
        ({"caption": "txt+syn.json:"}, r"valid are txt"),
        ({"caption": "txt++syn.json:a"}, r"valid are txt"),
        ({"caption": "txt:line+syn.json:a"}, r"valid are txt"),
        ({"caption": "txt+txt+syn.json:a"}, r"twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            DataConfig(**{"train": "x.tar", **settings}).check()  # type: ignore[arg-type]
    DataConfig(train="x.tar", caption="a+b", teachers="./samples").check()  # the name of a field
