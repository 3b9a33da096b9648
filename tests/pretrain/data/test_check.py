"""Tests of check_shards: it reports every shard and sample that training could not use."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
import soundfile
from PIL import Image

from launch import cli
from pretrain.data.caption_statistics import find_oddities
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


ODD = {
    "of several lines, read as one caption": "\n".join(f"traduction {i}" for i in range(60)),
    "longer than 1,000 characters": "word " * 50_000,
    "that are placeholders, such as nan": "NaN",
    "with markup": "<p>a red <b>car</b></p>",
    "with a url": "see https://example.com/x",
    "that are file names": "IMG_0042.JPG",
    "with control characters": "a \x1b[31mred car",
    "with characters that could not be decoded (U+FFFD)": "caf\ufffd",
    "without a letter or digit": "...",
}


@pytest.mark.parametrize("workers", [1, 2])
def test_lengths_and_oddities_of_captions_are_reported(tmp_path, workers, capsys):
    for shard in range(4):
        captions = [f"a red car {i}" for i in range(100)]
        if shard == 2:
            captions += ODD.values()
        members = [(f"{i}.{e}", d) for i, text in enumerate(captions) for e, d in (("jpg", jpeg()), ("txt", text.encode()))]
        write_tar(tmp_path / f"{shard}.tar", members)
    report = check_shards(expand_shards(str(tmp_path)), workers=workers)
    assert report.is_ok  # odd captions are not bad
    statistics = report.captions
    assert dict(statistics.odd) == dict.fromkeys(ODD, 1)
    assert [statistics.names[oddity] for oddity in ODD] == [
        [f"2/{100 + i}" + (" (60 lines)" if i == 0 else "")] for i in range(len(ODD))
    ]
    assert statistics.lengths.total() == 409
    assert [statistics.compute_quantile(q) for q in (0, 0.5, 1)] == [3, 12, 249_999]
    assert cli.main(["data", "check", str(tmp_path), "--workers", str(workers)]) == 0
    printed = capsys.readouterr().out
    assert "409 captions of 3 to 249,999 characters: median 12, 99% up to" in printed
    assert "the longest in 2/101" in printed
    assert "  1 caption longer than 1,000 characters: 2/101\n" in printed
    assert "  1 caption of several lines, read as one caption: 2/100 (60 lines)\n" in printed


def test_plain_captions_are_not_odd():
    for caption in (
        "a red car",
        "a < b & c > d",
        "ein Bild, 50% größer",
        "x",
        "7",
        "日本",
        "<person> walks",
        "nan bread",
        "photo.jpg of a cat",
    ):
        assert find_oddities(caption) == []


def test_captions_of_a_json_field(tmp_path):
    captions = [["one", "three"], [f"c{i}" for i in range(21)]]
    members = [
        (f"{i}.{e}", d) for i, c in enumerate(captions) for e, d in (("jpg", jpeg()), ("json", json.dumps({"c": c}).encode()))
    ]
    write_tar(tmp_path / "0.tar", members)
    statistics = check_shards([str(tmp_path / "0.tar")], caption="c").captions
    assert statistics.lengths == {2: 10, 3: 12, 5: 1}
    assert dict(statistics.odd) == {"in samples with more than 20": 1}


def test_report_as_json(shards, capsys):
    assert cli.main(["data", "check", *shards, "--json", "--workers", "1"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["samples"], report["bad_samples"], report["bad"]["duplicate key"]) == (13, 5, 1)
    captions = report["captions"]
    assert (captions["count"], captions["shortest"], captions["median"], captions["longest"]) == (8, 3, 3, 3)


def wav(frames=8000):
    out = io.BytesIO()
    soundfile.write(out, np.zeros(frames), 16_000, format="WAV")
    return out.getvalue()


@pytest.fixture
def sounds(tmp_path):
    flac = io.BytesIO()
    soundfile.write(flac, np.random.default_rng(0).normal(0, 0.1, 30_000), 16_000, format="FLAC")
    damaged = bytearray(flac.getvalue())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 200] = bytes(200)
    members = [
        *[("a.jpg", jpeg()), ("a.wav", wav()), ("a.txt", b"both")],
        *[("b.flac", flac.getvalue()), ("b.txt", b"a sound")],
        *[("c.jpg", jpeg()), ("c.txt", b"an image")],
        *[("d.jpg", jpeg()), ("d.wav", wav()[:-10]), ("d.txt", b"cut")],
        *[("e.flac", bytes(damaged)), ("e.txt", b"damaged in the middle")],
        *[("f.wav", wav(0)), ("f.txt", b"silence")],
        *[("g.m4a", b"x"), ("g.txt", b"another format")],
        ("h.ogg", wav()),
    ]
    (tmp_path / "sounds").mkdir()
    write_tar(tmp_path / "sounds" / "0.tar", members)
    return [str(tmp_path / "sounds" / "0.tar")]


def test_sounds_are_counted_and_decoded_to_the_end(sounds, capsys):
    report = check_shards(sounds, workers=1)
    assert (report.samples, report.images, report.sounds, report.bad_samples, report.unchecked) == (8, 3, 6, 5, "")
    expected = {"audio truncated": 1, "audio unreadable": 1, "audio empty": 1, "no image": 1, "no caption": 1}
    assert report.bad == expected
    assert report.names["audio unreadable"][0].startswith("0/e: ")
    assert cli.main(["data", "check", *sounds, "--workers", "1"]) == 1
    assert "3 samples with an image, 6 with a sound\n" in capsys.readouterr().out
    assert cli.main(["data", "check", *sounds, "--json", "--workers", "1"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert (values["images"], values["sounds"], values["bad"]) == (3, 6, expected)
    assert check_shards(sounds, decode=False, workers=1).bad == {"no image": 1, "no caption": 1}


def test_sounds_are_only_counted_without_their_packages(sounds, shards, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    report = check_shards(sounds, workers=1)
    assert (report.sounds, report.bad) == (6, {"no image": 1, "no caption": 1})
    assert cli.main(["data", "check", *sounds, "--workers", "1"]) == 1
    line = "sounds were counted, not decoded: sounds need soundfile, which is not installed: pip install 'clipfuse[audio]'"
    assert line in capsys.readouterr().out.splitlines()
    assert check_shards(shards[:1], workers=1).unchecked == ""  # images alone need no such package


@pytest.fixture
def incomplete(tmp_path):
    """Samples with two of the three modalities, with all, with one, and with one of three that is damaged."""
    sound = io.BytesIO()
    soundfile.write(sound, np.zeros(4000), 8000, format="FLAC")
    members = {
        "all": {"jpg": jpeg(), "txt": b"red", "flac": sound.getvalue()},
        "seen": {"jpg": jpeg(), "txt": b"red"},
        "heard": {"txt": b"red", "flac": sound.getvalue()},
        "mute": {"jpg": jpeg(), "flac": sound.getvalue(), "json": b'{"caption": null}'},
        "alone": {"jpg": jpeg(), "json": b"{}"},
        "bare": {"json": b"{}"},
        "damaged": {"jpg": jpeg()[:300], "txt": b"red", "flac": sound.getvalue()},
        "blank": {"jpg": jpeg(), "txt": b" ", "flac": sound.getvalue()},
    }
    write_tar(tmp_path / "0.tar", [(f"{key}.{kind}", data) for key, kinds in members.items() for kind, data in kinds.items()])
    return tmp_path


def test_samples_that_lack_something_are_usable_with_the_setting_of_training(incomplete, capsys):
    words = ["data", "check", str(incomplete), "--workers", "1", "data.incomplete=keep"]
    assert cli.main([*words, "--fix", str(incomplete / "bad.txt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 shard, 8 samples, 4 of them bad"
    assert (
        "usable with data.incomplete=keep: 1 with image, text, audio; 1 with image, text; 1 with text, audio; "
        "1 with image, audio" in lines
    )
    skipped = [line.split()[0] for line in (incomplete / "bad.txt").read_text().splitlines()]
    assert skipped == ["0/alone", "0/bare", "0/damaged", "0/blank"]
    assert cli.main([*words, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["combinations"] == {"image+text+audio": 1, "image+text": 1, "text+audio": 1, "image+audio": 1}
    assert report["bad"] == {"no pair": 2, "image truncated": 1, "empty caption": 1}
    assert report["names"]["no pair"] == [
        "0/alone: it has image, without text and audio",
        "0/bare: it has nothing, without image and text and audio",
    ]
    assert report["captions"]["count"] == 3
    assert cli.main([*words, "--json", "--no-decode"]) == 1
    assert json.loads(capsys.readouterr().out)["bad"] == {"no pair": 2}
    assert cli.main([*words, "--json", "--no-decode", "--caption", "caption"]) == 1  # `alone` may have one
    assert json.loads(capsys.readouterr().out)["combinations"]["image+text"] == 1


def test_without_it_an_image_or_a_sound_needs_a_caption(incomplete):
    report = check_shards(expand_shards(str(incomplete)), workers=1)
    assert dict(report.bad) == {"no image": 1, "no caption": 3, "image truncated": 1, "empty caption": 1}
    assert not report.combinations


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.incomplete=kep"], "data.incomplete"),
        (["data.skip=bad.txt"], "unknown key data.skip on the command line; valid: caption, incomplete"),
        (["data.caption=title", "--caption", "text"], "--caption text and data.caption=title"),
    ],
)
def test_settings_that_it_does_not_read_are_refused(incomplete, capsys, words, message):
    assert cli.main(["data", "check", str(incomplete), *words]) == 2
    assert message in capsys.readouterr().err
