"""Audio towers: tiny models of each architecture, and published ones against transformers' own on the same waveform."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    ClapAudioConfig,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapTextConfig,
)

from pretrain.errors import ConfigError
from pretrain.strategies.batch_norm import find_training_batch_norms
from pretrain.towers import audio
from pretrain.towers.audio import AudioTower, Config

pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")  # AST's, in transformers
AST = {
    "model_type": "audio-spectrogram-transformer",
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_mel_bins": 24,
    "patch_size": 8,
    "frequency_stride": 8,
    "time_stride": 6,
}
CLAP = {
    "model_type": "clap_audio_model",
    "num_mel_bins": 16,
    "spec_size": 32,
    "window_size": 4,
    "patch_embeds_hidden_size": 8,
    "hidden_size": 16,
    "depths": [1, 2],
    "num_attention_heads": [1, 2],
}
AUDIOS: dict[str, dict[str, Any]] = {
    "ast": {"args": AST, "recipe": "slaney"},
    "ast-avg": {"args": AST, "recipe": "slaney", "pool": "avg"},
    "ast-max": {"args": AST, "recipe": "slaney", "pool": "max"},
    "clap": {"args": CLAP},
    "clap-max": {"args": CLAP, "pool": "max"},
    "conv": {"name": "conv", "widths": [8, 16, 24], "mels": 24},
    "conv-max": {"name": "conv", "widths": [8, 16, 24], "mels": 24, "pool": "max"},
}
RATE, SECONDS = 8000, 0.6
GRIDS = {"ast": (3, 9), "clap": (2, 8), "conv": (3, 8)}


def build_tower(name: str, **more: Any) -> AudioTower:
    torch.manual_seed(0)
    kaldi = {"window": 200, "n_fft": 256, "hop": 80}
    return audio.build(Config(**{"rate": RATE, "seconds": SECONDS, "fmax": 4000.0, **kaldi, **AUDIOS[name], **more}))


def make_sounds(tower: AudioTower, b: int = 4) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(-9000, 9000, (b, tower.samples), dtype=torch.int16, generator=g)


@pytest.mark.parametrize("name", AUDIOS)
def test_shapes_gradients_and_pooling(name: str) -> None:
    tower = build_tower(name).train()
    states, valid, grid, pooled = tower(make_sounds(tower))
    assert grid == GRIDS[name.partition("-")[0]]
    assert states.shape == (4, grid[0] * grid[1], tower.width)
    assert pooled.shape == (4, tower.pooled_width)
    assert valid.shape == states.shape[:2]
    assert valid.all()
    pooled.square().sum().backward()
    assert not [n for n, p in tower.named_parameters() if p.requires_grad and p.grad is None]
    assert not tower.unused_parameters
    tower.eval()
    states, _, _, pooled = tower(make_sounds(tower))
    assert tower.pools_mean == torch.allclose(states.mean(dim=1), pooled, atol=1e-5)
    assert tower.pools_max == torch.equal(states.amax(dim=1), pooled)
    assert tower.pools_mean + tower.pools_max == (name != "ast")


@pytest.mark.parametrize("name", ["ast", "clap", "conv"])
def test_layers_are_numbered_and_frozen_ones_do_not_train(name: str) -> None:
    tower = build_tower(name)
    ids = tower.layer_ids()
    assert list(ids) == [n for n, _ in tower.named_parameters()]
    assert set(ids.values()) == set(range(tower.depth + 2))
    assert tower.depth == 3
    assert all(("norm." in n) == (i == 4) for n, i in ids.items() if n.endswith(("model.norm.weight", "layernorm.weight")))
    tower = build_tower(name, trainable_blocks=1).train()
    trained = {n for n, p in tower.named_parameters() if p.requires_grad}
    assert trained == {n for n, i in ids.items() if i >= 3}
    assert not any(p.requires_grad for p in build_tower(name, trainable_blocks=0).parameters())
    with pytest.raises(ConfigError, match=r"audio\.trainable_blocks=4, but the tower has 3 blocks"):
        build_tower(name, trainable_blocks=4)


@pytest.mark.parametrize("name", ["ast", "clap", "conv"])
def test_a_sound_depends_on_no_other(name: str) -> None:
    """Also in training: CLAP normalizes by stored statistics, so chunks and processes are exact."""
    tower = build_tower(name).train()
    assert not find_training_batch_norms(tower)
    for module in tower.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    sounds = make_sounds(tower)
    torch.testing.assert_close(tower(sounds).pooled[1:2], tower(sounds[1:2]).pooled, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["ast", "conv"])
def test_the_grid_has_low_frequencies_first_and_time_in_order(name: str) -> None:
    """A tone appears in the row of its frequency, and in the columns of its time."""
    tower = build_tower(name).eval()
    time = torch.arange(tower.samples) / RATE
    silence = 1e-2 * torch.randn(1, tower.samples, generator=torch.Generator().manual_seed(0))
    rows, columns = GRIDS[name]
    found_rows = []
    with torch.no_grad():
        before = tower(silence).states
        for hertz, row in ((150, 0), (3000, rows - 1)):
            for start, column in ((0.0, 0), (SECONDS * 0.85, columns - 1)):
                phase = ((time - start) / 0.09).clamp(0, 1)
                burst = torch.sin(2 * torch.pi * hertz * time) * torch.sin(torch.pi * phase) ** 2
                change = (tower(silence + 0.5 * burst).states - before).norm(dim=-1)[0]
                if name == "ast":  # attention spreads the change, which is largest where it is from
                    change = change - change.median()
                found = divmod(int(change.argmax()), columns)
                assert max(abs(found[0] - row), abs(found[1] - column)) <= (name == "conv"), (hertz, start, found)
                found_rows.append(found[0])
    assert max(found_rows[:2]) < min(found_rows[2:])


@pytest.mark.parametrize("name", AUDIOS)
def test_settings_rebuild_the_same_architecture(name: str) -> None:
    tower = build_tower(name).eval()
    rebuilt = audio.build(dataclasses.replace(Config(**AUDIOS[name]), **tower.settings())).eval()
    assert rebuilt.settings() == tower.settings()
    rebuilt.load_state_dict(tower.state_dict())
    assert torch.equal(tower(make_sounds(tower)).pooled, rebuilt(make_sounds(tower)).pooled)


def test_checkpointing_changes_no_gradient_and_is_refused_by_clap() -> None:
    gradients = []
    for checkpointing in (False, True):
        tower = build_tower("ast", checkpointing=checkpointing).double().train()
        tower(make_sounds(tower)).pooled.square().sum().backward()
        gradients.append({n: p.grad for n, p in tower.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-11)
    for name in ("clap", "conv"):
        with pytest.raises(ConfigError, match=r"audio\.checkpointing=true: this tower cannot recompute"):
            build_tower(name, checkpointing=True)


def test_positions_are_interpolated_over_time() -> None:
    tower, longer = build_tower("ast"), build_tower("ast", seconds=0.9)
    assert longer.config.args == tower.config.args
    with torch.no_grad():
        ramp = torch.arange(9.0).expand(24, 3, 9).flatten(1).T[None]
        dict(tower.named_parameters())["model.model.embeddings.position_embeddings"][:, 2:] = ramp
    assert tower.settings_for({"seconds": 0.9})["args"]["max_length"] == longer.settings()["args"]["max_length"]
    fitted = longer.fit_weights(tower.state_dict())
    longer.load_state_dict(fitted)
    columns = longer(make_sounds(longer)).grid[1]  # type: ignore[index]
    table = fitted["model.model.embeddings.position_embeddings"][0, 2:].reshape(3, columns, 24)
    assert columns == 14
    expected = np.interp((np.arange(columns) + 0.5) * 9 / columns - 0.5, np.arange(9), np.arange(9.0))
    torch.testing.assert_close(table, torch.tensor(expected).float()[None, :, None].expand(3, columns, 24))


# ---------------------------------------------------------------------------------------------------------------------
# Published models


def make_waveform(rate: int, seconds: float) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(3)
    time = np.arange(round(rate * seconds)) / rate
    return (0.3 * np.sin(2 * np.pi * 440 * time) + 0.05 * rng.standard_normal(len(time))).astype(np.float32)


def save_ast(folder: Path, **extractor: Any) -> ASTForAudioClassification:
    """Save an AST with random weights, positions and statistics, as published ones are: with a classifier."""
    torch.manual_seed(0)
    settings = {k: v for k, v in AST.items() if k != "model_type"} | {"num_mel_bins": 64, "max_length": 100}
    model = ASTForAudioClassification(ASTConfig(**settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    ASTFeatureExtractor(num_mel_bins=64, max_length=100, mean=-5.0, std=3.0, **extractor).save_pretrained(folder)
    return model


def save_clap(folder: Path, **extractor: Any) -> ClapModel:
    torch.manual_seed(0)
    is_fusion = extractor["truncation"] == "fusion"
    sizes = {"num_mel_bins": 64, "spec_size": 128, "depths": [1, 1, 2, 1], "num_attention_heads": [1, 1, 2, 2]}
    own = {"enable_fusion": is_fusion, "fusion_type": "aff_2d" if is_fusion else None, "hidden_size": 64}
    settings = {k: v for k, v in CLAP.items() if k != "model_type"} | sizes | own
    text = ClapTextConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = ClapModel(ClapConfig(text_config=text.to_dict(), audio_config=ClapAudioConfig(**settings).to_dict())).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        norm = model.audio_model.audio_encoder.batch_norm
        norm.running_mean.normal_(-30, 5)
        norm.running_var.uniform_(100, 400)
    model.save_pretrained(folder)
    ClapFeatureExtractor(max_length_s=2, **extractor).save_pretrained(folder)
    return model


def test_equals_transformers_ast_with_its_own_extractor(tmp_path: Path) -> None:
    reference, extractor = save_ast(tmp_path), ASTFeatureExtractor.from_pretrained(tmp_path)
    tower = audio.build(Config(name=str(tmp_path))).eval()
    assert (tower.rate, tower.samples) == (16000, 400 + 99 * 160)
    for seconds in (tower.seconds, 0.6):  # a shorter sound is followed by zeros
        sound = make_waveform(16000, seconds)
        features = extractor(sound, sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            expected = reference.audio_spectrogram_transformer(**features)
            found = tower(torch.from_numpy(sound)[None])
        torch.testing.assert_close(found.pooled, expected.pooler_output, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.states, expected.last_hidden_state[:, 2:], atol=1e-4, rtol=1e-4)
    assert tower.weights_origin == f"{tmp_path}: 55 of 55 tensors"
    rebuilt = audio.build(dataclasses.replace(Config(), **tower.settings())).eval()
    rebuilt.load_state_dict(tower.state_dict())
    assert torch.equal(rebuilt(torch.from_numpy(sound)[None]).pooled, found.pooled)


@pytest.mark.parametrize("truncation", ["rand_trunc", "fusion"])
def test_equals_transformers_clap_with_its_own_extractor(truncation: str, tmp_path: Path) -> None:
    reference = save_clap(tmp_path, truncation=truncation, frequency_min=50)
    extractor = ClapFeatureExtractor.from_pretrained(tmp_path)
    tower = audio.build(Config(name=str(tmp_path))).train()
    assert (tower.rate, tower.seconds, tower.samples) == (48000, 2, 96000)
    assert tower.mel.settings.recipe == ("htk" if truncation == "fusion" else "slaney")
    tower.eval()
    sound = make_waveform(48000, 2)
    features = extractor(sound, sampling_rate=48000, return_tensors="pt")["input_features"]
    with torch.no_grad():
        is_longer = torch.zeros(1, 1, dtype=torch.bool)  # the extractor draws a sound of the batch at random
        expected = reference.audio_model(input_features=features.float(), is_longer=is_longer)
        found = tower(torch.from_numpy(sound)[None])
    torch.testing.assert_close(found.pooled, expected.pooler_output, atol=1e-4, rtol=1e-4)
    states = expected.last_hidden_state.flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.states, states, atol=1e-4, rtol=1e-4)
    assert found.grid == expected.last_hidden_state.shape[2:]
    assert bool(tower.unused_parameters) == (truncation == "fusion")
    rebuilt = audio.build(dataclasses.replace(Config(), **tower.settings())).eval()
    rebuilt.load_state_dict(tower.state_dict())
    assert torch.equal(rebuilt(torch.from_numpy(sound)[None]).pooled, found.pooled)


def test_a_new_clap_begins_with_the_statistics_of_the_configuration() -> None:
    """Its BatchNorm does what mean and std say, so that transformers' feature extractor suits it."""
    sound = torch.from_numpy(make_waveform(RATE, SECONDS))[None]
    towers = [build_tower("clap", mean=mean, std=std).eval() for mean, std in ((-30.0, 10.0), (0.0, 1.0))]
    towers[1].load_state_dict(towers[0].state_dict())
    assert torch.equal(towers[0](sound).pooled, towers[1](sound).pooled)
    assert torch.equal(towers[0].model.model.audio_encoder.batch_norm.running_mean, torch.full((16,), -30.0))


