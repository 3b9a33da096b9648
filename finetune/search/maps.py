"""Heat maps of where the re-ranker looked for each word of a query, in each of its results.

    save_maps(searcher, searcher.search(Query("a red car")), "a red car", Path("maps"))      maps/001-KEY.png, ...

A figure shows one image, and a heat map for each word. Images are read from where they lie.
"""

from __future__ import annotations

import re
from pathlib import Path

from finetune.explain import heatmap
from finetune.explain.word_maps import compute_word_maps
from finetune.search.image_sources import read_image
from finetune.search.query import Results, Searcher
from finetune.search.reranking import locate
from pretrain.errors import UserError
from pretrain.runtime.files import replace_atomically


def save_maps(searcher: Searcher, results: Results, text: str, folder: Path) -> list[str]:
    """Write a figure of each result, and return a note for each image that has none.

    Raises UserError where the folder cannot be written, or there is no re-ranker.
    """
    if searcher.reranker is None:
        raise UserError("maps need a re-ranker")
    notes = []
    for position, result in enumerate(results.results, start=1):
        image = result.hit.image
        try:
            maps = compute_word_maps(searcher.reranker, read_image(locate(image)), text)
        except UserError as error:
            notes.append(f"{image.key} has no map: {error}")
            continue
        path = folder / f"{position:03d}-{re.sub(r'[^A-Za-z0-9._-]', '_', image.key)[-100:]}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replace_atomically(path) as partial:
                partial.write_bytes(heatmap.encode_png(maps.figure()))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return notes
