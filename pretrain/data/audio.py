"""The audio decoder: encoded bytes to (S,) int16, one channel at the model's rate and of the model's length.

Sounds travel as int16; the tower computes the log-mel spectrogram on the device. libsndfile (through `soundfile`) reads WAV,
FLAC, Ogg (Vorbis, Opus) and MP3, soxr resamples. Only the part that is cropped is decoded, plus a margin that the filter of
the resampling needs: the crop equals the slice of the whole resampled sound up to rounding.

Nothing is allocated by what a header claims. Rate, channels and length are checked first, and the end of the sound is read
before a crop is drawn: whether a sample is bad never depends on the crop.

Legend: b = sounds in a batch, S = samples of the result = round(rate * seconds), F = frames of the stored sound, each with one
sample a channel.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pretrain.data import BadSample
from pretrain.data.members import list_members
from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from soundfile import SoundFile

    from pretrain.data.shards.paths import RawSample

AUDIO_EXTENSIONS = ("wav", "flac", "ogg", "mp3")
"""Extensions of the member that is a sample's sound; its bytes, not its name, decide how it is decoded."""

AUDIO_FORMATS = {"WAV": "WAV", "WAVEX": "WAV", "RF64": "WAV", "FLAC": "FLAC", "OGG": "Ogg", "MP3": "MP3"}
"""The formats that are read, by libsndfile's name. libsndfile knows many more."""

PADS = ("repeat", "silence")
"""What follows a sound that is shorter than the model's input: the sound again and again, or silence."""

MIN_SECONDS = 0.01
"""A shorter sound is a bad sample: it holds no whole period of most tones."""

MAX_FRAMES = 1 << 31
"""Limit on the frames of a sound (12 hours at 48 kHz)."""

MAX_CHANNELS = 32
RATES = (1_000, 768_000)
"""Lowest and highest rate of a stored sound, in Hz."""

MAX_PEAK = 64.0
"""Limit on float samples, whose full scale is 1; up to here they are clipped. Beyond, they have another scale."""

_BLOCK = 1 << 16  # frames that are decoded at a time: eight channels of them take 2 MiB
_MARGIN = 512  # periods of the lower rate, on either side of a crop, that the filter of the resampling may reach
_STREAMED = 0x7FFFF000  # sizes from here on are what programs write in the header of a WAV of unknown length


def require_packages() -> None:
    """Raise ConfigError where the packages that read sounds are not installed."""
    try:
        import soundfile  # noqa: F401 - OSError where libsndfile is missing
        import soxr  # noqa: F401
    except (ImportError, OSError) as error:
        problem = f"{error.name}, which is not installed" if isinstance(error, ImportError) else "libsndfile"
        raise ConfigError(f"sounds need {problem}: pip install 'clipfuse[audio]'") from error


@contextmanager
def open_audio(data: bytes) -> Iterator[SoundFile]:
    """Open an encoded sound, whose header and end have been checked, for one call of read_mono or read_resampled.

    Raises:
        BadSample: the data is empty, not a sound of one of AUDIO_FORMATS, truncated, without samples, or beyond the limits on
            rate, channels and length. Also in place of any error that decoding raises within the block.
    """
    import soundfile

    if not data:
        raise BadSample("audio empty", "0 bytes")
    _check_container(data)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_header(file)
            _check_end(file)
        # Opened again: what libsndfile returns of an Ogg or MP3 after a second seek may differ from what it returns after one.
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            yield file
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # the bytes are in memory, so whatever fails in a parser is due to the content
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise BadSample("audio unreadable", text) from error


def _check_container(data: bytes) -> None:
    """Raise BadSample for data of no known format, and for a WAV or an Ogg that ends early, which libsndfile accepts."""
    if data[:4] in (b"RIFF", b"RIFX") and data[8:12] == b"WAVE":
        order = "little" if data[:4] == b"RIFF" else "big"
        at = 12
        while at + 8 <= len(data):
            size = int.from_bytes(data[at + 4 : at + 8], order)  # type: ignore[arg-type]
            if data[at : at + 4] == b"data":
                if at + 8 + size > len(data) and size < _STREAMED:
                    raise BadSample("audio truncated", f"{len(data) - at - 8:,} of {size:,} bytes of samples")
                return
            at += 8 + size + size % 2
    elif data[:4] == b"OggS":
        page = data.rfind(b"OggS")
        segments = data[page + 27 : page + 27 + data[page + 26]] if page + 26 < len(data) else b""
        if page + 27 + len(segments) + sum(segments) > len(data):
            raise BadSample("audio truncated", "the last page of the Ogg file ends early")
    elif data[:4] not in (b"RF64", b"fLaC") and data[:3] != b"ID3" and not (data[0] == 0xFF and data[1:2] >= b"\xe0"):
        names = ", ".join(dict.fromkeys(AUDIO_FORMATS.values()))
        raise BadSample("audio unreadable", f"none of {names}; begins with {data[:12]!r}")


