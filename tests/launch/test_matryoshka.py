"""From loss.matryoshka to an index of the first dimensions: recall at each width, and searches with cut embeddings."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import clipfuse
import numpy as np
import pytest

from finetune.search import places
from launch import cli
from tests.support import Small, read_jsonl
from tests.support.catalog import index_words


@pytest.fixture(scope="module")
def trained(folder: Path, small: Small) -> None:
    """runs/nested, trained for 4, 8 and all 16 dimensions."""
    more = ["train.steps=2", "loss.matryoshka=[8,4]", f"data.val={small.val}", "train.eval_every=2", "eval.workers=0"]
    with contextlib.chdir(folder):
        assert cli.main(["pretrain", "scenes", *small.settings("nested", *more)]) == 0


def test_recall_at_each_width(here: Path, trained: None, small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    """Against ranks by the model's own embeddings, cut and normalized here."""
    assert cli.main(["evaluate", "runs/nested", "--data", small.val, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert cli.main(["embed", "runs/nested", "--data", small.val, "--out", "nested", "--workers", "0"]) == 0
    logged = [line for line in read_jsonl(here / "runs/nested/metrics.jsonl") if "val/image_to_text_R@1" in line][-1]
    import pyarrow.parquet as pq

    table = pq.read_table("nested", columns=["image", "text"])
    image, text = (np.stack(table[name].to_pylist()).astype(np.float64) for name in ("image", "text"))
    for width in (4, 8):
        a, b = (x[:, :width] / np.linalg.norm(x[:, :width], axis=1, keepdims=True) for x in (image, text))
        scores = b @ a.T
        ranks = (scores > scores.diagonal()[:, None]).sum(axis=1)
        for k in (1, 5, 10):
            assert metrics[f"text_to_image_R@{k}_dim{width}"] == pytest.approx((ranks < k).mean(), abs=0.04)  # of float16
            assert logged[f"val/text_to_image_R@{k}_dim{width}"] == metrics[f"text_to_image_R@{k}_dim{width}"]
    assert "text_to_image_R@1_dim16" not in metrics
    assert cli.main(["report", "runs/nested"]) == 0
    page = Path("runs/nested/report.html").read_text()
    rows = page[page.index("<h2>Recall by width</h2>") :].split("</table>")[0]
    assert [f"<td>{head}</td>" in rows for head in ("4", "8", "all")] == [True] * 3
    assert f"<td>{100 * metrics['text_to_image_R@10_dim4']:.1f}</td>" in rows


@pytest.mark.parametrize("place", ["nested.index", "nested.db"])
def test_an_index_of_the_first_dimensions(here: Path, trained: None, capsys: pytest.CaptureFixture[str], place: str) -> None:
    words = ["runs/nested" if word == "runs/first" else word for word in index_words("products.tar", place)]
    assert cli.main([*words, "--dim", "8"]) == 0
    assert "24 images of 8 numbers each" in capsys.readouterr().out
    assert cli.main(words) == 0  # goes on with the width of the index
    assert "nothing to do" in capsys.readouterr().out
    model = clipfuse.load("runs/nested")
    images = model.encode_images([f"products/p{i:02d}.jpg" for i in range(24)])[:, :8]
    texts = model.encode_texts(["a red car", "a dog"])[:, :8]
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))
    picture = images[7]
    for more, query in (
        (["a red car"], texts[0]),
        (["a red car", "--not", "a dog"], texts[0] - texts[1] / 2),
        (["a red car", "--image", "products/p07.jpg"], (texts[0] + picture) / 2),
        (["--like", "products/p07"], picture),
    ):
        assert cli.main(["search", place, *more, "--k", "24", "--json"]) == 0
        results = json.loads(capsys.readouterr().out)["results"]
        expected = np.sort(images @ (query / np.linalg.norm(query)))[::-1]
        np.testing.assert_allclose([result["score"] for result in results], expected, atol=2e-6)
    with places.open_index(place) as index:
        assert index.describe().dim == 8


def test_what_is_refused(here: Path, trained: None, small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["index", "runs/nested", "--data", "products.tar", "--db", "cut", "--dim", "4"]) == 0
    nested = ["index", "runs/nested", "--data", "products.tar", "--db"]
    for words, message in (
        (index_words("products.tar", "new", "--dim", "8"), "trained for all of them alone (loss.matryoshka)"),
        (
            [*nested, "new", "--dim", "6"],
            "have 16 numbers, and loss.matryoshka trained 4, 8 of them",
        ),
        ([*nested, "cut", "--dim", "8"], "--dim 8: cut holds embeddings of 4 numbers; choose another --db"),
        (["pretrain", "scenes", *small.settings("wide", "loss.matryoshka=[32]")], "embeddings have model.dim=16 numbers"),
        (["pretrain", "scenes", *small.settings("wide", "loss.matryoshka=[0]")], "must be different widths of at least 1"),
    ):
        capsys.readouterr()
        assert cli.main(words) in (1, 2)
        err = capsys.readouterr().err.splitlines()
        assert message in err[-1]
    assert not Path("new").exists()
