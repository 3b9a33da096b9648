"""Heat maps of where a model looked for each word of a query, in each of its results.

    save_maps(searcher, searcher.search(Query("a red car")), "a red car", Path("maps"))      maps/001-KEY.png, ...

A figure shows one image or the spectrogram of one sound, and a heat map for each word. Files are read from where they lie.
The model is the re-ranker; without one, the encoders of the index draw similarity maps.
"""

from __future__ import annotations

import re
from pathlib import Path

from finetune.explain import heatmap
from finetune.explain.similarity import check_pooling
from finetune.explain.word_maps import METHOD, SIMILARITY, WordMaps, compute_encoder_maps, compute_word_maps
from finetune.search.item_sources import read_content
from finetune.search.query import Results, Searcher
from finetune.search.reranking import locate
from pretrain.errors import UserError
from pretrain.runtime.files import replace_atomically


def compute_maps(searcher: Searcher, data: bytes, text: str, method: str = METHOD) -> WordMaps:
    """Compute the maps of a text on an encoded image or sound, whichever the index holds.

    Raises UserError where it cannot be decoded, or without a re-ranker for another method than similarity.
    """
    if searcher.reranker is not None:
        return compute_word_maps(searcher.reranker, data, text, method)
    if method != SIMILARITY:
        raise UserError(f"{method} maps need a re-ranker, whose attention they show")
    loaded = searcher.loaded
    return compute_encoder_maps(loaded.model, loaded.decoders, data, text, searcher.index.describe().modality)


def save_maps(searcher: Searcher, results: Results, text: str, folder: Path, method: str = METHOD) -> list[str]:
    """Write a figure of each result, and return a note for each that has none.

    Raises UserError where the folder cannot be written, or no model has such maps.
    """
    if method == SIMILARITY:
        tuned = searcher.reranker
        encoder = tuned.model.encoder if tuned is not None else searcher.loaded.model
        check_pooling(encoder, searcher.index.describe().modality)
    notes = []
    for position, result in enumerate(results.results, start=1):
        item = result.hit.item
        try:
            maps = compute_maps(searcher, read_content(locate(item)), text, method)
        except UserError as error:
            notes.append(f"{item.key} has no map: {error}")
            continue
        path = folder / f"{position:03d}-{re.sub(r'[^A-Za-z0-9._-]', '_', item.key)[-100:]}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replace_atomically(path) as partial:
                partial.write_bytes(heatmap.encode_png(maps.figure()))
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return notes
