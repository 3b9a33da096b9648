"""Heat maps drawn on images, with Pillow alone: one tile per word, and a figure of all words.

A map is enlarged smoothly, or as cells where it has few. It is blended over the image in gray: transparent at 0, bright where
it is high, with a ring on the peak. The words of one text share a scale, the square root of the peak. A word with little
attention is therefore drawn faintly, and below RING_THRESHOLD without a ring. Shapes: H, W = cells of a map.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Array = NDArray[np.float64]
Box = tuple[float, float, float, float]

TILE = 176  # px, side of a tile
MAX_COLUMNS = 6  # tiles in a row
_GAP, _LABEL = 12, 24
COARSE_CELLS = 7  # cells per side up to which a map is drawn as its cells: smooth spots would promise more than it knows
RING_THRESHOLD = 0.2  # as a share of the highest peak of the text: a word below it gets no ring
LEGEND = (
    "Color is attention: from dark red, little, to pale yellow, the most of any word; gray: almost none. "
    "The circle marks where a word attends most."
)
SIMILARITY_LEGEND = (
    "Color is similarity of word and region: from dark red, little, to pale yellow, the most of any word; gray: none. "
    "The circle marks the region most similar to a word."
)
_BLACK, _GRAY, _WHITE = (28, 30, 34), (110, 114, 120), (255, 255, 255)

# Dark red to yellow, in perceptually even steps.
_HEAT = np.array([(90, 18, 60), (160, 30, 72), (216, 48, 56), (244, 98, 32), (252, 158, 24), (255, 214, 64), (255, 250, 170)])


def compute_strengths(maps: Array) -> Array:
    """Return the peak of each map (words, H, W) as a share of the highest: (words,), or all 0."""
    peaks = maps.reshape(len(maps), -1).max(axis=1)
    return peaks / peaks.max() if peaks.size and peaks.max() > 0 else np.zeros(len(maps))


def draw_tile(
    image: Image.Image, values: Array, strength: float = 1.0, side: int = TILE, boxes: Sequence[Box] = ()
) -> Image.Image:
    """Draw one map on its image, `side` px square, in the proportions that the model's input has.

    Args:
        image: the part of the image that the model's input shows.
        values: the map (H, W), nowhere negative.
        strength: 0 to 1, the map's peak on the scale that it shares with other maps.
        side: px.
        boxes: boxes to outline, (x0, y0, x1, y1) as shares of the image's sides.
    """
    return _draw_map(image.resize((side, side), Image.Resampling.LANCZOS), (0, 0, side, side), values, strength, boxes)


def draw_on_picture(image: Image.Image, visible: Box, values: Array, strength: float = 1.0, side: int = TILE) -> Image.Image:
    """Draw one map on a whole image, in its proportions, where the model's input lies in it; the rest is pale.

    Args:
        image: the whole image.
        visible: the part that the model's input shows, (x0, y0, x1, y1) as shares of the image's sides. What exceeds 0 to 1 are
            borders that the model's input has; they are added in white.
        values: the map (H, W), nowhere negative.
        strength: as for draw_tile().
        side: px, the longer side of the result.
    """
    x0, y0, x1, y1 = (edge * length for edge, length in zip(visible, image.size * 2, strict=True))
    left, top, right, bottom = min(0, x0), min(0, y0), max(image.width, x1), max(image.height, y1)
    scale = side / max(right - left, bottom - top)
    size, whole = (
        (max(1, round(scale * width)), max(1, round(scale * height)))
        for width, height in (image.size, (right - left, bottom - top))
    )
    canvas = Image.new("RGB", whole, _WHITE)
    canvas.paste(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), (round(-scale * left), round(-scale * top)))
    window = (scale * (x0 - left), scale * (y0 - top), scale * (x1 - left), scale * (y1 - top))
    return _draw_map(canvas, window, values, strength)


def _draw_map(image: Image.Image, window: Box, values: Array, strength: float, boxes: Sequence[Box] = ()) -> Image.Image:
    """Draw one map on an image of the same size as the result; `window` is the map's place in it, in px."""
    width, height = image.size
    x0, y0, x1, y1 = window
    columns, rows = _to_pixels(x0, x1, width), _to_pixels(y0, y1, height)
    gray = np.asarray(image.convert("L"), dtype=np.float64)
    background = np.repeat((200 + 0.2 * gray)[:, :, None], 3, axis=2)  # what the model does not see
    background[rows, columns] = (70 + 0.7 * gray)[rows, columns, None]
    peak, scale = values.max(), np.sqrt(strength)
    large = np.zeros((height, width))
    if peak > 0:
        large[rows, columns] = scale * _enlarge(values / peak, columns.stop - columns.start, rows.stop - rows.start)
    position = large * (len(_HEAT) - 1)
    low = np.clip(position.astype(int), 0, len(_HEAT) - 2)
    fraction = (position - low)[:, :, None]
    heat = _HEAT[low] * (1 - fraction) + _HEAT[low + 1] * fraction
    alpha = (0.88 * np.clip(1.6 * large - 0.12, 0, 1))[:, :, None]
    out = Image.fromarray(np.clip(background * (1 - alpha) + heat * alpha, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(out)
    for left, top, right, bottom in boxes:
        outline = (round(left * width), round(top * height), round(right * width) - 1, round(bottom * height) - 1)
        draw.rectangle(outline, outline=_WHITE, width=2)
    if peak > 0 and strength >= RING_THRESHOLD:
        H, W = values.shape
        row, column = divmod(int(values.argmax()), W)
        x, y, r = x0 + (column + 0.5) * (x1 - x0) / W, y0 + (row + 0.5) * (y1 - y0) / H, max(4, max(image.size) // 40)
        draw.ellipse((x - r - 1, y - r - 1, x + r + 1, y + r + 1), outline=_BLACK, width=1)
        draw.ellipse((x - r, y - r, x + r, y + r), outline=_WHITE, width=2)
    return out


def draw_figure(
    image: Image.Image, words: Sequence[str], maps: Array, lines: Sequence[str], boxes: Sequence[Sequence[Box]] | None = None
) -> Image.Image:
    """Draw the image followed by one tile per word, under lines of text.

    Args:
        image: the part of the image that the model's input shows.
        words: labels of the tiles.
        maps: (words, H, W).
        lines: text above the tiles, wrapped to the width of the figure: the caption or question, the answer.
        boxes: for each word the boxes to outline on its tile.
    """
    strengths = compute_strengths(maps)
    words = [unicodedata.normalize("NFC", word) for word in words]  # fonts have é, and seldom e with a combining accent
    labels = [word if can_draw(word) else f"word {i}" for i, word in enumerate(words, 1)]
    if undrawn := [label for label, word in zip(labels, words, strict=True) if label != word]:
        lines = [*lines, f"no font on this machine has the characters of {', '.join(undrawn)}, so they are numbered"]
    tiles = [(image.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS), "")]
    for i, label in enumerate(labels):
        tiles.append((draw_tile(image, maps[i], float(strengths[i]), boxes=boxes[i] if boxes else ()), label))
    # Rows as equal as possible: 8 tiles are two rows of four, not of six and two.
    rows = -(-len(tiles) // MAX_COLUMNS)
    columns = -(-len(tiles) // rows)
    width = max(columns, 3) * (TILE + _GAP) + _GAP
    titles = [(row, i) for i, line in enumerate(lines) for row in wrap_text(line, width - 2 * _GAP, 18 if i == 0 else 15)]
    top = _GAP + sum(26 if i == 0 else 22 for _, i in titles) + (8 if titles else 0)
    height = top + rows * (TILE + _LABEL + _GAP)
    page = Image.new("RGB", (width, height), _WHITE)
    draw = ImageDraw.Draw(page)
    y = _GAP
    for row, i in titles:
        draw.text((_GAP, y), row, fill=_BLACK if i == 0 else _GRAY, font=load_font(18 if i == 0 else 15, row))
        y += 26 if i == 0 else 22
    for n, (tile, word) in enumerate(tiles):
        x, y = _GAP + n % columns * (TILE + _GAP), top + n // columns * (TILE + _LABEL + _GAP)
        page.paste(tile, (x, y))
        draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), outline=(200, 203, 208))
        label = truncate_text(word, TILE, 15)
        color = _BLACK if n == 0 or strengths[n - 1] >= RING_THRESHOLD else _GRAY
        draw.text((x + TILE / 2, y + TILE + 4), label, fill=color, font=load_font(15, label), anchor="ma")
    return page


def encode_png(image: Image.Image) -> bytes:
    """Encode as PNG; equal images give equal bytes."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def stack_figures(pages: Sequence[Image.Image]) -> Image.Image:
    """Paste figures below each other on one sheet."""
    sheet = Image.new("RGB", (max(page.width for page in pages), sum(page.height for page in pages)), _WHITE)
    y = 0
    for page in pages:
        sheet.paste(page, (0, y))
        y += page.height
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# Text


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_SCRIPTS = ("", "Arabic", "Hebrew", "Devanagari", "Bengali", "Tamil", "Telugu", "Thai")
FONTS = (
    *("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf"),
    *(f"NotoSans{script}-Regular.ttf" for script in _SCRIPTS),
)
"""Fonts to look for, in this order, for characters that Pillow's own font lacks: it has ASCII and few others."""


def load_font(size: int, text: str = "") -> Font:
    """Load Pillow's own font, or where it lacks a character the first installed font that has all of them.

    Where none has all characters, the first installed one is loaded; `can_draw` tells.
    """
    default = _load_default(size)
    if _has_glyphs(default, text):
        return default
    installed = [font for name in FONTS if (font := _load_if_installed(name, size)) is not None]
    return next((font for font in installed if _has_glyphs(font, text)), installed[0] if installed else default)


def can_draw(text: str) -> bool:
    """Whether a font that is installed here has every character of a text."""
    return _has_glyphs(load_font(15, text), text)


def _has_glyphs(font: Font, text: str) -> bool:
    """Whether each visible character has a glyph that is not the box for missing ones."""
    missing = _draw_glyph(font, "\U0010ffff")
    visible = {c for c in text if not c.isspace() and unicodedata.category(c) != "Cf"}
    return all(_draw_glyph(font, c) != missing for c in visible)


def _draw_glyph(font: Font, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character, mode="L")
    return mask.size, bytes(mask)


@cache
def _load_if_installed(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@cache
def _load_default(size: int) -> Font:
    return ImageFont.load_default(size)


def wrap_text(text: str, width: int, size: int) -> list[str]:
    """Break a text between words into at most four lines of `width` px; the rest becomes an ellipsis."""
    words, lines = text.split(), [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and load_font(size, longer).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > 4:
        lines = [*lines[:3], f"{lines[3]} …"]
    return [truncate_text(line, width, size) for line in lines if line]


def truncate_text(text: str, width: int, size: int) -> str:
    """Return the text, truncated with an ellipsis where it is wider than `width` px."""
    if load_font(size, text).getlength(text) <= width:
        return text
    while text and load_font(size, text).getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _to_pixels(start: float, stop: float, length: int) -> slice:
    """Round an interval to whole pixels of an axis, at least one."""
    first = min(round(start), length - 1)
    return slice(first, max(first + 1, min(round(stop), length)))


def _enlarge(values: Array, width: int, height: int) -> Array:
    """Resize (H, W) to (height, width), with values from 0 to 1 and a peak of 1: smoothly, or as cells where they are few."""
    small = Image.fromarray(values.astype(np.float32))
    is_coarse = max(values.shape) <= COARSE_CELLS
    filter_ = Image.Resampling.NEAREST if is_coarse else Image.Resampling.BICUBIC
    large: Array = np.asarray(small.resize((width, height), filter_), dtype=np.float64)
    out: Array = np.clip(large / large.max(), 0, 1)
    return out
