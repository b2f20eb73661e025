"""What one party sent, by path: payload bytes and sends, exact; rounds come from message clocks."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Ledger", "Row"]


@dataclass(slots=True)
class Row:
    """Payload bytes and messages that this party sent under one path."""

    bytes_sent: int = 0
    sends: int = 0


@dataclass(slots=True)
class Ledger:
    """Rows by path of one party. ``rounds`` is the depth of the longest chain of messages that ends at this
    party.
    """

    rows: dict[str, Row] = field(default_factory=dict)
    rounds: int = 0

    def sent(self, path: str, size: int) -> None:
        row = self.row(path)
        row.bytes_sent += size
        row.sends += 1

    def row(self, path: str) -> Row:
        found = self.rows.get(path)
        if found is None:
            found = self.rows[path] = Row()
        return found

    @property
    def bytes_sent(self) -> int:
        return sum(row.bytes_sent for row in self.rows.values())

    @property
    def sends(self) -> int:
        return sum(row.sends for row in self.rows.values())
