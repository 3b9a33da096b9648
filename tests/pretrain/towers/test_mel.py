"""Log-mel spectrograms against transformers' numpy code, and against the feature extractors of AST and CLAP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ASTFeatureExtractor, ClapFeatureExtractor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from pretrain.errors import ConfigError
from pretrain.towers.mel import LogMel, MelSettings, build_filters

pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")  # AST's, in transformers
SETTINGS = {
    "kaldi": MelSettings(16000, "kaldi", 512, 400, 160, 128, 20.0, 8000.0, -4.2677393, 2 * 4.5689974),
    "slaney": MelSettings(48000, "slaney", 1024, 1024, 480, 64, 50.0, 14000.0, 0.0, 1.0),
    "htk": MelSettings(22050, "htk", 1024, 1024, 256, 40, 0.0, 11025.0, 0.0, 1.0),
    "small": MelSettings(8000, "slaney", 256, 256, 80, 24, 100.0, 3800.0, -40.0, 20.0),
}
FILTERS: dict[str, dict[str, Any]] = {
    "kaldi": {"mel_scale": "kaldi", "triangularize_in_mel_space": True},
    "slaney": {"mel_scale": "slaney", "norm": "slaney"},
    "htk": {"mel_scale": "htk"},
}


def make_sound(settings: MelSettings, seconds: float, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return a few tones in noise, float32 in [-1, 1]."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(settings.rate * seconds)) / settings.rate
    tones = sum(np.sin(2 * np.pi * f * time) * a for f, a in zip((220, 1330, 3100), (0.4, 0.2, 0.1), strict=True))
    return (tones + 0.02 * rng.standard_normal(len(time))).astype(np.float32)


def reference(settings: MelSettings, sound: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the spectrogram (T, F) by transformers' numpy code."""
    filters = mel_filter_bank(
        settings.n_fft // 2 + 1, settings.mels, settings.fmin, settings.fmax, settings.rate, **FILTERS[settings.recipe]
    )
    kaldi = {"center": False, "preemphasis": 0.97, "mel_floor": 1.192092955078125e-07, "remove_dc_offset": True}
    mel = spectrogram(
        sound,
        window_function(settings.window, "hann", periodic=settings.recipe != "kaldi"),
        frame_length=settings.window,
        hop_length=settings.hop,
        fft_length=settings.n_fft,
        power=2.0,
        mel_filters=filters,
        log_mel="log" if settings.recipe == "kaldi" else "dB",
        **(kaldi if settings.recipe == "kaldi" else {}),
    ).T
    return (mel - settings.mean) / settings.std


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_transformers(name: str) -> None:
    settings = SETTINGS[name]
    sounds = np.stack([make_sound(settings, 0.5, seed) for seed in range(2)])
    expected = torch.from_numpy(np.stack([reference(settings, sound) for sound in sounds]))
    mel = LogMel(settings)
    found = mel(torch.from_numpy(sounds))
    assert found.shape == expected.shape == (2, settings.count_frames(sounds.shape[1]), settings.mels)
    torch.testing.assert_close(found, expected.float(), atol=2e-4, rtol=1e-4)
    exact = mel.double()(torch.from_numpy(sounds).double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, expected.double(), atol=2e-5, rtol=1e-5)  # the reference rounds spectra to float32


@pytest.mark.parametrize("name", SETTINGS)
def test_filters_equal_transformers(name: str) -> None:
    settings = SETTINGS[name]
    arguments = (settings.n_fft // 2 + 1, settings.mels, settings.fmin, settings.fmax, settings.rate)
    expected = mel_filter_bank(*arguments, **FILTERS[settings.recipe])
    # For odd rates the reference spreads its frequencies to rate // 2, a hertz apart at most.
    np.testing.assert_allclose(build_filters(settings), expected, atol=1e-9 if settings.rate % 2 == 0 else 1e-3)


def test_integers_are_scaled_and_half_precision_keeps_the_filters() -> None:
    settings = SETTINGS["small"]
    sound = torch.from_numpy(make_sound(settings, 0.5) * 32767).round()
    mel = LogMel(settings)
    expected = mel(sound[None] / 32768)
    assert torch.equal(mel(sound[None].to(torch.int16)), expected)
    assert torch.equal(mel.bfloat16()(sound[None].to(torch.int16)), expected)
    assert torch.equal(mel.double().float()(sound[None].to(torch.int16)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mel(sound[None].to(torch.int16)), expected)


@pytest.mark.parametrize("padding", ["repeatpad", "pad"])
def test_equals_the_extractor_of_clap(padding: str) -> None:
    extractor = ClapFeatureExtractor(truncation="rand_trunc", padding=padding, max_length_s=1)
    settings = replace(SETTINGS["slaney"], fmin=0.0)
    sound = make_sound(settings, 1.0)
    expected = extractor(sound, sampling_rate=48000, return_tensors="pt")["input_features"]
    found = LogMel(settings)(torch.from_numpy(sound)[None])
    torch.testing.assert_close(found[:, None], expected.float(), atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("seconds", [0.5, 1.5])
def test_equals_the_extractor_of_ast(seconds: float) -> None:
    """Without torchaudio, transformers computes the features itself. Short sounds get zeros, long ones are cut."""
    extractor = ASTFeatureExtractor(max_length=100)
    settings = SETTINGS["kaldi"]
    sound = make_sound(settings, seconds)
    expected = extractor(sound, sampling_rate=16000, return_tensors="pt")["input_values"]
    found = LogMel(settings)(torch.from_numpy(sound)[None], 100)
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hop": 0}, "audio.hop=0"),
        ({"window": 600}, "audio.window=600 must be from 2 to audio.n_fft=512"),
        ({"fmax": 9000.0}, r"audio.fmax=9000 must be 0 <= fmin < fmax <= 8000, half of audio.rate"),
        ({"std": 0.0}, "audio.std=0"),
        ({"n_fft": 256, "window": 200}, "audio.mels=128: [0-9]+ bands lie between"),
    ],
)
def test_impossible_settings_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LogMel(replace(SETTINGS["kaldi"], **changes))
