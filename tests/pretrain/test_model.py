"""DualEncoder gives the embeddings of open_clip and transformers from their weights; other properties."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pretrain
from pretrain import model as models
from pretrain import registry
from pretrain.config import load
from pretrain.errors import ConfigError
from pretrain.model import DualEncoder, ModelConfig, ModelSchema
from pretrain.towers import timm as images
from pretrain.towers import transformers as texts
from tests.support import audio_tower, environment
from tests.support.launches import TIMEOUT_SECONDS

D, SIZE, LENGTH = 16, 32, 20
TEXT = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def build_clip(act: str = "quick_gelu", seed: int = 0, **more: Any) -> DualEncoder:
    """Build a tiny CLIP.

    more: `image` and `text`, changes of the towers' settings, and fields of ModelConfig.
    """
    torch.manual_seed(seed)
    text = {"model_type": "clip_text_model", **TEXT, "hidden_act": act, "max_position_embeddings": LENGTH}
    image = {**VIT, "act_layer": act}
    towers = {
        "image": images.Config(name="vit_base_patch32_clip_224", size=SIZE, args=image, **more.pop("image", {})),
        "text": texts.Config(args=text, length=LENGTH, **more.pop("text", {})),
    }
    return models.build(towers, ModelConfig(dim=D, **more))


def build_batch(b: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Return normalized images (b, 3, S, S), ids (b, T) ending in 59 and padded with 1, and mask (b, T)."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 58, (b, LENGTH), generator=g)
    lengths = torch.randint(2, LENGTH + 1, (b,), generator=g)
    ids[torch.arange(b), lengths - 1] = 59
    mask = torch.arange(LENGTH) < lengths[:, None]
    return torch.randn(b, 3, SIZE, SIZE, generator=g), ids.masked_fill(~mask, 1), mask


def assert_agrees(model: DualEncoder, image: Tensor, text: Tensor, logits: Tensor) -> None:
    """Assert that the model's embeddings and logits of build_batch() equal the expected ones.

    image, text: embeddings (b, D) before or after normalization; logits: (b, b), image by text.
    """
    pixels, ids, mask = build_batch()
    with torch.no_grad():
        out = model.eval()({"image": pixels, "text": ids}, {"text": mask})
    torch.testing.assert_close(out["image"], F.normalize(image, dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["text"], F.normalize(text, dim=1), rtol=1e-5, atol=1e-5)
    actual = out["logit_scale"] * out["image"] @ out["text"].t() + out.get("logit_bias", torch.zeros(1))
    torch.testing.assert_close(actual, logits, rtol=1e-5, atol=1e-4)  # 1e-5 of a scale of 14


# ---------------------------------------------------------------------------------------------------------------------
# Equal weights in other libraries


def timm_from_transformers(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Return the weights of a transformers vision model (CLIP, SigLIP) under timm's names."""
    new = {
        "patch_embed.proj.weight": state["embeddings.patch_embedding.weight"],
        "pos_embed": state["embeddings.position_embedding.weight"][None],
        "norm.weight": state["post_layernorm.weight"],
        "norm.bias": state["post_layernorm.bias"],
    }
    names = {"layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for i in range(layers):
        old, block = f"encoder.layers.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias"):
            for old_name, new_name in {**names, "self_attn.out_proj": "attn.proj"}.items():
                new[f"{block}{new_name}.{kind}"] = state[f"{old}{old_name}.{kind}"]
            new[f"{block}attn.qkv.{kind}"] = torch.cat([state[f"{old}self_attn.{p}_proj.{kind}"] for p in "qkv"])
    return new


