"""clipfuse index and search on drawn scenes, every step held against the model's own embeddings and a full sort."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import clipfuse
import numpy as np
import pytest
import torch
from PIL import Image

from finetune import loading
from finetune.search import places
from finetune.search.captions import CaptionIndex
from launch import cli
from tests.support import HEAVY, environment, forked
from tests.support.catalog import index_words
from tests.support.commands import run, search


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


def test_what_was_replaced_gives_its_space_back(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By itself when more than half is dead, and with --compact before; results stay."""
    words = index_words("products.tar", "replaced", "--rerank", "runs/retrieval")
    query = ["replaced", "a red car", "--rerank", "runs/retrieval", "--k", "24"]
    run(capsys, *words)
    expected = search(capsys, *query)
    size = sum(path.stat().st_size for place in ("replaced", "replaced.tokens") for path in Path(place).iterdir())
    assert "compacted" not in run(capsys, *words, "--replace")  # half, and not more
    printed = run(capsys, *words, "--compact")
    assert "compacted: 24 rows of embeddings and 24 of token features that were replaced or removed" in printed
    assert "compacted" not in run(capsys, *words, "--replace")
    assert "compacted: 48 rows of embeddings and 48 of token features" in run(capsys, *words, "--replace")
    assert search(capsys, *query) == expected
    now = sum(path.stat().st_size for place in ("replaced", "replaced.tokens") for path in Path(place).iterdir())
    assert now < 1.1 * size


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
    "search catalog": "the query is empty: give a text, --image FILE, --audio FILE, or several",
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
    "search catalog car --k 99999": "k=99999 must be from 1 to 16,384",
    'search catalog car --filter \'room == "" or key != "") or (true\'': "column 24",
    "search catalog car --filter 'price < 1; drop'": "column 10",
    "search empty car": "empty is empty: `clipfuse index RUN --data SHARDS --db empty` adds images",
    "search http://127.0.0.1:9/x car": "http://127.0.0.1:9/x: Milvus says: Fail connecting to server",
    "search http://127.0.0.1:9/a-b car": "write http(s)://HOST:PORT/COLLECTION",
    "search catalog --image products/p00.jpg --hybrid": "--hybrid needs a text",
    "search catalog car --maps maps": "--maps needs --rerank RUN",
    "index runs/first --data products.tar --db new --pool 2": "--pool goes with --rerank",
    "index runs/first --data products.tar --db new --rerank runs/gone": "no run or checkpoint at runs/gone",
    "index runs/first --data embeddings0 --db new --rerank runs/retrieval": "needs --images",
    "index runs/first --data products.tar --db new --rerank runs/first": "holds encoders without a task",
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
    assert not Path("new").exists()


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


@pytest.mark.parametrize("place", ["full", "full.db"])
def test_a_full_disk_loses_nothing(here: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    """Files may grow to 20,000 bytes, as if the disk were full then."""
    process = forked.run(
        "tests.support.full_disk", ["20000", *index_words("products.tar", place, "--batch-size", "2")], here, 120
    )
    assert process.returncode == 1
    message = process.stderr.splitlines()[-1]
    assert "File too large" in message
    if place == "full":
        assert "cannot write into full: File too large; what was there before stays, and the same command goes on" in message
    with places.open_index(place) as opened:
        present = opened.count()
    assert 0 < present < 24
    assert f"{24 - present} added" in run(capsys, *index_words("products.tar", place, "--batch-size", "2"))
    assert len(search(capsys, place, "car", "--k", "24")) == 24


def test_a_query_longer_than_the_model_reads(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(run(capsys, "search", "catalog", "red car " * 2000, "--json"))
    assert len(record["results"]) == 10
    assert "and the model reads 24: what comes after them does not count" in record["notes"][0]


def test_a_search_imports_only_what_it_uses_and_its_threads_wait_asleep(here: Path) -> None:
    """In a fresh interpreter: those modules took half of the time to the first answer. OpenMP itself says how it waits."""
    code = (
        "import json, sys\nfrom launch import cli\n"
        "assert cli.main(['search', 'catalog', 'a red car', '--rerank', 'runs/retrieval', '--k', '2']) == 0\n"
        "print(json.dumps(sorted(set(json.loads(sys.argv[1])) & set(sys.modules))))"
    )
    command = [sys.executable, "-c", code, json.dumps(HEAVY)]
    env = environment(OMP_DISPLAY_ENV="true")
    env.pop("OMP_WAIT_POLICY", None)
    done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
