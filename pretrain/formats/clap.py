"""Export of a model of texts and sounds to transformers' ClapModel, where both towers have CLAP's architecture.

    encoders -> ClapModel, ClapFeatureExtractor and tokenizer; hf.py writes them for models without image tower

CLAP projects by two layers with an activation between them, as model.projection=mlp does. Of model.projection=linear, the first
is the matrix, the second the identity, and the activation none, which gives the same embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.formats import Encoders, portable_tokenizer
from pretrain.runtime.files import apply_umask
from pretrain.towers.audio import AudioTower
from pretrain.towers.hf_audio import SpectrogramModel
from pretrain.towers.transformers import TextTower


def export_error(encoders: Encoders) -> str | None:
    """Return which part of the encoders ClapModel cannot hold, or None."""
    audio, text = encoders.audio_tower, encoders.text_tower
    if audio is None or text is None or set(encoders.model.towers) != {"audio", "text"}:
        return "a model without image tower, unless it has CLAP's towers of sounds and texts"
    if not isinstance(audio.model, SpectrogramModel) or not audio.model.is_clap:
        return "the audio tower: without images, it holds CLAP's (clap_audio_model) only"
    if audio.pool == "max":
        return "audio.pool=max: ClapModel takes the mean"
    if getattr(text.model.config, "model_type", "") != "clap_text_model" or text.pool != "tower":
        return "the text tower: with CLAP's audio tower, it holds CLAP's (clap_text_model, text.pool=tower) only"
    if encoders.model.logit_bias is not None:
        return "the logit bias, which ClapModel does not have"
    mel = audio.mel.settings
    is_published = (mel.mean, mel.std) == (0, 1) and mel.window == mel.n_fft and audio.seconds == round(audio.seconds)
    if mel.recipe == "kaldi" or not is_published:
        return (
            "the spectrogram: its feature extractor has audio.recipe=slaney or htk, audio.mean=0, audio.std=1, audio.window of "
            "audio.n_fft, and whole audio.seconds"
        )
    return None


def write(encoders: Encoders, folder: Path) -> None:
    """Write model, feature extractor and tokenizer into an existing folder. `export_error` must be None for the encoders."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    audio, text = encoders.audio_tower, encoders.text_tower
    assert isinstance(audio, AudioTower)
    assert isinstance(text, TextTower)
    audio_model = audio.model.model
    assert isinstance(audio_model, nn.Module)
    config = ClapConfig(
        text_config=text.model.config.to_dict(),  # type: ignore[operator, union-attr]
        audio_config={**audio_model.config.to_dict(), "hidden_size": audio.pooled_width},  # type: ignore[operator, union-attr]
        projection_dim=encoders.dim,
        projection_hidden_act="relu" if encoders.model.has_mlp else "linear",
    )
    model: Any = ClapModel(config)
    model.text_model.load_state_dict(text.model.state_dict())
    model.audio_model.load_state_dict(audio_model.state_dict())
    with torch.no_grad():
        for modality, layers in (("text", model.text_projection), ("audio", model.audio_projection)):
            if encoders.model.has_mlp:
                layers.load_state_dict(encoders.model.projection(modality).state_dict())
                continue
            matrix = encoders.projection(modality)
            layers.linear1.weight.copy_(torch.eye(encoders.dim) if matrix is None else matrix)
            layers.linear2.weight.copy_(torch.eye(encoders.dim))
            layers.linear1.bias.zero_()
            layers.linear2.bias.zero_()
        for scale in (model.logit_scale_a, model.logit_scale_t):
            scale.copy_(encoders.model.logit_scale.squeeze())
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        apply_umask(weights)
    portable_tokenizer.save(encoders.text, folder)
    mel = audio.mel.settings
    ClapFeatureExtractor(
        feature_size=mel.mels,
        sampling_rate=mel.rate,
        hop_length=mel.hop,
        max_length_s=round(audio.seconds),
        fft_window_size=mel.n_fft,
        frequency_min=mel.fmin,
        frequency_max=mel.fmax,
        truncation="rand_trunc" if mel.recipe == "slaney" else "fusion",
        padding={"silence": "pad"}.get(audio.config.pad, audio.config.pad),
    ).save_pretrained(folder)


class Clap:
    """An exported folder, loaded with transformers alone."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

        self._model: Any = ClapModel.from_pretrained(folder).eval()
        self._extractor: Any = ClapFeatureExtractor.from_pretrained(folder)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def embed(self, waveforms: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Embed waveforms (b, S) in [-1, 1] and texts -> (b, D) each."""
        length = self._tokenizer.model_max_length
        tokens = self._tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=length)
        tokens.pop("token_type_ids", None)
        features = self._extractor(list(waveforms.numpy()), sampling_rate=self._extractor.sampling_rate, return_tensors="pt")
        out = self._model(
            input_features=features["input_features"].float(),
            is_longer=torch.zeros(len(waveforms), 1, dtype=torch.bool),  # the extractor draws one of the batch
            **tokens,
        )
        return out.audio_embeds, out.text_embeds
