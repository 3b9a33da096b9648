"""The page of an index of sounds: spectrograms, the sounds themselves, maps on them, and sounds as queries."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import clipfuse
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from starlette.testclient import TestClient

from finetune.search import places
from finetune.search.query import Searcher, load_query_model
from launch import cli
from launch.serve.app import build_app
from tests.support.sounds import make_tone

TEXT = "a green thing"


@pytest.fixture
def here(sound_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(sound_folder)
    return sound_folder


def read_picture(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), float)


def test_results_show_spectrograms_and_play_the_sounds(here: Path, sound_client: TestClient) -> None:
    page = sound_client.get("/", params={"q": TEXT, "k": "12"})
    assert page.status_code == 200
    assert page.headers["content-security-policy"] == (
        "default-src 'none'; img-src 'self'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
        "media-src 'self'"
    )
    assert not re.search(r"<script|javascript:|\son\w+=|https?://|\sstyle=", page.text)
    keys = re.findall(r'<img class="image" src="/thumbnail\?key=([^"&]+)"', page.text)
    assert len(keys) == 12
    assert re.findall(r'<audio controls preload="none" src="/audio\?key=([^"]+)"></audio>', page.text) == keys
    assert "12 of 12 sounds" in page.text
    for key in keys:
        answer = sound_client.get("/audio", params={"key": key})
        assert (answer.status_code, answer.headers["content-type"]) == (200, "audio/flac")
        served, rate = soundfile.read(io.BytesIO(answer.content))
        stored, stored_rate = soundfile.read(f"{key}.flac")
        assert rate == stored_rate
        np.testing.assert_array_equal(served, stored)


def test_a_thumbnail_is_dark_at_the_height_of_its_tone(here: Path, sound_client: TestClient) -> None:
    """The heights are those of 64 bands from 50 to 8000 Hz that are evenly spread on Slaney's scale, written out here."""
    heights = []
    for number, mel in ((0, 3 * 220 / 200), (3, 15 + 27 * np.log(1760 * 1.003 / 1000) / np.log(6.4))):
        picture = read_picture(sound_client.get("/thumbnail", params={"key": f"sounds/{number:05d}"}).content)
        assert picture.shape == (160, 320, 3)
        heights.append(160 - picture.mean(axis=(1, 2)).argmin())
        lowest, highest = 3 * 50 / 200, 15 + 27 * np.log(8) / np.log(6.4)
        assert heights[-1] / 160 == pytest.approx((mel - lowest) / (highest - lowest), abs=0.03)
    assert heights[0] < heights[1]


def test_parts_of_a_sound(here: Path, sound_client: TestClient) -> None:
    """What a browser asks for when its user moves along a sound."""
    content = Path("sounds/00001.flac").read_bytes()
    size = len(content)
    for requested, first, last in (
        ("bytes=0-", 0, size - 1),
        ("bytes=10-19", 10, 19),
        ("bytes=-5", size - 5, size - 1),
        (f"bytes=10-{size + 100}", 10, size - 1),
    ):
        answer = sound_client.get("/audio", params={"key": "sounds/00001"}, headers={"range": requested})
        assert (answer.status_code, answer.content) == (206, content[first : last + 1])
        assert answer.headers["content-range"] == f"bytes {first}-{last}/{size}"
        assert answer.headers["content-length"] == str(last + 1 - first)
    for requested in ("bytes=0-1,5-6", "lines=1-2", "bytes=-"):
        assert sound_client.get("/audio", params={"key": "sounds/00001"}, headers={"range": requested}).content == content
    for requested in (f"bytes={size}-", "bytes=9-3", "bytes=-0"):
        answer = sound_client.get("/audio", params={"key": "sounds/00001"}, headers={"range": requested})
        assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{size}")
    for parameters in ({"key": "gone"}, {"upload": "gone"}, {}):
        assert sound_client.get("/audio", params=parameters).status_code == 404


