"""Somebody on the network between a caller and a party: passes TLS records on, until told to meddle with one."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

from sfumato.link.identity import listen
from sfumato.link.preamble import PREAMBLE_BYTES, Preamble

__all__ = ["MEDDLERS", "Proxy"]

#: What it does with the rest of a direction: gets its records in order, may write, and ends both ways when it returns.
Meddler = Callable[[Iterator[bytes], Callable[[bytes], None]], None]


def _pass(records: Iterator[bytes], write: Callable[[bytes], None]) -> None:
    for record in records:
        write(record)


def _flip(records: Iterator[bytes], write: Callable[[bytes], None]) -> None:
    record = bytearray(next(records))
    record[len(record) // 2] ^= 1
    write(bytes(record))
    _pass(records, write)


def _replay(records: Iterator[bytes], write: Callable[[bytes], None]) -> None:
    record = next(records)
    write(record + record)
    _pass(records, write)


def _swap(records: Iterator[bytes], write: Callable[[bytes], None]) -> None:
    first, second = next(records), next(records)
    write(second + first)
    _pass(records, write)


def _drop(records: Iterator[bytes], write: Callable[[bytes], None]) -> None:
    next(records)
    _pass(records, write)


def _cut(records: Iterator[bytes], write: Callable[[bytes], None]) -> None:
    record = next(records)
    write(record[: len(record) // 2])


def _swallow(records: Iterator[bytes], write: Callable[[bytes], None]) -> None:
    for _ in records:
        pass


def _trickle(records: Iterator[bytes], write: Callable[[bytes], None]) -> None:
    for record in records:
        for i in range(len(record)):
            write(record[i : i + 1])
            time.sleep(0.1)


MEDDLERS: dict[str, Meddler] = {
    "flip": _flip, "replay": _replay, "swap": _swap, "drop": _drop, "cut": _cut, "swallow": _swallow,
    "trickle": _trickle,
}  # fmt: skip


class Proxy:
    """In front of ``target``. `arm` meddles with the connections of runs that are there, from their next record on."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self._listener = listen("127.0.0.1", 0)
        self.port: int = self._listener.getsockname()[1]
        self._armed: dict[str, Meddler] = {}
        self._open: dict[threading.Thread, tuple[socket.socket, socket.socket]] = {}
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def arm(self, direction: str, meddler: Meddler) -> None:
        """``direction``: "to" the party, or "from" it; "" for both of control connections."""
        self._armed[direction] = meddler

    def disarm(self) -> None:
        """Pass on what comes, and end the connections that there were."""
        self._armed.clear()
        for thread, ends in list(self._open.items()):
            _end(*ends)
            thread.join(10.0)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(10.0)
        self._listener.close()
        self.disarm()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(caller,), daemon=True)
            thread.start()

    def _serve(self, caller: socket.socket) -> None:
        with (
            caller,
            contextlib.suppress(OSError),
            socket.create_connection(self.target, timeout=5.0) as party,
        ):
            self._open[threading.current_thread()] = caller, party
            party.settimeout(None)
            first = caller.recv(PREAMBLE_BYTES, socket.MSG_WAITALL)
            party.sendall(first)
            of_run = len(first) == PREAMBLE_BYTES and Preamble.parse(first).run is not None
            back = threading.Thread(
                target=self._carry, args=(party, caller, "from" if of_run else ""), daemon=True
            )
            back.start()
            self._carry(caller, party, "to" if of_run else "")
            back.join()
        self._open.pop(threading.current_thread(), None)

    def _carry(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        records = _records(source)
        with contextlib.suppress(OSError, StopIteration):
            for record in records:
                meddler = self._armed.get(direction)
                if meddler is None:
                    sink.sendall(record)
                    continue
                meddler(_again(record, records), sink.sendall)
                break
        _end(source, sink)


def _end(*sockets: socket.socket) -> None:
    for sock in sockets:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _records(source: socket.socket) -> Iterator[bytes]:
    """Whole TLS records, and at the end what is left."""
    while len(head := source.recv(5, socket.MSG_WAITALL)) == 5:
        size = int.from_bytes(head[3:], "big")
        yield head + (source.recv(size, socket.MSG_WAITALL) if size else b"")


def _again(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest
