"""Whose turn it is: a queue of sessions, fair between clients. It knows no sockets, threads or clocks of its own."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sfumato.errors import JobError

__all__ = ["JobQueue", "NoPlace", "Ticket"]


class NoPlace(JobError):
    """A session finds no place. ``word``: why, as `telemetry.REASONS` calls it."""

    def __init__(self, sentence: str, word: str) -> None:
        super().__init__(sentence)
        self.word = word


@dataclass(eq=False, slots=True)
class Ticket:
    """One session's place. ``granted`` once it runs; ``changed`` is called when it does, or moves forward."""

    client: str
    changed: Callable[[], None] = field(repr=False)
    granted: bool = False
    position: int = 0
    left: bool = False


class JobQueue:
    """Sessions that run, at most ``at_once``, and sessions that wait, at most ``queued``, ``per_client`` of one client.

    Clients take turns, whatever number of sessions each has waiting, and one that runs a session gets another place
    after those that run none; the sessions of one client run in the order they came. Any thread may call any method.

    Parties need not agree on an order: a client takes its places at party 0, 1 and 2 one after the other, so whoever
    waits at one waits for sessions that have their places at those before.
    """

    def __init__(self, at_once: int, queued: int, per_client: int) -> None:
        self.at_once, self._most, self._per_client = at_once, queued, per_client
        self._lock = threading.Lock()
        self._running: set[Ticket] = set()
        self._waiting: dict[str, deque[Ticket]] = {}  # the client whose turn is next comes first
        self.closed = False

    def enter(self, client: str, changed: Callable[[], None] = lambda: None) -> Ticket:
        """Take a place; it may be granted at once.

        Raises:
            NoPlace: the queue is full or closed, or this client's part of it is full.
        """
        ticket = Ticket(client, changed)
        with self._lock:
            if self.closed:
                raise NoPlace(
                    "it takes no more sessions, as it is about to stop; try again later", "stopping"
                )
            if self._count() == 0 and len(self._running) < self.at_once:
                ticket.granted = True
                self._running.add(ticket)
                return ticket
            if len(self._waiting.get(client, ())) >= self._per_client:
                raise NoPlace(
                    f"{self._per_client} sessions of this client are waiting already; let one of them end first",
                    "limit",
                )
            if self._count() >= self._most:
                raise NoPlace(
                    f"its queue is full ({self._most} sessions are waiting); try again later", "busy"
                )
            self._waiting.setdefault(client, deque()).append(ticket)
            told = self._number()
        _tell(told - {ticket})
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give the place back, whether it waits or runs. May be called twice."""
        with self._lock:
            if ticket.left:
                return
            ticket.left = True
            self._running.discard(ticket)
            line = self._waiting.get(ticket.client)
            if line is not None and ticket in line:
                line.remove(ticket)
                if not line:
                    del self._waiting[ticket.client]
            told = self._advance() | self._number()
        _tell(told)

    def close(self) -> None:
        """Grant nothing any more."""
        with self._lock:
            self.closed = True

    @property
    def running(self) -> int:
        """Sessions that hold a place."""
        with self._lock:
            return len(self._running)

    @property
    def waiting(self) -> int:
        """Sessions that wait for one."""
        with self._lock:
            return self._count()

    def _count(self) -> int:
        return sum(len(line) for line in self._waiting.values())

    def _in_turn(self, several: int) -> list[str]:
        """Clients that wait, those that run ``several`` sessions or more last."""
        running = Counter(ticket.client for ticket in self._running)
        return sorted(self._waiting, key=lambda client: running[client] >= several)

    def _advance(self) -> set[Ticket]:
        told = set()
        while self._waiting and len(self._running) < self.at_once and not self.closed:
            client = self._in_turn(1)[0]
            line = self._waiting.pop(client)
            ticket = line.popleft()
            if line:
                self._waiting[client] = line  # behind all others
            ticket.granted, ticket.position = True, 0
            self._running.add(ticket)
            told.add(ticket)
        return told

    def _number(self) -> set[Ticket]:
        """Say to each how many start before it, and itself, as things stand; those whose number is another than
        before. Who runs one session may run none when the next place is free, who runs two does not."""
        told, number = set(), 0
        lines = [deque(self._waiting[client]) for client in self._in_turn(2)]
        while lines:
            for line in lines:
                number += 1
                ticket = line.popleft()
                if ticket.position != number:
                    ticket.position = number
                    told.add(ticket)
            lines = [line for line in lines if line]
        return told


def _tell(tickets: set[Ticket]) -> None:
    for ticket in tickets:
        ticket.changed()
