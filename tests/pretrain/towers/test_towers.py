"""Tiny towers of every architecture: tests of all towers, then of image towers, then of text towers."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain import registry
from pretrain.errors import ConfigError
from pretrain.ops import use_onednn
from pretrain.towers import Tower
from pretrain.towers import timm as images
from pretrain.towers import transformers as texts
from pretrain.towers.length_buckets import GROUP_COST, group_by_length
from pretrain.towers.stem import ConvStem, patch_size

VIT = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
IMAGES: dict[str, dict[str, Any]] = {
    "vit-own": {"name": "vit_tiny_patch16_224", "args": VIT},
    "vit-cls": {"name": "vit_tiny_patch16_224", "args": VIT, "pool": "cls"},
    "vit-avg": {"name": "vit_tiny_patch16_224", "args": VIT, "pool": "avg"},
    "vit-map": {"name": "vit_tiny_patch16_224", "args": VIT, "pool": "map"},
    "vit-gap-as-avg": {"name": "vit_base_patch16_gap_224", "args": VIT, "pool": "avg"},
    "vit-stem": {
        "name": "vit_tiny_patch16_224",
        "stem": [6, 6, 16, 24],
        "args": {"embed_dim": 24, "depth": 3, "num_heads": 3, "class_token": False, "global_pool": "max"},
    },
    "vit-registers": {"name": "vit_base_patch16_reg4_gap_256", "args": VIT},
    "clip-vit": {"name": "vit_base_patch32_clip_224", "args": VIT},
    "siglip-vit": {"name": "vit_base_patch16_siglip_224", "args": VIT},
    "siglip-as-avg": {"name": "vit_base_patch16_siglip_224", "args": VIT, "pool": "avg"},
    "eva": {"name": "eva02_tiny_patch14_224", "args": VIT},
    "eva-avg": {"name": "eva02_tiny_patch14_224", "args": VIT, "pool": "avg"},
    "beit": {"name": "beit_base_patch16_224", "args": VIT},
    "deit-distilled": {"name": "deit_tiny_distilled_patch16_224", "args": VIT},
    "mixer": {"name": "mixer_s16_224", "args": {}},
    "resnet": {"name": "resnet18", "args": {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}},
    "convnext": {"name": "convnext_atto", "args": {"dims": [8, 12, 16, 24], "depths": [1, 1, 2, 1]}},
    "convnext-avg": {"name": "convnext_atto", "args": {"dims": [8, 12, 16, 24], "depths": [1, 1, 1, 1]}, "pool": "avg"},
    "swin": {
        "name": "swin_tiny_patch4_window7_224",
        "args": {"patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": [1, 1, 2], "num_heads": [1, 2, 2]},
    },
    "swinv2": {
        "name": "swinv2_tiny_window8_256",
        "args": {"patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": [1, 1, 2], "num_heads": [1, 2, 2]},
    },
    "naflexvit": {"name": "naflexvit_base_patch16_gap", "args": VIT},
    "coat": {
        "name": "coat_tiny",
        "args": {"embed_dims": [8, 16, 16, 16], "serial_depths": [1, 1, 1, 1], "parallel_depth": 1, "num_heads": 8},
    },
    "coat-lite": {
        "name": "coat_lite_tiny",
        "args": {"embed_dims": [8, 8, 16, 16], "serial_depths": [1, 1, 1, 1], "num_heads": 8},
    },
    "pvt": {
        "name": "pvt_v2_b0",
        "args": {"embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    },
    "pit": {
        "name": "pit_ti_224",
        "args": {"stride": 4, "base_dims": [8, 8, 8], "depth": [1, 1, 1], "heads": [1, 2, 2]},
    },
    "mobilenet": {"name": "mobilenetv3_small_050", "args": {}},
    "mobilenet-avg": {"name": "mobilenetv3_small_050", "args": {}, "pool": "avg"},
}
SMALL = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
T5 = {"vocab_size": 60, "d_model": 24, "num_layers": 3, "num_heads": 2, "d_ff": 48, "d_kv": 12}
GPT = {"vocab_size": 60, "n_embd": 24, "n_layer": 3, "n_head": 2}
BART = {
    "vocab_size": 60,
    "d_model": 24,
    "encoder_layers": 3,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_attention_heads": 2,
}
TEXTS: dict[str, dict[str, Any]] = {
    "clip": {"args": {"model_type": "clip_text_model", **SMALL}},
    "clip-avg": {"args": {"model_type": "clip_text_model", **SMALL}, "pool": "avg"},
    "clip-own": {"args": {"model_type": "clip_text_model", **SMALL, "eos_token_id": 59}, "pool": "tower"},
    "siglip": {"args": {"model_type": "siglip_text_model", **SMALL}, "pool": "tower"},
    "siglip-avg": {"args": {"model_type": "siglip_text_model", **SMALL}, "pool": "avg"},
    "bert-cls": {"args": {"model_type": "bert", **SMALL}, "pool": "cls"},
    "bert-own": {"args": {"model_type": "bert", **SMALL}, "pool": "tower"},
    "roberta-avg": {"args": {"model_type": "roberta", **SMALL}, "pool": "avg"},
    "roberta-own": {"args": {"model_type": "roberta", **SMALL}, "pool": "tower"},
    "t5": {"args": {"model_type": "t5", **T5}, "pool": "avg"},
    "bart": {"args": {"model_type": "bart", **BART}, "pool": "avg"},
    "gpt2": {"args": {"model_type": "gpt2", **GPT}},
    "distilbert": {
        "args": {"model_type": "distilbert", "vocab_size": 60, "dim": 24, "n_layers": 3, "n_heads": 2, "hidden_dim": 48},
        "pool": "avg",
    },
    "fnet": {
        "args": {"model_type": "fnet", "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 48},
        "pool": "cls",
    },
}
PAD, LENGTH, SIZE = 1, 20, 32


def build_tower(name: str, **more: Any) -> Tower:
    torch.manual_seed(0)
    if name in IMAGES:
        return images.build(images.Config(size=SIZE, **{**IMAGES[name], **more}))
    return texts.build(texts.Config(length=LENGTH, **{**TEXTS[name], **more}))


def make_batch(tower: Tower, b: int = 5) -> tuple[Tensor, Tensor | None]:
    """Return random inputs of the tower's modality and, for texts, their mask."""
    g = torch.Generator().manual_seed(1)
    if tower.modality == "image":
        return torch.randint(0, 256, (b, 3, SIZE, SIZE), dtype=torch.uint8, generator=g), None
    ids = torch.randint(4, 58, (b, LENGTH), generator=g)
    lengths = torch.tensor([3, LENGTH, 9, 1, 6])[:b]
    mask = torch.arange(LENGTH) < lengths[:, None]
    ids[torch.arange(b), lengths - 1] = 59
    return ids.masked_fill(~mask, PAD), mask


