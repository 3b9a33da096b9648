"""Sounds in packed shards: beside or instead of images, from folders, tables and tars."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile

from launch.cli import main
from pretrain.data.pack import pack
from pretrain.errors import ConfigError, UserError
from tests.support.packed import make_image, read_shards

FORMATS = {"wav": "WAV", "flac": "FLAC", "ogg": "OGG", "mp3": "MP3"}


def make_sound(number: int, extension: str = "wav") -> bytes:
    """Return half a second of a tone."""
    out = io.BytesIO()
    tone = 0.3 * np.sin(2 * np.pi * (200 + 50 * number) * np.arange(11_025) / 22_050)
    soundfile.write(out, tone, 22_050, format=FORMATS[extension])
    return out.getvalue()


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_a_folder_of_sounds(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {}
    for number, extension in enumerate(FORMATS):
        files |= {f"a/{number}.{extension}": make_sound(number, extension), f"a/{number}.txt": f"tone {number}"}
    summary = pack(write(tmp_path / "in", files), tmp_path / "out", workers=1)
    assert (summary.written, summary.skipped.total()) == (4, 0)
    samples = list(read_shards(tmp_path / "out").values())
    for number, (extension, members) in enumerate(zip(FORMATS, samples, strict=True)):
        assert set(members) == {extension, "txt", "json"}
        assert members[extension] == files[f"a/{number}.{extension}"]  # stored unchanged
        assert members["txt"] == f"tone {number}".encode()
        assert json.loads(members["json"]) == {"source": f"a/{number}.{extension}"}


def test_sounds_beside_images_and_alone(tmp_path: Path) -> None:
    wav, flac, image = make_sound(0), make_sound(1, "flac"), make_image(0)
    source = write(
        tmp_path / "in",
        {
            "both.jpg": image, "both.FLAC": flac, "both.txt": "both",
            "image.jpg": image, "image.txt": "an image",
            "sub/sound.wav": wav, "sub/sound.txt": "a sound", "sub/sound.json": '{"label": 3}',
            "two.mp3": make_sound(2, "mp3"), "two.wav": wav, "two.txt": "one sample: the first in wav, flac, ogg, mp3",
            "wrong.ogg": wav, "wrong.txt": "a WAV, whatever it is called",
        },
    )  # fmt: skip
    pack(source, tmp_path / "out", workers=1, size=16)
    samples = {members["txt"].decode(): members for members in read_shards(tmp_path / "out").values()}
    assert {text: sorted(set(members) - {"json", "txt"}) for text, members in samples.items()} == {
        "both": ["flac", "jpg"],
        "an image": ["jpg"],
        "a sound": ["wav"],
        "one sample: the first in wav, flac, ogg, mp3": ["wav"],
        "a WAV, whatever it is called": ["wav"],
    }
    assert samples["both"]["flac"] == flac
    assert json.loads(samples["both"]["json"])["source"] == "both.jpg"
    assert json.loads(samples["a sound"]["json"]) == {"source": "sub/sound.wav", "label": 3}
    by_path = pack(source, tmp_path / "paths", workers=1, caption_from="path")
    assert by_path.written == 5


def test_broken_sounds_are_counted_by_reason(tmp_path: Path) -> None:
    flac = make_sound(0, "flac")
    damaged = flac[: len(flac) // 2] + bytes(200) + flac[len(flac) // 2 + 200 :]
    files: dict[str, bytes | str] = {
        "good.wav": make_sound(0), "cut.wav": make_sound(0)[:-100], "damaged.flac": damaged, "empty.mp3": b"",
        "text.ogg": "no sound", "alone.wav": make_sound(1), "image.jpg": make_image(0), "image.wav": b"RIFF",
    }  # fmt: skip
    files |= {f"{Path(name).stem}.txt": "a caption" for name in list(files) if name != "alone.wav"}
    summary = pack(write(tmp_path / "in", files), tmp_path / "out", workers=1)
    assert summary.written == 1
    assert summary.skipped == {"audio truncated": 1, "audio unreadable": 3, "audio empty": 1, "no caption": 1}
    assert any(example.startswith("damaged.flac") for example in summary.examples["audio unreadable"])


def test_folders_with_nothing_to_pack_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no images and no sounds: no file in it ends in \.jpg, .*\.mp3"):
        pack(write(tmp_path / "a", {"x.pdf": b"x"}), tmp_path / "out", workers=1)
    with pytest.raises(UserError, match=r"holds 1 sound and no \.txt: put NAME\.txt next to NAME\.wav"):
        pack(write(tmp_path / "b", {"x.ogg": b"x"}), tmp_path / "out", workers=1)


def test_sounds_need_their_package_and_images_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    images = write(tmp_path / "a", {"x.jpg": make_image(0), "x.txt": "an image"})
    assert pack(images, tmp_path / "images", workers=1).written == 1
    sounds = write(tmp_path / "b", {"x.wav": b"RIFF", "x.txt": "a sound"})
    with pytest.raises(ConfigError, match=r"soundfile.*pip install 'clipfuse\[audio\]'"):
        pack(sounds, tmp_path / "sounds", workers=1)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows of the same columns as csv, jsonl or parquet, by the name's extension."""
    if path.suffix == ".csv":
        path.write_text("".join(f"{','.join(values)}\n" for values in ([*rows[0]], *(row.values() for row in rows))))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables_with_a_column_of_sounds(tmp_path: Path, kind: str) -> None:
    sounds = {f"s/{number}.wav": make_sound(number) for number in range(3)}
    write(tmp_path, {**sounds})
    rows = [{"audio": name, "caption": f"{word} {name}", "place": "x"} for name in sounds for word in ("one", "two")]
    path = write_table(tmp_path / f"t.{kind}", rows)
    summary = pack(path, tmp_path / "out", workers=1)
    assert (summary.written, summary.skipped.total()) == (3, 0)
    assert "6 rows name 3 sounds: rows of one sound are one sample with several captions" in summary.notes
    for (name, content), members in zip(sounds.items(), read_shards(tmp_path / "out").values(), strict=True):
        assert members["wav"] == content
        assert json.loads(members["json"]) == {"source": name, "place": "x", "caption": [f"one {name}", f"two {name}"]}


