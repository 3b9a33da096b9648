"""A two-tower model of a few thousand weights, its batches, and reference losses and gradients."""

from __future__ import annotations

import copy
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
    """Build the model in training mode, with the same weights at each call.

    loss: sets the initial scale and bias; image, text: changes to the towers' settings.
    """
    key = repr((loss, image, text, torch.get_default_device(), torch.get_default_dtype()))
    if key not in _built:  # which takes fifteen times as long as a copy
        _built[key] = _build_model(loss, image or {}, text or {}), torch.random.get_rng_state()
    model, state = _built[key]
    torch.random.set_rng_state(state)
    return copy.deepcopy(model).to(dtype).train()


_built: dict[str, tuple[DualEncoder, Tensor]] = {}
"""Models by their settings, and the state of the random numbers after each was built. They are never changed."""


def _build_model(loss: str, image: dict[str, Any], text: dict[str, Any]) -> DualEncoder:
    """Build a model in float32."""
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
    towers = {
        "image": timm(**{"name": "vit_tiny_patch16_224", "size": 16, **image, "args": {**vit, **image.get("args", {})}}),
        "text": transformers(**{"length": LENGTH, **text, "args": {**clip, **text.get("args", {})}}),
    }
    module = registry.get_component("losses", loss)
    model = build(towers, ModelConfig(dim=8, logit_scale=module.LOGIT_SCALE, logit_bias=module.LOGIT_BIAS))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p) if p.numel() > 1 else 0.0)  # zero biases would hide mistakes
    return model


def build_objective(loss: str, **settings: Any) -> Contrastive:
    """Build the objective of pretraining with a loss of pretrain/losses."""
    module = registry.get_component("losses", loss)
    return Contrastive(module.build(module.Config(name=loss, **settings)))