@pytest.mark.parametrize("name", [*IMAGES, *TEXTS])
def test_shapes_and_that_every_parameter_gets_a_gradient(name: str) -> None:
    tower = build_tower(name).train()
    inputs, mask = make_batch(tower)
    states, valid, grid, pooled = tower(inputs, mask)
    b, n, _ = states.shape
    assert states.shape == (b, n, tower.width)
    assert pooled.shape == (b, tower.pooled_width)
    assert valid.shape == (b, n)
    assert valid.dtype == torch.bool
    assert torch.equal(valid, torch.ones_like(valid) if mask is None else mask)
    assert grid is None if tower.modality == "text" else grid is not None and grid[0] * grid[1] == n
    pooled.square().sum().backward()
    without_gradient = [n for n, p in tower.named_parameters() if p.requires_grad and p.grad is None]
    assert not without_gradient, "DDP would wait for their gradients"
    frozen = [n for n, p in tower.named_parameters() if not p.requires_grad]
    assert set(frozen) == tower.unused_parameters
    assert not tower.unused_parameters or name == "mobilenet-avg", "other models are built without the weights they do not use"


@pytest.mark.parametrize("name", [*IMAGES, *TEXTS])
def test_pools_mean_is_true_exactly_where_it_holds(name: str) -> None:
    tower = build_tower(name).eval()
    with torch.no_grad():
        states, valid, _, pooled = tower(*make_batch(tower))
    weight = valid[..., None].float()
    mean = (states * weight).sum(dim=1) / weight.sum(dim=1)
    assert tower.pools_mean == (pooled.shape == mean.shape and torch.allclose(pooled, mean, atol=1e-5))


