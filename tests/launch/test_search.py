"""clipfuse index and search on drawn scenes, every step held against the model's own embeddings and a full sort."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clipfuse
import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from finetune import loading
from finetune.search import places
from finetune.search.captions import CaptionIndex
from finetune.search.query import Searcher, load_query_model
from launch import cli
from launch.serve.app import build_app
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
        (["--like", "products/p07"], images[7]),
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
    assert list(record["milliseconds"]) == ["encode", "search", "fetch", "rerank", "total"]
    assert json.loads(Path("log.jsonl").read_text()) == record


def check_same_scores(results: list[dict[str, Any]], expected: list[dict[str, Any]], atol: float) -> None:
    """The same images with the same scores, in the same order but for those whose scores hardly differ."""
    scores = {result["key"]: result["match"] for result in expected}
    assert len(set(np.round(list(scores.values()), 2))) > len(scores) / 2  # scores differ enough to compare orders
    assert {result["key"] for result in results} == scores.keys()
    np.testing.assert_allclose(
        [result["match"] for result in results], [scores[result["key"]] for result in results], atol=atol
    )
    for earlier, later in itertools.pairwise([scores[result["key"]] for result in results]):
        assert earlier > later - 2 * atol


def test_stored_token_features_order_as_images_do(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the images gone, so that nothing but the stored features can have been used."""
    rerank = ["--rerank", "runs/retrieval"]
    query = ["a red car", "--not", "a dog", *rerank, "--k", "24"]
    expected = search(capsys, "catalog", *query)
    shutil.copy("products.tar", "moved.tar")
    summary = run(capsys, *index_words("moved.tar", "kept.db", *rerank, "--batch-size", "7"))
    assert "token features of runs/retrieval/checkpoints" in summary
    assert "24 images, 24 added" in summary
    assert "MB in kept.db.tokens" in summary
    assert "24 images, 0 added" in run(capsys, *index_words("moved.tar", "kept.db", *rerank))
    Path("moved.tar").unlink()
    record = json.loads(run(capsys, "search", "kept.db", *query, "--json"))
    assert record["notes"] == []
    results = [{**result, "key": result["key"].replace("moved/", "products/")} for result in record["results"]]
    check_same_scores(results, expected, 5e-3)


