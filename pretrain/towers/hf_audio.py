"""Builds audio models of the transformers library, and reads how their spectrograms are computed.

Two architectures take log-mel spectrograms: the Audio Spectrogram Transformer and CLAP's audio model (HTSAT).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError, closest
from pretrain.towers.hf_models import ModelSource, build_settings, describe_origin, one_line, quiet, refuse_unknown_args

AST, CLAP = "audio-spectrogram-transformer", "clap_audio_model"
MODEL_TYPES = (AST, CLAP)
PREPROCESSING = {
    AST: {
        "rate": 16000, "recipe": "kaldi", "n_fft": 512, "window": 400, "hop": 160, "fmin": 20.0,
        "mean": -4.2677393, "std": 2 * 4.5689974,
    },
    CLAP: {
        "rate": 48000, "recipe": "slaney", "n_fft": 1024, "window": 1024, "hop": 480, "fmin": 50.0, "fmax": 14000.0,
        "mean": 0.0, "std": 1.0,
    },
}  # fmt: skip
"""Settings of the published models (MIT/ast-finetuned-audioset, laion/clap-htsat-unfused), where nothing else is known."""
EXTRACTOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files beside a model that say how its spectrograms are computed; the second holds it in a section of its own."""


class LoadedAudioModel(NamedTuple):
    """An audio model without any head, in float32."""

    model: Any
    origin: str
    """Where its weights are from, in words; empty for random ones."""


class Preprocessing(NamedTuple):
    """What a model's own files say about its input."""

    mel: dict[str, Any]
    """Fields of MelSettings."""
    seconds: float | None
    pad: str | None
    """As audio.pad."""
    path: Path | None
    """The file; None where there is none, and the values are those of the architecture's published models."""


def read_settings(config: ModelSource) -> Any:
    """Return the transformers configuration of the model that audio.name or audio.args describes. Raises ConfigError."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    args = dict(config.args)
    model_type = args.pop("model_type", None)
    if config.name is None:
        if model_type not in MODEL_TYPES:
            raise ConfigError(
                f"audio.args.model_type={model_type!r}{closest(str(model_type), list(MODEL_TYPES))}; "
                f"the choices are {', '.join(MODEL_TYPES)}"
            )
        config_class = CONFIG_MAPPING[model_type]
        refuse_unknown_args(config_class, args, "audio")
        return build_settings(config_class, args, "audio")
    try:
        settings = AutoConfig.from_pretrained(config.name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"audio.name={config.name!r} is neither `conv`, nor a folder, nor on the hub as a transformers model: "
            f"{one_line(error)}"
        ) from error
    settings = getattr(settings, "audio_config", settings)  # the audio model of CLAP
    if settings.model_type not in MODEL_TYPES:
        raise ConfigError(
            f"audio.name={config.name!r} is a {settings.model_type}; audio towers are {', '.join(MODEL_TYPES)} or conv"
        )
    refuse_unknown_args(type(settings), args, "audio")
    return build_settings(type(settings), {**settings.to_dict(), **args}, "audio") if args else settings


def load_audio_model(config: ModelSource, settings: Any) -> LoadedAudioModel:
    """Build the model of a transformers configuration, and load its weights if audio.name names it. Raises ConfigError."""
    import transformers
    from transformers import ClapAudioModelWithProjection

    logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)
    is_clap, is_loaded = settings.model_type == CLAP, config.name is not None and config.pretrained is not False
    # CLAP's folders hold both towers; the class with a projection is the one that finds the audio tower in them.
    model_class: Any = ClapAudioModelWithProjection if is_clap else transformers.ASTModel
    try:
        if not is_loaded:
            model = (transformers.ClapAudioModel if is_clap else model_class)(settings)
            return LoadedAudioModel(model, "")
        with quiet():
            model, info = model_class.from_pretrained(
                config.name, config=settings, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
    except OSError as error:
        raise ConfigError(
            f"audio.name={config.name!r}: the weights cannot be loaded: {one_line(error)}; "
            "audio.pretrained=false starts at random"
        ) from error
    except Exception as error:  # transformers raises errors of many types for impossible sizes
        raise ConfigError(f"audio.args: {model_class.__name__} cannot be built: {one_line(error)}") from error
    missing = [key for key in info["missing_keys"] if not key.startswith("audio_projection.")]
    model = model.audio_model if is_clap else model
    missing = sorted(key.removeprefix("audio_model.") for key in missing)
    return LoadedAudioModel(model, describe_origin(config.name, model, missing, "audio"))


def read_preprocessing(name: str | None, settings: Any) -> Preprocessing:
    """Return how the spectrograms of a model are computed, by its own file where there is one. Raises ConfigError."""
    mel = {**PREPROCESSING[settings.model_type], "mels": settings.num_mel_bins}
    content, path = _read_extractor(name) if name is not None else ({}, None)
    if path is None:
        return Preprocessing(mel, None, None, None)
    try:
        if settings.model_type == AST:
            mel |= {
                "rate": int(content.get("sampling_rate", mel["rate"])),
                "mels": int(content.get("num_mel_bins", mel["mels"])),
            }
            if not content.get("do_normalize", True):
                content |= {"mean": 0.0, "std": 0.5}
            mel |= {"mean": float(content.get("mean", mel["mean"])), "std": 2 * float(content.get("std", mel["std"] / 2))}
            return Preprocessing(mel, None, None, path)
        mel |= {
            "rate": int(content.get("sampling_rate", 48000)),
            "recipe": "htk" if content.get("truncation", "fusion") == "fusion" else "slaney",
            "n_fft": int(content.get("fft_window_size", 1024)),
            "window": int(content.get("fft_window_size", 1024)),
            "hop": int(content.get("hop_length", 480)),
            "mels": int(content.get("feature_size", 64)),
            "fmin": float(content.get("frequency_min", 0)),
            "fmax": float(content.get("frequency_max", 14000)),
        }
        pad = {"repeat": "repeat", "pad": "silence"}.get(content.get("padding", ""), "repeatpad")
        return Preprocessing(mel, float(content.get("max_length_s", 10)), pad, path)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"audio.name={name!r}: {path} cannot be read: {one_line(error)}") from error


def _read_extractor(name: str) -> tuple[dict[str, Any], Path | None]:
    """Return the settings of a model's feature extractor, and the file they are from; {} and None where there is none."""
    from transformers.utils import cached_file

    for filename in EXTRACTOR_FILES:
        path: Path | None = Path(name) / filename
        if not Path(name).is_dir():
            flags = ("gated_repo", "missing_entries", "connection_errors")
            options: dict[str, Any] = {f"_raise_exceptions_for_{flag}": False for flag in flags}
            fetched = cached_file(name, filename, **options)
            path = None if fetched is None else Path(fetched)
        if path is None or not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            content = content.get("feature_extractor", content)
            if not isinstance(content, Mapping):
                raise ValueError("it is no mapping")
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"audio.name={name!r}: {path} cannot be read: {one_line(error)}") from error
        if "sampling_rate" in content:
            return dict(content), path
    return {}, None


