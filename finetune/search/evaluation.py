"""How well an index answers queries: nDCG, MRR and recall by embeddings, with captions and re-ranked.

    result = evaluate_index(searcher, read_queries(path), read_judgments(qrels))

ir-measures computes the measures, from the first DEPTH results of each query. nDCG@10 weighs the grades themselves. MRR and
recall count the images of the highest grade that the judgments give, and leave out queries without such an image. Intervals are
percentiles of the mean under resampling of queries; those of the gain resample differences, query by query.

Judgments count where a query can be answered: of images in the index that its filter lets through. All others are counted
and reported.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from finetune.search.judged_queries import JudgedQuery, Judgments
from finetune.search.query import Query, Result, Searcher
from finetune.search.vector_index import MAX_K, IndexedItem, VectorIndex
from pretrain.data.filter_expression import Comparison, Like, Or
from pretrain.data.filter_parser import parse_filter
from pretrain.errors import UserError
from pretrain.printable import format_count

DEPTH = 100
"""Results of each query that MRR looks at."""
RECALL_AT = (1, 5, 10)
SELECTIVITIES = ((0.01, "at most 1 % pass"), (0.1, "1 to 10 % pass"), (0.5, "10 to 50 % pass"))
"""(most of the share of images that a filter keeps, name of the group)"""
_LARGEST_SELECTIVITY, _NO_FILTER = "over 50 % pass", "no filter"
_RESAMPLES = 2000
_NAMED = 3  # queries or keys that a note names

Measures = dict[str, dict[str, float]]
"""Query -> measure -> value."""


@dataclass(frozen=True)
class Answered:
    """Ranked keys of a query."""

    embeddings: list[str]
    hybrid: list[str]
    """Fused with BM25 over captions; empty where that was not asked for."""
    reranked: list[str]
    selectivity: float | None
    """Share of the images that the filter keeps; None without a filter."""


def evaluate_index(
    searcher: Searcher,
    queries: Sequence[JudgedQuery],
    judgments: Judgments | None,
    condition: str | None = None,
    candidates: int = 32,
    progress: Callable[[int, int], None] = lambda done, total: None,
    is_hybrid: bool = False,
) -> dict[str, Any]:
    """Return measures with intervals, as plain values.

    Args:
        searcher: the index, its model, and perhaps a re-ranker.
        queries: what is searched for.
        judgments: grades; None = `keys` of each query, or the images whose caption is its text.
        condition: a filter on all queries, besides their own.
        candidates: images that the re-ranker orders.
        progress: called with (queries done, all queries).
        is_hybrid: fuse the order of embeddings with that of captions, before the re-ranker.

    Raises:
        UserError: no query has a judgment that counts, or ir-measures is not installed.
        ConfigError: a filter names a field that the index does not have.
    """
    begin = time.perf_counter()
    ir_measures = _import_measures()
    index, notes = searcher.index, list[str]()
    conditions = {query.id: _join_filters(condition, query.filter) for query in queries}
    items = index.count()
    kept = {text: index.count(text) / max(items, 1) for text in set(conditions.values()) if text is not None}
    judged = _select_judgments(index, queries, conditions, judgments, notes)
    judged_queries = [query for query in queries if judged.get(query.id)]
    answers: dict[str, Answered] = {}
    milliseconds: Counter[str] = Counter()
    depth = max(DEPTH, candidates)
    if is_hybrid and judgments is None and not all(query.keys for query in queries):
        notes.append(
            f"the right {index.describe().noun}s are those whose caption is the query, which --hybrid finds by its words: its "
            "figures say nothing about other queries"
        )
    for done, query in enumerate(judged_queries, start=1):
        asked = Query(
            query.text,
            unwanted=list(query.unwanted),
            filter=conditions[query.id],
            k=min(2 * depth, MAX_K) if is_hybrid else depth,  # deep enough that none of the first of either order is missing
            candidates=candidates,
            is_hybrid=is_hybrid,
        )
        found = searcher.search(asked)
        keys = _list_keys(found.results, depth)
        fused = _list_keys(sorted(found.results, key=lambda result: result.rank), depth)
        embedded = [result for result in found.results if result.embedding_rank is not None]
        before = _list_keys(sorted(embedded, key=lambda result: result.embedding_rank or 0), depth)
        text = conditions[query.id]
        answers[query.id] = Answered(before, fused if is_hybrid else [], keys, None if text is None else kept[text])
        milliseconds.update(found.milliseconds)
        notes += [f"{query.id}: {note}" for note in found.notes]
        progress(done, len(judged_queries))

    grade = max(grade for grades in judged.values() for grade in grades.values())
    cutoffs = sorted({*RECALL_AT, candidates} if searcher.reranker is not None else RECALL_AT)
    measures = [ir_measures.nDCG @ 10, ir_measures.RR(rel=grade), *(ir_measures.R(rel=grade) @ k for k in cutoffs)]
    names = dict(zip(map(str, measures), ("ndcg@10", "mrr", *(f"recall@{k}" for k in cutoffs)), strict=True))
    stages = ["embeddings", *(["hybrid"] if is_hybrid else []), *(["reranked"] if searcher.reranker is not None else [])]
    values = {stage: _compute_measures(ir_measures, measures, names, judged, grade, answers, stage) for stage in stages}
    if ungraded := [query.id for query in judged_queries if max(judged[query.id].values()) < grade]:
        count = _count_queries(len(ungraded))
        notes.append(f"{count} without one of grade {grade}, which count for nDCG only: {_name_some(ungraded)}")
    groups = _group_by_selectivity(answers)
    return {
        "index": index.place,
        "images": items,
        "holds": index.describe().noun,
        "queries": len(judged_queries),
        "relevant_grade": grade,
        "filter": condition,
        "rerank": None if searcher.reranker is None else str(searcher.reranker.folder),
        "candidates": candidates,
        "hybrid": is_hybrid,
        "metrics": _summarize(values, list(answers)),
        "selectivity": {name: {"queries": len(ids), **_summarize(values, ids)} for name, ids in groups.items()},
        "by_query": {query: {stage: values[stage][query] for stage in stages} for query in answers},
        "milliseconds": {stage: round(total / len(answers), 2) for stage, total in milliseconds.items()},
        "notes": notes,
        "seconds": round(time.perf_counter() - begin, 3),
    }


def _list_keys(results: Sequence[Result], depth: int) -> list[str]:
    return [result.hit.item.key for result in results[:depth]]


def _import_measures() -> Any:
    try:
        import ir_measures
    except ImportError as error:
        raise UserError("--queries needs ir_measures: `pip install 'clipfuse[search]'`") from error
    return ir_measures


def _join_filters(first: str | None, second: str | None) -> str | None:
    return f"({first}) and ({second})" if first is not None and second is not None else first or second


# ---------------------------------------------------------------------------------------------------------------------
# Which judgments count


def _select_judgments(
    index: VectorIndex,
    queries: Sequence[JudgedQuery],
    conditions: Mapping[str, str | None],
    judgments: Judgments | None,
    notes: list[str],
) -> Judgments:
    """Return the judgments that count, of queries that have one above 0; add notes about all others. Raises UserError."""
    if judgments is None:
        judgments = {query.id: dict.fromkeys(query.keys or _find_caption(index, query.text), 1) for query in queries}
    else:
        names = {query.id for query in queries}
        if others := [query for query in judgments if query not in names]:
            notes.append(f"judgments of {_count_queries(len(others))} not asked: {_name_some(others)}")
    items = _load_items(index, {key for query in queries for key in judgments.get(query.id, {})})
    unknown: dict[str, None] = {}
    rejected, selected = 0, Judgments()
    for query in queries:
        text = conditions[query.id]
        condition = None if text is None else parse_filter(text, "--filter")
        for key, grade in judgments.get(query.id, {}).items():
            if key not in items:
                unknown[key] = None
            elif condition is not None and not condition.matches(items[key]):
                rejected += 1
            else:
                selected.setdefault(query.id, {})[key] = grade
    selected = {query: grades for query, grades in selected.items() if max(grades.values()) > 0}
    if unknown:
        notes.append(f"{format_count(len(unknown), 'judged key')} not in the index, which do not count: {_name_some(unknown)}")
    if rejected:
        notes.append(f"{format_count(rejected, 'judgment')} that the query's filter rejects, which do not count")
    if left_out := [query.id for query in queries if query.id not in selected]:
        count = _count_queries(len(left_out))
        notes.append(f"{count} left out, without a judgment above 0 that counts: {_name_some(left_out)}")
    if not selected:
        raise UserError(f"none of {_count_queries(len(queries))} can be evaluated: {'; '.join(notes)}")
    return selected


def _find_caption(index: VectorIndex, text: str) -> list[str]:
    """Return the keys of the images that have a text as one of their captions."""
    pattern = text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    lines = (f"{pattern}\n%", f"%\n{pattern}", f"%\n{pattern}\n%")
    condition = Or((Comparison("caption", "==", text), *(Like("caption", line) for line in lines)))
    direction = np.zeros((1, index.describe().dim), dtype=np.float32)
    direction[0, 0] = 1  # any direction: the filter decides
    return [hit.item.key for hit in index.search(direction, DEPTH, condition)[0]]


def _load_items(index: VectorIndex, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the fields of the images that the index has."""
    items: dict[str, dict[str, Any]] = {}
    names = sorted(keys)
    for begin in range(0, len(names), 1000):
        part = index.get(names[begin : begin + 1000])
        items |= {item.key: _get_fields(item) for item in part if item is not None}
    return items


