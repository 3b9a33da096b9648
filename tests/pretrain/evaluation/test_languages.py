"""Retrieval within each language: closed forms, and shards that hold one language alone."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from pretrain.embedding.job import embed
from pretrain.embedding.options import Options
from pretrain.embedding.split import read_languages
from pretrain.errors import UserError
from pretrain.evaluation.evaluate import build_result, build_table, evaluate, evaluate_checkpoint
from pretrain.evaluation.languages import metrics_by_language
from tests.pretrain.evaluation.test_evaluate import CPU, build_model, eval_config
from tests.support import Small, world


def test_candidates_are_those_of_the_same_language() -> None:
    """4 samples in German are found, but each of the 5 in English has an image and a caption nearer to every German one."""
    n, m = 4, 5
    image, text = torch.zeros(n + m, 16), torch.zeros(n + m, 16)
    for i in range(n):
        image[i, i] = text[i, i] = 0.6
        image[i, 8] = text[i, 9] = 0.8
    image[n:, 9] = 1  # all alike: nearer to German captions (0.8) than German images are (0.36)
    text[n:, 8] = 1
    index = torch.arange(n + m)
    metrics = metrics_by_language(image, text, index, ["de"] * n + ["en"] * m, "language")
    for direction in ("image_to_text", "text_to_image"):
        assert metrics[f"{direction}_R@1_de"] == 1
        assert metrics[f"{direction}_median_rank_de"] == 1
        for k in (1, 5, 10):  # equal scores: chance
            assert metrics[f"{direction}_R@{k}_en"] == pytest.approx(min(1, k / m))
            assert metrics[f"chance_{direction}_R@{k}_en"] == pytest.approx(min(1, k / m))
        assert metrics[f"chance_{direction}_R@1_de"] == pytest.approx(1 / n)
    assert {name: value for name, value in metrics.items() if name.startswith(("samples", "captions"))} == {
        "samples_de": n, "captions_de": n, "samples_en": m, "captions_en": m
    }  # fmt: skip


def test_an_image_may_have_captions_in_several_languages() -> None:
    """3 images with one caption in each of two languages, one more of an unknown one; French names the next image."""
    image = torch.eye(3, 4)
    text = torch.cat([image, image.roll(1, 0), image[:1]])
    index = torch.tensor([0, 1, 2, 0, 1, 2, 1])
    metrics = metrics_by_language(image, text, index, ["de"] * 3 + ["fr"] * 3 + [""], "language")
    assert [metrics[f"text_to_image_R@1_{code}"] for code in ("de", "fr")] == [1, 0]
    assert metrics["text_to_image_median_rank_fr"] == 2.5  # behind the image it names, tied with the third
    assert metrics["captions_fr"] == metrics["samples_fr"] == 3
    with pytest.raises(UserError, match=r"eval\.language=lang: no sample has a language there"):
        metrics_by_language(image, text, index, [""] * 7, "lang")


def test_languages_of_a_sample() -> None:
    assert read_languages({"language": "pt-BR"}, "language", 2) == ["pt-BR"] * 2
    assert read_languages({"language": ["de", "fr"]}, "language", 2) == ["de", "fr"]
    assert read_languages({"language": ["de", None]}, "language", 2) == ["de", ""]
    for value in (["de"], 3, None, "two words", "a_b", ""):
        assert read_languages({"language": value}, "language", 2) == ["", ""]
    assert read_languages({}, "language", 1) == [""]


def write_shards(small: Small, folder: Path) -> dict[str, str]:
    """Write the samples of small.val with a language; return language -> the shards that hold it alone, "" -> all."""
    folder.mkdir()
    names = {"": "all.tar", "de": "de.tar", "pt-BR": "pt.tar"}
    tars = {language: tarfile.open(folder / name, "w") for language, name in names.items()}  # noqa: SIM115
    path = next(Path(small.val).parent.glob(Path(small.val).name)) if "*" in small.val else Path(small.val)
    count = 0
    with tarfile.open(path) as source:
        for member in source.getmembers():
            stem, _, extension = member.name.partition(".")
            data = source.extractfile(member).read()  # type: ignore[union-attr]
            language = "de" if int(np.frombuffer(stem[-2:].encode(), np.uint8).sum()) % 3 else "pt-BR"
            if extension == "json":
                data, count = json.dumps({**json.loads(data), "language": language}).encode(), count + 1
            for name in ("", language):
                info = tarfile.TarInfo(member.name)
                info.size = len(data)
                tars[name].addfile(info, io.BytesIO(data))
    for tar in tars.values():
        tar.close()
    assert count > 20
    return {language: str(folder / name) for language, name in names.items()}


def evaluate_on_rank(small: Small, shards: str) -> dict[str, float]:
    loaded = build_model(small, "captions")
    return evaluate(loaded.model, loaded.decoders, shards, eval_config(language="language"), CPU)


def test_each_language_has_the_figures_of_shards_that_hold_it_alone(small: Small, tmp_path: Path) -> None:
    shards = write_shards(small, tmp_path / "shards")
    loaded = build_model(small)
    off = evaluate(loaded.model, loaded.decoders, shards[""], eval_config(), CPU)
    metrics = evaluate(loaded.model, loaded.decoders, shards[""], eval_config(language="language"), CPU)
    assert {name: metrics[name] for name in off} == off
    for language in ("de", "pt-BR"):
        alone = evaluate(loaded.model, loaded.decoders, shards[language], eval_config(), CPU)
        del alone["bad_samples"]
        assert {name: metrics[f"{name}_{language}"] for name in alone} == pytest.approx(alone)
    assert len(metrics) == len(off) + 2 * len(alone)
    with pytest.raises(UserError, match=r"eval\.language=tongue: no sample has a language"):
        evaluate(loaded.model, loaded.decoders, shards[""], eval_config(language="tongue"), CPU)

    several = evaluate_on_rank(small, shards[""])  # several captions for each image
    for outcome in world.run(evaluate_on_rank, 2, small, shards[""]):
        assert outcome == pytest.approx(several)

    embed(loaded, Options([shards[""]], str(tmp_path / "emb"), dtype="float32", workers=0), CPU)
    stored = evaluate_checkpoint(loaded, tmp_path / "emb", eval_config(language="language"), CPU)
    assert stored["metrics"] == pytest.approx({name: metrics[name] for name in stored["metrics"]})
    assert "text_to_image_R@1_pt-BR" in stored["metrics"]

    result = build_result(Path("run"), 1, ["image", "text"], shards[""], ["retrieval"], metrics, 1.0)
    console = Console(width=100, file=io.StringIO())
    console.print(build_table(result))
    rows = [line.split("│")[1].strip() for line in console.file.getvalue().splitlines() if line.startswith("│")]  # type: ignore[attr-defined]
    assert [row for row in rows if row.endswith((" de", " pt-BR"))] == [
        f"{direction} R@1 {language}" for language in ("de", "pt-BR") for direction in ("image to text", "text to image")
    ]
    assert result["metrics"]["text_to_image_R@5_de"] == metrics["text_to_image_R@5_de"]
    assert result["chance"]["text_to_image_R@5_de"] == metrics["chance_text_to_image_R@5_de"]
