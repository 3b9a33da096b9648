"""Spectrograms of sounds as pictures: time to the right, high frequencies at the top.

    draw_spectrogram(encoder, waveform)     what an audio tower sees of a sound, on which maps of words are drawn
    draw_sound(data)                        a whole sound, whatever a model hears of it: its thumbnail

Shapes: S = samples of a sound, T = frames, F = mel bands.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pretrain.data.audio_files import open_audio
from pretrain.errors import UserError
from pretrain.model import DualEncoder
from pretrain.towers.mel import LogMel, MelSettings

LINE = "the sound as its spectrogram: time to the right, high frequencies at the top"
_DECIBELS = 60  # below the loudest cell, what is drawn as the lightest gray
_SIDE = 352  # px, the height
_SILENCE = -40.0  # decibels of the loudest cell below which a whole sound is drawn as silence
_SOUND_SIZE = (320, 160)  # px, of a whole sound
DRAWN_SECONDS = 60
"""Of a longer sound, this much around its middle is drawn."""


def draw_spectrogram(encoder: DualEncoder, waveform: Tensor) -> Image.Image:
    """Draw the spectrogram that the audio tower sees of a waveform (S,) int16, dark where it is loud.

    Raises UserError for an audio tower without one.
    """
    tower = encoder.tower("audio")
    if not hasattr(tower, "mel"):
        raise UserError(f"maps are drawn on spectrograms, and {type(tower).__name__} has none")
    values = cast(Any, tower).mel(waveform[None].to(encoder.logit_scale.device))[0].float().cpu().numpy()  # (T, F)
    settings = cast(Any, tower).mel.settings
    per_unit = settings.std if settings.recipe != "kaldi" else settings.std * 10 / np.log(10)  # decibels
    image = _to_picture((values - values.max()) * per_unit)
    width, height = image.size
    return image.resize((max(1, round(width * _SIDE / height / 2)), _SIDE), Image.Resampling.BILINEAR)


def draw_sound(data: bytes) -> Image.Image:
    """Draw the spectrogram of an encoded sound, 320 x 160 px, dark where it is loud.

    Raises BadSample where it cannot be decoded.
    """
    mel = _build_overview()
    rate, window = mel.settings.rate, mel.settings.window
    with open_audio(data) as sound:
        length = min(sound.resampled_length(rate), DRAWN_SECONDS * rate)
        samples = sound.read_resampled(rate, (sound.resampled_length(rate) - length) // 2, length)
    samples = np.pad(samples, (0, max(0, window - length)))
    values = mel(torch.from_numpy(samples)[None])[0].numpy()  # (T, F), decibels
    return _to_picture(values - max(float(values.max()), _SILENCE)).resize(_SOUND_SIZE, Image.Resampling.BILINEAR)


@cache
def _build_overview() -> LogMel:
    """Return the spectrogram of whole sounds: as CLAP's, at 16 kHz."""
    return LogMel(MelSettings(16000, "slaney", n_fft=1024, window=1024, hop=160, mels=64, fmin=50, fmax=8000, mean=0, std=1))


def _to_picture(decibels: NDArray[Any]) -> Image.Image:
    """Return (T, F) decibels, 0 the loudest, as a gray picture of T x F px."""
    level = np.clip(1 + decibels / _DECIBELS, 0, 1)
    return Image.fromarray((255 - 215 * level.T[::-1]).astype(np.uint8)).convert("RGB")


def turn_maps(maps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return maps (words, H, W), whose first row is the lowest frequency, as they lie on the picture."""
    return maps[:, ::-1].copy()
