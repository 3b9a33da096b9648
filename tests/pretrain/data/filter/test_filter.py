"""clipfuse data filter: each rule against plain Python, shards and lists, kills, and bad input."""

from __future__ import annotations

import io
import json
import signal
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch import cli
from pretrain.data.filter import filter_shards
from pretrain.data.filter.options import FilterOptions
from pretrain.data.sample_filter import SampleFilter
from pretrain.data.shards.counts import find_record
from pretrain.data.shards.paths import count_samples, expand_shards
from pretrain.data.shards.reader import ShardReader
from tests.support import environment, forked
from tests.support.packed import make_image, read_shards

WIDTH = 24
IMAGE = make_image(0)
CAPTIONS = [
    "a red car",
    "car",
    "123 456",
    "see https://example.com",
    "a very long caption of a car that goes on",
    "sunset",
    "Sunset ",
]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def make_shards(folder: Path, shards: int = 5, samples: int = 40, prefix: str = "t") -> dict[str, dict[str, Any]]:
    """Write shards; return "shard/KEY" -> caption, width and members."""
    rng = np.random.default_rng(len(prefix) + shards)
    folder.mkdir(exist_ok=True)
    content: dict[str, dict[str, Any]] = {}
    for shard in range(shards):
        members = []
        for i in range(samples):
            caption = CAPTIONS[rng.integers(len(CAPTIONS))] if rng.random() < 0.5 else f"picture {shard} {i} of a thing"
            values = {"width": int(rng.integers(100, 400))}
            sample = {"jpg": IMAGE + bytes([shard, i]), "txt": caption.encode(), "json": json.dumps(values).encode()}
            members += [(f"{i:04}.{extension}", data) for extension, data in sample.items()]
            content[f"{prefix}-{shard}/{i:04}"] = {"caption": caption, "members": sample, **values}
        write_tar(folder / f"{prefix}-{shard}.tar", members)
    return content


def make_embeddings(
    folder: Path, keys: list[str], seed: int = 0, texts: int = 1, width: int = WIDTH, **more: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Write an embedding folder with near-duplicates; return image embeddings, and cosines with the best caption."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((len(keys), width))
    copies = rng.permutation(len(keys))[: len(keys) // 2]
    for k in range(1, len(copies)):  # chains of 10
        if k % 10:
            images[copies[k]] = images[copies[k - 1]] + 0.2 * rng.standard_normal(width)
    text = images[:, None] + 2 * rng.standard_normal((len(keys), texts, width))
    images, text = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (images, text))
    columns: dict[str, Any] = {"key": pa.array(keys), "image": to_column(images)}
    flat, places = to_column(text.reshape(-1, width)), pa.array(np.arange(len(keys) + 1) * texts, pa.int32())
    columns["text"] = flat if texts == 1 else pa.ListArray.from_arrays(places, flat)
    names = pa.array(["x"] * len(keys) * texts)
    columns["caption" if texts == 1 else "captions"] = names if texts == 1 else pa.ListArray.from_arrays(places, names)
    for name in more.get("without", ()):
        del columns[name]
    table = pa.table(columns)
    if "model" in more:
        table = table.replace_schema_metadata({"clipfuse": json.dumps({"model": more["model"]})})
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / "0.parquet")
    return images, np.einsum("bd,btd->bt", images, text).max(axis=1)


def to_column(rows: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.astype(np.float32).ravel()), rows.shape[1])


def run(*words: object, code: int = 0) -> None:
    workers = [] if "--workers" in words else ["--workers", "1"]
    assert cli.main(["data", "filter", *map(str, words), *workers]) == code


def report(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "report.json").read_text())
    return values


@pytest.fixture
def data(tmp_path: Path) -> dict[str, dict[str, Any]]:
    return make_shards(tmp_path / "in")


