"""Losses against open_clip, against the formulae in float64, and tiles against both."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import registry
from pretrain.errors import ConfigError
from pretrain.losses import clip, siglip, tiles

LOSSES = ["clip", "siglip"]
TILES = [1, 3, 8, 1000]


def pair(b: int = 13, d: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    draw = [F.normalize(torch.randn(b, d, generator=g, dtype=torch.float64), dim=1).to(dtype) for _ in range(2)]
    return {"image": draw[0].requires_grad_(), "text": draw[1].requires_grad_()}


def scalars(name: str, scale: float = 14.3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    scale_ = torch.full((1,), scale, dtype=dtype, requires_grad=True)
    return [scale_] if name == "clip" else [scale_, torch.full((1,), -3.0, dtype=dtype, requires_grad=True)]


def ours(name: str, features: dict[str, Tensor], scale: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    targets = options.pop("targets", {})
    module = registry.get_component("losses", name)
    loss, _ = module.build(module.Config(**options))(features, scale, bias, targets)
    return loss


def formula(name: str, features: dict[str, Tensor], scale: Tensor, bias: Tensor | None = None, ids: Any = None) -> Tensor:
    """The definition, pair by pair, by plain loops; the only vector operation is the dot product."""
    image, text = features["image"], features["text"]
    b = len(image)
    kept = [[j for j in range(b) if j == i or ids is None or ids[i] != ids[j]] for i in range(b)]
    dot = [[scale[0] * (image[i] @ text[j]) + (0 if bias is None else bias[0]) for j in range(b)] for i in range(b)]
    total: Any = 0
    for i in range(b):
        if name == "clip":
            forth, back = torch.stack([dot[i][j] for j in kept[i]]), torch.stack([dot[j][i] for j in kept[i]])
            total = total - (2 * dot[i][i] - forth.exp().sum().log() - back.exp().sum().log()) / 2
        else:
            total = total + sum((1 + ((-1 if i == j else 1) * dot[i][j]).exp()).log() for j in kept[i])
    return total / b


def gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, of))


def close(a: list[Tensor], b: list[Tensor], tol: float) -> None:
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
    features, extra = pair(), scalars(name)
    ids = torch.tensor([5, 1, 2, 5, 3, 4, 1, 6, 7, 5, 8, 9, 10])
    mine = ours(name, features, *extra, tile=tile, same_caption=same, targets={"caption_id": ids})
    reference = formula(name, features, *extra, ids=ids if same == "ignore" else None)
    leaves = [*features.values(), *extra]
    close([mine, *gradients(mine, *leaves)], [reference, *gradients(reference, *leaves)], 1e-12)


@pytest.mark.parametrize("tile", [0, 5, 64])
@pytest.mark.parametrize("name", LOSSES)
def test_agrees_with_open_clip(name: str, tile: int) -> None:
    features, extra = pair(48, 16, torch.float32), scalars(name, 10.0, torch.float32)
    peer = (ClipLoss() if name == "clip" else SigLipLoss())(features["image"], features["text"], *extra)
    mine = ours(name, features, *extra, tile=tile)
    leaves = [*features.values(), *extra]
    close([mine, *gradients(mine, *leaves)], [peer, *gradients(peer, *leaves)], 2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    """Rows of one process against the columns of all, with duplicates."""
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(4, 3, generator=g, dtype=torch.float64, requires_grad=True)
    columns = torch.randn(9, 3, generator=g, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([1, 2, 3, 1, 1, 4, 5, 3, 2])
    function = tiles.softmax_loss if name == "clip" else tiles.sigmoid_loss

    def loss(*x: Tensor) -> Tensor:
        if name == "siglip":  # every entry counts by itself: a rectangle is a loss
            return function(*x, offset=4, ids=(ids[4:8], ids), tile=2)[0]
        # A column's sum needs all rows, here as in a world of processes (test_losses_ranks.py): all rows, odd tiles.
        return function(x[1], x[0].repeat(3, 1)[:9], *x[2:], offset=0, ids=(ids, ids), tile=2)[0]

    assert torch.autograd.gradcheck(loss, (rows, columns, *scalars(name, 1.7)))


@pytest.mark.parametrize("tile", [0, 7])
@pytest.mark.parametrize("kind", ["alike", "opposite", "matched", "random"])
@pytest.mark.parametrize("name", LOSSES)
def test_stable_at_the_largest_scale(name: str, kind: str, tile: int) -> None:
    """Scale 100 in float32, from all partners opposite (logit -100) to all equal: as in float64, nothing overflows."""
    exact = pair(20, 8)
    if kind != "random":
        base = exact["image"].detach()[:1].expand(20, -1) if kind == "alike" else exact["image"].detach()
        exact = {"image": base.clone().requires_grad_(), "text": (base * (-1 if kind == "opposite" else 1)).clone()}
        exact["text"].requires_grad_()
    single = {k: v.detach().float().requires_grad_() for k, v in exact.items()}
    one, two = scalars(name, 100.0), scalars(name, 100.0, torch.float32)
    a, b = ours(name, exact, *one), ours(name, single, *two, tile=tile)
    assert float(b.detach()) == pytest.approx(float(a.detach()), rel=1e-5, abs=2e-5)
    for x, y in zip(gradients(b, *single.values(), *two), gradients(a, *exact.values(), *one), strict=True):
        assert torch.isfinite(x).all()
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("tile", [0, 9])
@pytest.mark.parametrize("name", LOSSES)
def test_bf16_features_are_compared_in_float32(name: str, tile: int) -> None:
    features = pair(33, 8, torch.bfloat16)
    exact = {k: v.detach().double().requires_grad_() for k, v in features.items()}
    extra = scalars(name, 60.0, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = ours(name, features, *extra, tile=tile)
    reference = ours(name, exact, *(s.detach().double() for s in extra))
    assert mine.dtype == torch.float32
    assert float(mine.detach()) == pytest.approx(float(reference.detach()), rel=1e-5)
    got = gradients(mine, *features.values())
    assert all(g.dtype == torch.bfloat16 for g in got)
    close(got, gradients(reference, *exact.values()), 4e-3)  # rounding of the result to bf16: 2^-9


@pytest.mark.parametrize("tile", [0, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_three_modalities_are_the_mean_of_three_pairs(name: str, tile: int) -> None:
    features = pair() | {"audio": pair(seed=5)["image"]}
    extra = scalars(name)
    mine = ours(name, features, *extra, tile=tile)
    parts = [
        formula(name, {"image": features[a], "text": features[b]}, *extra)
        for a, b in [("image", "text"), ("image", "audio"), ("text", "audio")]
    ]
    reference = torch.stack(parts).mean()
    leaves = [*features.values(), *extra]
    close([mine, *gradients(mine, *leaves)], [reference, *gradients(reference, *leaves)], 1e-12)


@pytest.mark.parametrize("tile", [0, 5])
@pytest.mark.parametrize("name", LOSSES)
def test_report_says_how_often_the_partner_is_best(name: str, tile: int) -> None:
    features, extra = pair(40, 3), scalars(name)
    module = registry.get_component("losses", name)
    _, report = module.build(module.Config(tile=tile))(features, extra[0], extra[1] if extra[1:] else None, {})
    best = (features["image"] @ features["text"].t()).argmax(dim=1) == torch.arange(40)
    assert report["image_to_text_accuracy"] == pytest.approx(float(best.double().mean()))
    assert not report["image_to_text_accuracy"].requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_one_caption(name: str) -> None:
    """All captions equal and left out: nothing to tell apart, and no NaN."""
    features, extra = pair(6), scalars(name)
    for tile in (0, 2):
        loss = ours(name, features, *extra, tile=tile, same_caption="ignore", targets={"caption_id": torch.zeros(6).long()})
        assert torch.isfinite(loss)
        assert name == "siglip" or float(loss.detach()) == pytest.approx(0, abs=1e-12)
        assert all(torch.isfinite(g).all() for g in gradients(loss, *features.values()))


def test_backward_twice_gives_the_same() -> None:
    for name in LOSSES:
        features, extra = pair(), scalars(name)
        loss = ours(name, features, *extra, tile=4)
        leaves = [*features.values(), *extra]
        first = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
        close(gradients(loss, *leaves), first, 1e-15)


class Largest(TorchDispatchMode):
    """The most numbers that any one tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_as_large_as_the_matrix(name: str, scale: float) -> None:
    b, d = 300, 4
    features, extra = pair(b, d, torch.float32), scalars(name, scale, torch.float32)
    with Largest() as largest:
        ours(name, features, *extra, tile=32, same_caption="ignore", targets={"caption_id": torch.arange(b) // 2}).backward()
    assert largest.numbers <= max(b * d, 32 * 32)


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError, match=r"loss\.tile=-1"):
        clip.Config(tile=-1).check()
    with pytest.raises(ConfigError, match="caption"):
        ours("clip", pair(), *scalars("clip"), same_caption="ignore")
    with pytest.raises(ConfigError, match="logit_bias"):
        ours("clip", pair(), *scalars("siglip"))