def test_the_shipped_configurations_pool_by_the_mean() -> None:
    args = {**VIT, "global_pool": "avg", "fc_norm": False}
    assert images.build(images.Config(name="vit_tiny_patch16_224", size=SIZE, args=args)).pools_mean


def test_max_pooling_is_recognized() -> None:
    args = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "output_stride": 8, "norm_layer": "groupnorm1"}
    inputs = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for pool, is_max in (("max", True), ("avg", False)):
        tower = images.build(images.Config(name="resnet18", size=SIZE, args={**args, "global_pool": pool})).eval()
        states, _, _, pooled = tower(inputs)
        assert (tower.pools_max, tower.pools_mean) == (is_max, not is_max)
        assert torch.equal(states.amax(dim=1), pooled) == is_max


@pytest.mark.parametrize("name", [*IMAGES, *TEXTS])
def test_layers_are_numbered_from_stem_to_pooler(name: str) -> None:
    tower = build_tower(name)
    ids = tower.layer_ids()
    assert set(ids) == {name for name, _ in tower.named_parameters()}
    blocks = {i for i in ids.values() if 0 < i <= tower.depth}
    assert blocks == set(range(1, tower.depth + 1))
    assert tower.depth >= 2
    assert min(ids.values()) == 0
    assert max(ids.values()) <= tower.depth + 1


@pytest.mark.parametrize("name", [*IMAGES, *TEXTS])
def test_frozen_modules_stay_in_eval_mode_and_do_not_change(name: str) -> None:
    for blocks in (0, 1):
        tower = build_tower(name, trainable_blocks=blocks).train()
        before = {n: t.clone() for n, t in [*tower.named_parameters(), *tower.named_buffers()]}
        for _ in range(2):
            pooled = tower(*make_batch(tower)).pooled
            if blocks:
                pooled.square().sum().backward()
        ids = tower.layer_ids()
        layer = {id(p): ids[n] for n, p in tower.named_parameters()}
        for n, p in tower.named_parameters():
            assert p.requires_grad == (blocks > 0 and ids[n] >= tower.depth + 1 - blocks and n not in tower.unused_parameters)
            assert blocks == 0 or not p.requires_grad or p.grad is not None
        for n, module in tower.named_modules():
            layers = [layer[id(p)] for p in module.parameters()]
            is_frozen = bool(layers) and (not blocks or max(layers) < tower.depth + 1 - blocks)
            if is_frozen:
                assert not any(m.training for m in module.modules()), n
                assert all(torch.equal(before[f"{n}.{b}" if n else b], t) for b, t in module.named_buffers()), n
        assert blocks == 0 or any(m.training for m in tower.modules())


def test_more_trainable_blocks_than_the_tower_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="the tower has 3 blocks"):
        build_tower("clip", trainable_blocks=4)


@pytest.mark.parametrize("name", ["vit-avg", "siglip-vit", "eva", "swin", "convnext", "resnet", "clip", "bert-cls", "t5"])
@pytest.mark.parametrize("blocks", [-1, 1])
def test_checkpointing_changes_no_gradient(name: str, blocks: int) -> None:
    grads = []
    for checkpointing in (False, True):
        tower = build_tower(name, trainable_blocks=blocks, checkpointing=checkpointing).double()
        tower.train()
        for module in tower.modules():
            if isinstance(module, (nn.Dropout, nn.BatchNorm2d)):
                module.eval()
        tower(*make_batch(tower)).pooled.square().sum().backward()
        grads.append({n: p.grad for n, p in tower.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) > 3
    for n, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][n], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "module"), [("vit-avg", "model.blocks.1.mlp"), ("clip", "model.encoder.layers.1.mlp")])
