"""A two-tower model of a few thousand weights, a batch for it, and the losses in closed form: the reference."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pretrain import registry
from pretrain.data.loader import Batch
from pretrain.model import DualEncoder, ModelConfig, build
from pretrain.runtime import distributed
from pretrain.strategies import Strategy
from pretrain.training.objective import Contrastive, Objective
from pretrain.training.step import train_step

SAMPLES = 16
LENGTH = 12
VOCABULARY = 64


def build_model(
    loss: str, dtype: torch.dtype = torch.float32, image: dict[str, Any] | None = None, text: dict[str, Any] | None = None
) -> DualEncoder:
    """The same weights at each call. `image` and `text` change the towers' settings."""
    torch.manual_seed(0)
    vit = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    clip = {
        "model_type": "clip_text_model",
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    timm = registry.get_component("towers", "timm").Config
    transformers = registry.get_component("towers", "transformers").Config
    image, text = image or {}, text or {}
    towers = {
        "image": timm(**{"name": "vit_tiny_patch16_224", "size": 16, **image, "args": {**vit, **image.get("args", {})}}),
        "text": transformers(**{"length": LENGTH, **text, "args": {**clip, **text.get("args", {})}}),
    }
    part = registry.get_component("losses", loss)
    built = build(towers, ModelConfig(dim=8, logit_scale=part.LOGIT_SCALE, logit_bias=part.LOGIT_BIAS))
    with torch.no_grad():
        for p in built.parameters():
            p.add_(0.05 * torch.randn_like(p) if p.numel() > 1 else 0.0)  # zero biases would hide mistakes
    return built.to(dtype).train()


def build_objective(loss: str, **settings: Any) -> Contrastive:
    """The product's own loss."""
    part = registry.get_component("losses", loss)
    return Contrastive(part.build(part.Config(name=loss, **settings)))


def build_batch(seed: int = 0, samples: int = SAMPLES, texts: int = 1) -> Batch:
    """Random pictures, random texts of different lengths that end in the end token; with more `texts` each has so many."""
    if texts > 1:
        others = [build_batch(seed + 1000 * k, samples) for k in range(texts)]
        ids, mask = (
            torch.stack(rows, dim=1) for rows in ([o.inputs["text"] for o in others], [o.masks["text"] for o in others])
        )
        about = torch.arange(samples * texts).reshape(samples, texts)
        inputs = {"image": others[0].inputs["image"], "text": ids}
        return Batch(inputs, {"text": mask}, others[0].keys, {"caption_id": about})
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (samples, 3, 16, 16), generator=g, dtype=torch.uint8)
    ids = torch.randint(3, VOCABULARY, (samples, LENGTH), generator=g)
    lengths = torch.randint(3, LENGTH + 1, (samples,), generator=g)
    lengths[:: samples // 4] = LENGTH  # every process's share has a longest text
    places = torch.arange(LENGTH)
    mask = places < lengths[:, None]
    ids = torch.where(mask, ids, 0)
    ids[torch.arange(samples), lengths - 1] = 2
    keys = [f"shard/{seed}-{i:04}" for i in range(samples)]
    return Batch({"image": images, "text": ids}, {"text": mask}, keys, {"caption_id": torch.arange(samples)})


def closed_form_loss(loss: str, features: dict[str, Tensor]) -> Tensor:
    """The loss of a whole batch as its paper writes it, B x B and all; of several texts a picture the mean."""
    if features["text"].dim() == 3:
        each = [closed_form_loss(loss, {**features, "text": text}) for text in features["text"].unbind(1)]
        return torch.stack(each).mean()
    s = features["logit_scale"] * features["image"] @ features["text"].T
    if loss == "clip":  # Radford et al. 2021, figure 3
        right = s.diagonal()
        return -(2 * right - s.logsumexp(1) - s.logsumexp(0)).mean() / 2
    assert loss == "siglip"  # Zhai et al. 2023, algorithm 1
    z = 2 * torch.eye(len(s), dtype=s.dtype) - 1
    return -torch.nn.functional.logsigmoid(z * (s + features["logit_bias"])).sum() / len(s)


def reference_gradients(loss: str, whole: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one process on the whole batch, float64."""
    net = build_model(loss, torch.float64)
    value = closed_form_loss(loss, net(whole.inputs, whole.masks))
    value.backward()
    return value.item(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def run_one_step(
    strategy: Strategy, objective: Objective, mine: Batch, chunks: int, seeds: tuple[int, int, int]
) -> tuple[float, dict[str, Tensor]]:
    """(loss over all processes, whole gradients) of a step with learning rate 0 on this process's share of the batch."""
    found: dict[str, Tensor] = {}
    apply = strategy.apply

    def spy(lr: float) -> Any:
        found.update(strategy.gradients())
        return apply(lr)

    strategy.apply = spy  # type: ignore[method-assign]
    try:
        out = train_step(strategy, objective, mine, chunks, 0.0, seeds)
    finally:
        strategy.apply = apply  # type: ignore[method-assign]
    assert out["skipped"].item() == 0
    return distributed.mean(out["loss"]).item(), found


def gradient_errors(got: dict[str, Tensor], expected: dict[str, Tensor], floor: float = 1e-3) -> dict[str, float]:
    """||g - ref|| / max(||ref||, floor ||whole gradient||) by parameter; scalars without the floor."""
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    floor *= math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    found = {}
    for name, want in expected.items():
        low = 0.0 if name.startswith("logit_") else floor
        found[name] = float((got[name].double() - want).norm()) / max(float(want.norm()), low)
    return found
