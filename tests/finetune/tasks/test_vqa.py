"""VQA: reading and collating questions, loss in closed form, metrics by question, refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune import model as models
from finetune.attention.trace import Trace
from finetune.model import FusionModel
from finetune.tasks import EvalSetup, global_weighted_mean, vqa
from finetune.tasks.questions import Questions, read_questions
from pretrain import registry
from pretrain.data import BadSample
from pretrain.data.batch import Batch, collate, merge
from pretrain.data.images import ImageDecoder
from pretrain.data.sample_json import read_json
from pretrain.data.shards.paths import RawSample
from pretrain.data.text import TextDecoder, load_tokenizer
from pretrain.errors import ConfigError, UserError
from tests.support import Small, tiny

ANSWERS = ["red", "blue", "2", "yes"]


def sample(key: str, questions: Any, name: str = "questions") -> RawSample:
    return RawSample(f"shard/{key}", {"json": json.dumps({name: questions}).encode()})


def ask(text: str, *answers: str, kind: str | None = None) -> dict[str, Any]:
    return {"question": text, "answers": list(answers), **({"type": kind} if kind else {})}


@pytest.fixture
def questions(small: Small) -> Questions:
    return Questions(TextDecoder(load_tokenizer(small.tokenizer), 24), "questions", 3, ANSWERS)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_training_draws_without_replacement_and_pads(questions: Questions) -> None:
    many = sample("a", [ask(f"is it {i}?", "yes") for i in range(9)])
    draws = [[q.text for q in questions(many, np.random.default_rng(seed), True).questions] for seed in range(20)]
    assert all(len(set(draw)) == 3 for draw in draws)
    assert len({tuple(draw) for draw in draws}) > 10
    assert questions(many, np.random.default_rng(1), True) == questions(many, np.random.default_rng(1), True)
    few = questions(sample("b", [ask("what?", "red"), ask("who?", "blue")]), np.random.default_rng(0), True)
    assert (len(few.questions), few.real_count) == (3, 2)
    assert len(questions(many, np.random.default_rng(0), False).questions) == 9


def test_one_answer_is_read_where_answers_are_absent() -> None:
    """GQA and LLaVA write `answer`; in mixed data such questions were left out without a count."""
    entries = [
        ask("what color?", "red", "blue"),
        {"question": "how many?", "answer": "two"},
        {"question": "how many\ud800?", "answer": 3, "answers": None, "type": "count"},
        {"question": "is it?", "answers": [], "answer": ["Yes", "no"]},
        {"question": "who?", "answers": "red", "answer": "blue"},
        {"question": "where?", "answer": {"answer": "here"}},
        {"question": "left out?", "answer": ""},
    ]
    members = {"json": json.dumps({"questions": entries}).encode()}
    read = read_questions(read_json(members), "questions")
    assert [(q.text, q.answers, q.kind) for q in read] == [
        ("what color?", ["red", "blue"], "other"),
        ("how many?", ["2"], "other"),
        ("how many\ufffd?", ["3"], "count"),
        ("is it?", ["yes", "no"], "other"),
        ("who?", ["red"], "other"),
        ("where?", ["here"], "other"),
    ]
    with pytest.raises(BadSample) as caught:
        read_questions({"questions": [{"question": "what?", "reply": "red"}]}, "questions")
    assert caught.value.detail == (
        "none of the 1 entries of 'questions' has both a question and answers (or one answer); "
        "the first has the fields question, reply"
    )


def test_targets_are_the_official_accuracy_of_each_answer(questions: Questions) -> None:
    ten = ["red"] * 5 + ["Blue"] * 2 + ["The red."] + ["green"] * 2
    item = questions(sample("a", [ask("what color?", *ten), ask("how many?", "two")]), np.random.default_rng(0), False)
    targets = questions.targets([item])
    accuracies = [
        dict(zip(ids.tolist(), scores.tolist(), strict=True))
        for ids, scores in zip(targets["answers"][0], targets["scores"][0], strict=True)
    ]
    assert targets["scores"].shape == (1, 2, 10)
    assert accuracies[0][ANSWERS.index("blue")] == pytest.approx(0.6)  # 2 of 10; "green" is not in the vocabulary
    assert targets["scores"][0, 0].sum() == pytest.approx(1 + 0.6)
    assert targets["scores"][0, 1].tolist() == [1.0] + [0.0] * 9
    assert targets["answers"][0, 1, 0] == ANSWERS.index("2")
    assert targets["questions"] == [item.questions]


def test_answers_in_the_format_of_vqa_v2(questions: Questions) -> None:
    entries = [
        {"question": "what?", "answers": [{"answer": "red", "answer_id": 1}, {"answer": "Two"}]},
        {"question": "who?", "answers": "yes"},
    ]
    item = questions(sample("a", entries), np.random.default_rng(0), False)
    assert [q.answers for q in item.questions] == [["red", "2"], ["yes"]]


@pytest.mark.parametrize(
    "raw",
    [
        RawSample("shard/x", {}),
        RawSample("shard/x", {"json": b"{"}),
        sample("x", [ask("what?", "red")], name="captions"),
        sample("x", "what?"),
        sample("x", []),
        sample("x", [ask("  ", "red"), ask("what?"), {"answers": ["red"]}, "what?"]),
    ],
    ids=["no json", "not json", "other field", "not a list", "empty", "none complete"],
)
def test_samples_without_questions_are_bad(questions: Questions, raw: RawSample) -> None:
    with pytest.raises(BadSample):
        questions(raw, np.random.default_rng(0), True)


def test_only_questions_of_the_configured_types(small: Small) -> None:
    mixed = [ask("what color?", "red", kind="color"), ask("how many?", "two", kind="count"), ask("is it?", "yes", kind="yes")]
    text = TextDecoder(load_tokenizer(small.tokenizer), 24)
    some = Questions(text, "questions", 3, ANSWERS, ["color", "count"])
    assert [q.kind for q in some(sample("a", mixed), np.random.default_rng(0), False).questions] == ["color", "count"]
    for train, m in ((True, 3), (False, 1)):  # a sample without such questions is padding, not a bad sample
        none = some(sample("b", mixed[2:]), np.random.default_rng(0), train)
        assert (none.real_count, len(none.questions)) == (0, m)
        targets = some.targets([none])
        assert targets["question_mask"].sum() == targets["scores"].sum() == 0
        assert train or targets["questions"] == [[]]
    task = vqa.build(vqa.Config(types=["color", "count"]), lambda: iter([{"questions": mixed}]))
    assert task.learned_settings() == {"answers": ["2", "red"]}
    assert [q.text for q in task.questions({"questions": mixed})] == ["what color?", "how many?"]
    assert task.questions({"caption": "nothing asked"}) == []
    with pytest.raises(UserError, match=r"of task\.types \['hue'\]"):
        vqa.build(vqa.Config(types=["hue"]), lambda: iter([{"questions": mixed}]))


def test_merged_parts_equal_the_batch_collated_at_once(questions: Questions) -> None:
    words = ["what?", "how many red things are there in front of the big blue striped house over there?", "is it red?"]
    items = [
        questions(sample(str(i), [ask(words[i % 3], "red"), ask("who?", "yes")]), np.random.default_rng(i), True)
        for i in range(5)
    ]
    decoders = {"text": questions}
    keys = [f"k{i}" for i in range(5)]
    whole = collate({"text": items}, decoders, keys)
    parts = [collate({"text": items[a:b]}, decoders, keys[a:b]) for a, b in ((0, 1), (1, 5))]
    merged = merge(parts, decoders)
    assert whole.inputs["text"].shape[:2] == (5, 3)
    assert torch.equal(merged.inputs["text"], whole.inputs["text"])
    assert torch.equal(merged.masks["text"], whole.masks["text"])
    for name in ("answers", "scores", "question_mask"):
        assert torch.equal(merged.targets[name], whole.targets[name])


# ---------------------------------------------------------------------------------------------------------------------
# Model and loss


def build_tiny(**settings: Any) -> tuple[FusionModel, vqa.VQA]:
    """Build a tiny model whose zero-initialized layers are randomized, and its task."""
    task = vqa.build(vqa.Config(answers=ANSWERS, **settings), None)
    fusion = registry.get_component("fusion", "cross").Config(layers=1, heads=2)
    model = models.build(tiny.build_model("clip"), fusion, None)
    torch.manual_seed(1)
    model.head = task.build_head(model)
    with torch.no_grad():
        for p in [*model.fusion.parameters(), *model.head.parameters()]:  # type: ignore[union-attr]
            p.add_(0.2 * torch.randn_like(p))
    return model.eval(), task


def batch(m: int = 3, samples: int = 4) -> Batch:
    """Build a batch of images with 1 to m real questions each."""
    images, texts = tiny.build_batch(0, samples), tiny.build_batch(1, samples * m)
    g = torch.Generator().manual_seed(5)
    scores = torch.zeros(samples, m, 10)
    scores[..., :2] = torch.rand(samples, m, 2, generator=g)
    answers = torch.zeros(samples, m, 10, dtype=torch.int64)
    answers[..., 0] = torch.randint(0, 2, (samples, m), generator=g)
    answers[..., 1] = torch.randint(2, 4, (samples, m), generator=g)
    question_mask = (torch.arange(m) < 1 + torch.arange(samples)[:, None] % m).float()
    return Batch(
        {"image": images.inputs["image"], "text": texts.inputs["text"].unflatten(0, (samples, m))},
        {"text": texts.masks["text"].unflatten(0, (samples, m))},
        images.keys,
        {"answers": answers, "scores": scores * question_mask[..., None], "question_mask": question_mask},
    )


def test_tokens_are_the_encoders_projected_or_unprojected_states() -> None:
    b = tiny.build_batch(0, 4)
    encoder = tiny.build_model("clip", image={"pool": "avg"}, text={"pool": "avg"}).eval()
    aligned = models.build(encoder, None, None)  # auto: both pool their mean
    text = aligned.tokens("text", b.inputs["text"], b.masks["text"])
    assert torch.allclose(text.states, encoder.tokens("text", b.inputs["text"], b.masks["text"]).states)
    assert aligned.widths == {"image": 8, "text": 8}
    assert torch.allclose(aligned.embed("image", b.inputs["image"]), encoder.encode("image", b.inputs["image"]))
    tokens, embedding = models.build(encoder, None, None, "tower").tokens_and_embedding("image", b.inputs["image"])
    assert torch.equal(tokens.states, encoder.tower("image")(b.inputs["image"]).states)
    assert embedding is not None
    assert torch.allclose(embedding, encoder.encode("image", b.inputs["image"]))
    ends = tiny.build_model("clip", text={"pool": "eot"})
    assert models.build(ends, None, None).token_sources["text"] == "tower"
    with pytest.raises(ConfigError, match="text tower does not pool the mean"):
        models.build(tiny.build_model("clip", image={"pool": "avg"}, text={"pool": "eot"}), None, None, "aligned")


@pytest.mark.parametrize("name", ["cross", "co", "merged"])
def test_queries_and_keys_start_equal_where_tokens_are_aligned(name: str) -> None:
    """Query and key weights are tied for tokens in the shared space, not for the towers' own states."""
    fusion = registry.get_component("fusion", name).Config(layers=1, heads=1)
    encoder = tiny.build_model("clip", image={"pool": "avg"}, text={"pool": "avg"})
    for tokens, expected in (("aligned", True), ("tower", False)):
        torch.manual_seed(1)
        model = models.build(encoder, fusion, None, tokens)
        attentions = [m for n, m in model.fusion.named_modules() if n.endswith("cross_look")]  # type: ignore[union-attr]
        assert len(attentions) == {"cross": 1, "co": 2, "merged": 0}[name]
        for attention in attentions:
            q, k = attention.attention.q.weight, attention.attention.k.weight
            of_states, of_positions = k[:, : q.shape[1]], k[:, q.shape[1] :]
            is_tied = q.shape == of_states.shape and torch.equal(q, of_states) and not of_positions.any()
            assert is_tied == expected


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_loss_in_closed_form(loss: Any) -> None:
    model, task = build_tiny(loss=loss)
    b = batch()
    features = task.encode(model, b)
    value, report = task.loss(features, b.targets)
    terms, right = [], []
    for i in range(len(b)):
        for j in range(3):
            if not b.targets["question_mask"][i, j]:
                continue
            z = features["logits"][i, j].double()
            target = torch.zeros(4, dtype=torch.float64)
            for answer, score in zip(b.targets["answers"][i, j], b.targets["scores"][i, j], strict=True):
                target[answer] += score
            if loss == "softmax":
                terms.append(-(target * (z.exp() / z.exp().sum()).log()).sum())
            else:
                p = 1 / (1 + (-z).exp())
                terms.append(-(target * p.log() + (1 - target) * (1 - p).log()).sum())
            right.append(target[z.argmax()])
    assert value.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)
    assert report["accuracy"].item() == pytest.approx(torch.stack(right).mean().item(), rel=1e-5)


