"""Connections of callers that have not said who they are, and which of them makes room when there are too many."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar

__all__ = ["Greetings", "host_of", "makes_room"]

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
