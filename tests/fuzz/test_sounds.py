"""Damaged sounds: samples of the right shape, or a bad sample that depends on nothing but the file."""

import io
import random
import struct

import numpy as np
import soundfile

from pretrain.data import BadSample
from pretrain.data.audio import AudioDecoder
from pretrain.data.audio_files import check_audio
from tests.support.mutations import BoundedMemory, assert_bad, assert_one_line, count_cases, mutate_bytes

KINDS = [
    ("WAV", "PCM_16"), ("WAV", "PCM_U8"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("RF64", "PCM_24"), ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"),
]  # fmt: skip


def build_sounds() -> list[bytes]:
    """Return half a second of noise in each format, with one to three channels."""
    rng, sounds = np.random.default_rng(0), []
    for number, (form, subtype) in enumerate(KINDS):
        for rate in (8_000, 48_000):
            out = io.BytesIO()
            channels = 1 + number % (2 if form == "MP3" or subtype == "IMA_ADPCM" else 3)
            soundfile.write(out, rng.normal(0, 0.1, (rate // 2, channels)), rate, format=form, subtype=subtype)
            sounds.append(out.getvalue())
    return sounds


def damage(rng: random.Random, data: bytes) -> bytes:
    """Damage any part of a file, or put a hostile number into its first 100 bytes, where the header is."""
    if rng.random() < 0.5:
        return mutate_bytes(rng, data)
    number = rng.choice([0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, rng.randrange(1 << 32)])
    packed = struct.pack(rng.choice("<>") + "I", number)[: rng.choice([1, 2, 4])]
    at = rng.randrange(min(100, len(data)))
    return data[:at] + packed + data[at + len(packed) :]


def is_usable(data: bytes) -> bool:
    """Return whether a sound can be decoded to its end."""
    try:
        check_audio(data)
    except BadSample as bad:
        assert_bad(bad)
        return False
    return True


def test_a_damaged_sound_decodes_or_is_a_bad_sample() -> None:
    sounds, outcomes = build_sounds(), {"decoded": 0, "bad": 0}
    decoders = [AudioDecoder(16_000, seconds, pad) for seconds, pad in ((0.2, "repeat"), (1.0, "repeat"), (1.0, "silence"))]
    with BoundedMemory(256):
        for case in range(count_cases(400)):
            rng = random.Random(case)
            data, decoder = damage(rng, rng.choice(sounds)), rng.choice(decoders)
            is_intact = is_usable(data)
            for decode in (decoder.decode_eval, lambda data, d=decoder: d.decode_train(data, np.random.default_rng(0))):
                try:
                    samples = decode(data).numpy()
                except BadSample as bad:
                    assert_bad(bad)
                    assert_one_line(bad)
                    assert not is_intact, case  # what data check and data pack accept never fails in a run
                    outcomes["bad"] += 1
                    continue
                assert (samples.shape, samples.dtype) == ((decoder.samples,), np.int16), case
                outcomes["decoded"] += 1
    assert min(outcomes.values()) > 100
