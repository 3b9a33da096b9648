"""Tests of sound decoding, against closed forms of sines and files that soundfile writes."""

from __future__ import annotations

import io
import pickle
import struct
import sys
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch

from pretrain.data import BadSample, MissingContent
from pretrain.data.audio import AUDIO_EXTENSIONS, AudioDecoder
from pretrain.data.audio_files import MAX_PEAK, check_audio, open_audio
from pretrain.data.decode import EXTENSIONS
from pretrain.data.members import explain_missing_image
from pretrain.data.shards.paths import RawSample
from pretrain.errors import ConfigError

FORMATS = {"wav": "WAV", "flac": "FLAC", "ogg": "OGG", "mp3": "MP3"}


def sine(rate: int, seconds: float, frequency: float = 440.0, amplitude: float = 0.5) -> np.ndarray:
    """Return a sine, (frames,) float64."""
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


def encode(samples: np.ndarray, rate: int, form: str = "WAV", subtype: str | None = None, **options: Any) -> bytes:
    """Return a file that soundfile writes, of (frames,) or (frames, channels)."""
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=form, subtype=subtype, **options)
    return out.getvalue()


def patch(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def fit(samples: np.ndarray, rate: int, frequency: float) -> tuple[float, float]:
    """Return amplitude of a sine of known frequency, and the largest error, from a least-squares fit."""
    phase = 2 * np.pi * frequency * np.arange(len(samples)) / rate
    basis = np.stack([np.sin(phase), np.cos(phase)], 1)
    weights = np.linalg.lstsq(basis, samples, rcond=None)[0]
    return float(np.hypot(*weights)), float(np.abs(basis @ weights - samples).max())


def reason(data: bytes, decoder: AudioDecoder | None = None) -> str:
    """Return the reason of the BadSample, which must be the same for any crop."""
    decoder = decoder or AudioDecoder(16_000, 0.5)
    messages = set()
    for seed in range(4):
        with pytest.raises(BadSample) as caught:
            decoder.decode_train(data, np.random.default_rng(seed))
        assert "\n" not in str(caught.value)
        assert " at 0x" not in str(caught.value)
        messages.add(str(caught.value))
    with pytest.raises(BadSample) as caught:
        decoder.decode_eval(data)
    assert {str(caught.value)} == messages
    return caught.value.reason


# ---------------------------------------------------------------------------------------------------------------------
# Content


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 44_101, 48_000, 96_000, 192_000])
def test_a_sine_keeps_its_frequency_amplitude_and_length(rate: int) -> None:
    data = encode(sine(rate, 3.0, 1000.0), rate, subtype="PCM_24")
    with open_audio(data) as sound:
        assert sound.resampled_length(16_000) == 48_000
    out = AudioDecoder(16_000, 1.0).decode_eval(data)
    assert (out.shape, out.dtype) == ((16_000,), torch.int16)
    amplitude, error = fit(out.numpy() / 32768, 16_000, 1000.0)
    assert amplitude == pytest.approx(0.5, abs=2e-4)
    assert error < 3e-4  # another frequency, or a click, would be an error of 0.5


def test_what_the_lower_rate_cannot_hold_is_filtered_out() -> None:
    out = AudioDecoder(16_000, 1.0).decode_eval(encode(sine(48_000, 3.0, 11_000.0), 48_000, subtype="FLOAT"))
    assert out.abs().max() < 10  # without a filter it would be a tone of 5 kHz


@pytest.mark.parametrize("form", ["WAV", "FLAC"])
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_S8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_samples_of_any_width_are_those_of_soundfile(form: str, subtype: str) -> None:
    if not soundfile.check_format(form, subtype):
        pytest.skip(f"{form} has no {subtype}")
    data = encode(sine(16_000, 1.0), 16_000, form, subtype)
    expected = soundfile.read(io.BytesIO(data), dtype="float64")[0] * 32768
    got = AudioDecoder(16_000, 1.0).decode_eval(data).numpy()
    assert np.abs(got - expected).max() <= 0.5  # nothing but rounding to 16 bits
    if subtype == "PCM_16":
        assert np.array_equal(got, soundfile.read(io.BytesIO(data), dtype="int16")[0])


