"""In which ring and with how many fraction bits each secret value of a plan lives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from sfumato.errors import CaptureError
from sfumato.graph.handlers.kinds import Options
from sfumato.types import Ring

__all__ = ["WHOLE", "Format", "Formats", "formats_from_json", "formats_to_json", "options_at"]

#: Values that are 0/1 words by construction, without fraction bits.
WHOLE = frozenset(
    ("sfumato.one_hot", "sfumato.positions_one_hot", "sfumato.to_float", "sfumato.argmax_one_hot")
)


class Format(NamedTuple):
    """Ring by name and fraction bits."""

    ring: str
    frac: int

    def __str__(self) -> str:
        return f"{self.ring}f{self.frac}"


#: By value; what is not listed has the plan's own ring and scale.
Formats = Mapping[str, Format]


def options_at(options: Options, format: Format) -> Options:
    """The plan's options as a call with this format reads them."""
    if (options.ring, options.frac) == format:
        return options
    return replace(options, ring=format.ring, frac=format.frac)


def formats_to_json(formats: Formats) -> dict[str, Any]:
    """JSON-able; short, as a plan lists one for every value of a mixed program."""
    return {name: [format.ring, format.frac] for name, format in formats.items()}


def formats_from_json(data: Mapping[str, Any]) -> dict[str, Format]:
    """Read what :func:`formats_to_json` wrote.

    Raises:
        CaptureError: a ring or a scale that no value of a plan has.
    """
    found = {}
    for name, (ring, frac) in data.items():
        bits = Ring.named(ring).bits
        if ring not in ("Z64", "Z32") or type(frac) is not int or not 0 <= frac <= bits - 2:
            raise CaptureError(f"the value {name} cannot live in {ring} with {frac} fraction bits")
        found[str(name)] = Format(str(ring), frac)
    return found
