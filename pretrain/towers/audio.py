"""The audio tower: a transformers audio model, or a small convolutional one, on log-mel spectrograms.

    audio: {tower: audio, name: laion/clap-htsat-unfused}
    audio: {tower: audio, name: MIT/ast-finetuned-audioset-10-10-0.4593}
    audio: {tower: audio, args: {model_type: clap_audio_model, spec_size: 128, num_mel_bins: 32, ...}, rate: 16000, seconds: 4}
    audio: {tower: audio, name: conv, widths: [32, 64, 128], rate: 16000, seconds: 4}

How a published model's spectrograms are computed is read from its preprocessor_config.json. Spectrograms are computed on the
device of the model; samples travel as int16 waveforms.

Shapes: b = sounds, S = samples of a sound, T = frames, F = mel bands, H = rows of the grid (frequencies, low ones first),
W = its columns (times).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.config import check_numbers
from pretrain.errors import ConfigError
from pretrain.runtime.deferred_imports import without_unused
from pretrain.towers import TokenSequence, Tower, hf_audio, used_parameters
from pretrain.towers.hf_audio import SpectrogramModel
from pretrain.towers.hf_models import inline_args, one_line
from pretrain.towers.mel import LogMel, MelSettings
from pretrain.towers.meta_copy import copy_to_meta
from pretrain.towers.spectrogram_conv import SpectrogramConv

CONV = "conv"
"""The name of the convolutional tower."""
OWN_DEFAULTS: dict[str, Any] = {"rate": 16000, "recipe": "slaney", "mels": 64, "fmin": 50.0, "mean": -40.0, "std": 25.0}
"""Of spectrograms, for models that nobody has published: conv, and new ones from `args`. Decibels of most sounds are near this
mean."""
SECONDS = 10.0
"""Length of a sound where nothing else is known."""


@dataclass
class Config:
    """Settings of an audio tower. Those that are null are the published model's own, or those of its architecture."""

    tower: str = "audio"
    """Name of this file."""
    name: str | None = None
    """A hub name or a local folder of a transformers model (AST, CLAP), or `conv`; null builds a new model from `args`."""
    args: dict[str, Any] = field(default_factory=dict)
    """The model's own configuration: `model_type` (audio-spectrogram-transformer, clap_audio_model) and sizes of a new model,
    or changes to a named one."""
    widths: list[int] = field(default_factory=list)
    """Of `name: conv`: channels of each stage, which halves frequencies and times. [32, 64, 128] makes cells of 8 bands by 8
    frames."""
    pretrained: bool | None = None
    """Whether a named model is loaded with its weights; null: yes. A model without a name starts at random."""
    rate: int | None = None
    """Samples a second, to which sounds are resampled. null: the published model's; 16000 for conv."""
    seconds: float | None = None
    """Length of a sound: longer ones are cropped, at random in training. null: the model's own, else 10."""
    pad: Literal["repeat", "repeatpad", "silence"] = "repeat"
    """What follows a shorter sound: itself again and again, or silence. repeatpad, of published CLAPs, repeats it whole times,
    and fills the rest with silence."""
    recipe: Literal["kaldi", "slaney", "htk"] | None = None
    """How the spectrogram is computed: as AST (kaldi), as CLAP (slaney) or as CLAP with fusion (htk); see mel.py."""
    n_fft: int | None = None
    """Length of the Fourier transform, in samples."""
    window: int | None = None
    """Length of a frame, in samples. null: n_fft (kaldi: a fortieth of a second), or the published model's."""
    hop: int | None = None
    """Samples from one frame to the next. null: a hundredth of a second, or the published model's."""
    mels: int | None = None
    """Number of mel bands."""
    fmin: float | None = None
    """Lower end of the lowest band, Hz."""
    fmax: float | None = None
    """Upper end of the highest band, Hz. null: half the rate, or the published model's."""
    mean: float | None = None
    """Subtracted from the logarithms of the bands (kaldi: natural; slaney, htk: decibels)."""
    std: float | None = None
    """The logarithms are divided by it after that. AST's feature extractor divides by twice its `std`."""
    pool: Literal["tower", "avg", "max"] = "tower"
    """tower: the model's own pooling (AST: class and distillation token; CLAP and conv: the mean). avg, max: of the tokens."""
    trainable_blocks: int = -1
    """-1 trains everything, 0 freezes the tower, n trains the last n blocks and the final norm."""
    checkpointing: bool = False
    """Whether to recompute activations in the backward pass: less memory, a third more time. Not possible with CLAP."""

    def check(self) -> None:
        """Raise ConfigError for an impossible value or combination."""
        if self.name is None and "model_type" not in self.args:
            raise ConfigError(
                "audio: give audio.name (hub name, folder or conv) or audio.args.model_type (a new model: "
                f"{', '.join(hf_audio.MODEL_TYPES)})"
            )
        if self.name == CONV and self.args:
            raise ConfigError(f"audio.args={self.args} is for transformers models; audio.name=conv has audio.widths")
        if (self.name == CONV) != bool(self.widths) or min(self.widths, default=1) < 1:
            hint = "" if self.name == CONV else ", so leave it out or empty it: audio.widths=[]"
            raise ConfigError(
                f"audio.widths={self.widths} lists the channels of audio.name=conv, for example [32, 64, 128]; "
                f"audio.name={self.name}{hint}"
            )
        if self.trainable_blocks < -1:
            raise ConfigError(f"audio.trainable_blocks={self.trainable_blocks} must be -1 or more")
        positive = dict.fromkeys(("rate", "n_fft", "window", "hop", "mels"), "[1, inf)")
        check_numbers(self, "audio", seconds="(0, inf)", std="(0, inf)", fmin="[0, inf)", fmax="(0, inf)", **positive)


