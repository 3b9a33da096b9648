"""Losses compared with open_clip's and with their formulas in float64, dense and in tiles."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.nn import functional as F

from pretrain import registry
from pretrain.errors import ConfigError
from pretrain.losses import clip, siglip
from pretrain.losses.sigmoid_tiles import sigmoid_loss
from pretrain.losses.softmax_tiles import choose_method, softmax_loss
from pretrain.losses.tiles import PairLabels, Settings
from tests.support.largest_tensor import LargestTensor

LOSSES = ["clip", "siglip"]
TILES = [1, 3, 8, 1000]


def make_features(b: int = 13, d: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    draw = [F.normalize(torch.randn(b, d, generator=g, dtype=torch.float64), dim=1).to(dtype) for _ in range(2)]
    return {"image": draw[0].requires_grad_(), "text": draw[1].requires_grad_()}


def make_scalars(name: str, scale: float = 14.3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return the scale and, for siglip, the bias; (1,) each."""
    scale_ = torch.full((1,), scale, dtype=dtype, requires_grad=True)
    return [scale_] if name == "clip" else [scale_, torch.full((1,), -3.0, dtype=dtype, requires_grad=True)]


def compute_loss(name: str, features: dict[str, Tensor], scale: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """Return the loss under test. options: `targets`, and fields of its Config."""
    targets = options.pop("targets", {})
    module = registry.get_component("losses", name)
    loss, _ = module.build(module.Config(**options))(features, scale, bias, targets)
    return loss


def formula(name: str, features: dict[str, Tensor], scale: Tensor, bias: Tensor | None = None, ids: Any = None) -> Tensor:
    """Return the loss by its definition, pair by pair; the only vector operation is the dot product."""
    image, text = features["image"], features["text"]
    b = len(image)
    columns = [[j for j in range(b) if j == i or ids is None or ids[i] != ids[j]] for i in range(b)]
    dot = [[scale[0] * (image[i] @ text[j]) + (0 if bias is None else bias[0]) for j in range(b)] for i in range(b)]
    total: Any = 0
    for i in range(b):
        if name == "clip":
            to_text, to_image = torch.stack([dot[i][j] for j in columns[i]]), torch.stack([dot[j][i] for j in columns[i]])
            total = total - (2 * dot[i][i] - to_text.exp().sum().log() - to_image.exp().sum().log()) / 2
        else:
            total = total + sum((1 + ((-1 if i == j else 1) * dot[i][j]).exp()).log() for j in columns[i])
    return total / b


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def assert_close(a: list[Tensor], b: list[Tensor], tol: float) -> None:
    """Assert that the norm of each difference is at most `tol` times the norm of the reference `b`."""
    for x, y in zip(a, b, strict=True):
        x, y = x.detach().double(), y.detach().double()
        assert torch.linalg.norm(x - y) <= tol * max(float(torch.linalg.norm(y)), 1e-9)


# ---------------------------------------------------------------------------------------------------------------------


def test_constants() -> None:
    assert math.exp(clip.LOGIT_SCALE) == pytest.approx(1 / 0.07)
    assert (math.exp(siglip.LOGIT_SCALE), siglip.LOGIT_BIAS) == (pytest.approx(10), -10)
    assert clip.LOGIT_BIAS is None


@pytest.mark.parametrize("same", ["keep", "ignore"])
@pytest.mark.parametrize("tile", [0, *TILES])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_are_those_of_the_formula(name: str, tile: int, same: str) -> None:
    features, extra = make_features(), make_scalars(name)
    ids = torch.tensor([5, 1, 2, 5, 3, 4, 1, 6, 7, 5, 8, 9, 10])
    loss = compute_loss(name, features, *extra, tile=tile, same_caption=same, targets={"caption_id": ids})
    reference = formula(name, features, *extra, ids=ids if same == "ignore" else None)
    leaves = [*features.values(), *extra]
    assert_close([loss, *gradients(loss, *leaves)], [reference, *gradients(reference, *leaves)], 1e-12)


@pytest.mark.parametrize("tile", [0, 5, 64])
@pytest.mark.parametrize("name", LOSSES)
def test_agrees_with_open_clip(name: str, tile: int) -> None:
    features, extra = make_features(48, 16, torch.float32), make_scalars(name, 10.0, torch.float32)
    reference = (ClipLoss() if name == "clip" else SigLipLoss())(features["image"], features["text"], *extra)
    loss = compute_loss(name, features, *extra, tile=tile)
    leaves = [*features.values(), *extra]
    assert_close([loss, *gradients(loss, *leaves)], [reference, *gradients(reference, *leaves)], 2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    """The rows of one process against the columns of all processes, with duplicates."""
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(4, 3, generator=g, dtype=torch.float64, requires_grad=True)
    columns = torch.randn(9, 3, generator=g, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([1, 2, 3, 1, 1, 4, 5, 3, 2])
    function = softmax_loss if name == "clip" else sigmoid_loss

    def loss(*x: Tensor) -> Tensor:
        if name == "siglip":  # each pair has its own term, so that a part of the rows gives a loss
            return function(*x, offset=4, labels=PairLabels((ids[4:8], ids)), settings=Settings(tile=2))[0]
        # Each column's sum needs all rows, which several processes share (test_losses_ranks.py). Here: all rows, odd tiles.
        return function(
            x[1], x[0].repeat(3, 1)[:9], *x[2:], offset=0, labels=PairLabels((ids, ids)), settings=Settings(tile=2)
        )[0]

    assert torch.autograd.gradcheck(loss, (rows, columns, *make_scalars(name, 1.7)))


@pytest.mark.parametrize("tile", [0, 7])
@pytest.mark.parametrize("kind", ["alike", "opposite", "matched", "random"])
@pytest.mark.parametrize("name", LOSSES)
def test_stable_at_the_largest_scale(name: str, kind: str, tile: int) -> None:
    """At scale 100, float32 agrees with float64 and nothing overflows.

    Partners range from opposite (logit -100) to equal.
    """
    exact = make_features(20, 8)
    if kind != "random":
        base = exact["image"].detach()[:1].expand(20, -1) if kind == "alike" else exact["image"].detach()
        exact = {"image": base.clone().requires_grad_(), "text": (base * (-1 if kind == "opposite" else 1)).clone()}
        exact["text"].requires_grad_()
    single = {k: v.detach().float().requires_grad_() for k, v in exact.items()}
    exact_scalars, single_scalars = make_scalars(name, 100.0), make_scalars(name, 100.0, torch.float32)
    reference, loss = compute_loss(name, exact, *exact_scalars), compute_loss(name, single, *single_scalars, tile=tile)
    assert float(loss.detach()) == pytest.approx(float(reference.detach()), rel=1e-5, abs=2e-5)
    computed = gradients(loss, *single.values(), *single_scalars)
    for x, y in zip(computed, gradients(reference, *exact.values(), *exact_scalars), strict=True):
        assert torch.isfinite(x).all()
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("tile", [7, 64])
@pytest.mark.parametrize("kind", ["alike", "opposite", "matched", "random"])
@pytest.mark.parametrize(
    ("method", "scale"), [("single_exp", 70.0), ("half_exp", 100.0), ("half_exp", 160.0), ("running_max", 160.0)]
)
def test_each_method_is_exact_up_to_its_largest_logit(method: Any, scale: float, kind: str, tile: int) -> None:
    """float32 against open_clip's loss in float64, values and gradients, with logits from -scale to scale.

    A row of logits that are all -scale, and one of which all are scale, lie at the ends of what exponentials can hold.
    """
    image, text = (x.detach() for x in make_features(40, 8).values())
    if kind != "random":
        image = image[:1].repeat(40, 1) if kind == "alike" else image
        text = -image if kind == "opposite" else image.clone()
    text[3], text[5], image[9] = image[2], -image[2], -image[2]
    exact = [x.float().double().requires_grad_() for x in (image, text, torch.tensor([scale], dtype=torch.float64))]
    single = [x.detach().float().requires_grad_() for x in exact]
    reference = ClipLoss()(*exact)
    loss, _ = softmax_loss(*single, settings=Settings(tile=tile, method=method))
    assert float(loss.detach()) == pytest.approx(float(reference.detach()), rel=1e-6, abs=3e-7 * scale)
    for x, y in zip(gradients(loss, *single), gradients(reference, *exact), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5 * float(y.norm()) + 2e-5)


def test_an_accelerator_is_not_asked_for_the_bound() -> None:
    """Meta tensors stand for those of an accelerator: to read a number from one is an error."""
    rows, scale = torch.empty(4, 2, device="meta"), torch.empty(1, device="meta")
    methods = {bound: choose_method(rows, rows, scale, Settings(max_logit=bound)) for bound in (None, 60.0, 102.0, 200.0)}
    assert methods == {None: "running_max", 60.0: "single_exp", 102.0: "half_exp", 200.0: "running_max"}


@pytest.mark.parametrize("name", LOSSES)
def test_bf16_products_are_those_of_rounded_factors(name: str) -> None:
    """The value is the formula's, of factors rounded to bfloat16; gradients are within the rounding of the exact ones."""
    features, extra = make_features(33, 16, torch.float32), make_scalars(name, 20.0, torch.float32)
    loss = compute_loss(name, features, *extra, precision="bf16", tile=8)
    rounded = {
        "image": (features["image"] * extra[0]).bfloat16().double() / extra[0].double(),
        "text": features["text"].bfloat16().double(),
    }
    reference = formula(name, rounded, *(s.double() for s in extra))
    assert float(loss.detach()) == pytest.approx(float(reference.detach()), rel=1e-6)
    exact = compute_loss(name, features, *extra)
    leaves = [*features.values(), *extra]
    assert not torch.equal(loss, exact)
    assert_close(gradients(loss, *leaves), gradients(exact, *leaves), 2**-6)


@pytest.mark.parametrize("tile", [0, 9])
@pytest.mark.parametrize("name", LOSSES)
def test_bf16_features_are_compared_in_float32(name: str, tile: int) -> None:
    features = make_features(33, 8, torch.bfloat16)
    exact = {k: v.detach().double().requires_grad_() for k, v in features.items()}
    extra = make_scalars(name, 60.0, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = compute_loss(name, features, *extra, tile=tile)
    reference = compute_loss(name, exact, *(s.detach().double() for s in extra))
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(reference.detach()), rel=1e-5)
    computed = gradients(loss, *features.values())
    assert all(g.dtype == torch.bfloat16 for g in computed)
    assert_close(computed, gradients(reference, *exact.values()), 4e-3)  # rounding of the result to bf16: 2^-9


@pytest.mark.parametrize("tile", [0, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_three_modalities_are_the_mean_of_three_pairs(name: str, tile: int) -> None:
    features = make_features() | {"audio": make_features(seed=5)["image"]}
    extra = make_scalars(name)
    loss = compute_loss(name, features, *extra, tile=tile)
    pair_losses = [
        formula(name, {"image": features[a], "text": features[b]}, *extra)
        for a, b in [("image", "text"), ("image", "audio"), ("text", "audio")]
    ]
    reference = torch.stack(pair_losses).mean()
    leaves = [*features.values(), *extra]
    assert_close([loss, *gradients(loss, *leaves)], [reference, *gradients(reference, *leaves)], 1e-12)


@pytest.mark.parametrize("tile", [0, 5])
@pytest.mark.parametrize("name", LOSSES)
def test_report_gives_the_fraction_of_rows_whose_partner_scores_best(name: str, tile: int) -> None:
    features, extra = make_features(40, 3), make_scalars(name)
    module = registry.get_component("losses", name)
    _, report = module.build(module.Config(tile=tile))(features, extra[0], extra[1] if extra[1:] else None, {})
    is_best = (features["image"] @ features["text"].t()).argmax(dim=1) == torch.arange(40)
    assert report["image_to_text_accuracy"] == pytest.approx(float(is_best.double().mean()))
    assert not report["image_to_text_accuracy"].requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_equal_captions_has_a_finite_loss(name: str) -> None:
    """All captions are equal and so left out: no negatives remain, and nothing becomes NaN."""
    features, extra = make_features(6), make_scalars(name)
    for tile in (0, 2):
        loss = compute_loss(
            name, features, *extra, tile=tile, same_caption="ignore", targets={"caption_id": torch.zeros(6).long()}
        )
        assert torch.isfinite(loss)
        assert name == "siglip" or float(loss.detach()) == pytest.approx(0, abs=1e-12)
        assert all(torch.isfinite(g).all() for g in gradients(loss, *features.values()))


def test_a_second_backward_pass_gives_the_same_gradients() -> None:
    for name in LOSSES:
        features, extra = make_features(), make_scalars(name)
        loss = compute_loss(name, features, *extra, tile=4)
        leaves = [*features.values(), *extra]
        first = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
        assert_close(gradients(loss, *leaves), first, 1e-15)


@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("name", LOSSES)
def test_no_tensor_is_as_large_as_the_matrix_of_logits(name: str, scale: float) -> None:
    b, d = 300, 4
    features, extra = make_features(b, d, torch.float32), make_scalars(name, scale, torch.float32)
    with LargestTensor() as largest:
        compute_loss(
            name, features, *extra, tile=32, same_caption="ignore", targets={"caption_id": torch.arange(b) // 2}
        ).backward()
    assert largest.elements <= max(b * d, 32 * 32)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"loss\.tile=-1"):
        clip.Config(tile=-1).check()
    with pytest.raises(ConfigError, match=r"loss\.kernel=fused"):
        compute_loss("clip", make_features(), *make_scalars("clip"), kernel="fused")
    with pytest.raises(ConfigError, match="caption"):
        compute_loss("clip", make_features(), *make_scalars("clip"), same_caption="ignore")
    with pytest.raises(ConfigError, match="logit_bias"):
        compute_loss("clip", make_features(), *make_scalars("siglip"))
