"""The parser of filter_expression.py's language: a text to a tree of conditions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from pretrain.data.filter_expression import (
    OPERATORS,
    And,
    Comparison,
    Exists,
    FieldComparison,
    Filter,
    Like,
    Membership,
    Or,
    Value,
    have_one_kind,
)
from pretrain.errors import ConfigError

MAX_DEPTH = 64
"""Parentheses within parentheses."""
_MIRRORED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}


@dataclass(frozen=True)
class _Token:
    kind: str
    """name, quoted (a name in backquotes), text, number, symbol, end."""
    text: str
    column: int
    """From 1."""


_TOKEN = re.compile(
    r"""(?P<space>\s+)
    |(?P<number>[-+]?(?:\d+(?:_\d+)*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))
    |(?P<name>[^\W\d]\w*(?:\.\w+)*)
    |`(?P<quoted>[^`]+)`
    |(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    |(?P<symbol>==|!=|<>|<=|>=|&&|\|\||[<>=!()\[\],])""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPES = {'\\"': '"', "\\'": "'", "\\\\": "\\", "\\n": "\n", "\\r": "\r", "\\t": "\t"}
_KEYWORDS = ("and", "or", "not", "in", "like", "exists", "true", "false", "null", "is")
_HINTS = {"&&": "and", "||": "or", "!": "not", "<>": "!="}


def parse_filter(text: str, where: str) -> Filter:
    """Parse a condition.

    Args:
        text: in the language of this module.
        where: the option or setting that holds it, for messages.

    Raises:
        ConfigError: it is none; the message gives the column and what was expected there.
    """
    return _Parser(text, where).parse()


class _Parser:
    """A recursive-descent parser: or, and, not, then comparisons."""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where = text, where
        self.tokens = list(self._split())
        self.next = 0
        self.depth = 0

    def parse(self) -> Filter:
        if self._peek().kind == "end":
            raise ConfigError(f"{self.where} is empty; give a condition such as price < 900")
        parsed = self._parse_or()
        if self._peek().kind != "end":
            self._fail("and, or, or the end")
        return parsed

    # -----------------------------------------------------------------------------------------------------------------
    # Tokens

    def _split(self) -> Iterator[_Token]:
        position = 0
        while position < len(self.text):
            match = _TOKEN.match(self.text, position)
            column = position + 1
            if match is None or match.lastgroup is None:
                rest = self.text[position : position + 20]
                problem = "a text without its closing quote" if rest[0] in "\"'`" else f"{rest.split()[0]!r} is not understood"
                raise ConfigError(f"{self.where} {self.text!r:.200}: column {column}: {problem}")
            position = match.end()
            if match.lastgroup != "space":
                yield _Token(match.lastgroup, match[match.lastgroup], column)
        yield _Token("end", "", len(self.text) + 1)

    def _peek(self) -> _Token:
        return self.tokens[self.next]

    def _take(self) -> _Token:
        token = self._peek()
        self.next += token.kind != "end"
        return token

    def _take_if(self, *words: str) -> str:
        """Take the next token if it is one of these symbols or keywords; return it, or ""."""
        token = self._peek()
        word = _as_keyword(token) if token.kind == "name" else token.text if token.kind == "symbol" else ""
        if word not in words:
            return ""
        self.next += 1
        return word

    def _fail(self, expected: str, token: _Token | None = None) -> NoReturn:
        token = token or self._peek()
        got = f"not {token.text!r:.60}" if token.kind != "end" else "but the text ends"
        if token.text in _HINTS and token.kind == "symbol":
            expected, got = f"write {_HINTS[token.text]}", f"not {token.text}"
        elif _as_keyword(token) in ("is", "null"):
            expected, got = "write exists FIELD or not exists FIELD", f"not {token.text}"
        elif token.kind == "symbol" and token.text in OPERATORS:
            expected = f"{expected}; a < b < c is written a < b and b < c"
        raise ConfigError(f"{self.where} {self.text!r:.200}: column {token.column}: {expected}, {got}")

    # -----------------------------------------------------------------------------------------------------------------
    # Conditions

    def _parse_or(self) -> Filter:
        parts = [self._parse_and()]
        while self._take_if("or"):
            parts.append(self._parse_and())
        return parts[0] if len(parts) == 1 else Or(tuple(parts))

    def _parse_and(self) -> Filter:
        parts = [self._parse_not()]
        while self._take_if("and"):
            parts.append(self._parse_not())
        return parts[0] if len(parts) == 1 else And(tuple(parts))

    def _parse_not(self) -> Filter:
        is_negated = False
        while self._take_if("not"):
            is_negated = not is_negated
        condition = self._parse_condition()
        return condition.negate() if is_negated else condition

    def _parse_condition(self) -> Filter:
        if self._take_if("("):
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise ConfigError(f"{self.where}: more than {MAX_DEPTH} parentheses within parentheses")
            condition = self._parse_or()
            if not self._take_if(")"):
                self._fail("and, or, or a closing parenthesis")
            self.depth -= 1
            return condition
        if self._take_if("exists"):
            return Exists(self._parse_name())
        if self._starts_value():
            value, symbol = self._parse_value(), self._parse_operator()
            return self._compare(self._parse_name(), _MIRRORED[symbol], value)
        return self._parse_comparison(self._parse_name())

    def _parse_comparison(self, name: str) -> Filter:
        """Parse what follows the name of a field."""
        is_negated = bool(self._take_if("not"))
        if self._take_if("in"):
            return Membership(name, self._parse_list(), is_negated)
        if self._take_if("like"):
            token = self._take()
            if token.kind != "text":
                self._fail("a pattern in quotes", token)
            return Like(name, self._unquote(token, is_pattern=True), is_negated)
        if is_negated:
            self._fail("in or like")
        following = self._peek()
        if following.kind == "end" or following.text == ")" or _as_keyword(following) in ("and", "or"):
            return Comparison(name, "==", True)
        symbol = self._parse_operator()
        if self._starts_value():
            return self._compare(name, symbol, self._parse_value())
        if self._peek().kind == "end":
            self._fail("a number, a text in quotes, true, false or the name of a field")
        return FieldComparison(name, symbol, self._parse_name())

    def _compare(self, name: str, symbol: str, value: Value) -> Comparison:
        if isinstance(value, bool) and symbol not in ("==", "!="):
            raise ConfigError(
                f"{self.where} {self.text!r:.200}: true and false have no order: {name} {symbol} {str(value).lower()}"
            )
        return Comparison(name, symbol, value)

    def _parse_operator(self) -> str:
        symbol = self._take_if(*OPERATORS, "=")
        if not symbol:
            self._fail("one of ==, !=, <, <=, >, >=, in, like")
        return "==" if symbol == "=" else symbol

    def _parse_name(self) -> str:
        token = self._take()
        if token.kind == "quoted" or (token.kind == "name" and not _as_keyword(token)):
            return token.text
        self._fail("the name of a field (texts stand in quotes)", token)

    # -----------------------------------------------------------------------------------------------------------------
    # Values

    def _starts_value(self) -> bool:
        token = self._peek()
        return token.kind in ("text", "number") or _as_keyword(token) in ("true", "false")

    def _parse_value(self) -> Value:
        if not self._starts_value():
            self._fail("a number, a text in quotes, true or false")
        token = self._take()
        if token.kind == "text":
            return self._unquote(token)
        if token.kind == "name":
            return _as_keyword(token) == "true"
        number = float(token.text) if re.search(r"[.eE]", token.text) else int(token.text) if len(token.text) < 25 else math.inf
        if not math.isfinite(number):
            self._fail("a number that a computer can hold", token)
        return number

    def _parse_list(self) -> tuple[Value, ...]:
        closing = {"[": "]", "(": ")"}.get(self._take_if("[", "("))
        if closing is None:
            self._fail("a list such as [1, 2]")
        values: list[Value] = []
        while not self._take_if(closing):
            if values and not self._take_if(","):
                self._fail(f", or {closing}")
            token = self._peek()
            values.append(self._parse_value())
            if not have_one_kind(values[0], values[-1]):
                self._fail("values of one kind", token)
        return tuple(values)

    def _unquote(self, token: _Token, is_pattern: bool = False) -> str:
        """Return the content of a text; a pattern of `like` keeps a backslash before % and _."""

        def replace_escape(match: re.Match[str]) -> str:
            if is_pattern and match[0] in ("\\%", "\\_"):
                return match[0]
            if match[0] not in _ESCAPES:
                self._fail(f"no {match[0]} (a backslash is written \\\\)", token)
            return _ESCAPES[match[0]]

        return re.sub(r"\\.", replace_escape, token.text[1:-1], flags=re.DOTALL)


def _as_keyword(token: _Token) -> str:
    """Return the keyword that a token is, in lower case, or ""; keywords are written all lower or all upper case."""
    word = token.text.lower()
    return word if token.kind == "name" and word in _KEYWORDS and token.text in (word, word.upper()) else ""
