"""A ClapModel of transformers is read as it is: the same embeddings, trained on, and written back unchanged."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, ClapConfig, ClapFeatureExtractor, ClapModel, ClapTextConfig, PreTrainedTokenizerFast

from finetune.explain.similarity import check_pooling
from finetune.model import choose_token_sources
from pretrain.checkpoints import export, warm_start
from pretrain.checkpoints.loading import LoadedModel, load_model
from pretrain.embedding.manifest import build_layout
from pretrain.embedding.options import Options
from pretrain.errors import ConfigError, UserError
from tests.pretrain.towers.test_audio import CLAP
from tests.support import Small

RATE = 8000
TEXTS = ["a red thing", "a tone of 440 hertz, then silence"]


def save_clap(folder: Path, tokenizer_folder: Path, act: str = "relu", **extractor: Any) -> ClapModel:
    """Save a CLAP with random weights, statistics and biases, and its tokenizer and feature extractor; return it."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder, model_max_length=30)
    is_fusion = extractor.get("truncation") == "fusion"
    own = {"enable_fusion": is_fusion, "fusion_type": "aff_2d" if is_fusion else None, "hidden_size": 64}
    sizes = {"num_mel_bins": 64, "spec_size": 128, "depths": [1, 1, 2, 1], "num_attention_heads": [1, 1, 2, 2]}
    text = ClapTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config = ClapConfig(
        text_config=text.to_dict(), audio_config={**CLAP, **sizes, **own}, projection_dim=12, projection_hidden_act=act
    )
    torch.manual_seed(0)
    model: Any = ClapModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        norm = model.audio_model.audio_encoder.batch_norm
        norm.running_mean.normal_(-30, 5)
        norm.running_var.uniform_(100, 400)
        model.logit_scale_a.fill_(2.5)
        model.logit_scale_t.fill_(2.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {"sampling_rate": RATE, "hop_length": 80, "fft_window_size": 256, "max_length_s": 2, "frequency_max": 4000}
    ClapFeatureExtractor(**settings, **extractor).save_pretrained(folder)
    return model


def make_sound(seconds: float) -> np.ndarray:
    """Return a tone in noise (S,) int16."""
    time = np.arange(round(RATE * seconds)) / RATE
    noise = np.random.default_rng(3).standard_normal(len(time))
    return ((0.3 * np.sin(2 * np.pi * 440 * time) + 0.05 * noise) * 32767).astype(np.int16)


@torch.no_grad()
def embed(loaded: LoadedModel, sound: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    file = io.BytesIO()
    soundfile.write(file, sound, RATE, format="WAV", subtype="PCM_16")
    waveform = loaded.decoders["audio"].decode_eval(file.getvalue())
    return loaded.model.encode("audio", waveform[None]), loaded.model.encode("text", *loaded.decoders["text"].encode(TEXTS))


@torch.no_grad()
def embed_with_transformers(model: Any, folder: Path, sound: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    extractor: Any = ClapFeatureExtractor.from_pretrained(folder)
    features = extractor(sound / np.float32(32768), sampling_rate=RATE, return_tensors="pt")["input_features"].float()
    tokens: Any = AutoTokenizer.from_pretrained(folder)(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    out = model(input_features=features, is_longer=torch.zeros(1, 1, dtype=torch.bool), **tokens)
    return out.audio_embeds, out.text_embeds


@pytest.mark.parametrize(
    "extractor",
    [
        {"truncation": "rand_trunc"},
        {"truncation": "rand_trunc", "padding": "repeat"},
        {"truncation": "fusion", "padding": "pad"},
    ],
    ids=lambda extractor: "-".join(extractor.values()),
)
def test_a_clap_gives_the_embeddings_of_transformers(small: Small, tmp_path: Path, extractor: dict[str, str]) -> None:
    model = save_clap(tmp_path / "clap", small.tokenizer, **extractor)
    loaded = load_model(tmp_path / "clap")
    assert list(loaded.model.towers) == ["text", "audio"]
    assert loaded.model.logit_scale.item() == pytest.approx(2.5)
    for seconds in (2.0, 0.7):  # the shorter one is repeated, or followed by silence
        sound = make_sound(seconds)
        for ours, theirs in zip(embed(loaded, sound), embed_with_transformers(model, tmp_path / "clap", sound), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_it_is_exported_unchanged(small: Small, tmp_path: Path) -> None:
    save_clap(tmp_path / "in", small.tokenizer, truncation="rand_trunc")
    out = export.export(load_model(tmp_path / "in"), tmp_path / "out", "hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "in", out))
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name].reshape(value.shape), value, atol=1e-6, rtol=0, msg=name)
    assert json.loads((out / "preprocessor_config.json").read_text())["padding"] == "repeatpad"
    with pytest.raises(UserError, match="open_clip cannot hold"):
        export.export(load_model(tmp_path / "in"), tmp_path / "other", "open_clip")


def test_single_tokens_of_it_have_no_place_in_the_shared_space(small: Small, tmp_path: Path) -> None:
    """The tower pools the mean of its tokens, but of two layers with a ReLU the mean is not the layers of the mean."""
    save_clap(tmp_path / "clap", small.tokenizer, truncation="rand_trunc")
    loaded = load_model(tmp_path / "clap")
    assert loaded.model.tower("audio").pools_mean
    with pytest.raises(ConfigError, match=r"two layers \(model\.projection=mlp\)"):
        loaded.model.tokens("audio", torch.zeros(1, 2 * RATE, dtype=torch.int16))
    with pytest.raises(UserError, match="similarity maps need projections that are matrices"):
        check_pooling(loaded.model, "audio")
    assert choose_token_sources(loaded.model, "auto") == {"text": "tower", "audio": "tower"}
    with pytest.raises(ConfigError, match="tokens=aligned: the projection has two layers"):
        choose_token_sources(loaded.model, "aligned")
    options = Options(["none"], str(tmp_path / "out"), tokens="shared")
    with pytest.raises(ConfigError, match="--tokens shared: the projection has two layers"):
        build_layout(loaded, options)


def test_what_cannot_be_read_is_refused(small: Small, tmp_path: Path) -> None:
    for act, message in (("gelu", "projection_hidden_act=gelu"), ("linear", "its projections have biases, but no activation")):
        save_clap(tmp_path / act, small.tokenizer, act, truncation="rand_trunc")
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / act)
    (tmp_path / "linear/model.safetensors").unlink()
    with pytest.raises(UserError, match="are its weights missing"):
        load_model(tmp_path / "linear")
    one_tower = f"the weights of one tower are image.weights={tmp_path}/linear or text.name={tmp_path}/linear or audio.name="
    with pytest.raises(ConfigError, match=re.escape(one_tower)):
        warm_start.with_init_defaults({"init": str(tmp_path / "linear")})
    path = tmp_path / "gelu/config.json"
    config = json.loads(path.read_text())
    config["audio_config"]["depths"] = [1, 1, 10**6, 1]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="audio_config describes a tower of"):
        load_model(tmp_path / "gelu")
