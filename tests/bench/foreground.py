"""Measures whether the maps of words lie on the things in pictures on white, rather than on the white.

    python -m tests.bench.foreground RUN --data 'SHARDS' [--images 200] [--method raw]

RUN is a fine-tuned retrieval run. The background of a picture is what a flood fill reaches from its border; pictures whose
foreground takes 10 to 60 % of what the model sees are kept, the first --images of them. Words are those of the title (the
`title` of the json, else the caption) of three letters or more; `text` is the mean map of all words of the caption. One JSON
line:

    lift    share of a map's sum on the foreground, over the foreground's share of the picture: 1 = a uniform map
    hit     share of maps whose peak is a cell that is foreground for the most part (pointing game)

each with its interval (95 %, bootstrapped over pictures), the baselines, and the differences to them with their intervals:

    area         a uniform map, or a random peak
    center       a bell curve in the middle of every picture
    untrained    the same encoders and a new fusion
    other_text   the text of another picture, shown with this one

and, where both towers pool the mean of their tokens, `similarity` and `similarity_other_text`: without any fusion, the products
of the projected tokens of word and cell, where positive. The mean of all products is the embeddings' similarity, before they
are normalized (with image.stride, the mean over the coarser cells).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from finetune import loading
from finetune.explain.attribution import METHODS
from finetune.explain.similarity import compute_similarity_maps
from finetune.explain.token_spans import TokenSpans, average_tokens
from finetune.explain.word_maps import METHOD, compute_token_maps, find_decoders
from finetune.grounding.pointing_game import Array, bootstrap, build_center_map, compute_lift, score_hit
from finetune.grounding.probes import build_untrained
from finetune.loading import Finetuned
from finetune.model import FusionModel
from pretrain.data.decode import EXTENSIONS, decode_image
from pretrain.data.images import visible_box
from pretrain.data.shards.paths import expand_shards
from pretrain.data.shards.reader import ShardReader
from pretrain.model import DualEncoder

TOLERANCE = 20
"""Largest difference of a channel from white in the background; JPEG leaves traces beside edges."""
SHARES = (0.1, 0.6)
"""Least and largest share of the foreground in what the model sees."""
LETTERS = 3
"""Least letters of a word."""
BATCH = 16


@dataclass(frozen=True)
class Picture:
    """A picture on white."""

    data: bytes
    caption: str
    title: str
    foreground: NDArray[np.bool_]
    """(h, w), in pixels of the stored picture."""


def mark_foreground(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return (h, w), False where a flood fill of white from the border of a picture (h, w, 3) reaches."""
    height, width = pixels.shape[:2]
    framed = cv2.copyMakeBorder(pixels, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    mask = np.zeros((height + 4, width + 4), np.uint8)  # floodFill wants a frame of its own
    flags = 4 | cv2.FLOODFILL_FIXED_RANGE | cv2.FLOODFILL_MASK_ONLY | (1 << 8)
    cv2.floodFill(framed, mask, (0, 0), 0, (TOLERANCE,) * 3, (TOLERANCE,) * 3, flags)
    return mask[2:-2, 2:-2] == 0


def cover_cells(foreground: NDArray[np.bool_], visible: tuple[float, float, float, float], grid: tuple[int, int]) -> Array:
    """Return (H, W): the share of foreground in each cell of a map of the visible part (x0, y0, x1, y1), in pixels.

    What lies outside the picture is background.
    """
    height, width = foreground.shape
    x0, y0, x1, y1 = visible
    H, W = grid
    samples = 16  # of a cell, in each direction
    x = np.floor(x0 + (np.arange(W * samples) + 0.5) * (x1 - x0) / (W * samples)).astype(int)
    y = np.floor(y0 + (np.arange(H * samples) + 0.5) * (y1 - y0) / (H * samples)).astype(int)
    inside = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))
    values = foreground[np.clip(y, 0, height - 1)][:, np.clip(x, 0, width - 1)] & inside
    cells: Array = values.reshape(H, samples, W, samples).mean(axis=(1, 3))
    return cells


def read_pictures(shards: str, count: int, size: int, resize: str) -> list[Picture]:
    """Return the first pictures of shards whose foreground has a share within SHARES, and whose title has a word."""
    reader = ShardReader(expand_shards(shards))
    pictures: list[Picture] = []
    for shard in range(len(reader.paths)):
        for sample in range(reader.count(shard)):
            members = reader.read(shard, sample).members
            data = next(members[extension] for extension in EXTENSIONS if extension in members)
            caption = members["txt"].decode()
            title = json.loads(members.get("json", b"{}")).get("title") or caption
            foreground = mark_foreground(decode_image(data))
            share = cover_cells(foreground, visible_box(*foreground.shape, size, resize), (1, 1))[0, 0]
            has_word = any(len(word) >= LETTERS for word in title.split()) and caption.startswith(title)
            if has_word and SHARES[0] <= share <= SHARES[1]:
                pictures.append(Picture(data, caption, title, foreground))
            if len(pictures) == count:
                return pictures
    return pictures


