"""Imported models keep their embeddings, can be trained, and are exported unchanged."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import AutoModel, CLIPConfig, CLIPModel, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from launch import cli
from pretrain import config as configuration
from pretrain.checkpoints import export
from pretrain.checkpoints.loading import LoadedModel, load_model
from pretrain.errors import ConfigError, UserError
from pretrain.formats import portable_tokenizer
from pretrain.train import PretrainConfig
from tests.support import Small

OPENAI: dict[str, Any] = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 24, "width": 32, "heads": 2, "layers": 2},
}
SENTENCES = ["a red ball", "two green boxes on grass, left of a house"]


def randomize(model: Any) -> Any:
    """Add noise to all weights, so that norms and biases are random too."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def make_images(size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, size, size), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


@torch.no_grad()
def embed(loaded: LoadedModel) -> tuple[torch.Tensor, torch.Tensor]:
    text = loaded.decoders["text"]
    return loaded.model.encode("image", make_images()), loaded.model.encode("text", *text.encode(SENTENCES))


def normalized_images(loaded: LoadedModel) -> torch.Tensor:
    tower: Any = loaded.model.towers["image"]
    images: torch.Tensor = tower.normalize(make_images())
    return images


def save_open_clip(folder: Path, tokenizer: Path, **vision: Any) -> Any:
    """Save a CLIP of OpenAI's architecture as open_clip saves its models, and return it."""
    loaded_tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    config = json.loads(json.dumps(OPENAI))
    config["text_cfg"] |= {"vocab_size": len(loaded_tokenizer), "hf_tokenizer_name": "."}
    config["vision_cfg"] |= vision
    model = randomize(open_clip.CLIP(**config))
    folder.mkdir()
    recipe = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": recipe}))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    loaded_tokenizer.save_pretrained(folder)
    return model


@torch.no_grad()
def embed_with_open_clip(model: Any, folder: Path, loaded: LoadedModel) -> tuple[torch.Tensor, torch.Tensor]:
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    image = model.encode_image(normalized_images(loaded), normalize=True)
    return image, model.encode_text(tokenizer(SENTENCES), normalize=True)