def build_batch(seed: int = 0, samples: int = SAMPLES, texts: int = 1) -> Batch:
    """Build a batch of random images, and random texts of different lengths that end in the end token.

    texts: texts of each image; with more than one, text inputs and masks have the shape (samples, texts, LENGTH).
    """
    if texts > 1:
        batches = [build_batch(seed + 1000 * k, samples) for k in range(texts)]
        ids, mask = (
            torch.stack(rows, dim=1) for rows in ([b.inputs["text"] for b in batches], [b.masks["text"] for b in batches])
        )
        caption_ids = torch.arange(samples * texts).reshape(samples, texts)
        inputs = {"image": batches[0].inputs["image"], "text": ids}
        return Batch(inputs, {"text": mask}, batches[0].keys, {"caption_id": caption_ids})
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (samples, 3, 16, 16), generator=g, dtype=torch.uint8)
    ids = torch.randint(3, VOCABULARY, (samples, LENGTH), generator=g)
    lengths = torch.randint(3, LENGTH + 1, (samples,), generator=g)
    lengths[:: samples // 4] = LENGTH  # each process's rows include a text of full length
    positions = torch.arange(LENGTH)
    mask = positions < lengths[:, None]
    ids = torch.where(mask, ids, 0)
    ids[torch.arange(samples), lengths - 1] = 2
    keys = [f"shard/{seed}-{i:04}" for i in range(samples)]
    return Batch({"image": images, "text": ids}, {"text": mask}, keys, {"caption_id": torch.arange(samples)})


def label(batch: Batch, negatives: int) -> Batch:
    """Let the last texts of each sample be its negatives, some of them padding, and give the other texts weights, some 0."""
    ids = batch.targets["caption_id"][:, :-negatives]
    g = torch.Generator().manual_seed(9)
    weights = torch.rand(ids.shape, generator=g, dtype=torch.float64) * 3 * (torch.rand(ids.shape, generator=g) < 0.8)
    targets = {"caption_id": ids, "weight": weights}
    if ids.shape[1] == 1:
        targets = {name: value[:, 0] for name, value in targets.items()}
    targets["negative_mask"] = torch.rand(len(batch), negatives, generator=g) < 0.7
    targets["negative_id"] = torch.arange(len(batch) * negatives).view(len(batch), negatives) + 10**6
    return Batch(batch.inputs, batch.masks, batch.keys, targets)


def labeled_loss(loss: str, features: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Return sum(w l) / sum(w) over all texts of a whole batch, where images see negatives, too.

    In siglip, half of a pair's loss is its image's and half its text's; a negative is its sample's.
    """
    mask, scale, images = targets["negative_mask"], features["logit_scale"], features["image"]
    count = mask.shape[1]
    negatives = [(i, features["text"][i, f - count]) for i in range(len(mask)) for f in range(count) if mask[i, f]]
    total: Any = 0
    for k, w in enumerate(targets["weight"].reshape(len(mask), -1).T):
        s = scale * images @ features["text"][:, k].T
        s_negative = scale * images @ torch.stack([text for _, text in negatives]).T
        if loss == "clip":
            rows = torch.cat([s, s_negative], dim=1).logsumexp(1)
            total = total + (w * (rows + s.logsumexp(0) - 2 * s.diagonal()) / 2).sum()
            continue
        z = 1 - 2 * torch.eye(len(s), dtype=s.dtype)
        terms = torch.cat([z * (s + features["logit_bias"]), s_negative + features["logit_bias"]], dim=1)
        of_columns = torch.cat([w, w[[i for i, _ in negatives]]])
        total = total + ((w[:, None] + of_columns) / 2 * (1 + terms.exp()).log()).sum()
    return total / targets["weight"].sum()


TEACHING = {"weight": 0.4, "temperature": 0.1}
"""Settings of the distill loss."""


def teach(batch: Batch) -> Batch:
    """Give a batch the embeddings of two teachers, one of images and texts, one of images; both lack some samples."""
    g = torch.Generator().manual_seed(12)
    image, text, alone = (torch.randn(len(batch), width, generator=g, dtype=torch.float64) for width in (6, 6, 3))
    masks = torch.rand(3, len(batch), generator=g) < 0.8
    both = {"image": image, "image_mask": masks[0], "text": text, "text_mask": masks[1]}
    teachers = {"0": both, "1": {"image": alone, "image_mask": masks[2]}}
    return Batch(batch.inputs, batch.masks, batch.keys, {**batch.targets, "teachers": teachers})


def distilled_loss(features: dict[str, Tensor], targets: dict[str, Any]) -> Tensor:
    """Return the loss of MobileCLIP (Vasu et al., 2311.17049) on a whole batch of `teach`, by torch's kl_div."""

    def divergence(s: Tensor, t: Tensor) -> Tensor:
        logs = s.log_softmax(dim=1), (t / TEACHING["temperature"]).log_softmax(dim=1)
        return torch.nn.functional.kl_div(*logs, reduction="batchmean", log_target=True)

    both, alone = targets["teachers"].values()
    cosines = {}
    for name, teacher, m in (("both", both, both["image_mask"] & both["text_mask"]), ("alone", alone, alone["image_mask"])):
        unit = {key: x[m] / x[m].norm(dim=1, keepdim=True) for key, x in teacher.items() if not key.endswith("mask")}
        other = "text" if name == "both" else "image"
        cosines[name] = (
            features["logit_scale"] * features["image"][m] @ features[other][m].T,
            unit["image"] @ unit[other].T,
        )
    s, t = cosines["both"]
    losses = [(divergence(s, t) + divergence(s.T, t.T)) / 2]
    off_diagonal = ~torch.eye(len(cosines["alone"][0]), dtype=torch.bool)
    losses.append(divergence(*(x[off_diagonal].view(len(x), -1) for x in cosines["alone"])))
    weight = TEACHING["weight"]
    return (1 - weight) * closed_form_loss("clip", features) + weight * torch.stack(losses).mean()


def closed_form_loss(loss: str, features: dict[str, Tensor]) -> Tensor:
    """Return the loss of a whole batch as its paper defines it, from the B x B matrix.

    With several texts an image, (b, k, D), it is the mean of the losses of each k.
    """
    if features["text"].dim() == 3:
        losses = [closed_form_loss(loss, {**features, "text": text}) for text in features["text"].unbind(1)]
        return torch.stack(losses).mean()
    s = features["logit_scale"] * features["image"] @ features["text"].T
    if loss == "clip":  # Radford et al. 2021, figure 3
        positives = s.diagonal()
        return -(2 * positives - s.logsumexp(1) - s.logsumexp(0)).mean() / 2
    assert loss == "siglip"  # Zhai et al. 2023, algorithm 1
    z = 2 * torch.eye(len(s), dtype=s.dtype) - 1
    return -torch.nn.functional.logsigmoid(z * (s + features["logit_bias"])).sum() / len(s)


def reference_gradients(loss: str, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of one process on a whole batch, perhaps of `label` or `teach`, in float64."""
    model = build_model(loss, torch.float64)
    features = model(batch.inputs, batch.masks)
    if "teachers" in batch.targets:
        value = distilled_loss(features, batch.targets)
    elif "weight" in batch.targets:
        value = labeled_loss(loss, features, batch.targets)
    else:
        value = closed_form_loss(loss, features)
    value.backward()
    return value.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def run_one_step(
    strategy: Strategy, objective: Objective, batch: Batch, chunks: int, seeds: tuple[int, int, int]
) -> tuple[float, dict[str, Tensor]]:
    """Run a training step with learning rate 0 on this process's rows of the batch.

    Returns the mean loss over all processes, and the full gradients by parameter name.
    """
    gradients: dict[str, Tensor] = {}
    apply = strategy.apply

    def record_and_apply(lr: float) -> Any:
        gradients.update(strategy.gradients())
        return apply(lr)

    strategy.apply = record_and_apply  # type: ignore[method-assign]
    try:
        out = train_step(strategy, objective, batch, chunks, 0.0, seeds)
    finally:
        strategy.apply = apply  # type: ignore[method-assign]
    assert out["skipped"].item() == 0
    return distributed.mean(out["loss"]).item(), gradients


def gradient_errors(gradients: dict[str, Tensor], expected: dict[str, Tensor], floor: float = 1e-3) -> dict[str, float]:
    """Return ||g - ref|| / max(||ref||, floor ||full gradient||) by parameter; scalars without the floor."""
    assert gradients.keys() == expected.keys(), gradients.keys() ^ expected.keys()
    floor *= math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    errors = {}
    for name, reference in expected.items():
        minimum = 0.0 if name.startswith("logit_") else floor
        errors[name] = float((gradients[name].double() - reference).norm()) / max(float(reference.norm()), minimum)
    return errors
