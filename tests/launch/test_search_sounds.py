"""clipfuse index and search of sounds, held against embeddings of the model by itself, soundfile and the files."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import tarfile
from pathlib import Path
from typing import Any

import clipfuse
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from finetune.search import places
from finetune.search.fields import Field
from finetune.search.query import Query, Searcher, load_query_model
from finetune.search.vector_index import Description
from launch import cli
from tests.support import commands
from tests.support.commands import run
from tests.support.sound_search import COUNT, list_files

TEXT = "a green thing"


@pytest.fixture
def here(sound_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(sound_folder)
    return sound_folder


def search(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    return commands.search(capsys, *words, "--k", "50")


def check(results: list[dict[str, Any]], cosines: np.ndarray, prefix: str, suffix: str = "") -> None:
    """The results are all sounds, in the order of cosines (n,)."""
    order = np.argsort(-cosines)
    np.testing.assert_allclose([result["score"] for result in results], cosines[order], atol=2e-6)
    assert [result["key"] for result in results] == [f"{prefix}/{i:05d}{suffix}" for i in order]


def test_sounds_are_found_by_text_and_by_sound(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run without images indexes sounds by itself."""
    printed = run(capsys, "index", "runs/two", "--data", "sounds.tar", "--db", "found", "--fields", "label:int")
    assert "found: 12 sounds of 16 numbers each; 12 added" in printed
    assert "sounds/s" in printed
    assert "nothing to do" in run(capsys, "index", "runs/two", "--data", "sounds.tar", "--db", "found")
    model = clipfuse.load("runs/two")
    sounds = model.encode_audio(list_files())
    text = model.encode_texts([TEXT])[0]
    results = search(capsys, "found", TEXT)
    check(results, sounds @ text, "sounds")
    for result in results:
        file = Path(f"{result['key']}.flac")
        assert result["caption"] == file.with_suffix(".txt").read_text()
        assert result["fields"]["seconds"] == pytest.approx(soundfile.info(str(file)).duration, abs=1e-3)
        assert result["fields"]["label"] == json.loads(file.with_suffix(".json").read_text())["label"]
        with open(result["source"], "rb") as shard:
            shard.seek(result["offset"])
            assert shard.read(result["size"]) == file.read_bytes()
    short = [f"sounds/{i:05d}" for i in np.argsort(-(sounds @ text)) if i % 3]
    assert [result["key"] for result in search(capsys, "found", TEXT, "--filter", "seconds < 0.5 and label >= 0")] == short

    seventh = Path("sounds/00007.flac").read_bytes()
    with places.open_index("found") as opened:
        searcher = Searcher(opened, load_query_model(opened, None), torch.device("cpu"))
        for query, vector in (
            (Query(audio=seventh, k=50), sounds[7]),
            (Query(like="sounds/00007", k=50), sounds[7]),
            (Query(TEXT, audio=seventh, k=50), sounds[7] + text),
        ):
            check(searcher.search(query).to_records(), sounds @ (vector / np.linalg.norm(vector)), "sounds")
        picture = Path("sounds/00007.jpg").read_bytes()
        for query, message in (
            (Query(image=picture), "has no image tower: search with a text or --audio FILE"),
            (Query(audio=picture), "--audio is not a usable sound: audio unreadable: none of WAV, FLAC, Ogg, MP3"),
            (Query(like="gone"), "found has no sound gone"),
        ):
            with pytest.raises(clipfuse.UserError, match=message):
                searcher.search(query)
    first = results[0]
    line = run(capsys, "search", "found", TEXT, "--k", "1").splitlines()[0]
    place = f"{here / 'sounds.tar'}:{first['offset']}"
    assert line.split() == ["1", f"{first['score']:.3f}", first["key"], *first["caption"].split(),
                            f"seconds={first['fields']['seconds']}", f"label={first['fields']['label']}", place]  # fmt: skip
    record = json.loads(run(capsys, "search", "found", "--audio", "sounds/00003.flac", "--json"))
    assert record["notes"] == ["the sound has 0.8 s and the model hears 0.4 s: its middle counts"]
    assert record["audio"] == "sounds/00003.flac"


