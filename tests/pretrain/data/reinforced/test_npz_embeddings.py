"""Arrays of a .npz of unknown origin are read without unpickling, and within limits; the rest is a bad sample."""

from __future__ import annotations

import io
import os
import random
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.data import BadSample
from pretrain.data.reinforced.npz_embeddings import MAX_BYTES, read_matrices
from tests.support.reinforced import to_npz

GOOD = np.arange(12, dtype=np.float32).reshape(3, 4)


def read(**arrays: Any) -> np.ndarray:
    return read_matrices(to_npz(**arrays), ("image_emb",))[0]


def to_zip(content: bytes, **settings: Any) -> bytes:
    """Return a zip with an entry of any content."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **settings) as archive:
        archive.writestr("image_emb.npy", content)
    return file.getvalue()


def to_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numbers_are_those_of_numpy(dtype: str, order: Any) -> None:
    array = np.asarray(GOOD + 0.25, dtype=dtype, order=order)
    for data in (to_npz(image_emb=array, other=GOOD), to_zip(to_npy(array))):
        matrix = read_matrices(data, ("image_emb",))[0]
        assert matrix.dtype == np.float32
        assert np.array_equal(matrix, np.load(io.BytesIO(data))["image_emb"])


class Unpickled:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    trap = np.array([[Unpickled(tmp_path / "unpickled")]], dtype=object)
    with pytest.raises(BadSample, match="image_emb holds object"):
        read(image_emb=trap)
    assert not (tmp_path / "unpickled").exists()
    np.load(io.BytesIO(to_npz(image_emb=trap)), allow_pickle=True)["image_emb"]
    assert (tmp_path / "unpickled").exists()  # the trap works


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (GOOD.astype(np.int32), "image_emb holds int32"),
        (GOOD.astype(np.complex64), "image_emb holds complex64"),
        (GOOD.astype(np.longdouble), "image_emb holds float128"),
        (np.array([["a"]]), "image_emb holds <U1"),
        (np.zeros(2, dtype=[("a", "f4")]), "image_emb holds"),
        (GOOD[0], "has the shape"),
        (GOOD[None], "has the shape"),
        (GOOD[:, :0], "has the shape"),
        (GOOD[:0], "has the shape"),
        (np.where(GOOD == 5, np.nan, GOOD), "not finite"),
        (np.where(GOOD == 5, np.float32(np.inf), GOOD), "not finite"),
        (np.where(GOOD == 5, 1e300, GOOD.astype(np.float64)), "not finite"),
    ],
)
def test_other_arrays_are_bad(array: np.ndarray, message: str) -> None:
    with pytest.raises(BadSample, match=message):
        read(image_emb=array)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    zeros = to_npy(np.zeros((1, 24 << 20), np.float32))  # 96 MiB in 96 KiB
    bomb, claim = to_zip(zeros, compression=zipfile.ZIP_DEFLATED), to_npy(GOOD).replace(b"(3, 4)", b"(3, 4000000000)")
    lie = bytearray(bomb)
    at = lie.rindex(b"PK\x01\x02")
    lie[at + 24 : at + 28] = (1000).to_bytes(4, "little")  # the size that the directory gives
    del zeros
    tracemalloc.start()
    for data in (bomb, bytes(lie), to_zip(claim), b"PK" + bytes(MAX_BYTES)):
        with pytest.raises(BadSample, match="teacher embeddings unreadable"):
            read_matrices(data, ("image_emb",))
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with pytest.raises(BadSample, match="compressed in a way"):
            read_matrices(to_zip(to_npy(GOOD), compression=method), ("image_emb",))


def test_an_array_that_is_missing_is_named() -> None:
    with pytest.raises(BadSample, match="no array image_emb"):
        read(text_emb=GOOD)


def test_damage_of_any_kind_is_a_bad_sample() -> None:
    rng = random.Random(0)
    good = to_npz(image_emb=GOOD)
    for content in (
        b"",
        b"x",
        good[:-30],
        to_zip(b""),
        to_zip(to_npy(GOOD)[:-1]),
        to_zip(to_npy(GOOD) + b"x"),
        to_zip(b"\x93NUMPY\x03\x00"),
    ):
        with pytest.raises(BadSample):
            read_matrices(content, ("image_emb",))
    for _ in range(1500):
        damaged = bytearray(rng.choice((good, to_zip(to_npy(GOOD)))))
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            matrix = read_matrices(bytes(damaged), ("image_emb",))[0]
        except BadSample:
            continue
        assert np.isfinite(matrix).all()
