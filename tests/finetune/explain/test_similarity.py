"""Similarity maps: an exact split of the similarity, on tiny models, and every way to ask for them."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tarfile
from pathlib import Path

import clipfuse
import numpy as np
import pytest
import torch
from PIL import Image

import finetune
from finetune.explain import heatmap
from finetune.explain.similarity import compute_similarity_maps
from finetune.explain.word_maps import METHODS, compute_encoder_maps, compute_word_maps
from launch import cli
from pretrain.errors import UserError
from tests.support import ROOT, Small
from tests.support.tiny import LENGTH, build_model

MEAN = {"image": {"pool": "avg"}, "text": {"pool": "avg"}}
TEXT = "a red car, left of a sofa"


def build_pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return two images (2, 3, 16, 16), two texts of different lengths, and their mask."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=generator, dtype=torch.uint8)
    ids = torch.randint(3, 60, (2, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [7]])
    return images, ids.masked_fill(~mask, 0), mask


def test_a_map_is_what_loops_over_words_and_cells_give() -> None:
    model = build_model("clip", torch.float64, **MEAN)
    images, ids, mask = build_pairs()
    maps, cosines = compute_similarity_maps(model, images, ids, mask)
    assert model.training  # as before
    assert maps.shape == (2, LENGTH, 2, 2)
    model.eval()
    with torch.no_grad():
        cells = model.tower("image")(images).states.numpy()
        tokens = model.tower("text")(ids, mask).states.numpy()
        embeddings = (model.encode("image", images), model.encode("text", ids, mask))
    image_matrix, text_matrix = (model.projection(name).weight.detach().numpy() for name in ("image", "text"))
    for b in range(2):
        for t in range(LENGTH):
            for y in range(2):
                for x in range(2):
                    product = 0.0
                    for d in range(len(text_matrix)):
                        word = sum(text_matrix[d, c] * tokens[b, t, c] for c in range(tokens.shape[2]))
                        cell = sum(image_matrix[d, c] * cells[b, 2 * y + x, c] for c in range(cells.shape[2]))
                        product += word * cell
                    expected = product if mask[b, t] else 0.0
                    assert maps[b, t, y, x].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert (maps < 0).any()  # the sign is kept
    torch.testing.assert_close(cosines, (embeddings[0] * embeddings[1]).sum(dim=1))


def test_the_sum_of_all_maps_is_the_similarity_of_the_pooled_vectors() -> None:
    """Before the embeddings are normalized, T N times their product, whatever the padding."""
    model = build_model("clip", torch.float64, **MEAN).eval()
    images, ids, mask = build_pairs()
    maps, _ = compute_similarity_maps(model, images, ids, mask)
    with torch.no_grad():
        image = model.projection("image")(model.tower("image")(images).pooled)
        text = model.projection("text")(model.tower("text")(ids, mask).pooled)
    counts = mask.sum(dim=1) * 4
    torch.testing.assert_close(maps.sum(dim=(1, 2, 3)), counts * (image * text).sum(dim=1))


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_tower_that_pools_otherwise_is_refused(modality: str) -> None:
    model = build_model("clip", **{**MEAN, modality: {"pool": "cls" if modality == "image" else "eot"}})
    with pytest.raises(UserError, match=f"the {modality} tower of this model does not: pretrain with {modality}.pool=avg"):
        compute_similarity_maps(model, *build_pairs())


@pytest.fixture(scope="module")
def folder(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/first (encoders), runs/mine (vqa), runs/eot (encoders whose text tower pools its last token), images/17.jpg."""
    root = tmp_path_factory.mktemp("similarity")
    quiet = ["data.workers=0", "eval.workers=0", "train.trackers=[]", "train.threads=1", "train.steps=2", "train.epochs=0"]
    shards = [f"data.train={small.train}", "data.val=null", "train.eval_every=0", "data.batch_size=8"]
    with contextlib.chdir(root):
        first = small.settings("first", "train.steps=2", "image.args.patch_size=8")
        assert cli.main(["pretrain", "scenes", *first]) == 0
        assert cli.main(["pretrain", "scenes", *small.settings("eot", "train.steps=1"), "text.pool=eot"]) == 0
        assert cli.main(["finetune", "vqa", "init=runs/first", "run=mine", *shards, *quiet]) == 0
        with tarfile.open(sorted(small.root.glob("scenes/val-*.tar"))[0]) as tar:
            member = next(member for member in tar if member.name.endswith(".jpg"))
            data = tar.extractfile(member).read()  # type: ignore[union-attr]
        Path("images").mkdir()
        Image.open(io.BytesIO(data)).resize((90, 60)).save("images/17.jpg")
    return root


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def test_encoders_alone_have_maps_by_command_and_in_python(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command is the one of the guide. The answer is the cosine of the embeddings."""
    (line,) = re.findall("    clipfuse .*--maps similarity.*", (ROOT / "finetune/README.md").read_text())
    words = line.split('"')
    command = [*words[0].split()[1:], words[1], *words[2].split()]
    assert command[:2] == ["attend", "runs/first"]
    assert cli.main(command) == 0
    model = clipfuse.load("runs/first", device="cpu")
    cosine = (model.encode_images("images/17.jpg") @ model.encode_texts(words[1]).T).item()
    assert f"cosine, {cosine:.2f}" in capsys.readouterr().out
    maps = model.attend("images/17.jpg", words[1], out="python.png", method="similarity")
    assert Path("python.png").read_bytes()[:4] == Path(command[-1]).read_bytes()[:4] == b"\x89PNG"
    assert maps.answers == [("cosine", pytest.approx(cosine, abs=1e-5))]
    assert maps.words == words[1].split()
    assert maps.maps.shape == (len(maps.words), 4, 4)


def test_a_finetuned_run_answers_as_with_other_methods(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    draw = heatmap.draw_figure
    monkeypatch.setattr(heatmap, "draw_figure", lambda *args: lines.extend(args[3]) or draw(*args))
    model = clipfuse.load("runs/mine", device="cpu")
    question = "what color is the car?"
    maps = model.attend("images/17.jpg", question, method="similarity")
    attention = model.attend("images/17.jpg", question, method="raw")
    assert maps.answers == [(name, pytest.approx(value, abs=1e-5)) for name, value in attention.answers]
    assert not np.allclose(maps.maps, attention.maps)
    maps.figure()
    assert lines[-1] == heatmap.SIMILARITY_LEGEND  # not called attention
    attention.figure()
    assert lines[-1] == heatmap.LEGEND


def test_a_map_is_the_mean_of_a_words_tokens_where_positive(here: Path) -> None:
    """Held against products of the tokens that `clipfuse embed --tokens shared` would write."""
    tuned = finetune.load("runs/mine")
    encoder = tuned.model.encoder.eval()
    torch.nn.init.normal_(
        encoder.projection("text").weight, generator=torch.Generator().manual_seed(0)
    )  # products of both signs
    data = Path("images/17.jpg").read_bytes()
    maps = compute_word_maps(tuned, data, TEXT, "similarity")
    alone = compute_encoder_maps(encoder, tuned.decoders, data, TEXT)
    inputs, masks = tuned.encode_inputs([data], [TEXT])
    with torch.no_grad():
        cells = encoder.tokens("image", inputs["image"]).states[0].numpy()
        tokens = encoder.tokens("text", inputs["text"], masks["text"]).states[0].numpy()
    spans = tuned.tokenizer(TEXT, return_offsets_mapping=True)["offset_mapping"]
    assert (tokens @ cells.T < 0).any()
    for word, of_word in zip(maps.words, maps.maps, strict=True):
        if TEXT.split().count(word) > 1:
            continue  # "a"
        start = re.search(rf"\b{word}\b", TEXT).start()  # type: ignore[union-attr]
        mine = [t for t, (a, b) in enumerate(spans) if a < start + len(word) and b > start]
        products = [np.maximum(tokens[t] @ cells.T, 0) for t in mine]
        np.testing.assert_allclose(of_word.ravel(), np.mean(products, axis=0), atol=1e-5)
    assert (maps.maps > 0).any()
    np.testing.assert_allclose(alone.maps, maps.maps, atol=1e-5)


def test_grounding_measures_them_without_an_untrained_fusion(
    here: Path, small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    command = ["evaluate", "runs/mine", "--data", small.val, "--task", "grounding", "--maps", "similarity"]
    assert cli.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    metrics = result["metrics"]
    assert result["method"] == "similarity"
    for end in ("", "_low", "_high", "_area", "_centre", "_shuffled"):
        assert 0 <= metrics[f"pointing_thing{end}"] <= 1
    assert not [name for name in metrics if "untrained" in name]  # it would be the same maps


def test_mistakes_are_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert METHODS[-1] == "similarity"
    cases = [
        (["runs/first"], 1, "runs/first holds encoders without a task, so there is no attention to draw"),
        (["runs/first"], 1, "or draw --maps similarity"),
        (["runs/first", "--maps", "similarty"], 2, "did you mean 'similarity'"),
        (["runs/first", "--maps", "similarity", "--layer", "0"], 2, "layer 0: similarity maps come from the encoders"),
        (["runs/eot", "--maps", "similarity"], 1, "the text tower of this model does not: pretrain with text.pool=avg"),
    ]
    for words, code, message in cases:
        capsys.readouterr()
        command = ["attend", words[0], "images/17.jpg", TEXT, "--out", "none.png", *words[1:]]
        assert cli.main(command) == code, words
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error
    assert not Path("none.png").exists()
    with pytest.raises(clipfuse.UserError, match=r'not attend; load a .*, or give method="similarity"'):
        clipfuse.load("runs/first").attend("images/17.jpg", TEXT)