def test_shards_hold_the_same_bytes_under_the_same_keys(tmp_path: Path, data: dict[str, dict[str, Any]]) -> None:
    out = tmp_path / "out"
    run(tmp_path / "in", out, "--keep", "json.width >= 250", "--workers", 2)
    kept = read_shards(out, "t")
    assert kept == {key: sample["members"] for key, sample in data.items() if sample["width"] >= 250}
    paths = expand_shards(str(out))
    counts = Counter(key.partition("/")[0] for key in kept)
    for path in paths:  # the file beside each shard, without opening it
        record = find_record(path)
        assert record.samples == counts[Path(path).stem]
    assert not list(out.glob("*.idx"))
    assert count_samples(paths) == [counts[Path(path).stem] for path in paths]
    values = report(out)
    assert (values["samples"], values["kept"], values["shards"], values["kept_shards"]) == (len(data), len(kept), 5, 5)
    entry = values["removed"]["not json.width >= 250"]
    gone = [key for key, sample in data.items() if sample["width"] < 250]
    assert entry == {"count": len(gone), "share": len(gone) / len(data), "examples": gone[:3]}
    assert sorted(path.name for path in (out / ".filter").iterdir()) == ["selection.npz"]


RULES = {
    "--min-words 3": lambda sample: len(sample["caption"].split()) >= 3,
    "--max-words 5": lambda sample: len(sample["caption"].split()) <= 5,
    "--letters": lambda sample: any(character.isalpha() for character in sample["caption"]),
    "--no-odd": lambda sample: "https" not in sample["caption"],
}


@pytest.mark.parametrize("rule", RULES)
def test_rules_of_captions(tmp_path: Path, data: dict[str, dict[str, Any]], rule: str) -> None:
    run(tmp_path / "in", tmp_path / "out", *rule.split())
    assert set(read_shards(tmp_path / "out", "t")) == {key for key, sample in data.items() if RULES[rule](sample)}


def test_repeated_captions_go_with_all_their_samples(tmp_path: Path, data: dict[str, dict[str, Any]]) -> None:
    counts = Counter(sample["caption"].strip().casefold() for sample in data.values())
    most = sorted(counts.values())[-3]
    run(tmp_path / "in", tmp_path / "out", "--max-repeats", most)
    assert set(read_shards(tmp_path / "out", "t")) == {
        key for key, sample in data.items() if counts[sample["caption"].strip().casefold()] <= most
    }


def test_a_sample_with_several_captions_goes_where_none_passes(tmp_path: Path) -> None:
    captions = [["a b c", "x"], ["x", "x"], ["y", "x"], ["x", "d e f"], ["x"], ["z"]]  # x: in five samples
    (tmp_path / "in").mkdir()
    write_tar(
        tmp_path / "in" / "s-0.tar",
        [(f"{i}.{e}", d) for i, c in enumerate(captions) for e, d in (("jpg", IMAGE), ("json", json.dumps({"c": c}).encode()))],
    )
    run(tmp_path / "in", tmp_path / "a", "--caption", "c", "--min-words", 2)
    assert list(read_shards(tmp_path / "a", "s")) == ["s-0/0", "s-0/3"]
    run(tmp_path / "in", tmp_path / "b", "--caption", "c", "--max-repeats", 4)
    assert list(read_shards(tmp_path / "b", "s")) == ["s-0/0", "s-0/2", "s-0/3", "s-0/5"]


