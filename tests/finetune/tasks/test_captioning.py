"""Captioning: causality, loss in closed form, memorized sentences, metrics, resuming, WiSE-FT."""

import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import finetune
from finetune import model as models
from finetune.attention.trace import Trace
from finetune.model import FusionModel
from finetune.tasks import caption_metrics, captioning
from finetune.tasks.captioning import Captions
from launch import cli
from pretrain import registry
from pretrain.checkpoints.loading import load_model
from pretrain.data.text import TextDecoder, load_tokenizer
from pretrain.errors import ConfigError
from tests.support import Small, read_losses, tiny

BERT = {"model_type": "bert", "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
TEXTS = ["a red car left of a blue house", "two green trees", "a dog", "a cat under the yellow moon"]


def build_tiny(text: dict[str, Any] | None = None, **settings: Any) -> tuple[FusionModel, captioning.Captioning]:
    """Build a tiny decoder whose zero-initialized layers are randomized, and its task."""
    model = models.build(tiny.build_model("clip", text=text), _causal(), None)
    task = captioning.build(captioning.Config(**settings), None)
    torch.manual_seed(1)
    model.head = task.build_head(model)
    with torch.no_grad():
        for p in [*model.fusion.parameters(), *model.head.parameters()]:  # type: ignore[union-attr]
            p.add_(0.2 * torch.randn_like(p))
    return model.eval(), task


def _causal(**settings: Any) -> Any:
    return registry.get_component("fusion", "cross").Config(**{"layers": 1, "heads": 2, "causal": True, **settings})


# ---------------------------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("words", ["tower", "new"])
@pytest.mark.parametrize("text", [None, {"args": BERT, "pool": "avg"}], ids=["clip", "bert"])
def test_no_token_depends_on_later_ones(words: Any, text: Any) -> None:
    if text is not None and words == "tower":
        with pytest.raises(ConfigError, match="is bidirectional"):
            build_tiny(text, words=words)
        return
    model, task = build_tiny(text, words=words)
    batch = tiny.build_batch(samples=4)
    batch.masks["text"][:] = True
    before = task.encode(model, batch)["likelihood"]
    changed = batch.inputs["text"].clone()
    changed[:, 7:] = (changed[:, 7:] + 5) % tiny.VOCABULARY
    batch.inputs["text"] = changed
    after = task.encode(model, batch)["likelihood"]
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=1e-5, atol=1e-5)  # position t predicts token t + 1
    assert (after[:, 6:] - before[:, 6:]).abs().min(dim=1).values.max() > 1e-3
    batch.inputs["image"] = batch.inputs["image"].flip(0)
    assert (task.encode(model, batch)["likelihood"] - after).abs().max() > 1e-3  # and every position depends on the image


