"""Tests of check_shards: it reports every shard and sample that training could not use."""

import io
import json
import tarfile

import pytest
from PIL import Image

from pretrain.data.check import check_shards
from pretrain.data.shards.paths import count_samples, expand_shards
from pretrain.errors import UserError


def jpeg():
    out = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(out, "JPEG")
    return out.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    good = [(f"{i}.{e}", d) for i in range(5) for e, d in (("jpg", jpeg()), ("txt", b"red"))]
    bad = [
        ("a.jpg", jpeg()),
        ("b.txt", b"red"),
        ("c.jpg", b""),
        ("c.txt", b""),
        ("d.png", jpeg()[:300]),
        ("d.txt", b"red"),
        ("e.jpg", jpeg()),
        ("e.txt", b"red"),
        ("0.jpg", jpeg()),
        ("0.txt", b"twice"),
    ]
    write_tar(tmp_path / "0.tar", good)
    write_tar(tmp_path / "1.tar", good[:4] + bad)
    write_tar(tmp_path / "2.tar", [])
    write_tar(tmp_path / "3.tar", good)
    write_tar(tmp_path / "4.tar", good)
    with open(tmp_path / "3.tar", "r+b") as f:
        f.truncate(1024 + 512)
    (tmp_path / "4_stats.json").write_text(json.dumps({"successes": 6}))
    return expand_shards(str(tmp_path))


@pytest.mark.parametrize("workers", [1, 2])
def test_every_problem_is_reported(shards, workers):
    calls = []
    report = check_shards(shards, workers=workers, progress=lambda *arguments: calls.append(arguments))
    assert calls == [(i, 5) for i in range(1, 6)]
    assert (report.shards, report.samples, report.bad_samples) == (5, 13, 5)
    assert dict(report.bad) == {
        "no caption": 1,
        "no image": 1,
        "image empty": 1,
        "empty caption": 1,
        "image truncated": 1,
        "duplicate key": 1,
    }
    assert report.names["no image"] == ["1/b: members: txt"]
    assert report.names["duplicate key"] == ["1/0: 1/0"]
    assert [path[-5:] for path in report.empty] == ["2.tar"]
    assert "3.tar is damaged at byte" in report.damaged[0]
    assert "4.tar holds 5 samples, but" in report.damaged[1]
    assert not report.is_ok
    with pytest.raises(UserError, match=r"3\.tar is damaged"):
        count_samples(shards)


def test_without_decoding_only_missing_members_are_reported(shards):
    report = check_shards(shards, decode=False, workers=1)
    assert dict(report.bad) == {"no caption": 1, "no image": 1, "duplicate key": 1}
    assert check_shards(shards, decode=False, workers=1, caption="title").bad["no caption"] == 12


def test_good_shards_are_ok(shards):
    report = check_shards(shards[:1])
    assert report.is_ok
    assert (report.samples, report.bad_samples, report.damaged) == (5, 0, [])
