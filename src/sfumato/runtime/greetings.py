"""Connections of callers that nobody has looked at yet, and which of them makes room when there are too many."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

__all__ = ["Greetings", "Lobby", "host_of", "makes_room"]

T = TypeVar("T")


def host_of(sock: socket.socket) -> str:
    """The address at the other end, without its port; empty when it is gone."""
    try:
        return str(sock.getpeername()[0])
    except OSError:
        return ""


def makes_room(held: Iterable[T], host: Callable[[T], str]) -> T:
    """The oldest of the host that holds most of ``held`` (oldest first): who says nothing does not keep others out, and
    a crowd from one host pushes out its own."""
    known = list(held)
    ((crowd, _),) = Counter(map(host, known)).most_common(1)
    return next(one for one in known if host(one) == crowd)


class Greetings:
    """At most ``most`` at a time: one more ends the one that `makes_room`, and ``dropped`` is called. Thread-safe."""

    def __init__(self, most: int, dropped: Callable[[], None]) -> None:
        self._most, self._dropped = most, dropped
        self._lock = threading.Lock()
        self._held: dict[socket.socket, str] = {}

    def enter(self, sock: socket.socket) -> Callable[[], None]:
        """Take a connection in; to be called when its greeting is over, however it went. Raises ``OSError``."""
        handle = sock.dup()  # TLS takes the descriptor of ``sock``, and both are one connection
        with self._lock:
            full = len(self._held) >= self._most
            if full:
                late = makes_room(self._held, self._held.__getitem__)
                del self._held[late]
                with contextlib.suppress(OSError):
                    late.shutdown(socket.SHUT_RDWR)
                late.close()
            self._held[handle] = host_of(handle)
        if full:
            self._dropped()
        return lambda: self._leave(handle)

    def _leave(self, handle: socket.socket) -> None:
        with self._lock:
            if self._held.pop(handle, None) is not None:
                handle.close()


class _Early(NamedTuple):
    """A connection that comes before its run."""

    run: str
    sock: socket.socket
    deadline: float


class Lobby:
    """Connections for runs that are not granted yet: at most ``most``, each for ``patience_s``. Thread-safe.

    ``hand_over(run, sock)`` gives one to its worker, if there is one; ``dropped`` is called for each that is closed
    instead.
    """

    def __init__(
        self,
        most: int,
        patience_s: float,
        hand_over: Callable[[str, socket.socket], bool],
        dropped: Callable[[], None],
    ) -> None:
        self._most, self._patience_s = most, patience_s
        self._hand_over, self._dropped = hand_over, dropped
        self._lock = threading.Lock()
        self._waiting: list[_Early] = []

    def take(self, run: str, sock: socket.socket) -> None:
        """To its worker, or in here."""
        with self._lock:
            if not self._hand_over(run, sock):
                self._waiting.append(_Early(run, sock, time.monotonic() + self._patience_s))
                if len(self._waiting) > self._most:
                    self._drop(makes_room(self._waiting, lambda one: host_of(one.sock)))

    def let_in(self, run: str) -> None:
        """A worker is there: who waited for its run goes to it."""
        with self._lock:
            for one in [one for one in self._waiting if one.run == run]:
                self._waiting.remove(one)
                self._hand_over(one.run, one.sock)

    def deadlines(self) -> list[float]:
        """When each has waited long enough."""
        with self._lock:
            return [one.deadline for one in self._waiting]

    def sweep(self, now: float) -> None:
        """Close those that have."""
        with self._lock:
            for one in [one for one in self._waiting if one.deadline <= now]:
                self._drop(one)

    def close(self) -> None:
        """Close all."""
        with self._lock:
            for one in self._waiting:
                one.sock.close()
            self._waiting.clear()

    def _drop(self, one: _Early) -> None:
        self._waiting.remove(one)
        self._dropped()
        one.sock.close()
