"""clipfuse evaluate DB --queries: measures against formulas written out here, judgments that count, mistakes in one line."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shlex
import sys
import tarfile
from pathlib import Path
from typing import Any

import clipfuse
import numpy as np
import pytest
from rich.console import Console

from finetune.search import evaluation, places
from launch import cli
from pretrain.data.filter_parser import parse_filter
from tests.support import Small

SHARED = ("ndcg@10", "mrr", "recall@1", "recall@5", "recall@10")
QUIET = ["data.workers=0", "eval.workers=0", "train.trackers=[]", "train.threads=1", "train.steps=2", "train.epochs=0"]


@pytest.fixture(scope="module")
def folder(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shop/ with 40 products and its queries, runs/first and runs/retrieval, and the index `catalog`."""
    root = tmp_path_factory.mktemp("judged")
    with contextlib.chdir(root):
        shop = ["data", "scenes", "shop", "--catalog", "--num", "40", "--size", "64", "--workers", "1"]
        assert cli.main(shop) == 0
        assert cli.main(["pretrain", "scenes", *small.settings("first", "train.steps=2")]) == 0
        shards = ["data.train=shop/train-0000.tar", "data.val=null", "train.eval_every=0", "data.batch_size=8"]
        assert (
            cli.main(
                ["finetune", "retrieval", "init=runs/first", "run=retrieval", *shards, *QUIET, "optim.lr=0.3", "optim.warmup=0"]
            )
            == 0
        )
        assert cli.main(index_words("catalog")) == 0
    return root


