"""Heat maps drawn on pictures, with Pillow alone: one tile a word, and a figure of all words of a text.

A map is enlarged smoothly and laid over the greyed picture: nothing where it is 0, bright where it is high, a ring on
the peak. Words of one text share a scale, softened by a square root: a word that looked hard glows, one that glanced is
a shade, without a ring. Shapes: H, W = cells of a map.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Array = NDArray[np.float64]
Box = tuple[float, float, float, float]

TILE = 176  # px, side of a tile
ACROSS = 6  # tiles in a row at most
_GAP, _LABEL = 12, 24
GLANCE = 0.2  # of the strongest peak: below it a word gets no ring
_INK, _SOFT, _PAPER = (28, 30, 34), (110, 114, 120), (255, 255, 255)

# Dark red to yellow, in steps that look equally large; at 0 it is transparent.
_HEAT = np.array([(90, 18, 60), (160, 30, 72), (216, 48, 56), (244, 98, 32), (252, 158, 24), (255, 214, 64), (255, 250, 170)])


def strengths(maps: Array) -> Array:
    """(words, H, W) -> (words,): how high each peaks, in parts of the highest; all 0 where nobody looked at anything."""
    peaks = maps.reshape(len(maps), -1).max(axis=1)
    return peaks / peaks.max() if peaks.size and peaks.max() > 0 else np.zeros(len(maps))


def tile(
    picture: Image.Image, values: Array, strength: float = 1.0, side: int = TILE, boxes: Sequence[Box] = ()
) -> Image.Image:
    """One map on its picture, `side` px square (what the model saw; squashed pictures stay squashed).

    Args:
        picture: the part of the picture that the model saw.
        values: (H, W), nowhere negative.
        strength: 0 to 1, how high its peak is on the scale that it shares with others.
        boxes: outlined: where it should look, in parts of the picture's sides.
    """
    grey = np.asarray(picture.convert("L").resize((side, side), Image.Resampling.LANCZOS), dtype=np.float64)
    ground = np.repeat((70 + 0.7 * grey)[:, :, None], 3, axis=2)
    peak, scale = values.max(), np.sqrt(strength)
    large = scale * _enlarged(values / peak, side) if peak > 0 else np.zeros((side, side))
    where = large * (len(_HEAT) - 1)
    low = np.clip(where.astype(int), 0, len(_HEAT) - 2)
    part = (where - low)[:, :, None]
    heat = _HEAT[low] * (1 - part) + _HEAT[low + 1] * part
    alpha = (0.88 * np.clip(1.6 * large - 0.12, 0, 1))[:, :, None]
    out = Image.fromarray(np.clip(ground * (1 - alpha) + heat * alpha, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(out)
    for x0, y0, x1, y1 in boxes:
        outline = (round(x0 * side), round(y0 * side), round(x1 * side) - 1, round(y1 * side) - 1)
        draw.rectangle(outline, outline=_PAPER, width=2)
    if peak > 0 and strength >= GLANCE:
        H, W = values.shape
        row, column = divmod(int(values.argmax()), W)
        x, y, r = (column + 0.5) * side / W, (row + 0.5) * side / H, max(4, side // 40)
        draw.ellipse((x - r - 1, y - r - 1, x + r + 1, y + r + 1), outline=_INK, width=1)
        draw.ellipse((x - r, y - r, x + r, y + r), outline=_PAPER, width=2)
    return out


def figure(
    picture: Image.Image, words: Sequence[str], maps: Array, lines: Sequence[str], boxes: Sequence[Sequence[Box]] | None = None
) -> Image.Image:
    """The picture and, beside and below it, one tile a word; `lines` above: what was said or asked, what was answered.

    Args:
        maps: (words, H, W).
        boxes: for each word those to outline on its tile.
    """
    strong = strengths(maps)
    tiles = [(picture.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS), "")]
    for i, word in enumerate(words):
        tiles.append((tile(picture, maps[i], float(strong[i]), boxes=boxes[i] if boxes else ()), word))
    # Rows as even as they come: 8 tiles are two rows of four, not of six and two.
    rows = -(-len(tiles) // ACROSS)
    across = -(-len(tiles) // rows)
    width = max(across, 3) * (TILE + _GAP) + _GAP
    titles = [(part, i) for i, line in enumerate(lines) for part in wrapped(line, width - 2 * _GAP, 18 if i == 0 else 15)]
    top = _GAP + sum(26 if i == 0 else 22 for _, i in titles) + (8 if titles else 0)
    height = top + rows * (TILE + _LABEL + _GAP)
    page = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(page)
    y = _GAP
    for part, i in titles:
        draw.text((_GAP, y), part, fill=_INK if i == 0 else _SOFT, font=font(18 if i == 0 else 15, part))
        y += 26 if i == 0 else 22
    for n, (each, word) in enumerate(tiles):
        x, y = _GAP + n % across * (TILE + _GAP), top + n // across * (TILE + _LABEL + _GAP)
        page.paste(each, (x, y))
        draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), outline=(200, 203, 208))
        label = shortened(word, TILE, 15)
        colour = _INK if n == 0 or strong[n - 1] >= GLANCE else _SOFT
        draw.text((x + TILE / 2, y + TILE + 4), label, fill=colour, font=font(15, label), anchor="ma")
    return page


def png(image: Image.Image) -> bytes:
    """The same bytes for the same picture."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def uri(image: Image.Image) -> str:
    """A picture inside a page, as JPEG: a fifth of the bytes."""
    out = io.BytesIO()
    image.convert("RGB").save(out, "JPEG", quality=86)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def stacked(pages: Sequence[Image.Image]) -> Image.Image:
    """Figures below each other on one sheet."""
    sheet = Image.new("RGB", (max(page.width for page in pages), sum(page.height for page in pages)), _PAPER)
    y = 0
    for page in pages:
        sheet.paste(page, (0, y))
        y += page.height
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# Text


def font(size: int, text: str = "") -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own; for letters beyond Latin the first of some widespread fonts that this machine has."""
    if any(ord(c) > 0x24F and not 0x2010 <= ord(c) <= 0x2044 for c in text):
        for name in ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf"):
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)


def wrapped(text: str, width: int, size: int) -> list[str]:
    """Lines of at most `width` px, broken between words; at most four, the last then ends in an ellipsis."""
    words, out = text.split(), [""]
    for word in words:
        longer = f"{out[-1]} {word}".strip()
        if out[-1] and font(size, longer).getlength(longer) > width:
            out.append(word)
        else:
            out[-1] = longer
    if len(out) > 4:
        out = [*out[:3], f"{out[3]} …"]
    return [shortened(line, width, size) for line in out if line]


def shortened(text: str, width: int, size: int) -> str:
    """The text, cut with an ellipsis where it is wider than `width` px."""
    if font(size, text).getlength(text) <= width:
        return text
    while text and font(size, text).getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _enlarged(values: Array, side: int) -> Array:
    """(H, W) -> (side, side), 0 to 1, smooth, the peak kept at 1."""
    small = Image.fromarray(values.astype(np.float32))
    large: Array = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
    out: Array = np.clip(large / large.max(), 0, 1)
    return out
