"""Weights of pairs and negatives of images in both losses, against the formula pair by pair, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain import registry
from pretrain.errors import ConfigError
from pretrain.losses import normalize_weights
from pretrain.losses.softmax_tiles import softmax_loss
from pretrain.losses.tiles import PairLabels, Settings
from pretrain.training.objective import Contrastive

B, D, NEGATIVES = 11, 6, 2
LOSSES = ["clip", "siglip"]
SCALARS = {"clip": [14.3], "siglip": [14.3, -3.0]}


def make_batch(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return features as the model gives them, texts (B, 1 + NEGATIVES, D), and targets; some captions are equal."""
    g = torch.Generator().manual_seed(4)
    image = F.normalize(torch.randn(B, D, generator=g, dtype=torch.float64), dim=-1).requires_grad_()
    text = F.normalize(torch.randn(B, 1 + NEGATIVES, D, generator=g, dtype=torch.float64), dim=-1).requires_grad_()
    features = {"image": image, "text": text}
    for scalar, value in zip(("logit_scale", "logit_bias"), SCALARS[name], strict=False):
        features[scalar] = torch.full((1,), value, dtype=torch.float64, requires_grad=True)
    targets = {
        "caption_id": torch.tensor([5, 1, 2, 5, 3, 4, 1, 6, 7, 5, 8]),
        "negative_id": torch.tensor([[20 + i, 5 if i % 3 == 0 else 40 + i] for i in range(B)]),
        "negative_mask": torch.tensor([[i % 4 != 1, i % 5 != 2] for i in range(B)]),
        "weight": torch.tensor([1.0, 0.0, 2.5, 0.3, 1.0, 1e-6, 4.0, 1.0, 0.0, 0.5, 30.0], dtype=torch.float64),
    }
    return features, targets


def formula(name: str, features: dict[str, Tensor], targets: dict[str, Tensor], same: str) -> Tensor:
    """Return sum(w l) / sum(w), one logit at a time."""
    image, text, scale = features["image"], features["text"], features["logit_scale"][0]
    ids, bias, w = targets["caption_id"].tolist(), features.get("logit_bias", torch.zeros(1))[0], targets["weight"]
    total: Any = 0
    for i in range(B):
        columns = [(j, text[j, 0]) for j in range(B) if j == i or same == "keep" or ids[j] != ids[i]]
        negatives = [
            (j, text[j, 1 + f])
            for j in range(B)
            for f in range(NEGATIVES)
            if targets["negative_mask"][j, f] and (same == "keep" or targets["negative_id"][j, f] != ids[i])
        ]
        if name == "clip":
            row = torch.stack([scale * image[i] @ t for _, t in columns + negatives])
            column = torch.stack([scale * image[j] @ text[i, 0] for j, _ in columns])
            total = total + w[i] * (row.exp().sum().log() + column.exp().sum().log() - 2 * scale * image[i] @ text[i, 0]) / 2
        else:
            for is_partner, j, t in [(j == i, j, t) for j, t in columns] + [(False, j, t) for j, t in negatives]:
                logit = scale * image[i] @ t + bias
                total = total + (w[i] + w[j]) / 2 * (1 + (-logit if is_partner else logit).exp()).log()
    return total / w.sum()


def assert_close(a: list[Tensor], b: list[Tensor], tol: float) -> None:
    for x, y in zip(a, b, strict=True):
        x, y = x.detach().double(), y.detach()
        assert torch.linalg.norm(x - y) <= tol * max(float(torch.linalg.norm(y)), 1e-9)


def compute(name: str, features: dict[str, Tensor], targets: dict[str, Any], **settings: Any) -> Tensor:
    module = registry.get_component("losses", name)
    return Contrastive(module.build(module.Config(**settings))).loss(features, targets)[0]


