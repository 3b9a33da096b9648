"""Classification: labels, losses and metrics against scikit-learn and torch; runs of all kinds."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from sklearn.dummy import DummyClassifier
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

import finetune
from finetune.tasks import EvalConfig, classification, labels
from finetune.tasks.classification import Config
from launch import cli
from pretrain.data import BadSample
from pretrain.data.shards.paths import RawSample
from pretrain.errors import ConfigError, UserError
from tests.support import Small, read_jsonl

# ---------------------------------------------------------------------------------------------------------------------
# Metrics and losses


def test_single_label_metrics_equal_scikit_learns() -> None:
    """Class 4 of six is neither a label nor predicted; class 2 is not a label."""
    g = torch.Generator().manual_seed(0)
    label = torch.tensor([0, 1, 3, 5])[torch.randint(0, 4, (80,), generator=g)]
    logits = torch.randn(80, 6, generator=g) + 2 * F.one_hot(label, 6)
    logits[:, 4] = -50
    metrics = labels.single_label_metrics(logits, label, [1, 3, 9])
    probabilities, predicted = logits.softmax(dim=1).numpy(), logits.argmax(dim=1).numpy()
    assert metrics["top1"] == pytest.approx(sk.accuracy_score(label, predicted))
    assert metrics["top3"] == pytest.approx(sk.top_k_accuracy_score(label, probabilities, k=3, labels=range(6)))
    assert metrics["top9"] == 1.0
    assert metrics["macro_f1"] == pytest.approx(sk.f1_score(label, predicted, average="macro"))
    expected = [sk.roc_auc_score(label == c, probabilities[:, c]) for c in (0, 1, 3, 5)]
    assert metrics["auc"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert "auc" not in labels.single_label_metrics(logits[:2], torch.tensor([1, 1]), [1])  # a single class has no ROC curve


def test_multi_label_metrics_equal_scikit_learns() -> None:
    g = torch.Generator().manual_seed(0)
    target = torch.rand(60, 4, generator=g) < torch.tensor([0.5, 0.2, 0.9, 0.0])
    logits = torch.randn(60, 4, generator=g) + 2 * target - 1
    metrics = labels.multi_label_metrics(logits, target.float())
    predicted = (logits > 0).numpy()
    assert metrics["macro_f1"] == pytest.approx(
        sk.f1_score(target[:, :4], predicted, average="macro", zero_division=0), abs=1e-6
    )
    assert metrics["micro_f1"] == pytest.approx(sk.f1_score(target, predicted, average="micro"), abs=1e-6)
    assert metrics["exact"] == pytest.approx(sk.accuracy_score(target, predicted))
    expected = [sk.roc_auc_score(target[:, c], logits[:, c]) for c in range(3)]
    assert metrics["auc"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_chance_is_that_of_scikit_learns_dummy_classifier() -> None:
    g = torch.Generator().manual_seed(0)
    label = torch.tensor([0, 1, 1, 3])[torch.randint(0, 4, (80,), generator=g)]
    chance = labels.single_label_metrics(labels.prior_logits(F.one_hot(label, 5), several=False), label, [1, 2])
    dummy = DummyClassifier(strategy="most_frequent").fit(label, label).predict(label)
    assert chance["top1"] == pytest.approx(sk.accuracy_score(label, dummy))
    assert chance["top2"] == pytest.approx(float(label.bincount().sort().values[-2:].sum()) / 80)
    assert chance["macro_f1"] == pytest.approx(sk.f1_score(label, dummy, average="macro"))
    assert chance["auc"] == pytest.approx(0.5)
    target = torch.rand(60, 3, generator=g) < torch.tensor([0.7, 0.2, 0.9])
    chance = labels.multi_label_metrics(labels.prior_logits(target.float(), several=True), target.float())
    dummy = np.tile([1, 0, 1], (60, 1))
    assert chance["micro_f1"] == pytest.approx(sk.f1_score(target, dummy, average="micro"))
    assert chance["exact"] == pytest.approx(sk.accuracy_score(target, dummy))


def test_losses_equal_torchs() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 3, generator=g)
    label = torch.tensor([0, 0, 1, 0, 0, 2, 0, 1, 0])
    weights = {"a": 0.5, "b": 3.0}
    task = classification.build(Config(classes=["a", "b", "c"], class_weights=weights), None)
    loss, report = task.loss({"logits": logits}, {"label": label})
    torch.testing.assert_close(loss, F.cross_entropy(logits, label, weight=torch.tensor([0.5, 3.0, 1.0])))
    assert report["accuracy"] == sk.accuracy_score(label, logits.argmax(dim=1))
    task = classification.build(Config(classes=["a", "b", "c"], class_weights=weights, labels="multi"), None)
    target = F.one_hot(label, 3).float()
    expected = F.binary_cross_entropy_with_logits(logits, target, pos_weight=torch.tensor([0.5, 3.0, 1.0]))
    torch.testing.assert_close(task.loss({"logits": logits}, {"labels": target})[0], expected)


def test_balanced_weights_equal_scikit_learns() -> None:
    drawn = ["a"] * 7 + ["b"] * 2 + ["c"]
    expected = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=drawn)
    assert list(labels.balanced_weights(Counter(drawn), 10, several=False).values()) == pytest.approx(expected.tolist())
    assert labels.balanced_weights(Counter({"a": 5, "b": 2}), 10, several=True) == {"a": 1.0, "b": 4.0}


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def decode_labels(
    value: Any, several: bool = False, classes: tuple[str, ...] = ("cat", "3", "true"), train: bool = True
) -> list[int]:
    sample = RawSample("s/0", {"json": json.dumps({"label": value, "other": 1}).encode()})
    return labels.Labels("label", classes, several)(sample, np.random.default_rng(0), train)


def test_labels_are_names_whole_numbers_and_booleans() -> None:
    assert [decode_labels("cat"), decode_labels(3), decode_labels(3.0), decode_labels(True)] == [[0], [1], [1], [2]]
    assert decode_labels(["cat", "cat", 3], several=True) == [0, 1]
    assert decode_labels([], several=True) == []
    assert decode_labels("dog", train=False) == [-1]
    decoder = labels.Labels("label", ("a", "b"), several=True)
    assert decoder.targets([[0], [], [1, -1]])["labels"].tolist() == [[1, 0], [0, 0], [0, 1]]
    assert labels.sort_labels(["10", "b", "9", "a"]) == ["9", "10", "a", "b"]


@pytest.mark.parametrize(
    ("value", "several", "reason"),
    [("dog", False, "unknown label"), (None, False, "no label"), (["cat"], False, "wrong kind"), ("cat", True, "wrong kind"),
     (1.5, False, "wrong kind"), ("", False, "wrong kind"), ({"a": 1}, False, "wrong kind")],
)  # fmt: skip
def test_invalid_labels_are_bad_samples(value: Any, several: bool, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        decode_labels(value, several)


def test_classes_come_from_the_data_and_bad_data_is_refused() -> None:
    def build(values: list[Any], **settings: Any) -> Config:
        return classification.build(Config(**settings), lambda: iter([{"label": v} for v in values])).config

    assert build([2, 10, 2, None, "x"]).classes == ["2", "10", "x"]
    weighted = build(["a", "a", "a", "b"], balanced=True, class_weights={"b": 2.0})
    assert weighted.class_weights == pytest.approx({"a": 4 / 6, "b": 4.0})
    again = classification.build(weighted, None)  # from a checkpoint
    assert again.weights is not None
    assert again.weights.tolist() == pytest.approx([4 / 6, 4.0])
    assert build([["a"], [], ["a", "b"]], labels="multi").classes == ["a", "b"]
    with pytest.raises(UserError, match=r"no labels in the training data: task\.field=label"):
        build([None, None])
    with pytest.raises(ConfigError, match="every training sample has the same label, 'a'"):
        build(["a", "a"])
    with pytest.raises(ConfigError, match="'dog' is not one of the classes"):
        build(["a", "b"], class_weights={"dog": 1.0})
    with pytest.raises(ConfigError, match="no training sample has the label 'c'"):
        build(["a", "b"], classes=["a", "c"], balanced=True)
    with pytest.raises(UserError, match="is incomplete"):
        classification.build(Config(), None)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def encoders(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("encoders") / "run"
    assert cli.main(["pretrain", "scenes", *small.settings(run, "train.steps=3")]) == 0
    return run


@pytest.fixture(scope="module")
def pairs(small: Small, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write shards of KEY.left.jpg, KEY.right.jpg and json.

    `sentence` is a caption of the left image or a negative caption, `label` whether it is true, `kinds` the objects in the
    left image. One sample lacks its right image, one its label.
    """
    folder = tmp_path_factory.mktemp("pairs")
    with tarfile.open(small.train.replace("*", "0000")) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()[:150]}  # type: ignore[union-attr]
    keys = sorted({name.split(".")[0] for name in members})[:48]
    with tarfile.open(folder / "pairs-0000.tar", "w") as tar:
        for i, key in enumerate(keys):
            scene = json.loads(members[f"{key}.json"])
            is_true = i % 2 == 0 or not scene["foils"]
            values: dict[str, Any] = {
                "sentence": scene["captions"][0] if is_true else scene["foils"][0]["caption"],
                "label": is_true,
                "kinds": sorted({item["name"] for item in scene["objects"]}),
            }
            content = {"left.jpg": members[f"{key}.jpg"], "right.jpg": members[f"{keys[i - 1]}.jpg"]}
            if i == 7:
                del content["right.jpg"]
            if i == 9:
                del values["label"]
            for extension, data in {**content, "json": json.dumps(values).encode()}.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(folder)


