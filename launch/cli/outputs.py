"""clipfuse embed, export and report: what leaves a run."""

from __future__ import annotations

import argparse

from launch.cli.command import Subparsers, add_command
from launch.cli.runs import check_run, import_models
from pretrain.config.arguments import count, endpoint, nonempty, nonempty_path, positive_int, process_count
from pretrain.embedding import options
from pretrain.errors import ConfigError
from pretrain.runtime.entrypoint import DONE


def add_commands(commands: Subparsers[argparse.ArgumentParser]) -> None:
    """Add embed and export."""
    p = add_command(commands, "embed", embed, "embeddings of whole collections, in Parquet files", reads_runs=True)
    options.add_arguments(p)
    p.add_argument(
        "--nproc", type=process_count, metavar="N", help="processes on each node: a number, or gpus for one per GPU (default 1)"
    )
    p.add_argument("--nodes", type=positive_int, default=1, metavar="N", help="nodes that share DIR (default 1)")
    p.add_argument("--rdzv", type=endpoint, metavar="HOST:PORT", help="with --nodes: where they meet, the same on every node")
    p.add_argument("--restarts", type=count, metavar="N", help="restarts after a lost process (default 0; 3 on several nodes)")

    p = add_command(commands, "export", export, "a folder that transformers, open_clip or onnxruntime loads", reads_runs=True)
    p.add_argument("run", type=nonempty, metavar="RUN", help="a run, a checkpoint, or a model of transformers or open_clip")
    p.add_argument("dir", metavar="DIR", type=nonempty_path, help="the folder to write; it must not exist yet")
    p.add_argument("--format", required=True, choices=["hf", "open_clip", "onnx"], help="hf: transformers")
    p.add_argument("--license", metavar="NAME", help="license of the weights, for the model card (apache-2.0, cc-by-4.0, ...)")


def add_report(commands: Subparsers[argparse.ArgumentParser]) -> None:
    """Add report."""
    p = add_command(commands, "report", report, "curves, recalls and a gallery in one HTML file", reads_runs=True)
    p.add_argument("run", type=nonempty, metavar="RUN", help="a run folder")
    p.add_argument("--data", metavar="SHARDS", help="shards of the gallery (default: the run's data.val)")
    p.add_argument("--db", metavar="PLACE", help="an index of `clipfuse index`, in which the page shows searches")
    p.add_argument(
        "--search",
        action="append",
        default=[],
        type=nonempty,
        metavar="TEXT",
        help="of --db: what is searched for; repeatable (default: three captions of the gallery)",
    )


def embed(args: argparse.Namespace) -> int:
    """Run `clipfuse embed`."""
    check_run(args.run)
    words = options.build_argv(args)
    if args.nproc is None and args.nodes == 1:
        from pretrain.embedding import job

        return job.run(args)
    from launch import elastic

    options.build_options(args)  # before any process is started
    world = elastic.World(elastic.parse_nproc(args.nproc), args.nodes, args.rdzv, args.restarts)
    return elastic.launch("pretrain.embedding.job", words, world)


def export(args: argparse.Namespace) -> int:
    """Run `clipfuse export`: of a fine-tuned run, onnx holds all of it, the other formats its encoders."""
    check_run(args.run)
    import_models()
    from finetune import loading
    from pretrain.checkpoints import export as exports
    from pretrain.checkpoints.loading import load_model

    exports.check_finished(args.run)
    is_finetuned = loading.is_finetuned(args.run)
    if is_finetuned and args.format == "onnx":
        from finetune import export as graphs

        print(f"wrote {graphs.export(loading.load(args.run), args.dir, args.license)}")
        return DONE
    print(f"wrote {exports.export(load_model(args.run), args.dir, args.format, args.license)}")
    if is_finetuned:
        print(f"these are the encoders alone: {args.format} has no place for the fusion and the task's head, onnx may have")
    return DONE


def report(args: argparse.Namespace) -> int:
    """Run `clipfuse report`."""
    if args.search and args.db is None:
        raise ConfigError("--search needs --db PLACE, the index that is searched")
    from launch import report as reports

    print(f"wrote {reports.write(args.run, args.data, index=args.db, texts=args.search)}")
    return DONE
