"""Two-stage retrieval against recall computed pair by pair; losses, negatives, resuming and refusals."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import shutil
import tarfile
from pathlib import Path
from typing import Any

import clipfuse
import numpy as np
import pytest
import torch

import finetune
from finetune import model as models
from finetune import wise_ft
from finetune.export import export
from finetune.tasks import EvalConfig, matching_head, reranking, retrieval
from finetune.tasks.negative_captions import NegativeCaptions
from launch import cli
from pretrain import registry
from pretrain.checkpoints.loading import load_model
from pretrain.data import BadSample, loader
from pretrain.data.batch import Batch
from pretrain.data.shards.paths import RawSample
from pretrain.data.text import TextDecoder, load_tokenizer
from pretrain.errors import UserError
from tests.support import Small, read_jsonl, read_losses, tiny

CPU = torch.device("cpu")


def arguments(small: Small, encoders: Path, run: Path, *more: str) -> list[str]:
    return [
        "finetune", "retrieval", f"run={run}", f"init={encoders}", f"data.train={small.train}", f"data.val={small.val}",
        "data.batch_size=16", "data.workers=0", "eval.workers=0", "eval.max_samples=16", "task.rerank=5", "fusion.layers=1",
        "fusion.heads=2", "optim.warmup=2", "train.log_every=1", "train.trackers=[]", "train.threads=1",
        "train.eval_every=0", "train.save_every=2", "train.steps=4",
        "task.contrastive=1", "adapt.fork=[]", "adapt.trainable_blocks={image: -1, text: -1}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def encoders(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("encoders") / "run"
    assert cli.main(["pretrain", "scenes", *small.settings(run, "train.steps=20")]) == 0
    return run


@pytest.fixture(scope="module")
def run(small: Small, encoders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train four steps with negative captions; the run evaluates at its end."""
    folder = tmp_path_factory.mktemp("retrieval") / "run"
    assert cli.main(arguments(small, encoders, folder, "task.foils=foils", "task.draw=2", "optim.lr=0.005")) == 0
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Recall