def test_clip_of_transformers() -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {**TEXT, "eos_token_id": 59, "max_position_embeddings": LENGTH}
    reference = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**VISION, "image_size": SIZE, "patch_size": 8}, projection_dim=D)
    ).eval()
    vision = reference.vision_model.state_dict()
    image = timm_from_transformers(vision, 2) | {
        "cls_token": vision["embeddings.class_embedding"][None, None],
        "norm_pre.weight": vision["pre_layrnorm.weight"],
        "norm_pre.bias": vision["pre_layrnorm.bias"],
    }
    model = build_clip()
    model.tower("image").get_submodule("model").load_state_dict(image)
    model.tower("text").get_submodule("model").load_state_dict(reference.text_model.state_dict())
    model.projection("image").load_state_dict(reference.visual_projection.state_dict())
    model.projection("text").load_state_dict(reference.text_projection.state_dict())
    with torch.no_grad():
        model.logit_scale.fill_(reference.logit_scale.item())
        pixels, ids, mask = build_batch()
        out = reference(input_ids=ids, attention_mask=mask.long(), pixel_values=pixels)
    assert_agrees(model, out.image_embeds, out.text_embeds, out.logits_per_image)


def test_siglip_of_transformers() -> None:
    """Attention pooling, text without a mask, identity projections, a bias of the logits."""
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    text = {**TEXT, "max_position_embeddings": LENGTH, "projection_size": 32}
    reference = SiglipModel(
        SiglipConfig(text_config=text, vision_config={**VISION, "image_size": SIZE, "patch_size": 8})
    ).eval()
    vision = reference.vision_model.state_dict()
    image = timm_from_transformers(vision, 2) | {"patch_embed.proj.bias": vision["embeddings.patch_embedding.bias"]}
    image["attn_pool.latent"] = vision["head.probe"]
    for kind in ("weight", "bias"):
        q, k, v = vision[f"head.attention.in_proj_{kind}"].chunk(3)
        image |= {f"attn_pool.q.{kind}": q, f"attn_pool.kv.{kind}": torch.cat([k, v])}
        for name, part in {
            "attention.out_proj": "proj",
            "layernorm": "norm",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }.items():
            image[f"attn_pool.{part}.{kind}"] = vision[f"head.{name}.{kind}"]
    args = {"model_type": "siglip_text_model", **text}
    towers = {
        "image": images.Config(name="vit_base_patch16_siglip_224", size=SIZE, args={**VIT, "act_layer": "gelu_tanh"}),
        "text": texts.Config(args=args, length=LENGTH, pool="tower"),
    }
    model = models.build(towers, ModelConfig(dim=32, logit_scale=math.log(10), logit_bias=-10.0))
    model.tower("image").get_submodule("model").load_state_dict(image)
    model.tower("text").get_submodule("model").load_state_dict(reference.text_model.state_dict())
    assert not model.tower("text").trims
    with torch.no_grad():
        for modality in ("image", "text"):
            model.projection(modality).weight.copy_(torch.eye(32))
        model.logit_scale.fill_(reference.logit_scale.item())
        assert model.logit_bias is not None
        model.logit_bias.fill_(reference.logit_bias.item())
        pixels, ids, _ = build_batch()
        out = reference(input_ids=ids, pixel_values=pixels)
    assert_agrees(model, out.image_embeds, out.text_embeds, out.logits_per_image)


