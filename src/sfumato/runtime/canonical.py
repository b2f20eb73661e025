"""The one JSON text of a value, and how a peer's JSON is read. Nothing here needs torch."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from sfumato.errors import LinkError

__all__ = ["canonical", "parse_json"]


def canonical(value: Any) -> bytes:
    """The one JSON text of ``value``: sorted keys, no spaces, no NaN; ``ValueError`` or ``TypeError`` for
    what JSON cannot hold."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True
    ).encode()


def parse_json(data: bytes | bytearray | memoryview) -> dict[str, Any]:
    """A JSON object from a peer; ``LinkError`` for anything else, NaN and repeated keys included."""
    try:
        value = json.loads(bytes(data), parse_constant=_no_constant, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError):
        raise LinkError("a message header is not valid JSON") from None
    if not isinstance(value, dict):
        raise LinkError("a message header is not a JSON object")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("repeated key")
    return found
