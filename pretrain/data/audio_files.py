"""Encoded sounds to samples: WAV, FLAC, Ogg (Vorbis, Opus) and MP3, through libsndfile (`soundfile`); soxr resamples.

Only the part that is asked for is decoded, plus a margin that the filter of the resampling needs: it equals the slice of the
whole resampled sound up to rounding.

Nothing is allocated by what a header claims. Rate, channels and length are checked first, and the end of the sound is read
before any other part: whether a sound is bad does not depend on the part that is asked for. Damage in the middle is found by
`check_audio`, which decodes all.

A damaged MP3 makes libmpg123 write lines of its own on stderr ("error: dequantization failed!"). They stay: libsndfile (1.2.2)
neither passes MPG123_QUIET on nor has a command for it, its library exports no function of libmpg123, and to redirect the file
descriptor would silence the other threads, too.

Legend: F = frames of a stored sound, each with one sample a channel.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.data import BadSample
from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from soundfile import SoundFile

AUDIO_EXTENSIONS = ("wav", "flac", "ogg", "mp3")
"""Extensions of the member that is a sample's sound; its bytes, not its name, decide how it is decoded."""

AUDIO_FORMATS = {"WAV": "WAV", "WAVEX": "WAV", "RF64": "WAV", "FLAC": "FLAC", "OGG": "Ogg", "MP3": "MP3"}
"""The formats that are read, by libsndfile's name. libsndfile knows many more."""

MIN_SECONDS = 0.01
"""A shorter sound is a bad sample: it holds no whole period of most tones."""

MAX_FRAMES = 1 << 31
"""Limit on the frames of a sound (12 hours at 48 kHz)."""

MAX_COUNTED = 1 << 28
"""Limit on the frames of a FLAC without a length in its header (90 minutes at 48 kHz): it is decoded to know its length."""

MAX_CHANNELS = 32
RATES = (1_000, 768_000)
"""Lowest and highest rate of a stored sound, in Hz."""

MAX_PEAK = 64.0
"""Limit on float samples, whose full scale is 1; up to here they are clipped. Beyond, they have another scale."""

_BLOCK = 1 << 22  # samples that are decoded at a time, over all channels: 16 MiB
_MARGIN = 512  # periods of the lower rate, on either side of a crop, that the filter of the resampling may reach
_MAX_CHUNKS = 1 << 12  # chunks of a WAV before its samples: each costs a turn of a loop, however short it is
_STREAMED = 0x7FFFF000  # sizes from here on are what programs write in the header of a WAV of unknown length


def require_packages() -> None:
    """Raise ConfigError where the packages that read sounds are not installed."""
    try:
        import soundfile  # noqa: F401 - OSError where libsndfile is missing
        import soxr  # noqa: F401
    except (ImportError, OSError) as error:
        problem = f"{error.name}, which is not installed" if isinstance(error, ImportError) else "libsndfile"
        raise ConfigError(f"sounds need {problem}: pip install 'clipfuse[audio]'") from error


