"""clipfuse data filter: shards with fewer samples, or a list of those that go."""

from __future__ import annotations

import argparse
import json

from launch.cli.command import Subparsers, add_command, run_resumable
from pretrain.config.arguments import NumberType, count, nonempty, nonempty_path, positive_int, seed, whole_number, workers
from pretrain.printable import hide_secrets_in, one_safe_line
from pretrain.runtime.entrypoint import DONE

_COSINE, _SHARE = NumberType(float, "[-1, 1]"), NumberType(float, "(0, 1]")


def add_command_to(commands: Subparsers[argparse.ArgumentParser]) -> None:
    """Add filter."""
    p = add_command(
        commands, "filter", run, "curate shards: near-duplicates, similarity, rules of captions, lists, balance of clusters"
    )
    p.add_argument("shards", type=nonempty, metavar="SHARDS", help="glob, brace pattern, folder or url")
    p.add_argument("dir", metavar="DIR", type=nonempty_path, help="folder for the shards, which keep their names and keys")
    p.add_argument("--list", action="store_true", help="write DIR/skip.txt for data.skip instead of shards")

    captions = p.add_argument_group("captions", "a sample goes where none of its captions passes")
    captions.add_argument("--min-words", type=positive_int, metavar="N", help="shorter captions go")
    captions.add_argument("--max-words", type=positive_int, metavar="N", help="longer captions go")
    captions.add_argument("--letters", action="store_true", help="captions without a letter go")
    captions.add_argument("--no-odd", action="store_true", help="captions that data check calls odd go: urls, markup")
    captions.add_argument("--max-repeats", type=positive_int, metavar="N", help="captions that more than N samples have go")
    captions.add_argument(
        "--caption", type=nonempty, default="txt", metavar="FIELD", help="txt (default), txt:lines, or a field of the json"
    )

    lists = p.add_argument_group("lists")
    lists.add_argument("--keep", type=nonempty, metavar="CONDITION", help="on the json, as data.keep: 'json.width >= 200'")
    lists.add_argument("--skip", type=nonempty, metavar="FILE", help="samples that go, one SHARD/KEY a line, as data.skip")
    lists.add_argument("--keep-list", type=nonempty, metavar="FILE", help="likewise: all others go")

    embeddings = p.add_argument_group("embeddings")
    embeddings.add_argument(
        "--embeddings", type=nonempty, nargs="+", default=[], metavar="FOLDER", help="what clipfuse embed wrote for SHARDS"
    )
    embeddings.add_argument("--similarity", type=_COSINE, metavar="X", help="least cosine of image and caption")
    embeddings.add_argument("--keep-best", type=_SHARE, metavar="X", help="share that stays, by cosine of image and caption")
    embeddings.add_argument(
        "--duplicates",
        type=_SHARE,
        metavar="X",
        help="of images with a cosine of X or more one stays: the one that fits its caption best, else the first",
    )
    embeddings.add_argument(
        "--held-out", type=nonempty, nargs="+", default=[], metavar="SHARDS", help="near-duplicates of these samples go, too"
    )
    embeddings.add_argument(
        "--search-clusters", type=count, metavar="N", help="clusters of that search (0: all pairs, default up to 50,000 images)"
    )
    embeddings.add_argument("--clusters", type=whole_number(1, 10**6), metavar="K", help="balance among K clusters of images")
    embeddings.add_argument("--per-cluster", type=positive_int, metavar="N", help="samples of a cluster that stay")
    embeddings.add_argument(
        "--temperature",
        type=NumberType(float, "[0, 1]"),
        default=0.0,
        metavar="T",
        help="of n samples in a cluster N (n/N)^T stay: 0 (default) N, 1 all",
    )
    embeddings.add_argument(
        "--missing", choices=["drop", "keep"], help="samples without an embedding (default drop, unless they are most)"
    )
    embeddings.add_argument("--seed", type=seed, default=0, metavar="S", help="of the clusters (default 0)")
    p.add_argument("--workers", type=workers, metavar="N", help="processes (default: one per core)")
    p.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Run `clipfuse data filter`; Ctrl-C ends it with exit code 75."""
    return run_resumable(_run, args, f"what is finished stays in {args.dir}")


def _run(args: argparse.Namespace) -> int:
    from launch.cli.progress import progress_bar
    from pretrain.data.filter import FilterOptions, filter_shards
    from pretrain.data.shards.paths import expand_shards

    names = FilterOptions.__dataclass_fields__.keys() & vars(args).keys()
    options = FilterOptions(**{name: getattr(args, name) for name in names}, list_only=args.list)
    options.check()
    shards = expand_shards(args.shards, "SHARDS")
    held_out = expand_shards(args.held_out, "--held-out") if args.held_out else []
    source = load = None
    if args.embeddings:
        from pretrain.embedding.aligned import EmbeddingSource, load_aligned

        source, load = EmbeddingSource(args.embeddings, "--embeddings", options.needs_similarity), load_aligned
    report = filter_shards(
        shards,
        args.dir,
        options,
        source=source,
        load_embeddings=load,
        held_out=held_out,
        workers=args.workers,
        stage=progress_bar,
    )
    if args.json:
        print(json.dumps(hide_secrets_in(report.as_dict())))
        return DONE
    for line in report.format_lines():
        print(one_safe_line(line))
    return DONE
