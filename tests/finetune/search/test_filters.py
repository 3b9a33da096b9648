"""Filters translated for Arrow and Milvus find what evaluation row by row finds."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.search.fields import Field, parse_fields, read_fields
from finetune.search.filters import bind, to_mask, to_milvus
from pretrain.data.filter_expression import And, Comparison, Exists, FieldComparison, Filter, Like, Membership, Or
from pretrain.data.filter_parser import parse_filter
from pretrain.errors import ConfigError

KINDS = {"price": "float", "count": "int", "room": "str", "title": "str", "sold": "bool"}
ARROW = {"float": pa.float64(), "int": pa.int64(), "str": pa.string(), "bool": pa.bool_()}
VALUES: dict[str, list[Any]] = {
    "float": [0.0, -1.5, 2.0, 900.0, 1e-5, 1e16, 123456789.125],
    "int": [0, -1, 2, 3, 2**62, -(2**63), 2**63 - 1],
    "str": [
        "living",
        "a%b",
        "a_b",
        "axb",
        "a\\b",
        "",
        "it's",
        'say "hi"',
        "two\nlines",
        "\r\t",
        "\\",
        "%",
        "猫🐈",
        '" or price > 0 --',
    ],
    "bool": [True, False],
}
NUMBERS: list[Any] = [0, 2, 2.0, 2.5, -1.5, 900, 2**62, 2**63, -(2**64), 1e-5, 1e16, 10**20]
PATTERNS = ["%", "_", "a_b", "a\\%b", "a\\_b", "a\\\\b", "a\\b", "\\", "%\n%", "%'%", '%"%', "", "__", "%🐈", "(.*)", "%or%"]


def rows() -> st.SearchStrategy[list[dict[str, Any]]]:
    row = {name: st.none() | st.sampled_from(VALUES[kind]) for name, kind in KINDS.items()}
    return st.lists(st.fixed_dictionaries(row), min_size=1, max_size=8)


@st.composite
def leaves(draw: st.DrawFn) -> Filter:
    name = draw(st.sampled_from(list(KINDS)))
    kind = KINDS[name]
    operators = st.sampled_from(["==", "!="] if kind == "bool" else ["==", "!=", "<", "<=", ">", ">="])
    values = st.sampled_from(NUMBERS if kind in ("float", "int") else VALUES[kind])
    negated = draw(st.booleans())
    form = draw(st.sampled_from(["compare", "in", "exists", "fields", *(["like"] * 2 if kind == "str" else [])]))
    if form == "in":
        return Membership(name, tuple(draw(st.lists(values, max_size=3))), negated)
    if form == "exists":
        return Exists(name, negated)
    if form == "like":
        return Like(name, draw(st.sampled_from(PATTERNS)), negated)
    if form == "fields":
        group = ("float", "int") if kind in ("float", "int") else (kind,)
        if kind != "float":  # doubles cannot hold every whole number of 64 bits
            group = (kind,)
        others = [other for other, its in KINDS.items() if its in group and (kind != "float" or its == "float")]
        return FieldComparison(name, draw(operators), draw(st.sampled_from(others)))
    return Comparison(name, draw(operators), draw(values))


def conditions() -> st.SearchStrategy[Filter]:
    def combine(inner: st.SearchStrategy[Filter]) -> st.SearchStrategy[Filter]:
        parts = st.lists(inner, min_size=2, max_size=3).map(tuple)
        return parts.map(And) | parts.map(Or)

    return st.recursive(leaves(), combine, max_leaves=5)


@settings(max_examples=60, deadline=None)
@given(rows(), conditions())
def test_arrow_finds_what_evaluation_finds(values: list[dict[str, Any]], condition: Filter) -> None:
    expected = [condition.matches(row) for row in values]
    bound = bind(condition, KINDS, "--filter")
    table = pa.table({name: pa.array([row[name] for row in values], ARROW[kind]) for name, kind in KINDS.items()})
    assert to_mask(bound, table).tolist() == expected
    assert [bound.matches(row) for row in values] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("price < 900", "f_price < 900.0"),
        ('room == "x\\" or 1 == 1 --"', 'room == "x\\" or 1 == 1 --"'),
        ("room == 'a\\\\'", 'room == "a\\\\"'),
        ("room != 'a\\nb'", 'room is not null and room != "a\\nb"'),
        ("not (room like '50\\%%')", 'room is not null and not (room like "50\\\\%%")'),
        ("count < 2.5 or count > 2.5", "(count <= 2) or (count >= 3)"),
        ("count == 2.5", "count is null and count is not null"),
        ("sold and not exists price", "(sold == true) and (f_price is null)"),
        ("count in [1, 2.5, 3]", "count in [1, 3]"),
    ],
)
def test_expressions_of_milvus(text: str, expected: str) -> None:
    bound = bind(parse_filter(text, "--filter"), KINDS, "--filter")
    assert to_milvus(bound, {name: name for name in KINDS} | {"price": "f_price"}) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prise < 900", "the index has no field 'prise'; did you mean 'price'?; it has price, count, room, title, sold"),
        ("price < 'cheap'", "price is a number and cannot be compared with 'cheap'"),
        ("room == 3", "room is a text and cannot be compared with 3"),
        ("sold == 1", "sold is true or false and cannot be compared with 1"),
        ("count in ['a']", "count is a whole number and cannot be compared with 'a'"),
        ("price like '9%'", "like needs a text, and price is a number"),
        ("price == room", "price (float) and room (str) cannot be compared"),
        ("sold < sold", "which have no order"),
        ("room", "room is a text and cannot be compared with true"),
    ],
)
def test_filters_that_do_not_fit_the_fields_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        bind(parse_filter(text, "--filter"), KINDS, "--filter")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_fields_from_json() -> None:
    fields = parse_fields("price:float, stock:int,tags:str,sold:bool,size.width:int")
    values = {"price": "12.50", "stock": 3.0, "tags": ["red", "old"], "sold": "True", "size": {"width": 9}}
    assert read_fields(fields, values) == ({"price": 12.5, "stock": 3, "tags": "red, old", "sold": True, "size.width": 9}, [])
    unfit = {"price": "cheap", "stock": 2.5, "tags": {"a": 1}, "sold": 1, "size": None}
    assert read_fields(fields, unfit) == (
        dict.fromkeys(["price", "stock", "tags", "sold", "size.width"]),
        ["price", "stock", "tags", "sold"],
    )
    assert read_fields([Field("price", "float")], {"price": float("nan")}) == ({"price": None}, [])
    assert read_fields([Field("n", "int")], {"n": 2**64})[1] == ["n"]
    assert read_fields([Field("x", "float")], {"x": 10**400})[1] == ["x"]


@pytest.mark.parametrize("text", ["price", "price:number", ":float", "key:str", "a:str,a:int"])
def test_fields_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--fields"):
        parse_fields(text)
