"""Log-mel spectrograms of waveforms, computed in float32 on the device of the model.

A spectrogram is that of one of three published recipes (MelSettings.recipe), so that published models see what they were
trained on:

    kaldi    torchaudio.compliance.kaldi.fbank, of the Audio Spectrogram Transformer: each frame loses its mean and is
             pre-emphasized, filters are triangles on the mel axis, the logarithm is natural, frames begin with the sound
    slaney   librosa.feature.melspectrogram, of CLAP: frames are centered, filters have equal area, decibels
    htk      torchaudio.transforms.MelSpectrogram, of CLAP with fusion: frames are centered, decibels

Shapes: b = sounds, S = samples of a sound, T = frames, F = mel bands, K = n_fft / 2 + 1 frequencies.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config import check_numbers
from pretrain.errors import ConfigError

PREEMPHASIS = 0.97
"""Kaldi's: the share of the sample before that is subtracted from each sample of a frame."""
FLOORS = {"kaldi": 1.192092955078125e-07, "slaney": 1e-10, "htk": 1e-10}
"""Smallest power of a band before the logarithm, by recipe."""
FULL_SCALE = 32768
"""Integer waveforms are divided by it."""


@dataclass(frozen=True)
class MelSettings:
    """All that a spectrogram depends on."""

    rate: int
    """Samples a second."""
    recipe: Literal["kaldi", "slaney", "htk"]
    """Which published computation; see above."""
    n_fft: int
    """Length of the Fourier transform, in samples."""
    window: int
    """Length of a frame, in samples; at most n_fft."""
    hop: int
    """Samples from one frame to the next."""
    mels: int
    """F, the number of bands."""
    fmin: float
    """Lower end of the first band, Hz."""
    fmax: float
    """Upper end of the last band, Hz."""
    mean: float
    """Subtracted from the logarithms."""
    std: float
    """The logarithms are divided by it after that."""

    def check(self) -> None:
        """Raise ConfigError for a value out of range."""
        samples = dict.fromkeys(("rate", "n_fft", "window", "hop"), "[1, 1048576]")
        check_numbers(self, "audio", mels="[1, 4096]", fmin="[0, inf)", std="(0, inf)", **samples)
        if not 2 <= self.window <= self.n_fft:
            raise ConfigError(f"audio.window={self.window} must be from 2 to audio.n_fft={self.n_fft}")
        if not 0 <= self.fmin < self.fmax <= self.rate / 2:
            raise ConfigError(
                f"audio.fmin={self.fmin:g} and audio.fmax={self.fmax:g} must be 0 <= fmin < fmax <= {self.rate / 2:g}, half of "
                "audio.rate"
            )
        empty = np.flatnonzero(build_filters(self).max(axis=0) == 0)
        if len(empty) > self.mels // 10:  # the published AST has one
            raise ConfigError(
                f"audio.mels={self.mels}: {len(empty)} bands lie between two frequencies of the transform; use fewer bands, or "
                f"a larger audio.n_fft than {self.n_fft}"
            )

    @property
    def is_centered(self) -> bool:
        """Whether frame t is centered on sample t hop, with a mirrored beginning and end; else it begins there."""
        return self.recipe != "kaldi"

    def count_frames(self, samples: int) -> int:
        """Return T for a sound of so many samples."""
        padded = samples + 2 * (self.window // 2) if self.is_centered else samples
        return max(0, 1 + (padded - self.window) // self.hop)


class LogMel(nn.Module):
    """Waveforms to normalized log-mel spectrograms.

    Window and filters stay in float32 or wider when the model is moved to half precision.
    """

    def __init__(self, settings: MelSettings) -> None:
        settings.check()
        super().__init__()
        self.settings = settings
        self._exact = {"window": build_window(settings), "filters": build_filters(settings)}
        for name, values in self._exact.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)

    def forward(self, waveforms: Tensor, frames: int | None = None) -> Tensor:
        """Return spectrograms (b, T, F) of waveforms (b, S), int16 or floats in [-1, 1].

        frames: T. Where the sounds have fewer, zeros follow before normalization; where they have more, the first ones are
        returned; None = as many as the sounds have.
        """
        device = waveforms.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():  # not meta
            return self._compute(waveforms, frames)

    def _compute(self, waveforms: Tensor, frames: int | None) -> Tensor:
        settings, window, filters = self.settings, cast(Tensor, self.window), cast(Tensor, self.filters)
        x = waveforms.to(window.dtype)
        if not waveforms.is_floating_point():
            x = x / FULL_SCALE
        if settings.is_centered:
            x = F.pad(x[:, None], (settings.window // 2, settings.window // 2), mode="reflect")[:, 0]
        x = x.unfold(-1, settings.window, settings.hop)  # (b, T, window)
        if settings.recipe == "kaldi":
            x = x - x.mean(dim=-1, keepdim=True)
            x = x - PREEMPHASIS * torch.cat([x[..., :1], x[..., :-1]], dim=-1)
        spectrum = torch.view_as_real(torch.fft.rfft(x * window, n=settings.n_fft))
        power = spectrum.square().sum(dim=-1)  # (b, T, K)
        bands = (power @ filters).clamp(min=FLOORS[settings.recipe])
        mel = bands.log() if settings.recipe == "kaldi" else 10 * bands.log10()
        if frames is not None:
            mel = F.pad(mel, (0, 0, 0, max(0, frames - mel.shape[1])))[:, :frames]
        return (mel - settings.mean) / settings.std

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogMel:
        """Move the buffers, as every module does; those that would lose digits are rounded to float32 instead."""
        super()._apply(fn, recurse)
        for name, values in self._exact.items():
            buffer = cast(Tensor, getattr(self, name))
            dtype = torch.promote_types(buffer.dtype, torch.float32)
            if not buffer.is_meta:
                setattr(self, name, torch.tensor(values, dtype=dtype, device=buffer.device))
        return self


def build_window(settings: MelSettings) -> np.ndarray[Any, Any]:
    """Return a Hann window (window,): symmetric in Kaldi, periodic elsewhere."""
    if settings.recipe == "kaldi":
        return np.hanning(settings.window)
    return np.hanning(settings.window + 1)[:-1]


def build_filters(settings: MelSettings) -> np.ndarray[Any, Any]:
    """Return the weights (K, F) of the bands: triangles between the centers of their neighbors."""
    frequencies = np.arange(settings.n_fft // 2 + 1) * settings.rate / settings.n_fft
    if settings.recipe == "kaldi":  # triangles on the mel axis
        edges = np.linspace(_to_mel(settings.fmin), _to_mel(settings.fmax), settings.mels + 2)
        return _triangles(_to_mel(frequencies), edges)
    to_mel, to_hertz = (_to_slaney, _from_slaney) if settings.recipe == "slaney" else (_to_mel, _from_mel)
    edges = to_hertz(np.linspace(to_mel(settings.fmin), to_mel(settings.fmax), settings.mels + 2))
    filters: np.ndarray[Any, Any] = _triangles(frequencies, edges)
    if settings.recipe == "slaney":
        filters = filters * (2 / (edges[2:] - edges[:-2]))
    return filters


def _triangles(points: np.ndarray[Any, Any], edges: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return, for each point (K,), the height (K, F) of triangles from edge i over edge i + 1, where it is 1, to edge i + 2."""
    widths = np.diff(edges)
    rising = (points[:, None] - edges[None, :-2]) / widths[:-1]
    falling = (edges[None, 2:] - points[:, None]) / widths[1:]
    heights: np.ndarray[Any, Any] = np.maximum(0.0, np.minimum(rising, falling))
    return heights


def _to_mel(hertz: Any) -> Any:
    """Return mels by HTK's and Kaldi's formula, in a unit that cancels: bands are spread evenly between two values."""
    return np.log1p(np.asarray(hertz, dtype=np.float64) / 700)


def _from_mel(mels: Any) -> Any:
    return 700 * np.expm1(mels)


def _to_slaney(hertz: Any) -> Any:
    """Return mels by Slaney's formula: linear below 1000 Hz, logarithmic above (Auditory Toolbox, 1998)."""
    hertz = np.asarray(hertz, dtype=np.float64)
    return np.where(hertz < 1000, 3 * hertz / 200, 15 + 27 / np.log(6.4) * np.log(np.maximum(hertz, 1000) / 1000))


def _from_slaney(mels: Any) -> Any:
    return np.where(mels < 15, 200 * mels / 3, 1000 * np.exp(np.log(6.4) / 27 * (np.maximum(mels, 15) - 15)))