@pytest.mark.parametrize("channels", range(1, 9))
@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG"])
def test_the_mix_is_the_mean_of_the_channels(channels: int, form: str) -> None:
    samples = np.random.default_rng(channels).uniform(-0.4, 0.4, (8000, channels))
    data = encode(samples, 16_000, form)
    expected = soundfile.read(io.BytesIO(data), dtype="float64", always_2d=True)[0].mean(1) * 32768
    got = AudioDecoder(16_000, 0.5).decode_eval(data).numpy()
    assert np.abs(got - expected).max() <= 0.51


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("form", [*FORMATS.values(), "OGG OPUS", "WAV ULAW", "WAV IMA_ADPCM", "RF64"])
def test_a_crop_equals_the_slice_of_the_whole(form: str, rate: int) -> None:
    if form == "OGG OPUS" and rate in (22_050, 44_100):
        pytest.skip("Opus has no such rate")
    noise = np.random.default_rng(0).normal(0, 0.1, (rate * 4, 2))
    data = encode(noise, rate, *form.split())
    stored = soundfile.read(io.BytesIO(data), dtype="float32")[0].mean(1)
    whole = np.rint(soxr.resample(stored, rate, 16_000) * 32768).astype(int) if rate != 16_000 else np.rint(stored * 32768)
    surplus = len(stored) * 16_000 // rate - 8000  # ADPCM has more frames than were written: whole blocks
    decoder = AudioDecoder(16_000, 0.5)
    starts = set()
    for seed in range(8):
        start = int(np.random.default_rng(seed).integers(0, surplus + 1))
        crop = decoder.decode_train(data, np.random.default_rng(seed)).numpy()
        assert np.abs(crop - whole[start : start + 8000]).max() <= 1, seed
        starts.add(start)
    assert len(starts) == 8
    assert np.abs(decoder.decode_eval(data).numpy() - whole[surplus // 2 :][:8000]).max() <= 1  # the center


def test_a_short_sound_is_repeated_or_followed_by_silence() -> None:
    data = encode(sine(16_000, 0.3), 16_000)
    stored = soundfile.read(io.BytesIO(data), dtype="int16")[0]
    for rng in (None, np.random.default_rng(0)):
        for pad, rest in (("repeat", stored), ("silence", np.zeros_like(stored))):
            decoder = AudioDecoder(16_000, 0.8, pad)
            got = decoder.decode_eval(data) if rng is None else decoder.decode_train(data, rng)
            assert np.array_equal(got.numpy(), np.concatenate([stored, rest, rest])[:12_800])


def test_what_is_louder_than_full_scale_is_clipped() -> None:
    got = AudioDecoder(16_000, 0.5).decode_eval(encode(sine(16_000, 0.5, amplitude=3.0), 16_000, subtype="FLOAT"))
    assert (int(got.min()), int(got.max())) == (-32768, 32767)


# ---------------------------------------------------------------------------------------------------------------------
# Samples and batches


def test_a_sample_is_decoded_by_its_bytes_and_collated() -> None:
    decoder: AudioDecoder = pickle.loads(pickle.dumps(AudioDecoder(16_000, 0.25)))  # as it goes to worker processes
    rng = np.random.default_rng(0)
    items = []
    for extension in AUDIO_EXTENSIONS:
        for form in FORMATS.values():
            sample = RawSample("a", {extension: encode(sine(16_000, 0.5), 16_000, form), "txt": b"a tone"})
            items.append(decoder(sample, rng, False))
            assert (items[-1].shape, items[-1].dtype) == ((4000,), np.int16)
            assert np.array_equal(items[-1], decoder.decode_eval(sample.members[extension]).numpy())
    batch, mask = decoder.collate(items)
    assert (batch.shape, batch.dtype, mask) == ((16, 4000), torch.int16, None)
    assert torch.equal(batch[3], torch.from_numpy(items[3]))


@pytest.mark.parametrize(
    ("extensions", "detail"),
    [
        (["jpg", "txt"], "members: jpg, txt"),
        ([], "members: none"),
        (["m4a", "txt"], "members: m4a, txt; .m4a is not read: convert it to .flac, .ogg, .mp3 or .wav"),
        (["opus"], "members: opus; .opus is not read: name it KEY.ogg"),
        (["v2.wav", "txt"], "members: txt, v2.wav; KEY ends at the first dot of a file name: rename KEY.v2.wav to KEY.wav"),
    ],
)
def test_a_sample_without_sound_names_what_it_has(extensions: list[str], detail: str) -> None:
    with pytest.raises(MissingContent) as caught:
        AudioDecoder(16_000, 1.0)(RawSample("a", dict.fromkeys(extensions, b"")), np.random.default_rng(0), True)
    assert (caught.value.reason, caught.value.detail) == ("audio missing", detail)


def test_a_missing_image_names_the_sound() -> None:
    message = explain_missing_image(["flac", "txt"], EXTENSIONS)
    assert message == "members: flac, txt; .flac is a sound, which the section audio of a run reads"
    assert explain_missing_image(["flac", "heic"], EXTENSIONS).endswith(".heic is not read: convert it to .jpg, .png or .webp")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0}, "audio.rate=0 must be from 1000 to 768000 Hz"),
        ({"seconds": 0.0}, "audio.seconds=0.0 must be from 0.01 to 3600"),
        ({"seconds": float("nan")}, "audio.seconds=nan"),
        ({"pad": "mirror"}, "audio.pad='mirror' must be one of repeat, repeatpad, silence"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AudioDecoder(**({"rate": 16_000, "seconds": 1.0} | options))


@pytest.mark.parametrize("package", ["soundfile", "soxr"])
def test_a_missing_package_is_one_line(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises ImportError
    with pytest.raises(ConfigError, match=rf"{package}.*pip install 'clipfuse\[audio\]'"):
        AudioDecoder(16_000, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Broken and hostile files


@pytest.mark.parametrize("form", FORMATS.values())
def test_truncated_files_are_bad_samples(form: str) -> None:
    data = encode(sine(44_100, 3.0), 44_100, form)
    AudioDecoder(16_000, 0.5).decode_eval(data)
    for end in (len(data) - 20, len(data) * 9 // 10, len(data) // 2, len(data) // 5):
        assert reason(data[:end]) == "audio truncated", end
    assert reason(data[:20]) in ("audio truncated", "audio unreadable")
    assert reason(b"") == "audio empty"
    AudioDecoder(16_000, 0.5).decode_eval(data + b"junk" * 500)


@pytest.mark.parametrize("form", ["WAV", "OGG"])
def test_files_without_samples_are_bad_samples(form: str) -> None:
    assert reason(encode(np.zeros(0), 44_100, form)) == "audio empty"


@pytest.mark.parametrize("form", FORMATS.values())
def test_files_of_a_few_samples_are_bad_samples(form: str) -> None:
    assert reason(encode(np.zeros(5), 44_100, form)) == "audio too short"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -30_000.0, MAX_PEAK * 1.01])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_float_samples_that_are_none_are_bad_samples(value: float, subtype: str) -> None:
    samples = np.zeros((8000, 2))
    samples[4000, 1] = value
    assert reason(encode(samples, 16_000, subtype=subtype)) == "audio unreadable"


def test_lies_in_the_header_of_a_wav() -> None:
    data = encode(sine(44_100, 1.0), 44_100)
    size = data.index(b"data") + 4
    for claim in (0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000):  # of programs that write to a pipe
        got = AudioDecoder(16_000, 0.5).decode_eval(patch(data, size, struct.pack("<I", claim)))
        assert torch.equal(got, AudioDecoder(16_000, 0.5).decode_eval(data))
    assert reason(patch(data, size, struct.pack("<I", 0x40000000))) == "audio truncated"
    assert reason(patch(data, size, struct.pack("<I", 0))) == "audio empty"
    for at, value in (
        (24, b"\xff\xff\xff\xff"),
        (24, b"\xff\xff\xff\x0f"),
        (24, b"\1\0\0\0"),
        (22, b"\xff\xff"),
        (22, b"\0\0"),
        (34, b"\0\0"),
        (20, b"\x55\0"),
    ):
        assert reason(patch(data, at, value)) == "audio unreadable", (at, value)
    chunks = b"junk\0\0\0\0" * 100_000
    assert reason(data[:12] + chunks + data[12:]) == "audio unreadable"


def test_lies_in_the_header_of_a_flac() -> None:
    data = encode(sine(44_100, 1.0), 44_100, "FLAC")
    length = 8 + 13  # 4 bits, then 4 bytes, of the STREAMINFO block (RFC 9639, section 8.2)

    def claim(frames: int) -> bytes:
        return patch(data, length, bytes([data[length] & 0xF0 | frames >> 32]) + (frames & 0xFFFFFFFF).to_bytes(4, "big"))

    assert claim(44_100) == data
    for seed in range(20):  # written to a pipe
        crops = [AudioDecoder(44_100, 0.1).decode_train(d, np.random.default_rng(seed)) for d in (data, claim(0))]
        assert torch.equal(*crops)
    for frames in (4096, 4097, 8192, 8193, 44_099):  # around the ends of blocks
        short = encode(sine(44_100, 1.0)[:frames], 44_100, "FLAC")
        with open_audio(patch(short, length, bytes([short[length] & 0xF0, 0, 0, 0, 0]))) as sound:
            assert sound.frames == frames
    assert reason(claim(44_101)) == "audio truncated"
    assert reason(claim(2**31 - 1)) == "audio truncated"
    assert reason(claim(2**36 - 1)) == "audio too long"
    damaged = patch(data, len(data) // 3, bytes(300))
    assert reason(damaged, AudioDecoder(16_000, 1.0)) == "audio unreadable"
    AudioDecoder(16_000, 0.1).decode_eval(damaged)  # the damage lies outside of the crop
    with pytest.raises(BadSample, match="audio unreadable"):
        check_audio(damaged)


@pytest.mark.parametrize("form", FORMATS.values())
def test_checking_reads_to_the_end_and_names_the_format(form: str) -> None:
    data = encode(sine(44_100, 1.0), 44_100, form)
    assert check_audio(data) == {"OGG": "Ogg"}.get(form, form)
    with pytest.raises(BadSample, match="audio truncated"):
        check_audio(data[:-50])


def test_an_mp3_without_a_length_is_read_to_its_end() -> None:
    # At this rate and bit rate, the tag with the length does not fit into the first frame: libsndfile estimates the length.
    data = encode(sine(22_050, 4.0), 22_050, "MP3", compression_level=0.9, bitrate_mode="CONSTANT")
    assert soundfile.info(io.BytesIO(data)).frames > 22_050 * 4 * 1.005
    with open_audio(data) as sound:
        assert sound.frames == pytest.approx(22_050 * 4, abs=2000)  # the codec's delay is not cut off without the tag
    for seed in range(8):
        AudioDecoder(16_000, 1.0).decode_train(data, np.random.default_rng(seed))


def test_formats_that_libsndfile_reads_but_we_do_not() -> None:
    for form in ("AIFF", "AU", "CAF"):
        assert reason(encode(sine(16_000, 1.0), 16_000, form)) == "audio unreadable"
    for data in (b"\xff", b"\xff\xd8\xff\xe0" + bytes(100), b"RIFF\0\0\0\0WEBPVP8 ", b"OggS", b"fLaC", b"ID3" + b"\x7f" * 20):
        assert reason(data) in ("audio unreadable", "audio truncated")