def test_checkpointing_runs_forward_twice(name: str, module: str) -> None:
    tower = build_tower(name, checkpointing=True, **({"groups": 1} if name == "clip" else {})).train()
    calls: list[int] = []  # counted before forward(), because recomputation may stop before forward() returns
    tower.get_submodule(module).register_forward_pre_hook(lambda *_: calls.append(1))
    tower(*make_batch(tower)).pooled.sum().backward()
    assert len(calls) == 2
    tower.set_checkpointing(False)
    tower(*make_batch(tower)).pooled.sum().backward()
    assert len(calls) == 3


@pytest.mark.parametrize("name", [*IMAGES, *TEXTS])
def test_settings_rebuild_the_same_architecture(name: str) -> None:
    tower = build_tower(name).eval()
    module = images if tower.modality == "image" else texts
    config = module.Config(**({"size": SIZE} if tower.modality == "image" else {"length": LENGTH}), **(IMAGES | TEXTS)[name])
    rebuilt = module.build(dataclasses.replace(config, **tower.settings())).eval()
    rebuilt.load_state_dict(tower.state_dict())
    with torch.no_grad():
        assert torch.equal(tower(*make_batch(tower)).pooled, rebuilt(*make_batch(tower)).pooled)


# ---------------------------------------------------------------------------------------------------------------------
# Image towers


@pytest.mark.parametrize("name", [n for n in IMAGES if n not in ("mixer", "mobilenet", "mobilenet-avg")])
def test_states_are_row_major(name: str) -> None:
    """A change of one cell of the image changes the state at that cell most.

    With convolutions that overlap, it may be the state of a neighboring cell.
    """
    tower = build_tower(name).double().eval()
    image, _ = make_batch(tower, 1)
    with torch.no_grad():
        before, _, grid, _ = tower(image)
        assert grid is not None
        for row, column in ((0, grid[1] - 1), (grid[0] - 1, 0)):
            cell = SIZE // grid[0]
            changed = image.clone()
            changed[:, :, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] ^= 255
            change = (tower(changed).states - before).norm(dim=-1)[0]
            position = divmod(int(change.argmax()), grid[1])
            assert max(abs(position[0] - row), abs(position[1] - column)) <= (1 if name in ("vit-stem", "pit") else 0)


def test_a_stem_computes_convolution_group_norm_and_gelu() -> None:
    conv_stem = ConvStem([16, 32, 32]).double()
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    x = image
    for layer, (stride, groups) in enumerate(((2, 1), (2, 2), (1, 2))):
        convolution, norm = cast(nn.Conv2d, conv_stem[3 * layer]), cast(nn.GroupNorm, conv_stem[3 * layer + 1])
        x = F.conv2d(F.pad(x, (1, 1, 1, 1)), convolution.weight, stride=stride)
        grouped = x.unflatten(1, (groups, -1))
        dims = (2, 3, 4)
        variance = grouped.var(dims, correction=0, keepdim=True)
        grouped = (grouped - grouped.mean(dims, keepdim=True)) / (variance + 1e-5).sqrt()
        x = F.gelu(grouped.flatten(1, 2) * norm.weight[:, None, None] + norm.bias[:, None, None])
    torch.testing.assert_close(conv_stem(image), x)
    assert x.shape == (2, 32, 4, 4)
    torch.testing.assert_close(conv_stem(image)[:1], conv_stem(image[:1]))  # images do not influence each other


@pytest.mark.parametrize(("widths", "side"), [([8], 2), ([2, 8], 4), ([8, 8, 16], 4), ([32, 64, 64, 128, 128, 128], 8)])
def test_a_stem_halves_the_resolution_first_and_where_it_widens(widths: list[int], side: int) -> None:
    assert patch_size(widths) == side
    assert ConvStem(widths)(torch.zeros(1, 3, 48, 48)).shape[1:] == (widths[-1], 48 // side, 48 // side)


def test_images_are_normalized_by_clips_statistics_or_those_of_the_configuration() -> None:
    tower = build_tower("vit-avg").eval()
    inputs, _ = make_batch(tower)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(tower(inputs).pooled, tower((inputs / 255 - mean) / std).pooled)
    configured = build_tower("vit-avg", mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])
    torch.testing.assert_close(configured.normalize(inputs), inputs / 127.5 - 1)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["vit-own", "vit-avg", "siglip-vit", "eva"])
