"""image.resize=pad: exports and imports carry the borders, and a format that cannot says so."""

import io
import json
import re
from pathlib import Path
from typing import Any

import clipfuse
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from pretrain.checkpoints import export
from pretrain.checkpoints.loading import load_model
from pretrain.data.images import Preprocess, parse_resize
from pretrain.errors import ConfigError, UserError
from pretrain.formats.model_card import RESIZE_CODE
from pretrain.towers.timm import Config
from tests.pretrain.formats.test_export import build_model
from tests.support import ONE_BLOCK, TINY_TOWERS, Small


def draw(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = [draw(32, 90), draw(90, 31), draw(64, 64), draw(7, 11)]


def encode(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def embed(loaded: Any) -> torch.Tensor:
    decoder = loaded.decoders["image"]
    with torch.no_grad():
        return loaded.model.encode("image", torch.stack([decoder.decode_eval(encode(p)) for p in PICTURES]))


COLORS = {"white": (255, 255, 255), "#102030": (16, 32, 48), "mean": (123, 117, 104)}


@pytest.mark.parametrize("color", COLORS)
def test_open_clip_pads_as_the_run(color: str, small: Small, tmp_path: Path) -> None:
    loaded = build_model("clipart", small.tokenizer, *TINY_TOWERS, "image.resize=pad", f"image.pad_color='{color}'")
    assert loaded.decoders["image"].pad_color == COLORS[color]
    folder = export.export(loaded, tmp_path / "out", "open_clip")
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    with torch.no_grad():
        actual = model.eval().encode_image(torch.stack([preprocess(picture) for picture in PICTURES]), normalize=True)
    torch.testing.assert_close(actual, embed(loaded), atol=1e-5, rtol=0)
    again = load_model(folder)
    assert again.config.image.resize == "pad"
    torch.testing.assert_close(embed(again), embed(loaded), atol=1e-5, rtol=0)
    crop = build_model("clipart", small.tokenizer, *TINY_TOWERS)
    assert (embed(crop)[0] - embed(loaded)[0]).abs().max() > 1e-3


def test_transformers_pads_with_the_mean_color_and_refuses_others(small: Small, tmp_path: Path) -> None:
    settings = [*TINY_TOWERS, "image.resize=pad"]
    white = build_model("clipart", small.tokenizer, *settings)
    with pytest.raises(UserError) as caught:
        export.export(white, tmp_path / "out", "hf")
    assert str(caught.value) == (
        "hf cannot hold borders of #ffffff (image.resize=pad): its image processor pads with the mean color only, "
        "image.pad_color=mean; --format open_clip or onnx can hold it"
    )
    assert not (tmp_path / "out").exists()
    loaded = build_model("clipart", small.tokenizer, *settings, "image.pad_color=mean")
    folder = export.export(loaded, tmp_path / "out", "hf")
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    inputs = processor(images=PICTURES, text=["a"] * len(PICTURES), return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        actual = model(**inputs).image_embeds
    torch.testing.assert_close(actual, embed(loaded), atol=1e-5, rtol=0)
    again = load_model(folder)
    assert (again.config.image.resize, again.decoders["image"].pad_color) == ("pad", COLORS["mean"])


def test_onnx_pads_as_the_run(small: Small, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    loaded = build_model("clipart", small.tokenizer, *TINY_TOWERS, *ONE_BLOCK, "image.resize=pad", "image.pad_color=tomato")
    folder = export.export(loaded, tmp_path / "out", "onnx")
    assert json.loads((folder / "preprocess.json").read_text())["fill_color"] == [255, 99, 71]
    actual = torch.as_tensor(clipfuse.load(folder).encode_images(PICTURES))
    torch.testing.assert_close(actual, embed(loaded), atol=1e-5, rtol=0)
    card = (folder / "README.md").read_text()
    assert "the longer side to that size, then borders of #ff6347" in card
    assert 'Image.new("RGB", (S, S), (255, 99, 71))' in card


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_code_of_the_card_pads_as_the_run(interpolation: Any) -> None:
    from pretrain.data.images import ImageDecoder

    recipe = Preprocess(37, "pad", interpolation, pad_color=(1, 2, 3))
    code = RESIZE_CODE["pad"].format(how=interpolation.upper(), color=recipe.pad_color)
    decoder = ImageDecoder(37, resize="pad", interpolation=interpolation, pad_color=(1, 2, 3))
    for picture in [*PICTURES, draw(1, 300)]:
        names: dict[str, Any] = {"picture": picture, "S": 37, "Image": Image}
        exec(code, names)
        assert np.array_equal(np.asarray(names["picture"]), decoder.decode_eval(encode(picture)).permute(1, 2, 0))


def test_recipes_of_open_clip() -> None:
    assert parse_resize({}) == parse_resize({"resize_mode": "shortest"}) == {"resize": "crop"}
    assert parse_resize({"resize_mode": "squash", "fill_color": 3}) == {"resize": "squash"}
    assert parse_resize({"resize_mode": "longest"}) == {"resize": "pad", "pad_color": "#000000"}
    assert parse_resize({"resize_mode": "longest", "fill_color": [1, 2, 255]}) == {"resize": "pad", "pad_color": "#0102ff"}
    for fill in ("white", 256, -1, [1, 2], [1, 2, 999], None, 0.5):
        with pytest.raises(ConfigError, match=rf"^preprocess_cfg.fill_color={re.escape(repr(fill))} must be a number from 0"):
            parse_resize({"resize_mode": "longest", "fill_color": fill})


def test_settings_that_do_not_fit_are_refused() -> None:
    for config, message in (
        (Config(pad_color="black"), "image.pad_color=black is for image.resize=pad, not crop"),
        (Config(resize="pad", pad_color="whitish"), "image.pad_color='whitish' must be a color's name"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            config.check()
    Config(resize="pad", pad_color="#0a0b0c").check()
