"""Every kind of tower, tiny: what all share, by a table; then what only pictures or only texts have."""

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


def tower(name: str, **more: Any) -> Tower:
    torch.manual_seed(0)
    if name in IMAGES:
        return images.build(images.Config(size=SIZE, **{**IMAGES[name], **more}))
    return texts.build(texts.Config(length=LENGTH, **{**TEXTS[name], **more}))


def batch(of: Tower, b: int = 5) -> tuple[Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(1)
    if of.modality == "image":
        return torch.randint(0, 256, (b, 3, SIZE, SIZE), dtype=torch.uint8, generator=g), None
    ids = torch.randint(4, 58, (b, LENGTH), generator=g)
    lengths = torch.tensor([3, LENGTH, 9, 1, 6])[:b]
    mask = torch.arange(LENGTH) < lengths[:, None]
    ids[torch.arange(b), lengths - 1] = 59
    return ids.masked_fill(~mask, PAD), mask


@pytest.mark.parametrize("name", [*IMAGES, *TEXTS])
def test_shapes_and_every_parameter_learns(name: str) -> None:
    made = tower(name).train()
    inputs, mask = batch(made)
    states, valid, grid, pooled = made(inputs, mask)
    b, n, _ = states.shape
    assert states.shape == (b, n, made.width)
    assert pooled.shape == (b, made.pooled_width)
    assert valid.shape == (b, n)
    assert valid.dtype == torch.bool
    assert torch.equal(valid, torch.ones_like(valid) if mask is None else mask)
    assert grid is None if made.modality == "text" else grid is not None and grid[0] * grid[1] == n
    pooled.square().sum().backward()
    idle = [n for n, p in made.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, "DDP would wait for these"
    unused_parameters = [n for n, p in made.named_parameters() if not p.requires_grad]
    assert set(unused_parameters) == made.unused_parameters
    assert not made.unused_parameters or name == "mobilenet-avg", (
        "weights that nothing uses are left out of the model where it can be"
    )


@pytest.mark.parametrize("name", [*IMAGES, *TEXTS])
def test_pools_mean_is_true_exactly_where_it_holds(name: str) -> None:
    made = tower(name).eval()
    with torch.no_grad():
        states, valid, _, pooled = made(*batch(made))
    weight = valid[..., None].float()
    mean = (states * weight).sum(dim=1) / weight.sum(dim=1)
    assert made.pools_mean == (pooled.shape == mean.shape and torch.allclose(pooled, mean, atol=1e-5))


def test_the_shipped_way_of_asking_for_the_mean() -> None:
    args = {**VIT, "global_pool": "avg", "fc_norm": False}
    assert images.build(images.Config(name="vit_tiny_patch16_224", size=SIZE, args=args)).pools_mean


def test_the_largest_of_each_channel_is_known_for_what_it_is() -> None:
    args = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "output_stride": 8, "norm_layer": "groupnorm1"}
    pictures = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for pool, largest in (("max", True), ("avg", False)):
        made = images.build(images.Config(name="resnet18", size=SIZE, args={**args, "global_pool": pool})).eval()
        states, _, _, pooled = made(pictures)
        assert (made.pools_max, made.pools_mean) == (largest, not largest)
        assert torch.equal(states.amax(dim=1), pooled) == largest


@pytest.mark.parametrize("name", [*IMAGES, *TEXTS])
def test_layers_are_numbered_from_stem_to_pooler(name: str) -> None:
    made = tower(name)
    ids = made.layer_ids()
    assert set(ids) == {name for name, _ in made.named_parameters()}
    blocks = {i for i in ids.values() if 0 < i <= made.depth}
    assert blocks == set(range(1, made.depth + 1))
    assert made.depth >= 2
    assert min(ids.values()) == 0
    assert max(ids.values()) <= made.depth + 1


@pytest.mark.parametrize("name", [*IMAGES, *TEXTS])
def test_frozen_parts_do_not_move_whatever_train_says(name: str) -> None:
    for blocks in (0, 1):
        made = tower(name, trainable_blocks=blocks).train()
        before = {n: t.clone() for n, t in [*made.named_parameters(), *made.named_buffers()]}
        for _ in range(2):
            pooled = made(*batch(made)).pooled
            if blocks:
                pooled.square().sum().backward()
        ids = made.layer_ids()
        layer = {id(p): ids[n] for n, p in made.named_parameters()}
        for n, p in made.named_parameters():
            assert p.requires_grad == (blocks > 0 and ids[n] >= made.depth + 1 - blocks and n not in made.unused_parameters)
            assert blocks == 0 or not p.requires_grad or p.grad is not None
        for n, module in made.named_modules():
            own = [layer[id(p)] for p in module.parameters()]
            still = bool(own) and (not blocks or max(own) < made.depth + 1 - blocks)
            if still:
                assert not any(m.training for m in module.modules()), n
                assert all(torch.equal(before[f"{n}.{b}" if n else b], t) for b, t in module.named_buffers()), n
        assert blocks == 0 or any(m.training for m in made.modules())


def test_too_many_blocks() -> None:
    with pytest.raises(ConfigError, match="the tower has 3 blocks"):
        tower("clip", trainable_blocks=4)


@pytest.mark.parametrize("name", ["vit-avg", "siglip-vit", "eva", "swin", "convnext", "resnet", "clip", "bert-cls", "t5"])
@pytest.mark.parametrize("blocks", [-1, 1])
def test_checkpointing_changes_no_gradient(name: str, blocks: int) -> None:
    grads = []
    for checkpointing in (False, True):
        made = tower(name, trainable_blocks=blocks, checkpointing=checkpointing).double()
        made.train()
        for module in made.modules():
            if isinstance(module, (nn.Dropout, nn.BatchNorm2d)):
                module.eval()
        made(*batch(made)).pooled.square().sum().backward()
        grads.append({n: p.grad for n, p in made.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) > 3
    for n, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][n], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "part"), [("vit-avg", "model.blocks.1.mlp"), ("clip", "model.encoder.layers.1.mlp")])