def test_questions_about_an_image_share_one_encoding_and_do_not_interact() -> None:
    model, task = build_tiny()
    b = batch()
    image_counts: list[int] = []
    handle = model.encoder.tower("image").register_forward_hook(lambda module, args, out: image_counts.append(len(args[0])))
    together = task.encode(model, b)["logits"]
    handle.remove()
    assert image_counts == [4]  # images, not questions
    for i in range(4):
        for j in range(3):
            alone = model(
                {"image": b.inputs["image"][i : i + 1], "text": b.inputs["text"][i : i + 1, j]},
                {"text": b.masks["text"][i : i + 1, j]},
            )
            assert torch.allclose(alone["logits"][0, 0], together[i, j], atol=1e-5)


def test_only_a_model_with_blind_ignores_the_image() -> None:
    b = batch()
    for blind in (True, False):
        model, task = build_tiny(blind=blind)
        before = task.encode(model, b)["logits"]
        b.inputs["image"] = b.inputs["image"].flip(0)
        assert torch.equal(before, task.encode(model, b)["logits"]) == blind


def test_predictions_have_probabilities_a_graph_and_a_trace() -> None:
    model, task = build_tiny()
    b = batch()
    inputs, masks = {"image": b.inputs["image"], "text": b.inputs["text"][:, 0]}, {"text": b.masks["text"][:, 0]}
    trace = Trace()
    prediction = task.predict(model, inputs, masks, trace, top=9)
    assert [len(row) for row in prediction.best] == [4] * 4  # the whole vocabulary
    for row in prediction.best:
        assert sum(p for _, p in row) == pytest.approx(1, abs=1e-5)
        assert [p for _, p in row] == sorted((p for _, p in row), reverse=True)
    assert prediction.score.shape == (4,)
    assert prediction.score.requires_grad
    assert trace.steps
    masks["text"][1] = False
    with pytest.raises(UserError, match="empty question"):
        task.predict(model, inputs, masks)


