"""Links over TLS sockets: every wait bounded, frames coalesced, big simultaneous sends without deadlock.

`TlsLink.flush` writes small batches itself and `TlsLink.wait` reads by itself, so that a round costs no
thread switch; one
sender and one receiver thread per peer do the rest while the driver computes.
"""

from __future__ import annotations

import contextlib
import os
import select
import ssl
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence

from sfumato.errors import LinkError
from sfumato.link.base import Frame, Link, PeerAbort, peer_name
from sfumato.link.channel import FRAME_COST, Channel, LinkLimits
from sfumato.link.frames import Kind, abort_payload, check_frame, pack_header

__all__ = ["LinkLimits", "TlsLink"]

_NO_TAG = bytes(8)
_RECENT_S = 0.005


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
        self._channels = {peer: Channel(self, peer, sock) for peer, sock in sockets.items()}
        self.waits = 0
        self._driver_reads = False
        self._left_at = 0.0
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._readers = len(self._channels)
        self._open = {channel.descriptor: channel for channel in self._channels.values()}
        self._poll = select.poll()
        for descriptor in (self._wake_read, *self._open):
            self._poll.register(descriptor, select.POLLIN)
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

    def settle(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for channel in self._channels.values():
            if channel.unsent:
                channel.drain(0, max(0.0, deadline - time.monotonic()))

    def wire_bytes(self) -> int:
        counts = self.kernel_bytes().values()
        return -1 if any(count < 0 for count in counts) else sum(counts)

    def take(self, frm: int, tag: bytes) -> Frame | None:
        with self._arrived:
            frames = self._inbox.get((frm, tag))
            if not frames:
                return None
            frame = frames.popleft()
            if not frames:
                del self._inbox[frm, tag]
            channel = self._channels[frm]
            channel.unclaimed -= FRAME_COST + len(frame.payload)
            if channel.paused:
                self._arrived.notify_all()
            return frame

    def wait(self, wanted: Sequence[tuple[int, bytes, str]], timeout_s: float) -> None:
        start = time.monotonic()
        deadline, inbox = start + timeout_s, self._inbox
        self._driver_reads = True  # set before the first look at the inbox: later arrivals wake the poll
        self.waits += 1
        try:
            self._set_hungry(True)
            while True:
                with self._arrived:
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
                self._read(deadline - now)
        finally:
            self._hungry = False
            self._left_at = time.monotonic()
            self._driver_reads = False

    def _read(self, patience_s: float) -> None:
        """Read what is there, or wait for something to read; returns after one step of each ready channel."""
        ready = [c for c in self._open.values() if c.more]
        if not ready:
            for descriptor, _ in self._poll.poll(min(patience_s, 1.0) * 1000 + 1):
                channel = self._open.get(descriptor)
                if channel is None:
                    with contextlib.suppress(OSError):
                        os.read(descriptor, 4096)
                else:
                    ready.append(channel)
        for channel in ready:
            if channel.reading.acquire(timeout=0.002):
                try:
                    channel.advance()
                    if channel.done:
                        self._poll.unregister(channel.descriptor)
                        del self._open[channel.descriptor]
                finally:
                    channel.reading.release()

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

    def _lost(self, channel: Channel, doing: str) -> LinkError:
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
                self._wake()
            for channel in self._channels.values():
                channel.finish(last_words, abort=abort)
            deadline = time.monotonic() + patience_s
            for channel in self._channels.values():
                if channel.hears:
                    channel.drain(0, max(0.0, deadline - time.monotonic()))
                channel.half_close()
            deadline = (
                time.monotonic() + 0.2
            )  # usually the peers close too; else the readers linger by themselves
            for channel in self._channels.values():
                channel.reader.join(max(0.0, deadline - time.monotonic()))

    def linger(self, timeout_s: float) -> None:
        """After the end: wait until the peers have closed, too, so that they have read our last words."""
        deadline = time.monotonic() + timeout_s
        for channel in self._channels.values():
            channel.reader.join(max(0.0, deadline - time.monotonic()))

    def _set_hungry(self, value: bool) -> None:
        with self._arrived:
            self._hungry = value
            if any(channel.paused for channel in self._channels.values()):
                self._arrived.notify_all()

    def _wake(self) -> None:
        """Under ``_arrived``: wake who waits on the condition, and a driver that polls."""
        self._arrived.notify_all()
        if self._driver_reads and self._readers:
            with contextlib.suppress(OSError):
                os.write(self._wake_write, b"x")

    # what the channels ask

    def driver_reads(self) -> bool:
        return self._driver_reads or time.monotonic() - self._left_at < _RECENT_S

    def let_through(self, channel: Channel) -> None:
        with self._arrived:
            while channel.unclaimed > self.limits.max_unclaimed_bytes and not self._hungry:
                channel.paused = True
                self._arrived.wait()
            channel.paused = False

    def deliver(self, channel: Channel, frame: Frame) -> None:
        with self._arrived:
            channel.unclaimed += FRAME_COST + len(frame.payload)
            if channel.unclaimed > 4 * self.limits.max_unclaimed_bytes:
                raise LinkError(f"sent {channel.unclaimed} bytes that nobody asked for")
            if not self._closed:
                self._inbox.setdefault((channel.peer, frame.tag), deque()).append(frame)
                if threading.get_ident() == channel.reader.ident:
                    self._wake()

    def failed(self, channel: Channel, problem: LinkError, left: bool) -> None:
        with self._arrived:
            if channel.problem is None:
                channel.problem, channel.left = problem, left
            self._wake()

    def reader_ended(self) -> None:
        with self._arrived:
            self._readers -= 1
            if self._readers == 0:
                os.close(self._wake_read)
                os.close(self._wake_write)

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