def test_loss_is_torchs_smoothed_cross_entropy_over_the_real_tokens() -> None:
    model, task = build_tiny(smoothing=0.2)
    batch = tiny.build_batch(samples=6)
    value, report = task.loss(task.encode(model, batch), {})
    image = model.tokens("image", batch.inputs["image"])
    logits = model.head.logits(model, image, batch.inputs["text"], batch.masks["text"])  # type: ignore[operator]
    rows, next_tokens = [], []
    for i in range(6):
        count = int(batch.masks["text"][i].sum())
        rows.append(logits[i, : count - 1])
        next_tokens.append(batch.inputs["text"][i, 1:count])
    logits, target = torch.cat(rows), torch.cat(next_tokens)
    torch.testing.assert_close(value, F.cross_entropy(logits, target, label_smoothing=0.2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(report["likelihood"], -F.cross_entropy(logits, target), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{"causal": False}, {"query": "image", "context": "text", "causal": False}])
def test_a_fusion_that_is_not_a_causal_decoder_is_refused(settings: dict[str, Any]) -> None:
    model = models.build(tiny.build_model("clip"), _causal(**settings), None)
    task = captioning.build(captioning.Config(), None)
    with pytest.raises(ConfigError, match=r"fusion\.causal=true"):
        task.build_head(model)
    model.fusion = None
    with pytest.raises(ConfigError, match=r"fusion\.name=cross"):
        task.build_head(model)


def plain_tokenizer() -> Any:
    """Build a tokenizer of whole words with an end token that it does not append by itself."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "<end>", "<unk>", *sorted({word for text in TEXTS for word in text.split()})]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="[PAD]", unk_token="<unk>")


def test_sentences_have_a_start_token_with_any_tokenizer(small: Small) -> None:
    tokenizer = load_tokenizer(small.tokenizer)
    decoder = Captions(TextDecoder(tokenizer, 24))
    ids, mask = decoder.encode(TEXTS)
    assert decoder.start == [tokenizer.bos_token_id]
    assert decoder.end == tokenizer.eos_token_id
    assert torch.equal(ids, TextDecoder(tokenizer, 24).encode(TEXTS)[0])

    decoder = Captions(TextDecoder(plain_tokenizer(), 12))
    ids, mask = decoder.encode(TEXTS)
    assert (decoder.start, decoder.end) == ([1], 1)
    assert ids[:, 0].tolist() == [1] * 4
    rows = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    assert all(row[-1] == 1 and 1 not in row[1:-1] for row in rows)
    assert [decoder.decode(row) for row in rows] == TEXTS
    assert set(decoder.banned) == {0, 2}


@pytest.mark.parametrize("words", ["tower", "new"])
def test_it_memorizes_sentences(words: Any) -> None:
    tokenizer = plain_tokenizer()
    model, task = build_tiny({"args": {"vocab_size": len(tokenizer) + 3}}, words=words, smoothing=0.0)
    towers = {"image": None, "text": TextDecoder(tokenizer, tiny.LENGTH)}
    captions = task.build_decoders(towers)["text"]
    batch = tiny.build_batch(samples=4)
    batch.inputs["text"], batch.masks["text"] = captions.encode(TEXTS)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss, report = task.loss(task.encode(model, batch), {})
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert report["likelihood"] > -0.1
    for search in ("greedy", "beam", "nucleus"):
        task.config.search = search  # type: ignore[assignment]
        with torch.no_grad():
            generated = task.generate(model, batch.inputs["image"], batch.keys)
        assert [captions.decode(ids) for ids in generated.ids] == TEXTS
        with torch.no_grad():
            features = task.encode(model, batch)
        # Over all tokens, of which some are never generated.
        likelihood = (features["likelihood"] * features["weights"]).sum(dim=1)
        torch.testing.assert_close(generated.scores.float(), likelihood, rtol=0, atol=0.02)
    trace = Trace()
    inputs = {"image": batch.inputs["image"], "text": batch.inputs["text"]}
    prediction = task.predict(model, inputs, batch.masks, trace)
    assert [row[0][0] for row in prediction.best] == TEXTS
    assert trace.steps
    assert prediction.score.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# CIDEr and BLEU


def test_scores_in_cases_known_by_definition(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")  # without Java
    exact = caption_metrics.score_captions(TEXTS, [[text, "something else"] for text in TEXTS])
    assert exact["BLEU_1"] == pytest.approx(1)
    assert (
        caption_metrics.score_captions(TEXTS, [[text] for text in TEXTS])["CIDEr"]
        > caption_metrics.score_captions(TEXTS, [[t] for t in TEXTS[::-1]])["CIDEr"]
    )
    assert caption_metrics.score_captions([TEXTS[0]], [[TEXTS[0]]])["CIDEr"] == 0  # one image: every word occurs in all images
    # 3 of 4 words are right, and the sentence is as long as the reference
    assert caption_metrics.score_captions(["A red car, flying!"], [["a red car standing"]])["BLEU_1"] == pytest.approx(0.75)
    assert capsys.readouterr().out == ""


def test_without_the_library_there_is_a_message_and_no_score(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    assert caption_metrics.score_captions(["a"], [["a"]]) == {}
    assert "pip install 'clipfuse[finetune]'" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("java") is None, reason="the Penn Treebank tokenizer is a Java program")
def test_the_plain_tokenizer_splits_ordinary_captions_as_the_penn_treebank_does(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["A red car, left of a blue house.", "Two big green trees!", "a cat under 3 yellow moons"]
    expected = caption_metrics._tokenize([[text] for text in texts])
    sentences = ["", texts[0]]  # an untrained model may generate an empty sentence
    scores = caption_metrics.score_captions(sentences, [[texts[1]], [texts[0]]])
    monkeypatch.setenv("PATH", "")
    assert caption_metrics._tokenize([[text] for text in texts]) == expected
    assert caption_metrics.score_captions(sentences, [[texts[1]], [texts[0]]]) == scores
    assert 0 < scores["BLEU_1"] < 1


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def encoders(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretrain a run of two steps."""
    run = tmp_path_factory.mktemp("encoders") / "run"
    assert cli.main(["pretrain", "scenes", *small.settings(run, "train.steps=2")]) == 0
    return run


def arguments(small: Small, encoders: Path, run: Path, *more: str) -> list[str]:
    return [
        "finetune", "captioning", f"run={run}", f"init={encoders}", f"data.train={small.train}", f"data.val={small.val}",
        "data.batch_size=16", "data.workers=0", "eval.workers=0", "eval.max_samples=8", "fusion.layers=1", "fusion.heads=2",
        "optim.warmup=2", "train.log_every=1", "train.trackers=[]", "train.threads=1", "train.eval_every=0",
        "train.save_every=2", "train.steps=4", "adapt.lora={rank: 2, dropout: 0.1}", "adapt.contrastive=0.5",
        "optim.average=0.5", "task.length=6", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def straight(small: Small, encoders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    assert cli.main(arguments(small, encoders, run)) == 0
    return run


def test_a_checkpoint_with_adapters_has_the_names_of_the_plain_model(encoders: Path, straight: Path) -> None:
    weights = load_file(straight / "checkpoints/step-0000004/model.safetensors")
    before = load_model(encoders).model.state_dict()
    assert {name.removeprefix("encoder.") for name in weights if name.startswith("encoder.")} == before.keys()
    moved = {name for name, value in before.items() if not torch.equal(value, weights[f"encoder.{name}"])}
    assert "projections.image.weight" in moved
    assert any("qkv.weight" in name for name in moved)
    assert not any("norm" in name or "embed" in name for name in moved)
    tuned = finetune.load(straight)
    assert tuned.model.encoder.state_dict().keys() == before.keys()
    report = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert all(line["contrastive_loss"] > 0 for line in report if "loss" in line)


def test_adapters_resume_bit_for_bit(small: Small, encoders: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for path in (run / "checkpoints").iterdir():
        if path.name != "step-0000002":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert cli.main(arguments(small, encoders, run)) == 0
    assert read_losses(run) == read_losses(straight)
    resumed, expected = (load_file(path / "checkpoints/step-0000004/model.safetensors") for path in (run, straight))
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


def test_metrics_and_interpolation_with_the_pretrained_model(
    small: Small, encoders: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mixed"
    options = ["--data", small.val, "--wise", "0,0.5,1", "--out", str(out), "--json"]
    assert cli.main(["evaluate", str(straight), *options]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["alpha"]: row for row in result["curve"]}
    assert set(rows) == {0.0, 0.5, 1.0}
    assert all({"likelihood", "CIDEr", "BLEU_4", "image_to_text_R@1"} <= row.keys() for row in rows.values())

    tuned = finetune.load(straight)
    metrics = tuned.evaluate(small.val, finetune.tasks.EvalConfig(workers=0), torch.device("cpu"))
    assert metrics["likelihood"] == pytest.approx(rows[1.0]["likelihood"], rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(torch.tensor(-metrics["likelihood"]).exp().item(), rel=1e-5)
    assert metrics["samples"] == 64
    mixed, start = finetune.load(out).model.state_dict(), load_model(encoders).model.state_dict()
    best, after = result["best"], tuned.model.state_dict()
    name = "encoder.projections.image.weight"
    expected: Tensor = (1 - best) * start[name.removeprefix("encoder.")] + best * after[name]
    torch.testing.assert_close(mixed[name], expected)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["evaluate", str(straight), "--data", small.val, "--wise", "half"])


def test_a_caption_is_generated_deterministically(small: Small, straight: Path) -> None:
    with tarfile.open(next(small.root.glob("scenes/val-*.tar"))) as shard:
        member = next(entry for entry in shard.getmembers() if entry.name.endswith((".jpg", ".png")))
        file = shard.extractfile(member)
        assert file is not None
        image = file.read()
    tuned = finetune.load(straight)
    first, again = (tuned.predict([image], [""]).best[0][0] for _ in range(2))
    assert first == again
    assert isinstance(first[0], str)
    assert first[1] < 0
