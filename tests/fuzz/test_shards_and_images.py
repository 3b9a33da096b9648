"""Damaged shards and images: the right content, a counted bad sample, or one line."""

import io
import json
import os
import random
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.data import BadSample
from pretrain.data.images import ImageDecoder
from pretrain.data.shards import index
from pretrain.data.shards.cache import ShardCache
from pretrain.data.shards.paths import count_samples
from pretrain.data.shards.reader import ShardReader
from pretrain.errors import UserError
from tests.support.mutations import (
    BoundedMemory,
    assert_bad,
    assert_one_line,
    count_cases,
    mutate_bytes,
    mutate_json,
    mutate_value,
)

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def build_shard(rng: random.Random) -> bytes:
    """Return a tar of a few samples with names and contents of many lengths."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=rng.choice(FORMATS)) as tar:
        for i in range(rng.randrange(1, 6)):
            stem = rng.choice(["", "folder/", "é" * 60 + "/"]) + f"{i:04d}"
            for extension in ("jpg", "txt", "json"):
                content = rng.randbytes(rng.choice([0, 1, 511, 512, 1500]))
                info = tarfile.TarInfo(f"{stem}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def rewrite_header(rng: random.Random, data: bytes) -> bytes:
    """Change a field of one header and give it a valid checksum."""
    blocks = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(blocks)
    header = bytearray(data[at : at + 512])
    start, end = rng.choice([(0, 100), (124, 136), (156, 157), (157, 257), (257, 265), (345, 500)])
    values = [
        b"\xff" * 12,
        b"77777777777\0",
        b"\x80" + b"\xff" * 11,
        b"0" * 12,
        b"-0000000001\0",
        b"S",
        b"x",
        b"L",
        b"\x1b[31m",
    ]
    header[start:end] = rng.choice([*values, rng.randbytes(end - start)])[: end - start].ljust(end - start, b"\0")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    return data[:at] + bytes(header) + data[at + 512 :]


def read_with_tarfile(path: Path) -> list[bytes]:
    """Return the content of all regular members, as Python's tarfile reads them, up to what it cannot read."""
    contents = []
    with tarfile.open(path) as tar, suppress(tarfile.ReadError):
        for member in tar:
            if member.isreg():
                contents.append(tar.extractfile(member).read())  # type: ignore[union-attr]
    return contents


def test_a_damaged_shard_gives_its_content_bad_samples_or_one_line(tmp_path: Path) -> None:
    outcomes = {"refused": 0, "read": 0}
    with BoundedMemory():
        for case in range(count_cases(150)):
            rng = random.Random(case)
            data = build_shard(rng)
            path = tmp_path / f"{case}.tar"
            path.write_bytes((mutate_bytes if rng.random() < 0.6 else rewrite_header)(rng, data))
            try:
                (count,) = count_samples([str(path)], ShardCache(str(tmp_path / "cache")))
                reader = ShardReader([str(path)], ShardCache(str(tmp_path / "cache")), [count])
                contents = set(read_with_tarfile(path)) if count else set()
                for sample in range(count):
                    try:
                        members = reader.read(0, sample).members
                    except BadSample as bad:
                        assert_bad(bad)
                        continue
                    assert set(members.values()) <= contents, case
                reader.close()
                outcomes["read"] += 1
            except UserError as error:
                assert_one_line(error, path.name)
                outcomes["refused"] += 1
            for file in tmp_path.glob(f"{case}.tar*"):
                file.unlink()
    assert min(outcomes.values()) > 10  # both kinds were tried


