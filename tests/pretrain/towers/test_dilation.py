"""image.stride: finer tokens by dilation, against timm's own dilated models and the same tower without it."""

from __future__ import annotations

from math import ceil
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from finetune.attention.trace import Trace
from finetune.context import coarse_to_fine, dense, pooled
from finetune.explain.attribution import compute_attention_maps
from finetune.fusion import cross
from pretrain.errors import ConfigError
from pretrain.model import DualEncoder
from pretrain.towers import timm as images
from pretrain.towers.timm import ImageTower
from pretrain.training.flops import FlopCounter, build_sample

CONVOLUTIONAL: dict[str, dict[str, Any]] = {
    "resnet": {"name": "resnet18", "args": {"channels": [8, 8, 12, 16], "layers": [1, 1, 2, 2]}},
    "resnet-d": {"name": "resnet26d", "args": {"channels": [8, 8, 12, 16], "layers": [1, 1, 2, 2]}},
    "regnet": {"name": "regnetx_002", "args": {}},
    "mobilenet": {"name": "mobilenetv2_050", "args": {}},
    "tensorflow's padding": {"name": "tf_efficientnet_lite0", "args": {}},
    "convnext": {"name": "convnext_atto", "args": {"dims": [8, 12, 16, 24], "depths": [1, 1, 2, 2]}},
    "convnext pooled by the mean": {
        "name": "convnext_atto",
        "args": {"dims": [8, 12, 16, 24], "depths": [1, 1, 2, 2]},
        "pool": "avg",
    },
}
"""Models whose layers look at neighborhoods only, as images.Config takes them."""
CASES = [(name, 64, 16) for name in CONVOLUTIONAL]
CASES += [(name, 75, 8) for name in ("resnet", "tensorflow's padding")]
CASES += [("tensorflow's padding", 64, 8), ("tensorflow's padding", 75, 16), ("convnext", 64, 8)]


def build_tower(name: str, size: int, stride: int | None) -> ImageTower:
    """Build a tower in eval mode, with the same weights at each call.

    Gains, biases and statistics are random: gains of 0, as of new residual branches, would hide what the branches compute.
    """
    torch.manual_seed(0)
    tower = images.build(images.Config(size=size, stride=stride, **CONVOLUTIONAL.get(name, {"name": name})))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in tower.model.state_dict().values():
            if tensor.dim() == 1:
                tensor.copy_(0.3 + torch.rand(tensor.shape, generator=generator))
    return tower.eval()


def draw_images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize(("name", "size", "stride"), CASES)
def test_tokens_are_those_of_timms_dilated_model_and_the_pooled_vector_stays(name: str, size: int, stride: int) -> None:
    plain, tower, pixels = build_tower(name, size, None), build_tower(name, size, stride), draw_images(size)
    assert tower.state_dict().keys() == plain.state_dict().keys(), "a checkpoint without image.stride must load"
    states, mask, grid, pooled_vector = tower(pixels)
    side = ceil(size / stride)
    assert grid == (side, side)
    assert mask.shape == states.shape[:2] == (2, side * side)
    torch.testing.assert_close(pooled_vector, plain(pixels).pooled, atol=1e-5, rtol=1e-4)
    assert (tower.pools_mean, tower.pools_max, tower.width) == (plain.pools_mean, plain.pools_max, plain.width)

    settings = CONVOLUTIONAL[name]
    reference: Any = timm.create_model(settings["name"], num_classes=0, output_stride=stride, **settings["args"])
    reference.load_state_dict(plain.model.state_dict())
    features = reference.eval().forward_features(pixels)
    if "pool" in settings:
        features = reference.head.norm(features)
    torch.testing.assert_close(states, features.permute(0, 2, 3, 1).flatten(1, 2))


@torch.no_grad()
def test_the_pooled_vector_is_the_mean_of_the_coarser_tokens() -> None:
    """A tower that pools by the mean does so over the tokens that it has without image.stride: every second of the finer."""
    tower = build_tower("convnext pooled by the mean", 64, 16)
    states, _, grid, pooled_vector = tower(draw_images(64))
    assert grid == (4, 4)
    torch.testing.assert_close(states.unflatten(1, grid)[:, ::2, ::2].mean(dim=(1, 2)), pooled_vector)
    assert tower.pools_mean