@pytest.mark.parametrize("quick", [True, False])
def test_clip_of_open_clip(quick: bool) -> None:
    from open_clip.model import CLIP

    torch.manual_seed(0)
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": SIZE}
    text = {"context_length": LENGTH, "vocab_size": 60, "width": 24, "heads": 2, "layers": 2}
    reference = CLIP(D, vision, text, quick_gelu=quick).eval()
    state = reference.state_dict()
    image = {
        "cls_token": state["visual.class_embedding"][None, None],
        "pos_embed": state["visual.positional_embedding"][None],
        "patch_embed.proj.weight": state["visual.conv1.weight"],
    }
    text_weights = {
        "embeddings.token_embedding.weight": state["token_embedding.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
    }
    for kind in ("weight", "bias"):
        image |= {f"norm_pre.{kind}": state[f"visual.ln_pre.{kind}"], f"norm.{kind}": state[f"visual.ln_post.{kind}"]}
        text_weights[f"final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
        for i in range(2):
            old, block = f"visual.transformer.resblocks.{i}.", f"blocks.{i}."
            for a, b in {"ln_1": "norm1", "ln_2": "norm2", "attn.out_proj": "attn.proj", "mlp.c_fc": "mlp.fc1"}.items():
                image[f"{block}{b}.{kind}"] = state[f"{old}{a}.{kind}"]
            image[f"{block}mlp.fc2.{kind}"] = state[f"{old}mlp.c_proj.{kind}"]
            image[f"{block}attn.qkv.{kind}"] = state[f"{old}attn.in_proj_{kind}"]
            old, block = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
            for a, b in {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}.items():
                text_weights[f"{block}{b}.{kind}"] = state[f"{old}{a}.{kind}"]
            text_weights[f"{block}self_attn.out_proj.{kind}"] = state[f"{old}attn.out_proj.{kind}"]
            for part, rows in zip("qkv", state[f"{old}attn.in_proj_{kind}"].chunk(3), strict=True):
                text_weights[f"{block}self_attn.{part}_proj.{kind}"] = rows
    model = build_clip("quick_gelu" if quick else "gelu")
    model.tower("image").get_submodule("model").load_state_dict(image)
    model.tower("text").get_submodule("model").load_state_dict(text_weights)
    pixels, ids, _ = build_batch()
    ids = ids.masked_fill(ids == 1, 0)  # open_clip pads with 0 and pools at the largest id
    with torch.no_grad():
        model.projection("image").weight.copy_(state["visual.proj"].t())
        model.projection("text").weight.copy_(state["text_projection"].t())
        model.logit_scale.fill_(reference.logit_scale.item())
        image_out, text_out = reference.encode_image(pixels), reference.encode_text(ids)
        logits, _ = reference.get_logits(pixels, ids)
    assert_agrees(model, image_out, text_out, logits)


# ---------------------------------------------------------------------------------------------------------------------
# Scale, normalization, tokens and modalities


def test_initial_scale_and_projections_are_those_of_clip() -> None:
    model = build_clip(seed=3)
    assert model.logit_scale.shape == (1,)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert model.logit_bias is None
    wide = models.DualEncoder({"image": model.tower("image")}, 4096, 1.0, -10.0)
    assert wide.projection("image").weight.std().item() == pytest.approx(32**-0.5, rel=0.02)
    assert wide.logit_bias is not None
    assert wide.logit_bias.shape == (1,)


@pytest.mark.parametrize("start", [1.0, 14.3, 100.0, 117.3])
def test_no_logit_exceeds_the_largest_that_the_model_guarantees(start: float) -> None:
    """Imported weights may begin above scale 100; features of one direction, rounded to bfloat16, have the largest logits."""
    model = build_clip()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(start))
    pixels, ids, mask = build_batch()
    with torch.no_grad():
        features = model({"image": pixels, "text": ids}, {"text": mask})
    for x in (features["image"], features["text"]):
        rounded = x.bfloat16().double()
        assert float((features["logit_scale"].double() * (rounded * rounded).sum(dim=1)).abs().max()) <= model.max_logit()
    assert model.max_logit() >= 100  # the largest scale of later steps


def test_scale_is_kept_between_1_and_100() -> None:
    model = build_clip()
    for start, end in ((9.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)):
        with torch.no_grad():
            model.logit_scale.fill_(start)
        model.clamp_()
        assert model.logit_scale.item() == pytest.approx(end)
    with pytest.raises(ConfigError, match=r"logit_scale=14\.3 is a logarithm"):
        ModelConfig(logit_scale=14.3).check()


def test_every_parameter_gets_a_gradient_from_the_loss() -> None:
    for loss in registry.component_names("losses"):
        module = registry.get_component("losses", loss)
        model = build_clip(logit_scale=module.LOGIT_SCALE, logit_bias=module.LOGIT_BIAS).train()
        pixels, ids, mask = build_batch()
        out = model({"image": pixels, "text": ids}, {"text": mask})
        teacher = {"image": torch.randn(6, 3), "image_mask": torch.ones(6, dtype=torch.bool)}
        targets = {"teachers": {"0": teacher}} if "teachers" in getattr(module, "NEEDS", ()) else {}
        value, _ = module.build(module.Config())(
            {m: out[m] for m in ("image", "text")}, out["logit_scale"], out.get("logit_bias"), targets
        )
        value.backward()
        assert all(p.grad is not None for p in model.parameters())


def test_embeddings_are_normalized_in_float32() -> None:
    model = build_clip().eval()
    pixels, ids, mask = build_batch()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = model({"image": pixels, "text": ids}, {"text": mask})
    assert out["image"].dtype == torch.float32
    torch.testing.assert_close(out["image"].norm(dim=1), torch.ones(6), rtol=0, atol=1e-6)


def test_tokens_lie_in_the_shared_space_where_pooling_is_the_mean() -> None:
    model = build_clip(image={"pool": "avg"}, text={"pool": "avg"}).eval()
    pixels, ids, mask = build_batch()
    with torch.no_grad():
        for modality, inputs, valid in (("image", pixels, None), ("text", ids, mask)):
            states, token_mask, grid, pooled = model.tokens(modality, inputs, valid)
            assert states.shape[2] == D
            mean = torch.stack([row[w].mean(dim=0) for row, w in zip(states, token_mask, strict=True)])
            torch.testing.assert_close(mean, pooled, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(F.normalize(mean, dim=1), model.encode(modality, inputs, valid), rtol=1e-4, atol=1e-5)
            assert grid == ((4, 4) if modality == "image" else None)
    with pytest.raises(ConfigError, match=r"text tower does not pool by the mean .* text\.pool=avg"):
        build_clip().tokens("text", ids, mask)


def test_parameters_are_counted_by_tower() -> None:
    model = build_clip(image={"trainable_blocks": 0})
    counts = model.parameter_counts()
    assert set(counts) == {"image", "text", "scalars"}
    assert sum(count["total"] for count in counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts["image"]["trainable"] == 32 * D
    assert counts["scalars"] == {"total": 1, "trainable": 1}


def test_a_third_modality_is_one_new_file() -> None:
    """Its dotted path in the configuration is enough: encoder and losses treat it like image and text."""
    settings = [
        "audio.tower=tests.support.audio_tower",
        f"image.args={{{', '.join(f'{k}: {v}' for k, v in VIT.items())}}}",
        f"image.size={SIZE}",
        f"text.args={{model_type: clip_text_model, {', '.join(f'{k}: {v}' for k, v in TEXT.items())}}}",
        f"text.length={LENGTH}",
        f"model.dim={D}",
    ]
    config = load(ModelSchema, None, settings)
    assert isinstance(config.others["audio"], audio_tower.Config)
    torch.manual_seed(0)
    model = models.build({"image": config.image, "text": config.text, **config.others}, config.model)
    pixels, ids, mask = build_batch()
    sound, valid = torch.randn(6, 9, 8), torch.arange(9) < torch.tensor([9, 3, 5, 1, 2, 9])[:, None]
    out = model({"image": pixels, "text": ids, "audio": sound}, {"text": mask, "audio": valid})
    assert {m: out[m].shape for m in model.towers} == dict.fromkeys(("image", "text", "audio"), (6, D))
    module = registry.get_component("losses", "clip")
    loss, report = module.build(module.Config())({m: out[m] for m in model.towers}, out["logit_scale"], None, {})
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert set(report) == {"image_to_text_accuracy", "image_to_audio_accuracy", "text_to_audio_accuracy"}
    assert set(model({"audio": sound}, {"audio": valid})) == {"audio", "logit_scale"}
    with pytest.raises(ConfigError, match="no tower for 'video'; it has image, text, audio"):
        model.encode("video", sound)


def test_a_tower_for_the_wrong_modality_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"text\.tower=timm encodes image, not text"):
        models.build({"text": images.Config(size=SIZE, args=VIT)}, ModelConfig())


def test_public_names_are_imported_at_first_use() -> None:
    """`import pretrain` does not import torch; its public names are those of their modules."""
    code = "import sys, pretrain; assert 'torch' not in sys.modules; from pretrain import load_model"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, timeout=TIMEOUT_SECONDS)
    assert pretrain.DualEncoder is DualEncoder
    assert pretrain.PretrainConfig.__module__ == "pretrain.train"
    with pytest.raises(AttributeError, match="no attribute 'Encoder'"):
        pretrain.Encoder  # noqa: B018
