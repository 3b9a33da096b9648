"""Drawn sounds: what the json says is what is heard, kinds are distinguishable, and nothing else changes."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import sys
import tarfile
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from launch.cli import main
from pretrain.data.scenes.dataset import CLASSES, COLORS, build_scene, draw_dataset, draw_scene, draw_scene_with_sounds
from pretrain.data.scenes.layout import SIZES, Scene
from pretrain.data.scenes.sounds import GAINS, PATTERNS, RATE, build_sounds, draw_sounds, render_sounds
from pretrain.errors import UserError

SILENT = 4  # of 32768: rounding


def read(flac: bytes) -> np.ndarray:
    """Return (F, 2) float64 in 16-bit units."""
    samples, rate = soundfile.read(io.BytesIO(flac), dtype="int16", always_2d=True)
    assert rate == RATE == 16_000
    return samples.astype(float)


def test_each_object_is_heard_when_and_where_the_json_says() -> None:
    for index in range(40):
        scene = build_scene(5, "train", index)
        flac, fields = draw_sounds(scene)
        whole = read(flac)
        assert whole.shape == (48_000, 2)
        assert sorted(sound["object"] for sound in fields["sounds"]) == list(range(len(scene.objects)))
        heard = np.zeros(len(whole), bool)
        for sound in fields["sounds"]:
            item = scene.objects[sound["object"]]
            assert sound["name"] == item.spec.kind
            assert 0 <= sound["start"] < sound["end"] <= 3
            others = [i for i in range(len(scene.objects)) if i != sound["object"]]
            alone = render_sounds(scene, build_sounds(scene), skip=others).astype(float)
            audible = np.flatnonzero(np.abs(alone).max(1) > SILENT)
            assert audible[0] / RATE == pytest.approx(sound["start"], abs=0.01)
            assert audible[-1] / RATE == pytest.approx(sound["end"], abs=0.13)  # what decays fades into silence
            heard[round(sound["start"] * RATE) : round(sound["end"] * RATE)] = True
            left, right = np.sqrt((alone**2).mean(0))
            assert math.atan2(right, left) == pytest.approx((sound["pan"] + 1) * math.pi / 4, abs=0.01)
            assert sound["pan"] == pytest.approx(2 * item.x - 1, abs=1e-3)
            assert sound["gain"] == GAINS[item.spec.size]
        assert np.abs(whole[~heard]).max(initial=0) == 0
        assert np.abs(whole).max() < 32_000  # nothing is clipped


def test_sounds_add_up() -> None:
    for index in range(10):
        scene = build_scene(6, "train", index, num_objects=(3, 4))
        sounds, indices = build_sounds(scene), range(len(scene.objects))
        parts = [render_sounds(scene, sounds, [i for i in indices if i != j]).astype(int) for j in indices]
        assert np.abs(sum(parts) - render_sounds(scene, sounds)).max() <= 2


def test_larger_objects_are_louder() -> None:
    energy: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for index in range(200):
        scene = build_scene(7, "train", index, num_objects=(1, 1))
        spec = scene.objects[0].spec
        samples = render_sounds(scene, build_sounds(scene)).astype(float)
        energy[spec.kind, spec.color][spec.size] = float((samples**2).sum())
    pairs = 0
    for by_size in energy.values():
        for small, large in zip(SIZES, list(SIZES)[1:], strict=False):
            if small in by_size and large in by_size:
                assert by_size[large] / by_size[small] == pytest.approx(4, rel=0.05)  # 6 dB
                pairs += 1
    assert pairs > 10


def measure(scene: Scene) -> np.ndarray:
    """Return logarithms of a spectrogram, (bands x frames,), of the only sound of a scene, with its own start and level."""
    (sound,) = build_sounds(scene)
    samples = render_sounds(scene, [sound]).astype(float).sum(1)[round(sound.start * RATE) :][: round(0.7 * RATE)]
    frames = np.pad(samples, (0, round(0.7 * RATE) - len(samples)))[:11_008].reshape(-1, 256) * np.hanning(256)
    power = np.abs(np.fft.rfft(frames)) ** 2  # (43, 129)
    edges = np.unique(np.geomspace(1, 129, 25).astype(int))
    bands = np.stack([power[:, a:b].sum(1) for a, b in pairwise(edges)], 1)
    return np.log(bands / bands.max() + 1e-4).ravel()


def test_kinds_differ_in_sound_whatever_the_color() -> None:
    """The nearest of the known sounds has the same kind as the query, which has another color than the known ones."""
    assert set(PATTERNS) == set(CLASSES)
    examples: dict[tuple[str, str], np.ndarray] = {}
    for index in range(1500):
        scene = build_scene(8, "train" if index % 8 else "unseen", index, num_objects=(1, 1))
        spec = scene.objects[0].spec
        if (spec.kind, spec.color) not in examples:
            examples[spec.kind, spec.color] = measure(scene)
    assert len(examples) == len(CLASSES) * len(COLORS)
    correct = []
    for (kind, color), query in examples.items():
        known = [(other, x) for (other, shade), x in examples.items() if shade != color]
        correct.append(min(known, key=lambda pair: float(np.abs(pair[1] - query).sum()))[0] == kind)
    assert np.mean(correct) > 0.95


def test_colors_differ_in_pitch() -> None:
    """The strongest frequency of a boat rises from color to color by one and a half semitones."""
    pitches = {}
    for index in range(1500):
        scene = build_scene(9, "train" if index % 8 else "unseen", index, num_objects=(1, 1))
        spec = scene.objects[0].spec
        if spec.kind == "boat" and spec.color not in pitches:
            spectrum = np.abs(np.fft.rfft(render_sounds(scene, build_sounds(scene)).astype(float).sum(1), 1 << 19))
            pitches[spec.color] = np.argmax(spectrum[: len(spectrum) // 40]) * RATE / (1 << 19)  # the fundamental
    steps = np.diff(np.log2([pitches[color] for color in COLORS]))
    assert steps * 12 == pytest.approx(np.full(7, 1.5), abs=0.05)


def test_sound_captions_name_what_is_heard_in_its_order() -> None:
    counts = {", then ": 0, " together with ": 0}
    for index in range(80):
        scene = build_scene(1, ("train", "val", "unseen", "hard")[index % 4], index)
        captions, sounds = (draw_sounds(scene)[1][name] for name in ("sound_captions", "sounds"))
        assert [sound["start"] for sound in sounds] == sorted(sound["start"] for sound in sounds)
        assert len(set(captions)) == len(captions)
        complete, placed = (re.split("(, then | together with )", caption) for caption in captions[:2])
        assert complete[1::2] == placed[1::2]
        for number, (sound, phrase, place) in enumerate(zip(sounds, complete[::2], placed[::2], strict=True)):
            spec = scene.objects[sound["object"]].spec
            name, loudness = f"{spec.color} {spec.kind}", {"small": "quiet ", "large": "loud ", "medium": None}[spec.size]
            assert phrase.endswith(f" {name}")
            assert name in captions
            heard = phrase.removesuffix(name).removeprefix("the sound of ").removeprefix("we hear ")
            assert heard.removeprefix("an ").removeprefix("a ") in ("", loudness)
            side = "left" if sound["pan"] <= -1 / 3 else "right" if sound["pan"] >= 1 / 3 else "middle"
            assert (
                place
                == f"{'an' if spec.kind[0] in 'aeiou' else 'a'} {spec.kind} {'in' if side == 'middle' else 'on'} the {side}"
            )
            if number:
                is_apart = sound["start"] >= max(other["end"] for other in sounds[:number])
                assert complete[2 * number - 1] == (", then " if is_apart else " together with ")
                counts[complete[2 * number - 1]] += 1
    assert min(counts.values()) > 20


# ---------------------------------------------------------------------------------------------------------------------
# Shards


def members(folder: Path) -> dict[str, bytes]:
    """Return all files of all shards of a folder."""
    contents = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                contents[f"{path.stem}/{member.name}"] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return contents


def test_sound_adds_to_the_shards_and_changes_nothing_else(tmp_path: Path) -> None:
    sizes = {"train": 3, "hard": 4}
    draw_dataset(tmp_path / "silent", sizes, 64, 7, workers=1)
    draw_dataset(tmp_path / "sound", sizes, 64, 7, workers=1, sound=True)
    silent, sound = members(tmp_path / "silent"), members(tmp_path / "sound")
    assert {name for name in sound if not name.endswith(".flac")} == set(silent)
    for name, data in silent.items():
        if name.endswith(".json"):
            content = json.loads(sound[name])
            assert content.pop("sounds")
            assert content.pop("sound_captions")
            assert content.pop("sound_questions")
            assert json.dumps(content, separators=(",", ":")).encode() == data
        else:
            assert sound[name] == data
    for key in (name.removesuffix(".jpg") for name in silent if name.endswith(".jpg")):
        split, index = key.split("/")[0].split("-")[0], int(key.split("/")[1])
        _, content, others = draw_scene_with_sounds(7, split, index, 64)
        assert others == {"flac": sound[f"{key}.flac"]}
        assert json.loads(sound[f"{key}.json"]) == json.loads(json.dumps(content))
    assert "sound" not in json.loads((tmp_path / "silent" / "scenes.json").read_text())
    with pytest.raises(UserError, match="other settings"):
        draw_dataset(tmp_path / "silent", sizes, 64, 7, workers=1, sound=True)


def test_bytes_without_sound_are_those_of_earlier_versions(tmp_path: Path) -> None:
    draw_dataset(tmp_path, {"train": 2}, 64, 7, workers=1)
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted(tmp_path.iterdir())}
    content = json.dumps(draw_scene(7, "train", 0, 64)[1], separators=(",", ":"))
    # Of commit 4c83f92, before sounds; that of the images depends on Pillow's JPEG encoder, so it is not among them.
    assert digests["scenes.json"] == "9d0192cc47119322"
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == "9f112fb5587656fa"


def test_the_command_and_its_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = ["data", "scenes", str(tmp_path / "a"), "--num", "2", "--size", "64", "--sound", "--workers", "1"]
    assert main(drawn) == 0
    assert sum(name.endswith(".flac") for name in members(tmp_path / "a")) == 2 * 4 + 4
    assert main(["data", "scenes", str(tmp_path / "b"), "--catalog", "--sound"]) == 2
    assert "--sound does not go with --catalog" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(UserError, match=r"soundfile: pip install 'clipfuse\[audio\]'"):
        draw_dataset(tmp_path / "c", {"train": 2}, 64, workers=1, sound=True)
    assert not (tmp_path / "c").exists()
