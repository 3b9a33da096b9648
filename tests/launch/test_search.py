"""clipfuse index and search on drawn scenes, every step held against the model's own embeddings and a full sort."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import clipfuse
import numpy as np
import pytest
from PIL import Image

from finetune.search import places
from launch import cli
from tests.support import Small, environment

QUIET = ["data.workers=0", "eval.workers=0", "train.trackers=[]", "train.threads=1", "train.steps=2", "train.epochs=0"]


@pytest.fixture(scope="module")
def folder(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/first and another run, a retrieval run, products/ (24 images with json), products.tar, and `catalog`."""
    root = tmp_path_factory.mktemp("search")
    with contextlib.chdir(root):
        assert cli.main(["pretrain", "scenes", *small.settings("first", "train.steps=2")]) == 0
        assert cli.main(["pretrain", "scenes", *small.settings("other", "train.steps=1")]) == 0
        shards = [f"data.train={small.train}", "data.val=null", "train.eval_every=0", "data.batch_size=8"]
        assert cli.main(["finetune", "retrieval", "init=runs/first", "run=retrieval", *shards, *QUIET, "task.foils=null"]) == 0
        make_products(small, Path("products"))
        with tarfile.open("products.tar", "w") as tar:
            for path in sorted(Path("products").rglob("*.*")):
                tar.add(path, path.name)
        assert cli.main(index_words("products.tar", "catalog")) == 0
    return root


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def make_products(small: Small, folder: Path) -> None:
    """24 validation scenes as files; price and room in json, missing in every fifth."""
    folder.mkdir()
    with tarfile.open(next(small.root.glob("scenes/val-*.tar"))) as tar:
        jpegs = [name for name in tar.getnames() if name.endswith(".jpg")][:24]
        for i, name in enumerate(jpegs):
            for extension in ("jpg", "txt"):
                file = tar.extractfile(name.replace(".jpg", f".{extension}"))
                assert file is not None
                (folder / f"p{i:02d}.{extension}").write_bytes(file.read())
            values = {} if i % 5 == 0 else {"price": 100.0 * i, "room": ["living", "bed", "o\"b'c"][i % 3]}
            (folder / f"p{i:02d}.json").write_text(json.dumps(values))


def index_words(data: str, place: str, *more: str) -> list[str]:
    return ["index", "runs/first", "--data", data, "--db", place, "--fields", "price:float,room:str", *more]


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """Run a command; return what it printed, to stderr where it must fail."""
    capsys.readouterr()
    assert cli.main(list(words)) == code
    out = capsys.readouterr()
    return out.out if code == 0 else out.err