def build_images() -> list[bytes]:
    """Return small images in the formats that shards hold."""
    rng = np.random.default_rng(0)
    images = []
    kinds = ["RGB JPEG", "L JPEG", "CMYK JPEG", "RGB PNG", "RGBA PNG", "P PNG", "I;16 PNG", "RGB WEBP", "RGBA WEBP", "P GIF"]
    for mode, kind in map(str.split, [*kinds, "RGB BMP", "RGB TIFF"]):
        pixels = rng.integers(0, 255, (40, 53, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).convert(mode if mode != "I;16" else "L")
        out = io.BytesIO()
        (image.convert("I").convert("I;16") if mode == "I;16" else image).save(out, kind)
        images.append(out.getvalue())
        if kind == "JPEG":
            out = io.BytesIO()
            image.save(out, kind, progressive=True, exif=Image.Exif())
            images.append(out.getvalue())
    return images


def test_a_damaged_image_decodes_or_is_a_bad_sample() -> None:
    images, outcomes = build_images(), {"decoded": 0, "bad": 0}
    decoders = [ImageDecoder(32, resize=resize) for resize in ("crop", "squash")]
    with BoundedMemory():
        for case in range(count_cases(250)):
            rng = random.Random(case)
            data = mutate_bytes(rng, rng.choice(images))
            decoder = rng.choice(decoders)
            for decode in (decoder.decode_eval, lambda data, d=decoder: d.decode_train(data, np.random.default_rng(0))):
                try:
                    pixels = decode(data)
                except BadSample as bad:
                    assert_bad(bad)
                    outcomes["bad"] += 1
                    continue
                assert pixels.shape == (3, 32, 32), case
                assert pixels.dtype == torch.uint8, case
                outcomes["decoded"] += 1
    assert min(outcomes.values()) > 20


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard with a saved index."""
    path = tmp_path_factory.mktemp("intact") / "a.tar"
    path.write_bytes(build_shard(random.Random(3)))
    index.load_index(str(path))
    return path


def rewrite_index(rng: random.Random, path: Path) -> None:
    """Replace arrays or metadata of a saved index by others: the file itself stays a valid one."""
    with np.load(path) as stored:
        arrays = dict(stored)
    name = rng.choice(list(arrays))
    value = arrays[name]
    others = [
        value[:-1], value[:0], -value.astype(np.int64), value.astype(np.float32), value.astype(np.int64) * 10**12,
        np.array(3), np.zeros((2, 2, 2)), np.array(["x"]), np.concatenate([value, value]),
    ]  # fmt: skip
    if name == "meta":
        original = json.loads(value.tobytes())
        meta = mutate_value(rng, original)
        names = meta.get("extensions") if isinstance(meta, dict) else None
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            meta["extensions"] = original["extensions"]  # other names would be a forgery, which nobody can tell
        arrays[name] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    elif value.dtype == np.int64:
        arrays[name] = rng.choice([*others, value + 1, value[::-1].copy()])
    else:
        arrays[name] = rng.choice(others)
    if rng.random() < 0.1:
        del arrays[name]
    with path.open("wb") as out:
        (np.savez_compressed if rng.random() < 0.2 else np.savez)(out, **arrays)


def test_a_damaged_index_is_built_again(intact: Path, tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"))
    expected = index.load_index(str(intact))
    contents = [ShardReader([str(intact)], cache).read(0, i).members for i in range(expected.count)]
    path, saved = tmp_path / "a.tar", Path(f"{intact}.idx").read_bytes()
    for case in range(count_cases(80)):
        rng = random.Random(case)
        path.write_bytes(intact.read_bytes())
        os.utime(path, ns=(intact.stat().st_atime_ns, intact.stat().st_mtime_ns))
        idx = Path(f"{path}.idx")
        idx.write_bytes(saved)
        if rng.random() < 0.4:
            idx.write_bytes(mutate_bytes(rng, saved))
        else:
            rewrite_index(rng, idx)
        assert count_samples([str(path)], cache) == [expected.count], case
        reader = ShardReader([str(path)], cache)
        assert [reader.read(0, i).members for i in range(expected.count)] == contents, case
        assert [reader.key(0, i) for i in range(expected.count)] == [f"a/{key}" for key in expected.keys], case
        reader.close()


def test_what_else_lies_beside_a_shard_is_ignored_or_one_line(intact: Path, tmp_path: Path) -> None:
    expected = index.load_index(str(intact)).count
    path, cache = tmp_path / "a.tar", ShardCache(str(tmp_path / "cache"))
    path.write_bytes(intact.read_bytes())
    files = {
        "a_stats.json": {"successes": expected, "count": expected, "bytes": path.stat().st_size},
        "sizes.json": {"a.tar": expected},
    }
    for case in range(count_cases(120)):
        rng = random.Random(case)
        name = rng.choice(list(files))
        (tmp_path / name).write_bytes(mutate_json(rng, json.dumps(files[name]).encode()))
        os.utime(tmp_path / name, ns=(case, case))  # a json file is read again when it has changed
        try:
            counts = count_samples([str(path)], cache)
            index.load_index(str(path), cache)
            assert counts == [expected], case
        except UserError as error:
            assert_one_line(error, "a.tar")
        (tmp_path / name).unlink()


@pytest.mark.parametrize("name", ["a.tar.idx", "a_stats.json", "sizes.json"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to itself"])
def test_files_that_are_no_files(intact: Path, tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(intact.read_bytes())
    if kind == "folder":
        (tmp_path / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to(tmp_path / name)
    assert count_samples([str(path)], ShardCache(str(tmp_path / "cache"))) == [index.load_index(str(intact)).count]