def _get_fields(item: IndexedItem) -> dict[str, Any]:
    return {**item.fields, "key": item.key, "source": item.source, "caption": item.caption}


def _count_queries(number: int) -> str:
    return f"{number:,} {'query' if number == 1 else 'queries'}"


def _name_some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


# ---------------------------------------------------------------------------------------------------------------------
# Measures


def _compute_measures(
    ir_measures: Any,
    measures: Sequence[Any],
    names: Mapping[str, str],
    judged: Judgments,
    grade: int,
    answers: Mapping[str, Answered],
    stage: str,
) -> Measures:
    """Return the measures of each query; nDCG only where it has no image of the highest grade."""
    qrels = [ir_measures.Qrel(query, key, value) for query, grades in judged.items() for key, value in grades.items()]
    run = [
        ir_measures.ScoredDoc(query, key, float(-position))  # distinct scores, since ties would be ordered by key
        for query, answer in answers.items()
        for position, key in enumerate(getattr(answer, stage))
    ]
    values: Measures = {
        query: dict.fromkeys(names.values() if max(judged[query].values()) == grade else ["ndcg@10"], 0.0) for query in answers
    }
    for metric in ir_measures.iter_calc(measures, qrels, run) if run else ():
        if names[str(metric.measure)] in values[metric.query_id]:
            values[metric.query_id][names[str(metric.measure)]] = float(metric.value)
    return values


