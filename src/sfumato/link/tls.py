"""Links over TLS sockets: one receiver and one sender thread per peer, frames coalesced, every wait bounded.

Sockets are non-blocking below and every TLS call is made under the channel's lock, so that reading and
writing from two threads is safe with OpenSSL. `TlsLink.flush` writes small batches itself (no thread switch)
and leaves the rest to the sender thread; receivers always drain while someone waits, so big simultaneous
sends cannot deadlock.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sfumato.errors import LinkError
from sfumato.link.base import Frame, Link, Payload, PeerAbort, peer_name, public_text
from sfumato.link.frames import (
    HEADER_BYTES,
    Kind,
    abort_payload,
    check_frame,
    pack_header,
    parse_abort,
    parse_header,
)

__all__ = ["LinkLimits", "TlsLink"]

_log = logging.getLogger(__name__)
_NO_TAG = bytes(8)
_CHUNK = (
    64 * 1024
)  # what one TLS write is given: a few records, and short enough that a reader waits little for the lock
_DIRECT = 128 * 1024  # batches up to this leave in the caller's thread
_BUFFER = 64 * 1024
_LINGER_S = 5.0


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


class TlsLink(Link):
    """A link over connected, authenticated TLS sockets, one per peer."""

    def __init__(
        self, party: int, sockets: Mapping[int, ssl.SSLSocket], limits: LinkLimits | None = None
    ) -> None:
        self.party = party
        self.limits = limits or LinkLimits()
        self._arrived = threading.Condition(threading.Lock())
        self._inbox: dict[tuple[int, bytes], deque[Frame]] = {}
        self._hungry = False
        self._closed = False
        self._closing = threading.Lock()
        self._channels = {peer: _Channel(self, peer, sock) for peer, sock in sockets.items()}
        for channel in self._channels.values():
            channel.start()

    def send(self, to: int, frame: Frame) -> None:
        channel = self._channels.get(to)
        if channel is None:
            raise LinkError(f"there is no link from {peer_name(self.party)} to {peer_name(to)}")
        if channel.problem is not None or self._closed:
            raise self._lost(channel, "sending")
        tag, dtype, clock, payload = frame
        length = payload.nbytes if isinstance(payload, memoryview) else len(payload)
        check_frame(dtype, tag, clock, length, self.limits.max_frame_bytes)
        channel.stage(pack_header(Kind.DATA, dtype, tag, clock, length), payload, length)

    def flush(self) -> None:
        for channel in self._channels.values():
            if channel.staged:
                channel.depart()
        for channel in self._channels.values():
            if channel.unsent > self.limits.max_unsent_bytes:
                self._set_hungry(True)
                try:
                    if not channel.drain(self.limits.max_unsent_bytes, self.limits.stall_s):
                        raise LinkError(
                            f"{peer_name(channel.peer)} takes no data (stalled for {self.limits.stall_s:g} s)"
                        )
                finally:
                    self._set_hungry(False)

    def take(self, frm: int, tag: bytes) -> Frame | None:
        with self._arrived:
            frames = self._inbox.get((frm, tag))
            if not frames:
                return None
            frame = frames.popleft()
            if not frames:
                del self._inbox[frm, tag]
            channel = self._channels[frm]
            channel.unclaimed -= len(frame.payload)
            if channel.paused:
                self._arrived.notify_all()
            return frame

    def wait(self, wanted: Sequence[tuple[int, bytes, str]], timeout_s: float) -> None:
        start = time.monotonic()
        deadline, inbox = start + timeout_s, self._inbox
        with self._arrived:
            self._hungry = True
            try:
                if any(channel.paused for channel in self._channels.values()):
                    self._arrived.notify_all()
                while True:
                    for frm, tag, _ in wanted:
                        if (frm, tag) in inbox:
                            return
                    self._raise_lost(wanted)
                    now = time.monotonic()
                    if now >= deadline:
                        deadline = self._extended(wanted, start, timeout_s)
                        if now >= deadline:
                            frm, _, path = wanted[0]
                            raise LinkError(
                                f"{peer_name(frm)} sent nothing for {timeout_s:g} s (waiting for {path})"
                            )
                    self._arrived.wait(deadline - now)
            finally:
                self._hungry = False

    def _extended(self, wanted: Sequence[tuple[int, bytes, str]], start: float, timeout_s: float) -> float:
        """A frame of a wanted peer that is still coming in moves the deadline, up to twenty times the
        timeout."""
        channels = [self._channels[frm] for frm, _, _ in wanted]
        latest = max((c.progress_at for c in channels if c.inside_frame), default=start)
        return min(latest + timeout_s, start + 20 * timeout_s)

    def _raise_lost(self, wanted: Sequence[tuple[int, bytes, str]]) -> None:
        waited = {frm: path for frm, _, path in reversed(wanted)}
        if self._closed:
            raise LinkError(f"the link of {peer_name(self.party)} is closed (waiting for {wanted[0][2]})")
        for frm in waited:
            if frm not in self._channels:
                raise LinkError(f"there is no link from {peer_name(self.party)} to {peer_name(frm)}")
        failed = [
            c for c in self._channels.values() if c.problem is not None and (c.peer in waited or not c.left)
        ]
        if failed:  # an abort says more than a lost connection
            worst = min(failed, key=lambda c: not isinstance(c.problem, PeerAbort))
            raise self._lost(worst, f"waiting for {waited.get(worst.peer, wanted[0][2])}")

    def _lost(self, channel: _Channel, doing: str) -> LinkError:
        problem = channel.problem
        if problem is None:
            return LinkError(f"the link of {peer_name(self.party)} is closed ({doing})")
        if isinstance(problem, PeerAbort):
            return PeerAbort(
                f"{problem} ({doing})", reason=problem.reason, kind=problem.kind, origin=problem.origin
            )
        return LinkError(f"{problem} ({doing})")

    def abort(self, reason: str, *, kind: str = "LinkError", origin: int | None = None) -> None:
        """Tell every peer why, then close. ``kind``: error class of the cause; ``origin``: the party that
        failed first."""
        payload = abort_payload(reason, kind, self.party if origin is None else origin)
        self._end(
            pack_header(Kind.ABORT, 0, _NO_TAG, 0, len(payload)) + payload, self.limits.abort_s, abort=True
        )

    def close(self) -> None:
        self._end(pack_header(Kind.BYE, 0, _NO_TAG, 0, 0), self.limits.stall_s, abort=False)

    def _end(self, last_words: bytes, patience_s: float, *, abort: bool) -> None:
        with self._closing:
            if self._closed:
                return
            with self._arrived:
                self._closed = self._hungry = True
                self._arrived.notify_all()
            for channel in self._channels.values():
                channel.finish(last_words, abort=abort)
            deadline = time.monotonic() + patience_s
            for channel in self._channels.values():
                if channel.problem is None or channel.left:
                    channel.drain(0, max(0.0, deadline - time.monotonic()))
                channel.half_close()
            deadline = (
                time.monotonic() + 0.2
            )  # usually the peers close too; else the readers linger by themselves
            for channel in self._channels.values():
                channel.reader.join(max(0.0, deadline - time.monotonic()))

    def _set_hungry(self, value: bool) -> None:
        with self._arrived:
            self._hungry = value
            self._arrived.notify_all()

    def problems(self, patience_s: float) -> list[LinkError]:
        """How channels failed: returns at once when an abort says why, else after all failed or
        ``patience_s``."""
        channels = list(self._channels.values())
        with self._arrived:
            self._arrived.wait_for(
                lambda: (
                    any(isinstance(c.problem, PeerAbort) for c in channels)
                    or all(c.problem for c in channels)
                ),
                patience_s,
            )
            return [c.problem for c in channels if c.problem is not None]

    def kernel_bytes(self) -> dict[int, int]:
        """Bytes the kernel has sent on each socket since it was opened, TLS and handshake included; -1 where
        unknown."""
        return {peer: channel.kernel_bytes() for peer, channel in self._channels.items()}

    def payload_bytes(self) -> dict[int, int]:
        """Payload bytes queued for each peer so far."""
        return {peer: channel.payload_sent for peer, channel in self._channels.items()}

    def received_bytes(self) -> dict[int, int]:
        """Payload bytes received from each peer so far."""
        return {peer: channel.payload_received for peer, channel in self._channels.items()}


class _Channel:
    """One peer: its socket, the queue of what has not left, and two threads."""

    def __init__(self, link: TlsLink, peer: int, sock: ssl.SSLSocket) -> None:
        self.link, self.peer, self.sock = link, peer, sock
        self.staged: list[
            tuple[Payload, bool]
        ] = []  # the driver's thread only; the flag marks a frame's first piece
        self.unsent = 0
        self.unclaimed = 0
        self.paused = False
        self.problem: LinkError | None = None
        self.left = False  # it said goodbye
        self.inside_frame = False
        self.progress_at = time.monotonic()
        self.payload_sent = self.payload_received = 0
        self._tls = threading.Lock()
        self._writing = threading.Lock()
        self._outgoing: deque[tuple[Payload, bool]] = deque()
        self._changed = threading.Condition(threading.Lock())  # guards _outgoing, unsent, _work, _stop
        self._work = self._stop = False
        self._retry: Payload | None = None
        self._linger_until: float | None = None
        self._kernel_bytes = -1
        sock.setblocking(False)
        self.reader = threading.Thread(target=self._read_all, name=f"sfumato-read-{peer}", daemon=True)
        self.writer = threading.Thread(target=self._write_all, name=f"sfumato-write-{peer}", daemon=True)

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
            self._changed.notify_all()

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
                if not isinstance(error, ConnectionError) or not self.reader.is_alive():
                    self._fail_io(
                        error
                    )  # else the reader finds out, and may first find the peer's last words
                with self._changed:
                    self._outgoing.clear()
                    self.unsent, self._retry = 0, None
                    self._changed.notify_all()
                return True
            self._retry = None if count == len(piece) else memoryview(piece)[count:]
            with self._changed:
                self.unsent -= count
                if self.unsent == 0 or self.unsent > _DIRECT:
                    self._changed.notify_all()

    def _write_all(self) -> None:
        writable = select.poll()
        writable.register(self.sock, select.POLLOUT)
        try:
            while True:
                with self._changed:
                    while not self._work and not self._stop:
                        self._changed.wait()
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
            self._changed.notify_all()

    def drain(self, target: int, stall_s: float) -> bool:
        """Wait until at most ``target`` bytes are unsent; False when nothing moved for ``stall_s``."""
        with self._changed:
            deadline, last = time.monotonic() + stall_s, self.unsent
            while self.unsent > target:
                if self.problem is not None and not self.left:
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
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_WR)

    # receiving

    def _read_all(self) -> None:
        readable = select.poll()
        readable.register(self.sock, select.POLLIN)
        try:
            while self._read_some(readable):
                pass
        except LinkError as error:
            self._fail(LinkError(f"{peer_name(self.peer)} {error}"))
        except Exception as error:
            self._fail_io(error)
        while (
            self._linger_until is None
        ):  # someone may still read counters or write; the owner's close ends this
            with self._changed:
                if self._linger_until is None:
                    self._changed.wait(1.0)
        self.writer.join(1.0)
        self._kernel_bytes = self.kernel_bytes()
        self.sock.close()

    def _receive(self, view: memoryview, readable: select.poll) -> int:
        """At least one byte into ``view``; 0 at the end of the stream."""
        recv_into, tls = self.sock.recv_into, self._tls
        while True:
            try:
                with tls:
                    count = recv_into(view)
                self.progress_at = time.monotonic()
                return count
            except ssl.SSLWantReadError:
                readable.poll(1000)
            except ssl.SSLWantWriteError:
                time.sleep(0.001)
            except ssl.SSLZeroReturnError:
                return 0
            if self._linger_until is not None and time.monotonic() > self._linger_until:
                return 0

    def _read_some(self, readable: select.poll) -> bool:
        """Read frames for the life of the connection; False at its end."""
        buffer = bytearray(_BUFFER)
        view = memoryview(buffer)
        begin = end = 0
        bound = self.link.limits.max_frame_bytes
        while True:
            while end - begin < HEADER_BYTES:
                if begin:
                    buffer[: end - begin] = buffer[begin:end]
                    begin, end = 0, end - begin
                count = self._receive(view[end:], readable)
                if not count:
                    return self._ended(end - begin)
                end += count
            kind, dtype, tag, clock, length = parse_header(buffer, bound, begin)
            begin += HEADER_BYTES
            have = min(length, end - begin)
            if have == length:
                payload = buffer[begin : begin + length]
            else:
                payload = bytearray(length)
                payload[:have] = view[begin : begin + have]
                self.inside_frame = True
                inside = memoryview(payload)
                while have < length:
                    count = self._receive(inside[have : have + (1 << 20)], readable)
                    if not count:
                        return self._ended(1)
                    have += count
                inside.release()
                self.inside_frame = False
                begin = end = 0
            begin += length if begin or end else 0
            if begin >= end:
                begin = end = 0
            if kind == Kind.DATA:
                self._deliver(Frame(tag, dtype, clock, payload))
            elif kind == Kind.BYE:
                self._fail(LinkError(f"{peer_name(self.peer)} has left"), left=True)
            elif kind == Kind.ABORT:
                reason, error_kind, origin = parse_abort(payload)
                self._fail(
                    PeerAbort(
                        f"{peer_name(self.peer)} ended the run: {reason}",
                        reason=reason,
                        kind=error_kind,
                        origin=origin,
                    )
                )
            else:
                raise LinkError("sent a second hello")

    def _deliver(self, frame: Frame) -> None:
        link, size = self.link, len(frame.payload)
        bound = link.limits.max_unclaimed_bytes
        with link._arrived:
            while self.unclaimed > bound and not link._hungry:
                self.paused = True
                link._arrived.wait()
            self.paused = False
            if link._closed:
                return
            self.unclaimed += size
            self.payload_received += size
            if self.unclaimed > 4 * bound:
                raise LinkError(f"sent {self.unclaimed} bytes that nobody asked for")
            link._inbox.setdefault((self.peer, frame.tag), deque()).append(frame)
            link._arrived.notify_all()

    def _ended(self, partial: int) -> bool:
        inside = " inside a frame" if partial else ""
        self._fail(LinkError(f"{peer_name(self.peer)} closed the connection{inside}"))
        return False

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
        with self.link._arrived:
            if self.problem is None:  # the first cause counts
                self.problem, self.left = problem, left
            self.link._arrived.notify_all()
        with self._changed:
            self._changed.notify_all()

    def kernel_bytes(self) -> int:
        """``tcpi_bytes_sent`` (or bytes acknowledged, on an older kernel) of Linux' TCP_INFO."""
        with contextlib.suppress(OSError, AttributeError, ValueError):
            info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            if len(info) >= 208:
                return int(struct.unpack_from("=Q", info, 200)[0])
            if len(info) >= 128:
                return int(struct.unpack_from("=Q", info, 120)[0])
        return self._kernel_bytes
