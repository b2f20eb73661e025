"""One peer of a TLS link: its socket, what has not left yet, and the frames that come in.

The socket is non-blocking and every TLS call is made under one lock, so that reading and writing from two
threads is safe with OpenSSL. Reading is a generator that either the driver (while it waits: no thread switch)
or the receiver thread advances.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

from sfumato.errors import LinkError
from sfumato.link.base import Frame, Payload, PeerAbort, peer_name, public_text
from sfumato.link.frames import HEADER_BYTES, Kind, parse_abort, parse_header

__all__ = ["FRAME_COST", "Channel", "LinkLimits", "Owner"]

_log = logging.getLogger(__name__)
_CHUNK = 64 * 1024  # what one TLS write is given: short enough that a reader waits little for the lock
_DIRECT = 128 * 1024  # batches up to this leave in the caller's thread
_BUFFER = 64 * 1024
_RECORD = 16 * 1024  # what one TLS record holds at most
_LINGER_S = 5.0
FRAME_COST = 1024  # bytes that a frame takes in memory beside its payload, about: an empty one is not free
_PARK_S = 0.005  # how soon a receiver thread takes over when the driver turns to computing


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """Bounds of one link."""

    max_frame_bytes: int = 1 << 30
    max_unsent_bytes: int = 1 << 30  # flush waits above this
    max_unclaimed_bytes: int = (
        2 << 30
    )  # reading pauses above this while nobody waits; four times this ends the link
    stall_s: float = 120.0  # flush and close give up after this long without progress
    abort_s: float = 2.0  # how long an abort message may take to leave


class Owner(Protocol):
    """What a channel asks of its link."""

    limits: LinkLimits
    waits: int

    def driver_reads(self) -> bool:
        """Whether the driver reads by itself, or did so a moment ago."""

    def let_through(self, channel: Channel) -> None:
        """Block the receiver thread while too much is unclaimed and nobody waits."""

    def deliver(self, channel: Channel, frame: Frame) -> None:
        """A frame has arrived."""

    def failed(self, channel: Channel, problem: LinkError, left: bool) -> None:
        """The channel can deliver no more; the first cause counts."""

    def reader_ended(self) -> None:
        """A receiver thread is about to end."""


class Channel:
    """One peer: its socket, the queue of what has not left, and two threads."""

    def __init__(self, link: Owner, peer: int, sock: ssl.SSLSocket) -> None:
        self.link, self.peer, self.sock = link, peer, sock
        self.staged: list[
            tuple[Payload, bool]
        ] = []  # the driver's thread only; the flag marks a frame's first piece
        self.unsent = 0
        self.unclaimed = 0  # bytes in memory for frames that have arrived and were not taken
        self.paused = False
        self.problem: LinkError | None = None
        self.left = False  # it said goodbye
        self.garbled = False  # it sent what is no frame
        self.deaf = False  # a write failed: OpenSSL takes no other after it, and there is nobody to read it
        self.inside_frame = False
        self.progress_at = time.monotonic()
        self.payload_sent = self.payload_received = 0
        self._tls = threading.Lock()
        self._writing = threading.Lock()
        self._outgoing: deque[tuple[Payload, bool]] = deque()
        lock = threading.Lock()  # guards _outgoing, unsent, _work, _stop
        self._changed = threading.Condition(lock)
        self._to_write = threading.Condition(lock)  # apart, so that a direct write wakes nobody
        self._work = self._stop = False
        self._retry: Payload | None = None
        self._linger_until: float | None = None
        self._kernel_bytes = -1
        self.reading = threading.Lock()  # held by whoever advances the parser
        self.more = True
        self.done = False  # the stream has ended
        self._parser = self._parse()
        sock.setblocking(False)
        self.descriptor = sock.fileno()
        self.reader = threading.Thread(target=self._read_all, name=f"sfumato-read-{peer}", daemon=True)
        self.writer = threading.Thread(target=self._write_all, name=f"sfumato-write-{peer}", daemon=True)

    @property
    def hears(self) -> bool:
        """Whether the peer can still be told something: nothing has gone wrong, or only what it says has ended."""
        return self.problem is None or self.left or self.garbled

    def start(self) -> None:
        self.reader.start()
        self.writer.start()

    # sending

    def stage(self, header: bytes, payload: Payload, length: int) -> None:
        self.payload_sent += length
        if length <= 2048:
            self.staged.append((header + payload, True))
        else:
            self.staged.append((header, True))
            self.staged.append(
                (payload if isinstance(payload, bytes) else memoryview(payload).cast("B"), False)
            )

    def depart(self) -> None:
        """Hand what is staged over, and write it here and now when it is little and nobody else is
        writing."""
        size = sum(len(piece) for piece, _ in self.staged)
        with self._changed:
            self._outgoing.extend(self.staged)
            self.unsent += size
            little = self.unsent <= _DIRECT
        self.staged.clear()
        if little and self._writing.acquire(blocking=False):
            try:
                done = self._pump()
            finally:
                self._writing.release()
            if done:
                return
        with self._changed:
            self._work = True
            self._to_write.notify_all()

    def _next_piece(self) -> Payload | None:
        """Small pieces joined up to one chunk, or a slice of a large one."""
        with self._changed:
            out = self._outgoing
            if not out:
                return None
            first, starts = out[0]
            if len(first) > _CHUNK:
                view = memoryview(first)
                out[0] = (view[_CHUNK:], False)
                return view[:_CHUNK]
            out.popleft()
            if not out:
                return first
            joined = bytearray(first)
            while out and len(joined) < _CHUNK:
                piece, starts = out[0]
                room = _CHUNK - len(joined)
                if len(piece) <= room:
                    joined += piece
                    out.popleft()
                elif starts:
                    break
                else:
                    view = memoryview(piece)
                    joined += view[:room]
                    out[0] = (view[room:], False)
            return joined

    def _pump(self) -> bool:
        """Write until all has left (True) or the socket takes no more (False). Only under ``_writing``."""
        while True:
            if self.deaf:
                self._discard()
                return True
            piece = self._retry if self._retry is not None else self._next_piece()
            if piece is None:
                return True
            self._retry = piece
            try:
                with self._tls:
                    count = self.sock.send(piece)
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                return False
            except (OSError, ValueError) as error:
                # A write to a peer that is gone fails as an end of file where Python tells no errno. The reader finds
                # out, too, and may first find the peer's last words.
                gone = isinstance(error, (ConnectionError, ssl.SSLEOFError))
                if not gone or not self.reader.is_alive():
                    self._fail_io(error)
                self.deaf = True
                continue
            self._retry = None if count == len(piece) else memoryview(piece)[count:]
            with self._changed:
                self.unsent -= count
                if self.unsent == 0 or self.unsent > _DIRECT:
                    self._changed.notify_all()

    def _discard(self) -> None:
        with self._changed:
            self._outgoing.clear()
            self.unsent, self._retry = 0, None
            self._changed.notify_all()

    def _write_all(self) -> None:
        writable = select.poll()
        writable.register(self.sock, select.POLLOUT)
        try:
            while True:
                with self._changed:
                    while not self._work and not self._stop:
                        self._to_write.wait()
                    if self._stop:
                        return
                    self._work = False
                while not self._stop:
                    with self._writing:
                        if self._pump():
                            break
                    writable.poll(1000)
        except Exception as error:
            self._fail_io(error)

    def finish(self, last_words: bytes, *, abort: bool) -> None:
        """Queue the last frame; an abort overtakes every frame whose first byte has not left."""
        with self._changed:
            if abort:
                keep: deque[tuple[Payload, bool]] = deque()
                for piece, starts in self._outgoing:
                    if starts:
                        break
                    keep.append((piece, starts))
                self._outgoing = keep
                self.unsent = sum(len(p) for p, _ in keep) + (
                    len(self._retry) if self._retry is not None else 0
                )
                self.staged.clear()
            else:
                for piece, starts in self.staged:
                    self._outgoing.append((piece, starts))
                    self.unsent += len(piece)
                self.staged.clear()
            self._outgoing.append((last_words, True))
            self.unsent += len(last_words)
            self._work = True
            self._to_write.notify_all()

    def drain(self, target: int, stall_s: float) -> bool:
        """Wait until at most ``target`` bytes are unsent; False when nothing moved for ``stall_s``."""
        with self._changed:
            deadline, last = time.monotonic() + stall_s, self.unsent
            while self.unsent > target:
                if not self.hears:
                    return True  # what waits next reports it
                now = time.monotonic()
                if self.unsent < last:
                    deadline, last = now + stall_s, self.unsent
                if now >= deadline:
                    return False
                self._changed.wait(min(0.1, deadline - now))
            return True

    def half_close(self) -> None:
        """No more from us; the reader closes the socket when the peer has closed too, or after a while."""
        with self._changed:
            self._stop = True
            self._linger_until = time.monotonic() + _LINGER_S
            self._changed.notify_all()
            self._to_write.notify_all()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_WR)

    # receiving

    def _read_all(self) -> None:
        """The receiver thread: reads whenever the driver does not, then lets go of the socket."""
        readable = select.poll()
        readable.register(self.sock, select.POLLIN)
        link, pause_s, seen = self.link, _PARK_S, -1
        while not self.done:
            if self._linger_until is not None:
                if time.monotonic() > self._linger_until:
                    break
            elif link.driver_reads():
                pause_s = _PARK_S if link.waits != seen else min(2 * pause_s, 4 * _PARK_S)
                seen = link.waits
                time.sleep(pause_s)
                continue
            if self.more or readable.poll(250):
                if self._linger_until is None and link.driver_reads():
                    continue
                link.let_through(self)
                with self.reading:
                    self.advance()
        while self._linger_until is None:  # someone may still write or read counters; close ends this
            with self._changed:
                if self._linger_until is None:
                    self._changed.wait(1.0)
        self.writer.join(1.0)
        self._kernel_bytes = self.kernel_bytes()
        self.done = True
        self.sock.close()
        link.reader_ended()

    def advance(self) -> None:
        """Read one step further; the caller holds ``reading``. ``more``: there may be more without
        waiting."""
        if self.done:
            return
        try:
            self.more = next(self._parser)
            return
        except StopIteration:
            pass
        except LinkError as error:
            self.garbled = True
            self._fail(LinkError(f"{peer_name(self.peer)} {error}"))
        except Exception as error:
            self._fail_io(error)
        self.more, self.done = False, True

    def _receive(self, view: memoryview) -> Generator[bool, None, int]:
        """At least one byte into ``view``; 0 at the end of the stream. Yields False while there is
        nothing."""
        recv_into, tls, room = self.sock.recv_into, self._tls, len(view)
        count = 0
        while True:
            try:
                with tls:
                    count = last = recv_into(view)
                    while last == _RECORD and count < room:  # a full record: the next one is usually there
                        last = recv_into(view[count:])
                        count += last
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if not count:
                    yield False
                    continue
            except ssl.SSLZeroReturnError:
                pass
            self.progress_at = time.monotonic()
            return count

    def _parse(self) -> Generator[bool, None, None]:
        """Frames for the life of the connection. Yields True after some work, False when it must wait."""
        buffer = bytearray(_BUFFER)
        view = memoryview(buffer)
        begin = end = 0
        bound = self.link.limits.max_frame_bytes
        while True:
            while end - begin < HEADER_BYTES:
                if begin:
                    buffer[: end - begin] = buffer[begin:end]
                    begin, end = 0, end - begin
                count = yield from self._receive(view[end:])
                if not count:
                    return self._ended(end - begin)
                end += count
            kind, dtype, tag, clock, length = parse_header(buffer, bound, begin)
            begin += HEADER_BYTES
            have = min(length, end - begin)
            if have == length:
                payload = buffer[begin : begin + length]
                begin += length
            else:
                payload = bytearray(length)
                payload[:have] = view[begin : begin + have]
                begin = end = 0
                self.inside_frame = True
                inside = memoryview(payload)
                steps = 0
                while have < length:
                    count = yield from self._receive(inside[have : have + _BUFFER])
                    if not count:
                        return self._ended(1)
                    have += count
                    steps += 1
                    if steps % 32 == 0:
                        yield True
                inside.release()
                self.inside_frame = False
            if kind == Kind.DATA:
                self.payload_received += length
                self.link.deliver(self, Frame(tag, dtype, clock, payload))
            elif kind == Kind.BYE:
                self._fail(LinkError(f"{peer_name(self.peer)} has left"), left=True)
            elif kind == Kind.ABORT:
                reason, error_kind, origin = parse_abort(payload)
                text = f"{peer_name(self.peer)} ended the run: {reason}"
                self._fail(PeerAbort(text, reason=reason, kind=error_kind, origin=origin))
            else:
                raise LinkError("sent a second hello")
            yield True

    def _ended(self, partial: int) -> None:
        inside = " inside a frame" if partial else ""
        self._fail(LinkError(f"{peer_name(self.peer)} closed the connection{inside}"))

    def _fail_io(self, error: BaseException) -> None:
        if isinstance(error, (ConnectionError, ssl.SSLEOFError)):
            text = "closed the connection"
        elif isinstance(error, ssl.SSLError):
            text = f"broke the TLS stream ({(error.reason or 'no reason').lower().replace('_', ' ')})"
        elif isinstance(error, OSError):
            text = f"cannot be reached ({public_text(error.strerror or type(error).__name__)})"
        else:
            text = f"could not be served (internal {type(error).__name__})"
            _log.error("link to %s failed: %s", peer_name(self.peer), type(error).__name__)
        self._fail(LinkError(f"{peer_name(self.peer)} {text}"))

    def _fail(self, problem: LinkError, *, left: bool = False) -> None:
        self.link.failed(self, problem, left)
        with self._changed:
            self._changed.notify_all()

    def kernel_bytes(self) -> int:
        """``tcpi_bytes_sent`` (or bytes acknowledged, on an older kernel) of Linux' TCP_INFO."""
        with contextlib.suppress(OSError, AttributeError, ValueError):
            info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            if len(info) >= 216:  # sent less sent again
                return int(struct.unpack_from("=Q", info, 200)[0] - struct.unpack_from("=Q", info, 208)[0])
            if len(info) >= 128:
                return int(struct.unpack_from("=Q", info, 120)[0])
        return self._kernel_bytes