def test_tables_with_images_and_sounds(tmp_path: Path) -> None:
    image, first, second = make_image(0), make_sound(1), make_sound(2, "mp3")
    write(tmp_path, {"i.jpg": image, "1.wav": first, "2.mp3": second})
    rows = ["file,tone,caption", "i.jpg,1.wav,both", "i.jpg,2.mp3,another sound", "i.jpg,,no sound", ",1.wav,no image",
            ",,nothing", "i.jpg,gone.wav,lost", "i.jpg,1.wav,both again", "i.jpg,../x.wav,outside"]  # fmt: skip
    (tmp_path / "t.csv").write_text("\n".join(rows))
    summary = pack(tmp_path / "t.csv", tmp_path / "out", workers=1, image_column="file", audio_column="tone")
    assert summary.skipped == {"no image": 1, "no such file": 1, "path outside the table's folder": 1}
    assert "file and tone are empty" in summary.examples["no image"][0]
    samples = {members["txt"].decode(): members for members in read_shards(tmp_path / "out").values()}
    assert {text: sorted(set(members) - {"json", "txt"}) for text, members in samples.items()} == {
        "both": ["jpg", "wav"], "another sound": ["jpg", "mp3"], "no sound": ["jpg"], "no image": ["wav"],
    }  # fmt: skip
    assert json.loads(samples["both"]["json"]) == {
        "source": "i.jpg", "audio_source": "1.wav", "caption": ["both", "both again"],
    }  # fmt: skip
    assert samples["no image"]["wav"] == first