def test_what_has_no_stored_features_is_encoded_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("products", "changing/products")
    rerank = ["--rerank", "runs/retrieval"]
    query = ["changing/db", "a red car", *rerank, "--k", "24"]
    words = index_words("changing/products", "changing/db")
    Path("changing/products/p23.jpg").rename("changing/p23.jpg")
    run(capsys, *words, *rerank)
    Path("changing/p23.jpg").rename("changing/products/p23.jpg")
    shutil.copy("products/p01.jpg", "changing/products/p02.jpg")
    assert "2 added" in run(capsys, *words)  # without --rerank: their features are not there, or forgotten
    record = json.loads(run(capsys, "search", *query, "--json"))
    assert record["notes"] == ["2 of 24 candidates have no token features in db.tokens, and were encoded again"]
    matches = {result["key"]: result["match"] for result in record["results"]}
    assert matches["products/p02.jpg"] == pytest.approx(matches["products/p01.jpg"], abs=5e-3)
    run(capsys, *words, "--replace")  # forgets all
    capsys.readouterr()
    images = search(capsys, *query)
    assert "24 images, 24 added" in run(capsys, *words, *rerank)
    check_same_scores(search(capsys, *query), images, 5e-3)

    refused = run(capsys, *words, *rerank, "--pool", "2", code=2)
    assert "db.tokens holds token features of runs/retrieval/checkpoints" in refused
    model = Path("changing/db.tokens/model.json")
    model.write_text(model.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    capsys.readouterr()
    assert cli.main(["search", *query, "--json"]) == 0
    out = capsys.readouterr()
    assert "changing/db.tokens holds token features of" in out.err
    assert "images are encoded again" in out.err
    check_same_scores(json.loads(out.out)["results"], images, 1e-9)
    assert "delete the folder to make them anew" in run(capsys, *words, *rerank, code=2)


def test_pooled_token_features_score_as_pooled_images_do(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, *index_words("products.tar", "pooled", "--rerank", "runs/retrieval", "--pool", "2"))
    results = search(capsys, "pooled", "a red car", "--rerank", "runs/retrieval", "--k", "24")
    tuned = loading.load("runs/retrieval")
    files = [Path(f"{result['key']}.jpg").read_bytes() for result in results]
    inputs, masks = tuned.encode_inputs(files, ["a red car"] * len(files))
    with torch.no_grad():
        image, embedding = tuned.model.tokens_and_embedding("image", inputs["image"])
        text, wanted = tuned.model.tokens_and_embedding("text", inputs["text"], masks["text"])
        assert image.grid is not None
        height, width = image.grid
        cells = image.states.view(len(files), height // 2, 2, width // 2, 2, -1).mean(dim=(2, 4)).flatten(1, 2)
        pooled = image._replace(states=cells, mask=image.mask[:, : cells.shape[1]], grid=(height // 2, width // 2))
        logits = tuned.model.head.match(tuned.model, text, pooled)
        expected = logits + tuned.model.encoder.logit_scale.exp() * (embedding * wanted).sum(dim=1)
    np.testing.assert_allclose([result["match"] for result in results], expected.numpy(), atol=5e-3)


def test_captions_count_in_hybrid_queries(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = [result["key"] for result in search(capsys, "catalog", "a blue dog", "--k", "24")]
    captions = {key: Path(f"{key}.txt").read_text() for key in sorted(dense)}
    scores = dict(zip(captions, CaptionIndex(list(captions.values())).score("a blue dog").tolist(), strict=True))
    by_caption = [key for key in sorted(captions, key=lambda key: -scores[key]) if scores[key] > 0]
    assert len(by_caption) > 1
    fused = {key: 1 / (61 + dense.index(key)) for key in dense}
    for rank, key in enumerate(by_caption, start=1):
        fused[key] += 1 / (60 + rank)
    record = json.loads(run(capsys, "search", "catalog", "a blue dog", "--hybrid", "--k", "24", "--json"))
    results = record["results"]
    assert [result["key"] for result in results] == sorted(fused, key=lambda key: (-fused[key], dense.index(key)))
    assert [dense.index(result["key"]) + 1 for result in results] == [result["rank_by_embedding"] for result in results]
    ranks = {result["key"]: result["rank_by_captions"] for result in results}
    assert [key for key in sorted(ranks, key=lambda key: ranks[key] or 99) if ranks[key]] == by_caption
    assert list(record["milliseconds"]) == ["encode", "search", "captions", "total"]
    none = json.loads(run(capsys, "search", "catalog", "zzz", "--hybrid", "--json"))
    assert none["notes"] == ["no caption holds a word of the query: the order is that of embeddings alone"]


def test_maps_of_the_results(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "search", "catalog", "a red car", "--rerank", "runs/retrieval", "--k", "2", "--maps", "maps")
    keys = re.findall(r"products/p\d\d", printed)
    assert sorted(path.name for path in Path("maps").iterdir()) == [
        f"{position:03d}-{key.replace('/', '_')}.png" for position, key in enumerate(keys, start=1)
    ]
    reranker = clipfuse.load("runs/retrieval")
    assert isinstance(reranker, clipfuse.FinetunedModel)
    expected = reranker.attend(f"{keys[0]}.jpg", "a red car").figure()
    drawn = Image.open(f"maps/001-{keys[0].replace('/', '_')}.png")
    assert np.abs(np.asarray(drawn.convert("RGB"), float) - np.asarray(expected.convert("RGB"), float)).mean() < 1


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
        assert max(thumbnail.size) <= 320
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


def test_the_same_command_goes_on_after_a_kill(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = index_words("products.tar", "killed", "--batch-size", "2")
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
    results = search(capsys, "killed", "a red car", "--k", "24")
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
    "search catalog --like gone": "catalog has no image gone",
    "search catalog car --not ''": "--not is empty",
    "search empty car": "empty is empty: `clipfuse index RUN --data SHARDS --db empty` adds images",
    "search http://127.0.0.1:9/x car": "http://127.0.0.1:9/x: Milvus says: Fail connecting to server",
    "search http://127.0.0.1:9/a-b car": "write http(s)://HOST:PORT/COLLECTION",
    "search catalog --image products/p00.jpg --hybrid": "--hybrid needs a text",
    "search catalog car --maps maps": "--maps needs --rerank RUN",
    "index runs/first --data products.tar --db new --pool 2": "--pool goes with --rerank",
    "index runs/first --data products.tar --db new --rerank runs/gone": "no run or checkpoint at runs/gone",
    "index runs/first --data embeddings0 --db new --rerank runs/retrieval": "needs --images",
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
        is_missing = re.search("is no index|no run or|No such file|there is no folder", err)
        assert code == 2 or not is_missing, command
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


# ---------------------------------------------------------------------------------------------------------------------
# The page


RECORDS: list[dict[str, Any]] = []
"""What the page logged."""


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    """The page of an index whose first caption holds a script, with the re-ranker."""
    with contextlib.chdir(folder):
        shutil.copytree("products", "hostile/products")
        Path("hostile/products/p00.txt").write_text('<script>alert(1)</script> a red car & "more"')
        assert cli.main(index_words("hostile/products", "hostile/db")) == 0
        with places.open_index("hostile/db") as opened:
            searcher = Searcher(opened, load_query_model(opened, None), torch.device("cpu"), loading.load("runs/retrieval"))
            with TestClient(build_app(searcher, log=RECORDS.append), base_url="http://127.0.0.1:8000") as client:
                yield client


def test_the_page_shows_results_and_where_each_word_looked(here: Path, client: TestClient) -> None:
    empty = client.get("/")
    assert empty.status_code == 200
    assert "holds 24 images" in empty.text
    page = client.get("/", params={"q": "a red car", "k": "24"})
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    records = client.get("/api/search", params={"q": "a red car", "k": "24"}).json()["results"]
    keys = re.findall(r'src="/thumbnail\?key=([^"&]+)"', page.text)
    assert keys == [record["key"] for record in records]
    assert len(keys) == 24
    assert {record["rank_by_embedding"] for record in records} == set(range(1, 25))
    assert [record["match"] for record in records] == sorted((record["match"] for record in records), reverse=True)

    assert "<script>alert" not in page.text  # captions are escaped
    assert "&lt;script&gt;alert(1)" in page.text
    assert not re.search(r"<script|javascript:|\son\w+=|https?://", page.text)  # no script, and nothing from elsewhere

    thumbnail = client.get("/thumbnail", params={"key": keys[0]})
    assert (thumbnail.headers["content-type"], Image.open(io.BytesIO(thumbnail.content)).format) == ("image/jpeg", "JPEG")
    words = re.findall(r'<label for="w\d+">([^<]+)</label>', page.text)
    assert words == ["a", "red", "car"]
    assert page.text.count("The circle marks where a word attends most.") == 1
    reranker = clipfuse.load("runs/retrieval")
    assert isinstance(reranker, clipfuse.FinetunedModel)
    expected = dict(reranker.attend(f"hostile/{keys[0]}", "a red car").tiles(320))
    for number, word in enumerate(words):
        drawn = Image.open(io.BytesIO(client.get("/map", params={"key": keys[0], "q": "a red car", "word": number}).content))
        difference = np.asarray(drawn, float) - np.asarray(expected[word].convert("RGB").resize(drawn.size), float)
        assert np.abs(difference).mean() < 8
    assert f"body:has(#w{len(words) - 1}:checked)" in client.get("/style.css").text


def test_filters_uploads_and_more_like_this_on_the_page(here: Path, client: TestClient) -> None:
    filtered = client.get("/api/search", params={"q": "a red car", "condition": "price < 300"}).json()["results"]
    assert {record["key"] for record in filtered} == {"products/p01.jpg", "products/p02.jpg"}
    like = client.get("/api/search", params={"like": "products/p07.jpg", "k": "1"}).json()["results"]
    assert like[0]["key"] == "products/p07.jpg"
    upload = {"image": ("p07.jpg", Path("products/p07.jpg").read_bytes())}
    assert client.post("/api/search", files=upload).json()["results"][0]["key"] == "products/p07.jpg"
    assert "/thumbnail?key=products/p07.jpg" in client.post("/", files=upload, data={"q": "a red car", "k": "24"}).text


def test_captions_and_the_log_of_the_page(here: Path, client: TestClient) -> None:
    asked = {"q": "a red car", "hybrid": "1", "k": "5"}
    page = client.get("/", params=asked)
    assert 'name="hybrid" value="1" checked' in page.text
    assert 'value="1" checked' not in client.get("/", params={"q": "a red car", "k": "5"}).text
    answer = client.get("/api/search", params=asked).json()
    assert any(result["rank_by_captions"] for result in answer["results"])
    assert list(answer["milliseconds"]) == ["encode", "search", "captions", "fetch", "rerank", "total"]
    assert [record["hybrid"] for record in RECORDS[-3:]] == [True, False, True]
    assert RECORDS[-1] == {"text": "a red car", "like": None, "not": [], "filter": None, "hybrid": True, **answer}


def test_what_the_page_refuses(here: Path, client: TestClient) -> None:
    large = io.BytesIO()
    Image.new("1", (40000, 10000)).save(large, "PNG")  # 400 megapixels in a few kilobytes
    for answer, message in (
        (client.get("/", params={"q": "car", "condition": "prise < 9"}), "did you mean &#39;price&#39;?"),
        (client.get("/", params={"q": "car", "condition": "price <"}), "column 8"),
        (client.get("/", params={"like": "<b>gone</b>"}), "no image &lt;b&gt;gone&lt;/b&gt;"),
        (client.post("/", files={"image": ("a.jpg", b"no image")}), "is not a usable image"),
        (client.post("/", files={"image": ("a.png", large.getvalue())}), "image too large"),
        (client.get("/api/search"), "the query is empty"),
    ):
        assert answer.status_code == 400
        assert message in answer.text
    long = client.get("/", params={"q": "red car " * 500})
    assert long.status_code == 200
    assert "what comes after them does not count" in long.text
    for path, parameters in (("/thumbnail", {"key": "gone"}), ("/map", {"key": "gone", "q": "car", "word": "0"}), ("/x", {})):
        assert client.get(path, params=parameters).status_code == 404
    assert client.get("/map", params={"key": "products/p01.jpg", "q": "car", "word": "9"}).status_code == 404
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400  # a page elsewhere that points at this machine


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_in_a_browser(here: Path, client: TestClient) -> None:
    """A search, a word pressed by mouse and by keyboard, a narrow screen; nothing leaves the machine."""
    sync_api = pytest.importorskip("playwright.sync_api")
    server = uvicorn.Server(uvicorn.Config(client.app, log_level="warning"))
    listener = socket.create_server(("127.0.0.1", 0))
    origin = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1200, "height": 900})
            requests, messages = [], []
            page.on("request", lambda request: requests.append(request.url))
            page.on("console", lambda message: messages.append(message.text))
            page.set_default_timeout(120_000)
            page.goto(origin)
            page.get_by_label("Images that show").fill("a red car")
            page.keyboard.press("Enter")
            page.wait_for_url("**/?q=a+red+car*")
            assert page.locator(".results li").count() == 12
            assert page.locator("img.m2").first.is_hidden()
            page.get_by_text("car", exact=True).first.click()
            page.wait_for_function("() => document.querySelector('img.m2').naturalWidth > 0")
            assert page.locator("img.m2").first.is_visible()
            page.keyboard.press("ArrowLeft")  # to the word before
            assert page.locator("img.m2").first.is_hidden()
            assert page.locator("img.m1").first.is_visible()
            page.set_viewport_size({"width": 360, "height": 740})
            assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
            page.get_by_label("Images like this file").set_input_files("products/p07.jpg")
            page.get_by_text("Search by image").click()
            page.wait_for_function("() => location.search == '' && document.querySelectorAll('.results li').length == 12")
            assert all(url.startswith(origin) for url in requests)
            assert messages == []
            browser.close()
    finally:
        server.should_exit = True
        thread.join(60)
