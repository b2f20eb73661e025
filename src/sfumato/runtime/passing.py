"""JSON and open connections between processes of one party, over a socket pair that nobody else can reach."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Pipe"]

_MAX_BYTES = 1 << 20
_MAX_FDS = 4
_SEND_S = 5.0  # the other end is a process of ours: one that takes nothing for so long has stopped
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Pipe:
    """One end. A message is one JSON object on a line, and descriptors beside it; one thread receives, any sends.

    The end of the other process, however it came, reads as None: a pipe has no other holders. So does a message that
    none of ours would write.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(_SEND_S)
        self.sock = sock
        self._sending = threading.Lock()
        self._text = bytearray()
        self._fds: list[int] = []
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    @staticmethod
    def pair() -> tuple[Pipe, Pipe]:
        """Two ends; neither is inherited by programs that are started."""
        one, other = socket.socketpair()
        return Pipe(one), Pipe(other)

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, fields: Mapping[str, Any], descriptors: Sequence[int] = ()) -> bool:
        """Whether the other end still takes messages."""
        data = json.dumps({**fields, "descriptors": len(descriptors)}).encode() + b"\n"
        with self._sending:
            try:
                sent = socket.send_fds(self.sock, [data], descriptors) if descriptors else 0
                self.sock.sendall(data[sent:])
            except OSError:
                return False
        return True

    def receive(self, timeout_s: float | None = None) -> tuple[dict[str, Any], list[int]] | None:
        """The next message and its descriptors, which the caller owns; None at the end.

        Raises ``TimeoutError``.
        """
        while b"\n" not in self._text:
            if not self._poll.poll(None if timeout_s is None else timeout_s * 1000):
                raise TimeoutError
            try:
                data, fds, flags, _ = socket.recv_fds(self.sock, 65536, _MAX_FDS, _CLOSE_ON_EXEC)
            except OSError:
                return None
            self._fds += fds
            if not data or flags & socket.MSG_CTRUNC or len(self._text) > _MAX_BYTES:
                return None
            self._text += data
        line, _, rest = bytes(self._text).partition(b"\n")
        self._text = bytearray(rest)
        try:
            fields: dict[str, Any] = json.loads(line)
            count = int(fields["descriptors"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        taken, self._fds = self._fds[:count], self._fds[count:]
        return fields, taken

    def pending(self) -> bool:
        """Whether a message lies here that a poll would not show."""
        return b"\n" in self._text

    def half_close(self) -> None:
        """Nothing more from here; the other end reads its end."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Let go."""
        for fd in self._fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds.clear()
        self.sock.close()