def test_sounds_inside_parquet(tmp_path: Path) -> None:
    rows = [{"audio": {"bytes": make_sound(i, "mp3"), "path": f"{i}.mp3"}, "caption": f"tone {i}"} for i in range(2)]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    pack(tmp_path / "t.parquet", tmp_path / "out", workers=1)
    for row, members in zip(rows, read_shards(tmp_path / "out").values(), strict=True):
        assert members["mp3"] == row["audio"]["bytes"]  # type: ignore[index]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_column_called_audio_may_hold_text(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, {"0.jpg": make_image(0), "1.jpg": make_image(1)})
    rows = [{"image": "0.jpg", "audio": "", "caption": "zero"}, {"image": "1.jpg", "audio": "in stereo", "caption": "one"}]
    path = write_table(tmp_path / f"t.{kind}", rows)
    assert main(["data", "pack", str(path), str(tmp_path / "out"), "--workers", "1"]) == 0
    line = "the column audio names no sounds ('in stereo'), so it is kept in the json; --audio-column audio reads it as paths"
    assert line in capsys.readouterr().out
    samples = list(read_shards(tmp_path / "out").values())
    assert [set(members) for members in samples] == [{"jpg", "txt", "json"}] * 2
    assert json.loads(samples[1]["json"]) == {"source": "1.jpg", "audio": "in stereo"}
    assert main(["data", "pack", str(path), str(tmp_path / "paths"), "--audio-column", "audio", "--workers", "1"]) == 0
    assert "no such file" in capsys.readouterr().out


def test_names_of_sounds_without_an_extension_are_found_as_files(tmp_path: Path) -> None:
    write(tmp_path, {"0.jpg": make_image(0), "tone": make_sound(0), "t.csv": "image,audio,caption\n0.jpg,tone,both\n"})
    pack(tmp_path / "t.csv", tmp_path / "out", workers=1)
    assert set(next(iter(read_shards(tmp_path / "out").values()))) == {"jpg", "wav", "txt", "json"}


def test_errors_of_columns_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").write_text("sound,caption\n1.wav,a tone\n")
    (tmp_path / "in").mkdir()
    for arguments, message in (
        ([], "no column 'image'; it has sound, caption: name it with --image-column (or --audio-column)"),
        (["--audio-column", "tone"], "no column 'tone'"),
    ):
        assert main(["data", "pack", str(tmp_path / "t.csv"), str(tmp_path / "out"), *arguments, "--workers", "1"]) != 0
        assert message in (error := capsys.readouterr().err)
        assert len(error.strip().splitlines()) == 1
    (tmp_path / "text.csv").write_text("audio,caption\nin stereo,a tone\n")
    with pytest.raises(
        ConfigError, match=r"text\.csv: there is no column 'image', and 'audio' names no sounds \('in stereo'\)"
    ):
        pack(tmp_path / "text.csv", tmp_path / "out", workers=1)
    with pytest.raises(ConfigError, match="--audio-column tone is for tables"):
        pack(tmp_path / "in", tmp_path / "out", audio_column="tone")


# ---------------------------------------------------------------------------------------------------------------------
# Tars


def test_tars_with_sounds_are_packed_again(tmp_path: Path) -> None:
    image, wav = make_image(0), make_sound(0)
    files = {"a.jpg": image, "a.flac": make_sound(1, "flac"), "a.txt": b"both", "b.wav": wav, "b.txt": b"a sound",
             "c.wav": wav[:-10], "c.txt": b"cut", "d.mp3": wav, "d.txt": b"a WAV called mp3", "e.txt": b"nothing"}  # fmt: skip
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    summary = pack(tmp_path / "in.tar", tmp_path / "out", workers=1)
    assert summary.skipped == {"audio truncated": 1, "no image": 1}
    samples = read_shards(tmp_path / "out")
    assert {
        f"{key.split('/')[1]}.{extension}": data for key, sample in samples.items() for extension, data in sample.items()
    } == {name: content for name, content in files.items() if name[0] not in "ce"}


def test_jobs_of_sounds_reach_worker_processes(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {}
    for number in range(4):
        files |= {f"{number}.wav": make_sound(number), f"{number}.txt": f"tone {number}"}
    source = write(tmp_path / "in", files)
    pack(source, tmp_path / "one", workers=1, shard_size=2)
    pack(source, tmp_path / "two", workers=2, shard_size=2)
    one, two = ([path.read_bytes() for path in sorted((tmp_path / out).glob("*.tar"))] for out in ("one", "two"))
    assert one == two
    assert len(one) == 2
