"""Hostile values, and damage to bytes."""

import json
import random
from typing import Any

NUMBERS: list[Any] = [0, 1, 2, 3, -1, 7, 0.5, 1.5, -0.5, 1e-40, 1e30, 1e308, 2**31, 2**63, 2**70]
NUMBERS += [10**6, -(10**9), float("inf"), float("-inf"), float("nan")]
STRINGS: list[Any] = ["", "a", "cycle", "\0", "\ud800", "../..", "/", "é" * 300, "x" * 10_000]
STRINGS += ["${oc.env:PATH}", "null", "1e400", "os:system", "-1", "\n", "<|endoftext|>"]


def value(source: random.Random, depth: int = 0) -> Any:
    """Anything that JSON can say, and a few things that it cannot."""
    kind = source.randrange(9 if depth < 3 else 6)
    if kind < 3:
        return source.choice(NUMBERS)
    if kind < 5:
        return source.choice(STRINGS)
    if kind == 5:
        return source.choice([None, True, False])
    if kind == 6:
        return [value(source, depth + 1) for _ in range(source.randrange(4))]
    if kind == 7:
        names = source.choices(["a", "type", "text", "", "0"], k=source.randrange(3))
        return {name: value(source, depth + 1) for name in names}
    return deep(source.choice([10, 2_000, 200_000]) if depth == 0 else 3)


def deep(levels: int) -> Any:
    """A list in a list, so many times."""
    found: Any = []
    for _ in range(levels):
        found = [found]
    return found


def as_json(value: Any) -> bytes:
    """A value as JSON, whatever it holds."""
    try:
        return json.dumps(value).encode()
    except RecursionError:  # json reads no deeper than it writes
        return b'{"model": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


def changed(source: random.Random, mapping: Any) -> Any:
    """A copy of nested mappings and lists, in which one place is another value, gone or new."""
    places = list(_places(mapping))
    path = source.choice(places)
    return _with(mapping, path, source)


def damaged(source: random.Random, content: bytes) -> bytes:
    """Bytes as a bad disk, a full one or a stranger would leave them."""
    kind, end = source.randrange(7), len(content)
    place = source.randrange(end) if end else 0
    if kind == 0:
        return content[:place]
    if kind == 1:
        return b""
    if kind == 2:
        return content[:place] + bytes(source.randrange(1, 64)) + content[place:]
    if kind == 3:
        return source.randbytes(source.choice([1, 8, 100, 5000]))
    if kind == 4:  # a page of zeros, as after a crash
        return content[:place] + bytes(min(4096, end - place)) + content[place + 4096 :]
    if kind == 5:
        return content + source.randbytes(9)
    flipped = bytearray(content)
    for _ in range(source.choice([1, 1, 4])):
        if flipped:
            flipped[source.randrange(end)] ^= 1 << source.randrange(8)
    return bytes(flipped)


def _places(mapping: Any, path: tuple[Any, ...] = ()) -> Any:
    if path:
        yield path
    if len(path) > 8:
        return
    if isinstance(mapping, dict):
        for name in mapping:
            yield from _places(mapping[name], (*path, name))
    elif isinstance(mapping, list):
        for index in range(len(mapping)):
            yield from _places(mapping[index], (*path, index))


def _with(mapping: Any, path: tuple[Any, ...], source: random.Random) -> Any:
    copy = dict(mapping) if isinstance(mapping, dict) else list(mapping)
    name, *rest = path
    if rest:
        copy[name] = _with(copy[name], tuple(rest), source)
    elif isinstance(copy, dict) and source.random() < 0.15:
        del copy[name]
    elif isinstance(copy, dict) and source.random() < 0.15:
        copy[f"{name}s"] = copy[name]
    else:
        copy[name] = value(source)
    return copy