def test_patch_dropout_only_in_training(name: str) -> None:
    without_dropout, tower = build_tower(name), build_tower(name, patch_dropout=0.5)
    tower.load_state_dict(without_dropout.state_dict())
    inputs, _ = make_batch(tower)
    states, valid, grid, _ = tower.train()(inputs)
    assert (states.shape[1], valid.shape[1], grid) == (8, 8, None)
    with torch.no_grad():
        assert torch.equal(tower.eval()(inputs).pooled, without_dropout.eval()(inputs).pooled)
    assert tower(inputs).grid == (4, 4)
    frozen = build_tower(name, patch_dropout=0.5, trainable_blocks=0).train()
    assert frozen(inputs).grid == (4, 4)


def test_pretrained_positions_are_interpolated(tmp_path: Path) -> None:
    """A 48 px model loads the weights of a 32 px one, with positions as timm resamples them.

    Everything else is unchanged.
    """
    torch.manual_seed(0)
    small = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **VIT)
    torch.save(small.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 0}
    config = images.Config(
        name="vit_tiny_patch16_224", size=48, args={**VIT, "pretrained_cfg_overlay": overlay}, pretrained=True, pool="avg"
    )
    tower = images.build(config)
    loaded = tower.model.state_dict()
    positions = timm.layers.resample_abs_pos_embed(small.state_dict()["pos_embed"], new_size=[6, 6], num_prefix_tokens=1)
    torch.testing.assert_close(loaded["pos_embed"], positions)
    assert torch.equal(loaded["blocks.1.attn.qkv.weight"], small.state_dict()["blocks.1.attn.qkv.weight"])
    assert tower.statistics == ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])  # the model's own, not CLIP's


@pytest.mark.parametrize(
    ("name", "size", "grid", "depth"),
    [
        ("pvt_v2_b0", 256, (8, 8), 4),
        ("pvt_v2_b0", 100, (4, 4), 4),
        ("caformer_s18", 64, (2, 2), 18),
        ("poolformer_s12", 64, (2, 2), 12),
        ("pit_ti_224", 224, (7, 7), 12),
        ("csatv2", 256, (4, 4), 24),
        ("crossvit_tiny_240", 240, (14, 14), 3),
        ("efficientvim_m1", 64, (1, 1), 6),
    ],
)
def test_models_without_groups_or_with_unusual_features_train(name: str, size: int, grid: tuple[int, int], depth: int) -> None:
    """Patches that overlap, no group_matcher, class tokens only, several branches: each trains, and no layer is missing.

    `pooled` is what timm's own head gives.
    """
    torch.manual_seed(0)
    tower = images.build(images.Config(name=name, size=size))
    inputs = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    tokens = tower.train()(inputs)
    assert tokens.grid == grid
    assert tokens.states.shape == (2, grid[0] * grid[1], tower.width)
    tokens.pooled.square().sum().backward()
    assert not [n for n, p in tower.named_parameters() if (p.grad is None) == p.requires_grad]
    assert tower.depth == depth
    assert set(tower.layer_ids().values()) | {depth + 1} == set(range(depth + 2))  # PVT has nothing behind its blocks
    with torch.no_grad():
        model: Any = tower.eval().model
        expected = model.forward_head(model.forward_features(tower.normalize(inputs)), pre_logits=True)
        torch.testing.assert_close(tower(inputs).pooled, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "vit_tiny_patch16_225"}, "not a timm model; did you mean vit_tiny_patch16_224"),
        ({"name": "mixer_s16_224", "args": {"patch_size": 8}}, "patch_size is fixed by mixer_s16_224"),
        ({"name": "vit_tiny_patch16_224", "args": {"embed_dims": 24}}, "embed_dims.* did you mean 'embed_dim'"),
        ({"name": "vit_tiny_patch16_224", "args": {"embed_dim": 25, "num_heads": 3}}, "cannot be built"),
        ({"name": "vit_tiny_patch16_224", "size": 40}, "not a multiple of .* patch of 16 px"),
        ({"name": "vit_tiny_patch16_224", "stem": [8, 16, 32], "size": 36}, "not a multiple of .* patch of 8 px"),
        ({"name": "resnet18", "stem": [8]}, "image.stem: resnet18 has no patch embedding"),
        ({"name": "resnet18", "pool": "cls"}, "no class token; use pool: tower or avg"),
        ({"name": "resnet18", "pool": "map"}, "attention pooling"),
        ({"name": "resnet18", "patch_dropout": 0.5}, "no patch dropout"),
        ({"name": "vit_base_patch16_siglip_224", "args": VIT, "pool": "cls"}, "no class token"),
        ({"name": "coat_tiny", "size": 8}, "cannot be used"),
    ],
)
def test_image_settings_that_do_not_fit_the_model_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        images.build(images.Config(**{"size": 64, **settings}))
    assert "\n" not in str(error.value)


