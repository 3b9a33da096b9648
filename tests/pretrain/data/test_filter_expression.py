"""Conditions on fields, held against SQLite, whose logic has three values, too."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.filter_parser import parse_filter
from pretrain.errors import ConfigError

KINDS = {"price": "number", "count": "number", "room": "text", "title": "text", "sold": "flag"}
TEXTS = [
    "living",
    "Living",
    "a%b",
    "a_b",
    "axb",
    "a\\b",
    "",
    "it's",
    'say "hi"',
    "two\nlines",
    "tab\t",
    "\\",
    "%",
    "ä",
    "猫🐈",
    "' or 1=1 --",
]
NUMBERS: list[Any] = [0, 1, -1, 2.5, 900, 899.99, 1e-3, 10**15]
PATTERNS = ["%", "_", "a_b", "a%b", "a\\%b", "a\\_b", "a\\\\b", "%i%", "l%g", "", "%'%", '%"%', "__", "\\\\", "_🐈"]


def quote(text: str, pattern: bool = False) -> str:
    """A text of the language; a pattern's own backslashes before % and _ stay."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


def render(value: Any) -> tuple[str, str]:
    """A value in our language, and in SQL."""
    if isinstance(value, bool):
        return str(value).lower(), str(int(value))
    if isinstance(value, str):
        return quote(value), "'" + value.replace("'", "''") + "'"
    return repr(value), repr(value)


def values(kind: str) -> st.SearchStrategy[Any]:
    return {"number": st.sampled_from(NUMBERS), "text": st.sampled_from(TEXTS), "flag": st.booleans()}[kind]


@st.composite
def leaves(draw: st.DrawFn) -> tuple[str, str]:
    name = draw(st.sampled_from(list(KINDS)))
    kind = KINDS[name]
    form = draw(st.sampled_from(["compare", "mirror", "fields", "in", "exists", *(["like"] if kind == "text" else [])]))
    operator = draw(st.sampled_from(["==", "!="] if kind == "flag" else ["==", "!=", "<", "<=", ">", ">=", "="]))
    negated = draw(st.sampled_from(["", "not "]))
    if form == "exists":
        return f"exists {name}", f"{name} is not null"
    if form == "in":
        rendered = [render(value) for value in draw(st.lists(values(kind), min_size=1, max_size=3))]
        ours, sql = (", ".join(column) for column in zip(*rendered, strict=True))
        return f"{name} {negated}in [{ours}]", f"{name} {negated}in ({sql})"
    if form == "like":
        pattern = draw(st.sampled_from(PATTERNS))
        return f"{name} {negated}like {quote(pattern)}", f"{name} {negated}like {render(pattern)[1]} escape '\\'"
    if form == "fields":
        other = draw(st.sampled_from([field for field, its in KINDS.items() if its == kind]))
        return f"{name} {operator} {other}", f"{name} {operator} {other}"
    ours, sql = render(draw(values(kind)))
    return (
        (f"{name} {operator} {ours}", f"{name} {operator} {sql}")
        if form == "compare"
        else (
            f"{ours} {operator} {name}",
            f"{sql} {operator} {name}",
        )
    )


def conditions() -> st.SearchStrategy[tuple[str, str]]:
    def combine(inner: st.SearchStrategy[tuple[str, str]]) -> st.SearchStrategy[tuple[str, str]]:
        pairs = st.tuples(inner, st.sampled_from(["and", "or"]), inner)
        return st.one_of(
            inner.map(lambda c: (f"not ({c[0]})", f"not ({c[1]})")),
            pairs.map(lambda p: (f"({p[0][0]}) {p[1]} ({p[2][0]})", f"({p[0][1]}) {p[1]} ({p[2][1]})")),
            pairs.map(lambda p: (f"{p[0][0]} {p[1]} {p[2][0]}", f"{p[0][1]} {p[1]} {p[2][1]}")),  # precedence
        )

    return st.recursive(leaves(), combine, max_leaves=6)


ROWS = st.fixed_dictionaries({name: st.none() | values(kind) for name, kind in KINDS.items()})


