"""Packed shards, read with tarfile and webdataset; their images are checked with Pillow."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image, ImageOps

from pretrain.data.pack import PackSummary, pack, tars
from pretrain.data.pack.folder import build_caption
from pretrain.data.shards import index, paths
from pretrain.errors import ConfigError, UserError
from tests.support import ROOT
from tests.support.packed import make_image, read_shards


def make_folder(root: Path, count: int = 12) -> Path:
    """Write images with captions in text files next to them."""
    for i in range(count):
        folder = root / ("shoes" if i % 2 else "cars/fast")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"red_thing-{i}.jpg").write_bytes(make_image(i))
        (folder / f"red_thing-{i}.txt").write_text(f" caption\n number {i} ")
    return root


def read_tars(out: Path) -> dict[str, bytes]:
    """Return the bytes of each tar by name."""
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_a_folder_with_captions_next_to_the_images(tmp_path: Path) -> None:
    source, out = make_folder(tmp_path / "in"), tmp_path / "out"
    (source / "shoes" / "red_thing-1.json").write_text('{"label": 4, "objects": [{"name": "shoe", "box": [1, 2, 3, 4]}]}')
    (source / ".hidden.jpg").write_bytes(b"x")
    calls: list[tuple[int, int]] = []
    summary = pack(source, out, shard_size=5, workers=1, progress=lambda done, total: calls.append((done, total)))
    assert (summary.written, summary.shards, summary.skipped.total()) == (12, 3, 0)
    assert calls == [(5, 12), (10, 12), (12, 12)]
    samples = read_shards(out)
    assert list(samples) == [f"shard-{i // 5:04}/{i:08}" for i in range(12)]
    files = sorted(str(p.relative_to(source)) for p in source.rglob("red*.jpg"))
    for path, members in zip(files, samples.values(), strict=True):
        assert members["jpg"] == (source / path).read_bytes()  # stored unchanged
        number = path.rpartition("-")[2].removesuffix(".jpg")
        assert members["txt"].decode() == f"caption number {number}"
        assert json.loads(members["json"])["source"] == path
    with_json = next(m for m in samples.values() if m["txt"] == b"caption number 1")
    assert json.loads(with_json["json"])["objects"] == [{"name": "shoe", "box": [1, 2, 3, 4]}]
    assert paths.count_samples(paths.expand_shards(str(out))) == [5, 5, 2]
    stats = json.loads((out / "shard-0002_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (2, 2, {"success": 2})


@pytest.mark.parametrize(
    ("path", "caption"),
    [
        ("shoes/red_sneaker-3.jpg", "shoes red sneaker"),
        ("a/b c/Dog.final.v2.JPEG", "a b c Dog final v2"),
        ("0001/42.png", ""),
        ("sofa.webp", "sofa"),
        ("straße/Äpfel_12.jpg", "straße Äpfel"),
    ],
)
def test_caption_from_a_path(path: str, caption: str) -> None:
    assert build_caption(path) == caption


def test_a_folder_with_captions_from_the_paths(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", 4)
    (source / "0042.jpg").write_bytes(make_image(0))
    summary = pack(source, tmp_path / "out", caption_from="path", workers=1)
    assert [m["txt"] for m in read_shards(tmp_path / "out").values()] == [b"cars fast red thing"] * 2 + [b"shoes red thing"] * 2
    assert summary.skipped == {"empty caption": 1}


def test_unusable_samples_are_counted_and_named(tmp_path: Path) -> None:
    source, out = make_folder(tmp_path / "in", 3), tmp_path / "out"
    good = make_image(9)
    for name, content, text in (
        ("empty", b"", "x"),
        ("cut", make_image(1, 200, 200)[:2000], "x"),
        ("page", b"<html>", "x"),
        ("mute", good, None),
        ("blank", good, "  \n"),
    ):
        (source / f"{name}.jpg").write_bytes(content)
        if text is not None:
            (source / f"{name}.txt").write_text(text)
    (source / "latin.jpg").write_bytes(good)
    (source / "latin.txt").write_bytes(b"caf\xe9")
    (source / "gone.jpg").symlink_to(source / "nothing")
    (source / "gone.txt").write_text("x")
    (source / "odd\udce9name.jpg").write_bytes(b"no image")
    (source / "odd\udce9name.txt").write_text("x")
    (source / "loop").symlink_to(source)
    os.mkfifo(source / "pipe.jpg")
    (source / "pipe.txt").write_text("x")
    summary = pack(source, out, workers=1)
    assert summary.written == len(read_shards(out)) == 3
    assert summary.skipped == {
        "image empty": 1,
        "image truncated": 1,
        "image unreadable": 2,
        "no caption": 1,
        "empty caption": 1,
        "caption not UTF-8": 1,
        "no such file": 2,
    }
    text = "\n".join(summary.format_lines())
    text.encode()
    assert "3 samples in 1 shard\n" in text
    assert "skipped 9" in text
    assert "cut.jpg (" in text
    stats = json.loads((out / "shard-0000_stats.json").read_text())
    assert (stats["count"], stats["successes"]) == (12, 3)
    assert stats["status_dict"]["no such file"] == 2


def test_other_image_formats_become_png(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for form, name in (("GIF", "a.gif"), ("BMP", "b.bmp"), ("TIFF", "c.tif"), ("PNG", "d.jpg"), ("WEBP", "e.webp")):
        (source / name).write_bytes(make_image(3, form=form))
    pack(source, out, caption_from="path", workers=1)
    samples = list(read_shards(out).values())
    assert [next(e for e in m if e not in ("txt", "json")) for m in samples] == ["png", "png", "png", "png", "webp"]
    for members, name in zip(samples, ("a.gif", "b.bmp", "c.tif"), strict=False):
        stored, original = (
            Image.open(io.BytesIO(members["png"])),
            Image.open(io.BytesIO((source / name).read_bytes())).convert("RGB"),
        )
        assert np.array_equal(np.asarray(stored), np.asarray(original))
    assert samples[3]["png"] == (source / "d.jpg").read_bytes()  # the content decides, not the name


@pytest.mark.parametrize(("side", "expected"), [("shortest", (64, 48)), ("longest", (48, 36))])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_larger_images_are_scaled_down(tmp_path: Path, side: str, expected: tuple[int, int], form: str) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees: stored as 400 x 300, displayed 300 wide and 400 high
    (source / "large.jpg").write_bytes(make_image(1, 400, 300, form, exif=exif))
    (source / "large.json").write_text(
        '{"objects": [{"name": "a", "box": [30, 40, 300, 400]}], "questions": [{"question": "q", "box": null}], '
        '"width": 300, "height": 400}'
    )
    (source / "tiny.jpg").write_bytes(make_image(2, 20, 10, form))
    pack(source, out, caption_from="path", size=48, side=side, workers=1)
    large, tiny = read_shards(out).values()
    extension = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[form]
    assert tiny[extension] == (source / "tiny.jpg").read_bytes()
    stored = Image.open(io.BytesIO(large[extension]))
    assert stored.size == expected[::-1]
    reference = ImageOps.exif_transpose(Image.open(io.BytesIO((source / "large.jpg").read_bytes())))
    assert reference is not None
    difference = np.abs(np.asarray(stored.convert("RGB"), int) - np.asarray(reference.resize(stored.size)))
    assert difference.mean() < 4  # levels of 255, because it is encoded once more
    notes = json.loads(large["json"])
    scale = stored.size[0] / 300
    assert notes["objects"][0]["box"] == pytest.approx([30 * scale, 40 * scale, 300 * scale, 400 * scale])
    assert (notes["width"], notes["height"], notes["questions"][0]["box"]) == (*stored.size, None)


@pytest.mark.parametrize(("image", "text", "notes"), [("a.JPG", "a.TXT", "a.JSON"), ("a.Jpeg", "a.Txt", "a.json")])
def test_captions_in_files_with_upper_case_names(tmp_path: Path, image: str, text: str, notes: str) -> None:
    source = make_folder(tmp_path / "in", 1)
    (source / image).write_bytes(make_image(7))
    (source / text).write_text("upper case")
    (source / notes).write_text('{"label": 5}')
    summary = pack(source, tmp_path / "out", workers=1)
    assert (summary.written, summary.skipped.total()) == (2, 0)
    first = next(iter(read_shards(tmp_path / "out").values()))
    assert (first["txt"], json.loads(first["json"])["label"]) == (b"upper case", 5)
    (source / "a.txt").write_text("lower case")  # the usual spelling wins
    pack(source, tmp_path / "again", workers=1)
    assert next(iter(read_shards(tmp_path / "again").values()))["txt"] == b"lower case"


def test_several_captions_in_a_text_file(tmp_path: Path) -> None:
    """One caption per line if the user says so; otherwise the summary says how many files hold several lines."""
    source = tmp_path / "in"
    source.mkdir()
    for i, text in enumerate(["one\r\ntwo\n\nthree\n", "single\n", "word " * 50_000]):
        (source / f"{i}.jpg").write_bytes(make_image(i))
        (source / f"{i}.txt").write_text(text, newline="")
    summary = pack(source, tmp_path / "out", workers=1)
    assert dict(summary.odd) == {"of several lines, read as one caption": 1, "longer than 1,000 characters": 1}
    assert "1 caption of several lines, read as one caption: --caption-from lines reads one caption per line" in str(summary)
    assert next(iter(read_shards(tmp_path / "out").values()))["txt"] == b"one two three"
    summary = pack(source, tmp_path / "lines", caption_from="lines", caption_column="captions", workers=1)
    samples = list(read_shards(tmp_path / "lines").values())
    assert [m["txt"] for m in samples][:2] == [b"one", b"single"]
    assert [json.loads(m["json"])["captions"] for m in samples][:2] == [["one", "two", "three"], ["single"]]
    assert "the field 'captions' of each json lists all captions, txt has the first" in str(summary)


def test_links_that_lead_out_of_a_folder_are_not_followed(tmp_path: Path) -> None:
    source, private = make_folder(tmp_path / "in", 2), tmp_path / "private"
    private.mkdir()
    (private / "id_rsa").write_text("-----BEGIN PRIVATE KEY-----")
    (private / "x.jpg").write_bytes(make_image(8))
    (private / "x.txt").write_text("hidden")
    (private / "x.json").write_text('{"secret": 1}')
    for name, target in (("key.txt", "id_rsa"), ("picture.jpg", "x.jpg"), ("notes.json", "x.json"), ("folder", "")):
        (source / name).symlink_to(private / target)
    (source / "up").symlink_to("..")
    for name in ("key.jpg", "notes.jpg"):
        (source / name).write_bytes(make_image(9))
    for name in ("picture.txt", "notes.txt"):
        (source / name).write_text("text")
    (source / "inside.jpg").symlink_to("shoes/red_thing-1.jpg")  # a link within the folder
    (source / "inside.txt").symlink_to(source / "shoes" / "red_thing-1.txt")
    summary = pack(source, tmp_path / "out", workers=1)
    assert (summary.written, summary.skipped) == (3, {"link that leads out of the folder": 3})
    content = b"".join(read_tars(tmp_path / "out").values())
    assert not any(word in content for word in (b"PRIVATE", b"hidden", b"secret", make_image(8)))
    assert f"links to folders outside {source} are not followed (folder, up): --outside follows them" in str(summary)
    everything = pack(source, tmp_path / "out2", outside=True, workers=1)
    assert everything.written == 8  # six images of the folder; behind the links `folder` and `up` the same one
    assert b"hidden" in b"".join(read_tars(tmp_path / "out2").values())


def test_folder_behind_a_link_can_be_packed_itself(tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 3)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    assert pack(tmp_path / "link", tmp_path / "out", workers=1).written == 3
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "all").symlink_to(tmp_path / "in")
    assert "all is a link that leads out of it, --outside follows it" in catch_error(tmp_path / "only", tmp_path / "out2")


def test_folder_of_links_is_refused_before_packing(tmp_path: Path) -> None:
    make_folder(tmp_path / "in", 3)
    (tmp_path / "links").mkdir()
    for path in sorted((tmp_path / "in").rglob("*.*")):
        (tmp_path / "links" / path.name).symlink_to(path)
    message = catch_error(tmp_path / "links", tmp_path / "out")
    assert "its 3 images are links that lead out of the folder: --outside follows links" in message
    assert not list((tmp_path / "out").glob("*.json"))
    assert pack(tmp_path / "links", tmp_path / "out", outside=True, workers=1).written == 3
    (tmp_path / "links" / "z.jpg").write_bytes(make_image(9))
    (tmp_path / "links" / "z.txt").write_text("inside")
    summary = pack(tmp_path / "links", tmp_path / "out2", workers=1)
    assert (summary.written, summary.skipped) == (1, {"link that leads out of the folder": 3})


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def make_images(base: Path, count: int = 7) -> list[str]:
    (base / "images").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (base / "images" / f"{i}.jpg").write_bytes(make_image(i))
    return [f"images/{i}.jpg" for i in range(count)]


ROWS: list[dict[str, Any]] = [
    {
        "image": f"images/{i}.jpg",
        "caption": f'a "quoted", caption\n{i}',
        "label": i,
        "questions": [{"question": "what?", "answers": ["it"], "type": "kind", "box": [0, 0, 5, 5]}],
        "note": "é",
    }
    for i in range(7)
]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        with open(path, "w", newline="", encoding="utf-8-sig" if path.suffix == ".csv" else "utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_table(tmp_path: Path, kind: str) -> None:
    make_images(tmp_path)
    table = write_table(tmp_path / f"pairs.{kind}", ROWS)
    summary = pack(table, tmp_path / "out", shard_size=3, workers=1)
    assert (summary.written, summary.shards, summary.skipped.total()) == (7, 3, 0)
    for row, members in zip(ROWS, read_shards(tmp_path / "out").values(), strict=True):
        assert members["jpg"] == (tmp_path / row["image"]).read_bytes()
        assert members["txt"].decode() == " ".join(row["caption"].split())
        notes = json.loads(members["json"])
        assert notes == {"source": row["image"], "label": row["label"], "questions": row["questions"], "note": "é"}


def test_gzip_and_several_tables(tmp_path: Path) -> None:
    import gzip

    make_images(tmp_path)
    for i, rows in enumerate((ROWS[:4], ROWS[4:])):
        table = write_table(tmp_path / f"part-{i}.csv", rows)
        with gzip.open(tmp_path / f"part-{i}.csv.gz", "wb") as file:
            file.write(table.read_bytes())
    summary = pack(str(tmp_path / "part-*.csv.gz"), tmp_path / "out", shard_size=5, workers=1)
    assert (summary.written, summary.shards) == (7, 2)
    assert [json.loads(m["json"])["source"] for m in read_shards(tmp_path / "out").values()] == [row["image"] for row in ROWS]


def test_several_captions_and_other_column_names(tmp_path: Path) -> None:
    make_images(tmp_path)
    rows = [{"file": "images/1.jpg", "sentences": ["one", " two "]}, {"file": "images/2.jpg", "sentences": ["three", ""]}]
    table = write_table(tmp_path / "t.parquet", rows)
    pack(table, tmp_path / "out", image_column="file", caption_column="sentences", workers=1)
    first, second = read_shards(tmp_path / "out").values()
    assert first["txt"] == b"one"
    assert json.loads(first["json"])["sentences"] == ["one", "two"]
    assert second["txt"] == b"three"
    assert "sentences" not in json.loads(second["json"])


def test_images_inside_parquet(tmp_path: Path) -> None:
    """Both as the `datasets` library stores images and as plain bytes."""
    rows = [{"image": {"bytes": make_image(i), "path": f"{i}.jpg"}, "caption": f"c {i}"} for i in range(5)]
    pack(write_table(tmp_path / "t.parquet", rows), tmp_path / "out", workers=1)
    assert [m["jpg"] for m in read_shards(tmp_path / "out").values()] == [make_image(i) for i in range(5)]
    bytes_only = [{"image": make_image(i, form="PNG"), "caption": f"c {i}"} for i in range(5)]
    pack(write_table(tmp_path / "p.parquet", bytes_only), tmp_path / "out2", workers=1)
    assert [m["png"] for m in read_shards(tmp_path / "out2").values()] == [make_image(i, form="PNG") for i in range(5)]


def test_paths_must_stay_below_the_table(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_images(base)
    (tmp_path / "secret.jpg").write_bytes(make_image(5))
    absolute = str(base / "images" / "1.jpg")
    names = [
        "images/../images/0.jpg",
        "../secret.jpg",
        str(tmp_path / "secret.jpg"),
        absolute,
        "http://x.org/a.jpg",
        "",
        "images",
    ]
    table = write_table(base / "t.csv", [{"image": name, "caption": "c"} for name in names])
    summary = pack(table, tmp_path / "out", workers=1)
    outside, url, empty = "path outside the table's folder", "a url, not a file", "no image"
    assert summary.skipped == {outside: 2, url: 1, empty: 1, "no such file": 1}
    assert [json.loads(m["json"])["source"] for m in read_shards(tmp_path / "out").values()] == [names[0], absolute]
    assert pack(table, tmp_path / "out2", outside=True, workers=1).written == 4


def test_links_of_a_table_must_stay_below_the_table(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_images(base)
    (tmp_path / "secret.jpg").write_bytes(make_image(5))
    (base / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (base / "elsewhere").symlink_to(tmp_path)
    names = ["images/0.jpg", "link.jpg", "elsewhere/secret.jpg"]
    table = write_table(base / "t.csv", [{"image": name, "caption": "c"} for name in names])
    summary = pack(table, tmp_path / "out", workers=1)
    assert (summary.written, summary.skipped) == (1, {"link that leads out of the folder": 2})
    assert pack(table, tmp_path / "out2", outside=True, workers=1).written == 3


def test_unreadable_rows_are_counted(tmp_path: Path) -> None:
    make_images(tmp_path)
    (tmp_path / "t.csv").write_bytes(
        b"image,caption\nimages/0.jpg,fine\nimages/1.jpg,one, too many\nimages/2.jpg\nimages/3.jpg,\xff\n"
    )
    summary = pack(tmp_path / "t.csv", tmp_path / "out", workers=1)
    assert summary.written == 1
    assert summary.skipped == {"row with too few or too many values": 2, "caption not UTF-8": 1}
    (tmp_path / "t.jsonl").write_text(
        '{"image": "images/0.jpg", "caption": "fine"}\n{"image": \n[1]\n{"image": "images/1.jpg"}\n'
        '{"image": "images/2.jpg", "caption": "x", "questions": "{"}\n{"image": "images/3.jpg", "caption": "x", "nan": NaN}\n'
    )
    summary = pack(tmp_path / "t.jsonl", tmp_path / "out2", workers=1)
    assert summary.skipped == {"row unreadable": 2, "no caption": 1, "questions not json": 1}
    assert json.loads(list(read_shards(tmp_path / "out2").values())[1]["json"])["nan"] is None


# ---------------------------------------------------------------------------------------------------------------------
# Tars


def test_tars_are_packed_again(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for shard in range(3):
        with tarfile.open(source / f"part-{shard}.tar", "w") as tar:
            for i in range(4):
                members = {
                    "jpg": make_image(10 * shard + i, 80, 60),
                    "txt": b"t",
                    "json": b'{"objects": [{"box": [8, 6, 40, 30]}]}',
                }
                for extension, content in {**members, "cls": b"7"}.items():
                    info = tarfile.TarInfo(f"{i}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    summary = pack(source, out, shard_size=5, workers=1)
    samples = read_shards(out)
    assert (summary.written, summary.shards) == (12, 3)
    keys = ["0", "1", "2", "3", "part-1-0", "1", "2", "3", "0", "part-2-1", "2", "3"]
    assert [key.partition("/")[2] for key in samples] == keys
    assert [m["jpg"] for m in samples.values()] == [make_image(10 * s + i, 80, 60) for s in range(3) for i in range(4)]
    assert all(m["cls"] == b"7" and m["txt"] == b"t" for m in samples.values())
    assert [index.load_index(path).count for path in paths.expand_shards(str(out))] == [5, 5, 2]
    pack(str(source / "part-{0..1}.tar"), out, prefix="small", size=30, workers=1)
    boxes = [json.loads(m["json"])["objects"][0]["box"] for m in read_shards(out, "small").values()]
    assert boxes == [[4, 3, 20, 15]] * 8


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("workers", [1, 2])
def test_members_that_are_apart_are_joined(tmp_path: Path, workers: int) -> None:
    """As `tar cf x.tar *.jpg *.json *.txt` writes them."""
    for shard in range(2):
        images = [(f"d/{i}.jpg", make_image(10 * shard + i)) for i in range(5)]
        jsons = [(f"d/{i}.json", b'{"label": %d}' % i) for i in range(5)]
        texts = [(f"d/{i}.txt", b"caption %d" % (10 * shard + i)) for i in reversed(range(4))]
        write_tar(tmp_path / "in" / f"{shard}.tar", [*images, *jsons, *texts])
    summary = pack(tmp_path / "in", tmp_path / "out", shard_size=4, workers=workers)
    assert (summary.written, summary.shards, summary.skipped.total()) == (10, 3, 0)
    samples = list(read_shards(tmp_path / "out").values())
    assert [m["jpg"] for m in samples] == [make_image(10 * s + i) for s in range(2) for i in range(5)]
    assert [json.loads(m["json"])["label"] for m in samples] == [0, 1, 2, 3, 4] * 2
    expected = [None if i == 4 else b"caption %d" % (10 * s + i) for s in range(2) for i in range(5)]
    assert [m.get("txt") for m in samples] == expected
    assert "10 samples have members that do not follow one another in the tar: they are joined" in str(summary)
    for path in paths.expand_shards(str(tmp_path / "out")):
        assert not index.load_index(path).flags.any()


def test_duplicates_among_members_that_are_apart_are_counted(tmp_path: Path) -> None:
    members = [("0.jpg", make_image(0)), ("1.jpg", make_image(1)), ("0.jpg", make_image(2)), ("0.txt", b"a"), ("1.txt", b"b")]
    members += [("2.jpg", make_image(3)), ("2.jpg", make_image(4)), ("3.jpg", make_image(5)), ("2.txt", b"c"), ("3.txt", b"d")]
    write_tar(tmp_path / "in" / "0.tar", members)
    summary = pack(tmp_path / "in", tmp_path / "out", workers=1)
    samples = list(read_shards(tmp_path / "out").values())
    assert [(m["jpg"], m["txt"]) for m in samples] == [(make_image(1), b"b"), (make_image(5), b"d")]
    # of two images with the same key, it is unknown which one a caption further on describes
    assert summary.skipped == {"no caption": 1, "duplicate key": 1, "duplicate member": 1}


REPEATS = {
    "one key, apart": ["a.jpg", "b.jpg"] * 300 + ["a.txt", "b.txt"] * 300,
    "many keys, apart": [f"{i}.{extension}" for extension in ("jpg", "txt", "json") for i in range(400)],
    "an extension for each": ["a.jpg", "b.jpg"] * 300 + [name for i in range(300) for name in ("a.jpg", f"a.e{i}", "b.txt")],
    "any set of extensions": [
        name for i in range(512) for name in (*(f"a.e{bit}" for bit in range(9) if (i % 256) >> bit & 1), "b.jpg")
    ],
}
"""Names of members in tars where searching every earlier sample of a key takes quadratic time."""


@pytest.mark.parametrize("case", REPEATS)
def test_repeats_of_a_key_are_grouped_in_few_steps(tmp_path: Path, case: str) -> None:
    names = REPEATS[case]
    write_tar(tmp_path / "0.tar", [(name, b"x") for name in names])
    shard_index = index.load_index(str(tmp_path / "0.tar"))
    lines = 0

    def count_lines(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line" and frame.f_code.co_filename == tars.__file__
        return count_lines

    before = sys.gettrace()
    sys.settrace(count_lines)
    try:
        groups = tars.group_samples(shard_index)
    finally:
        sys.settrace(before)
    assert lines < 30 * len(names)
    # -- each sample is in one group, of one key, whose extensions differ unless they do within a sample
    assert sorted(i for group in groups for i in group) == list(range(shard_index.count))
    for group in groups:
        assert len({shard_index.key(i) for i in group}) == 1
        kinds = [kind for i in group for kind in shard_index.kinds(i)]
        assert len(set(kinds)) == len(kinds) or (shard_index.flags[list(group)] & index.DUPLICATE_MEMBER).any()
    if case == "one key, apart":
        assert groups == [(i, i + 600) for i in range(600)]
    if case == "many keys, apart":
        assert groups == [(i, i + 400, i + 800) for i in range(400)]


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and resuming


def test_any_number_of_processes_writes_the_same_tars(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", 30)
    (source / "bad.jpg").write_bytes(b"")
    (source / "bad.txt").write_text("x")
    one = pack(source, tmp_path / "one", shard_size=4, workers=1)
    two = pack(source, tmp_path / "two", shard_size=4, workers=2)
    assert read_tars(tmp_path / "one") == read_tars(tmp_path / "two")
    assert (one.written, one.skipped, one.examples) == (two.written, two.skipped, two.examples)


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    source, out = make_folder(tmp_path / "in", 400), tmp_path / "out"
    expected = pack(source, tmp_path / "expected", shard_size=10, size=20, workers=1)
    call = f"pack({str(source)!r}, {str(out)!r}, shard_size=10, size=20, workers=2)"
    (tmp_path / "run.py").write_text(f"from pretrain.data.pack import pack\nif __name__ == '__main__': {call}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for shards in (3, 12):
        process = subprocess.Popen([sys.executable, tmp_path / "run.py"], env=environment)
        deadline = time.monotonic() + 60
        while len(list(out.glob("*.tar"))) < shards and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(1.5)  # its workers notice within this time and end
    finished = len(list(out.glob("*_stats.json")))
    assert finished >= 3
    (out / ".shard-0003.tar.123.partial").write_bytes(b"partial")
    modified = {path.name: path.stat().st_mtime_ns for path in out.glob("*_stats.json")}
    summary = pack(source, out, shard_size=10, size=20, workers=1)
    assert summary.reused == finished
    assert (summary.written, summary.skipped) == (expected.written, expected.skipped)
    assert read_tars(out) == read_tars(tmp_path / "expected")
    assert not list(out.glob(".*partial"))
    assert all((out / name).stat().st_mtime_ns == time_ns for name, time_ns in modified.items())
    assert pack(source, out, shard_size=10, size=20, workers=1).reused == 40


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupt_is_one_line_and_the_same_command_resumes(tmp_path: Path, workers: int) -> None:
    source, out = make_folder(tmp_path / "in", 300), tmp_path / "out"
    words = ["data", "pack", str(source), str(out), "--shard-size", "10", "--size", "20", "--workers", str(workers)]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("*.tar")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all processes
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert errors == f"clipfuse: interrupted; finished shards stay in {out}: run the same command again to resume\n"
    assert not list(out.glob(".*partial"))
    finished = len(list(out.glob("*_stats.json")))
    assert 1 <= finished < 30
    summary = pack(source, out, shard_size=10, size=20, workers=1)
    assert (summary.written, summary.reused) == (300, finished)


def catch_error(*arguments: Any, **options: Any) -> str:
    """Return the message, of one line, of the UserError that `pack` raises."""
    with pytest.raises(UserError) as caught:
        pack(*arguments, **{"workers": 1, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_source_or_other_options_are_refused(tmp_path: Path) -> None:
    source, out = make_folder(tmp_path / "in"), tmp_path / "out"
    pack(source, out, workers=1)
    assert "(size=None, now 16)" in catch_error(source, out, size=16)
    assert "shard_size=1000, now 7" in catch_error(source, out, shard_size=7)
    (source / "cars" / "new.jpg").write_bytes(make_image(0))
    assert "has changed" in catch_error(source, out)
    assert pack(source, out, prefix="again", workers=1).written == 12
    (out / "shard-plan.json").unlink()
    assert "has shard-0000.tar already, and no plan to resume from" in catch_error(source, out)
    (out / "again-plan.json").write_text("{")
    assert "again-plan.json cannot be read" in catch_error(source, out, prefix="again")
    assert "both source and target" in catch_error(source, source)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    import fcntl

    source, out = make_folder(tmp_path / "in", 2), tmp_path / "out"
    out.mkdir()
    with open(out / ".shard.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is packing" in catch_error(source, out)


def test_a_corrected_source_can_be_packed(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", [{"image": f"images/{i}.jpg", "caption": "c"} for i in range(7)])
    assert "no sample can be used; 7 of 7 have the problem: no such file: row 1: images/0.jpg" in catch_error(
        table, tmp_path / "out"
    )
    make_images(tmp_path)
    assert pack(table, tmp_path / "out", workers=1).written == 7


# ---------------------------------------------------------------------------------------------------------------------
# Error messages of one line


def test_errors_of_use_are_one_line(tmp_path: Path) -> None:
    make_images(tmp_path)
    out = tmp_path / "out"
    table = write_table(tmp_path / "t.csv", ROWS)
    missing = catch_error(table, out, caption_column="captoin")
    assert "no column 'captoin'; did you mean 'caption'?; it has image, caption, label, questions, note" in missing
    assert "--caption-column" in missing
    assert "no column 'url'" in catch_error(write_table(tmp_path / "t.jsonl", ROWS), out, image_column="url")
    assert "no column 'url'" in catch_error(write_table(tmp_path / "t.parquet", ROWS), out, image_column="url")
    (tmp_path / "twice.csv").write_text("image,caption,caption\na,b,c\n")
    assert "two columns are called 'caption'" in catch_error(tmp_path / "twice.csv", out)
    for name, content, expected in (
        ("empty.csv", b"", "cannot be read as csv"),
        ("rowless.csv", b"image,caption\n", "there are no rows"),
        ("latin.csv", b"im\xe9ge,caption\n", "cannot be read as csv"),
        ("broken.parquet", b"PAR1 no", "cannot be read as parquet"),
        ("broken.csv.gz", b"no gzip", "cannot be read as csv"),
        ("array.json", b'[{"image": "a"}]', "one json array"),
        ("sheet.xlsx", b"PK", "give a folder of images, a table (.csv"),
    ):
        (tmp_path / name).write_bytes(content)
        assert expected in catch_error(tmp_path / name, out), name
    assert "no file matches" in catch_error(tmp_path / "nowhere.csv", out)
    (tmp_path / "bare").mkdir()
    assert "holds no images" in catch_error(tmp_path / "bare", out)
    assert "use --caption-from path" in catch_error(tmp_path / "images", out)
    for option in ({"size": 0}, {"side": "left"}, {"caption_from": "name"}, {"shard_size": 0}, {"prefix": "a/b"}):
        with pytest.raises(ConfigError, match=f"^--{next(iter(option)).replace('_', '-')} "):
            pack(tmp_path / "images", out, **option)
    (tmp_path / "file").write_text("")
    assert "cannot write shards to" in catch_error(table, tmp_path / "file" / "out")


def test_a_full_disk_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_folder(tmp_path / "in", 2)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    assert "shard-0000.tar: No space left on device" in catch_error(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))
    monkeypatch.undo()
    assert pack(source, tmp_path / "out", workers=1).written == 2


def test_a_damaged_tar_is_named(tmp_path: Path) -> None:
    pack(make_folder(tmp_path / "in"), tmp_path / "first", workers=1)
    path = tmp_path / "first" / "shard-0000.tar"
    path.write_bytes(path.read_bytes()[:20000])
    (tmp_path / "first" / "shard-0000_stats.json").unlink()
    assert "shard-0000.tar" in catch_error(tmp_path / "first", tmp_path / "out")


def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    """Reading 50 MB of text, several hundred MB as Python objects, takes far less memory than that."""
    make_images(tmp_path, 1)
    caption = "word " * 40
    with open(tmp_path / "t.csv", "w") as file:
        file.write("image,caption\n")
        for i in range(250_000):
            file.write(f"images/{i}.jpg,{caption}\n")
    code = f"""
import resource
from pathlib import Path
from pretrain.data.pack.table import TableSource
table = TableSource([Path({str(tmp_path / "t.csv")!r})], "image", "caption", False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert table.count() == 250_000
for job in table.iterate_jobs(1000): pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    shutil.rmtree(tmp_path / "images")
    assert int(process.stdout) < 160  # MiB


def test_lines_of_a_summary() -> None:
    assert PackSummary(Path("x"), 2, 5, 1).format_lines() == ["x: 5 samples in 2 shards (1 finished before)"]
