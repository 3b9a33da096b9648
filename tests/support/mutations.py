"""Seeded damage to bytes, texts and JSON values, and the number of cases that a fuzz test runs."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
from typing import Any

from pretrain.data import BadSample

HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 3.5, 10**9, 10**30, 10**400, -(10**18), 1e308, float("nan"), float("inf"),
    "", "x", "\x1b[31m", "../../escape", "/dev/zero", "\x00", "${oc.env:HOME}", "\ud800", "a" * 5000, [], {}, [[]],
    [1, 2, 3], {"a": 1}, ["\x1b]0;title\x07"],
]  # fmt: skip
"""Values that a file may hold where another one belongs."""

HOSTILE_FILES: list[bytes] = [
    b"", b"\x00", b"\xff\xfe", b"null", b"[]", b"{}", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 10_000, b'"\x1b[31m"', b"{",
    b"%PDF-1.4", b"\x80\x05cos\nsystem\n(S'true'\ntR.", b"PK\x03\x04", "naïve 猫".encode("utf-16"), b"a: &a [*a]",
    b"!!python/object/apply:os.system [true]", b"\r\n\r\n", b"step-0000002\x00", b"../..",
]  # fmt: skip
"""Files of other kinds than expected."""


def count_cases(few: int) -> int:
    """Return the number of cases of a test: `few`, times FUZZ_FACTOR, which `make fuzz` sets."""
    return few * int(os.environ.get("FUZZ_FACTOR", "1"))


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return data with one kind of damage, or data of another kind altogether."""
    kind = rng.randrange(9)
    if kind == 0 or not data:
        return rng.choice(HOSTILE_FILES)
    at, length = rng.randrange(len(data)), rng.choice([1, 2, 7, 64, 512, 5000])
    piece = data[at : at + length]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + bytes(len(piece)) + data[at + length :]
    if kind == 3:
        return data[:at] + data[at + length :]
    if kind == 4:
        return data[:at] + piece + data[at:]
    if kind == 5:
        return data[:at] + rng.randbytes(len(piece)) + data[at + length :]
    if kind == 6:
        return data + rng.choice([rng.randbytes(length), data[:at], bytes(length)])
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 20])):
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def mutate_value(rng: random.Random, value: Any) -> Any:
    """Return plain values in which one to three nodes are replaced, removed, renamed or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2, 3])):
        nodes = list(_walk(value))
        if not nodes:
            return rng.choice(HOSTILE)
        holder, key = rng.choice(nodes)
        kind = rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(["", "x", "\x1b[31m", "../x", str(key).upper()])] = holder.pop(key)
        elif kind == 2 and type(holder[key]) in (int, float) and abs(holder[key]) < 1e15:
            holder[key] = rng.choice([-holder[key], holder[key] * 1000 + 1, holder[key] + 0.5, str(holder[key])])
        else:
            holder[key] = copy.deepcopy(rng.choice(HOSTILE))
    return value


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """Return damaged JSON: bytes flipped, or well-formed JSON with other values."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    return json.dumps(mutate_value(rng, json.loads(data))).encode()


def _walk(value: Any) -> Any:
    """Yield (container, key) of every node below `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _walk(item)


def assert_one_line(error: BaseException, name: str = "") -> None:
    """Assert that an expected failure has a message of one printable line, which contains `name`."""
    message = str(error)
    assert message
    assert name in message
    assert "\n" not in message
    assert "\x1b" not in message
    message.encode()


def assert_bad(bad: BadSample) -> None:
    """Assert that a bad sample has a short reason to count by, of one printable line."""
    assert 0 < len(bad.reason) < 60
    assert bad.reason.isprintable()


class BoundedMemory:
    """A `with` block in which the peak of this process's memory grows by less than `mib`."""

    def __init__(self, mib: int = 1024) -> None:
        self.mib = mib

    def __enter__(self) -> None:
        self._before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._before
            assert growth < self.mib * 1024, f"{growth // 1024} MiB"