def test_checkpointing_really_recomputes(name: str, part: str) -> None:
    made = tower(name, checkpointing=True, **({"groups": 1} if name == "clip" else {})).train()
    entered: list[int] = []  # entered, not left: recomputation ends as soon as it has what it needs
    made.get_submodule(part).register_forward_pre_hook(lambda *_: entered.append(1))
    made(*batch(made)).pooled.sum().backward()
    assert len(entered) == 2
    made.set_checkpointing(False)
    made(*batch(made)).pooled.sum().backward()
    assert len(entered) == 3


@pytest.mark.parametrize("name", [*IMAGES, *TEXTS])
def test_settings_rebuild_the_same_architecture(name: str) -> None:
    made = tower(name).eval()
    module = images if made.modality == "image" else texts
    config = module.Config(**({"size": SIZE} if made.modality == "image" else {"length": LENGTH}), **(IMAGES | TEXTS)[name])
    again = module.build(dataclasses.replace(config, **made.settings())).eval()
    again.load_state_dict(made.state_dict())
    with torch.no_grad():
        assert torch.equal(made(*batch(made)).pooled, again(*batch(made)).pooled)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("name", [n for n in IMAGES if n not in ("mixer", "mobilenet", "mobilenet-avg")])
def test_states_are_row_major(name: str) -> None:
    """A change in one place of the picture moves the state of that place most; convolutions overlap: or of one beside it."""
    made = tower(name).double().eval()
    picture, _ = batch(made, 1)
    with torch.no_grad():
        before, _, grid, _ = made(picture)
        assert grid is not None
        for row, column in ((0, grid[1] - 1), (grid[0] - 1, 0)):
            cell = SIZE // grid[0]
            changed = picture.clone()
            changed[:, :, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] ^= 255
            moved = (made(changed).states - before).norm(dim=-1)[0]
            found = divmod(int(moved.argmax()), grid[1])
            assert max(abs(found[0] - row), abs(found[1] - column)) <= (1 if name == "vit-stem" else 0)


def test_a_stem_is_its_convolutions_written_out() -> None:
    made = ConvStem([16, 32, 32]).double()
    picture = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    x = picture
    for layer, (stride, groups) in enumerate(((2, 1), (2, 2), (1, 2))):
        convolution, norm = cast(nn.Conv2d, made[3 * layer]), cast(nn.GroupNorm, made[3 * layer + 1])
        x = F.conv2d(F.pad(x, (1, 1, 1, 1)), convolution.weight, stride=stride)
        parts = x.unflatten(1, (groups, -1))
        at = (2, 3, 4)
        parts = (parts - parts.mean(at, keepdim=True)) / (parts.var(at, correction=0, keepdim=True) + 1e-5).sqrt()
        x = F.gelu(parts.flatten(1, 2) * norm.weight[:, None, None] + norm.bias[:, None, None])
    torch.testing.assert_close(made(picture), x)
    assert x.shape == (2, 32, 4, 4)
    torch.testing.assert_close(made(picture)[:1], made(picture[:1]))  # no picture sees its neighbours