def test_words_look_at_times_and_frequencies(here: Path, sound_client: TestClient) -> None:
    """By the method that is chosen, whose colors the page explains."""
    reranker = clipfuse.load("runs/heard")
    assert isinstance(reranker, clipfuse.FinetunedModel)
    for method, legend in (("raw", "where a word attends most"), ("similarity", "the region most similar to a word")):
        page = sound_client.get("/", params={"q": TEXT, "k": "2", "maps": method}).text
        assert re.findall(r'<label for="w\d+">([^<]+)</label>', page) == TEXT.split()
        assert legend in page
        assert f"<option selected>{method}</option>" in page
        assert '<svg class="orders along"' in page
        addresses = [address.replace("&amp;", "&") for address in re.findall(r'src="(/map\?[^"]+)"', page)]
        key = re.findall(r'<img class="image" src="/thumbnail\?key=([^"&]+)"', page)[0]
        maps = reranker.attend(f"{key}.flac", TEXT, method=method)
        expected = replace(maps, image=maps.image.resize((320, 160))).tiles(320)
        for address, (_, tile) in zip(addresses[: len(expected)], expected, strict=True):
            drawn = read_picture(sound_client.get(address).content)
            assert np.abs(drawn - np.asarray(tile.convert("RGB"), float)).mean() < 8
    refused = sound_client.get("/", params={"q": TEXT, "maps": "similar"})
    assert refused.status_code == 400
    assert "no map method &#39;similar&#39;; did you mean &#39;similarity&#39;?" in refused.text


def test_a_sound_is_a_query(here: Path, sound_client: TestClient) -> None:
    content = Path("sounds/00007.flac").read_bytes()
    model = clipfuse.load("runs/two")
    cosines = model.encode_audio([f"sounds/{i:05d}.flac" for i in range(12)]) @ model.encode_audio(content)[0]
    results = sound_client.post("/api/search", files={"audio": ("a", content)}, data={"k": "12"}).json()["results"]
    assert [result["key"] for result in results] == [f"sounds/{i:05d}" for i in np.argsort(-cosines)]
    page = sound_client.post("/", files={"file": ("a.flac", content)}, data={"q": TEXT}).text
    upload = re.findall(r'<audio controls preload="none" src="/audio\?upload=(\w+)"></audio>', page)
    assert len(upload) == 1
    assert sound_client.get("/audio", params={"upload": upload[0]}).content == content
    assert read_picture(sound_client.get("/thumbnail", params={"upload": upload[0]}).content).shape == (160, 320, 3)
    long = sound_client.post("/api/search", files={"file": ("a.flac", make_tone(440, 2.5, 0))}).json()
    assert long["notes"] == ["the sound has 2.5 s and the model hears 0.4 s: its middle counts"]
    for name in ("00001.jpg", "00001.txt"):
        refused = sound_client.post("/", files={"file": (name, Path(f"sounds/{name}").read_bytes())})
        assert refused.status_code == 400
        assert "the file is not a usable sound: audio unreadable" in refused.text
        refused = sound_client.post("/api/search", files={"query": (name, Path(f"sounds/{name}").read_bytes())})
        assert refused.json()["error"].startswith("query is not a usable sound: audio unreadable")
    empty = sound_client.get("/").text
    assert "holds 12 sounds" in empty
    assert 'accept="audio/*"' in empty
    assert "give a sound to find others like it" in empty


def test_of_three_towers_any_file_asks_for_sounds(here: Path) -> None:
    """A picture finds sounds; a sound finds pictures, which have no sound to play."""
    model = clipfuse.load("runs/three")
    files = [f"sounds/{i:05d}" for i in range(12)]
    images = model.encode_images([f"{name}.jpg" for name in files])
    sounds = model.encode_audio([f"{name}.flac" for name in files])
    for modality, own, suffix, query in (("audio", sounds, "jpg", images[1]), ("image", images, "flac", sounds[1])):
        assert cli.main(["index", "runs/three", "--data", "sounds.tar", "--db", f"any-{modality}", "--only", modality]) == 0
        with places.open_index(f"any-{modality}") as opened:
            searcher = Searcher(opened, load_query_model(opened, None), torch.device("cpu"))
            with TestClient(build_app(searcher), base_url="http://127.0.0.1") as client:
                upload = {"file": ("a", Path(f"{files[1]}.{suffix}").read_bytes())}
                results = client.post("/api/search", files=upload, data={"k": "12"}).json()["results"]
                scores = {result["key"]: result["score"] for result in results}
                np.testing.assert_allclose([scores[name] for name in files], own @ query, atol=2e-6)
                assert list(scores.values()) == sorted(scores.values(), reverse=True)
                page = client.post("/", files=upload)
                assert 'accept="image/*,audio/*"' in page.text
                assert page.text.count("<audio") == (12 if modality == "audio" else 1)  # of the results, or of the query
                assert page.headers["content-security-policy"].endswith("; media-src 'self'")
                status = client.get("/audio", params={"key": files[0]}).status_code
                assert status == (200 if modality == "audio" else 404)
