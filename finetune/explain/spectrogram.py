"""The spectrogram of a sound as a picture, on which maps of words are drawn: time to the right, high frequencies at the top."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pretrain.errors import UserError
from pretrain.model import DualEncoder

LINE = "the sound as its spectrogram: time to the right, high frequencies at the top"
_DECIBELS = 60  # below the loudest cell, what is drawn as the lightest gray
_SIDE = 352  # px, the height


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
    level = np.clip(1 + (values - values.max()) * per_unit / _DECIBELS, 0, 1)
    gray = (255 - 215 * level.T[::-1]).astype(np.uint8)
    height, width = gray.shape
    image = Image.fromarray(gray).convert("RGB")
    return image.resize((max(1, round(width * _SIDE / height / 2)), _SIDE), Image.Resampling.BILINEAR)


def turn_maps(maps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return maps (words, H, W), whose first row is the lowest frequency, as they lie on the picture."""
    return maps[:, ::-1].copy()