def _check_header(file: SoundFile) -> None:
    """Raise BadSample for a format that is not read and for rate, channels or length beyond the limits."""
    if file.format not in AUDIO_FORMATS:
        raise BadSample("audio unreadable", f"its format is {file.format}")
    if not RATES[0] <= file.samplerate <= RATES[1]:
        raise BadSample("audio unreadable", f"{file.samplerate} Hz, not {RATES[0]} to {RATES[1]}")
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise BadSample("audio unreadable", f"{file.channels} channels, more than {MAX_CHANNELS}")
    if file.frames < 1:
        raise BadSample("audio empty", "it has no samples")
    if file.frames > MAX_FRAMES:
        raise BadSample("audio too long", f"{file.frames:,} samples a channel, more than {MAX_FRAMES:,}")
    if file.frames < MIN_SECONDS * file.samplerate:
        raise BadSample("audio too short", f"{file.frames} samples a channel at {file.samplerate} Hz")


def _check_end(file: SoundFile) -> None:
    """Raise BadSample where the last frame cannot be read: the header of a FLAC or MP3 says how long the whole was."""
    import soundfile

    try:
        file.seek(file.frames - 1)
        is_complete = len(file.read(1, dtype="float32", always_2d=True)) == 1
    except soundfile.LibsndfileError:
        is_complete = False
    if not is_complete:
        raise BadSample("audio truncated", f"its last samples cannot be read, of {file.frames:,} a channel in the header")


def read_mono(file: SoundFile, start: int, end: int) -> np.ndarray:
    """Return the mean of the channels of frames [start, end), (end - start,) float32 with full scale 1.

    Raises:
        BadSample: the sound ends early, or has samples that are not finite or far beyond full scale.
    """
    file.seek(start)
    blocks: list[np.ndarray] = []
    while start < end:
        block = file.read(min(_BLOCK, end - start), dtype="float32", always_2d=True)
        if not len(block):
            raise BadSample("audio truncated", f"it ends after {start:,} of {file.frames:,} samples a channel")
        if not np.isfinite(block).all():
            raise BadSample("audio unreadable", "it has samples that are NaN or infinite")
        if (peak := float(np.abs(block).max())) > MAX_PEAK:
            raise BadSample("audio unreadable", f"a sample of {peak:g}, where full scale is 1")
        blocks.append(block.mean(axis=1))
        start += len(block)
    return np.concatenate(blocks)


def resampled_length(file: SoundFile, rate: int) -> int:
    """Return the number of samples that a sound has at `rate` Hz, at least 1."""
    return max(1, int(file.frames) * rate // int(file.samplerate))


def read_resampled(file: SoundFile, rate: int, start: int, length: int) -> np.ndarray:
    """Return samples [start, start + length) of a sound resampled to `rate` Hz and mixed to one channel, (length,) int16.

    They equal the slice of the whole resampled sound up to rounding. Raises BadSample.
    """
    divisor = math.gcd(rate, file.samplerate)
    up, down = rate // divisor, file.samplerate // divisor  # `down` frames last as long as `up` samples of the result
    if up == down:
        samples = read_mono(file, start, start + length)
    else:
        import soxr

        margin = _MARGIN * -(-down // up)
        # The first frame is a multiple of `down`: there, the samples of the result have the same phase as in the whole.
        first = max(0, (start * down // up - margin) // down * down)
        last = min(file.frames, -(-(start + length) * down // up) + margin)
        samples = soxr.resample(read_mono(file, first, last), file.samplerate, rate)
        offset = start - first // down * up
        samples = samples[offset : offset + length]
        samples = np.pad(samples, (0, length - len(samples)))  # soxr may round the length of a few samples down
    scaled: np.ndarray = np.rint(samples * 32768).clip(-32768, 32767)
    return scaled.astype(np.int16)


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
            raise BadSample("audio missing", f"members: {list_members(sample.members) or 'none'}")
        return self._decode(data, rng if train else None)

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
        with open_audio(data) as file:
            surplus = resampled_length(file, self.rate) - self.samples
            if surplus >= 0:
                start = surplus // 2 if rng is None else int(rng.integers(0, surplus + 1))
                return read_resampled(file, self.rate, start, self.samples)
            sound = read_resampled(file, self.rate, 0, self.samples + surplus)
        if self.pad == "silence":
            return np.pad(sound, (0, -surplus))
        return np.resize(sound, self.samples)  # which repeats it
