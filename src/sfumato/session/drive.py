"""Drivers: run one party's coroutines over a link, or all parties in lockstep in one thread."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.errors import ProtocolError
from sfumato.link.base import Frame, Link
from sfumato.session.ledger import Ledger
from sfumato.session.randomness import PairStreams
from sfumato.session.session import Gather, Session, Wanted

__all__ = ["LockstepLink", "Scheduler", "lockstep", "simulate", "simulation_keys"]


@dataclass(eq=False, slots=True)
class _Task:
    coroutine: Coroutine[Any, Any, Any]
    parent: _Task | None = None
    slot: int = 0
    missing: int = 0
    wanted: tuple[tuple[int, bytes, str], ...] = ()
    frames: list[Frame | None] | None = None
    results: list[Any] | None = None


class Scheduler:
    """Runs the tasks of one party: ready tasks first, then whatever the link delivers."""

    def __init__(self, link: Link, main: Coroutine[Any, Any, Any]) -> None:
        self._link = link
        self._ready: deque[tuple[_Task, Any]] = deque([(_Task(main), None)])
        self._waiting: dict[tuple[int, bytes], tuple[_Task, int, str]] = {}
        self.result: Any = None
        self.done = False

    def advance(self) -> bool:
        """Run until every task waits; True when something moved."""
        moved = self._deliver()
        while self._ready:
            moved = True
            task, value = self._ready.popleft()
            self._step(task, value)
            if not self._ready:
                self._deliver()
        return moved

    def run(self, timeout_s: float) -> Any:
        """Run to the end over a real link; every wait ends after ``timeout_s``.

        Raises:
            LinkError: from the link, on timeout or loss of a peer.
        """
        try:
            while True:
                self.advance()
                if self.done:
                    break
                self._link.flush()
                self._link.wait(
                    [(frm, tag, path) for (frm, tag), (_, _, path) in self._waiting.items()], timeout_s
                )
            self._link.flush()
        finally:
            self.close()
        return self.result

    def waiting_for(self) -> list[str]:
        return [f"{path} from party {frm}" for (frm, _), (_, _, path) in self._waiting.items()]

    def close(self) -> None:
        """Drop unfinished coroutines without warnings."""
        for task, _ in self._ready:
            task.coroutine.close()
        for task, _, _ in self._waiting.values():
            task.coroutine.close()

    def _deliver(self) -> bool:
        arrived = []
        for key, (task, slot, _) in self._waiting.items():
            frame = self._link.take(*key)
            if frame is not None:
                arrived.append((key, task, slot, frame))
        for key, task, slot, frame in arrived:
            del self._waiting[key]
            assert task.frames is not None
            task.frames[slot] = frame
            task.missing -= 1
            if task.missing == 0:
                self._ready.append((task, task.frames))
        return bool(arrived)

    def _step(self, task: _Task, value: Any) -> None:
        try:
            request = task.coroutine.send(value)
        except StopIteration as stop:
            self._finish(task, stop.value)
            return
        if isinstance(request, Wanted):
            task.frames = [None] * len(request.frames)
            task.missing = 0
            for slot, (frm, tag, path) in enumerate(request.frames):
                frame = self._link.take(frm, tag)
                if frame is not None:
                    task.frames[slot] = frame
                else:
                    self._waiting[frm, tag] = (task, slot, path)
                    task.missing += 1
            if task.missing == 0:
                self._ready.appendleft((task, task.frames))
        elif isinstance(request, Gather):
            task.results = [None] * len(request.coroutines)
            task.missing = len(request.coroutines)
            if not request.coroutines:
                self._ready.append((task, []))
            for slot, coroutine in enumerate(request.coroutines):
                self._ready.append((_Task(coroutine, task, slot), None))
        else:
            raise ProtocolError(f"a protocol coroutine yielded {type(request).__name__}, not an exchange")

    def _finish(self, task: _Task, result: Any) -> None:
        parent = task.parent
        if parent is None:
            self.result, self.done = result, True
            return
        assert parent.results is not None
        parent.results[task.slot] = result
        parent.missing -= 1
        if parent.missing == 0:
            self._ready.append((parent, parent.results))


class LockstepLink(Link):
    """Channels of a one-thread simulation: a frame is there as soon as it is sent."""

    def __init__(self, party: int, boxes: dict[tuple[int, int], dict[bytes, Frame]]) -> None:
        self.party = party
        self._boxes = boxes

    def send(self, to: int, frame: Frame) -> None:
        box = self._boxes.setdefault((self.party, to), {})
        if frame.tag in box:
            raise ProtocolError(f"party {self.party} sent two messages of one name to party {to}")
        box[frame.tag] = frame

    def flush(self) -> None:
        """Nothing is held back."""

    def take(self, frm: int, tag: bytes) -> Frame | None:
        return self._boxes.get((frm, self.party), {}).pop(tag, None)

    def wait(self, wanted: Sequence[tuple[int, bytes, str]], timeout_s: float) -> None:
        raise ProtocolError("a lockstep party never waits; use lockstep()")

    def abort(self, reason: str) -> None:
        self.close()

    def close(self) -> None:
        self._boxes.clear()

    @staticmethod
    def mesh(parties: int) -> list[LockstepLink]:
        boxes: dict[tuple[int, int], dict[bytes, Frame]] = {}
        return [LockstepLink(i, boxes) for i in range(parties)]


def lockstep(schedulers: Sequence[Scheduler]) -> list[Any]:
    """Run all parties of a simulation to the end, in one thread; their results in order.

    Raises:
        ProtocolError: every party waits for a message that nobody sends.
    """
    try:
        while not all(scheduler.done for scheduler in schedulers):
            moved = [scheduler.advance() for scheduler in schedulers if not scheduler.done]
            if not any(moved):
                stuck = [w for scheduler in schedulers for w in scheduler.waiting_for()[:2]]
                raise ProtocolError(f"the parties wait for each other: {', '.join(stuck[:6])}")
    finally:
        for scheduler in schedulers:
            scheduler.close()
    return [scheduler.result for scheduler in schedulers]


def simulation_keys(seed: bytes, party: int, parties: int = 3) -> dict[int, bytes]:
    """Pair keys of a simulated run, derived from one seed that every simulated party knows. Never for real
    runs.
    """
    keys = {}
    for peer in range(parties):
        if peer != party:
            low, high = sorted((party, peer))
            keys[peer] = hashlib.blake2b(
                f"simulated pair {low}{high}".encode(), key=seed, digest_size=32
            ).digest()
    return keys


def simulate(
    main: Callable[[Session], Coroutine[Any, Any, Any]],
    *,
    parties: int = 3,
    seed: bytes = b"simulation",
    device: str = "cpu",
    streams: Callable[[int], PairStreams] | None = None,
    links: Sequence[Link] | None = None,
) -> tuple[list[Any], list[Ledger]]:
    """Run ``main(session)`` for every party in lockstep; results and ledgers in party order.

    ``device="meta"`` runs on shapes alone: the ledgers are exact, nothing is computed. ``streams`` and
    ``links`` replace randomness and channels in tests.
    """
    mesh = links or LockstepLink.mesh(parties)
    ledgers = [Ledger() for _ in range(parties)]
    sessions = []
    for i in range(parties):
        drawn = streams(i) if streams else PairStreams(simulation_keys(seed, i, parties), device)
        sessions.append(Session(i, mesh[i], drawn, ledgers[i], device=device))
    results = lockstep([Scheduler(mesh[i], main(sessions[i])) for i in range(parties)])
    for session, ledger in zip(sessions, ledgers, strict=True):
        ledger.rounds = session.clock if isinstance(session.clock, int) else 0
    return results, ledgers