def test_a_fixed_argument_is_named_while_another_error_is_handled() -> None:
    """CPython 3.11 then raises KeyError in place of TypeError for an argument given twice."""
    try:
        raise ValueError
    except ValueError:
        with pytest.raises(ConfigError, match="patch_size is fixed by mixer_s16_224"):
            images.build(images.Config(size=64, name="mixer_s16_224", args={"patch_size": 8}))


def test_impossible_image_settings_are_refused() -> None:
    stems = ({"stem": [16, 8]}, {"stem": [0]}, {"stem": [8], "pretrained": True}, {"stem": [8], "args": {"patch_size": 2}})
    others = ({"mean": [0.5]}, {"std": [1, 1, 0]}, {"args": {"img_size": 3}}, {"size": 0}, {"patch_dropout": 1.0})
    for settings in (*stems, *others):
        with pytest.raises(ConfigError, match=r"image\."):
            images.Config(**settings).check()  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Text towers


@pytest.mark.parametrize("name", list(TEXTS))
def test_trimming_changes_nothing_exactly_where_trims_is_true(name: str) -> None:
    """Each text alone, at its own length, is compared with the same text padded to the full length."""
    tower = build_tower(name, groups=1).double().eval()
    ids, mask = make_batch(tower)
    assert mask is not None
    assert tower.trims == (name not in ("siglip", "fnet"))
    with torch.no_grad():
        full = tower(ids, mask)
        for row, length in enumerate(mask.sum(dim=1).tolist()):
            alone = tower(ids[row : row + 1, :length], mask[row : row + 1, :length])
            is_equal = torch.allclose(alone.pooled[0], full.pooled[row], atol=1e-9)
            assert is_equal == tower.trims or length == LENGTH
            if tower.trims:
                torch.testing.assert_close(alone.states[0], full.states[row, :length], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["clip", "clip-avg", "bert-own", "roberta-avg", "t5", "gpt2"])