class AudioTower(Tower):
    """A model of spectrograms and the pooling of its tokens.

    Inputs are waveforms (b, S): int16, or floats in [-1, 1].
    """

    modality = "audio"
    pretrained_settings = "audio.name=FOLDER"

    def __init__(self, model: SpectrogramModel | SpectrogramConv, mel: LogMel, config: Config, seconds: float) -> None:
        super().__init__()
        self.model = model
        self.mel = mel
        self.config = config
        self.pool = config.pool
        self.seconds = seconds
        """Length of a sound."""
        self.rate = mel.settings.rate
        """Samples a second."""
        self.depth = len(model.block_names)
        self._frames = model.frames if isinstance(model, SpectrogramModel) and not model.is_clap else None
        """T where the model takes no other number of frames."""
        self._measure()

    @property
    def samples(self) -> int:
        """S, samples of a sound of the configured length."""
        return round(self.seconds * self.rate)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> TokenSequence:
        """Encode waveforms (b, S): states (b, H W, C), grid (H, W), pooled (b, P).

        `mask` is ignored: shorter sounds are repeated or followed by silence before.
        """
        spectrograms = self.mel(inputs, self._frames)
        cells, own = self.model(spectrograms.to(next(self.model.parameters()).dtype))
        states = cells.flatten(2).transpose(1, 2)
        pooled = {"tower": own, "avg": states.mean(dim=1), "max": states.amax(dim=1)}[self.pool]
        valid = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return TokenSequence(states, valid, (cells.shape[2], cells.shape[3]), pooled)

    def layer_ids(self) -> dict[str, int]:
        """Return 0 for embeddings, 1..L for the blocks, L + 1 for the final norm. What joins two stages is of the first one."""
        ids: dict[str, int] = {}
        blocks = self.model.block_names
        stages = {name.rpartition("blocks.")[0]: i for i, name in enumerate(blocks, 1) if "blocks." in name}
        for name, _ in self.named_parameters():
            inner = name.removeprefix("model.")
            block = next((i for i, prefix in enumerate(blocks, 1) if inner.startswith(prefix)), None)
            stage = next((i for prefix, i in stages.items() if inner.startswith(prefix)), None)
            is_end = inner.removeprefix("model.").removeprefix("audio_encoder.").startswith(("norm.", "layernorm."))
            ids[name] = block or stage or (self.depth + 1 if is_end else 0)
        return ids

    def settings(self) -> dict[str, Any]:
        """Return the Config fields that build this architecture without the hub or a folder."""
        mel = asdict(self.mel.settings) | {"seconds": self.seconds}
        if isinstance(self.model, SpectrogramConv):
            return mel
        return {**mel, "name": None, "pretrained": False, "args": inline_args(self.model.model)}

    def settings_for(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """Return audio.args for sounds of another length: AST's number of frames."""
        seconds = section.get("seconds")
        if self._frames is None or not isinstance(seconds, int | float) or seconds <= 0:
            return {}
        frames = self.mel.settings.count_frames(round(seconds * self.rate))
        return {"args": {**self.settings()["args"], "max_length": frames}}

    def fit_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights of this architecture for sounds of another length: AST's positions interpolated over time."""
        name = "model.model.embeddings.position_embeddings"
        table = dict(self.named_parameters()).get(name)
        if table is None or name not in weights or weights[name].shape[::2] != table.shape[::2]:
            return weights
        embeddings = cast(Any, self.model).model.embeddings
        rows, columns = embeddings.get_shape(embeddings.config)
        before = weights[name]
        if before.shape == table.shape or (before.shape[1] - 2) % rows:
            return weights
        grid = before[:, 2:].transpose(1, 2).unflatten(2, (rows, -1)).float()
        grid = F.interpolate(grid, size=(rows, columns), mode="bilinear", align_corners=False)
        return {**weights, name: torch.cat([before[:, :2], grid.flatten(2).transpose(1, 2).to(before.dtype)], dim=1)}

    def set_checkpointing(self, on: bool) -> None:
        """Recompute activations in the backward pass, or stop. Raises ConfigError where the model cannot."""
        model: Any = getattr(self.model, "model", None)
        if not getattr(model, "supports_gradient_checkpointing", False):
            super().set_checkpointing(on)
            return
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # see transformers.py
        if on:
            options = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
            getattr(model, f"{kind}_checkpointing_enable")(**options)
        else:
            getattr(model, f"{kind}_checkpointing_disable")()

    def _measure(self) -> None:
        """Set the widths, the unused parameters and how the model pools, by a pass on the meta device."""
        was_training = self.training
        self.eval()
        meta = copy_to_meta(self).requires_grad_()
        with without_unused():
            out = meta(torch.empty(2, self.samples, dtype=torch.int16, device="meta"))
        self.width, self.pooled_width = out.states.shape[-1], out.pooled.shape[-1]
        self.token_count = out.states.shape[1]
        self.freeze_unused(used_parameters(out.pooled, dict(meta.named_parameters())))
        has_mean = isinstance(self.model, SpectrogramConv) or self.model.is_clap
        self.pools_mean = self.pool == "avg" or (self.pool == "tower" and has_mean)
        self.pools_max = self.pool == "max"
        self.train(was_training)


def build(config: Config, tokenizer: Any = None) -> AudioTower:
    """Build an AudioTower.

    Raises ConfigError: an unknown model or argument, settings that contradict the published ones, a length that does not fit.
    """
    if config.name == CONV:
        mel, seconds = _complete(config, OWN_DEFAULTS), config.seconds or SECONDS
        return _finish(SpectrogramConv(config.widths, mel.mels), mel, config, seconds, "")
    settings = hf_audio.read_settings(config)
    published = hf_audio.read_preprocessing(config.name, settings)
    if published.path is not None and config.pretrained is not False:
        _refuse_contradictions(config, published)
    defaults = published.mel
    if config.name is None:
        if settings.model_type == hf_audio.CLAP:
            defaults = defaults | {key: OWN_DEFAULTS[key] for key in ("mean", "std")}
        if config.rate not in (None, defaults["rate"]):  # lengths follow the rate
            defaults = {key: value for key, value in defaults.items() if key not in ("n_fft", "window", "hop", "fmax")}
    mel, length = _complete(config, defaults), config.seconds or published.seconds
    if mel.mels != settings.num_mel_bins:
        raise ConfigError(f"audio.mels={mel.mels}: the model takes {settings.num_mel_bins} bands (audio.args.num_mel_bins)")
    if settings.model_type == hf_audio.AST:
        if config.name is None and config.seconds and "max_length" not in config.args:
            settings.max_length = mel.count_frames(round(mel.rate * config.seconds))
        length = length or (mel.window + (settings.max_length - 1) * mel.hop) / mel.rate
    seconds = length or SECONDS
    loaded = hf_audio.load_audio_model(config, settings)
    model = SpectrogramModel(loaded.model)
    if model.is_clap and config.name is None:  # it normalizes by itself, which its own feature extractor relies on
        model.set_normalization(mel.mean, mel.std)
        mel = replace(mel, mean=0.0, std=1.0)
    frames = mel.count_frames(round(mel.rate * seconds))
    if frames > model.frames:
        raise ConfigError(
            f"audio.seconds={seconds:g} makes {frames} frames, and {type(loaded.model).__name__} takes {model.frames}: use at "
            f"most {model.frames * mel.hop / mel.rate:.3g} seconds"
        )
    return _finish(model, mel, config, seconds, loaded.origin)


def _complete(config: Config, defaults: Mapping[str, Any]) -> MelSettings:
    """Return the settings of the spectrogram: the user's, else the defaults. Raises ConfigError."""
    given = {spec.name: getattr(config, spec.name) for spec in fields(MelSettings)}
    given = {name: value for name, value in given.items() if value is not None}
    merged = {**defaults, **given}
    rate = merged["rate"]
    merged.setdefault("hop", max(1, rate // 100))
    merged.setdefault("n_fft", 2 ** (rate // 40).bit_length())  # 32 to 64 ms
    merged.setdefault("fmax", rate / 2)
    if "n_fft" in given and "window" not in given:
        merged["window"] = given["n_fft"]
    merged.setdefault("window", min(rate // 40, merged["n_fft"]) if merged["recipe"] == "kaldi" else merged["n_fft"])
    mel = MelSettings(**merged)
    mel.check()
    return mel


def _refuse_contradictions(config: Config, published: hf_audio.Preprocessing) -> None:
    """Raise ConfigError for a setting that differs from what the weights were trained on."""
    for name, value in published.mel.items():
        given = getattr(config, name)
        if given is not None and given != value:
            twice = " (twice its std, by which AST's feature extractor divides)" if name == "std" else ""
            raise ConfigError(
                f"audio.{name}={given} contradicts {published.path}, by which it is {value}{twice}; leave out audio.{name}, or "
                "start at random with audio.pretrained=false"
            )


def _finish(
    model: SpectrogramModel | SpectrogramConv, mel: MelSettings, config: Config, seconds: float, origin: str
) -> AudioTower:
    """Build the tower around a model. Raises ConfigError where the model cannot encode sounds of this length."""
    try:
        tower = AudioTower(model, LogMel(mel), config, seconds)
    except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"audio: {config.name or config.args['model_type']} cannot encode {seconds:g} seconds at {mel.rate} Hz: "
            f"{one_line(error)}"
        ) from error
    tower.weights_origin = origin
    tower.freeze(config.trainable_blocks)
    if config.checkpointing:
        tower.set_checkpointing(True)
    return tower
