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
from pretrain.runtime import distributed
from pretrain.training.objective import Contrastive
from tests.support import tiny, world
from tests.support.largest_tensor import LargestTensor

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


@pytest.mark.parametrize("tile", [0, 2, 4, 9, 100])
@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 0.1), (1.0, 0.02), (0.0, 1.0)])
def test_value_and_gradients_are_those_of_the_formula(weight: float, temperature: float, tile: int) -> None:
    features, targets = make_batch()
    loss, report = compute(features, targets, weight=weight, temperature=temperature, tile=tile)
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


@pytest.mark.parametrize("tile", [0, 4])
def test_a_batch_without_teachers_embeddings_is_finite(tile: int) -> None:
    features, targets = make_batch()
    for count in (0, 1):  # one image alone is similar to no other
        for teacher in targets["teachers"].values():
            for name in teacher:
                if name.endswith("mask"):
                    teacher[name] = torch.arange(B) < count
        loss, report = compute(features, targets, weight=0.5, tile=tile)
        assert float(report["distill_loss"]) == 0
        assert loss.item() == pytest.approx(tiny.closed_form_loss("clip", features).item() / 2)
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, list(features.values())))


def build_teachers(b: int, width: int, dtype: torch.dtype, missing: float = 0.2) -> dict[str, dict[str, Tensor]]:
    """Return the targets of two teachers, one of images and texts, one of images, for all samples of a batch."""
    g = torch.Generator().manual_seed(8)
    image, text, alone = (torch.randn(b, width, generator=g, dtype=torch.float64).to(dtype) for _ in range(3))
    masks = torch.rand(3, b, generator=g) >= missing
    both = {"image": image, "image_mask": masks[0], "text": text, "text_mask": masks[1]}
    return {"0": both, "1": {"image": alone, "image_mask": masks[2]}}


def compute_share(b: int, tile: int, dtype: torch.dtype, scale: float) -> list[Tensor]:
    """Return loss and gradients of this rank's share of a batch of b, averaged over ranks as DDP averages.

    The gradients are those of a linear encoder for each modality, and of the scale.
    """
    g = torch.Generator().manual_seed(7)
    inputs = {m: torch.randn(b, 6, generator=g, dtype=torch.float64).to(dtype) for m in ("image", "text")}
    weights = {m: torch.randn(6, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for m in ("image", "text")}
    factor = torch.tensor([scale], dtype=dtype, requires_grad=True)
    rows = b // distributed.world_size()
    local = slice(distributed.rank() * rows, (distributed.rank() + 1) * rows)
    features = {m: F.normalize(inputs[m][local] @ weights[m], dim=1) for m in inputs}
    teachers = {i: {n: x[local] for n, x in t.items()} for i, t in build_teachers(b, 5, dtype).items()}
    targets = {"caption_id": torch.arange(b)[local], "teachers": teachers}
    loss, _ = distill.build(distill.Config(tile=tile, weight=0.7))(features, factor, None, targets)
    loss.backward()
    gradients = [leaf.grad for leaf in (*weights.values(), factor) if leaf.grad is not None]
    return [distributed.mean(x) for x in (loss.detach(), *gradients)]


def compute_all_shares() -> list[list[Tensor]]:
    return [compute_share(24, tile, torch.float64, 30.0) for tile in (0, 1, 4, 7, 50)]


@pytest.mark.parametrize("processes", [2, 4])
def test_tiles_on_several_processes_are_the_formula_on_one(processes: int) -> None:
    expected = compute_share(24, 0, torch.float64, 30.0)
    for results in [compute_all_shares(), *world.run(compute_all_shares, processes)]:
        for computed in results:
            for x, y in zip(computed, expected, strict=True):
                assert torch.linalg.norm(x - y) <= 1e-11 * torch.linalg.norm(y)


def test_teachers_side_by_side_give_the_gradients_of_the_published_ensemble() -> None:
    """MobileCLIP's code averages the softmaxes of its teachers, and its loss is the cross-entropy with that average."""
    features, targets = make_batch()
    teachers = build_teachers(B, 8, torch.float64, missing=0)["0"]
    halves = {
        str(i): {name: x if name.endswith("mask") else x[:, 4 * i : 4 * i + 4] for name, x in teachers.items()}
        for i in range(2)
    }
    loss, _ = compute(features, {**targets, "teachers": halves}, weight=1.0, temperature=0.01)
    image, text, scale = features["image"], features["text"], features["logit_scale"]
    expected = torch.zeros(())
    for rows, columns, a, b in ((image, text, "image", "text"), (text, image, "text", "image")):
        parts = [(100 * F.normalize(t[a], dim=1) @ F.normalize(t[b], dim=1).T).softmax(dim=1) for t in halves.values()]
        expected = expected - ((parts[0] + parts[1]) / 2 * (scale * rows @ columns.T).log_softmax(dim=1)).sum(dim=1).mean() / 2
    leaves = list(features.values())
    for x, y in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert torch.linalg.norm(x - y) <= 1e-11 * torch.linalg.norm(y)


@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_float32_is_close_to_float64(scale: float) -> None:
    """In tiles as by the formula: the largest error of both, relative to the norm of each result, is about 1e-6."""
    expected = compute_share(300, 0, torch.float64, scale)
    for tile in (0, 64):
        for x, y in zip(compute_share(300, tile, torch.float32, scale), expected, strict=True):
            assert torch.linalg.norm(x.double() - y) <= 2e-6 * torch.linalg.norm(y), tile


def test_no_matrix_of_the_batch_is_held() -> None:
    b, d, tile = 96, 8, 16
    g = torch.Generator().manual_seed(0)
    features = {m: F.normalize(torch.randn(b, d, generator=g), dim=1).requires_grad_() for m in ("image", "text")}
    targets = {"caption_id": torch.arange(b), "teachers": build_teachers(b, 5, torch.float32)}
    sizes = {}
    for side in (0, tile):
        with LargestTensor() as largest:
            distill.build(distill.Config(tile=side))(features, torch.ones(1), None, targets)[0].backward()
        sizes[side] = largest.elements
    assert sizes[0] >= b * b
    assert sizes[tile] <= b * d


def test_large_batches_are_computed_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = distill.divergence
    monkeypatch.setattr(distill, "divergence", lambda *args: calls.append(len(args[0])) or original(*args))
    for b in (362, 363):  # squares of 131,044 and 131,769; DENSE_LIMIT is 131,072
        features = {m: unit(b, 4, seed=i) for i, m in enumerate(("image", "text"))}
        targets = {"caption_id": torch.arange(b), "teachers": build_teachers(b, 5, torch.float64)}
        distill.build(distill.Config())(features, torch.ones(1).double(), None, targets)
    assert calls == [363, 363, 363]


def test_settings_that_cannot_be() -> None:
    for settings, message in (
        ({"weight": 1.5}, r"loss\.weight=1\.5"),
        ({"temperature": 0.0}, r"loss\.temperature=0"),
        ({"exchange": "ring"}, r"loss\.exchange=ring"),
        ({"tile": -1}, r"loss\.tile=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            distill.Config(**settings).check()  # type: ignore[arg-type]


def test_the_registry_has_it() -> None:
    assert registry.get_component("losses", "distill").NEEDS == ("teachers",)
