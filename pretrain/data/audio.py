"""The audio decoder: encoded bytes to (S,) int16, one channel at the model's rate and of the model's length.

Sounds travel as int16; the tower computes the log-mel spectrogram on the device.

Legend: b = sounds in a batch, S = samples of the result = round(rate * seconds).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pretrain.data import MissingContent
from pretrain.data.audio_files import AUDIO_EXTENSIONS, MIN_SECONDS, RATES, open_audio, require_packages
from pretrain.data.members import explain_missing_sound
from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from pretrain.data.shards.paths import RawSample

__all__ = ["AUDIO_EXTENSIONS", "PADS", "AudioDecoder"]

PADS = ("repeat", "repeatpad", "silence")
"""What follows a sound that is shorter than the model's input: the sound again and again, again as long as it fits whole and
then silence, or silence."""


class AudioDecoder:
    """Decoder of the sound of a sample, to (S,) int16 with S = round(rate * seconds), full scale 32768.

    Args:
        rate: of the result, in Hz.
        seconds: length of the result. Of a longer sound, training takes a random crop and evaluation the center.
        pad: one of PADS, for shorter sounds.
    """

    def __init__(self, rate: int, seconds: float, pad: str = "repeat") -> None:
        if not RATES[0] <= rate <= RATES[1]:
            raise ConfigError(f"audio.rate={rate} must be from {RATES[0]} to {RATES[1]} Hz")
        if not MIN_SECONDS <= seconds <= 3600:
            raise ConfigError(f"audio.seconds={seconds} must be from {MIN_SECONDS} to 3600")
        if pad not in PADS:
            raise ConfigError(f"audio.pad={pad!r} must be one of {', '.join(PADS)}")
        require_packages()
        self.rate, self.seconds, self.pad = rate, seconds, pad
        self.samples = round(rate * seconds)

    def __call__(self, sample: RawSample, rng: np.random.Generator, train: bool) -> np.ndarray:
        """Decode the sound of a sample to (S,) int16. Raises BadSample."""
        data = next((sample.members[e] for e in AUDIO_EXTENSIONS if e in sample.members), None)
        if data is None:
            raise MissingContent("audio missing", explain_missing_sound(sample.members))
        return self._decode(data, rng if train else None)

    def blank(self, train: bool) -> np.ndarray:
        """Return the item of a sample without a sound: silence."""
        return np.zeros(self.samples, dtype=np.int16)

    def collate(self, items: list[Any]) -> tuple[torch.Tensor, None]:
        """Stack b sounds to (b, S) int16; sounds have no mask."""
        return torch.from_numpy(np.stack(items)), None

    def decode_train(self, data: bytes, rng: np.random.Generator) -> torch.Tensor:
        """Decode to (S,) int16, of a longer sound a random crop. Raises BadSample."""
        return torch.from_numpy(self._decode(data, rng))

    def decode_eval(self, data: bytes) -> torch.Tensor:
        """Decode to (S,) int16, of a longer sound the center, deterministically. Raises BadSample."""
        return torch.from_numpy(self._decode(data, None))

    def _decode(self, data: bytes, rng: np.random.Generator | None) -> np.ndarray:
        """Decode to (S,) int16, the crop drawn by `rng`, or the center for None. Raises BadSample."""
        with open_audio(data) as sound:
            surplus = sound.resampled_length(self.rate) - self.samples
            if surplus >= 0:
                start = surplus // 2 if rng is None else int(rng.integers(0, surplus + 1))
                return sound.read_resampled(self.rate, start, self.samples)
            short = sound.read_resampled(self.rate, 0, self.samples + surplus)
        if self.pad == "repeat":
            return np.resize(short, self.samples)  # which repeats it
        if self.pad == "repeatpad":
            short = np.tile(short, self.samples // len(short))
        return np.pad(short, (0, self.samples - len(short)))
