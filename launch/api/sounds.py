"""Sounds in any form that a user has them in, as the encoded bytes that the decoder reads.

So every form takes one path through mixing, resampling and cropping, and the same sound gives the same embedding in each.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from pretrain.errors import UserError

from .images import as_list, read_file

SoundLike = Any
"""A path (str or Path), the bytes of a sound file, or (array, rate): (S,) or (S, channels), floats in [-1, 1] or int16."""

_FORMS = "a path, the bytes of a sound file, or (array, rate)"


def as_sounds(sounds: Any) -> Sequence[SoundLike]:
    """Return a list of sounds: a single one, also as a pair (array, rate), becomes a list of one. Raises UserError."""
    if isinstance(sounds, tuple) and len(sounds) == 2 and isinstance(sounds[1], int | float | np.number):
        return [sounds]
    return [sounds] if isinstance(sounds, np.ndarray) else as_list(sounds, "audio")


def to_sound_bytes(sound: SoundLike, name: str) -> bytes:
    """Return the content of a sound file that holds `sound`; arrays become WAVs of float samples.

    `name` is what messages call it. Raises UserError for files that cannot be read and for any other kind of object.
    """
    if (data := read_file(sound, name)) is not None:
        return data
    if not isinstance(sound, tuple | list) or len(sound) != 2:
        raise UserError(f"{name} is {type(sound).__name__}; give {_FORMS}")
    try:
        samples, rate = np.asarray(sound[0]), int(sound[1])
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{name} is a pair of {type(sound[0]).__name__} and {type(sound[1]).__name__}; give {_FORMS}"
        ) from error
    if samples.dtype != np.int16 and samples.dtype.kind != "f":
        raise UserError(f"{name} is an array of {samples.dtype}; give floats in [-1, 1] or int16")
    if samples.ndim not in (1, 2) or 0 in samples.shape or (samples.ndim == 2 and samples.shape[1] > samples.shape[0]):
        raise UserError(f"{name} is an array of shape {samples.shape}; give (samples,) or (samples, channels)")
    if rate < 1:
        raise UserError(f"{name} has rate {rate}; give samples a second, such as 16000")
    import soundfile

    file = io.BytesIO()
    if samples.dtype == np.int16:
        soundfile.write(file, samples, rate, format="WAV", subtype="PCM_16")
    else:
        soundfile.write(file, samples.astype(np.float32), rate, format="WAV", subtype="FLOAT")
    return file.getvalue()
