"""The sections of a configuration and the weights of a ClapModel of transformers: towers of sounds and texts.

hf_import.py reads the folder, and its tokenizer.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import UserError
from pretrain.runtime.console import log_info
from pretrain.towers import hf_audio, hf_models


def read_audio_section(config: Any, source: str) -> dict[str, Any]:
    """Return the section `audio`: the architecture, and how the folder's feature extractor makes spectrograms.

    Args:
        config: a ClapConfig.
        source: a folder, or a name on the hub.

    Raises UserError for an extractor whose settings cannot be read.
    """
    settings = config.audio_config
    published = hf_audio.read_preprocessing(source, settings)
    if published.path is None:
        log_info(f"{source} has no preprocessor_config.json: spectrograms are computed as for laion/clap-htsat-unfused")
    section = {"tower": "audio", "args": hf_models.inline_args(SimpleNamespace(config=settings)), **published.mel}
    return section | {"seconds": published.seconds or 10.0, "pad": published.pad or "repeatpad"}


def read_projections(config: Any, weights: dict[str, Tensor], source: str) -> tuple[str, dict[str, Tensor]]:
    """Return model.projection, and the projections of sounds and texts under the names of DualEncoder.

    Without an activation between them, and without biases, the two layers are one matrix: exports hold it so.

    Raises UserError for another activation than ReLU, and for biases without one.
    """
    act, names = config.projection_hidden_act, ("audio", "text")
    if act == "relu":
        kinds = [f"linear{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
        return "mlp", {f"projections.{name}.{kind}": weights[f"{name}_projection.{kind}"] for name in names for kind in kinds}
    if act != "linear":
        raise UserError(f"{source}: projection_hidden_act={act} is the activation of its projections; only relu can be read")
    if any(weights[f"{name}_projection.linear{i}.bias"].any() for name in names for i in (1, 2)):
        raise UserError(f"{source}: its projections have biases, but no activation (projection_hidden_act=linear)")
    first, second = ({name: weights[f"{name}_projection.linear{i}.weight"].double() for name in names} for i in (1, 2))
    return "linear", {f"projections.{name}.weight": (second[name] @ first[name]).float() for name in names}


def read_logit_scale(weights: dict[str, Tensor], source: str) -> Tensor:
    """Return the logit scale (1,): CLAP has one for each direction, of which the mean is taken."""
    audio, text = (weights[f"logit_scale_{name}"] for name in ("a", "t"))
    if not torch.isclose(audio, text, rtol=0.01):
        scales = f"{audio.exp():.1f}, and one for texts, {text.exp():.1f}"
        log_info(f"{source} has a logit scale for sounds, {scales}: the mean of their logarithms is taken for both")
    return ((audio + text) / 2).reshape(1)
