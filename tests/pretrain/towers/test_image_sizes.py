"""Images of several sizes in one image tower, against timm's own dynamic_img_size."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

from pretrain import registry
from pretrain.errors import ConfigError
from pretrain.towers import timm as towers
from pretrain.towers.image_sizes import bicubic_weights, resample

VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 1, 1, 1)}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", {}),
    ("vit_tiny_patch16_224", {"reg_tokens": 2, "no_embed_class": True}),
    ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    ("deit_tiny_distilled_patch16_224", {}),
]


def build(name: str = "vit_tiny_patch16_224", size: int = 48, **changes: Any) -> towers.ImageTower:
    torch.manual_seed(0)
    tower: towers.ImageTower = registry.get_component("towers", "timm").build(towers.Config(name=name, size=size, **changes))
    return tower


def images(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("old", "new"), [((6, 6), 3), ((14, 14), 10), ((5, 5), 8), ((7, 7), 7)])
def test_resampled_positions_are_those_of_timm(old: tuple[int, int], new: int) -> None:
    table = torch.randn(1, 2 + old[0] * old[1], 16)
    expected = resample_abs_pos_embed(table, [new, new], list(old), 2)
    torch.testing.assert_close(resample(table, *(bicubic_weights(side, new) for side in old), 2), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("name", "more"), VARIANTS, ids=[f"{name} {more}" for name, more in VARIANTS])
def test_embeddings_and_gradients_are_those_of_timm(name: str, more: dict[str, Any]) -> None:
    """The image of the final size is encoded as without other sizes, bit for bit."""
    tower = build(name, args={**VIT, **more}).eval()
    before = tower(images(48)).pooled
    for size in (24, 40):
        tower.accept_size(size)
    assert torch.equal(tower(images(48)).pooled, before)
    reference = timm.create_model(name, img_size=48, num_classes=0, **{**VIT, **more, "dynamic_img_size": True}).eval()
    reference.load_state_dict(tower.model.state_dict())
    for size in (24, 40):
        out, expected = tower(images(size)), reference(tower.normalize(images(size)))
        assert out.grid == (size // 8, size // 8)
        torch.testing.assert_close(out.pooled, expected, rtol=1e-4, atol=1e-5)
        for pooled in (out.pooled, expected):
            (pooled * torch.linspace(-1, 1, pooled.shape[1])).sum().backward()
    for key, parameter in reference.named_parameters():
        if parameter.grad is not None:
            gradient = tower.model.get_parameter(key).grad
            assert gradient is not None
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-3 * float(parameter.grad.abs().max()))


STEM = {"stem": [16, 32], "args": {"embed_dim": 32, "depth": 2, "num_heads": 2}}


@pytest.mark.parametrize(("name", "more"), [("test_convnext", {}), ("vit_tiny_patch16_224", STEM)])
def test_convolutions_take_any_size(name: str, more: dict[str, Any]) -> None:
    tower = build(name, size=64, **more)
    tower.accept_size(32)
    assert tower.eval()(images(32)).pooled.shape == (3, tower.pooled_width)


@pytest.mark.parametrize(
    ("name", "size", "other", "more", "message"),
    [
        ("vit_tiny_patch16_224", 48, 36, {"args": VIT}, "not a multiple of vit_tiny_patch16_224's patch of 8 px"),
        ("swin_tiny_patch4_window7_224", 224, 112, {"args": SWIN}, "takes images of image.size=224 only"),
        ("eva02_tiny_patch14_224", 56, 28, {"args": {"depth": 1}}, "takes images of image.size=56 only"),
        ("resnet18", 64, 32, {"stride": 16}, "image.stride=16 is for images of one size"),
    ],
)
def test_what_a_tower_cannot_take_is_refused(name: str, size: int, other: int, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, size=size, **more).accept_size(other)


def test_patch_dropout_is_a_number_that_changes() -> None:
    tower = build(args=VIT, patch_dropout=0.5).train()
    for fraction, tokens in ((0.5, 18), (0.0, 36), (0.75, 9)):
        tower.set_patch_dropout(fraction)
        assert tower(images(48)).states.shape[1] == tokens
    assert tower.eval()(images(48)).states.shape[1] == 36
    without = build("test_convnext", size=32)
    without.set_patch_dropout(0.0)
    with pytest.raises(ConfigError, match=r"image\.patch_dropout=0\.5: this tower has no patch dropout"):
        without.set_patch_dropout(0.5)
