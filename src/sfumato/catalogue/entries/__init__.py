"""All published entries, by function."""

from __future__ import annotations

from sfumato.catalogue.entries import activation, exponential, inverse, rows
from sfumato.catalogue.entry import Entry

__all__ = ["PUBLISHED"]

PUBLISHED: tuple[Entry, ...] = (
    *exponential.ENTRIES, *inverse.ENTRIES, *activation.ENTRIES, *rows.ENTRIES,
)  # fmt: skip
