"""clipfuse evaluate DB --queries FILE: how well an index answers queries, before and after re-ranking."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli.runs import check_run, import_models
from pretrain.config.arguments import nonempty_path, positive_int
from pretrain.errors import ConfigError
from pretrain.printable import one_safe_line
from pretrain.runtime.entrypoint import DONE

if TYPE_CHECKING:
    from finetune.search.judged_queries import JudgedQuery
    from finetune.search.vector_index import VectorIndex

_OF_INDEXES = ("qrels", "rerank", "candidates", "filter", "hybrid", "model", "backend")
_INDEX_FILES = ("index.json", "commits.txt")  # of finetune.search.backends.exact, which takes a while to import
_OF_RUNS = ("data", "task", "train_data", "classes", "caption", "wise", "pretrained", "out")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that only evaluations of an index have."""
    group = parser.add_argument_group("an index, with --queries")
    group.add_argument(
        "--queries", type=nonempty_path, metavar="FILE", help='jsonl: {"id", "text"}, and "filter", "not", "keys"'
    )
    group.add_argument(
        "--qrels",
        type=nonempty_path,
        metavar="FILE",
        help="TREC's judgments: query, 0, key, grade (default: the keys of each query, or those with its text as caption)",
    )
    group.add_argument("--rerank", metavar="RUN", help="a fine-tuned retrieval run: figures before and after it")
    group.add_argument("--candidates", type=positive_int, metavar="N", help="results that --rerank orders (default 32)")
    group.add_argument("--filter", metavar="CONDITION", help="a filter on all queries, besides their own")
    group.add_argument("--hybrid", action="store_true", default=None, help="figures with BM25 over captions, too, as in search")
    group.add_argument("--run", dest="model", metavar="RUN", help="the model of the index, where it is no longer in its place")
    group.add_argument("--backend", choices=["exact", "milvus"], help="instead of what the name of the place says")


def check_options(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that do not go together."""
    names = _OF_RUNS if args.queries is not None else _OF_INDEXES
    if wrong := [name for name in names if getattr(args, name) is not None]:
        option = "--run" if wrong[0] == "model" else f"--{wrong[0].replace('_', '-')}"
        if args.queries is not None:
            raise ConfigError(f"{option} evaluates a run, and does not go with --queries, which evaluates an index")
        raise ConfigError(f"{option} evaluates an index, and needs --queries FILE")
    if args.queries is None and all((Path(args.run) / name).is_file() for name in _INDEX_FILES):
        raise ConfigError(f"{args.run} is an index, which --queries FILE evaluates")


def evaluate(args: argparse.Namespace) -> int:
    """Run `clipfuse evaluate DB --queries FILE`."""
    from finetune.search import judged_queries, places
    from launch.cli.progress import progress_bar
    from pretrain.data.filter_parser import parse_filter

    for run in (args.rerank, args.model):
        if run is not None:
            check_run(run)
    if args.filter is not None:
        parse_filter(args.filter, "--filter")
    queries = judged_queries.read_queries(args.queries)
    judgments = None if args.qrels is None else judged_queries.read_judgments(args.qrels)
    with places.open_index(args.run, args.backend) as opened:
        _check_filters(opened, args, queries)
        places.check_not_empty(opened)
        import_models(is_search=True)
        from rich.console import Console

        from finetune import loading
        from finetune.search import evaluation
        from finetune.search.query import CANDIDATES, Searcher, load_query_model
        from pretrain.runtime import distributed

        reranker = loading.load(args.rerank) if args.rerank is not None else None
        searcher = Searcher(opened, load_query_model(opened, args.model), distributed.device(), reranker)
        with progress_bar("queries") as progress:
            result = evaluation.evaluate_index(
                searcher, queries, judgments, args.filter, args.candidates or CANDIDATES, progress, bool(args.hybrid)
            )
    if args.json:
        print(json.dumps(result))
        return DONE
    Console().print(evaluation.build_table(result))
    for note in result["notes"][:20]:
        print(one_safe_line(note))
    return DONE


def _check_filters(index: VectorIndex, args: argparse.Namespace, queries: Sequence[JudgedQuery]) -> None:
    """Raise ConfigError for a filter with names or kinds of fields that the index does not have, before a model is loaded."""
    if args.filter is not None:
        index.count(args.filter)
    for condition, query in {query.filter: query.id for query in reversed(queries)}.items():
        try:
            index.count(condition)
        except ConfigError as error:
            raise ConfigError(f"--queries {args.queries}, query {query}: {str(error).removeprefix('--filter: ')}") from error
