"""What the fuzz targets share: how an input may end, JSON from bytes, and real JSON with parts changed by an input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sfumato.errors import LinkError, SfumatoError
from sfumato.runtime.canonical import parse_json

__all__ = ["as_json", "changed", "changed_fields", "refusing"]


@contextmanager
def refusing(longest: int = 2000) -> Iterator[None]:
    """An input may be refused with one sentence of ours; every other exception is a finding.

    ``longest``: characters of the sentence; an operator's own file has more, one for each of its problems.
    """
    try:
        yield
    except SfumatoError as error:
        text = str(error).splitlines()[0]
        assert text, "an error without a sentence"
        assert len(text) < longest, "an error that repeats its input"


def as_json(data: bytes) -> Any:
    """The object of a JSON text, as a party reads it off a link; None for what is none."""
    try:
        return parse_json(data)
    except LinkError:
        return None


#: What a field of JSON may be replaced with.
_ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 63, 64, 2**31, 2**63, -(2**64), 0.5, -1e308, "", "x", "y" * 300, "../x", "\0",
    [], {}, [[]], [0], [None], {"x": {}}, [2**40, 2**40], 10**400, float("nan"), "\ud800",
)  # fmt: skip


def changed(value: Any, choices: Iterator[int]) -> Any:
    """``value`` with one part of it replaced, dropped or doubled, where and how as ``choices`` say."""
    inside = value if isinstance(value, dict | list) else ()
    if not inside or next(choices, 0) % 4 == 0:
        return _ODD[next(choices, 0) % len(_ODD)]
    place = (next(choices, 0) << 8 | next(choices, 0)) % len(inside)
    what = next(choices, 0) % 8
    if isinstance(value, dict):
        key = list(value)[place]
        if what == 0:
            return {k: v for k, v in value.items() if k != key}
        return {**value, (f"{key}x" if what == 1 else key): changed(value[key], choices)}
    if what == 0:
        return [*value[:place], *value[place + 1 :]]
    if what == 1:
        return [*value, *value]
    return [*value[:place], changed(value[place], choices), *value[place + 1 :]]


def changed_fields(value: Any, choices: Iterator[int]) -> Any:
    """One to three parts of ``value`` changed."""
    for _ in range(1 + next(choices, 0) % 3):
        value = changed(value, choices)
    return value