@pytest.mark.parametrize(("widths", "side"), [([8], 2), ([2, 8], 4), ([8, 8, 16], 4), ([32, 64, 64, 128, 128, 128], 8)])
def test_a_stem_halves_at_first_and_where_it_widens(widths: list[int], side: int) -> None:
    assert patch_size(widths) == side
    assert ConvStem(widths)(torch.zeros(1, 3, 48, 48)).shape[1:] == (widths[-1], 48 // side, 48 // side)


def test_pictures_are_normalised_with_clips_statistics() -> None:
    made = tower("vit-avg").eval()
    picture, _ = batch(made)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(made(picture).pooled, made((picture / 255 - mean) / std).pooled)
    own = tower("vit-avg", mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])
    torch.testing.assert_close(own.normalize(picture), picture / 127.5 - 1)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["vit-own", "vit-avg", "siglip-vit", "eva"])
def test_patch_dropout_only_in_training(name: str) -> None:
    whole, made = tower(name), tower(name, patch_dropout=0.5)
    made.load_state_dict(whole.state_dict())
    picture, _ = batch(made)
    states, valid, grid, _ = made.train()(picture)
    assert (states.shape[1], valid.shape[1], grid) == (8, 8, None)
    with torch.no_grad():
        assert torch.equal(made.eval()(picture).pooled, whole.eval()(picture).pooled)
    assert made(picture).grid == (4, 4)
    frozen = tower(name, patch_dropout=0.5, trainable_blocks=0).train()
    assert frozen(picture).grid == (4, 4)


def test_pretrained_positions_are_interpolated(tmp_path: Path) -> None:
    """Weights of a 32 px model in a 48 px one: as timm's own resampling makes them; everything else is copied."""
    torch.manual_seed(0)
    small = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **VIT)
    torch.save(small.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 0}
    config = images.Config(
        name="vit_tiny_patch16_224", size=48, args={**VIT, "pretrained_cfg_overlay": overlay}, pretrained=True, pool="avg"
    )
    made = images.build(config)
    loaded = made.model.state_dict()
    positions = timm.layers.resample_abs_pos_embed(small.state_dict()["pos_embed"], new_size=[6, 6], num_prefix_tokens=1)
    torch.testing.assert_close(loaded["pos_embed"], positions)
    assert torch.equal(loaded["blocks.1.attn.qkv.weight"], small.state_dict()["blocks.1.attn.qkv.weight"])
    assert made.statistics == ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])  # the model's own, not CLIP's


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
        ({"name": "crossvit_tiny_240", "size": 240}, "cannot be used"),
    ],
)
def test_wrong_image_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        images.build(images.Config(**{"size": 64, **settings}))
    assert "\n" not in str(error.value)


def test_wrong_image_values() -> None:
    stems = ({"stem": [16, 8]}, {"stem": [0]}, {"stem": [8], "pretrained": True}, {"stem": [8], "args": {"patch_size": 2}})
    for bad in (*stems, {"mean": [0.5]}, {"std": [1, 1, 0]}, {"args": {"img_size": 3}}, {"size": 0}, {"patch_dropout": 1.0}):
        with pytest.raises(ConfigError, match=r"image\."):
            images.Config(**bad).check()  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Texts


@pytest.mark.parametrize("name", list(TEXTS))
def test_trimming_is_free_exactly_where_the_tower_says_so(name: str) -> None:
    """Invariant 8, per text: alone at its own length against padded to the whole length."""
    made = tower(name, groups=1).double().eval()
    ids, mask = batch(made)
    assert mask is not None
    assert made.trims == (name not in ("siglip", "fnet"))
    with torch.no_grad():
        full = made(ids, mask)
        for row, length in enumerate(mask.sum(dim=1).tolist()):
            alone = made(ids[row : row + 1, :length], mask[row : row + 1, :length])
            same = torch.allclose(alone.pooled[0], full.pooled[row], atol=1e-9)
            assert same == made.trims or length == LENGTH
            if made.trims:
                torch.testing.assert_close(alone.states[0], full.states[row, :length], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["clip", "clip-avg", "bert-own", "roberta-avg", "t5", "gpt2"])
@pytest.mark.parametrize("groups", [2, 4])
def test_length_sorted_groups_change_nothing(name: str, groups: int) -> None:
    whole, sorted_ = tower(name, groups=1).double().eval(), tower(name, groups=groups).double().eval()
    ids, mask = batch(whole)
    assert mask is not None
    ids, mask = ids.repeat(30, 1), mask.repeat(30, 1)
    lengths: list[int] = []
    sorted_.get_submodule("model").register_forward_pre_hook(
        lambda _, __, kw: lengths.append(kw["input_ids"].shape[1]), with_kwargs=True
    )
    results = []
    for made in (whole, sorted_):
        out = made(ids, mask)
        loss = out.pooled.square().sum() + (out.states * mask[..., None]).pow(3).sum()
        loss.backward()
        results.append([out.pooled, out.states * mask[..., None], *(p.grad for p in made.parameters())])
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


