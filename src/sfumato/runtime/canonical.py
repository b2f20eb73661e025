"""The one JSON text of a value, and how a peer's JSON and an operator's TOML are read. Nothing here needs torch."""

from __future__ import annotations

import json
import math
import tomllib
from typing import Any, NoReturn

from sfumato.errors import JobError, LinkError

__all__ = ["canonical", "parse_json", "parse_toml"]


def canonical(value: Any) -> bytes:
    """The one JSON text of ``value``: sorted keys, no spaces, no NaN; ``ValueError`` or ``TypeError`` for
    what JSON cannot hold."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True
    ).encode()


def parse_json(data: bytes | bytearray | memoryview) -> dict[str, Any]:
    """A JSON object from a peer; ``LinkError`` for anything else, repeated keys and numbers that are not finite
    included."""
    try:
        value = json.loads(
            bytes(data), parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_no_repeats
        )
    except (ValueError, RecursionError):
        raise LinkError("a message header is not valid JSON") from None
    if not isinstance(value, dict):
        raise LinkError("a message header is not a JSON object")
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML file; ``JobError`` for anything else, numbers and nesting without end included."""
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise JobError(f"it is not valid TOML ({error}).") from None
    except RecursionError:
        raise JobError("it is not valid TOML (nested too deeply).") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # 1e999 is no constant
        raise ValueError(text)
    return value


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("repeated key")
    return found