def test_any_modality_asks_for_any_index(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of three towers: pictures find sounds, and sounds find pictures; each index says what it holds."""
    words = ["index", "runs/three", "--data", "sounds.tar"]
    assert "12 images of" in run(capsys, *words, "--db", "pictures")
    assert "12 sounds of" in run(capsys, *words, "--db", "three.db", "--only", "audio")
    assert "nothing to do" in run(capsys, *words, "--db", "three.db")  # as the index has
    model = clipfuse.load("runs/three")
    pictures = model.encode_images([name.replace(".flac", ".jpg") for name in list_files()])
    sounds = model.encode_audio(list_files())
    by_picture = {result["key"]: result["score"] for result in search(capsys, "three.db", "--image", "sounds/00001.jpg")}
    np.testing.assert_allclose([by_picture[f"sounds/{i:05d}"] for i in range(COUNT)], sounds @ pictures[1], atol=2e-6)
    by_sound = search(capsys, "pictures", "--audio", "sounds/00001.flac")
    scores = {result["key"]: result["score"] for result in by_sound}
    np.testing.assert_allclose([scores[f"sounds/{i:05d}"] for i in range(COUNT)], pictures @ sounds[1], atol=2e-6)
    assert "seconds" not in by_sound[0]["fields"]
    for place, modality in (("pictures", "image"), ("three.db", "audio")):
        with places.open_index(place) as opened:
            assert opened.describe().modality == modality
            row = opened.get(["sounds/00001"])[0]
            assert row is not None
            assert Image.open(io.BytesIO(row.thumbnail)).size == ((32, 32) if modality == "image" else (320, 160))


def test_a_folder_and_what_embed_wrote(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = clipfuse.load("runs/three")
    cosines = model.encode_audio(list_files()) @ model.encode_texts([TEXT])[0]
    run(capsys, "index", "runs/three", "--data", "sounds", "--db", "files", "--only", "audio")
    results = search(capsys, "files", TEXT)
    check(results, cosines, "sounds", ".flac")
    assert results[0]["source"] == str(here / results[0]["key"])
    assert results[0]["offset"] == -1
    with tarfile.open("partial.tar", "w") as tar:  # the last sound is missing, and the first caption
        for path in sorted(Path("sounds").iterdir()):
            if path.name not in (f"{COUNT - 1:05d}.flac", "00000.txt"):
                tar.add(path, path.name)
    run(capsys, "embed", "runs/three", "--data", "partial.tar", "--out", "vectors", "--dtype", "float32", "--workers", "0")
    words = ["index", "runs/three", "--data", "vectors", "--only", "audio", "--db"]
    assert "11 sounds of 16 numbers each; 11 added" in run(capsys, *words, "embedded", "--images", "partial.tar")
    assert "1 left out (no sound 1)" in run(capsys, *words, "alone")
    run(capsys, "embed", "runs/three", "--data", "partial.tar", "--only", "audio", "--out", "heard", "--workers", "0")
    assert "11 sounds of" in run(capsys, "index", "runs/three", "--data", "heard", "--db", "only")  # by itself
    results = {place: search(capsys, place, TEXT) for place in ("embedded", "alone")}
    for found in results.values():
        check(found, cosines[:-1], "partial")
        captions = {result["key"]: result["caption"] for result in found}
        assert (captions["partial/00000"], captions["partial/00001"]) == ("", TEXT)
    seconds = {result["key"]: result["fields"]["seconds"] for result in results["embedded"]}
    assert seconds == {f"partial/{i:05d}": 0.3 if i % 3 else 0.8 for i in range(COUNT - 1)}
    assert results["alone"][0]["fields"] == {"seconds": None}


def test_sounds_are_reranked_with_and_without_stored_features(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reranker = clipfuse.load("runs/heard")
    assert isinstance(reranker, clipfuse.FinetunedModel)
    shutil.copy("sounds.tar", "moved.tar")
    rerank = ["--rerank", "runs/heard"]
    words = ["index", "runs/two", "--data", "moved.tar", "--db", "kept"]
    run(capsys, *words)
    read = search(capsys, "kept", TEXT, *rerank)
    printed = run(capsys, *words, *rerank)
    assert "token features of runs/heard/checkpoints" in printed
    assert "12 sounds, 12 added" in printed
    Path("moved.tar").unlink()
    expected = {f"moved/{i:05d}": reranker.predict(name, TEXT)[0][0][1] for i, name in enumerate(list_files())}
    for results, tolerance in ((read, 1e-4), (search(capsys, "kept", TEXT, *rerank), 5e-3)):
        matches = [result["match"] for result in results]
        assert matches == sorted(matches, reverse=True)
        np.testing.assert_allclose(matches, [expected[result["key"]] for result in results], atol=tolerance)


def test_maps_on_spectrograms_by_either_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reranker, encoders = clipfuse.load("runs/heard"), clipfuse.load("runs/two")
    assert isinstance(reranker, clipfuse.FinetunedModel)
    assert isinstance(encoders, clipfuse.Model)
    run(capsys, "index", "runs/two", "--data", "sounds", "--db", "mapped")
    query = ["search", "mapped", TEXT, "--k", "1", "--json", "--maps"]
    drawn = {}
    for name, words in {
        "raw": ["--rerank", "runs/heard", "--candidates", "1"],
        "similarity": ["--rerank", "runs/heard", "--candidates", "1", "--maps-method", "similarity"],
        "encoders": ["--maps-method", "similarity"],
    }.items():
        found = json.loads(run(capsys, *query, name, *words))
        assert found["notes"] == []
        key = found["results"][0]["key"]
        model, method = (encoders, "similarity") if name == "encoders" else (reranker, name)
        expected = model.attend(key, TEXT, method=method).figure()
        (path,) = Path(name).iterdir()
        assert path.name == f"001-{key.replace('/', '_')}.png"
        drawn[name] = np.asarray(Image.open(path).convert("RGB"), float)
        np.testing.assert_array_equal(drawn[name], np.asarray(expected.convert("RGB"), float))
    assert drawn["raw"].shape != drawn["similarity"].shape or (drawn["raw"] != drawn["similarity"]).any()
    run(capsys, "attend", "runs/three", "sounds/00001.flac", TEXT, "--maps", "similarity", "--out", "alone.png")
    expected = clipfuse.load("runs/three").attend("sounds/00001.flac", TEXT, method="similarity").figure()
    np.testing.assert_array_equal(np.asarray(Image.open("alone.png")), np.asarray(expected))


def test_the_commands_that_a_run_prints_at_its_end(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run that re-ranks sounds: they work as printed."""
    printed = Path("heard.log").read_text()
    commands = [shlex.split(line)[1:] for line in printed[printed.index("next:") :].splitlines() if "clipfuse " in line]
    assert [words[0] for words in commands] == ["report", "attend", "index", "search"]
    assert commands[1][2] == "runs/heard/example.flac"
    for words in commands[1:]:
        output = run(capsys, *words)
    assert "thing" in output
    assert Path("runs/heard/attended.png").is_file()


def test_several_captions_are_told_apart(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("lines").mkdir()
    shutil.copy("sounds/00001.flac", "lines/a.flac")
    Path("lines/a.txt").write_text("a green thing\na high tone\n")
    run(capsys, "index", "runs/two", "--data", "lines", "--db", "of-lines", "--caption", "txt:lines")
    assert "  lines/a.flac  a green thing / a high tone  seconds=0.3" in run(capsys, "search", "of-lines", TEXT)


def test_an_index_made_before_holds_images(tmp_path: Path) -> None:
    description = Description(4, {"fingerprint": "a", "from": "b", "step": 1}, (Field("price", "float"),))
    with places.create_index(str(tmp_path / "old"), description) as index:
        written = json.loads((tmp_path / "old/index.json").read_text())
        assert written.pop("modality") == "image"
        (tmp_path / "old/index.json").write_text(json.dumps(written))
        assert index.describe() == description
    with places.open_index(str(tmp_path / "old")) as index:
        assert index.describe() == description
    (tmp_path / "old/index.json").write_text(json.dumps(written | {"modality": "smell"}))
    with pytest.raises(clipfuse.UserError, match="is not of clipfuse index 1"):
        places.open_index(str(tmp_path / "old"))


REFUSED = {
    "search refused --audio gone.wav": "--audio gone.wav cannot be read: No such file or directory",
    "search refused": "the query is empty: give a text, --image FILE, --audio FILE, or several",
    "search refused thing --run runs/three": "refused holds embeddings of",
    "search seen thing --rerank runs/heard": "runs/heard/checkpoints/step-0000002 reads sounds, and seen is an index of im",
    "search refused thing --maps maps": "--maps needs --rerank RUN, whose attention it draws, or --maps-method similarity",
    "search refused --audio sounds/00001.flac --maps maps --maps-method similarity": "--maps needs a text",
    "search refused thing --maps-method similarity": "--maps-method similarity goes with --maps DIR",
    "search refused thing --maps maps --maps-method similar": "no map method 'similar'; did you mean 'similarity'?",
    "index runs/two --data sounds.tar --db new --only image": "--only image: of runs/two/checkpoints/step-0000002 an index can",
    "index runs/three --data sounds.tar --db new --only text": "an index can hold image, audio",
    "index runs/three --data sounds.tar --db seen --only audio": "--only audio: seen is an index of images; choose another",
    "index runs/two --data sounds.tar --db new --fields seconds:float": "every index of sounds has a field seconds",
    "index runs/two --data sounds.tar --db refused --fields size:int": "was made with the fields none",
    "index runs/two --data pictures-only --db new": "pictures-only holds no sounds, only 1 image",
    "index runs/two --data silent.tar --db silent": "of 1 sample none has a usable sound (no sound 1), so nothing was written",
    "index runs/two --data silent.tar --db silent.db": "none has a usable sound (no sound 1), so nothing was written",
    "index runs/two --data empty.tar --db new": "empty.tar",
    "embed runs/two --data empty.tar --out new-vectors": "empty.tar",
    "embed runs/two --data silent.tar --out silent-vectors --workers 0": "of 1 sample none can be embedded (audi",
    "embed runs/two --data sounds.tar --out vectors-of-titles --workers 0 --caption title": "read from title: --caption names",
}


def test_refused_in_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "index", "runs/two", "--data", "sounds.tar", "--db", "refused")
    run(capsys, "index", "runs/three", "--data", "sounds.tar", "--db", "seen")
    Path("pictures-only").mkdir()
    shutil.copy("sounds/00001.jpg", "pictures-only")
    tarfile.open("empty.tar", "w").close()
    with tarfile.open("silent.tar", "w") as tar:
        for extension in ("jpg", "txt"):
            tar.add(f"sounds/00001.{extension}", f"a.{extension}")
    for command, message in REFUSED.items():
        capsys.readouterr()
        code = cli.main(shlex.split(command))
        err = capsys.readouterr().err
        assert code in (1, 2), command
        assert message in err, (command, err)
        assert err.count("\n") == 1, (command, err)
    for name in ("new", "new-vectors", "silent", "silent.db", "silent-vectors", "vectors-of-titles"):
        assert not Path(name).exists(), name
    cli.main(["index", "runs/two", "--data", "silent.tar", "--db", "refused"])
    capsys.readouterr()
    assert "nothing to do" in run(capsys, "index", "runs/two", "--data", "sounds.tar", "--db", "refused")  # it keeps its sounds