class SpectrogramModel(nn.Module):
    """A transformers audio model: spectrograms (b, T, F) to a map (b, C, H, W) of frequencies and times, and pooled (b, P)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.is_clap = model.config.model_type == CLAP
        if self.is_clap:
            # Fusion adds crops of sounds that are longer than the input. Sounds are cropped before, so that none is.
            model.audio_encoder.enable_fusion = model.audio_encoder.patch_embed.enable_fusion = False

    @torch.no_grad()
    def set_normalization(self, mean: float, std: float) -> None:
        """Let CLAP's BatchNorm normalize every band by these."""
        norm = self.model.audio_encoder.batch_norm
        norm.running_mean.fill_(mean)
        norm.running_var.fill_(std**2)

    @property
    def frames(self) -> int:
        """The number of frames that the model takes (AST), or the most (CLAP)."""
        settings = self.model.config
        if not self.is_clap:
            return int(settings.max_length)
        return int(settings.spec_size * (settings.spec_size // settings.num_mel_bins))

    @property
    def block_names(self) -> list[str]:
        """Prefixes of the parameters of each block, in order."""
        if not self.is_clap:
            return [f"model.layers.{i}." for i in range(len(self.model.layers))]
        stages = self.model.audio_encoder.layers
        return [f"model.audio_encoder.layers.{s}.blocks.{i}." for s in range(len(stages)) for i in range(len(stages[s].blocks))]

    def forward(self, spectrograms: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_clap:
            out = self.model(spectrograms)
            states: Tensor = out.last_hidden_state[:, 2:]  # behind the class token and the distillation token
            grid: tuple[int, int] = self.model.embeddings.get_shape(self.model.config)
            return states.transpose(1, 2).unflatten(2, grid), out.pooler_output
        out = self.model(input_features=spectrograms[:, None])
        return out.last_hidden_state, out.pooler_output

    def train(self, mode: bool = True) -> SpectrogramModel:
        """Set training mode for all modules but CLAP's BatchNorm, which normalizes by its stored statistics.

        Those of a batch would depend on chunks and processes.
        """
        super().train(mode)
        if self.is_clap:
            self.model.audio_encoder.batch_norm.training = False
        return self