def search(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = json.loads(run(capsys, "search", *words, "--json"))["results"]
    return results


def own_scores(texts: list[str], numbers: range = range(24)) -> np.ndarray:
    """Cosines (texts, images) of the model by itself."""
    model = clipfuse.load("runs/first")
    images = model.encode_images([f"products/p{i:02d}.jpg" for i in numbers])
    return model.encode_texts(texts) @ images.T


def test_results_are_in_the_order_of_cosines(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = own_scores(["a red car"])[0]
    results = search(capsys, "catalog", "a red car", "--k", "100")
    assert [result["key"] for result in results] == [f"products/p{i:02d}" for i in np.argsort(-scores)]
    np.testing.assert_allclose([result["score"] for result in results], np.sort(scores)[::-1], atol=2e-6)
    first = results[0]
    assert first["caption"] == Path(f"{first['key']}.txt").read_text().strip()
    with open(first["source"], "rb") as file:  # where the image lies
        file.seek(first["offset"])
        assert file.read(first["size"]) == Path(f"{first['key']}.jpg").read_bytes()

    cheap = search(capsys, "catalog", "a red car", "--filter", 'price < 900 and room == "living"')
    expected = [i for i in np.argsort(-scores) if i % 5 and i < 9 and i % 3 == 0]
    assert [result["key"] for result in cheap] == [f"products/p{i:02d}" for i in expected]
    assert search(capsys, "catalog", "a red car", "--filter", "not exists price and price > 1") == []
    printed = run(capsys, "search", "catalog", "a red car", "--k", "2")
    assert "products/p" in printed
    assert "encode " in printed
    assert "search " in printed


def test_images_and_unwanted_words_in_queries(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = clipfuse.load("runs/first")
    images = model.encode_images([f"products/p{i:02d}.jpg" for i in range(24)])
    wanted, unwanted = model.encode_texts(["a red car", "a dog"])
    for words, query in (
        (["--image", "products/p07.jpg"], images[7]),
        (["a red car", "--image", "products/p07.jpg"], (images[7] + wanted) / 2),
        (["a red car", "--not", "a dog"], wanted - unwanted / 2),
    ):
        cosines = images @ (query / np.linalg.norm(query))
        results = search(capsys, "catalog", *words, "--k", "5")
        np.testing.assert_allclose([result["score"] for result in results], np.sort(cosines)[::-1][:5], atol=2e-6)
        assert [result["key"] for result in results] == [f"products/p{i:02d}" for i in np.argsort(-cosines)[:5]]


def test_the_reranker_orders_the_candidates_as_predict_does(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = search(capsys, "catalog", "a red car", "--k", "10")
    record = json.loads(
        run(
            capsys,
            "search",
            "catalog",
            "a red car",
            "--rerank",
            "runs/retrieval",
            "--candidates",
            "6",
            "--json",
            "--log",
            "log.jsonl",
        )
    )
    reranker = clipfuse.load("runs/retrieval")
    assert isinstance(reranker, clipfuse.FinetunedModel)
    scores = {result["key"]: reranker.predict(f"{result['key']}.jpg", "a red car")[0][0][1] for result in plain[:6]}
    best = sorted(scores, key=lambda key: -scores[key])
    assert [result["key"] for result in record["results"]] == best + [result["key"] for result in plain[6:]]
    np.testing.assert_allclose([result["match"] for result in record["results"][:6]], [scores[key] for key in best], atol=1e-4)
    assert [result["match"] for result in record["results"][6:]] == [None] * 4
    assert record["milliseconds"].keys() == {"encode", "search", "rerank"}
    assert json.loads(Path("log.jsonl").read_text()) == record


def test_every_kind_of_data_and_of_place(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = [result["score"] for result in search(capsys, "catalog", "a red car", "--k", "24")]
    run(capsys, "embed", "runs/first", "--data", "products.tar", "--out", "embeddings", "--workers", "0")
    tokens = [
        ("products", "files", "products/p00.jpg"),
        ("products.tar", "lite.db", "products/p00"),
        ("embeddings", "embedded", "products/p00"),
    ]
    for data, place, key in tokens:
        more = ["--images", "products.tar"] if data == "embeddings" else []
        assert "24 added" in run(capsys, *index_words(data, place, *more))
        results = search(capsys, place, "a red car", "--k", "24")
        np.testing.assert_allclose([result["score"] for result in results], expected, atol=1e-3)  # embed writes float16
        with places.open_index(place) as opened:
            image = opened.get([key])[0]
            assert opened.count("price < 900") == 7
            assert opened.describe().model["step"] == 2
        assert image is not None
        thumbnail = Image.open(io.BytesIO(image.thumbnail))
        assert thumbnail.format == "JPEG"
        assert max(thumbnail.size) <= 160
        content = Image.open("products/p00.jpg").convert("RGB").resize(thumbnail.size)
        assert np.abs(np.asarray(thumbnail, float) - np.asarray(content, float)).mean() < 8
        assert "nothing to do" in run(capsys, *index_words(data, place, *more))
    run(capsys, *index_words("embeddings", "without"))
    assert search(capsys, "without", "a red car")[0]["source"] == ""


def test_only_what_is_new_is_encoded(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("products", "growing/products")
    for name in ("p03.jpg", "p04.jpg"):
        Path("growing/products", name).rename(f"growing/{name}")
    assert "22 added" in run(capsys, *index_words("growing/products", "grown"))
    Path("growing/p03.jpg").rename("growing/products/p03.jpg")
    Path("growing/products/p99.jpg").write_bytes(b"no image")
    Image.new("RGB", (20, 20), "red").save("growing/products/p05.jpg")  # another size: encoded again
    printed = run(capsys, *index_words("growing/products", "grown"))
    assert "grown: 23 images" in printed
    assert "2 added" in printed
    assert "1 left out (image unreadable 1)" in printed
    refused = run(capsys, *index_words("products", "grown"), code=1)
    assert "--name NAME adds these images beside those, --replace replaces them" in refused
    assert "47 images" in run(capsys, *index_words("products", "grown", "--name", "new"))
    assert "24 added" in run(capsys, *index_words("products", "grown", "--replace"))


@pytest.mark.parametrize("place", ["killed", "killed.db"])
def test_the_same_command_goes_on_after_a_kill(here: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    words = index_words("products.tar", place, "--batch-size", "2")
    program = (
        "import os, sys\nfrom finetune.search import vector_index\nfrom launch import cli\n"
        "upsert, calls = vector_index.VectorIndex.upsert, []\n"
        "def count(self, *args):\n    calls.append(upsert(self, *args))\n    len(calls) == 4 and os.kill(os.getpid(), 9)\n"
        "vector_index.VectorIndex.upsert = count\ncli.main(sys.argv[1:])\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, *words], env=environment(), capture_output=True, check=False, timeout=240
    )
    assert killed.returncode == -signal.SIGKILL
    assert "16 added" in run(capsys, *words)
    results = search(capsys, place, "a red car", "--k", "24")
    assert [result["key"] for result in results] == [
        result["key"] for result in search(capsys, "catalog", "a red car", "--k", "24")
    ]


REFUSED = {
    "search nowhere car": "nowhere is no index; `clipfuse index RUN --data SHARDS --db nowhere` makes one",
    "search nowhere.db car": "nowhere.db is no index",
    "search catalog": "the query is empty: give a text, --image FILE, or both",
    "search catalog '  '": "the query is empty",
    "search catalog car --filter 'prise < 9'": "the index has no field 'prise'; did you mean 'price'?",
    "search catalog car --filter 'price <'": "column 8: a number, a text in quotes",
    "search catalog car --filter 'room == \"x'": "a text without its closing quote",
    "search catalog car --filter 'price < \"9\"'": "price is a number and cannot be compared with '9'",
    "search catalog car --image gone.jpg": "--image gone.jpg cannot be read: No such file or directory",
    "search catalog car --image products/p00.txt": "--image is not a usable image",
    "search catalog car --rerank runs/first": "runs/first",
    "search catalog car --rerank runs/gone": "no run or checkpoint at runs/gone",
    "search catalog --image products/p00.jpg --rerank runs/retrieval": "--rerank needs a text",
    "search catalog car --run runs/other": "catalog holds embeddings of",
    "search catalog car --not ''": "--not is empty",
    "search empty car": "empty is empty: `clipfuse index RUN --data SHARDS --db empty` adds images",
    "search http://127.0.0.1:9/x car": "http://127.0.0.1:9/x: Milvus says: Fail connecting to server",
    "search http://127.0.0.1:9/a-b car": "write http(s)://HOST:PORT/COLLECTION",
    "index runs/other --data products.tar --db catalog": "catalog holds embeddings of",
    "index runs/first --data products.tar --db catalog --fields size:int": "was made with the fields price:float,room:str",
    "index runs/first --data products.tar --db new --fields size": "--fields size: write NAME:KIND",
    "index runs/first --data products.tar --db products": "products exists and holds other files",
    "index runs/first --data nowhere --db new": "nowhere",
    "index runs/first --data embeddings0 --db new": "holds embeddings of",
    "index gone --data products.tar --db new": "no run or checkpoint at gone",
    "index runs/first --data products.tar --db no/such.db": "there is no folder no",
}


@pytest.fixture(scope="module")
def places_to_refuse(folder: Path) -> None:
    with contextlib.chdir(folder):
        with places.open_index("catalog") as opened:
            places.create_index("empty", opened.describe()).close()
        assert cli.main(["embed", "runs/other", "--data", "products.tar", "--out", "embeddings0", "--workers", "0"]) == 0


@pytest.mark.usefixtures("places_to_refuse")
def test_refused_in_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    for command, message in REFUSED.items():
        capsys.readouterr()
        code = cli.main(shlex.split(command))
        err = capsys.readouterr().err
        assert code in (1, 2), command
        assert message in err, command
        assert err.count("\n") == 1, err


def test_a_folder_of_milvus_that_another_process_holds(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, *index_words("products.tar", "held.db"))
    program = (
        "import time\nfrom finetune.search import places\nplaces.open_index('held.db')\n"
        "print('open', flush=True)\ntime.sleep(240)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], env=environment(), stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "open\n"
            refused = run(capsys, "search", "held.db", "car", code=1)
            assert "held.db is open in another process, and Milvus Lite allows one at a time (it locks held.db/LOCK)" in refused
        finally:
            holder.kill()
    assert len(search(capsys, "held.db", "car", "--k", "3")) == 3


def test_a_full_disk_loses_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files may grow to 20,000 bytes, as if the disk were full then."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limit[1]))
    try:
        refused = run(capsys, *index_words("products.tar", "full", "--batch-size", "2"), code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert "cannot write into full: File too large; what was there before stays, and the same command goes on" in refused
    with places.open_index("full") as opened:
        present = opened.count()
    assert 0 < present < 24
    assert f"{24 - present} added" in run(capsys, *index_words("products.tar", "full", "--batch-size", "2"))
    assert len(search(capsys, "full", "car", "--k", "24")) == 24


def test_a_query_longer_than_the_model_reads(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(run(capsys, "search", "catalog", "red car " * 2000, "--json"))
    assert len(record["results"]) == 10
    assert "and the model reads 24: what comes after them does not count" in record["notes"][0]
