"""clipfuse: the one command. Each subcommand parses its words here and calls one function of the room that does the work.

Heavy libraries are imported by the functions, so that `clipfuse --help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

from pretrain.config import find_config
from pretrain.embedding import options
from pretrain.errors import ConfigError
from pretrain.runtime.entrypoint import DONE, FAILED, guarded, run

Command = Callable[[argparse.Namespace], int]
_MAPS = "raw, rollout, gradcam, relevance"


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console command; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse cannot mix `key=value` words with options; what it leaves over are settings, or mistakes.
    strange = [word for word in rest if word.startswith("-") or not hasattr(args, "settings")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        args.settings = [*args.settings, *rest]
    work: Command = args.work
    return guarded(work, args)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="clipfuse",
        description="Contrastive image-text pretraining: from shards to aligned encoders.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped and resumable.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _data(commands.add_parser("data", help="draw, pack and check shards"))

    p = _command(commands, "tokenizer", _tokenizer, "train a byte-level BPE tokenizer on the captions of shards")
    p.add_argument("shards", metavar="SHARDS", help="glob, brace pattern, folder or url")
    p.add_argument("dir", metavar="DIR", type=Path, help="folder to save the tokenizer in, in transformers' format")
    p.add_argument("--vocab", type=int, default=8192, metavar="N", help="size of the vocabulary (default 8192)")
    p.add_argument("--caption", default="txt", metavar="FIELD", help="txt (default), a field of the json, or txt,questions")

    p = _command(commands, "pretrain", _train, "shards -> aligned encoders")
    p.set_defaults(module="pretrain")
    p.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped one")
    p.add_argument("--dry-run", action="store_true", help="print configuration, parameters and samples, and exit")
    _processes(p)
    p.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the file's")

    p = _command(commands, "finetune", _train, "aligned encoders -> answers, re-ranking, classes, descriptions")
    p.set_defaults(module="finetune")
    p.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped one")
    p.add_argument("--dry-run", action="store_true", help="print configuration, parameters and samples, and exit")
    _processes(p)
    p.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the file's; init=RUN starts from it")

    p = _command(commands, "evaluate", _evaluate, "recall, zero-shot accuracy, a linear probe, or a run's own task")
    p.add_argument("run", metavar="RUN", help="a run folder or a checkpoint folder")
    p.add_argument("--data", required=True, metavar="SHARDS", help="shards to evaluate on")
    p.add_argument(
        "--task", help="retrieval (default), zero_shot, linear_probe; of a fine-tuned run its own task (default), grounding"
    )
    p.add_argument("--train-data", metavar="SHARDS", help="linear_probe, vqa: the shards that probe or baseline learns from")
    p.add_argument("--classes", metavar="NAMES", help="zero_shot: imagenet, scenes, a comma list, or a file with a name a line")
    p.add_argument("--maps", default="raw", metavar="METHOD", help=f"grounding: {_MAPS} (default raw)")
    p.add_argument("--wise", metavar="A,B,...", help="a fine-tuned run mixed with the model it began from: 0,0.25,0.5,0.75,1")
    p.add_argument("--pretrained", metavar="RUN", help="--wise: that model, where it is not where the run found it")
    p.add_argument("--out", type=Path, metavar="DIR", help="--wise: a run folder for the best mixture")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")

    p = _command(commands, "attend", _attend, "what each word of a text looks at in a picture")
    p.add_argument("run", metavar="RUN", help="a fine-tuned run or checkpoint folder")
    p.add_argument("image", metavar="IMAGE", type=Path, help="a picture: JPEG, PNG, WebP, ...")
    p.add_argument("text", metavar="TEXT", help="what is said of it, or asked")
    p.add_argument("--out", required=True, metavar="PNG", type=Path, help="where the figure goes: a heat map a word")
    p.add_argument("--maps", default="raw", metavar="METHOD", help=f"{_MAPS} (default raw)")
    p.add_argument("--layer", type=int, metavar="N", help="raw, gradcam: one layer, -1 the last (default: their mean)")

    p = _command(commands, "embed", _embed, "embeddings of whole collections, in Parquet files")
    options.add(p)
    p.add_argument("--nproc", metavar="N", help="processes on each node: a number, or gpus for one a GPU (default 1)")
    p.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes that share DIR (default 1)")
    p.add_argument("--rdzv", metavar="HOST:PORT", help="with --nodes: where the nodes meet; the same on every node")
    p.add_argument("--restarts", type=int, metavar="N", help="starts after a lost process (default 0; 3 on several nodes)")

    p = _command(commands, "export", _export, "a folder that transformers, open_clip or onnxruntime loads")
    p.add_argument("run", metavar="RUN", help="a run, a checkpoint, or a model of transformers or open_clip")
    p.add_argument("dir", metavar="DIR", type=Path, help="the folder to make")
    p.add_argument("--format", required=True, choices=["hf", "open_clip", "onnx"], help="hf: transformers")
    p.add_argument("--license", metavar="NAME", help="licence of the weights, for the model card (apache-2.0, cc-by-4.0, ...)")

    p = _command(commands, "plan", _plan, "memory, network and steps before renting anything")
    p.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a shipped one")
    p.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs in the run, over all nodes")
    p.add_argument("--gpu", default="h100", metavar="NAME", help="h100 (default), h200, b200, a100, a100-40, l40s, 4090, ...")
    p.add_argument("--samples", type=int, metavar="N", help="samples of an epoch, where the shards are not here")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    p.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the file's")

    p = _command(commands, "report", _report, "curves, recalls and a gallery in one HTML file")
    p.add_argument("run", metavar="RUN", help="a run folder")
    p.add_argument("--data", metavar="SHARDS", help="shards of the gallery (default: the run's data.val)")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, work: Command, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(work=work)
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# data, tokenizer


def _data(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    p = _command(commands, "scenes", _scenes, "draw the built-in data set into DIR/{train,val,test,unseen,hard}-*.tar")
    p.add_argument("dir", metavar="DIR", type=Path)
    p.add_argument("--num", type=int, default=4000, metavar="N", help="training scenes; the other splits follow (default 4000)")
    p.add_argument("--size", type=int, default=96, metavar="PX", help="side of the pictures, 64 to 2048 (default 96)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, other scenes (default 0)")
    p.add_argument("--scale", type=float, default=1.0, help="size of every thing: 0.25 = small things in large pictures")
    p.add_argument("--things", default="1-4", metavar="A-B", help="things in a scene, within 1 to 4 (default 1-4)")
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")

    p = _command(commands, "pack", _pack, "folder | csv | tsv | jsonl | parquet | tars -> shards, in parallel")
    p.add_argument("source", metavar="SOURCE", help="a folder of pictures, a table, or tars")
    p.add_argument("dir", metavar="DIR", type=Path, help="where the shards go")
    p.add_argument("--image-column", default="image", metavar="NAME", help="column with the picture's path (default image)")
    p.add_argument("--caption-column", default="caption", metavar="NAME", help="column with the text (default caption)")
    p.add_argument(
        "--caption-from", default="txt", choices=["txt", "path"], help="folders: NAME.txt beside NAME.jpg, or its path"
    )
    p.add_argument("--size", type=int, metavar="PX", help="shrink larger pictures to this side")
    p.add_argument("--side", default="shortest", choices=["shortest", "longest"], help="the side --size speaks of")
    p.add_argument("--outside", action="store_true", help="tables: allow pictures outside the table's folder")
    p.add_argument("--shard-size", type=int, default=1000, metavar="N", help="samples a shard (default 1000)")
    p.add_argument("--prefix", default="shard", metavar="NAME", help="shards are NAME-0000.tar, ... (default shard)")
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")

    p = _command(commands, "check", _check, "index and verify shards: counts, bad samples by reason")
    p.add_argument("shards", metavar="SHARDS", nargs="+", help="globs, brace patterns, folders or urls")
    p.add_argument("--caption", default="txt", metavar="FIELD", help="txt, or a field of the json (default txt)")
    p.add_argument("--no-decode", action="store_true", help="verify the archives only, not every picture and caption")
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    p.add_argument("--json", action="store_true", help="print one JSON object")


def _scenes(args: argparse.Namespace) -> int:
    from launch.cli.progress import counted
    from pretrain.data.scenes.dataset import draw_dataset

    low, _, high = args.things.partition("-")
    if not low.isdigit() or not (high or low).isdigit():
        raise ConfigError(f"--things {args.things!r} must be A-B, for example 1-2")
    things = (int(low), int(high or low))
    with counted("drawing scenes") as progress:
        made = draw_dataset(
            args.dir, args.num, args.size, args.seed, args.workers, scale=args.scale, things=things, progress=progress
        )
    print(f"{args.dir}: " + ", ".join(f"{count:,} {split}" for split, count in made.items()))
    return DONE


def _pack(args: argparse.Namespace) -> int:
    from launch.cli.progress import counted
    from pretrain.data.pack import pack

    with counted("packing") as progress:
        summary = pack(
            args.source,
            args.dir,
            image_column=args.image_column,
            caption_column=args.caption_column,
            caption_from=args.caption_from,
            size=args.size,
            side=args.side,
            outside=args.outside,
            shard_size=args.shard_size,
            prefix=args.prefix,
            workers=args.workers,
            progress=progress,
        )
    print(summary)
    return DONE


def _check(args: argparse.Namespace) -> int:
    from launch.cli.progress import counted
    from pretrain.data.check import check
    from pretrain.data.shards.paths import expand

    with counted("checking") as progress:
        report = check(expand(args.shards, "SHARDS"), not args.no_decode, args.workers, progress, args.caption)
    if args.json:
        print(json.dumps(dataclasses.asdict(report)))
        return DONE if report.ok else FAILED
    print(f"{report.shards:,} shards, {report.samples:,} samples, {report.bad_samples:,} of them bad")
    for reason, count in report.bad.most_common():
        print(f"  {count:,} {reason}: {', '.join(report.names[reason][:3])}{', ...' if count > 3 else ''}")
    for line in [*report.damaged, *(f"{path} holds no samples" for path in report.empty)]:
        print(f"  {line}")
    return DONE if report.ok else FAILED


def _tokenizer(args: argparse.Namespace) -> int:
    from pretrain.data.text import train_tokenizer

    made = train_tokenizer(args.shards, args.dir, vocab=args.vocab, caption=args.caption)
    print(f"{args.dir}: {len(made):,} tokens, in transformers' format")
    return DONE


# ---------------------------------------------------------------------------------------------------------------------
# pretrain, evaluate, report


def _processes(p: argparse.ArgumentParser) -> None:
    """The options of a run on several processes or nodes."""
    p.add_argument("--nproc", metavar="N", help="processes on each node: a number, or gpus for one a GPU (default 1)")
    p.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes in the run (default 1)")
    p.add_argument("--on", choices=["local", "slurm"], default="local", help="here, or as a Slurm job (default local)")
    here = p.add_argument_group("processes here (--on local)")
    here.add_argument("--rdzv", metavar="HOST:PORT", help="with --nodes: where the nodes meet; the same on every node")
    here.add_argument("--restarts", type=int, metavar="N", help="starts after a lost process (default 0; 3 on several nodes)")
    job = p.add_argument_group("a job (--on slurm)")
    job.add_argument("--time", metavar="LIMIT", help="as sbatch reads it: 12:00:00 (default: the partition's)")
    for name in ("partition", "account", "qos"):
        job.add_argument(f"--{name}", metavar="NAME")
    job.add_argument("--gpus-per-node", type=int, metavar="N", help="default: one a process; 0 = none")
    job.add_argument("--warning", type=int, default=300, metavar="SECONDS", help="save so long before the limit (default 300)")
    job.add_argument("--no-requeue", action="store_true", help="do not line up again when preempted or out of time")
    job.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="any other: --sbatch=--mem=64G")
    here.add_argument("--grace", type=float, default=600, metavar="SECONDS", help="to save in after a signal (default 600)")


def _train(args: argparse.Namespace) -> int:
    """Run one process here; have torch's elastic launcher, or Slurm, start several. args.module: pretrain or finetune."""
    if args.on == "slurm":
        from launch import slurm

        if not (args.nproc or "").isdigit():
            raise ConfigError("--on slurm needs --nproc N, a number: the nodes may have other GPUs than this machine")
        job = slurm.Job(
            nodes=args.nodes,
            nproc=int(args.nproc),
            time=args.time,
            partition=args.partition,
            account=args.account,
            qos=args.qos,
            gpus=args.gpus_per_node,
            warning=args.warning,
            requeue=not args.no_requeue,
            more=args.sbatch,
        )
        slurm.submit(args.module, args.config, args.settings, job, args.dry_run)
        return DONE
    words = [args.config, *(["--dry-run"] if args.dry_run else []), *args.settings]
    if args.nproc is None and args.nodes == 1:
        return run(args.config, args.settings, args.dry_run, args.module)
    from launch import elastic

    find_config(args.config, args.module)  # before any process is started
    world = elastic.World(elastic.processes(args.nproc), args.nodes, args.rdzv, args.restarts, args.grace)
    return elastic.launch(args.module, words, world)


