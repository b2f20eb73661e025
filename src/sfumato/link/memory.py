"""In-process links between n endpoints, with an optional emulated network (latency and bandwidth)."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence

from sfumato.errors import LinkError
from sfumato.link.base import Frame, Link, PeerAbort, peer_name, public_text
from sfumato.link.frames import HEADER_BYTES, HIGHEST_BOUND, check_frame

__all__ = ["MemoryLink", "memory_links"]


class _Hub:
    """Inboxes of all endpoints under one lock."""

    def __init__(self, parties: int) -> None:
        self.lock = threading.Lock()
        self.arrived = [threading.Condition(self.lock) for _ in range(parties)]
        self.inbox: list[dict[tuple[int, bytes], deque[tuple[float, Frame]]]] = [{} for _ in range(parties)]
        self.free_at = [[0.0] * parties for _ in range(parties)]
        self.ended: list[PeerAbort | LinkError | None] = [None] * parties  # why an endpoint is gone
        self.left = [False] * parties  # it is gone and said goodbye


class MemoryLink(Link):
    """One endpoint of `memory_links`; each endpoint may live in its own thread."""

    def __init__(
        self, hub: _Hub, party: int, latency_s: float, bandwidth_bytes_s: float | None, max_frame_bytes: int
    ) -> None:
        self.party = party
        self._hub = hub
        self._latency_s = latency_s
        self._bandwidth = bandwidth_bytes_s
        self._max = max_frame_bytes
        self._queued: list[tuple[int, Frame]] = []
        self._sent_bytes: dict[int, int] = {i: 0 for i in range(len(hub.inbox)) if i != party}

    def send(self, to: int, frame: Frame) -> None:
        if to not in self._sent_bytes:
            raise LinkError(f"there is no link from {peer_name(self.party)} to {peer_name(to)}")
        check_frame(frame.dtype, frame.tag, frame.clock, frame.nbytes, self._max)
        self._queued.append((to, frame))

    def flush(self) -> None:
        if not self._queued:
            return
        hub, now = self._hub, time.monotonic()
        with hub.lock:
            if hub.ended[self.party] is not None:
                raise LinkError(f"the link of {peer_name(self.party)} is closed")
            for to, frame in self._queued:
                ready = 0.0
                if self._latency_s or self._bandwidth:
                    start = max(now, hub.free_at[self.party][to])
                    busy = (frame.nbytes + HEADER_BYTES) / self._bandwidth if self._bandwidth else 0.0
                    hub.free_at[self.party][to] = start + busy
                    ready = start + busy + self._latency_s
                hub.inbox[to].setdefault((self.party, frame.tag), deque()).append((ready, frame))
                self._sent_bytes[to] += frame.nbytes
            for to in {to for to, _ in self._queued}:
                hub.arrived[to].notify()
        self._queued.clear()

    def take(self, frm: int, tag: bytes) -> Frame | None:
        with self._hub.lock:
            return self._take(frm, tag)

    def _take(self, frm: int, tag: bytes) -> Frame | None:
        box = self._hub.inbox[self.party]
        frames = box.get((frm, tag))
        if not frames or frames[0][0] > time.monotonic():
            return None
        frame = frames.popleft()[1]
        if not frames:
            del box[frm, tag]
        return frame

    def wait(self, wanted: Sequence[tuple[int, bytes, str]], timeout_s: float) -> None:
        hub, deadline = self._hub, time.monotonic() + timeout_s
        with hub.lock:
            while True:
                now = time.monotonic()
                soonest = deadline
                for frm, tag, _ in wanted:
                    frames = hub.inbox[self.party].get((frm, tag))
                    if frames:
                        if frames[0][0] <= now:
                            return
                        soonest = min(soonest, frames[0][0])
                if soonest == deadline:
                    self._raise_lost(wanted)
                if now >= deadline:
                    frm, _, path = wanted[0]
                    raise LinkError(f"{peer_name(frm)} sent nothing for {timeout_s:g} s (waiting for {path})")
                hub.arrived[self.party].wait(soonest - now)

    def _raise_lost(self, wanted: Sequence[tuple[int, bytes, str]]) -> None:
        waited = {frm: path for frm, _, path in reversed(wanted)}
        where = wanted[0][2]
        for peer, error in enumerate(self._hub.ended):
            if error is None:
                continue
            if peer == self.party:
                raise LinkError(f"the link of {peer_name(peer)} is closed (waiting for {where})")
            if isinstance(error, PeerAbort):
                raise PeerAbort(
                    f"{error} (waiting for {waited.get(peer, where)})",
                    reason=error.reason,
                    kind=error.kind,
                    origin=error.origin,
                )
            if peer in waited or not self._hub.left[peer]:
                raise LinkError(f"{error} (waiting for {waited.get(peer, where)})")

    def abort(self, reason: str, *, kind: str = "LinkError", origin: int | None = None) -> None:
        text = public_text(reason)
        self._end(
            PeerAbort(
                f"{peer_name(self.party)} ended the run: {text}",
                reason=text,
                kind=kind,
                origin=self.party if origin is None else origin,
            ),
            said_goodbye=False,
        )

    def close(self) -> None:
        with contextlib.suppress(LinkError):
            self.flush()
        self._end(LinkError(f"{peer_name(self.party)} has left"), said_goodbye=True)

    def drop(self) -> None:
        """Vanish without a word, as a killed process does (for tests)."""
        self._end(LinkError(f"{peer_name(self.party)} closed the connection"), said_goodbye=False)

    def _end(self, error: LinkError, said_goodbye: bool) -> None:
        hub = self._hub
        with hub.lock:
            if hub.ended[self.party] is None:
                hub.ended[self.party], hub.left[self.party] = error, said_goodbye
                for condition in hub.arrived:
                    condition.notify_all()

    def payload_bytes(self) -> dict[int, int]:
        """Payload bytes sent so far, by peer."""
        return dict(self._sent_bytes)


def memory_links(
    parties: int,
    *,
    latency_s: float = 0.0,
    bandwidth_bytes_s: float | None = None,
    max_frame_bytes: int = HIGHEST_BOUND,
) -> list[MemoryLink]:
    """Links between ``parties`` endpoints of this process.

    Each ordered pair is its own pipe of ``bandwidth_bytes_s`` (None: unlimited), and a frame arrives
    ``latency_s`` after its last byte has left. No payload is copied.
    """
    hub = _Hub(parties)
    return [MemoryLink(hub, i, latency_s, bandwidth_bytes_s, max_frame_bytes) for i in range(parties)]
