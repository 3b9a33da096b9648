"""Pictures of every mode are opened alike in training and by the code of the model cards: transparent pixels on white."""

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from launch.api import images as api
from pretrain.checkpoints import export
from pretrain.data.decode import decode_image
from pretrain.formats.model_card import OPENING_CODE
from tests.pretrain.formats.test_any_text import BERT_TEXT, build_bert_tokenizer
from tests.pretrain.formats.test_export import build_model, embed
from tests.support import ONE_BLOCK, TINY_TOWERS, Small

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (40, 56, 4), dtype=np.uint8)
"""Random colors and opacity: what a transparent pixel hides is not white."""

LEVELS = RNG.integers(0, 65536, (40, 56), dtype=np.uint16)


def rgba() -> Image.Image:
    return Image.fromarray(COLORS)


def palette_with_opacity() -> bytes:
    """A palette whose entries have opacities of their own (the chunk tRNS)."""
    image = Image.fromarray(COLORS[:, :, :3]).quantize(64)
    return encode(image, "PNG", transparency=bytes(range(0, 256, 4)))


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(rgba(), "PNG", exif=exif)


def gray_16() -> Image.Image:
    return Image.fromarray(LEVELS)


PICTURES: dict[str, Callable[[], bytes]] = {
    "RGBA": lambda: encode(rgba(), "PNG"),
    "RGBA, WebP": lambda: encode(rgba(), "WEBP", lossless=True),
    "LA": lambda: encode(rgba().convert("LA"), "PNG"),
    "palette, one transparent entry": lambda: encode(rgba().convert("RGB").quantize(16), "PNG", transparency=3),
    "palette with opacities": palette_with_opacity,
    "RGB, one transparent color": lambda: encode(
        rgba().convert("RGB"), "PNG", transparency=tuple(int(v) for v in COLORS[0, 0, :3])
    ),
    "gray, one transparent level": lambda: encode(rgba().convert("L"), "PNG", transparency=90),
    "turned": turned,
    "16 bits": lambda: encode(gray_16(), "PNG"),
    "CMYK": lambda: encode(rgba().convert("RGB").convert("CMYK"), "JPEG"),
    "one bit": lambda: encode(rgba().convert("1"), "PNG"),
    "RGB": lambda: encode(rgba().convert("RGB"), "JPEG"),
}


def open_as_the_card_does(data: bytes, path: Path) -> Image.Image:
    path.write_bytes(data)
    names: dict[str, Any] = {}
    exec("import numpy as np\nfrom PIL import Image, ImageOps\n" + OPENING_CODE, names)
    image: Image.Image = names["open_picture"](path)
    return image


@pytest.mark.parametrize("picture", PICTURES)
def test_the_cards_open_pictures_as_training_does(picture: str, tmp_path: Path) -> None:
    data = PICTURES[picture]()
    expected = decode_image(data)
    image = open_as_the_card_does(data, tmp_path / "picture")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)
    loaded = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(decode_image(api.to_bytes(loaded, "image")), expected)  # clipfuse.load(...).encode_images
    np.testing.assert_array_equal(decode_image((tmp_path / "picture").read_bytes()), expected)


def test_transparent_pixels_become_white() -> None:
    image = rgba()
    image.putalpha(0)
    for data in (encode(image, "PNG"), encode(image.convert("LA"), "PNG")):
        assert decode_image(data).min() == 255


@pytest.mark.parametrize("mode", ["PA", "La", "RGBa", "I", "I;16B", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_images_in_memory_are_treated_as_files_of_the_same_pixels(mode: str) -> None:
    if mode.startswith("I"):
        gray = np.asarray(gray_16())
        image = Image.fromarray(gray.astype(np.int32)) if mode == "I" else Image.fromarray(gray.astype(">u2"))
        reference = encode(gray_16(), "PNG")
    else:
        image = rgba().convert("LA").convert(mode) if mode in ("PA", "La") else convert_from_rgb(mode)
        straight = {"PA": "RGBA", "La": "LA", "RGBa": "RGBA"}.get(mode, "RGB")
        reference = encode(image.convert(straight), "PNG")
    assert image.mode == mode
    np.testing.assert_array_equal(decode_image(api.to_bytes(image, "image")), decode_image(reference))


def convert_from_rgb(mode: str) -> Image.Image:
    return rgba().convert(mode) if mode == "RGBa" else rgba().convert("RGB").convert(mode)


@pytest.mark.parametrize("form", ["hf", "open_clip", "open_clip with BERT", "onnx"])
def test_the_code_of_each_card_gives_the_figures_of_the_run(
    form: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a transparent picture; the code runs as it is printed, beside the exported folder."""
    tokenizer: Any = small.tokenizer
    settings = [*TINY_TOWERS, *ONE_BLOCK]
    if form.endswith("BERT"):
        tokenizer = build_bert_tokenizer(tmp_path / "tokenizer")
        settings += [BERT_TEXT.format("bert"), "text.pool=avg", "text.length=24"]
    loaded = build_model("clipart", tokenizer, *settings)
    export.export(loaded, tmp_path / "model", form.split()[0])
    (tmp_path / "picture.jpg").write_bytes(PICTURES["RGBA"]())
    code = re.search(r"```python\n(.*?)\n```", (tmp_path / "model/README.md").read_text(), re.S)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code[1], {})
    image, text = embed(loaded, ([PICTURES["RGBA"]()], ["a cat", "a dog"]))
    expected = image @ text.T
    if form == "hf":
        expected = (loaded.model.logit_scale.detach().exp() * expected).softmax(dim=1)
    printed = [float(number) for number in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", out.getvalue())]
    torch.testing.assert_close(torch.tensor(printed), expected[0].detach(), atol=2e-4, rtol=0)