def read_first_jpeg(shards: str) -> bytes:
    """Read the first image of the shards."""
    with tarfile.open(shards.replace("*", "0000")) as tar:
        return next(tar.extractfile(m).read() for m in tar.getmembers() if m.name.endswith("jpg"))  # type: ignore[union-attr]


def arguments(shards: str, encoders: Path, run: Path, *more: str) -> list[str]:
    return [
        "finetune", "classification", f"run={run}", f"init={encoders}", f"data.train={shards}", f"data.val={shards}",
        "data.batch_size=16", "data.workers=0", "data.max_bad_rate=0.1", "eval.workers=0", "eval.max_samples=48",
        "task.balanced=false", "optim.warmup=2", "train.log_every=1", "train.trackers=[]", "train.threads=1",
        "train.eval_every=0", "train.save_every=1000", *more,
    ]  # fmt: skip


FUSED = ("fusion.name=cross", "fusion.layers=1", "fusion.heads=2")


def test_one_label_per_image(small: Small, encoders: Path, tmp_path: Path) -> None:
    """Classifying the background by embeddings exceeds the accuracy of the majority class."""
    run = tmp_path / "run"
    learn = ("task.field=place", "task.balanced=true", "train.steps=40", "optim.lr=0.003", "data.batch_size=32")
    assert cli.main(arguments(small.val, encoders, run, *learn)) == 0
    losses = [line["loss"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    loaded = finetune.load(run)
    figures = [line for line in read_jsonl(run / "metrics.jsonl") if "val/macro_f1" in line][-1]
    assert figures["val/top1"] > figures["val/majority"]
    assert figures["val/chance_top1"] == pytest.approx(figures["val/majority"])
    assert figures["val/samples"] == 48
    assert {"val/top5", "val/auc", "val/unknown_labels"} <= set(figures)
    assert loaded.task.config.class_weights.keys() == set(loaded.task.config.classes)  # type: ignore[attr-defined]
    image = read_first_jpeg(small.val)
    best = loaded.predict([image], ["this text is not used"], top=99).best[0]
    assert len(best) == len(loaded.task.config.classes)  # type: ignore[attr-defined]
    assert sum(value for _, value in best) == pytest.approx(1)
    assert best == sorted(best, key=lambda item: -item[1])


@pytest.mark.parametrize(
    ("settings", "figures"),
    [
        (("task.text=sentence", "task.pictures=[left.jpg,right.jpg]", *FUSED), {"top1", "macro_f1", "auc"}),
        (("task.text=sentence", "task.pictures=[left.jpg,right.jpg]", "task.features=embedding"), {"top1", "macro_f1"}),
        (("task.text=sentence", "task.pictures=[left.jpg,left.jpg]", "fusion.name=merged", *FUSED[1:]), {"top1"}),
        (
            ("task.labels=multi", "task.field=kinds", "task.pictures=[left.jpg,right.jpg]", "train.precision=bf16"),
            {"micro_f1", "exact", "auc"},
        ),
    ],
    ids=["two images and a text, fused", "embeddings", "merged fusion", "several labels, bf16"],
)
def test_pairs(settings: tuple[str, ...], figures: set[str], pairs: str, encoders: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli.main(arguments(pairs, encoders, run, "train.steps=2", *settings)) == 0
    logged = [line for line in read_jsonl(run / "metrics.jsonl") if "val/macro_f1" in line][-1]
    assert {f"val/{name}" for name in figures} <= set(logged)
    lacking = ("left.jpg,left.jpg" not in str(settings)) + ("kinds" not in str(settings))
    assert (logged["val/samples"], logged["val/bad_samples"]) == (48 - lacking, lacking)


def test_swapping_the_two_images_changes_the_logits(pairs: str, encoders: Path, tmp_path: Path) -> None:
    """Both images are read, and their order matters."""
    run = tmp_path / "run"
    settings = ("task.text=sentence", "task.pictures=[left.jpg,right.jpg]", *FUSED, "train.steps=3", "optim.lr=0.01")
    assert cli.main(arguments(pairs, encoders, run, *settings)) == 0
    loaded = finetune.load(run)
    g = torch.Generator().manual_seed(0)
    with pytest.raises(UserError, match=r"compares two images \(left\.jpg, right\.jpg\), not one"):
        loaded.predict([read_first_jpeg(f"{pairs}/pairs-*.tar")], ["a red car"])
    two = torch.randint(0, 256, (1, 2, 3, 32, 32), generator=g, dtype=torch.uint8)
    ids, mask = loaded.decoders["text"].encode(["a red car"])
    with torch.no_grad():
        logits = [loaded.model({"image": images, "text": ids}, {"text": mask})["logits"] for images in (two, two.flip(1))]
    assert (logits[0] - logits[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "code", "line"),
    [
        (FUSED, 2, "has no text (task.text) to fuse with images"),
        (("task.text=txt", "task.features=fused"), 2, "features=fused needs a fusion"),
        (("task.features=fused",), 2, "needs a text to read the image"),
        (("task.pictures=[left.jpg]",), 2, "must name the extensions of two images"),
        (("task.field=nothing",), 1, "no labels in the training data: task.field=nothing"),
        (("task.field=objects",), 1, "no labels in the training data: task.field=objects"),
    ],
)
def test_refused_in_one_line(
    settings: tuple[str, ...], code: int, line: str, small: Small, encoders: Path, tmp_path: Path, capsys: Any
) -> None:
    assert cli.main(arguments(small.val, encoders, tmp_path / "run", *settings)) == code
    assert line in " ".join(capsys.readouterr().err.split())


def test_labels_that_are_not_among_the_classes(small: Small, encoders: Path, tmp_path: Path) -> None:
    """Evaluation counts some unknown labels separately, and refuses data in which all are unknown."""
    run = tmp_path / "run"
    assert cli.main(arguments(small.val, encoders, run, "train.steps=1", "task.field=place")) == 0
    loaded = finetune.load(run)
    dropped = loaded.task.config.classes.pop()  # type: ignore[attr-defined]
    loaded.decoders["labels"].ids.pop(dropped)
    config = EvalConfig(workers=0)
    metrics = loaded.evaluate(small.val, config, torch.device("cpu"))
    assert metrics["unknown_labels"] > 0
    loaded.decoders["labels"].ids.clear()
    with pytest.raises(UserError, match="has a label among the"):
        loaded.evaluate(small.val, config, torch.device("cpu"))