def _group_by_selectivity(answers: Mapping[str, Answered]) -> dict[str, list[str]]:
    """Return the queries of each group that has any, the least selective first; {} where no query has a filter."""
    groups: dict[str, list[str]] = {
        name: [] for name in (_NO_FILTER, _LARGEST_SELECTIVITY, *(name for _, name in reversed(SELECTIVITIES)))
    }
    for query, answer in answers.items():
        share = answer.selectivity
        inside = [name for most, name in SELECTIVITIES if share is not None and share <= most]
        groups[_NO_FILTER if share is None else (*inside, _LARGEST_SELECTIVITY)[0]].append(query)
    filled = {name: ids for name, ids in groups.items() if ids}
    return {} if list(filled) == [_NO_FILTER] else filled


def _summarize(values: Mapping[str, Measures], queries: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Return stage -> measure -> mean, low, high and queries; `gain` is what the last stage adds to embeddings."""
    names = dict.fromkeys(name for query in queries for name in values["embeddings"][query])
    columns = {
        name: {stage: np.array([of[query][name] for query in queries if name in of[query]]) for stage, of in values.items()}
        for name in names
    }
    summary = {stage: {name: bootstrap(columns[name][stage]) for name in names} for stage in values}
    last = list(values)[-1]
    if last != "embeddings":
        summary["gain"] = {name: bootstrap(columns[name][last] - columns[name]["embeddings"]) for name in names}
    return summary


def bootstrap(values: np.ndarray[Any, np.dtype[np.float64]], level: float = 0.95) -> dict[str, float]:
    """Return the mean of values (n,), one a query, with its percentile interval under resampling, and n."""
    random, count = np.random.Generator(np.random.Philox(key=0)), len(values)
    rows = max(1, 1_000_000 // count)  # resamples at a time, for bounded memory
    means = np.concatenate(
        [
            values[random.integers(count, size=(min(rows, _RESAMPLES - first), count))].mean(axis=1)
            for first in range(0, _RESAMPLES, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "queries": count}


# ---------------------------------------------------------------------------------------------------------------------
# The table

_LABELS = {"ndcg@10": "nDCG@10", "mrr": "MRR"}


def build_table(result: dict[str, Any]) -> Table:
    """Show a result of evaluate_index() as a table."""
    stages = list(result["metrics"])
    title = f"{result['index']}: {_count_queries(result['queries'])}, {format_count(result['images'], result['holds'])}"
    times = ", ".join(f"{stage} {milliseconds:,.1f} ms" for stage, milliseconds in result["milliseconds"].items())
    # In 80 columns: no borders, and the number of queries stands once for each group.
    table = Table(title=title, caption=f"{times} a query; intervals of 95 %", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for name in ("measure", *(f"{stage.replace('reranked', 're-ranked')}" for stage in stages)):
        table.add_column(name, justify="left" if name == "measure" else "right", no_wrap=True)
    _add_rows(table, result["metrics"], stages, list(result["metrics"]["embeddings"]), result["queries"])
    for name, group in result["selectivity"].items():
        table.add_section()
        table.add_row(name, _count_queries(group["queries"]), style="dim")
        names = [measure for measure in ("ndcg@10", "mrr", "recall@10") if measure in group["embeddings"]]
        _add_rows(table, group, stages, names, group["queries"])
    return table


def _add_rows(table: Table, metrics: dict[str, Any], stages: Sequence[str], names: Sequence[str], queries: int) -> None:
    """Add a row for each measure; one that is not defined for all `queries` of its group says for how many it is."""
    for name in names:
        cells = [escape(_format(metrics[stage][name], is_gain=stage == "gain")) for stage in stages]
        count = metrics["embeddings"][name]["queries"]
        table.add_row(_LABELS.get(name, name) + (f" ({count:,})" if count != queries else ""), *cells)


def _format(value: dict[str, float], is_gain: bool) -> str:
    return f"{value['mean']:{'+' if is_gain else ''}.3f} [{value['low']:.2f}, {value['high']:.2f}]"