# ---------------------------------------------------------------------------------------------------------------------
# Bad settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "audio: give audio.name .hub name, folder or conv. or audio.args.model_type"),
        ({"name": "conv"}, r"audio.widths=\[\] lists the channels of audio.name=conv"),
        ({"name": "conv", "widths": [8, 0]}, r"audio.widths=\[8, 0\]"),
        ({"name": "x", "widths": [8]}, r"audio.name=x, so leave it out or empty it: audio.widths=\[\]"),
        ({"name": "conv", "widths": [8], "args": {"a": 1}}, "audio.args=.* is for transformers models"),
        ({"name": "conv", "widths": [8], "rate": 0}, "audio.rate=0"),
        ({"name": "conv", "widths": [8], "seconds": -1.0}, "audio.seconds=-1.0"),
        ({"name": "conv", "widths": [8], "mels": 3000}, "audio.mels=3000: .* use fewer bands"),
        ({"args": {"model_type": "clap_audio"}}, "audio.args.model_type='clap_audio'; did you mean 'clap_audio_model'"),
        ({"args": {"model_type": "bert"}}, "the choices are audio-spectrogram-transformer, clap_audio_model"),
        ({"args": {**AST, "width": 3}}, "audio.args.width: ASTConfig has no such setting"),
        ({"args": AST, "mels": 30}, r"audio.mels=30: the model takes 24 bands"),
        (
            {"args": CLAP, "seconds": 20.0, "rate": 8000},
            "audio.seconds=20 makes 2001 frames, and .* takes 64: use at most 0.64 s",
        ),
        ({"args": AST, "seconds": 0.02, "rate": 8000}, "audio.args: ASTModel cannot be built"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    def build() -> None:
        config = Config(**settings)
        config.check()
        audio.build(config)

    with pytest.raises(ConfigError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_settings_that_contradict_the_published_ones_are_refused(tmp_path: Path) -> None:
    save_ast(tmp_path)
    for key, given, published in (("rate", 48000, "16000"), ("std", 3.0, "6.0 .twice its std"), ("hop", 80, "160")):
        with pytest.raises(ConfigError, match=f"audio.{key}={given} contradicts .*preprocessor_config.json.* {published}"):
            audio.build(Config(name=str(tmp_path), **{key: given}))
    assert audio.build(Config(name=str(tmp_path), rate=16000, mean=-5.0)).rate == 16000
    assert audio.build(Config(name=str(tmp_path), std=3.0, pretrained=False)).mel.settings.std == 3.0
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": "fast"}))
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json cannot be read"):
        audio.build(Config(name=str(tmp_path)))
    (tmp_path / "preprocessor_config.json").write_text("[")
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json cannot be read"):
        audio.build(Config(name=str(tmp_path)))