@pytest.mark.parametrize("groups", [2, 4])
def test_length_sorted_groups_change_nothing(name: str, groups: int) -> None:
    one_group, grouped = build_tower(name, groups=1).double().eval(), build_tower(name, groups=groups).double().eval()
    ids, mask = make_batch(one_group)
    assert mask is not None
    ids, mask = ids.repeat(30, 1), mask.repeat(30, 1)
    lengths: list[int] = []
    grouped.get_submodule("model").register_forward_pre_hook(
        lambda _, __, kw: lengths.append(kw["input_ids"].shape[1]), with_kwargs=True
    )
    results = []
    for tower in (one_group, grouped):
        out = tower(ids, mask)
        loss = out.pooled.square().sum() + (out.states * mask[..., None]).pow(3).sum()
        loss.backward()
        results.append([out.pooled, out.states * mask[..., None], *(p.grad for p in tower.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert 1 < len(lengths) <= groups


def test_groups_hold_the_fewest_tokens() -> None:
    lengths = [4] * 500 + [5] * 400 + [30] * 60 + [70]
    assert group_by_length(lengths, 1, 1, 77) == [(0, 961, 70)]
    assert group_by_length(lengths, 2, 1, 77) == [(0, 900, 5), (900, 961, 70)]
    assert group_by_length(lengths, 3, 1, 77) == [(0, 900, 5), (900, 960, 30), (960, 961, 70)]
    assert group_by_length(lengths, 9, 4, 77)[-1] == (960, 961, 72)
    assert group_by_length([3, 3, 4], 4, 1, 77) == [(0, 3, 4)], (
        f"a group that saves fewer than {GROUP_COST} tokens does not pay"
    )
    assert group_by_length([76], 4, 8, 77) == [(0, 1, 77)]


def test_pooling_reads_the_mask_and_not_the_ids() -> None:
    """Padding may be the end token, as in CLIP's tokenizer, and end tokens may occur inside a text."""
    tower = build_tower("clip").eval()
    ids, mask = make_batch(tower)
    assert mask is not None
    with torch.no_grad():
        first = tower(ids, mask).pooled
        assert torch.equal(first, tower(ids.masked_fill(~mask, 59), mask).pooled)
        states = tower(ids, mask).states
    last = mask.sum(dim=1) - 1
    torch.testing.assert_close(first, states[torch.arange(5), last])


class StubTokenizer:
    """The attributes of a tokenizer that a tower reads."""

    pad_token_id, bos_token_id, eos_token_id = 2, 0, 1

    def __len__(self) -> int:
        return 50


def test_vocabulary_comes_from_the_tokenizer() -> None:
    args = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    tower = texts.build(texts.Config(args={"model_type": "bert", **args}), StubTokenizer())
    embedding: Any = tower.get_submodule("model.embeddings.word_embeddings")
    assert (embedding.num_embeddings, embedding.padding_idx) == (50, 2)
    with pytest.raises(ConfigError, match="50 tokens, the model only 40"):
        texts.build(texts.Config(args={"model_type": "bert", **args, "vocab_size": 40}), StubTokenizer())
    end_as_padding = StubTokenizer()
    end_as_padding.pad_token_id = 1  # CLIP's tokenizer pads with the end token, whose embedding must be trained
    tower = texts.build(texts.Config(args={"model_type": "bert", **args}), end_as_padding)
    assert tower.get_submodule("model.embeddings.word_embeddings").padding_idx is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"text\.name .* or text\.args\.model_type"),
        ({"args": {"model_type": "brt"}}, "'brt' is not in transformers; did you mean 'bert'"),
        ({"args": {"model_type": "bert", "hiden_size": 3}}, "did you mean 'hidden_size'"),
        ({"args": {"model_type": "bert", **SMALL, "hidden_size": 25}}, "text.args"),
        ({"args": {"model_type": "bert", **SMALL, "hidden_size": "wide"}}, "hidden_size"),
        ({"args": {"model_type": "clip_text_model", **SMALL, "max_position_embeddings": 16}}, "has 16 positions"),
        ({"args": {"model_type": "roberta", **SMALL, "max_position_embeddings": 21}}, "has 21 positions"),
        ({"args": {"model_type": "bert"}}, "no vocab_size"),
        ({"args": {"model_type": "vit"}}, "text"),
        ({"args": {"model_type": "t5", **T5}, "pool": "tower"}, "pool=tower"),
        ({"name": "/nowhere/model"}, "/nowhere/model"),
    ],
)
def test_text_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    def check_and_build(config: texts.Config) -> None:
        config.check()
        texts.build(config)

    with pytest.raises(ConfigError, match=message) as error:
        check_and_build(texts.Config(**{"length": LENGTH, **settings}))
    assert "\n" not in str(error.value)