@torch.no_grad()
def test_with_squeeze_and_excitation_the_pooled_vector_stays_nearly() -> None:
    pixels = draw_images(64)
    out, expected = build_tower("regnety_002", 64, 16)(pixels), build_tower("regnety_002", 64, None)(pixels).pooled
    assert out.grid == (4, 4)
    assert not torch.allclose(out.pooled, expected)
    assert nn.functional.cosine_similarity(out.pooled, expected).min() > 0.9


def test_gradients_reach_the_weights_from_tokens_and_from_the_pooled_vector() -> None:
    tower = build_tower("resnet", 64, 16).train()
    for output in ("states", "pooled"):
        tower.zero_grad()
        getattr(tower(draw_images(64)), output).square().sum().backward()
        assert all(p.grad is not None for p in tower.parameters())


def test_it_builds_without_weights() -> None:
    with torch.device("meta"):
        empty = images.build(images.Config(size=64, stride=16, **CONVOLUTIONAL["tensorflow's padding"]))
    tower = build_tower("tensorflow's padding", 64, 16)
    assert all(p.is_meta for p in empty.parameters())
    assert empty._coarse_cells == tower._coarse_cells
    assert (empty.width, empty.pools_mean) == (tower.width, tower.pools_mean)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "vit_tiny_patch16_224", "stride": 8}, "image.stride=8: timm does not dilate vit_tiny_patch16_224"),
        ({"name": "vit_tiny_patch16_224", "stride": 16}, "tokens of a vision transformer are its patches"),
        ({"name": "swin_tiny_patch4_window7_224", "size": 224, "stride": 16}, "does not dilate swin_tiny_patch4_window7_224"),
        ({"name": "densenet121", "stride": 16}, "does not dilate densenet121"),
        ({"name": "resnet18", "stride": 24}, "image.stride=24 must divide the stride of resnet18, 32 px: 16 or 8"),
        ({"name": "resnet18", "stride": 64}, "must divide the stride of resnet18, 32 px"),
        ({"name": "resnet18", "stride": 4}, "image.stride=4: timm does not dilate resnet18 to this stride"),
        (
            {"name": "resnet18", "stride": 16, "args": {"channels": [8, 8, 8, 8]}},
            "image.stride=16: without its last stride resnet18 has other weights",
        ),
        ({"name": "resnet18", "stride": 0}, "image.stride=0 must be a number at least 1"),
        ({"name": "resnet18", "stride": 16, "args": {"output_stride": 8}}, "leave out one of the two"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    def build() -> None:
        config = images.Config(**{"size": 64, **settings})
        config.check()
        images.build(config)

    with pytest.raises(ConfigError) as error:
        build()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_operations_are_counted_and_stay_without_it() -> None:
    """The last stage is computed on 4 x 4 cells in place of 2 x 2, forward and, twice as much, backward."""
    counts = []
    for stride in (None, 16):
        counter = FlopCounter(DualEncoder({"image": build_tower("resnet", 64, stride)}, 8, 1.0, None))
        counter.add(build_sample(64, None))
        counts.append(counter.take())
    products = 9 * 12 * 16 + 12 * 16 + 3 * 9 * 16 * 16  # of a cell in two blocks: the first widens 12 channels to 16
    assert counts[1] - counts[0] == 3 * 2 * products * (16 - 4)


@pytest.mark.parametrize(
    "context", [dense.Config(), coarse_to_fine.Config(region=2, keep=2), pooled.Config(latents=4, heads=2)]
)
def test_fusion_attends_to_the_finer_grid(context: Any) -> None:
    tower = build_tower("resnet", 96, 16)
    widths = {"image": tower.width, "text": tower.width}
    fusion = cross.build(cross.Config(heads=2), widths, context)
    image = tower(draw_images(96))
    text = image._replace(states=image.states[:, :5], mask=image.mask[:, :5], grid=None)
    trace = Trace()
    fusion({"image": image, "text": text}, trace)
    maps = compute_attention_maps(trace, "raw")
    assert maps.shape == (2, 5, 6, 6)
    torch.testing.assert_close(maps.sum(dim=(2, 3)), torch.ones(2, 5), atol=1e-4, rtol=0)
