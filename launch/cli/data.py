"""clipfuse data scenes | pack | check | filter, and clipfuse tokenizer: from files to shards that training reads."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from launch.cli import data_filter
from launch.cli.command import Subparsers, add_command, run_resumable
from pretrain import config as configuration
from pretrain.config.arguments import NumberType, nonempty, nonempty_path, positive_int, seed, whole_number, workers
from pretrain.errors import ConfigError, UserError
from pretrain.printable import format_count, hide_secrets_in, one_safe_line
from pretrain.runtime.entrypoint import DONE, FAILED
from pretrain.runtime.files import write_text


def add_commands(commands: Subparsers[argparse.ArgumentParser]) -> None:
    """Add data and tokenizer."""
    parser = commands.add_parser("data", help="draw, pack, check and filter shards")
    subcommands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_scenes(subcommands)
    _add_pack(subcommands)
    _add_check(subcommands)
    data_filter.add_command_to(subcommands)

    p = add_command(commands, "tokenizer", train_tokenizer, "train a byte-level BPE tokenizer on the captions of shards")
    p.add_argument("shards", type=nonempty, metavar="SHARDS", help="glob, brace pattern, folder or url")
    p.add_argument("dir", metavar="DIR", type=nonempty_path, help="folder to save the tokenizer in, in transformers' format")
    p.add_argument(
        "--vocab", type=whole_number(259, 10**6), default=8192, metavar="N", help="size of the vocabulary (default 8192)"
    )
    p.add_argument(
        "--caption",
        type=nonempty,
        default="txt",
        metavar="FIELD",
        help="txt (default), txt:lines, a json field, or txt,questions",
    )


def _add_scenes(commands: Subparsers[argparse.ArgumentParser]) -> None:
    p = add_command(commands, "scenes", draw_scenes, "draw the built-in data set into DIR/{train,val,test,unseen,hard}-*.tar")
    p.add_argument("dir", metavar="DIR", type=nonempty_path)
    p.add_argument(
        "--num", type=positive_int, default=4000, metavar="N", help="training scenes; the other splits follow (default 4000)"
    )
    p.add_argument(
        "--size", type=whole_number(64, 2048), default=96, metavar="PX", help="side of the images, 64 to 2048 (default 96)"
    )
    p.add_argument("--seed", type=seed, default=0, metavar="S", help="another seed draws other scenes (default 0)")
    p.add_argument(
        "--scale",
        type=NumberType(float, "[0.1, 1]"),
        default=1.0,
        metavar="X",
        help="size of every object, 0.1 to 1: 0.25 = small objects in large images",
    )
    p.add_argument("--things", type=_objects, metavar="A-B", help="objects in a scene, within 1 to 4 (default 1-4)")
    p.add_argument(
        "--catalog",
        "--catalogue",
        action="store_true",
        help="draw products instead, one thing each: DIR/{train,val,catalog}-*.tar, with queries and graded judgments",
    )
    p.add_argument(
        "--sound", action="store_true", help="add KEY.flac, in which each thing is heard, with times and captions in the json"
    )
    p.add_argument("--workers", type=workers, metavar="N", help="processes (default: one per core)")


def _objects(text: str) -> tuple[int, int]:
    """Return the smallest and the largest number of objects in a scene, from A-B or A. Raises ArgumentTypeError."""
    match = re.fullmatch(r"([1-4])(?:-([1-4]))?", text)
    if match is None or match[1] > (match[2] or match[1]):
        raise argparse.ArgumentTypeError(f"{text[:100]!r} must be A-B within 1 to 4, the lower number first, for example 1-2")
    return int(match[1]), int(match[2] or match[1])


def _add_pack(commands: Subparsers[argparse.ArgumentParser]) -> None:
    p = add_command(commands, "pack", pack, "folder | csv | tsv | jsonl | parquet | COCO json | tars -> shards, in parallel")
    p.add_argument(
        "source",
        type=nonempty,
        metavar="SOURCE",
        help="a folder of images or sounds, a table, COCO's or Karpathy's json, or tars",
    )
    p.add_argument("dir", metavar="DIR", type=nonempty_path, help="folder to write the shards to")
    p.add_argument(
        "--image-column",
        type=nonempty,
        default="image",
        metavar="NAME",
        help="column with the path of the image (default image)",
    )
    p.add_argument(
        "--audio-column",
        type=nonempty,
        metavar="NAME",
        help="column with the path of the sound, beside or instead of the image (default audio, where it names sounds)",
    )
    p.add_argument(
        "--caption-column", type=nonempty, default="caption", metavar="NAME", help="column with the text (default caption)"
    )
    p.add_argument(
        "--caption-from",
        default="txt",
        choices=["txt", "lines", "path"],
        help="folders: NAME.txt beside NAME.jpg as one caption (default), each of its lines as one, or the words of the path",
    )
    p.add_argument("--size", type=whole_number(1, 65535), metavar="PX", help="shrink larger images to this side")
    p.add_argument("--side", default="shortest", choices=["shortest", "longest"], help="the side that --size limits")
    p.add_argument("--outside", action="store_true", help="allow paths and links that lead out of the folder of the source")
    p.add_argument("--separator", metavar="TEXT", help="csv, tsv, txt: between values (default: comma, tab, semicolon or bar)")
    p.add_argument(
        "--image-root", type=nonempty, metavar="DIR", help="tables: the folder of the images (default: the folder of the table)"
    )
    p.add_argument("--split", default="", metavar="NAMES", help="Karpathy's json: train,restval, for example (default: all)")
    p.add_argument("--shard-size", type=positive_int, default=1000, metavar="N", help="samples per shard (default 1000)")
    p.add_argument(
        "--prefix", type=nonempty, default="shard", metavar="NAME", help="shards are NAME-0000.tar, ... (default shard)"
    )
    p.add_argument("--workers", type=workers, metavar="N", help="processes (default: one per core)")


def _add_check(commands: Subparsers[argparse.ArgumentParser]) -> None:
    p = add_command(commands, "check", check, "index and verify shards: counts, bad samples by reason")
    p.add_argument("shards", type=nonempty, metavar="SHARDS", nargs="+", help="globs, brace patterns, folders or urls")
    p.add_argument(
        "settings",
        nargs="*",
        default=[],
        metavar="key=value",
        help="as in pretraining: data.incomplete=keep, data.caption=FIELD",
    )
    p.add_argument(
        "--caption",
        type=nonempty,
        metavar="FIELD",
        help="txt (default), txt:lines (one a line), or a field of the json, as data.caption",
    )
    p.add_argument("--no-decode", action="store_true", help="verify the archives only, not every image, sound and caption")
    p.add_argument(
        "--fix",
        type=nonempty_path,
        metavar="FILE",
        help="write the bad samples to FILE, which training passes over with data.skip=FILE; the shards stay as they are",
    )
    p.add_argument(
        "--manifest",
        action="store_true",
        help="write counts, sizes and digests to shards.json beside the shards, local or in an object store: runs start by it",
    )
    p.add_argument("--workers", type=workers, metavar="N", help="processes (default: one per core)")
    p.add_argument("--json", action="store_true", help="print one JSON object")


def draw_scenes(args: argparse.Namespace) -> int:
    """Run `clipfuse data scenes`."""
    if args.catalog and args.things is not None:
        raise ConfigError("--things does not go with --catalog: a product is one thing")
    if args.catalog and args.sound:
        raise ConfigError("--sound does not go with --catalog: products are seen, not heard")
    from launch.cli.progress import progress_bar

    with progress_bar("drawing products" if args.catalog else "drawing scenes") as progress:
        if args.catalog:
            from pretrain.data.scenes.catalog import draw_catalog

            counts = draw_catalog(args.dir, args.num, args.size, args.seed, args.workers, scale=args.scale, progress=progress)
        else:
            from pretrain.data.scenes.dataset import draw_dataset

            counts = draw_dataset(
                args.dir,
                args.num,
                args.size,
                args.seed,
                args.workers,
                scale=args.scale,
                num_objects=args.things or (1, 4),
                sound=args.sound,
                progress=progress,
            )
    print(f"{args.dir}: " + ", ".join(f"{count:,} {split}" for split, count in counts.items()))
    return DONE


def pack(args: argparse.Namespace) -> int:
    """Run `clipfuse data pack`; Ctrl-C ends it with exit code 75."""
    return run_resumable(_pack, args, f"finished shards stay in {args.dir}")


def _pack(args: argparse.Namespace) -> int:
    from launch.cli.progress import progress_bar
    from pretrain.data import pack as packing

    with progress_bar("packing") as progress:
        summary = packing.pack(
            args.source,
            args.dir,
            image_column=args.image_column,
            audio_column=args.audio_column,
            caption_column=args.caption_column,
            caption_from=args.caption_from,
            size=args.size,
            side=args.side,
            outside=args.outside,
            separator={"tab": "\t", "\\t": "\t"}.get(args.separator, args.separator),
            image_root=args.image_root,
            splits=[name for name in args.split.split(",") if name],
            shard_size=args.shard_size,
            prefix=args.prefix,
            workers=args.workers,
            progress=progress,
        )
    for line in summary.format_lines():
        print(one_safe_line(line))
    return DONE


def check(args: argparse.Namespace) -> int:
    """Run `clipfuse data check`: exit code 1 where anything is wrong with the shards, or not mended by what --fix writes."""
    from launch.cli.progress import progress_bar
    from pretrain.data import check as checking
    from pretrain.data.shards.counts import manifest_paths, write_manifests
    from pretrain.data.shards.paths import expand_shards

    words = [word for word in args.shards if word.startswith("data.") and "=" in word]  # argparse takes them for shards
    config = configuration.load(checking.CheckConfig, None, [*words, *args.settings]).data
    if args.caption is not None and config.caption not in (None, args.caption):
        raise ConfigError(f"--caption {args.caption} and data.caption={config.caption} are two sources of captions; give one")
    caption = args.caption or config.caption or "txt"
    shards = expand_shards([word for word in args.shards if word not in words], "SHARDS")
    if args.manifest:
        manifest_paths(shards)  # whether it can be written, before anything is read
    if args.fix is not None and not Path(args.fix).parent.is_dir():
        raise ConfigError(f"--fix {args.fix}: its folder is not there")
    with progress_bar("checking") as progress:
        report = checking.check_shards(
            shards, not args.no_decode, args.workers, progress, caption, record=args.manifest, incomplete=config.incomplete
        )
    manifests = write_manifests(report.records) if args.manifest else []
    is_usable = report.is_ok
    if args.fix is not None:
        _write_skip_list(Path(args.fix), report.lines)
        is_usable = not report.damaged and report.samples > report.bad_samples
    if args.json:
        print(json.dumps(hide_secrets_in(report.as_dict())))
        return DONE if is_usable else FAILED
    print(
        f"{format_count(report.shards, 'shard')}, {format_count(report.samples, 'sample')}, {report.bad_samples:,} of them bad"
    )
    if report.sounds:
        print(f"{format_count(report.images, 'sample')} with an image, {report.sounds:,} with a sound")
    if report.combinations:
        counts = [f"{count:,} with {names.replace('+', ', ')}" for names, count in report.combinations.most_common()]
        print(f"usable with data.incomplete=keep: {'; '.join(counts)}")
    if report.unchecked:
        print(one_safe_line(f"sounds were counted, not decoded: {report.unchecked}"))
    for reason, count in report.bad.most_common():
        print(one_safe_line(f"  {count:,} {reason}: {', '.join(report.names[reason][:3])}{', ...' if count > 3 else ''}"))
    for line in [*report.damaged, *(f"{path} holds no samples" for path in report.empty)]:
        print(one_safe_line(f"  {line}"))
    for line in report.captions.format_lines():
        print(one_safe_line(line))
    for path in manifests:
        print(one_safe_line(f"{path}: samples, bytes and digests of the shards in its folder"))
    if args.fix is not None:
        print(
            one_safe_line(f"{args.fix}: {format_count(len(report.lines), 'sample')}; data.skip={args.fix} trains without them")
        )
    return DONE if is_usable else FAILED


def _write_skip_list(path: Path, lines: list[str]) -> None:
    """Write the list of --fix. Raises UserError where it cannot be written."""
    try:
        write_text(path, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise UserError(f"--fix {path} cannot be written: {error.strerror or error}") from error


def train_tokenizer(args: argparse.Namespace) -> int:
    """Run `clipfuse tokenizer`."""
    from pretrain.data import text

    tokenizer = text.train_tokenizer(args.shards, args.dir, vocab=args.vocab, caption=args.caption)
    print(f"{args.dir}: {len(tokenizer):,} tokens, in transformers' format")
    return DONE