def assert_close(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def assert_equal_weights(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """Compare weights name by name, to 1e-6."""
    assert set(before) == set(after)
    for name, value in before.items():
        torch.testing.assert_close(after[name].reshape(value.shape), value, atol=1e-6, rtol=0, msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# open_clip


@pytest.mark.parametrize(
    "vision", [{}, {"pool_type": "avg", "no_ln_pre": True}, {"pool_type": "avg", "final_ln_after_pool": True}]
)
def test_an_open_clip_folder_is_imported_and_exported_unchanged(vision: dict[str, Any], small: Small, tmp_path: Path) -> None:
    model = save_open_clip(tmp_path / "in", small.tokenizer, **vision)
    loaded = load_model(tmp_path / "in")
    assert loaded.config.image.mean == [0.5, 0.5, 0.5]
    assert_close(embed(loaded), embed_with_open_clip(model, tmp_path / "in", loaded))
    out = export.export(loaded, tmp_path / "out", "open_clip")
    assert_equal_weights(load_file(tmp_path / "in/open_clip_model.safetensors"), load_file(out / "open_clip_model.safetensors"))


def test_a_weight_file_of_open_clips_training_is_imported(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MODEL:FILE, and a file whose folder has a params.txt with the model; both use OpenAI's vocabulary."""
    config = json.loads(json.dumps(OPENAI))
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config if name == "tiny" else None)
    model = randomize(open_clip.CLIP(**config))
    (tmp_path / "logs/checkpoints").mkdir(parents=True)
    file = tmp_path / "logs/checkpoints/epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, file)
    with pytest.raises(UserError, match=r"epoch_1\.pt does not say which model it is: give MODEL:"):
        load_model(file)
    (tmp_path / "logs/params.txt").write_text("batch_size: 64\nmodel: tiny\n")
    by_name, by_params = load_model(f"tiny:{file}"), load_model(file)
    ids = open_clip.SimpleTokenizer(context_length=24)(SENTENCES)
    with torch.no_grad():
        expected = model.encode_image(normalized_images(by_name), normalize=True), model.encode_text(ids, normalize=True)
    assert_close(embed(by_name), expected)
    assert_close(embed(by_params), expected)
    with pytest.raises(UserError, match="huge is not a model of open_clip"):
        load_model(f"huge:{file}")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def test_code_in_a_weight_file_is_not_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": Evil()}, tmp_path / "epoch_1.pt")
    with pytest.raises(UserError, match="cannot be read as weights alone"):
        load_model(f"ViT-B-32:{tmp_path / 'epoch_1.pt'}")
    assert "run" not in capsys.readouterr().out


def test_the_openai_tokenizer_gives_the_ids_of_open_clip() -> None:
    tokenizer = portable_tokenizer.build_openai_tokenizer(77)
    reference = open_clip.SimpleTokenizer()
    for text in [*SENTENCES, "Naïve café — 42% it's o'clock", "日本語 emoji 🙂"]:
        ids = tokenizer([text])["input_ids"][0]
        assert ids == [i for i in reference([text])[0].tolist() if i]


# ---------------------------------------------------------------------------------------------------------------------
# transformers


def save_clip(folder: Path, tokenizer: Path) -> CLIPModel:
    loaded_tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special_ids = {
        "eos_token_id": loaded_tokenizer.eos_token_id,
        "bos_token_id": loaded_tokenizer.bos_token_id,
        "pad_token_id": loaded_tokenizer.pad_token_id,
    }
    text = sizes | special_ids | {"vocab_size": len(loaded_tokenizer), "max_position_embeddings": 24}
    config = CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    model = randomize(CLIPModel(config))
    model.save_pretrained(folder)
    loaded_tokenizer.save_pretrained(folder)
    recipe = {"image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 32, "width": 32}, "image_mean": [0.4] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(recipe | {"image_std": [0.3] * 3, "do_center_crop": True}))
    saved: CLIPModel = model
    return saved


@torch.no_grad()
def embed_with_transformers(model: Any, loaded: LoadedModel, folder: Path, **padding: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = PreTrainedTokenizerFast.from_pretrained(folder)(SENTENCES, return_tensors="pt", **padding)
    tokens.pop("token_type_ids", None)
    out = model(pixel_values=normalized_images(loaded), **tokens)
    return normalize(out.image_embeds, dim=-1), normalize(out.text_embeds, dim=-1)


def test_a_clip_folder_is_imported_and_exported_unchanged(small: Small, tmp_path: Path) -> None:
    model = save_clip(tmp_path / "in", small.tokenizer)
    loaded = load_model(tmp_path / "in")
    assert (loaded.config.image.mean, loaded.config.image.std) == ([0.4] * 3, [0.3] * 3)
    assert_close(embed(loaded), embed_with_transformers(model, loaded, tmp_path / "in", padding=True))
    out = export.export(loaded, tmp_path / "out", "hf")
    assert_equal_weights(load_file(tmp_path / "in/model.safetensors"), load_file(out / "model.safetensors"))
    again = export.export(load_model(out), tmp_path / "oc", "open_clip")  # and then to another library
    assert_close(embed(load_model(again)), embed(loaded))


def test_a_siglip_folder_is_imported_and_exported_unchanged(small: Small, tmp_path: Path) -> None:
    loaded_tokenizer = PreTrainedTokenizerFast.from_pretrained(small.tokenizer)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(loaded_tokenizer), "max_position_embeddings": 64, "projection_size": 32}
    model = randomize(SiglipModel(SiglipConfig(text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 8})))
    with torch.no_grad():
        model.logit_bias.fill_(-9.5)
    loaded_tokenizer.model_input_names = loaded_tokenizer.init_kwargs["model_input_names"] = ["input_ids"]
    model.save_pretrained(tmp_path / "in")
    loaded_tokenizer.save_pretrained(tmp_path / "in")
    loaded = load_model(tmp_path / "in")
    assert_close(embed(loaded), embed_with_transformers(model, loaded, tmp_path / "in", padding="max_length", max_length=64))
    assert loaded.model.state_dict()["logit_bias"].item() == pytest.approx(-9.5)
    out = export.export(loaded, tmp_path / "out", "hf")
    assert_equal_weights(load_file(tmp_path / "in/model.safetensors"), load_file(out / "model.safetensors"))


def test_missing_and_extra_weights_are_counted_and_named(small: Small, tmp_path: Path) -> None:
    save_open_clip(tmp_path / "oc", small.tokenizer)
    path = tmp_path / "oc/open_clip_model.safetensors"
    weights = load_file(path)
    del weights["visual.ln_post.weight"], weights["ln_final.bias"]
    save_file(weights | {"visual.attn_pool.query": torch.zeros(4)}, path)
    with pytest.raises(
        UserError, match=r"2 weights are missing \(first .*norm\.weight\); 1 are not in the model \(first .*attn_pool"
    ):
        load_model(tmp_path / "oc")
    save_clip(tmp_path / "hf", small.tokenizer)
    path = tmp_path / "hf/model.safetensors"
    weights = load_file(path)
    del weights["visual_projection.weight"]
    save_file(weights | {"more": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(
        UserError, match=r"1 weights are missing \(first visual_proj.*1 weights are not in the model \(first more"
    ):
        load_model(tmp_path / "hf")


def test_a_setting_without_counterpart_is_named(small: Small, tmp_path: Path) -> None:
    save_open_clip(tmp_path / "in", small.tokenizer)
    path = tmp_path / "in/open_clip_config.json"
    content = json.loads(path.read_text())
    content["model_cfg"]["vision_cfg"]["attentional_pool"] = True
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"vision_cfg\.attentional_pool=True has no counterpart"):
        load_model(tmp_path / "in")
    with pytest.raises(UserError, match="nobody/nothing"):
        load_model("nobody/nothing")


def test_a_resnet_is_refused_by_its_name_and_the_size_of_images_may_be_a_list(small: Small, tmp_path: Path) -> None:
    save_open_clip(tmp_path / "in", small.tokenizer)
    path = tmp_path / "in/open_clip_config.json"
    content = json.loads(path.read_text())
    vision = content["model_cfg"]["vision_cfg"]
    resnet = {**vision, "layers": [3, 4, 6, 3], "patch_size": None}
    path.write_text(json.dumps({"model_cfg": {**content["model_cfg"], "vision_cfg": resnet}}))
    with pytest.raises(UserError, match=r"layers=\[3, 4, 6, 3\], OpenAI's modified ResNet, has no counterpart in clipfuse$"):
        load_model(tmp_path / "in")
    expected = vision["image_size"]
    vision["image_size"] = [expected, expected]
    path.write_text(json.dumps(content))
    assert load_model(tmp_path / "in").config.image.size == expected


# ---------------------------------------------------------------------------------------------------------------------
# init=


def settings_without_towers(small: Small, run: Path, *more: str) -> list[str]:
    """Return the settings of a run that names no architecture of its towers."""
    words = [word for word in small.settings(run, "train.steps=3", *more) if not word.startswith(("image.", "text.", "model."))]
    return [word for word in words if word.partition("=")[0] != "optim.warmup"]


def test_an_imported_clip_is_trained_and_loaded_by_transformers(
    small: Small, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = save_open_clip(tmp_path / "in", small.tokenizer)
    config = tmp_path / "on.yaml"
    config.write_text(f"init: {tmp_path / 'in'}\noptim: {{lr: 1.0e-4, warmup: 1}}\n")
    words = settings_without_towers(small, tmp_path / "run", "loss.name=siglip")  # a loss with a bias, which init lacks
    assert cli.main(["pretrain", str(config), *words]) == 0
    assert f"weights start from {tmp_path / 'in'}" in capfd.readouterr().err
    out = tmp_path / "out"
    assert cli.main(["export", str(tmp_path / "run"), str(out), "--format", "hf"]) == 0
    back = AutoModel.from_pretrained(out).eval()
    assert isinstance(back, CLIPModel)
    loaded = load_model(tmp_path / "run")
    assert_close(embed(loaded), embed_with_transformers(back, loaded, out, padding=True))
    moved = (loaded.model.projection("image").weight.t() - model.visual.proj).detach().abs().max()
    assert 0 < float(moved) < 1e-3  # three steps of size 1e-4 from the imported weights


def test_each_tower_starts_from_its_own_model(small: Small, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    image, text = save_open_clip(tmp_path / "a", small.tokenizer), save_clip(tmp_path / "b", small.tokenizer)
    config = tmp_path / "on.yaml"
    config.write_text(f"init: {{image: {tmp_path / 'a'}, text: {tmp_path / 'b'}}}\nmodel: {{dim: 8}}\n")
    words = settings_without_towers(small, tmp_path / "run", "optim.lr=1e-9")
    assert cli.main(["pretrain", str(config), *words]) == 0
    weights = load_model(tmp_path / "run").model.state_dict()
    first = image.visual.conv1.weight
    torch.testing.assert_close(weights["towers.image.model.patch_embed.proj.weight"], first.detach(), atol=1e-6, rtol=0)
    second = text.text_model.embeddings.token_embedding.weight
    torch.testing.assert_close(
        weights["towers.text.model.embeddings.token_embedding.weight"], second.detach(), atol=1e-6, rtol=0
    )
    assert weights["projections.image.weight"].shape == (8, 64)


def test_init_of_another_architecture_is_refused_unless_partial(
    small: Small, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_clip(tmp_path / "in", small.tokenizer)
    init = f"init={tmp_path / 'in'}"
    assert cli.main(["pretrain", "clipart", *small.settings(tmp_path / "run", "train.steps=1", init)]) == 1
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert "weights are missing" in line
    assert "init_partial=true" in line
    words = small.settings(tmp_path / "run2", "train.steps=1", init, "init_partial=true")
    assert cli.main(["pretrain", "clipart", *words]) == 0
    assert "weights start from it" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="must name a run for each tower"):
        configuration.load(PretrainConfig, None, ["init={image: [3]}", "train.steps=1", "text.args={model_type: bert}"])


def test_a_tokenizer_that_differs_is_refused(small: Small, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from pretrain.data.train_tokenizer import train_tokenizer_on

    train_tokenizer_on(["other words than those"] * 3, tmp_path / "other", vocab=300)
    save_clip(tmp_path / "in", small.tokenizer)
    config = tmp_path / "on.yaml"
    config.write_text(f"init: {tmp_path / 'in'}\ntext: {{tokenizer: {tmp_path / 'other'}}}\n")
    assert cli.main(["pretrain", str(config), *settings_without_towers(small, tmp_path / "run")]) == 2
    assert "differs from the tokenizer of init" in capfd.readouterr().err.strip().splitlines()[-1]
