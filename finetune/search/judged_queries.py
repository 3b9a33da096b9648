"""Files of queries and of judgments, which say what a search should find.

    {"id": "q1", "text": "black leather sofa", "filter": "price < 900", "not": ["striped"], "keys": ["shop-0000/0000007"]}
    q1 0 shop-0000/0000007 3

The first is a line of a queries file; only `id` and `text` are needed, and `keys` are images that count as right where there is
no file of judgments. The second is a line of TREC's qrels: query, a column that does not count, key, grade. Tabs separate the
columns, or spaces where the line has no tab. Images without a grade have grade 0.

Imports no torch, so that mistakes show at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from pretrain.data.filter_parser import parse_filter
from pretrain.errors import ConfigError, UserError, closest
from pretrain.runtime.files import read_bytes

Judgments = dict[str, dict[str, int]]
"""Query -> key -> grade."""

MAX_GRADE = 100
"""trec_eval counts images of each grade up to the highest."""
_MOST_BYTES = 1 << 32
_FIELDS = ("id", "text", "filter", "not", "keys", "attributes")


@dataclass(frozen=True)
class JudgedQuery:
    """A line of a queries file."""

    id: str
    text: str
    filter: str | None = None
    unwanted: tuple[str, ...] = ()
    keys: tuple[str, ...] = field(default=())
    """Images that count as right."""


def read_queries(path: Path) -> list[JudgedQuery]:
    """Read a queries file. Raises ConfigError where there is none, UserError for a line that is wrong, with its number."""
    queries: dict[str, JudgedQuery] = {}
    for where, line in _read_lines(path, "--queries"):
        query = _parse_query(line, where)
        if query.id in queries:
            raise UserError(f"{where}: the id {query.id!r} was there before")
        queries[query.id] = query
    if not queries:
        raise UserError(f"--queries {path} holds no queries")
    return list(queries.values())


def read_judgments(path: Path) -> Judgments:
    """Read a file of judgments. Raises ConfigError where there is none, UserError for a line that is wrong, with its number."""
    judgments: Judgments = {}
    for where, line in _read_lines(path, "--qrels"):
        columns = line.split("\t") if "\t" in line else line.split()
        if len(columns) != 4:
            raise UserError(f"{where}: {len(columns)} columns instead of 4, which are query, 0, key and grade: {line[:80]!r}")
        query, _, key, word = (column.strip() for column in columns)
        if not re.fullmatch(r"[-+]?[0-9]{1,9}", word) or int(word) > MAX_GRADE:
            raise UserError(f"{where}: the grade {word[:80]!r} must be a whole number of at most {MAX_GRADE}")
        grade = max(int(word), 0)  # TREC's negative grades mean spam
        if judgments.setdefault(query, {}).setdefault(key, grade) != grade:
            raise UserError(f"{where}: {query} and {key} were there before, with grade {judgments[query][key]}")
    if not judgments:
        raise UserError(f"--qrels {path} holds no judgments")
    return judgments


def _read_lines(path: Path, option: str) -> Iterator[tuple[str, str]]:
    """Yield each line that is not blank, behind the words that name it in messages."""
    if not path.is_file():
        raise ConfigError(f"{option} {path}: there is no such file")
    try:
        content = read_bytes(path, _MOST_BYTES)
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be read: {error.strerror or error}") from error
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        where = f"{option} {path}, line {number}"
        try:
            text = line.decode().strip("\r")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: no UTF-8: {error}") from error
        if text.strip():
            yield where, text


def _parse_query(line: str, where: str) -> JudgedQuery:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f'{where}: no JSON object such as {{"id": "q1", "text": "a red car"}}: {line[:80]!r}')
    if unknown := [name for name in values if name not in _FIELDS]:
        known = ", ".join(_FIELDS)
        raise UserError(f"{where}: no field is called {unknown[0]!r}{closest(unknown[0], list(_FIELDS))}; there are {known}")
    number = values.get("id")
    if isinstance(number, bool) or not isinstance(number, int | str) or not str(number).strip():
        _refuse(where, "id", number, "a text or a whole number")
    text, condition = values.get("text"), values.get("filter")
    if not isinstance(text, str) or not text.strip():
        _refuse(where, "text", text, "the words of the query")
    if condition is not None and not isinstance(condition, str):
        _refuse(where, "filter", condition, """a condition such as "price < 900\"""")
    if condition is not None:
        try:
            parse_filter(condition, "filter")
        except ConfigError as error:
            raise UserError(f"{where}: {error}") from error
    return JudgedQuery(
        str(number).strip(), text, condition, _read_texts(values, "not", where), _read_texts(values, "keys", where)
    )


def _read_texts(values: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    """Return a field that holds one text or a list of them. Raises UserError."""
    value = values.get(name)
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        _refuse(where, name, value, "a list of texts that are not empty")
    return tuple(texts)


def _refuse(where: str, name: str, value: Any, valid: str) -> NoReturn:
    shown = "missing" if value is None else repr(value)[:80]
    raise UserError(f"{where}: {name} is {shown}, and must be {valid}")
