"""Runs with data.incomplete=keep: samples that have two of three modalities."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from launch import cli
from pretrain.checkpoints.loading import LoadedModel, load_model
from pretrain.config import find_config
from pretrain.data.captions import caption_id
from pretrain.data.key_digests import digest
from pretrain.embedding.aligned import EmbeddingSource, load_aligned
from pretrain.embedding.job import Summary, embed
from pretrain.embedding.options import Options
from pretrain.embedding.parquet import to_numpy
from pretrain.embedding.teachers import build_readers, find_teachers, prepare
from pretrain.errors import ConfigError, UserError
from pretrain.evaluation.evaluate import EvalConfig, evaluate, evaluate_checkpoint
from pretrain.evaluation.retrieval import retrieval_metrics
from pretrain.train import build, load_config
from tests.support import Small, read_jsonl, read_losses, run_clipfuse
from tests.support.sounds import AUDIO, write_shard

LEFT_OUT = [{"jpg"}, {"flac"}, {"txt"}, {"txt", "flac"}]
"""Of every fifth sample from the first, the second, ...; the fifth has all. A sample with an image alone has no pair."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.tar of 40 samples, eight of which have an image alone."""
    root = tmp_path_factory.mktemp("incomplete")
    write_shard(root / "whole.tar", 40)
    with tarfile.open(root / "whole.tar") as whole, tarfile.open(root / "train.tar", "w") as tar:
        keys: list[str] = []
        for info in whole:
            key, extension = info.name.split(".", 1)
            keys += [key] if key not in keys else []
            left_out = [*LEFT_OUT, set()][(len(keys) - 1) % 5]
            if extension not in {"jpeg" if "jpg" in left_out else "", "png" if "jpg" in left_out else "", *left_out}:
                tar.addfile(info, whole.extractfile(info))
    return root


def settings(small: Small, run: str, *more: str, audio: bool = True) -> list[str]:
    fixed = ["data.train=train.tar", "data.batch_size=8", "data.max_bad_rate=1", "train.audit=true", *(AUDIO if audio else [])]
    return small.settings(run, *fixed, "train.steps=4", "train.save_every=2", *more)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_two_processes_learn_from_them_is_what_one_does(folder: Path, small: Small) -> None:
    keep = ["data.incomplete=keep", "model.projection=mlp"]  # with biases, which all processes learn as one does
    run_clipfuse("pretrain", "scenes", *settings(small, "one", *keep), cwd=folder)
    losses = read_losses(folder / "runs/one")
    lines = [line for line in read_jsonl(folder / "runs/one/metrics.jsonl") if "loss" in line]
    assert {"image_to_text_accuracy", "image_to_audio_accuracy", "text_to_audio_accuracy"} <= lines[0].keys()
    replaced = [line for line in read_jsonl(folder / "runs/one/metrics.jsonl") if "bad_samples" in line]
    assert replaced, lines[-1].keys()
    more = [*keep, "train.strategy=ddp", "train.chunks=2"]
    run_clipfuse("pretrain", "scenes", "--nproc", "2", *settings(small, "two", *more), cwd=folder)
    assert list(read_losses(folder / "runs/two").values()) == pytest.approx(list(losses.values()), rel=1e-4)
    again = [*keep, "resume=runs/one/checkpoints/step-0000002", "data.workers=2"]
    run_clipfuse("pretrain", "scenes", *settings(small, "rest", *again), cwd=folder)
    assert read_losses(folder / "runs/rest") == {step: loss for step, loss in losses.items() if step > 2}


