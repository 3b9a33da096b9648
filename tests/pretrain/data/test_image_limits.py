"""Images that ask for much time or memory, or for other programs, through data check, pack, evaluation and training."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pretrain.data.check import check_shards
from pretrain.data.eval_loader import build_eval_loader
from pretrain.data.images import ImageDecoder
from pretrain.data.pack import pack


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def many_scans(side: int) -> bytes:
    data = encode(Image.effect_noise((side, side), 50), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 200 + b"\xff\xd9"


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 3
    return encode(Image.new("RGB", (1, 30), (9, 90, 200)), "JPEG", exif=exif)


GOOD = {
    "line.png": encode(Image.new("L", (16_000, 1), 90), "PNG"),
    "tall.png": encode(Image.new("L", (1, 16_000), 90), "PNG"),
    "turned.jpg": turned(),
    "plain.jpg": encode(Image.new("RGB", (40, 30), "red"), "JPEG"),
}
BAD = {
    "scans.jpg": many_scans(64),
    "scans-1024.jpg": many_scans(1024),
    "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "text.jpg": b"Image type: a\r\nImage size (x*y): 3*4*5\r\n" + b"\0" * 500 + b"\x1a" + bytes(99),
}
LARGE = {"large.png": encode(Image.new("1", (9000, 9000)), "PNG"), "long.png": encode(Image.new("1", (70_000, 1)), "PNG")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "in"
    source.mkdir()
    for name, data in {**GOOD, **BAD, **LARGE}.items():
        (source / name).write_bytes(data)
        (source / name).with_suffix(".txt").write_text("a caption")
    (source / "json.jpg").write_bytes(GOOD["plain.jpg"])
    (source / "json.txt").write_text("a caption")
    (source / "json.json").write_text(json.dumps({"note": "a" * (60 << 20)}))
    return source


@pytest.fixture
def shard(folder: Path, tmp_path: Path) -> str:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    return str(tmp_path / "x.tar")


REASONS = {"image unreadable": 4, "image too large": 2, "member too large": 1}


def test_check_counts_them(shard: str) -> None:
    report = check_shards([shard], workers=1)
    assert dict(report.bad) == REASONS
    assert (report.samples, report.bad_samples, report.damaged) == (11, 7, [])


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_evaluation_reads_the_others(shard: str, resize: str) -> None:
    batches = list(build_eval_loader([shard], {"image": ImageDecoder(32, resize=resize)}, 4, 0))
    assert sorted(key for batch in batches for key in batch.keys) == ["x/line", "x/plain", "x/tall", "x/turned"]


@pytest.mark.parametrize("size", [None, 24])
def test_pack_skips_them(folder: Path, tmp_path: Path, size: int | None) -> None:
    summary = pack(folder, tmp_path / "out", workers=1, size=size)
    assert summary.written == 4
    assert dict(summary.skipped) == {"image unreadable": 4, "image too large": 2, "file too large": 1}


def test_pack_decodes_a_png_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encode(Image.effect_noise((40, 40), 50), "PNG"))
    (tmp_path / "in" / "large.png").write_bytes(LARGE["large.png"])
    loads: list[tuple[int, int]] = []
    load = PngImagePlugin.PngImageFile.load

    def load_and_count(image: Any) -> Any:
        if image.tile:  # empty once the pixels are there
            loads.append(image.size)
        return load(image)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load_and_count)
    assert pack(tmp_path / "in", tmp_path / "out", caption_from="path", workers=1).written == 1
    assert loads == [(40, 40)]


def test_training_reads_them_too() -> None:
    for data in GOOD.values():
        for resize in ("crop", "squash", "pad"):
            assert ImageDecoder(32, resize=resize).decode_train(data, np.random.default_rng(0)).shape == (3, 32, 32)