def test_lists(tmp_path: Path, data: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    keys = list(data)
    (tmp_path / "list.txt").write_text("".join(f"{key}\tsome reason\n" for key in [*keys[3:50], "x/1"]))
    run(tmp_path / "in", tmp_path / "skip", "--skip", tmp_path / "list.txt")
    assert list(read_shards(tmp_path / "skip", "t")) == keys[:3] + keys[50:]
    run(tmp_path / "in", tmp_path / "keep", "--keep-list", tmp_path / "list.txt")
    assert list(read_shards(tmp_path / "keep", "t")) == keys[3:50]
    assert report(tmp_path / "keep")["kept_shards"] == 2
    assert report(tmp_path / "skip")["facts"]["lists"] == {"--skip": {"lines": 48, "samples": 47}}
    assert report(tmp_path / "keep")["facts"]["lists"] == {"--keep-list": {"lines": 48, "samples": 47}}
    assert "--keep-list: 48 lines, 47 samples named" in capsys.readouterr().out
    assert not (tmp_path / "keep" / "t-4.tar").exists()  # nothing of it stays


def test_the_list_leaves_training_the_samples_that_the_shards_hold(tmp_path: Path, data: dict[str, dict[str, Any]]) -> None:
    make_embeddings(tmp_path / "emb", list(data))
    rules = ["--embeddings", tmp_path / "emb", "--duplicates", 0.9, "--min-words", 2]
    run(tmp_path / "in", tmp_path / "shards", *rules)
    run(tmp_path / "in", tmp_path / "list", *rules, "--list")
    assert not list((tmp_path / "list").glob("*.tar"))
    reader = ShardReader(expand_shards(str(tmp_path / "in")))
    skip = SampleFilter(reader, None, str(tmp_path / "list" / "skip.txt"))
    kept = [reader.key(s, i) for s in range(5) for i in range(40) if not skip.find_reason(s, i)]
    reader.close()
    assert kept == list(read_shards(tmp_path / "shards", "t"))
    assert 0 < len(kept) < len(data)
    assert report(tmp_path / "list")["removed"] == report(tmp_path / "shards")["removed"]


@pytest.mark.parametrize("texts", [1, 3])
def test_similarity_and_near_duplicates(tmp_path: Path, data: dict[str, dict[str, Any]], texts: int) -> None:
    keys = list(data)
    images, cosines = make_embeddings(tmp_path / "emb", keys, texts=texts)
    least, share = float(np.quantile(cosines, 0.3)), 0.8
    rules = ["--similarity", least, "--keep-best", share, "--duplicates", 0.95]
    run(tmp_path / "in", tmp_path / "out", "--embeddings", tmp_path / "emb", *rules)
    left = [i for i in range(len(keys)) if cosines[i] >= least]
    ranked = sorted(left, key=lambda i: (-cosines[i], i))[: int(np.ceil(share * len(left)))]
    staying: list[int] = []
    for i in ranked:
        if not any(images[i] @ images[j] >= 0.95 for j in staying):
            staying.append(i)
    assert list(read_shards(tmp_path / "out", "t")) == [keys[i] for i in sorted(staying)]
    values = report(tmp_path / "out")
    assert {reason: entry["count"] for reason, entry in values["removed"].items()} == {
        f"similarity below {least:g}": len(keys) - len(left),
        "not among the best 80% by similarity": len(left) - len(ranked),
        "near-duplicate": len(ranked) - len(staying),
    }
    for example in values["removed"]["near-duplicate"]["examples"]:
        gone, keeper = example.removesuffix(")").split(" (of ")
        assert keys.index(keeper) in staying
        assert images[keys.index(gone)] @ images[keys.index(keeper)] >= 0.95
    assert values["facts"]["similarity"]["50%"] == pytest.approx(np.median(cosines), abs=1e-3)


def test_near_duplicates_of_held_out_samples_go(tmp_path: Path, data: dict[str, dict[str, Any]]) -> None:
    held_out = make_shards(tmp_path / "val", 2, 30, "v")
    keys = [*data, *held_out]
    images, _ = make_embeddings(tmp_path / "emb", keys, without=["text", "caption"])
    words = ["--embeddings", tmp_path / "emb", "--duplicates", 0.95, "--held-out", tmp_path / "val"]
    run(tmp_path / "in", tmp_path / "out", *words)
    staying = list(range(len(data), len(keys)))
    for i in range(len(data)):
        if not any(images[i] @ images[j] >= 0.95 for j in staying):
            staying.append(i)
    assert list(read_shards(tmp_path / "out", "t")) == [keys[i] for i in sorted(staying) if i < len(data)]
    near = (images[: len(data)] @ images[len(data) :].T >= 0.95).any(axis=1)
    values = report(tmp_path / "out")
    assert values["removed"]["near-duplicate of a held-out sample"]["count"] == near.sum() > 0
    assert "(of v-" in values["removed"]["near-duplicate of a held-out sample"]["examples"][0]


def test_held_out_shards_of_the_same_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `clipfuse data pack` numbers them: the keys tell the shards apart where both were embedded by one command."""
    data, held_out = make_shards(tmp_path / "in", 3), make_shards(tmp_path / "val", 1)
    words = ["--duplicates", 0.95, "--held-out", tmp_path / "val", "--embeddings"]
    make_embeddings(tmp_path / "apart", list(data))
    run(tmp_path / "in", tmp_path / "out", *words, tmp_path / "apart", code=1)
    assert "SHARDS and --held-out both have a shard t-0: embed them by one command" in capsys.readouterr().err
    joint = [f"in-{key}" if key.startswith("t-0/") else key for key in data] + [f"val-{key}" for key in held_out]
    images, _ = make_embeddings(tmp_path / "emb", joint)
    images[: len(data)] = images[: len(data)][::-1]
    images[0] = images[-1]
    table = pq.read_table(tmp_path / "emb" / "0.parquet").set_column(1, "image", to_column(images))
    pq.write_table(table, tmp_path / "emb" / "0.parquet")
    run(tmp_path / "in", tmp_path / "out", *words, tmp_path / "emb")
    staying = read_shards(tmp_path / "out", "t")
    near = (images[: len(data)] @ images[len(data) :].T >= 0.95).any(axis=1)
    assert near[0]
    assert not near.all()
    assert set(staying) <= {key for key, is_near in zip(data, near, strict=True) if not is_near}
    assert {key.partition("/")[0] for key in staying} == {"t-0", "t-1", "t-2"}
    assert not report(tmp_path / "out")["facts"]["embeddings"]["missing"]
    run(tmp_path / "in", tmp_path / "list", *words, tmp_path / "emb", "--list")
    listed = {line.partition("\t")[0] for line in (tmp_path / "list" / "skip.txt").read_text().splitlines()}
    assert listed == data.keys() - staying.keys()


def test_balance(tmp_path: Path, data: dict[str, dict[str, Any]]) -> None:
    keys = list(data)
    rng = np.random.default_rng(1)
    kinds = np.repeat(np.arange(4), [20, 30, 50, 100])
    images = np.eye(4, WIDTH)[kinds] + 0.05 * rng.standard_normal((200, WIDTH))
    (tmp_path / "emb").mkdir()
    pq.write_table(pa.table({"key": pa.array(keys), "image": to_column(images)}), tmp_path / "emb" / "0.parquet")
    words = ["--embeddings", tmp_path / "emb", "--clusters", 4, "--per-cluster", 25]
    run(tmp_path / "in", tmp_path / "out", *words)
    kept = Counter(kinds[keys.index(key)] for key in read_shards(tmp_path / "out", "t"))
    assert kept == {0: 20, 1: 25, 2: 25, 3: 25}
    run(tmp_path / "in", tmp_path / "soft", *words, "--temperature", 0.5)
    kept = Counter(kinds[keys.index(key)] for key in read_shards(tmp_path / "soft", "t"))
    assert kept == {0: 20, 1: 28, 2: 36, 3: 50}  # 25 (n / 25)^0.5, rounded up


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def test_killed_runs_go_on(tmp_path: Path) -> None:
    keys = list(make_shards(tmp_path / "in", 60, 4))
    make_embeddings(tmp_path / "emb", keys)
    words = ["data", "filter", str(tmp_path / "in"), str(tmp_path / "out"), "--embeddings", str(tmp_path / "emb")]
    words += ["--duplicates", "0.9", "--min-words", "2", "--workers", "1"]
    out = tmp_path / "out"
    for pattern in (".filter/scan/*.npz", "*.tar"):
        process = forked.Process("launch.cli", words, tmp_path, tmp_path / "o", tmp_path / "e", environment())
        deadline = time.monotonic() + 60
        while len(list(out.glob(pattern))) < 5 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL, (tmp_path / "e").read_text()
        assert 5 <= len(list(out.glob(pattern))) < 60
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*_stats.json")}
    assert not (out / "report.json").exists()
    assert cli.main(words) == 0
    assert finished == {path: path.stat().st_mtime_ns for path in finished}
    assert cli.main([word.replace("/out", "/whole") for word in words]) == 0
    for whole in (tmp_path / "whole").glob("t-*"):
        assert (out / whole.name).read_bytes() == whole.read_bytes(), whole.name
    assert report(out) == report(tmp_path / "whole") | {"out": str(out)}
    assert not list(out.rglob("*.partial"))
    (out / "t-7.tar").unlink()  # a finished folder is mended, too
    assert cli.main(words) == 0
    assert (out / "t-7.tar").read_bytes() == (tmp_path / "whole" / "t-7.tar").read_bytes()


def test_other_settings_on_the_same_folder_are_refused(
    tmp_path: Path, data: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    make_embeddings(tmp_path / "emb", list(data))
    make_embeddings(tmp_path / "other", list(data), seed=1)
    make_shards(tmp_path / "more", 2)
    source, out, emb = tmp_path / "in", tmp_path / "out", tmp_path / "emb"
    run(source, out, "--embeddings", emb, "--duplicates", 0.9)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    for words, message in (
        ((source, out, "--embeddings", emb, "--duplicates", 0.8), "--duplicates 0.9, now 0.8"),
        ((source, out, "--embeddings", tmp_path / "other", "--duplicates", 0.9), "other embeddings"),
        ((tmp_path / "more", out, "--embeddings", emb, "--duplicates", 0.9), "other shards"),
    ):
        run(*words, code=2)
        line = capsys.readouterr().err.strip()
        assert f"{out} was begun with other settings ({message}): give another folder, or remove it" in line
        assert "\n" not in line
    run(source, out, "--embeddings", emb, "--duplicates", 0.9)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_embeddings_that_do_not_fit(
    tmp_path: Path, data: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    keys = list(data)
    make_embeddings(tmp_path / "a", keys[:150], model="A")
    make_embeddings(tmp_path / "b", keys[150:], model="B")
    make_embeddings(tmp_path / "wide", keys, width=8)
    make_embeddings(tmp_path / "image", keys, without=["text", "caption"])
    make_embeddings(tmp_path / "foreign", [f"x/{key}" for key in keys])
    make_embeddings(tmp_path / "few", keys[:90])
    (tmp_path / "empty").mkdir()
    number = 0

    def refused(words: list[object], message: str, code: int) -> None:
        nonlocal number
        number += 1
        run(tmp_path / "in", tmp_path / f"out{number}", *words, code=code)
        line = capsys.readouterr().err.strip()
        assert message in line
        assert "\n" not in line

    duplicates = ["--duplicates", 0.9, "--embeddings"]
    refused([*duplicates, tmp_path / "a", tmp_path / "b"], "they hold embeddings of 2 models, not of one", 2)
    refused([*duplicates, tmp_path / "a", tmp_path / "wide"], "have 8 numbers, those of", 2)
    refused([*duplicates, tmp_path / "none"], f"--embeddings {tmp_path / 'none'}: there is no such folder", 2)
    refused([*duplicates, tmp_path / "empty"], "holds no embeddings", 2)
    refused(["--similarity", 0.1, "--embeddings", tmp_path / "image"], "holds embeddings of image only, none of text", 2)
    refused([*duplicates, tmp_path / "foreign"], "no sample has an embedding there, so they are of other shards", 1)
    refused([*duplicates, tmp_path / "few"], "110 of 200 samples have none there", 1)
    refused(["--similarity", 0.1], "need --embeddings", 2)
    refused(
        ["--similarity", 0.999, "--embeddings", tmp_path / "few", "--missing", "drop"], "no sample is left of 200: 110 go by", 1
    )
    (tmp_path / "a" / "0.parquet").write_bytes(b"PAR1 damaged PAR1")
    refused([*duplicates, tmp_path / "a"], "0.parquet cannot be read", 2)


def test_samples_without_an_embedding_go_or_stay(
    tmp_path: Path, data: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    keys = list(data)
    _, cosines = make_embeddings(tmp_path / "emb", keys[20:])
    words = ["--embeddings", tmp_path / "emb", "--similarity", 0.3]
    passing = [key for key, cosine in zip(keys[20:], cosines, strict=True) if cosine >= 0.3]
    run(tmp_path / "in", tmp_path / "drop", *words)
    assert "20 of 200 samples without an embedding: they go" in capsys.readouterr().out
    assert list(read_shards(tmp_path / "drop", "t")) == passing
    run(tmp_path / "in", tmp_path / "keep", *words, "--missing", "keep")
    assert "they stay, and no rule of embeddings applies to them" in capsys.readouterr().out
    assert list(read_shards(tmp_path / "keep", "t")) == keys[:20] + passing


def test_settings_and_folders_that_cannot_be(
    tmp_path: Path, data: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    source, out = tmp_path / "in", tmp_path / "out"
    for words, message, code in (
        ((source, out), "no rule is given", 2),
        ((source, out, "--min-words", 5, "--max-words", 3), "--min-words 5 is more than --max-words 3", 2),
        ((source, out, "--clusters", 5), "--clusters and --per-cluster go together", 2),
        ((source, out, "--letters", "--temperature", 0.5), "--temperature goes with --clusters", 2),
        ((source, out, "--letters", "--held-out", source), "--held-out goes with --duplicates", 2),
        ((source, out, "--keep", "width > 3"), "--keep 'width > 3': fields of a sample's json are written json.NAME", 2),
        ((source, out, "--skip", tmp_path / "none"), f"--skip {tmp_path / 'none'} cannot be read", 2),
        ((source, source, "--letters"), "holds the shards that are read", 2),
        ((source, tmp_path / "full", "--letters"), "holds other files (notes.txt): give a folder of its own", 2),
        ((source, out, "--min-words", 50), "no sample is left of 200: ", 1),
    ):
        run(*words, code=code)
        line = capsys.readouterr().err.strip()
        assert message in line
        assert "\n" not in line
    assert sorted(path.name for path in source.iterdir() if path.suffix == ".tar") == [f"t-{i}.tar" for i in range(5)]
    run(source, out, "--min-words", 2)  # after a setting that left nothing, the folder is free


def test_bad_samples_go_by_their_reason(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    good = [(f"{i}.{e}", d) for i in range(3) for e, d in (("jpg", IMAGE), ("txt", b"a red car"))]
    bad = [("x.jpg", IMAGE), ("y.jpg", IMAGE), ("y.txt", b"\xff\xfe"), ("1.jpg", IMAGE), ("1.txt", b"twice")]
    write_tar(tmp_path / "in" / "s-0.tar", good + bad)
    run(tmp_path / "in", tmp_path / "out", "--letters")
    assert list(read_shards(tmp_path / "out", "s")) == ["s-0/0", "s-0/1", "s-0/2"]
    removed = {reason: entry["examples"] for reason, entry in report(tmp_path / "out")["removed"].items()}
    assert removed == {"no caption": ["s-0/x"], "caption not UTF-8": ["s-0/y"], "duplicate key": ["s-0/1"]}
    run(tmp_path / "in", tmp_path / "list", "--letters", "--list")
    lines = (tmp_path / "list" / "skip.txt").read_text().splitlines()
    assert lines == ["s-0/x\tno caption", "s-0/y\tcaption not UTF-8", "s-0/1\tduplicate key"]


def test_a_full_disk_is_said_in_one_line_and_the_same_command_goes_on(tmp_path: Path, data: dict[str, dict[str, Any]]) -> None:
    words = ["data", "filter", str(tmp_path / "in"), str(tmp_path / "out"), "--letters", "--workers", "1"]
    result = forked.run("tests.support.full_disk", ["30000", *words], tmp_path, 60)
    assert result.returncode == 1
    assert "the same command goes on" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert not list((tmp_path / "out").glob("*.tar"))
    assert cli.main(words) == 0


def test_shards_of_the_same_name_keep_the_names_that_their_keys_have(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        make_shards(tmp_path / folder, 1, 5)
    paths = expand_shards([str(tmp_path / "a"), str(tmp_path / "b")], "SHARDS")
    result = filter_shards(paths, tmp_path / "out", FilterOptions(letters=True), workers=1)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["a-t-0.tar", "b-t-0.tar"]
    assert result.kept == sum(count_samples(expand_shards(str(tmp_path / "out"))))
