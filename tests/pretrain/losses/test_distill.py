"""loss.name=distill against its formula, one probability at a time, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain import registry
from pretrain.errors import ConfigError
from pretrain.losses import distill
from pretrain.training.objective import Contrastive
from tests.support import tiny

B, D = 9, 5


def unit(*shape: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


def make_batch(texts: int = 1) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return features, and targets with teachers of both modalities, of images and of texts; some samples lack some."""
    features = {"image": unit(B, D, seed=1), "text": unit(B, texts, D, seed=2), "logit_scale": torch.tensor([9.0]).double()}
    g = torch.Generator().manual_seed(3)
    masks = torch.rand(4, B, texts, generator=g) < 0.8
    both = {
        "image": 3 * unit(B, 7, seed=4),
        "image_mask": masks[0, :, 0],
        "text": unit(B, texts, 7, seed=5),
        "text_mask": masks[1],
    }
    image = {"image": unit(B, 4, seed=6), "image_mask": masks[2, :, 0]}
    text = {"text": unit(B, texts, 3, seed=7), "text_mask": masks[3]}
    targets = {"caption_id": torch.arange(B * texts).view(B, texts), "teachers": {"0": both, "1": image, "2": text}}
    if texts == 1:
        features["text"] = features["text"][:, 0]
        targets["caption_id"] = targets["caption_id"][:, 0]
        for teacher in (both, text):
            teacher |= {"text": teacher["text"][:, 0], "text_mask": teacher["text_mask"][:, 0]}
    return {name: value.requires_grad_() for name, value in features.items()}, targets


def divergence(student: Tensor, teacher: Tensor, other_student: Tensor, other_teacher: Tensor, scale: Any, t: float) -> Any:
    """Return the mean over rows of KL(teacher || student); embeddings of what both have only."""
    is_same, total = student is other_student, 0
    for i in range(len(student)):
        columns = [j for j in range(len(student)) if not (is_same and j == i)]
        p = [(teacher[i] @ other_teacher[j] / (teacher[i].norm() * other_teacher[j].norm()) / t).exp() for j in columns]
        q = [(scale[0] * student[i] @ other_student[j]).exp() for j in columns]
        for a, b in zip(p, q, strict=True):
            total = total + a / sum(p) * ((a / sum(p)).log() - (b / sum(q)).log())
    return total / len(student)


def formula(features: dict[str, Tensor], targets: dict[str, Any], weight: float, t: float) -> Any:
    """Return (1 - weight) clip + weight (mean over teachers of the mean over directions of KL)."""
    image, text, scale = features["image"], features["text"], features["logit_scale"]
    both, images, texts = targets["teachers"].values()
    m = both["image_mask"] & both["text_mask"]
    image_m, text_m = image[m], text[m]
    to_text = divergence(image_m, both["image"][m], text_m, both["text"][m], scale, t)
    to_image = divergence(text_m, both["text"][m], image_m, both["image"][m], scale, t)
    losses = [(to_text + to_image) / 2]
    for features_of, mask, vectors in (
        (image, images["image_mask"], images["image"]),
        (text, texts["text_mask"], texts["text"]),
    ):
        student, teacher = features_of[mask], vectors[mask]
        losses.append(divergence(student, teacher, student, teacher, scale, t))
    return (1 - weight) * tiny.closed_form_loss("clip", features) + weight * torch.stack(losses).mean()


def compute(features: dict[str, Tensor], targets: dict[str, Any], **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return Contrastive(distill.build(distill.Config(**settings))).loss(features, targets)


def assert_close(loss: Tensor, reference: Tensor, leaves: list[Tensor]) -> None:
    expected = [reference, *torch.autograd.grad(reference, leaves)]
    for x, y in zip([loss, *torch.autograd.grad(loss, leaves)], expected, strict=True):
        assert torch.linalg.norm(x - y) <= 1e-11 * torch.linalg.norm(y)


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 0.1), (1.0, 0.02), (0.0, 1.0)])
def test_value_and_gradients_are_those_of_the_formula(weight: float, temperature: float) -> None:
    features, targets = make_batch()
    loss, report = compute(features, targets, weight=weight, temperature=temperature)
    assert_close(loss, formula(features, targets, weight, temperature), list(features.values()))
    masks = [t["image_mask"] if "image" in t else t["text_mask"] for t in targets["teachers"].values()]
    masks[0] = masks[0] & targets["teachers"]["0"]["text_mask"]
    assert float(report["teacher_coverage"]) == pytest.approx(float(torch.stack(masks).double().mean()))


def test_each_of_several_captions_has_its_own_embedding() -> None:
    features, targets = make_batch(texts=3)
    losses = []
    for k in range(3):
        teachers = {
            name: {key: value[:, k] if key.startswith("text") else value for key, value in teacher.items()}
            for name, teacher in targets["teachers"].items()
        }
        losses.append(formula({**features, "text": features["text"][:, k]}, {"teachers": teachers}, 0.3, 0.1))
    loss, _ = compute(features, targets, weight=0.3, temperature=0.1)
    assert_close(loss, torch.stack(losses).mean(), list(features.values()))


def test_a_batch_without_teachers_embeddings_is_finite() -> None:
    features, targets = make_batch()
    for count in (0, 1):  # one image alone is similar to no other
        for teacher in targets["teachers"].values():
            for name in teacher:
                if name.endswith("mask"):
                    teacher[name] = torch.arange(B) < count
        loss, report = compute(features, targets, weight=0.5)
        assert float(report["distill_loss"]) == 0
        assert loss.item() == pytest.approx(tiny.closed_form_loss("clip", features).item() / 2)
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, list(features.values())))


def test_settings_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings, message in (
        ({"weight": 1.5}, r"loss\.weight=1\.5"),
        ({"temperature": 0.0}, r"loss\.temperature=0"),
        ({"exchange": "ring"}, r"loss\.exchange=ring"),
        ({"tile": -1}, r"loss\.tile=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            distill.Config(**settings).check()  # type: ignore[arg-type]
    monkeypatch.setattr(distill, "MAX_ENTRIES", B * B - 1)
    with pytest.raises(ConfigError, match="9 x 9 similarities"):
        compute(*make_batch())


def test_the_registry_has_it() -> None:
    assert registry.get_component("losses", "distill").NEEDS == ("teachers",)