@dataclass(frozen=True)
class AudioFile:
    """An encoded sound, open for reading, whose header and end have been checked."""

    reader: Any
    """A SoundFile; soundfile is imported only where sounds are read."""
    format: str
    """One of the values of AUDIO_FORMATS."""
    rate: int
    """In Hz."""
    frames: int
    """F, samples a channel."""

    def resampled_length(self, rate: int) -> int:
        """Return the number of samples that the sound has at `rate` Hz, at least 1."""
        return max(1, self.frames * rate // self.rate)

    def read_mono(self, start: int, end: int) -> np.ndarray:
        """Return the mean of the channels of frames [start, end), (end - start,) float32 with full scale 1.

        Raises:
            BadSample: the sound ends early, is damaged, or has samples that are not finite or far beyond full scale.
        """
        return np.concatenate(list(self._iterate_mono(start, end)))

    def _iterate_mono(self, start: int, end: int) -> Iterator[np.ndarray]:
        """Yield the mean of the channels of frames [start, end) in blocks. Raises BadSample."""
        most = max(1, _BLOCK // self.reader.channels)
        with _raising_bad_sample():
            self.reader.seek(start)
            while start < end:
                block = self.reader.read(min(most, end - start), dtype="float32", always_2d=True)
                if not len(block):
                    raise BadSample("audio truncated", f"it ends after {start:,} of {self.frames:,} samples a channel")
                if not (peak := max(float(block.max()), -float(block.min()))) <= MAX_PEAK:  # NaN is no number <= MAX_PEAK
                    raise BadSample("audio unreadable", f"a sample of {peak:g}, where full scale is 1")
                start += len(block)
                yield block.mean(axis=1)

    def verify(self) -> None:
        """Decode all of the sound, in bounded memory. Raises BadSample."""
        for _ in self._iterate_mono(0, self.frames):
            pass

    def read_resampled(self, rate: int, start: int, length: int) -> np.ndarray:
        """Return samples [start, start + length) of the sound at `rate` Hz, one channel, (length,) int16.

        They equal the slice of the whole resampled sound up to rounding. Raises BadSample.
        """
        divisor = math.gcd(rate, self.rate)
        up, down = rate // divisor, self.rate // divisor  # `down` frames last as long as `up` samples of the result
        if up == down:
            samples = self.read_mono(start, start + length)
        else:
            import soxr

            margin = _MARGIN * -(-down // up)
            # The first frame is a multiple of `down`: there, the samples of the result have the same phase as in the whole.
            first = max(0, (start * down // up - margin) // down * down)
            last = min(self.frames, -(-(start + length) * down // up) + margin)
            samples = soxr.resample(self.read_mono(first, last), self.rate, rate)
            offset = start - first // down * up
            samples = samples[offset : offset + length]
            samples = np.pad(samples, (0, length - len(samples)))  # soxr may return fewer samples of a very short sound
        scaled: np.ndarray = np.rint(samples * 32768).clip(-32768, 32767)
        return scaled.astype(np.int16)


@contextmanager
def open_audio(data: bytes) -> Iterator[AudioFile]:
    """Open an encoded sound.

    Raises:
        BadSample: the data is empty, not a sound of one of AUDIO_FORMATS, truncated, without samples, or beyond the limits on
            rate, channels and length.
    """
    if not data:
        raise BadSample("audio empty", "0 bytes")
    _check_container(data)
    with _raising_bad_sample():
        data = _add_flac_length(data)
        reader = _reader_class()(io.BytesIO(data))
    with reader:
        with _raising_bad_sample():
            frames = _check_header(reader, data)
        yield AudioFile(reader, AUDIO_FORMATS[reader.format], int(reader.samplerate), frames)


def check_audio(data: bytes) -> str:
    """Decode an encoded sound to its end and return its format, one of the values of AUDIO_FORMATS.

    Raises:
        BadSample: it cannot be used.
        ConfigError: soundfile is not installed.
    """
    require_packages()
    with open_audio(data) as sound:
        sound.verify()
        return sound.format


def find_media_type(data: bytes) -> str:
    """Return the media type of an encoded sound by its first bytes; "" for anything else."""
    head = data[:12]
    if head[:4] == b"RF64" or (head[:4] in (b"RIFF", b"RIFX") and head[8:] == b"WAVE"):
        return "audio/wav"
    if head[:4] in (b"fLaC", b"OggS"):
        return "audio/flac" if head[:4] == b"fLaC" else "audio/ogg"
    is_mp3 = head[:3] == b"ID3" or (head[:1] == b"\xff" and head[1:2] >= b"\xe0")
    return "audio/mpeg" if is_mp3 else ""


@contextmanager
def _raising_bad_sample() -> Iterator[None]:
    """Turn errors of the block into BadSample: the bytes are in memory, so what fails in a parser is due to the content."""
    try:
        yield
    except (BadSample, MemoryError):
        raise
    except Exception as error:
        text = str(getattr(error, "error_string", error))  # that of soundfile, without the address of the data in memory
        raise BadSample("audio unreadable", f"{type(error).__name__}: {' '.join(text.split())[:200]}") from error


@cache
def _reader_class() -> type[SoundFile]:
    """Return a SoundFile that does not seek after each read.

    Such a seek fails at the end of a FLAC of unknown length. At any place it has Vorbis and MP3 begin anew, with other samples.
    """
    import soundfile

    class Reader(soundfile.SoundFile):
        def seekable(self) -> bool:
            return False

    return Reader


def _check_container(data: bytes) -> None:
    """Raise BadSample for data of no known format, and for a WAV or an Ogg that ends early, which libsndfile accepts."""
    if data[:4] in (b"RIFF", b"RIFX") and data[8:12] == b"WAVE":
        at, is_little = 12, data[:4] == b"RIFF"
        for _ in range(_MAX_CHUNKS):
            size = int.from_bytes(data[at + 4 : at + 8], "little" if is_little else "big")
            if data[at : at + 4] == b"data" and at + 8 + size > len(data) and size < _STREAMED:
                raise BadSample("audio truncated", f"{max(0, len(data) - at - 8):,} of {size:,} bytes of samples")
            if data[at : at + 4] == b"data" or at >= len(data):
                return
            at += 8 + size + size % 2
        raise BadSample("audio unreadable", f"a WAV of more than {_MAX_CHUNKS:,} chunks")
    if data[:4] == b"OggS":
        page = data.rfind(b"OggS")
        segments = data[page + 27 : page + 27 + data[page + 26]] if page + 26 < len(data) else b""
        if page + 27 + len(segments) + sum(segments) > len(data):
            raise BadSample("audio truncated", "the last page of the Ogg file ends early")
    elif not find_media_type(data):
        names = ", ".join(dict.fromkeys(AUDIO_FORMATS.values()))
        raise BadSample("audio unreadable", f"none of {names}; begins with {data[:12]!r}")


def _check_header(reader: SoundFile, data: bytes) -> int:
    """Return the number of frames. Raise BadSample for a format that is not read, and for what is beyond the limits."""
    frames, rate = int(reader.frames), int(reader.samplerate)
    if reader.format not in AUDIO_FORMATS:
        raise BadSample("audio unreadable", f"its format is {reader.format}")
    if not RATES[0] <= rate <= RATES[1]:
        raise BadSample("audio unreadable", f"{rate} Hz, not {RATES[0]} to {RATES[1]}")
    if not 1 <= reader.channels <= MAX_CHANNELS:
        raise BadSample("audio unreadable", f"{reader.channels} channels, more than {MAX_CHANNELS}")
    if frames > MAX_FRAMES:
        raise BadSample("audio too long", f"{frames:,} samples a channel, more than {MAX_FRAMES:,}")
    # The length of a WAV is that of the file. The header of another says what it was when the file was whole.
    if AUDIO_FORMATS[reader.format] != "WAV" and frames > 0 and not _can_read(reader, frames - 1):
        if reader.format != "MP3" or _has_length_tag(data):
            raise BadSample("audio truncated", f"its last samples cannot be read, of {frames:,} a channel in the header")
        # The length of such an MP3 is estimated from its size, usually to within a few percent.
        frames = _count_frames(data, frames * 9 // 10)
    if frames < 1:
        raise BadSample("audio empty", "it has no samples")
    if frames < MIN_SECONDS * rate:
        raise BadSample("audio too short", f"{frames} samples a channel at {rate} Hz")
    return frames


def _can_read(reader: SoundFile, frame: int) -> bool:
    """Return whether a frame can be read."""
    import soundfile

    try:
        reader.seek(frame)
        return len(reader.read(1, dtype="float32", always_2d=True)) == 1
    except soundfile.LibsndfileError:
        return False


def _count_frames(data: bytes, start: int = 0) -> int:
    """Return the number of frames that can be read, at most MAX_COUNTED + 1, by decoding those from `start` on.

    start: a frame that probably can be read; where it cannot, all are decoded.
    """
    with _reader_class()(io.BytesIO(data)) as reader:
        start = start if start and _can_read(reader, start) else 0
        if start:  # where the length is not known, libFLAC fails to seek to the first frame of some blocks
            reader.seek(start)
        block = np.empty((max(1, (1 << 20) // reader.channels), reader.channels), np.int16)
        while start <= MAX_COUNTED and (count := len(reader.read(out=block))):
            start += count
    return min(start, MAX_COUNTED + 1)


def _add_flac_length(data: bytes) -> bytes:
    """Return a FLAC with its length in its header, where it had been written to a pipe and lacks it; other data unchanged."""
    # RFC 9639, section 8.2: 4 + 4 bytes of markers, then 13 and a half bytes of STREAMINFO before the 36 bits of the length.
    if data[:4] != b"fLaC" or len(data) < 26 or data[21] & 0x0F or any(data[22:26]):
        return data
    frames = _count_frames(data)
    if frames > MAX_COUNTED:
        raise BadSample("audio too long", f"more than {MAX_COUNTED:,} samples a channel, and no length in the header")
    return data[:21] + bytes([data[21] | frames >> 32]) + (frames & 0xFFFFFFFF).to_bytes(4, "big") + data[26:]


def _has_length_tag(data: bytes) -> bool:
    """Return whether an MP3 gives its length, in a tag in its first frame (Xing, Info or VBRI)."""
    start = 0
    if data[:3] == b"ID3":
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=False))
    return any(tag in data[start : start + 256] for tag in (b"Xing", b"Info", b"VBRI"))