def _evaluate(args: argparse.Namespace) -> int:
    from rich.console import Console

    from finetune import loading as finetuned
    from pretrain.checkpoints.loading import load_model
    from pretrain.data.config import sources_of
    from pretrain.embedding import dataset
    from pretrain.evaluation import evaluate
    from pretrain.runtime import distributed

    if not dataset.is_collection(args.data):
        sources_of(args.data, "--data")  # before a model is loaded
    if args.task == "grounding":
        return _grounding(args)
    if args.wise is not None:
        return _wise(args)
    tuned = finetuned.load(args.run) if finetuned.is_finetuned(args.run) else None
    if tuned is not None and args.task in (None, tuned.config.task.name):
        from finetune import evaluate as own

        result = own.run(tuned, args.data, distributed.device(), train=args.train_data)
        table = own.summary(result)
    else:
        config = evaluate.EvalConfig(tasks=[args.task or "retrieval"], probe_train=args.train_data)
        if args.classes:
            config.classes = args.classes
        config.check()
        result = evaluate.run(load_model(args.run), args.data, config, distributed.device())
        table = evaluate.summary(result)
    if args.json:
        print(json.dumps(result))
    else:
        Console().print(table)
    return DONE


def _wise(args: argparse.Namespace) -> int:
    from rich.console import Console

    from finetune import loading, wise_ft
    from pretrain.runtime import distributed

    try:
        alphas = [float(word) for word in args.wise.split(",")]
    except ValueError:
        raise ConfigError(f"--wise {args.wise!r} must be numbers with commas between, for example 0,0.5,1") from None
    result = wise_ft.run(loading.load(args.run), args.data, alphas, distributed.device(), args.pretrained, args.out)
    if args.json:
        print(json.dumps(result))
    else:
        Console().print(wise_ft.summary(result))
    return DONE


