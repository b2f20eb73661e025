"""What one party sent: payload bytes and messages by path, sends by round; exact. Rounds come from message clocks."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Clock", "Ledger", "Row"]

#: A round count; or, to learn how an operation's rounds depend on when each party starts, one count per starting party.
Clock = int | tuple[int, ...]


@dataclass(slots=True)
class Row:
    """Payload bytes and messages that this party sent under one path."""

    bytes_sent: int = 0
    messages: int = 0


@dataclass(slots=True)
class Ledger:
    """Rows by path of one party.

    ``rounds``: depth of the longest chain of messages that ends at this party. ``sends``: in how many rounds this
    party sends something to a peer, summed over peers; messages of one command and round to one peer
    count once, whatever their paths, since they can travel together.
    """

    rows: dict[str, Row] = field(default_factory=dict)
    rounds: int = 0
    sends: int = 0
    #: Departures at clocks that count from several starts: what :meth:`depart` cannot count yet.
    relative: set[tuple[int, tuple[int, ...]]] = field(default_factory=set)
    _seen: dict[tuple[int, int], int] = field(default_factory=dict)  # (peer, round // 64) -> a bit per round

    def sent(self, path: str, size: int, to: int, clock: Clock) -> None:
        """Book a message of ``size`` bytes that leaves for party ``to`` in round ``clock``."""
        row = self.row(path)
        row.bytes_sent += size
        row.messages += 1
        if isinstance(clock, tuple):
            self.relative.add((to, clock))
        else:
            self.depart(to, clock)

    def begin(self) -> None:
        """A new command: what was sent before cannot travel with what it sends."""
        self._seen.clear()

    def depart(self, to: int, clock: int) -> None:
        """Count a send to party ``to`` in round ``clock``, unless there was one."""
        place, bit = (to, clock >> 6), 1 << (clock & 63)
        seen = self._seen.get(place, 0)
        if not seen & bit:
            self._seen[place] = seen | bit
            self.sends += 1

    def row(self, path: str) -> Row:
        found = self.rows.get(path)
        if found is None:
            found = self.rows[path] = Row()
        return found

    @property
    def bytes_sent(self) -> int:
        return sum(row.bytes_sent for row in self.rows.values())

    @property
    def messages(self) -> int:
        return sum(row.messages for row in self.rows.values())