def test_named_text_models_from_folders(tmp_path: Path) -> None:
    """The folder holds a text model, or a CLIP whose text model is used.

    Half-precision weights are used in float32.
    """
    from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel

    torch.manual_seed(0)
    bert = BertModel(BertConfig(**SMALL)).eval()
    bert.half().save_pretrained(tmp_path / "bert")
    tower = texts.build(texts.Config(name=str(tmp_path / "bert"), pool="cls", length=LENGTH)).eval()
    ids, mask = make_batch(tower)
    assert {p.dtype for p in tower.parameters()} == {torch.float32}
    with torch.no_grad():
        expected = bert.float()(ids, attention_mask=mask).last_hidden_state[:, 0]
        torch.testing.assert_close(tower(ids, mask).pooled, expected, rtol=1e-5, atol=1e-5)
    assert tower.settings()["name"] is None

    vision = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    clip = CLIPModel(CLIPConfig(text_config={**SMALL, "eos_token_id": 59}, vision_config=vision, projection_dim=8)).eval()
    clip.save_pretrained(tmp_path / "clip")
    tower = texts.build(texts.Config(name=str(tmp_path / "clip"), length=LENGTH)).eval()
    with torch.no_grad():
        expected = clip.text_model(ids, attention_mask=mask).pooler_output
        torch.testing.assert_close(tower(ids, mask).pooled, expected, rtol=1e-5, atol=1e-5)
    untrained = texts.build(texts.Config(name=str(tmp_path / "clip"), pretrained=False, length=LENGTH))
    assert not torch.equal(untrained.state_dict()["model.final_layer_norm.weight"] + 1, torch.zeros(24))
    assert not torch.equal(
        untrained.get_submodule("model.embeddings.token_embedding").weight,  # type: ignore[arg-type]
        tower.get_submodule("model.embeddings.token_embedding").weight,  # type: ignore[arg-type]
    )


def test_the_registry_lists_towers_but_not_their_helper_modules() -> None:
    assert registry.component_names("towers") == ["audio", "timm", "transformers"]
    assert registry.component_names("losses") == ["clip", "distill", "siglip"]


# ---------------------------------------------------------------------------------------------------------------------
# oneDNN


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_grad", [(True, True), (False, True), (True, False)])
def test_onednn_linear_is_linear(bias: bool, needs_grad: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    reference = nn.Linear(24, 40, bias=bias)
    reference.weight.requires_grad_(needs_grad[1])
    onednn = nn.Sequential(copy.deepcopy(reference))
    use_onednn(onednn)
    assert isinstance(onednn[0], nn.Linear)
    assert onednn.state_dict().keys() == {f"0.{name}" for name in reference.state_dict()}
    x = torch.randn(5, 7, 24)
    inputs, reference_inputs = x.clone().requires_grad_(needs_grad[0]), x.clone().requires_grad_(needs_grad[0])
    outputs, reference_outputs = onednn(inputs), reference(reference_inputs)
    torch.testing.assert_close(outputs, reference_outputs, rtol=1e-5, atol=1e-5)
    outputs.square().sum().backward()
    reference_outputs.square().sum().backward()
    pairs = [(inputs, reference_inputs), *zip(onednn.parameters(), reference.parameters(), strict=True)]
    for tensor, expected in pairs:
        assert (tensor.grad is None) == (expected.grad is None)
        if expected.grad is not None:
            torch.testing.assert_close(tensor.grad, expected.grad, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(onednn.double()(x.double()), reference.double()(x.double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert onednn.float()(x).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(24,), (5, 24), (5, 7, 24), (2, 3, 4, 24), (0, 7, 24)])
def test_the_result_of_a_onednn_linear_can_be_changed_in_place(shape: tuple[int, ...]) -> None:
    """As SwinV2 and NaFlexViT do; the inputs may be transposed, as in convolutional models."""
    torch.manual_seed(0)
    reference = nn.Linear(24, 40)
    onednn = nn.Sequential(copy.deepcopy(reference))
    use_onednn(onednn)
    x = torch.randn(shape).transpose(0, -1).contiguous().transpose(0, -1)
    gradients = []
    for layer in (onednn, reference):
        inputs = x.clone(memory_format=torch.preserve_format).requires_grad_()
        outputs = layer(inputs)
        assert outputs.shape == (*shape[:-1], 40)
        outputs.mul_(2).add_(1)
        outputs.square().sum().backward()
        assert inputs.grad is not None
        gradients.append(inputs.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(onednn[0].weight.grad, reference.weight.grad, rtol=1e-5, atol=1e-4)
