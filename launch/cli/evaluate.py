"""clipfuse evaluate and attend: what a run has learned, how well an index answers, and what each word attends to."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from launch.cli import evaluate_index
from launch.cli.command import Subparsers, add_command
from launch.cli.runs import check_run, check_task, import_models
from pretrain.config.arguments import fractions, nonempty, nonempty_path, whole_number
from pretrain.errors import ConfigError, UserError
from pretrain.runtime.entrypoint import DONE

_MAPS = "raw, rollout, gradcam, relevance, similarity"


def add_commands(commands: Subparsers[argparse.ArgumentParser]) -> None:
    """Add evaluate and attend."""
    p = add_command(
        commands,
        "evaluate",
        evaluate,
        "recall, zero-shot accuracy, a linear probe, a run's own task, or an index",
        reads_runs=True,
    )
    p.add_argument("run", type=nonempty, metavar="RUN", help="a run folder, a checkpoint folder, or an index (with --queries)")
    p.add_argument("--data", type=nonempty, metavar="SHARDS", help="shards to evaluate on")
    p.add_argument(
        "--task",
        help="retrieval (default), zero_shot, linear_probe; for a fine-tuned run its own task (default), or grounding",
    )
    p.add_argument("--train-data", metavar="SHARDS", help="linear_probe, vqa: the shards that probe or baseline learns from")
    p.add_argument("--classes", metavar="NAMES", help="zero_shot: imagenet, scenes, a comma list, or a file with a name a line")
    p.add_argument(
        "--caption", metavar="FIELD", help="txt, txt:lines (one a line), txt:whole, or a json field (default: the run's)"
    )
    p.add_argument(
        "--language", type=nonempty, metavar="FIELD", help="retrieval: within each language, too, which this json field names"
    )
    p.add_argument("--maps", default="raw", metavar="METHOD", help=f"grounding: {_MAPS} (default raw)")
    p.add_argument(
        "--wise",
        type=fractions,
        metavar="A,B,...",
        help="average a fine-tuned run with its pretrained model: 0,0.25,0.5,0.75,1",
    )
    p.add_argument("--pretrained", metavar="RUN", help="--wise: that model, if it is not where the run found it")
    p.add_argument("--out", type=nonempty_path, metavar="DIR", help="--wise: a run folder for the best average")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    evaluate_index.add_options(p)

    p = add_command(commands, "attend", attend, "what each word of a text attends to in an image or a sound", reads_runs=True)
    p.add_argument(
        "run",
        type=nonempty,
        metavar="RUN",
        help="a fine-tuned run or checkpoint folder; for --maps similarity also encoders alone",
    )
    p.add_argument(
        "image",
        metavar="IMAGE",
        type=nonempty_path,
        help="an image (JPEG, PNG, WebP, ...), or a sound where the model has such a tower",
    )
    p.add_argument("text", metavar="TEXT", help="a caption of it, or a question about it")
    p.add_argument(
        "--out", required=True, metavar="PNG", type=nonempty_path, help="where the figure goes: a heat map for each word"
    )
    p.add_argument("--maps", default="raw", metavar="METHOD", help=f"{_MAPS} (default raw)")
    p.add_argument(
        "--layer",
        type=whole_number(-1000, 1000),
        metavar="N",
        help="raw, gradcam: one layer, -1 the last (default: their mean)",
    )


def evaluate(args: argparse.Namespace) -> int:
    """Run `clipfuse evaluate`: of a fine-tuned run its own task, unless --task names another; of an index its --queries."""
    evaluate_index.check_options(args)
    if args.queries is not None:
        return evaluate_index.evaluate(args)
    if args.data is None:
        args.parser.error("the following arguments are required: --data, or --queries for an index")
    check_run(args.run)
    if args.pretrained is not None:
        check_run(args.pretrained)
    check_task(args.task)
    import_models()
    from finetune import loading
    from pretrain.data.config import resolve_sources
    from pretrain.embedding import dataset

    if not dataset.is_embedding_folder(args.data):
        resolve_sources(args.data, "--data")  # before a model is loaded
    _check_caption(args, dataset.is_embedding_folder(args.data))
    if args.language is not None and (args.task not in (None, "retrieval") or args.wise is not None):
        raise ConfigError("--language goes with the retrieval of encoders: --task retrieval")
    if args.task == "grounding":
        return _evaluate_grounding(args)
    if args.wise is not None:
        return _evaluate_wise(args)
    finetuned = loading.load(args.run, args.caption) if loading.is_finetuned(args.run) else None
    if finetuned is not None and args.task in (None, finetuned.config.task.name):
        if args.language is not None:
            raise ConfigError(f"--language goes with the retrieval of encoders; {args.run} is fine-tuned: add --task retrieval")
        return _evaluate_task(args, finetuned)
    return _evaluate_encoders(args)


def _check_caption(args: argparse.Namespace, is_embedded: bool) -> None:
    """Raise ConfigError for a --caption that is misspelled or has no effect."""
    from pretrain.data.captions import check_caption_source

    if args.caption is None:
        return
    check_caption_source(args.caption, "--caption")
    if is_embedded:
        raise ConfigError(
            f"--caption {args.caption}: {args.data} holds embeddings of captions; give it to clipfuse embed instead"
        )
    if args.task in ("zero_shot", "linear_probe"):
        raise ConfigError(f"--caption {args.caption}: {args.task} reads no captions")


def _evaluate_encoders(args: argparse.Namespace) -> int:
    from pretrain.checkpoints.loading import load_model
    from pretrain.evaluation import evaluate
    from pretrain.runtime import distributed

    config = evaluate.EvalConfig(tasks=[args.task or "retrieval"], probe_train=args.train_data, language=args.language)
    if args.classes:
        config.classes = args.classes
    config.check()
    loaded = load_model(args.run)
    if args.caption and "text" in loaded.decoders:
        loaded.decoders["text"].caption = args.caption
    result = evaluate.evaluate_checkpoint(loaded, args.data, config, distributed.device())
    return _print_result(args, result, evaluate.build_table)


def _evaluate_task(args: argparse.Namespace, finetuned: Any) -> int:
    from finetune import evaluate
    from pretrain.runtime import distributed

    result = evaluate.run(finetuned, args.data, distributed.device(), train=args.train_data)
    return _print_result(args, result, evaluate.summary)


def _evaluate_wise(args: argparse.Namespace) -> int:
    from finetune import loading, wise_ft
    from pretrain.runtime import distributed

    tuned = loading.load(args.run, args.caption)
    result = wise_ft.run(tuned, args.data, args.wise, distributed.device(), args.pretrained, args.out, args.caption)
    return _print_result(args, result, wise_ft.summary)


def _evaluate_grounding(args: argparse.Namespace) -> int:
    from finetune import loading
    from finetune.grounding import evaluate
    from pretrain.runtime import distributed

    config = evaluate.GroundingConfig(method=args.maps)
    config.check()
    result = evaluate.evaluate_checkpoint(loading.load(args.run, args.caption), args.data, config, distributed.device())
    return _print_result(args, result, evaluate.build_table)


def _print_result(args: argparse.Namespace, result: dict[str, Any], summary: Callable[[dict[str, Any]], Any]) -> int:
    if args.json:
        print(json.dumps(result))
    else:
        from rich.console import Console

        Console().print(summary(result))
    return DONE


def attend(args: argparse.Namespace) -> int:
    """Run `clipfuse attend`."""
    check_run(args.run)
    import_models()
    from finetune import loading
    from finetune.explain import word_maps
    from pretrain.checkpoints.loading import load_model
    from pretrain.model import on_device
    from pretrain.runtime import distributed

    word_maps.check_method(args.maps, args.layer)
    if loading.is_finetuned(args.run):
        finetuned = loading.load(args.run)
        data = word_maps.read_file(args.image, finetuned.model.subject)
        with on_device(finetuned.model, finetuned.config, distributed.device()):
            maps = word_maps.compute_word_maps(finetuned, data, args.text, args.maps, args.layer)
    else:
        encoders = load_model(args.run)
        if args.maps != word_maps.SIMILARITY:
            raise UserError(
                f"{args.run} holds encoders without a task, so there is no attention to draw: fine-tune them with "
                f"`clipfuse finetune CONFIG init={args.run}`, or draw --maps similarity"
            )
        data = word_maps.read_file(args.image, "image" if "image" in encoders.decoders else "audio")
        with on_device(encoders.model, encoders.config, distributed.device()) as model:
            maps = word_maps.compute_encoder_maps(model, encoders.decoders, data, args.text)
    word_maps.save_figure(maps, args.out)
    print(*maps.caption_lines(), f"wrote {args.out}", sep="\n")
    return DONE