def test_which_samples_have_what(folder: Path, small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 samples eight each lack an image, a sound, a caption and nothing; those with an image alone are replaced."""
    monkeypatch.chdir(folder)
    config = load_config(find_config("scenes", "pretrain"), settings(small, "x", "data.incomplete=keep"))
    batch = build(config).loader.first_samples(32)
    present = batch.targets["present"]
    rows = list(zip(*(present[name].tolist() for name in ("image", "text", "audio")), strict=True))
    assert all(sum(row) >= 2 for row in rows)
    for i, key in enumerate(batch.keys):
        kind = int(key.rpartition("/")[2].strip("abcdefghijklmnopqrstuvwxyz-") or 0) % 5
        expected = {0: (False, True, True), 1: (True, True, False), 2: (True, False, True), 4: (True, True, True)}
        assert rows[i] == expected[kind], key
    assert not batch.inputs["image"][~present["image"]].any()
    assert not batch.inputs["audio"][~present["audio"]].any()
    assert batch.inputs["audio"][present["audio"]].any(dim=1).all()


def test_without_the_setting_they_are_bad_samples(folder: Path, small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    config = load_config(find_config("scenes", "pretrain"), settings(small, "x"))
    batch = build(config).loader.first_samples(8)
    assert "present" not in batch.targets


@pytest.mark.parametrize(
    ("setting", "audio", "message"),
    [
        ("keep", False, r"data\.incomplete=keep is for three towers or more: a sample without image or text has no pair"),
        ("keep loss.exchange=ring", True, r"data\.incomplete=keep goes neither"),
        ("yes", True, r"data\.incomplete.*bad"),
    ],
)
def test_what_cannot_be_is_refused(
    folder: Path, small: Small, monkeypatch: pytest.MonkeyPatch, setting: str, audio: bool, message: str
) -> None:
    monkeypatch.chdir(folder)
    words = settings(small, "x", *f"data.incomplete={setting}".split(), audio=audio)
    with pytest.raises(ConfigError, match=message):
        build(load_config(find_config("scenes", "pretrain"), words))


class Seen(NamedTuple):
    """A run with data.incomplete=keep, and the samples of train.tar."""

    run: Path
    loaded: LoadedModel
    samples: dict[str, dict[str, bytes]]
    """By key, the content of each member."""

    def encode(self, name: str, contents: list[bytes]) -> torch.Tensor:
        """Encode members of a modality (n, D), each by the tower and the decoder alone."""
        decoder = self.loaded.decoders[name]
        with torch.no_grad():
            if name == "text":
                ids, mask = decoder.encode([content.decode() for content in contents])
                return self.loaded.model.encode("text", ids, mask)
            return self.loaded.model.encode(name, torch.stack([decoder.decode_eval(content) for content in contents]))


EXTENSIONS = {"image": "jpg", "text": "txt", "audio": "flac"}


@pytest.fixture(scope="module")
def seen(folder: Path, small: Small) -> Seen:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = settings(small, "seen", "data.incomplete=keep", "train.steps=2")
        assert cli.main(["pretrain", "scenes", *words]) == 0
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(folder / "train.tar") as tar:
        for info in tar:
            key, extension = info.name.split(".", 1)
            samples.setdefault(key, {})[extension] = cast(IO[bytes], tar.extractfile(info)).read()
    return Seen(folder / "runs/seen", load_model(folder / "runs/seen"), samples)


def test_each_pair_is_evaluated_on_the_samples_that_have_both(
    folder: Path, seen: Seen, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures are those of shards with these samples alone, encoded by the towers of the pair."""
    assert cli.main(["evaluate", str(seen.run), "--data", str(folder / "train.tar"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    metrics = result["metrics"]
    assert (metrics["samples"], metrics["captions"], metrics["bad_samples"]) == (32, 24, 8)
    for first, second in (("image", "text"), ("image", "audio"), ("audio", "text")):
        both = [s for s in seen.samples.values() if EXTENSIONS[first] in s and EXTENSIONS[second] in s]
        assert len(both) == metrics[f"samples_{first}_{second}"]
        encoded = [seen.encode(name, [s[EXTENSIONS[name]] for s in both]) for name in (first, second)]
        expected = retrieval_metrics(*encoded, torch.arange(len(both)), names=(first, second))
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value), name
            if "R@1" in name:
                assert result["chance"][name] == pytest.approx(int(name[-2:].strip("@")) / len(both))


class Bare:
    """A decoder of sounds as a user may write it, without an item for samples that have none."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder

    def __call__(self, sample: Any, rng: Any, train: bool) -> Any:
        return self.decoder(sample, rng, train)

    def collate(self, items: list[Any]) -> Any:
        return self.decoder.collate(items)


def test_a_decoder_without_blanks_is_evaluated_on_whole_samples(
    folder: Path, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    parts = build(load_config(find_config("scenes", "pretrain"), settings(small, "x")))
    decoders = {**parts.eval_decoders, "audio": Bare(parts.eval_decoders["audio"])}
    metrics = evaluate(parts.model, decoders, "train.tar", EvalConfig(workers=0), torch.device("cpu"))
    assert (metrics["samples"], metrics["bad_samples"]) == (8, 32)


# ---------------------------------------------------------------------------------------------------------------------
# Embedding folders


def embed_samples(folder: Path, seen: Seen, out: Path, **more: Any) -> Summary:
    fixed = {"data": [str(folder / "train.tar")], "out": str(out), "dtype": "float32", "batch_size": 7, "workers": 0}
    summary = embed(load_model(seen.run), Options(**{**fixed, **more}), torch.device("cpu"))
    assert summary is not None
    return summary


def read_table(out: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(out.glob("*.parquet"))])


def test_what_samples_have_is_embedded_and_the_rest_is_null(folder: Path, seen: Seen, tmp_path: Path) -> None:
    summary = embed_samples(folder, seen, tmp_path / "one", per_file=16)
    assert (summary.samples, summary.left_out, summary.missing) == (40, {}, {"image": 8, "text": 16, "audio": 16})
    assert "40 samples in 3 files, 8 without image, 16 without text, 16 without audio;" in str(summary)
    assert json.loads((tmp_path / "one/_manifest.json").read_text())["missing"] == summary.missing
    table = read_table(tmp_path / "one")
    assert table.schema.field("image").type == pa.list_(pa.float32(), 16)
    for row, (key, members) in zip(table.to_pylist(), seen.samples.items(), strict=True):
        assert row["key"] == f"train/{key}"
        assert row["caption"] == (members["txt"].decode() if "txt" in members else None)
        assert json.loads(row["json"]) == json.loads(members["json"])
        for name, extension in EXTENSIONS.items():
            if extension in members:
                np.testing.assert_allclose(row[name], seen.encode(name, [members[extension]])[0], atol=1e-6)
            else:
                assert row[name] is None
    words = ["--out", tmp_path / "two", "--dtype", "float32", "--batch-size", "7", "--per-file", "9", "--workers", "0"]
    printed = run_clipfuse("embed", seen.run, "--data", folder / "train.tar", *words, "--nproc", "2", cwd=tmp_path).stdout
    assert "40 samples in 5 files, 8 without image, 16 without text, 16 without audio" in printed
    other = read_table(tmp_path / "two")
    for name in ("key", "caption", "json"):
        assert other[name] == table[name]
    for name in EXTENSIONS:
        assert other[name].is_null() == table[name].is_null()
        values = [column[name].combine_chunks().flatten().to_numpy() for column in (other, table)]
        np.testing.assert_allclose(*values, atol=1e-6)
    embed_samples(folder, seen, tmp_path / "sounds", only="audio")
    assert read_table(tmp_path / "sounds")["audio"].null_count == 0  # one modality alone: what lacks it has no row
    assert len(read_table(tmp_path / "sounds")) == 24


def test_who_reads_such_a_folder_passes_over_what_is_null(folder: Path, seen: Seen, tmp_path: Path) -> None:
    """Evaluation, teachers, and curation; captions as lists, too."""
    shards = str(folder / "train.tar")
    embed_samples(folder, seen, tmp_path / "one", per_file=16)
    embed_samples(folder, seen, tmp_path / "lists", caption="txt:lines")
    rows = read_table(tmp_path / "lists").to_pylist()
    assert [row["captions"] for row in rows] == [
        [members["txt"].decode()] if "txt" in members else None for members in seen.samples.values()
    ]
    assert all((row["text"] is None) == (row["captions"] is None) for row in rows)
    config = EvalConfig(workers=0, batch_size=7)
    of_shards = evaluate_checkpoint(load_model(seen.run), shards, config, torch.device("cpu"))["metrics"]
    for name in ("one", "lists"):
        of_files = evaluate_checkpoint(load_model(seen.run), str(tmp_path / name), config, torch.device("cpu"))["metrics"]
        assert of_files == pytest.approx({**of_shards, "bad_samples": 0})

        teachers = find_teachers(str(tmp_path / name))
        prepare(teachers)
        reader, keys = build_readers(teachers)[0], [f"train/{key}" for key in seen.samples]
        vectors, is_there = reader.look_up("image", [digest(key) for key in keys])
        assert is_there.tolist() == ["jpg" in members for members in seen.samples.values()]
        expected = seen.encode("image", [members["jpg"] for members in seen.samples.values() if "jpg" in members])
        torch.testing.assert_close(vectors[is_there], expected, atol=1e-6, rtol=0)
        texts = [members.get("txt", b"").decode() for members in seen.samples.values()]
        digests = [digest(key, caption_id(text)) for key, text in zip(keys, texts, strict=True)]
        vectors, is_there = reader.look_up("text", digests)
        assert is_there.tolist() == [bool(text) for text in texts]
        expected = seen.encode("text", [text.encode() for text in texts if text])
        torch.testing.assert_close(vectors[is_there], expected, atol=1e-6, rtol=0)

        source = EmbeddingSource([str(tmp_path / name)], "--embeddings", True)
        source.write(np.array([digest(key) for key in keys], dtype=np.uint64), tmp_path / f"{name}-aligned", lambda *_: None)
        aligned = load_aligned(tmp_path / f"{name}-aligned")
        assert aligned.has_vector.tolist() == ["jpg" in members for members in seen.samples.values()]
        both = ["jpg" in members and "txt" in members for members in seen.samples.values()]
        assert (~np.isnan(aligned.similarity)).tolist() == both
        pairs = [members for members in seen.samples.values() if "jpg" in members and "txt" in members]
        image, text = (seen.encode(name, [members[EXTENSIONS[name]] for members in pairs]) for name in ("image", "text"))
        np.testing.assert_allclose(aligned.similarity[both], (image * text).sum(dim=1), atol=1e-6)
    with pytest.raises(UserError, match="8 of 40 samples have no such embedding"):
        to_numpy(read_table(tmp_path / "one")["image"])


def test_a_folder_that_was_begun_without_such_samples_is_not_continued_with_them(
    folder: Path, seen: Seen, tmp_path: Path
) -> None:
    embed_samples(folder, seen, tmp_path / "out", per_file=16)
    path = tmp_path / "out/_manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]["incomplete"]  # as versions wrote it that left such samples out
    path.write_text(json.dumps({**manifest, "complete": False}))
    with pytest.raises(UserError, match="was begun with incomplete left at its default, now it is keep; choose another --out"):
        embed_samples(folder, seen, tmp_path / "out")