def test_weighted_mean_over_items_and_over_no_items() -> None:
    losses = torch.tensor([1.0, 2.0, 4.0])
    assert global_weighted_mean(losses, torch.tensor([1.0, 0.0, 1.0])).item() == pytest.approx(2.5)
    assert global_weighted_mean(losses, torch.zeros(3)).item() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def test_metrics_are_the_mean_over_single_questions(small: Small) -> None:
    """Compare with the answers in the shards' json and with predictions for one question at a time."""
    import tarfile

    tokenizer = load_tokenizer(small.tokenizer)
    text = registry.get_component("towers", "transformers").Config(
        length=24,
        pool="avg",
        args={
            "model_type": "clip_text_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    )
    image = registry.get_component("towers", "timm").Config(
        name="vit_tiny_patch16_224", size=32, pool="avg", args={"embed_dim": 16, "depth": 1, "num_heads": 2}
    )
    from pretrain.model import ModelConfig, build

    torch.manual_seed(0)
    encoder = build({"image": image, "text": text}, ModelConfig(dim=8), tokenizer)
    task = vqa.build(vqa.Config(answers=["red", "yes", "1", "left"]), None)
    model = models.build(encoder, registry.get_component("fusion", "cross").Config(layers=1, heads=2), None)
    model.head = task.build_head(model)
    decoders = task.build_decoders({"image": ImageDecoder(32), "text": TextDecoder(tokenizer, 24)})
    path = sorted(Path(small.val).parent.glob("val-*.tar"))[0]
    setup = EvalSetup(decoders, torch.device("cpu"), train=small.train)
    setup.config.workers, setup.config.batch_size, setup.config.max_samples = 0, 5, 12
    model.train()
    metrics = task.evaluate(model, str(path), setup)
    assert model.training

    model.eval()
    right: dict[str, list[float]] = {}
    truth: dict[str, list[str]] = {}
    with tarfile.open(path) as tar, torch.no_grad():
        names = sorted({name.split(".")[0] for name in tar.getnames()})[:12]
        for name in names:
            read = {end: tar.extractfile(f"{name}.{end}").read() for end in ("jpg", "json")}  # type: ignore[union-attr]
            image_tensor = decoders["image"].decode_eval(read["jpg"])[None]
            for question in json.loads(read["json"])["questions"]:
                ids, mask = decoders["text"].encode([question["question"]])
                answer = task.predict(model, {"image": image_tensor, "text": ids}, {"text": mask}).best[0][0][0]
                right.setdefault(question["type"], []).append(float(answer == question["answers"][0]))
                truth.setdefault(question["type"], []).append(question["answers"][0])
    assert metrics["questions"] == sum(map(len, right.values()))
    assert metrics["samples"] == 12
    all_values = [value for values in right.values() for value in values]
    assert metrics["accuracy"] == pytest.approx(sum(all_values) / len(all_values))
    assert 0 < metrics["accuracy"] < 1
    for kind, values in right.items():
        assert metrics[f"accuracy_{kind}"] == pytest.approx(sum(values) / len(values))
        majority = max(truth[kind].count(answer) for answer in truth[kind])
        assert metrics[f"chance_accuracy_{kind}"] == pytest.approx(majority / len(values))
    assert metrics["chance_accuracy"] >= max(metrics["accuracy"], 0.2)  # the model is not trained
    assert 0 < metrics["ceiling"] < 1
    assert metrics["blind_accuracy_existence"] == pytest.approx(0.5, abs=0.2)  # yes and no come in pairs
    assert metrics["blind_accuracy"] < 0.6


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_the_vocabulary_is_built_from_data_and_kept_in_the_settings(small: Small) -> None:
    rows = [{"questions": [ask("what?", "Red"), ask("who?", "red"), ask("how?", "two")]}, {"caption": "nothing asked"}]
    task = vqa.build(vqa.Config(vocabulary=1), lambda: iter(rows))
    assert task.learned_settings() == {"answers": ["red"]}
    assert vqa.build(vqa.Config(answers=["red"]), None).learned_settings() == {"answers": ["red"]}
    with pytest.raises(UserError, match=r"task\.field=questions"):
        vqa.build(vqa.Config(), lambda: iter([{"caption": "x"}]))
    llava = {"questions": [{"from": "human", "value": "what?"}]}
    with pytest.raises(
        UserError, match=r"no questions .*; in the first sample, none of the 1 entries of .* the fields from, value$"
    ):
        vqa.build(vqa.Config(), lambda: iter([llava]))
    with pytest.raises(UserError, match="same answer"):
        vqa.build(vqa.Config(), lambda: iter([{"questions": [ask("what?", "red")]}]))
    with pytest.raises(UserError, match="is incomplete"):
        vqa.build(vqa.Config(), None)


def test_a_fusion_that_does_not_fit_is_refused() -> None:
    task = vqa.build(vqa.Config(answers=ANSWERS), None)
    with pytest.raises(ConfigError, match="needs a fusion"):
        task.build_head(models.build(tiny.build_model("clip"), None, None))
    image_to_text = registry.get_component("fusion", "cross").Config(query="image", context="text", heads=2)
    with pytest.raises(ConfigError, match=r"fusion\.query=text"):
        task.build_head(models.build(tiny.build_model("clip"), image_to_text, None))
    with pytest.raises(ConfigError, match="must be at least 1"):
        vqa.Config(questions=0).check()
