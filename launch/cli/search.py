"""clipfuse index, search and serve: images or sounds into an index, and queries in words that find them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cli.command import Subparsers, add_command
from launch.cli.runs import check_run, import_models
from pretrain.config.arguments import positive_int, whole_number
from pretrain.errors import ConfigError, UserError
from pretrain.printable import one_safe_line
from pretrain.runtime.entrypoint import DONE, STOPPED, EarlyStop, raise_on_stop_signals

if TYPE_CHECKING:
    from finetune.search.query import Result, Results

_PLACE = (
    "a folder; NAME.db, a folder of Milvus Lite; or http(s)://HOST:PORT/COLLECTION, a Milvus server (token in MILVUS_TOKEN)"
)


def add_commands(commands: Subparsers[argparse.ArgumentParser]) -> None:
    """Add index, search and serve."""
    p = add_command(commands, "index", index, "images or sounds into an index that search reads", reads_runs=True)
    p.add_argument("run", metavar="RUN", help="a run folder, a checkpoint folder, or a published CLIP")
    p.add_argument("--data", required=True, nargs="+", metavar="DATA", help="shards, folders of files, or what embed wrote")
    p.add_argument("--db", required=True, metavar="PLACE", help=f"the index: {_PLACE}")
    p.add_argument("--fields", default="", metavar="NAME:KIND,...", help="fields of the json to keep: float, int, bool or str")
    p.add_argument("--images", nargs="+", default=[], metavar="SHARDS", help="with what embed wrote: the shards it read")
    p.add_argument("--only", default="", metavar="MODALITY", help="image or audio (default: image where RUN has such a tower)")
    p.add_argument("--name", default="", metavar="NAME", help="precedes the keys, for sources whose keys are the same")
    p.add_argument("--replace", action="store_true", help="encode again what the index has")
    p.add_argument("--caption", default="", metavar="FIELD", help="txt, or a field of the json (default: the model's)")
    p.add_argument("--batch-size", type=positive_int, default=64, metavar="N", help="items encoded at a time (default 64)")
    p.add_argument(
        "--dim", type=positive_int, metavar="N", help="keep the first N numbers of embeddings, as loss.matryoshka trained them"
    )
    p.add_argument(
        "--rerank", metavar="RUN", help="keep the token features of a retrieval run, so that search --rerank is fast"
    )
    p.add_argument(
        "--pool", type=whole_number(1, 16), default=1, metavar="N", help="of --rerank: keep means of N x N regions (default 1)"
    )
    p.add_argument(
        "--compact",
        action="store_true",
        help="give back the space of what was replaced (default: where they are more than half)",
    )
    p.add_argument("--backend", choices=["exact", "milvus"], help="instead of what the name of the place says")
    p.add_argument("--json", action="store_true", help="print one JSON object at the end")

    p = add_command(
        commands, "search", search, "images or sounds that a text describes, or that are like a file", reads_runs=True
    )
    p.add_argument("db", metavar="PLACE", help="the index, as `clipfuse index --db` made it")
    p.add_argument("text", metavar="TEXT", nargs="?", default="", help="what the images show, or the sounds are of")
    p.add_argument("--image", type=Path, metavar="FILE", help="an image that they are like, alone or with TEXT")
    p.add_argument("--audio", type=Path, metavar="FILE", help="a sound that they are like, alone or with TEXT")
    p.add_argument("--like", default="", metavar="KEY", help="an image or a sound of the index that they are like")
    p.add_argument(
        "--not", dest="unwanted", action="append", default=[], metavar="TEXT", help="what they do not show; repeatable"
    )
    p.add_argument("--filter", metavar="CONDITION", help="""on fields: 'price < 900 and room == "living"'""")
    p.add_argument("--hybrid", action="store_true", help="captions that hold the words of TEXT count, too (BM25)")
    p.add_argument("--rerank", metavar="RUN", help="a fine-tuned retrieval run, which orders the best candidates again")
    p.add_argument("--candidates", type=positive_int, default=32, metavar="N", help="results that --rerank orders (default 32)")
    p.add_argument("--k", type=positive_int, default=10, metavar="N", help="results (default 10)")
    p.add_argument("--run", metavar="RUN", help="the model of the index, where it is no longer in its place")
    p.add_argument("--backend", choices=["exact", "milvus"], help="instead of what the name of the place says")
    p.add_argument("--maps", type=Path, metavar="DIR", help="draw where --rerank looked for each word, in each result")
    p.add_argument(
        "--maps-method",
        metavar="METHOD",
        help="raw, rollout, gradcam, relevance, similarity (default raw); similarity needs no --rerank",
    )
    p.add_argument("--log", type=Path, metavar="FILE", help="append one JSON line about the query")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")

    p = add_command(commands, "serve", serve, "a page where a sentence finds images or sounds", reads_runs=True)
    p.add_argument("db", metavar="PLACE", help="the index, as `clipfuse index --db` made it")
    p.add_argument("--rerank", metavar="RUN", help="a fine-tuned retrieval run, which also shows where each word looked")
    p.add_argument("--vqa", metavar="RUN", help="a fine-tuned vqa run, which answers questions about results")
    p.add_argument("--run", metavar="RUN", help="the model of the index, where it is no longer in its place")
    p.add_argument("--backend", choices=["exact", "milvus"], help="instead of what the name of the place says")
    p.add_argument("--log", type=Path, metavar="FILE", help="append one JSON line about each query")
    p.add_argument("--host", default="127.0.0.1", help="where to listen; another address lets other machines in")
    p.add_argument(
        "--port", type=whole_number(0, 65535), default=8000, metavar="N", help="port (default 8000; 0: any free one)"
    )


def index(args: argparse.Namespace) -> int:
    """Run `clipfuse index`; a signal to stop ends it with exit code 75."""
    for run in (args.run, args.rerank):
        if run is not None:
            check_run(run)
    if args.pool != 1 and args.rerank is None:
        raise ConfigError("--pool goes with --rerank, whose token features it makes smaller")
    from finetune.search.fields import parse_fields

    parse_fields(args.fields)  # before torch is imported
    try:
        with raise_on_stop_signals():
            return _index(args)
    except EarlyStop as stop:
        from pretrain.runtime.console import log_info

        log_info(f"stopped by {stop}; what is in the index stays, and the same command goes on")
        return STOPPED


def _index(args: argparse.Namespace) -> int:
    import_models()
    from dataclasses import asdict

    from finetune import loading
    from finetune.search import compaction, embeddings, indexing, item_sources, opening, reranking
    from launch.cli.progress import progress_bar
    from pretrain.checkpoints.loading import load_model
    from pretrain.embedding.dataset import is_embedding_folder
    from pretrain.runtime import distributed

    options = opening.IndexOptions(
        args.backend, args.fields, args.name, args.replace, args.caption, args.batch_size, args.dim, args.only
    )
    options.check()
    embedded = [place for place in args.data if is_embedding_folder(place)]
    if embedded and len(args.data) > 1:
        raise ConfigError(f"--data {embedded[0]} holds embeddings: index it by a command of its own")
    if args.images and not embedded:
        raise ConfigError("--images goes with --data that clipfuse embed wrote")
    shards = args.images if embedded else args.data
    if args.rerank is not None and not shards:
        raise ConfigError("--rerank with --data that clipfuse embed wrote needs --images: it reads the files themselves")
    loaded = load_model(args.run)
    wanted = args.only or (embeddings.find_only_modality(Path(embedded[0])) if embedded else "")
    options.modality = opening.find_modality(loaded, wanted, args.db, args.backend)
    where = "--images" if embedded else "--data"
    source = item_sources.open_sources(shards, where, options.modality) if shards else None
    tuned = loading.load(args.rerank) if args.rerank is not None else None
    if tuned is not None:
        with opening.open_for(args.db, loaded, options) as opened:
            reranking.check_store(tuned, opened, args.pool)
    with progress_bar("indexing") as progress:
        if embedded:
            summary = embeddings.index_embeddings(loaded, Path(embedded[0]), source, args.db, options, progress)
        else:
            assert source is not None
            summary = indexing.index_items(loaded, source, args.db, options, distributed.device(), progress)
    tokens = None
    if tuned is not None:
        assert source is not None
        with progress_bar("token features") as progress, opening.open_for(args.db, loaded, options) as opened:
            tokens = reranking.index_tokens(
                tuned, source, opened, args.name, args.pool, args.batch_size, distributed.device(), progress
            )
    freed = compaction.compact(args.db, args.backend, 0.0 if args.compact else compaction.WASTEFUL)
    if args.json:
        record = asdict(summary) | {"tokens": asdict(tokens) if tokens is not None else None, "compacted": asdict(freed)}
        print(json.dumps(record), flush=True)
        return DONE
    for line in (summary, tokens, freed if freed.images or freed.tokens else None):
        if line is not None:
            print(one_safe_line(str(line)), flush=True)
    return DONE


def search(args: argparse.Namespace) -> int:
    """Run `clipfuse search`."""
    from finetune.search import places
    from pretrain.data.filter_parser import parse_filter

    condition = parse_filter(args.filter, "--filter") if args.filter is not None else None
    for run in (args.rerank, args.run):
        if run is not None:
            check_run(run)
    image, audio = _read_query_file("--image", args.image), _read_query_file("--audio", args.audio)
    with places.open_index(args.db, args.backend) as opened:
        if condition is not None:
            opened.count(condition)  # names and kinds of fields, before a model is loaded
        places.check_not_empty(opened)
        import_models(is_search=True)
        from finetune import loading
        from finetune.search.query import Query, Searcher, load_query_model
        from pretrain.runtime import distributed

        query = Query(args.text, image, args.like, args.unwanted, args.filter, args.k, args.candidates, args.hybrid, audio)
        query.validate()
        if args.rerank is not None and not args.text.strip():
            raise ConfigError("--rerank needs a text: it scores how well a text and a result match")
        method = _check_maps(args)
        reranker = loading.load(args.rerank) if args.rerank is not None else None
        searcher = Searcher(opened, load_query_model(opened, args.run), distributed.device(), reranker)
        results = searcher.search(query)
        if args.maps is not None:
            from finetune.search.maps import save_maps

            results.notes += save_maps(searcher, results, query.text, args.maps, method)
    files = {name: str(path) if path else None for name, path in (("image", args.image), ("audio", args.audio))}
    record = results.to_record(query) | files | {"rerank": args.rerank}
    if args.log is not None:
        _append(args.log, json.dumps(record))
    if args.json:
        print(json.dumps(record))
        return DONE
    for line in [
        *map(_format_result, range(1, len(results.results) + 1), results.results),
        *results.notes,
        _format_times(results),
    ]:
        print(one_safe_line(line))
    return DONE


def serve(args: argparse.Namespace) -> int:
    """Run `clipfuse serve` until it is interrupted."""
    from finetune.search import places

    for run in (args.rerank, args.vqa, args.run):
        if run is not None:
            check_run(run)
    with places.open_index(args.db, args.backend) as opened:
        import_models(is_search=True)
        from finetune import loading
        from finetune.search.answering import Answerer
        from finetune.search.query import Searcher, load_query_model
        from launch import serve as page
        from pretrain.runtime import distributed

        reranker = loading.load(args.rerank) if args.rerank is not None else None
        answerer = Answerer(loading.load(args.vqa), distributed.device(), opened) if args.vqa is not None else None
        searcher = Searcher(opened, load_query_model(opened, args.run), distributed.device(), reranker)

        def log(record: dict[str, Any]) -> None:
            if args.log is not None:
                _append(args.log, json.dumps(record | {"rerank": args.rerank}))

        page.serve(searcher, args.host, args.port, log, answerer)
    return DONE


def _check_maps(args: argparse.Namespace) -> str:
    """Return the method of --maps. Raises ConfigError where it does not fit the other options."""
    from finetune.explain import word_maps

    method = args.maps_method or word_maps.METHOD
    word_maps.check_method(method)
    if args.maps is None:
        if args.maps_method is not None:
            raise ConfigError(f"--maps-method {method} goes with --maps DIR")
    elif not args.text.strip():
        raise ConfigError("--maps needs a text, for whose words it draws")
    elif args.rerank is None and method != word_maps.SIMILARITY:
        raise ConfigError("--maps needs --rerank RUN, whose attention it draws, or --maps-method similarity")
    return method


def _read_query_file(option: str, path: Path | None) -> bytes:
    if path is None:
        return b""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be read: {error.strerror or error}") from error
    if not content:
        raise UserError(f"{option} {path} is empty")
    return content


def _format_result(position: int, result: Result) -> str:
    """Return the line of a result: position, cosine, the re-ranker's score and its move, key, caption, fields, place."""
    image = result.hit.item
    moved = f"  {result.match:+7.2f} (was {result.rank})" if result.match is not None else ""
    fields = "".join(f"  {name}={value}" for name, value in image.fields.items() if value is not None)
    place = f"  {image.source}{f':{image.offset}' if image.offset >= 0 else ''}" if image.source else ""
    return f"{position:3d}  {result.hit.score:6.3f}{moved}  {image.key}  {image.caption_line[:80]}{fields}{place}"


def _format_times(results: Results) -> str:
    return ", ".join(f"{stage} {milliseconds:,.0f} ms" for stage, milliseconds in results.milliseconds.items())


def _append(path: Path, line: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise UserError(f"--log {path} cannot be written: {error.strerror or error}") from error