@settings(max_examples=100, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=4), conditions())
def test_conditions_have_the_truth_values_of_sql(rows: list[dict[str, Any]], condition: tuple[str, str]) -> None:
    database = sqlite3.connect(":memory:")
    database.execute("pragma case_sensitive_like = on")
    database.execute(f"create table t ({', '.join(KINDS)})")
    database.executemany(
        f"insert into t values ({','.join('?' * len(KINDS))})", [tuple(row[name] for name in KINDS) for row in rows]
    )
    expected = [
        None if value is None else bool(value) for (value,) in database.execute(f"select {condition[1]} from t order by rowid")
    ]
    parsed = parse_filter(condition[0], "--filter")
    assert [parsed.evaluate(row) for row in rows] == expected, condition


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("price < 900", {"price": "cheap"}, None),  # of another kind
        ("not (price < 900)", {"price": "cheap"}, None),
        ("price < 900", {"price": float("nan")}, None),
        ("exists price", {"price": float("inf")}, False),
        ("price == 1", {"price": True}, None),  # true is no number
        ("sold", {"sold": True}, True),
        ("not sold", {"sold": True}, False),
        ("sold", {"sold": 1}, None),
        ("json.width >= 200 and json.similarity > 0.28", {"json": {"width": 200, "similarity": 0.3}}, True),
        ("json.width >= 200", {"json": [200]}, None),
        ("a.b == 1", {"a.b": 1, "a": {"b": 2}}, True),  # a field of the whole name comes first
        ("`aspect ratio` > 1", {"aspect ratio": 1.5}, True),
        ("room IN ('living') AND NOT sold", {"room": "living", "sold": False}, True),
        ("price in []", {"price": 1}, False),
        ("price not in []", {"price": 1}, True),
        ("title like 'A%'", {"title": "apple"}, False),  # case matters
        ("room == 'x\\' or room == \\'y'", {"room": "y"}, False),
        ("1_000 < price", {"price": 1001}, True),
        ("price > -.5e+1", {"price": -4}, True),
    ],
)  # fmt: skip
def test_values(text: str, values: dict[str, Any], expected: bool | None) -> None:
    assert parse_filter(text, "--filter").evaluate(values) is expected
    assert parse_filter(text, "--filter").matches(values) is (expected is True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--filter is empty; give a condition such as price < 900"),
        ("price <", "column 8: a number, a text in quotes, true, false or the name of a field, but the text ends"),
        ("price < 900)", "column 12: and, or, or the end, not ')'"),
        ("(price < 900", "column 13: and, or, or a closing parenthesis, but the text ends"),
        ("price < 900 room", "column 13: and, or, or the end, not 'room'"),
        ("1 < price < 9", "a < b < c is written a < b and b < c"),
        ("a && b", "column 3: write and, not &&"),
        ("price is null", "write exists FIELD or not exists FIELD, not is"),
        ("price == null", "write exists FIELD or not exists FIELD, not null"),
        ('room == "living', "column 9: a text without its closing quote"),
        ("room == living room", "column 16: and, or, or the end"),
        ("room like 5", "column 11: a pattern in quotes"),
        ('room in ["a", 1]', "column 15: values of one kind"),
        ("sold < true", "true and false have no order"),
        ('room == "\\q"', "no \\q"),
        ("price == 1e999", "a number that a computer can hold"),
        ("price == 12abc", "column 10: '12abc' is not understood"),
        ("price == 1; import os", "column 11: ';' is not understood"),
        ("__import__('os').system('ls')", "column 17: \".system('ls')\" is not understood"),
        ("5", "column 2: one of =="),
        ("(" * 100 + "a" + ")" * 100, "more than 64 parentheses"),
        ("price ** 2", "'**' is not understood"),
    ],
)
def test_what_is_no_condition_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_filter(text, "--filter")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_long_conditions_need_no_deep_stack() -> None:
    text = " or ".join(f"price == {i}" for i in range(5000))
    assert parse_filter(text, "--filter").matches({"price": 4999})
    assert parse_filter("not " * 5001 + "sold", "--filter").matches({"sold": False})