def index_words(place: str) -> list[str]:
    return ["index", "runs/first", "--data", "shop/catalog-0000.tar", "--db", place, "--fields", "price:float,room:str"]


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def evaluate(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["evaluate", *words, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def write_queries(path: str, *queries: dict[str, Any]) -> str:
    Path(path).write_text("".join(json.dumps(query) + "\n" for query in queries))
    return path


def expected_measures(keys: list[str], grades: dict[str, int], relevant: int) -> dict[str, float]:
    """nDCG@10 with linear gains, reciprocal rank and recall, by their definitions."""

    def discount(values: list[int]) -> float:
        return sum(value / math.log2(i + 2) for i, value in enumerate(values[:10]))

    gains = [grades.get(key, 0) for key in keys]
    right = {key for key, grade in grades.items() if grade >= relevant}
    first = next((i for i, key in enumerate(keys) if key in right), None)
    return {
        "ndcg@10": discount(gains) / discount(sorted(grades.values(), reverse=True)),
        "mrr": 0.0 if first is None else 1 / (first + 1),
        **{f"recall@{k}": len(right & set(keys[:k])) / len(right) for k in (1, 5, 10)},
    }


def test_measures_of_a_hand_made_example(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Grades are given by position, so that each value can be computed on paper."""
    capsys.readouterr()
    assert cli.main(["search", "catalog", "a red car", "--k", "40", "--json"]) == 0
    keys = [result["key"] for result in json.loads(capsys.readouterr().out)["results"]]
    queries = write_queries("hand.jsonl", {"id": 1, "text": "a red car"}, {"id": "two", "text": "a red car"})
    Path("hand.tsv").write_text(
        f"1\t0\t{keys[1]}\t3\n1\t0\t{keys[3]}\t1\n1\t0\t{keys[20]}\t3\ntwo 0 {keys[0]} 3\n\ntwo 0 {keys[5]} -1\r\n"
    )
    result = evaluate(capsys, "catalog", "--queries", queries, "--qrels", "hand.tsv")
    first, second = result["by_query"]["1"]["embeddings"], result["by_query"]["two"]["embeddings"]
    ideal = 3 + 3 / math.log2(3) + 1 / math.log2(4)
    assert first["ndcg@10"] == pytest.approx((3 / math.log2(3) + 1 / math.log2(5)) / ideal)
    assert (first["mrr"], first["recall@1"], first["recall@5"], first["recall@10"]) == (0.5, 0.0, 0.5, 0.5)
    assert set(second.values()) == {1.0}
    mean = result["metrics"]["embeddings"]["mrr"]
    assert (mean["mean"], mean["low"], mean["high"], mean["queries"]) == (0.75, 0.5, 1.0, 2)
    assert result["selectivity"] == {}


def test_hybrid_queries(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each stage against the ranks that `clipfuse search --hybrid` gives."""
    queries = [{"id": str(i), "text": text} for i, text in enumerate(("a red car", "blue", "a large dog on a beach"))]
    asked: list[dict[str, Any]] = []
    grades: dict[str, dict[str, int]] = {}
    rerank = ["--rerank", "runs/retrieval", "--candidates", "6"]
    for query in queries:
        capsys.readouterr()
        assert cli.main(["search", "catalog", query["text"], "--hybrid", *rerank, "--k", "40", "--json"]) == 0
        results = json.loads(capsys.readouterr().out)["results"]
        assert any(result["rank_by_captions"] for result in results)
        asked.append({"results": results})
        grades[query["id"]] = {result["key"]: grade for result, grade in zip(results[3:12:4], (3, 1, 3), strict=True)}
    Path("hybrid.tsv").write_text("".join(f"{q}\t0\t{key}\t{g}\n" for q, of in grades.items() for key, g in of.items()))
    words = ["catalog", "--queries", write_queries("hybrid.jsonl", *queries), "--hybrid"]
    result = evaluate(capsys, *words, "--qrels", "hybrid.tsv", *rerank)
    plain = evaluate(capsys, *[word for word in words if word != "--hybrid"], "--qrels", "hybrid.tsv")
    assert list(result["metrics"]) == ["embeddings", "hybrid", "reranked", "gain"]
    differences = []
    for query, found in zip(queries, asked, strict=True):
        results, values = found["results"], result["by_query"][query["id"]]
        assert {name: values["embeddings"][name] for name in SHARED} == pytest.approx(
            plain["by_query"][query["id"]]["embeddings"]
        )
        caption_rank = {r["key"]: r["rank_by_captions"] for r in results}
        score = {r["key"]: 1 / (60 + r["rank_by_embedding"]) + 1 / (60 + (caption_rank[r["key"]] or math.inf)) for r in results}
        order = {r["key"]: r["rank_by_embedding"] for r in results}
        fused = sorted(score, key=lambda key: (-score[key], order[key]))
        for stage, keys in (("hybrid", fused), ("reranked", [r["key"] for r in results])):
            expected = expected_measures(keys, grades[query["id"]], 3)
            assert {name: values[stage][name] for name in SHARED} == pytest.approx(expected), (query, stage)
        differences.append(values["reranked"]["mrr"] - values["embeddings"]["mrr"])
    assert result["metrics"]["gain"]["mrr"]["mean"] == pytest.approx(np.mean(differences))
    leaky = evaluate(
        capsys, "catalog", "--queries", write_queries("own.jsonl", {"id": 1, "text": caption_of_one()}), "--hybrid"
    )
    assert leaky["notes"][0].startswith("the right images are those whose caption is the query, which --hybrid finds")
    assert list(leaky["metrics"]) == ["embeddings", "hybrid", "gain"]


def caption_of_one() -> str:
    """The caption of an image of the index."""
    with tarfile.open("shop/catalog-0000.tar") as tar:
        file = tar.extractfile(next(name for name in tar.getnames() if name.endswith(".txt")))
        assert file is not None
        return file.read().decode().strip()


def test_the_drawn_catalog_before_and_after_reranking(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All values against orders that the models give by themselves, and filters applied to the json."""
    words = ["--queries", "shop/queries.jsonl", "--qrels", "shop/qrels.tsv", "--rerank", "runs/retrieval", "--candidates", "8"]
    result = evaluate(capsys, "catalog", *words)
    queries = {query["id"]: query for query in map(json.loads, Path("shop/queries.jsonl").read_text().splitlines())}
    grades: dict[str, dict[str, int]] = {}
    for line in Path("shop/qrels.tsv").read_text().splitlines():
        query, _, key, grade = line.split("\t")
        grades.setdefault(query, {})[key] = int(grade)
    assert result["relevant_grade"] == 3
    assert result["notes"] == []
    assert result["queries"] == len(queries)
    assert list(result["by_query"]) == list(queries)

    with tarfile.open("shop/catalog-0000.tar") as tar:
        files = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    names = sorted(name.removesuffix(".jpg") for name in files if name.endswith(".jpg"))
    products = [json.loads(files[f"{name}.json"]) for name in names]
    model, reranker = clipfuse.load("runs/first"), clipfuse.load("runs/retrieval")
    assert isinstance(reranker, clipfuse.FinetunedModel)
    vectors = model.encode_images([files[f"{name}.jpg"] for name in names])
    texts = model.encode_texts([query["text"] for query in queries.values()])
    shares = {}
    for number, (identity, query) in enumerate(queries.items()):
        condition = parse_filter(query.get("filter", "exists price"), "filter")
        order = [i for i in np.argsort(-(vectors @ texts[number])) if condition.matches(products[i])]
        shares[identity] = len(order) / len(names) if "filter" in query else None
        found = result["by_query"][identity]
        keys = [f"catalog-0000/{names[i]}" for i in order]
        assert {name: found["embeddings"][name] for name in SHARED} == pytest.approx(
            expected_measures(keys, grades[identity], 3)
        ), identity
        if number < 6:
            scores = {i: reranker.predict(files[f"{names[i]}.jpg"], query["text"])[0][0][1] for i in order[:8]}
            assert len(set(scores.values())) > min(len(scores), 2) - 1
            best = [f"catalog-0000/{names[i]}" for i in sorted(scores, key=lambda i: -scores[i])]
            expected = expected_measures(best + keys[8:], grades[identity], 3)
            assert {name: found["reranked"][name] for name in SHARED} == pytest.approx(expected), identity
    metrics = result["metrics"]
    for name in SHARED:
        means = [np.mean([found[stage][name] for found in result["by_query"].values()]) for stage in ("embeddings", "reranked")]
        assert [metrics[stage][name]["mean"] for stage in ("embeddings", "reranked")] == pytest.approx(means)
        assert metrics["gain"][name]["mean"] == pytest.approx(means[1] - means[0])
        assert all(of[name]["low"] <= of[name]["mean"] <= of[name]["high"] for of in metrics.values())
    assert metrics["embeddings"]["recall@8"] == metrics["reranked"]["recall@8"]  # re-ranking moves the first 8 only
    groups = {name: group["queries"] for name, group in result["selectivity"].items()}
    assert groups.pop("no filter") == list(shares.values()).count(None)
    assert sum(groups.values()) == len(queries) - list(shares.values()).count(None)
    narrow = [identity for identity, share in shares.items() if share is not None and 0.01 < share <= 0.1]
    of_narrow = result["selectivity"]["1 to 10 % pass"]["embeddings"]["ndcg@10"]
    assert of_narrow["queries"] == len(narrow) > 0
    expected_mean = np.mean([result["by_query"][identity]["embeddings"]["ndcg@10"] for identity in narrow])
    assert of_narrow["mean"] == pytest.approx(expected_mean)

    Console(width=80, file=(terminal := io.StringIO())).print(evaluation.build_table(result))
    table = terminal.getvalue()
    assert "…" not in table  # nothing is cut off
    gain = metrics["gain"]["ndcg@10"]
    assert f"{gain['mean']:+.3f} [{gain['low']:.2f}, {gain['high']:.2f}]" in table
    assert re.search(rf"1 to 10 % pass +{len(narrow)} quer(y|ies)", table)

    capsys.readouterr()
    assert cli.main(["evaluate", "catalog", *words[:4], "--filter", "price > 100"]) == 0
    printed = capsys.readouterr().out
    assert "nDCG@10" in printed
    assert "that the query's filter rejects, which do not count" in printed


def test_without_judgments_keys_or_captions_count(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with places.open_index("catalog") as opened:
        image = opened.get(["catalog-0000/0000004"])[0]
    assert image is not None
    caption = image.caption
    queries = write_queries(
        "own.jsonl",
        {"id": "c", "text": caption},
        {"id": "k", "text": "x", "keys": ["catalog-0000/0000009"]},
        {"id": "n", "text": "x"},
    )
    result = evaluate(capsys, "catalog", "--queries", queries)
    assert list(result["by_query"]) == ["c", "k"]
    assert result["notes"] == ["1 query left out, without a judgment above 0 that counts: n"]
    lines = write_queries("lines.jsonl", {"id": "c", "text": caption.split("\n")[0]})
    assert evaluate(capsys, "catalog", "--queries", lines)["queries"] == 1


def test_a_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    intervals = [evaluation.bootstrap(random.exponential(size=60)) for _ in range(100)]
    assert 85 <= sum(interval["low"] <= 1.0 <= interval["high"] for interval in intervals) <= 99


GOOD = '{"id": "q", "text": "a red car", "keys": ["catalog-0000/0000003"]}'
KEY = "catalog-0000/0000003"
REFUSED = {
    "catalog --queries gone.jsonl": "--queries gone.jsonl: there is no such file",
    "nowhere --queries good.jsonl": "nowhere is no index",
    "catalog --qrels q.tsv --data x": "--qrels evaluates an index, and needs --queries FILE",
    "catalog --data shop": "catalog is an index, which --queries FILE evaluates",
    "catalog --run runs/first --data x": "--run evaluates an index, and needs --queries FILE",
    "catalog --queries good.jsonl --run runs/retrieval --rerank runs/gone": "no run or checkpoint at runs/gone",
    "catalog --queries good.jsonl --task retrieval": "--task evaluates a run, and does not go with --queries",
    "catalog --queries good.jsonl --filter 'prise < 9'": "no field 'prise'; did you mean 'price'?",
    "catalog --queries good.jsonl --rerank runs/gone": "no run or checkpoint at runs/gone",
    "catalog --queries good.jsonl --rerank runs/first": "runs/first",
    "catalog --queries good.jsonl --qrels gone.tsv": "--qrels gone.tsv: there is no such file",
}
BROKEN_QUERIES = {
    "": "holds no queries",
    f"{GOOD}\n\n{{": "line 3: no JSON",
    f"{GOOD}\n[1]": "line 2: no JSON object",
    f"{GOOD}\n{GOOD}": "line 2: the id 'q' was there before",
    '{"id": "q"}': "line 1: text is missing",
    '{"text": "a"}': "line 1: id is missing",
    '{"id": "q", "text": " "}': "line 1: text is ' '",
    '{"id": "q", "text": "a", "filtre": "b"}': "line 1: no field is called 'filtre'; did you mean 'filter'?",
    '{"id": "q", "text": "a", "filter": "price <"}': "line 1: filter 'price <': column 8",
    '{"id": "q", "text": "a", "filter": "prise < 1"}': "query q: the index has no field 'prise'; did you mean 'price'?",
    '{"id": "q", "text": "a", "not": [""]}': "line 1: not is ['']",
    '{"id": "q", "text": "a", "keys": 3}': "line 1: keys is 3",
    '{"id": "q", "text": "a", "keys": ["gone"]}': "none of 1 query can be evaluated: 1 judged key not in the index",
    '{"id": "q", "text": "no caption"}': "1 query left out, without a judgment above 0 that counts: q",
}
BROKEN_JUDGMENTS = {
    "\n": "holds no judgments",
    f"q\t0\t{KEY}\t3\nq\t0\t{KEY}": "line 2: 3 columns instead of 4",
    f"q 0 {KEY} three": "line 1: the grade 'three' must be a whole number of at most 100",
    f"q 0 {KEY} 1000000": "line 1: the grade '1000000' must be",
    f"q 0 {KEY} 3\nq 0 {KEY} 1": f"line 2: q and {KEY} were there before, with grade 3",
    f"p 0 {KEY} 3": "none of 1 query can be evaluated: judgments of 1 query not asked: p; 1 query left out",
    "q 0 gone 3": "1 judged key not in the index, which do not count: gone",
}


def test_refused_in_one_line(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("good.jsonl").write_text(GOOD)
    Path("latin.jsonl").write_bytes('{"id": "q", "text": "é"}'.encode("latin-1"))
    cases = [(shlex.split(command), message) for command, message in REFUSED.items()]
    cases.append((["catalog", "--queries", "latin.jsonl"], "line 1: no UTF-8"))
    for number, (content, message) in enumerate({**BROKEN_QUERIES, **BROKEN_JUDGMENTS}.items()):
        Path(f"broken{number}").write_text(content)
        file = (
            ["--queries", f"broken{number}"]
            if content in BROKEN_QUERIES
            else ["--queries", "good.jsonl", "--qrels", f"broken{number}"]
        )
        cases.append((["catalog", *file], message))
    for words, message in cases:
        capsys.readouterr()
        assert cli.main(["evaluate", *words]) in (1, 2), words
        error = capsys.readouterr().err
        assert message in error, words
        assert error.count("\n") == 1, error
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "runs/first"])
    assert "the following arguments are required: --data, or --queries for an index" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    assert cli.main(["evaluate", "catalog", "--queries", "good.jsonl"]) == 1
    assert "--queries needs ir_measures: `pip install 'clipfuse[search]'`" in capsys.readouterr().err