def compute_maps(
    tuned: Finetuned, model: FusionModel | DualEncoder, pictures: list[Picture], texts: list[Picture], method: str
) -> list[Any]:
    """Return, for each picture with the text of another or its own, (maps of the title's words, mean map of all words)."""
    decoder = find_decoders(tuned.decoders)[1]
    results: list[tuple[list[Array], Array]] = []
    for begin in range(0, len(pictures), BATCH):
        chunk, others = pictures[begin : begin + BATCH], texts[begin : begin + BATCH]
        inputs, masks = tuned.encode_inputs([picture.data for picture in chunk], [text.caption for text in others])
        batch = (inputs["image"], inputs["text"], masks["text"])
        if isinstance(model, DualEncoder):
            maps = compute_similarity_maps(model, *batch)[0].clamp(min=0)
        else:
            maps, _ = compute_token_maps(model, tuned.task, *batch, method)
        for text, values in zip(others, maps, strict=True):
            words = [word for word in TokenSpans(decoder, text.caption).find_words() if len(word.text) >= LETTERS]
            title = [average_tokens(values, word.tokens) for word in words if word.end <= len(text.title)]
            everything = average_tokens(values, tuple(token for word in words for token in word.tokens))
            results.append(([word.double().numpy() for word in title], everything.double().numpy()))
    return results


def score(pictures: list[Picture], maps: list[Any], size: int, resize: str) -> dict[str, tuple[Array, NDArray[np.int64]]]:
    """Return {measure: (values, number of the picture of each)} of maps, and of area and center."""
    rows: dict[str, list[tuple[float, int]]] = {}
    for i, (picture, (title, everything)) in enumerate(zip(pictures, maps, strict=True)):
        grid = everything.shape
        inside = cover_cells(picture.foreground, visible_box(*picture.foreground.shape, size, resize), grid)
        near = inside >= 0.5
        for kind, values in [("words", values) for values in title] + [("text", everything)]:
            rows.setdefault(f"{kind}_lift", []).append((compute_lift(values, inside), i))
            rows.setdefault(f"{kind}_hit", []).append((score_hit(values, near), i))
        rows.setdefault("area_lift", []).append((1.0, i))
        rows.setdefault("area_hit", []).append((float(near.mean()), i))
        rows.setdefault("center_lift", []).append((compute_lift(build_center_map(grid), inside), i))
        rows.setdefault("center_hit", []).append((score_hit(build_center_map(grid), near), i))
    return {name: (np.array([v for v, _ in row]), np.array([i for _, i in row])) for name, row in rows.items()}


def average_by_picture(values: Array, image_index: NDArray[np.int64], count: int) -> Array:
    """Return (count,): the mean value of each picture; NaN where it has none."""
    sums, sizes = np.bincount(image_index, values, count), np.bincount(image_index, minlength=count)
    return np.where(sizes > 0, sums / np.maximum(sizes, 1), np.nan)


def compare(pictures: list[Picture], scores: dict[str, dict[str, tuple[Array, NDArray[np.int64]]]]) -> dict[str, Any]:
    """Return the means with intervals of each model, and the differences of the trained one to the baselines.

    All are means over pictures of the means over their words.
    """
    count = len(pictures)
    line: dict[str, Any] = {}
    for kind in ("words", "text"):
        for measure in ("lift", "hit"):
            columns = {model: average_by_picture(*table[f"{kind}_{measure}"], count) for model, table in scores.items()}
            for name in ("area", "center"):
                columns[name] = average_by_picture(*scores["trained"][f"{name}_{measure}"], count)
            complete = np.all([~np.isnan(column) for column in columns.values()], axis=0)
            index = np.flatnonzero(complete)
            columns = {name: column[complete] for name, column in columns.items()}
            figures = {name: round_interval(bootstrap(column, index)) for name, column in columns.items()}
            for name, column in columns.items():
                if name != "trained":
                    figures[f"minus_{name}"] = round_interval(bootstrap(columns["trained"] - column, index))
            if "similarity" in columns:
                for name in ("other_text", "area"):
                    other = columns["area" if name == "area" else "similarity_other_text"]
                    figures[f"similarity_minus_{name}"] = round_interval(bootstrap(columns["similarity"] - other, index))
            line[f"{kind}_{measure}"] = {"pictures": len(index), **figures}
    return line


def round_interval(interval: Any) -> list[float]:
    """Return [mean, low, high]."""
    return [round(float(value), 3) for value in interval]


def main() -> None:
    """Measure one run and print its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a fine-tuned retrieval run")
    parser.add_argument("--data", required=True, help="shards of pictures on white, with txt captions")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--method", default=METHOD, choices=METHODS)
    parser.add_argument("--seed", type=int, default=0, help="of the untrained fusion")
    args = parser.parse_args()
    tuned = loading.load(args.run)
    decoder = find_decoders(tuned.decoders)[0]
    pictures = read_pictures(args.data, args.images, decoder.size, decoder.resize)
    if len(pictures) < 2:
        sys.exit(f"{args.data}: {len(pictures)} pictures have a foreground of {SHARES[0]:.0%} to {SHARES[1]:.0%}")
    others = [*pictures[1:], pictures[0]]
    torch.manual_seed(args.seed)
    encoder = tuned.model.encoder
    models: dict[str, tuple[Any, list[Picture]]] = {
        "trained": (tuned.model, pictures),
        "other_text": (tuned.model, others),
        "untrained": (build_untrained(tuned, args.seed).eval(), pictures),
    }
    if all(encoder.tower(name).pools_mean for name in ("image", "text")):
        models |= {"similarity": (encoder, pictures), "similarity_other_text": (encoder, others)}
    maps = {name: compute_maps(tuned, model, pictures, texts, args.method) for name, (model, texts) in models.items()}
    scores = {name: score(pictures, values, decoder.size, decoder.resize) for name, values in maps.items()}
    grid = "x".join(map(str, maps["trained"][0][1].shape))
    line = {"bench": "foreground", "run": str(args.run), "method": args.method, "images": len(pictures), "grid": grid}
    print(json.dumps(line | compare(pictures, scores)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