def _grounding(args: argparse.Namespace) -> int:
    from rich.console import Console

    from finetune import loading
    from finetune.grounding import evaluate
    from pretrain.runtime import distributed

    config = evaluate.GroundingConfig(method=args.maps)
    config.check()
    result = evaluate.run(loading.load(args.run), args.data, config, distributed.device())
    if args.json:
        print(json.dumps(result))
    else:
        Console().print(evaluate.summary(result))
    return DONE


def _attend(args: argparse.Namespace) -> int:
    from finetune import loading
    from finetune.explain import word_maps
    from pretrain.runtime import distributed

    tuned = loading.load(args.run)
    tuned.model.to(distributed.device())
    seen = word_maps.attend(tuned, args.image, args.text, args.out, args.maps, args.layer)
    print(*seen.lines(), f"wrote {args.out}", sep="\n")
    return DONE


def _embed(args: argparse.Namespace) -> int:
    words = options.words(args)
    if args.nproc is None and args.nodes == 1:
        from pretrain.embedding import job

        return job.run(args)
    from launch import elastic

    options.options(args)  # before any process is started
    world = elastic.World(elastic.processes(args.nproc), args.nodes, args.rdzv, args.restarts)
    return elastic.launch("pretrain.embedding.job", words, world)


def _export(args: argparse.Namespace) -> int:
    from finetune import loading as finetuned
    from pretrain.checkpoints import export
    from pretrain.checkpoints.loading import load_model

    export.finished(args.run)
    tuned = finetuned.is_finetuned(args.run)
    if tuned and args.format == "onnx":
        from finetune import export as graphs

        print(f"wrote {graphs.export(finetuned.load(args.run), args.dir, args.license)}")
        return DONE
    print(f"wrote {export.export(load_model(args.run), args.dir, args.format, args.license)}")
    if tuned:
        print(f"these are the encoders alone: {args.format} has no place for the fusion and the task's head, onnx may have")
    return DONE


def _plan(args: argparse.Namespace) -> int:
    from launch import plan

    plan.report(plan.plan(args.config, args.settings, args.gpus, args.gpu, args.samples), args.json)
    return DONE


def _report(args: argparse.Namespace) -> int:
    from launch import report

    path = report.write(args.run, args.data)
    print(f"wrote {path}")
    return DONE