@pytest.mark.parametrize("same", ["keep", "ignore"])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_are_those_of_the_formula(name: str, same: str) -> None:
    features, targets = make_batch(name)
    leaves = list(features.values())
    reference = formula(name, features, targets, same)
    expected = [reference, *torch.autograd.grad(reference, leaves)]
    for tile in (0, 1, 3, 1000):
        loss = compute(name, features, targets, tile=tile, same_caption=same)
        assert_close([loss, *torch.autograd.grad(loss, leaves)], expected, 1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_each_of_the_two_works_without_the_other(name: str) -> None:
    features, targets = make_batch(name)
    none = {"negative_mask": torch.zeros(B, NEGATIVES, dtype=torch.bool)}
    ones = {"weight": torch.ones(B)}
    captions_only = {**features, "text": features["text"][:, :1]}
    without_negatives = {key: value for key, value in targets.items() if not key.startswith("negative")}
    without_weights = {key: value for key, value in targets.items() if key != "weight"}
    for tile in (0, 4):
        reference = compute(name, features, {**targets, **none}, tile=tile)
        assert_close([compute(name, captions_only, without_negatives, tile=tile)], [reference], 1e-12)
        reference = compute(name, features, {**targets, **ones}, tile=tile)
        assert_close([compute(name, features, without_weights, tile=tile)], [reference], 1e-12)
        reference = compute(name, captions_only, {"caption_id": targets["caption_id"]}, tile=tile)
        plain = {**without_negatives, "weight": torch.full((B,), 0.37)}
        assert_close([compute(name, captions_only, plain, tile=tile)], [reference], 1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_weight_has_no_gradient(name: str) -> None:
    features, targets = make_batch(name)
    for tile in (0, 4):
        loss = compute(name, features, {**targets, "weight": torch.zeros(B)}, tile=tile)
        assert loss.item() == 0
        assert all(not grad.any() for grad in torch.autograd.grad(loss, list(features.values())))


@pytest.mark.parametrize(("method", "scale"), [("single_exp", 70.0), ("half_exp", 160.0), ("running_max", 160.0)])
def test_each_method_is_exact_with_weights(method: Any, scale: float) -> None:
    """float32 against float64 with logits from -scale to scale, and one weight that is nearly all there is."""
    g = torch.Generator().manual_seed(0)
    n, extra = 40, 7
    image, text = (F.normalize(torch.randn(k, 8, generator=g), dim=1) for k in (n, n + extra))
    text[3], text[5], text[n], image[9] = image[2], -image[2], image[4], -image[2]
    weights = torch.rand(n, generator=g)
    weights[[2, 7]] = torch.tensor([1e6, 0.0])
    weights = weights / weights.mean()
    padding = torch.zeros(n + extra, dtype=torch.uint8)
    padding[-1] = 1
    outcomes = []
    for dtype, chosen in ((torch.float64, "auto"), (torch.float32, method)):
        leaves = [x.to(dtype).requires_grad_() for x in (image, text, torch.tensor([scale]))]
        columns = torch.cat([weights, torch.ones(extra)]).to(dtype)
        labels = PairLabels(None, (weights.to(dtype), columns), padding, extra)
        loss, _ = softmax_loss(*leaves, labels=labels, settings=Settings(tile=7, method=chosen))
        outcomes.append([loss, *torch.autograd.grad(loss, leaves)])
    (reference, *expected), (loss, *computed) = outcomes
    assert float(loss.detach()) == pytest.approx(float(reference.detach()), rel=1e-5, abs=3e-7 * scale)
    for x, y in zip(computed, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5 * float(y.norm()) + 2e-5)


def test_weights_are_divided_by_their_mean() -> None:
    assert normalize_weights(torch.tensor([1.0, 3.0])).tolist() == [0.5, 1.5]
    assert normalize_weights(torch.tensor([0.0, 5e-324], dtype=torch.float64)).isfinite().all()
    assert normalize_weights(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


def test_kernels_refuse_both() -> None:
    features, targets = make_batch("clip")
    with pytest.raises(ConfigError, match=r"neither data\.weight nor data\.negatives"):
        compute("clip", features, targets, kernel="fused")


@pytest.mark.parametrize("name", LOSSES)
def test_a_mask_without_negatives_is_another_components(name: str) -> None:
    """The retrieval task has a target of that name, for its matching loss, and gives it to the contrastive loss as well."""
    features, targets = make_batch(name)
    module, scalars = registry.get_component("losses", name), [features["logit_scale"], features.get("logit_bias")]
    pair = {"image": features["image"], "text": features["text"][:, 0]}
    ids = {"caption_id": targets["caption_id"]}
    loss = module.build(module.Config(same_caption="ignore"))
    assert loss(pair, *scalars, {**ids, "negative_mask": targets["negative_mask"]})[0] == loss(pair, *scalars, ids)[0]