def test_recall_counts_ties_by_expectation() -> None:
    """Compare with the mean over all orders that the scores allow."""
    right = torch.tensor([[True, False, False, False], [False, True, True, False], [False, False, False, False]])
    scores = torch.tensor([[1.0, 1.0, 2.0, 1.0], [0.0, 3.0, 1.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    for k in (1, 2, 3):
        recalls = reranking.expected_recall(right, scores, k).tolist()
        for q in range(3):
            orders = [
                p
                for p in itertools.permutations(range(4))
                if all(scores[q, a] >= scores[q, b] for a, b in itertools.pairwise(p))
            ]
            hits = [any(bool(right[q, i]) for i in order[:k]) for order in orders]
            assert recalls[q] == pytest.approx(np.mean(hits)), (q, k)


def test_k_is_limited_to_the_gallery_and_recall_beyond_k_stays() -> None:
    g = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(3, 4, generator=g), torch.randn(6, 4, generator=g)
    rows, values = reranking.find_candidates(queries, gallery, 99)
    assert rows.sort(dim=1).values.tolist() == [list(range(6))] * 3
    assert torch.equal(values, (queries.double() @ gallery.double().T).gather(1, rows))
    assert (values.diff(dim=1) <= 0).all()
    right = rows == torch.tensor([[0], [1], [2]])
    out = reranking.reranking_metrics("way", right[:, :3], values[:, :3], {"way_R@1": 0.1, "way_R@5": 0.7, "way_R@10": 0.9})
    assert (out["reranked_way_R@5"], out["reranked_way_R@10"]) == (0.7, 0.9)
    assert out["way_ceiling"] == pytest.approx(float(right[:, :3].any(dim=1).double().mean()))
    # Chance puts the right one of three candidates first in a third of the cases in which it is there.
    assert out["chance_reranked_way_R@1"] == pytest.approx(out["way_ceiling"] / 3)
    assert out["chance_reranked_way_R@5"] == 0.7


@pytest.mark.parametrize("score", ["sum", "matching"])
def test_reranking_equals_sorting_every_pair(small: Small, run: Path, score: str) -> None:
    """Score each image with each caption by the whole model, one text per image, then sort."""
    loaded = finetune.load(run)
    loaded.task.config.score = score  # type: ignore[attr-defined]
    n, k = 18, 5
    out = loaded.evaluate(small.val, EvalConfig(batch_size=7, workers=0, max_samples=n), CPU)
    batches = read_batches(loaded, small.val, n)
    image = torch.cat([b.inputs["image"] for b in batches])
    texts = [captions[0] for b in batches for captions in b.targets["captions"]]
    ids, mask = loaded.decoders["text"].encode(texts)
    with torch.inference_mode():
        near = loaded.model.embed("image", image).double() @ loaded.model.embed("text", ids, mask).double().T
        rows = []
        for i in range(n):
            repeated = image[i : i + 1].expand(n, -1, -1, -1)
            rows.append(loaded.model({"image": repeated, "text": ids}, {"text": mask}, {})["match"].double())
        match = torch.stack(rows)
        scale = loaded.model.encoder.logit_scale.exp().double() if score == "sum" else 0.0
    second = match + scale * near
    for name, first, again in (("image_to_text", near, second), ("text_to_image", near.T, second.T)):
        hits = dict.fromkeys((1, 5), 0)
        inside = 0
        for q in range(n):
            order = first[q].argsort(descending=True)[:k].tolist()
            inside += q in order
            order.sort(key=lambda c, q=q, again=again: -float(again[q, c]))  # type: ignore[misc]
            for at in hits:
                hits[at] += q in order[:at]
        assert out[f"reranked_{name}_R@1"] == pytest.approx(hits[1] / n)
        assert out[f"reranked_{name}_R@5"] == pytest.approx(hits[5] / n)
        assert out[f"{name}_ceiling"] == out[f"{name}_R@5"] == pytest.approx(inside / n)
    assert (out["samples"], out["captions"], out["rerank_k"]) == (n, n, k)
    assert out["rerank_ms"] > 0
    assert out["chance_R@1"] == pytest.approx(1 / n)
    assert out["chance_text_to_image_ceiling"] == pytest.approx(k / n)
    assert out["chance_reranked_R@1"] == pytest.approx((out["image_to_text_ceiling"] + out["text_to_image_ceiling"]) / 2 / k)
    assert out["reranked_R@1"] == (out["reranked_image_to_text_R@1"] + out["reranked_text_to_image_R@1"]) / 2


def read_batches(loaded: Any, shards: str, count: int) -> list[Batch]:
    return list(loader.build_eval_loader(shards, {n: loaded.decoders[n] for n in ("image", "text")}, 8, max_samples=count))


def read_jpegs(shards: str, count: int) -> list[bytes]:
    with tarfile.open(shards.replace("*", "0000")) as tar:
        return [tar.extractfile(m).read() for m in tar.getmembers() if m.name.endswith("jpg")][:count]  # type: ignore[union-attr]


@pytest.mark.parametrize("score", ["sum", "matching"])
def test_predict_gives_the_order_that_evaluation_measures(small: Small, run: Path, score: str) -> None:
    """Sorting all pairs by predict's numbers gives the evaluated recall, where the matching logit alone gives another order."""
    model, n = clipfuse.load(run, device="cpu"), 18
    model._finetuned.task.config.score = score
    model._finetuned.task.config.rerank = n
    images, captions = (
        read_jpegs(small.val, n),
        [c[0] for b in read_batches(model._finetuned, small.val, n) for c in b.targets["captions"]],
    )
    answers = model.predict(images * n, [caption for caption in captions for _ in range(n)])
    assert {name for [(name, _)] in answers} == {"score" if score == "sum" else "match"}
    predicted = torch.tensor([value for [(_, value)] in answers], dtype=torch.float64).view(n, n)  # of caption and image
    out = model._finetuned.evaluate(small.val, EvalConfig(workers=0, max_samples=n), CPU)
    for k in (1, 5):
        for name, scores in (("text_to_image", predicted), ("image_to_text", predicted.T)):
            ranks = (scores > scores.diagonal()[:, None]).sum(dim=1)
            assert out[f"reranked_{name}_R@{k}"] == pytest.approx(float((ranks < k).double().mean()))
    ids, mask = model._finetuned.decoders["text"].encode(captions)
    pixels = torch.stack([model._finetuned.decoders["image"].decode_eval(image) for image in images])
    with torch.inference_mode():
        rows = [
            model._finetuned.model(
                {"image": pixels, "text": ids[i : i + 1].expand(n, -1)}, {"text": mask[i : i + 1].expand(n, -1)}, {}
            )["match"]
            for i in range(n)
        ]
    match = torch.stack(rows).double()
    assert torch.equal(match.argsort(dim=1), predicted.argsort(dim=1)) == (score == "matching")
    if score == "matching":
        torch.testing.assert_close(predicted, match.sigmoid())
    else:
        cosine = torch.from_numpy(model.encode_texts(captions) @ model.encode_images(images).T).double()
        torch.testing.assert_close(predicted, match + model.logit_scale * cosine, atol=1e-4, rtol=1e-4)


def test_several_captions_per_image_and_tokens_without_padding(small: Small, run: Path, tmp_path: Path) -> None:
    """Repeating each caption changes neither ceiling nor recall; k is limited to the gallery."""
    loaded = finetune.load(run)
    loaded.task.config.rerank = 1000  # type: ignore[attr-defined]
    samples = read_batches(loaded, small.val, 6)
    images = read_jpegs(small.val, 6)
    texts = [captions[0] for b in samples for captions in b.targets["captions"]]
    with tarfile.open(tmp_path / "twice-0000.tar", "w") as tar:
        for i, (image, text) in enumerate(zip(images, texts, strict=True)):
            content = {"jpg": image, "json": json.dumps({"captions": [text, text]}).encode()}
            for extension, data in content.items():
                member = tarfile.TarInfo(f"{i:04}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    once = loaded.evaluate(small.val, EvalConfig(batch_size=4, workers=0, max_samples=6), CPU)
    loaded.decoders["text"].caption = "captions"
    twice = loaded.evaluate(str(tmp_path), EvalConfig(batch_size=4, workers=0), CPU)
    assert (twice["captions"], twice["samples"], once["rerank_k"]) == (12, 6, 6)
    assert once["image_to_text_ceiling"] == twice["text_to_image_ceiling"] == 1.0
    assert twice["reranked_text_to_image_R@1"] == pytest.approx(once["reranked_text_to_image_R@1"])
    assert twice["reranked_image_to_text_R@1"] == pytest.approx(once["reranked_image_to_text_R@1"])


def test_nothing_to_rank_is_refused(run: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bad-0000.tar", "w") as tar:
        member = tarfile.TarInfo("a.txt")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"word"))
    with pytest.raises(UserError, match=r"nothing to rank in .*: 1 samples were left out"):
        finetune.load(run).evaluate(str(tmp_path), EvalConfig(workers=0), CPU)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_a_run_reports_both_losses_and_evaluates(run: Path) -> None:
    logged = [line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]
    assert len(logged) == 4
    for line in logged:
        assert line["loss"] == pytest.approx(line["contrastive_loss"] + line["matching_loss"], rel=1e-4)
    last = [line for line in read_jsonl(run / "metrics.jsonl") if "val/reranked_R@1" in line][-1]
    assert last["val/samples"] == 16


def test_resumed_bit_for_bit_with_the_same_negatives(small: Small, encoders: Path, run: Path, tmp_path: Path) -> None:
    """The resumed losses are identical; the same run also works in bf16."""
    again = tmp_path / "again"
    settings = ("task.foils=foils", "task.draw=2", "optim.lr=0.005")
    shutil.copytree(run, again)
    for path in (again / "checkpoints").iterdir():
        if path.name != "step-0000002":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert cli.main(arguments(small, encoders, again, *settings)) == 0
    assert read_losses(again) == read_losses(run)

    half = tmp_path / "half"
    assert cli.main(arguments(small, encoders, half, *settings, "train.precision=bf16", "train.steps=2")) == 0
    last = read_jsonl(half / "metrics.jsonl")[-1]
    assert 0 <= last["val/reranked_R@1"] <= last["val/text_to_image_ceiling"] <= 1
    assert all(math.isfinite(value) for value in read_losses(half).values())


def test_a_tower_copy_learns_and_embeddings_stay(small: Small, encoders: Path, tmp_path: Path) -> None:
    """Embeddings stay those of the pretrained encoders; export and WiSE-FT include the tower copy and late interaction."""
    folder = tmp_path / "run"
    settings = (
        "task.late_interaction=true",
        "adapt.fork=[text]",
        "adapt.trainable_blocks={image: 0, text: 0}",
        "task.contrastive=0",
        "optim.lr=0.005",
    )
    assert cli.main(arguments(small, encoders, folder, "task.foils=foils", *settings)) == 0
    loaded = finetune.load(folder)
    batch = read_batches(loaded, small.val, 3)[0]
    before = load_model(encoders).model.eval()
    with torch.no_grad():
        tokens, embedding = loaded.model.tokens_and_embedding("text", batch.inputs["text"], batch.masks["text"])
        pretrained_states = before.tower("text")(batch.inputs["text"], batch.masks["text"]).states
        assert torch.equal(embedding, before.encode("text", batch.inputs["text"], batch.masks["text"]))  # type: ignore[arg-type]
        assert torch.equal(loaded.model.embed("image", batch.inputs["image"]), before.encode("image", batch.inputs["image"]))
    assert not torch.equal(tokens.states, pretrained_states)
    weights = wise_ft.load_pretrained(loaded)
    assert {name for name in loaded.model.state_dict() if name.startswith("forks.")} <= weights.keys()
    export(loaded, tmp_path / "onnx")  # it compares outputs
    image, code = read_jpegs(small.val, 1)[0], (tmp_path / "onnx/README.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "picture.jpg").write_bytes(image)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace("picture.jpg", str(tmp_path / "picture.jpg")).replace('"onnx"', repr(str(tmp_path / "onnx"))), {})
    score = loaded.predict([image], ["a red car"]).score.item()
    assert float(printed.getvalue().strip("[]\n")) == pytest.approx(score, abs=0.05)  # the card resizes with another library
    assert loaded.evaluate(small.val, EvalConfig(workers=0, max_samples=4), CPU)["samples"] == 4


def tiny_task(**settings: Any) -> tuple[Any, retrieval.Retrieval]:
    task = retrieval.build(retrieval.Config(**settings), None)
    model = models.build(tiny.build_model("clip"), registry.get_component("fusion", "cross").Config(layers=1, heads=2), None)
    model.head = task.build_head(model)
    return model, task


def test_batches_without_negatives() -> None:
    model, task = tiny_task()
    for batch in (tiny.build_batch(0, 4).slice(0, 1), tiny.build_batch(0, 4)):
        batch.targets["caption_id"] = torch.zeros(len(batch), dtype=torch.int64)
        features = task.encode(model, batch)
        assert features["valid"].tolist() == [[True, False, False]] * len(batch)
        assert features["difficulty"].tolist() == [[1, 1, 1]] * len(batch)
        loss, report = task.loss(features, batch.targets)
        loss.backward()
        assert float(report["matching_loss"]) == 0.0  # positive pairs without negatives have no weight
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_siglip_encoders_use_the_sigmoid_loss() -> None:
    task = retrieval.build(retrieval.Config(), None)
    model = models.build(tiny.build_model("siglip"), registry.get_component("fusion", "cross").Config(layers=1, heads=2), None)
    model.head = task.build_head(model)
    batch = tiny.build_batch(0, 8)
    features = task.encode(model, batch)
    _, report = task.loss(features, batch.targets)
    expected = tiny.closed_form_loss("siglip", features)
    torch.testing.assert_close(report["contrastive_loss"], expected.detach())


def test_negative_captions_are_drawn_by_the_softmax_of_their_logits() -> None:
    """Check the frequencies of drawing two of three negative captions and one padding entry."""
    model, _ = tiny_task()
    n, batch = 3000, tiny.build_batch(0, 4)
    ids, mask = (values[None].expand(n, -1, -1) for values in (batch.inputs["text"], batch.masks["text"]))
    real = torch.tensor([True, True, False, True]).expand(n, -1)
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(1, 8, generator=generator)) for _ in range(2))
    with torch.no_grad():
        margin = (3 * image * (model.embed("text", ids[:1], mask[:1]) - text)).sum(dim=1)
        torch.manual_seed(0)
        pool = ids, mask, real
        negatives = matching_head._draw_negative_captions(model, 3 * image.expand(n, -1), text.expand(n, -1), pool, 2)
    assert negatives.valid.all()
    drawn = (negatives.logit_margin[..., None] - margin).abs().argmin(dim=2)
    torch.testing.assert_close(margin[drawn], negatives.logit_margin)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    probabilities = margin.masked_fill(~real[0], -math.inf).softmax(dim=0)
    frequencies = torch.bincount(drawn[:, 0], minlength=4) / n
    assert frequencies[2] == 0
    torch.testing.assert_close(frequencies, probabilities, rtol=0, atol=0.03)  # three standard errors
    p = probabilities.tolist()
    second = [sum(float(p[i] * p[j] / (1 - p[i])) for i in range(4) if i != j) for j in range(4)]
    torch.testing.assert_close(torch.bincount(drawn[:, 1], minlength=4) / n, torch.tensor(second), rtol=0, atol=0.03)
    states = model.tokens("text", batch.inputs["text"], batch.masks["text"]).states
    torch.testing.assert_close(negatives.tokens.states.unflatten(0, (n, 2))[:9], states[drawn[:9]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("score", "weighting"), [("sum", "undecided"), ("sum", "equal"), ("matching", "undecided")])
def test_pairs_are_weighted_by_difficulty_only_with_score_sum(score: str, weighting: str) -> None:
    """With score=matching, or where asked for, every pair has equal weight."""
    _, task = tiny_task(contrastive=0.0, score=score, weighting=weighting)
    match = torch.tensor([[2.0, 1.0, -1.0], [0.5, -3.0, 3.0]])
    real = torch.tensor([[True, True, True], [True, True, False]])
    difficulty = torch.tensor([[1.0, 0.25, 2.0], [1.0, 0.0, 1.0]])
    _, report = task.loss({"match": match, "valid": real, "difficulty": difficulty}, {})
    total = count = 0.0
    for logits, valid, difficulties in zip(match.tolist(), real.tolist(), difficulty.tolist(), strict=True):
        negatives = [valid[i] * difficulties[i] for i in (1, 2)]  # a positive pair has the weight of its negatives
        for i, z in enumerate(logits):
            is_weighted = (score, weighting) == ("sum", "undecided")
            weight = [sum(negatives), *negatives][i] if is_weighted else float(valid[i])
            total += weight * math.log1p(math.exp(z if i else -z))
            count += weight
    assert float(report["matching_loss"]) == pytest.approx(total / count)


def test_a_constant_prediction_is_warned_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    _, task = tiny_task(contrastive=0.0, score="matching")
    constant = {"match": torch.full((4, 3), math.log(0.5)), "valid": torch.ones(4, 3, dtype=torch.bool)}
    for _ in range(3 * retrieval.WINDOW):
        _, report = task.loss(constant, {})
    assert float(report["matching_loss"]) == pytest.approx(0.6365, abs=1e-4)
    message = " ".join(capsys.readouterr().err.split())
    assert message.count("warning") == 1
    assert "the matching loss was 0.6365; a constant prediction has 0.6365" in message

    _, task = tiny_task(contrastive=0.0, score="matching")
    better = constant["match"] + torch.tensor([0.5, 0.0, 0.0])
    for _ in range(retrieval.WINDOW):
        task.loss({**constant, "match": better}, {})
    assert "warning" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# NegativeCaptions, predictions, refusals


def test_negative_captions_of_a_sample(small: Small) -> None:
    decoder = NegativeCaptions(TextDecoder(load_tokenizer(small.tokenizer), 24), "foils", 2)

    def items(*fields: Any, train: bool = True) -> list[tuple[str, ...]]:
        samples = [RawSample("s/0", {"json": json.dumps(field).encode()}) for field in fields]
        return [decoder(sample, np.random.default_rng(i), train) for i, sample in enumerate(samples)]

    captions = items({"foils": [{"caption": " a  red car", "changed": "color"}, "a car", "", 3]}, {"foils": []}, {"other": 1})
    assert [sorted(item) for item in captions] == [["a car", "a red car"], [], []]
    assert decoder.targets(captions)["negative_mask"].tolist() == [[True, True], [False, False], [False, False]]
    ids, mask = decoder.collate(captions)
    assert ids.shape[:2] == mask.shape[:2] == (3, 2)
    assert torch.equal(decoder.merge([decoder.collate(captions[:1]), decoder.collate(captions[1:])])[0], ids)
    with pytest.raises(BadSample, match="foils is not a list"):
        items({"foils": "a red car"})


def test_a_run_says_whether_the_data_has_negative_captions(capsys: pytest.CaptureFixture[str]) -> None:
    def build(field: str | None) -> str:
        samples = [{"foils": ["a"]}, {}, {"foils": []}] * 100
        retrieval.build(retrieval.Config(foils=field), lambda: iter(samples))
        return capsys.readouterr().err

    assert build("foils") == "task.foils=foils: 86 of the first 256 samples have negative captions there\n"
    assert build("hard").startswith("task.foils=hard: none of the first 256 samples has this field in its json, so negatives")
    assert build(None) == ""
    retrieval.build(retrieval.Config(foils="foils"), None)  # of a run that is loaded
    assert capsys.readouterr().err == ""


def test_prediction_for_one_text_per_image(small: Small, run: Path) -> None:
    """Only with score=matching is the number a probability."""
    loaded = finetune.load(run)
    batch = read_batches(loaded, small.val, 3)[0]
    for setting, name in (("matching", "match"), ("sum", "score")):
        loaded.task.config.score = setting  # type: ignore[attr-defined]
        prediction = loaded.task.predict(loaded.model, {**batch.inputs}, batch.masks)
        assert [[name for name, _ in row] for row in prediction.best] == [[name]] * 3
        assert prediction.has_probabilities == (name == "match")
        for row, score in zip(prediction.best, prediction.score.tolist(), strict=True):
            assert row[0][1] == pytest.approx(1 / (1 + math.exp(-score)) if name == "match" else score)
        prediction.score.sum().backward()


@pytest.mark.parametrize(
    ("setup", "line"),
    [
        ("fusion=null", "fusion.query=text"),
        ("fusion.query=image fusion.context=text", "fusion.query=text"),
        ("train.chunks=2", "train.chunks=2: retrieval compares samples"),
        ("task.matching=0", "task.matching=0"),
        ("task.rerank=0", "task.rerank=0"),
        ("task.draw=3 task.pool=2", "task.pool=2 is smaller than task.draw=3"),
    ],
)
def test_refused_in_one_line(
    setup: str, line: str, small: Small, encoders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments(small, encoders, tmp_path / "run", *setup.split())) == 2
    assert line in " ".join(capsys.readouterr().err.split())
