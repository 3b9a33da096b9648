"""What `clipfuse embed` is to write, from its options, the model and the data: the columns of the files, and the manifest."""

from __future__ import annotations

from typing import Any

from pretrain.checkpoints.loading import LoadedModel
from pretrain.data.captions import TXT, check_caption_source, has_several_captions
from pretrain.data.shards.cache import is_remote
from pretrain.data.shards.names import find_new_names
from pretrain.embedding import dataset
from pretrain.embedding.options import Options
from pretrain.embedding.parquet import Layout
from pretrain.errors import ConfigError, closest
from pretrain.runtime import distributed, preflight

PER_FILE = 16384
"""Most samples of a file by default: a few minutes of work for a CPU, seconds for a GPU."""
FILES_PER_PROCESS = 4
"""Files there should be for each process, at least, so that processes end at about the same time."""


def build_layout(loaded: LoadedModel, options: Options) -> tuple[Layout, tuple[str, ...]]:
    """Return the columns and modalities that the options name.

    Raises ConfigError if the model cannot fill them.
    """
    model, text = loaded.model, loaded.decoders.get("text")
    available = [name for name in model.towers if name in loaded.decoders]
    if options.only and options.only not in available:
        raise ConfigError(f"--only {options.only}: the model has {', '.join(available)}{closest(options.only, available)}")
    modalities = tuple([options.only] if options.only else available)
    if options.caption and text is not None:
        check_caption_source(options.caption, "--caption")
        text.caption = options.caption
    caption = text.caption if "text" in modalities and text is not None else TXT
    has_caption_lists = has_several_captions(caption)
    if options.tokens and has_caption_lists:
        raise ConfigError(
            f"--tokens {options.tokens}: {caption} may hold several captions per sample, whose tokens have no column; "
            f"add --only {next((name for name in available if name != 'text'), 'image')}, or take captions from txt"
        )
    dim = model.projection(modalities[0]).out_features
    tokens: dict[str, int] = {}
    for name in modalities if options.tokens else ():
        tower = model.tower(name)
        if options.tokens == "shared" and (model.has_mlp or not tower.pools_mean):
            reason = f"the {name} tower does not pool by the mean of its tokens"
            reason = "the projection has two layers (model.projection=mlp)" if model.has_mlp else reason
            raise ConfigError(
                f"--tokens shared: {reason}, so single tokens cannot be projected into the shared space; take --tokens own"
            )
        tokens[name] = dim if options.tokens == "shared" else tower.width
    return Layout(modalities, dim, options.dtype, has_caption_lists, tokens), modalities


def build_manifest(
    loaded: LoadedModel, options: Options, layout: Layout, paths: list[str], counts: list[int]
) -> dict[str, Any]:
    """Build the manifest: model, data, settings. Collective.

    Raises UserError where the processes have different models.
    """
    model = dataset.fingerprint_model(loaded)
    preflight.require_equal("the model", model)
    limit = -(-sum(counts) // (FILES_PER_PROCESS * distributed.world_size())) if distributed.world_size() > 1 else PER_FILE
    text = loaded.decoders.get("text")
    return {
        "format": dataset.FORMAT,
        "complete": False,
        "model": {"fingerprint": model, "from": str(loaded.folder), "step": loaded.step},
        "data": {
            "shards": len(paths),
            "samples": sum(counts),
            "keys": "names" if find_new_names(paths) or any(map(is_remote, paths)) else "file names",
            "fingerprint": dataset.fingerprint_json([preflight.data_fingerprint(paths), counts]),
        },
        "settings": {
            "only": options.only,
            "tokens": options.tokens,
            "dtype": options.dtype,
            "precision": options.precision,
            "caption": text.caption if text is not None and "text" in layout.modalities else "",
            "incomplete": "keep" if loaded.keeps_incomplete and not options.only else "",
        },
        "dim": layout.dim,
        "per_file": options.per_file or max(options.batch_size, min(PER_FILE, limit)),
    }