def test_pooling_looks_at_the_mask_not_at_ids() -> None:
    """Padding with the end token, as CLIP's tokenizer does, and end tokens inside a text."""
    made = tower("clip").eval()
    ids, mask = batch(made)
    assert mask is not None
    with torch.no_grad():
        first = made(ids, mask).pooled
        assert torch.equal(first, made(ids.masked_fill(~mask, 59), mask).pooled)
        states = made(ids, mask).states
    last = mask.sum(dim=1) - 1
    torch.testing.assert_close(first, states[torch.arange(5), last])


class Words:
    """As much of a tokenizer as a tower asks for."""

    pad_token_id, bos_token_id, eos_token_id = 2, 0, 1

    def __len__(self) -> int:
        return 50


def test_vocabulary_comes_from_the_tokenizer() -> None:
    args = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    made = texts.build(texts.Config(args={"model_type": "bert", **args}), Words())
    embedding: Any = made.get_submodule("model.embeddings.word_embeddings")
    assert (embedding.num_embeddings, embedding.padding_idx) == (50, 2)
    with pytest.raises(ConfigError, match="50 tokens, the model only 40"):
        texts.build(texts.Config(args={"model_type": "bert", **args, "vocab_size": 40}), Words())
    shared = Words()
    shared.pad_token_id = 1  # CLIP's tokenizer pads with the end token: its embedding must learn
    made = texts.build(texts.Config(args={"model_type": "bert", **args}), shared)
    assert made.get_submodule("model.embeddings.word_embeddings").padding_idx is None


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
def test_wrong_text_settings(settings: dict[str, Any], message: str) -> None:
    def checked(config: texts.Config) -> None:
        config.check()
        texts.build(config)

    with pytest.raises(ConfigError, match=message) as error:
        checked(texts.Config(**{"length": LENGTH, **settings}))
    assert "\n" not in str(error.value)


def test_named_text_models_from_folders(tmp_path: Path) -> None:
    """A text model alone, and the text half of a CLIP; weights in half precision on disk are used in float32."""
    from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel

    torch.manual_seed(0)
    bert = BertModel(BertConfig(**SMALL)).eval()
    bert.half().save_pretrained(tmp_path / "bert")
    made = texts.build(texts.Config(name=str(tmp_path / "bert"), pool="cls", length=LENGTH)).eval()
    ids, mask = batch(made)
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    with torch.no_grad():
        expected = bert.float()(ids, attention_mask=mask).last_hidden_state[:, 0]
        torch.testing.assert_close(made(ids, mask).pooled, expected, rtol=1e-5, atol=1e-5)
    assert made.settings()["name"] is None

    vision = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    clip = CLIPModel(CLIPConfig(text_config={**SMALL, "eos_token_id": 59}, vision_config=vision, projection_dim=8)).eval()
    clip.save_pretrained(tmp_path / "clip")
    made = texts.build(texts.Config(name=str(tmp_path / "clip"), length=LENGTH)).eval()
    with torch.no_grad():
        expected = clip.text_model(ids, attention_mask=mask).pooler_output
        torch.testing.assert_close(made(ids, mask).pooled, expected, rtol=1e-5, atol=1e-5)
    fresh = texts.build(texts.Config(name=str(tmp_path / "clip"), pretrained=False, length=LENGTH))
    assert not torch.equal(fresh.state_dict()["model.final_layer_norm.weight"] + 1, torch.zeros(24))
    assert not torch.equal(
        fresh.get_submodule("model.embeddings.token_embedding").weight,  # type: ignore[arg-type]
        made.get_submodule("model.embeddings.token_embedding").weight,  # type: ignore[arg-type]
    )


def test_the_registry_finds_towers_and_not_their_helpers() -> None:
    assert registry.component_names("towers") == ["timm", "transformers"]
    assert registry.component_names("losses") == ["clip", "siglip"]


# ---------------------------------------------------------------------------------------------------------------------
# oneDNN


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False)])
def test_onednn_linear_is_linear(bias: bool, needs: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias)
    plain.weight.requires_grad_(needs[1])
    fast = nn.Sequential(copy.deepcopy(plain))
    use_onednn(fast)
    assert isinstance(fast[0], nn.Linear)
    assert fast.state_dict().keys() == {f"0.{name}" for name in plain.state_dict()}
    x = torch.randn(5, 7, 24)
    ours, theirs = x.clone().requires_grad_(needs[0]), x.clone().requires_grad_(needs[0])
    a, b = fast(ours), plain(theirs)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    a.square().sum().backward()
    b.square().sum().backward()
    for mine, reference in [(ours, theirs), *zip(fast.parameters(), plain.parameters(), strict=True)]:
        assert (mine.grad is None) == (reference.grad is None)
        if reference.grad is not None:
            torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(fast.double()(x.double()), plain.double()(x.double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast.float()(x).dtype == torch.bfloat16
