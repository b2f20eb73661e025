"""One session as its supervisor sees it: a turn in the queue, a worker, and whoever ends first ends the other."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sfumato.errors import JobError, LinkError
from sfumato.link.identity import refuse, send_fields
from sfumato.runtime import telemetry
from sfumato.runtime.cluster import Cluster
from sfumato.runtime.control import heartbeat_s
from sfumato.runtime.forkserver import Forkserver, Job
from sfumato.runtime.jobs import JobQueue, NoPlace, Ticket
from sfumato.runtime.metrics import Metrics
from sfumato.runtime.passing import Pipe
from sfumato.runtime.settings import PartySettings

__all__ = ["Supervised", "Workplace"]

_log = logging.getLogger(__name__)
_START_S = 60.0  # a worker's; the first waits until torch is loaded
_GRACE_S = 3.0  # for a worker to end by itself when its client has left
_ATTEMPTS = 3
_WORD_S = 5.0  # for the rest of a word that has begun


@dataclass(eq=False)
class Supervised:
    """A session that was asked for."""

    run: str
    kind: str
    client: str
    options: Mapping[str, Any]
    wait_s: float
    pipe: Pipe | None = None
    process_id: int = 0
    outcome: str = ""
    spent: Mapping[str, float] = field(default_factory=dict)


class _Left(Exception):
    """The client ended its control connection."""


@dataclass(kw_only=True)
class Workplace:
    """What all sessions of a party share. ``came`` is called when a session's worker is there."""

    cluster: Cluster
    index: int
    folder: Path
    settings: PartySettings
    forkserver: Forkserver
    queue: JobQueue
    metrics: Metrics
    terms: Mapping[str, str]
    weights_folder: str
    threads: int | None
    log: str
    came: Callable[[Supervised], None]

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._sessions: dict[str, Supervised] = {}
        self._empty = threading.Condition(self._lock)
        self._ending = False

    def hand_over(self, run: str, sock: socket.socket) -> bool:
        """Give a connection to the worker of ``run``; False when there is none yet."""
        with self._lock:
            session = self._sessions.get(run)
            pipe = None if session is None else session.pipe
            if pipe is None:
                return False
            pipe.send({}, [sock.fileno()])
        sock.close()
        return True

    def serve(self, session: Supervised, sock: ssl.SSLSocket) -> None:
        """From the queue to the end, on the control connection ``sock``.

        Raises:
            JobError: no place in the queue, no turn in time, a run that is known already.
        """
        wake, woken = socket.socketpair()
        with wake, woken:
            wake.setblocking(False)
            with self._lock:
                if session.run in self._sessions:
                    raise JobError("this run is here already; begin another")
                self._sessions[session.run] = session
            self._serve(session, sock, wake, woken)

    def _serve(
        self, session: Supervised, sock: ssl.SSLSocket, wake: socket.socket, woken: socket.socket
    ) -> None:
        ticket: Ticket | None = None

        def changed() -> None:
            with contextlib.suppress(OSError):  # full: it is awake; closed: it has left
                wake.send(b"x")
            self.metrics.queued(self.queue.waiting)

        facts: dict[str, Any] = {"party": self.index, "run": session.run[:8], "kind": session.kind}
        try:
            with telemetry.span("session", **facts) as span:
                with telemetry.span("queue"):
                    try:
                        ticket = self.queue.enter(session.client, changed)
                    except NoPlace as error:
                        self.metrics.refused(error.word)
                        raise JobError(str(error)) from None  # the class that others know it by
                    self.metrics.queued(self.queue.waiting)
                    self._wait_for_turn(ticket, session, sock, woken)
                self._work(session, sock, span.context)
                span.set(outcome=session.outcome, **session.spent)
        except _Left:
            _log.info("the client of session %s left the queue", session.run[:8], extra={"facts": facts})
        finally:
            with self._lock:
                self._sessions.pop(session.run)
                self._empty.notify_all()
            if ticket is not None:
                self.queue.leave(ticket)
            self.metrics.queued(self.queue.waiting)

    def end(self, patience_s: float) -> None:
        """End every session; their processes are gone when this returns."""
        deadline = time.monotonic() + patience_s
        with self._lock:
            self._ending = True
            for session in self._sessions.values():
                if session.pipe is not None:
                    session.pipe.half_close()
            while any(s.pipe for s in self._sessions.values()) and time.monotonic() < deadline:
                self._empty.wait(max(0.0, deadline - time.monotonic()))
            for session in self._sessions.values():
                _kill(session)

    def _wait_for_turn(
        self, ticket: Ticket, session: Supervised, sock: ssl.SSLSocket, woken: socket.socket
    ) -> None:
        deadline = time.monotonic() + min(session.wait_s, self.settings.wait_s)
        while not ticket.granted:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                self.metrics.refused("deadline")
                raise JobError(
                    f"party {self.index} had no turn for this session in time, as others run there; try again later"
                )
            self._say(sock, {"queued": ticket.position})
            if _ready(min(left_s, heartbeat_s(self.cluster)), sock, woken) & {woken}:
                woken.recv(4096)
            _check_there(sock)

    def _work(self, session: Supervised, sock: ssl.SSLSocket, trace: str | None) -> None:
        """Start the session's worker, grant the session, and wait until one of the two ends."""
        started = time.monotonic()
        pipe = self._begin(session, sock, trace)
        self.metrics.session_started(session.kind)
        without = "crashed"  # what became of a worker that says nothing at its end
        try:
            self._say(sock, {"granted": True})
            _log.info(
                "party %d begins session %s for %s",
                self.index,
                session.run[:8],
                session.client,
                extra={"facts": {"party": self.index, "run": session.run[:8], "kind": session.kind}},
            )
            while _hear(session, pipe, sock):
                pass
        except _Left:
            without = "cancelled"  # it is given a moment to end by itself, and is ended then
            pipe.send({"leave": "the client has left"})
        finally:
            self._finish(session, pipe)
            session.outcome = session.outcome or without
            self.metrics.session_ended(
                session.kind, session.outcome, time.monotonic() - started, session.spent
            )
        if session.outcome == "crashed":
            reason = f"party {self.index} lost the process of this session (killed, or out of memory)"
            facts = {"party": self.index, "run": session.run[:8], "kind": session.kind, "outcome": "crashed"}
            _log.error(
                "party %d lost the process of a session (killed, or out of memory)",
                self.index,
                extra={"facts": {**facts, "seconds": time.monotonic() - started}},
            )
            refuse(sock, reason, "LinkError", self.index)

    def _begin(self, session: Supervised, sock: ssl.SSLSocket, trace: str | None) -> Pipe:
        deadline = time.monotonic() + _START_S
        for _ in range(_ATTEMPTS):
            pipe = self.forkserver.fork()
            while time.monotonic() < deadline:
                ready = _ready(heartbeat_s(self.cluster), sock, pipe)
                if pipe in ready:
                    message = pipe.receive(_WORD_S)
                    if message is None:
                        break  # no process: the forkserver died, or could not fork
                    session.process_id = int(message[0]["pid"])
                    pipe.send(asdict(self._job(session, trace)))
                    with self._lock:
                        session.pipe = pipe
                        if self._ending:
                            pipe.half_close()
                    self.came(session)
                    return pipe
                try:
                    _check_there(sock)
                    self._say(sock, {"queued": 0})
                except _Left:
                    pipe.close()
                    raise
            pipe.close()
        raise LinkError(f"party {self.index} could not start a process for this session; try again later")

    def _job(self, session: Supervised, trace: str | None) -> Job:
        settings = self.settings
        host = {
            "store": str(settings.storage_folder),
            "key": str(settings.storage_key),
            "client": session.client,
            "programs": settings.programs,
        }
        return Job(
            party=self.index,
            cluster=self.cluster.to_toml(),
            folder=str(self.folder),
            run=session.run,
            kind=session.kind,
            client=session.client,
            options=session.options,
            # What a client must not choose: which files of this host are read, and what its operator allows.
            operator={
                "weights_folder": self.weights_folder,
                "largest_bytes": self.cluster.limits.max_message_bytes,
                "host": host,
            },
            terms=self.terms,
            revoked=sorted(settings.revoked),
            threads=self.threads,
            arrive_s=min(session.wait_s, settings.wait_s) + self.cluster.limits.connect_s,
            longest_s=settings.longest_s,
            memory_mb=settings.session_mb,
            log=self.log,
            trace=trace,
        )

    def _finish(self, session: Supervised, pipe: Pipe) -> None:
        """The worker's process is gone, and with it the session's shares."""
        deadline = time.monotonic() + _GRACE_S
        while _hear(session, pipe, None, max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                _kill(session)
                deadline += _GRACE_S
        with self._lock:
            session.pipe = None
            self._empty.notify_all()
        pipe.close()

    def _say(self, sock: ssl.SSLSocket, fields: Mapping[str, Any]) -> None:
        try:
            send_fields(sock, fields, self.cluster.limits.connect_s)
        except OSError:
            raise _Left from None


def _hear(
    session: Supervised, pipe: Pipe, sock: ssl.SSLSocket | None, timeout_s: float | None = None
) -> bool:
    """Wait for a word of the worker; False once its process has ended. Raises `_Left` when the client ended
    ``sock``."""
    if pipe.pending() or pipe in _ready(timeout_s, *([pipe] if sock is None else [pipe, sock])):
        message = pipe.receive(_WORD_S)
        if message is None:
            return False
        if "outcome" in message[0]:
            session.outcome = str(message[0]["outcome"])
            session.spent = message[0]["spent"]
    elif sock is not None:
        _check_there(sock)
    return True


def _ready(timeout_s: float | None, *ends: Any) -> set[Any]:
    poll = select.poll()
    for end in ends:
        poll.register(end, select.POLLIN)
    found = {fd for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)}
    return {end for end in ends if end.fileno() in found}


def _check_there(sock: ssl.SSLSocket) -> None:
    """A client says nothing after its request: what can be read is its end, or no client of ours."""
    if sock.pending() or _ready(0.0, sock):
        raise _Left


def _kill(session: Supervised) -> None:
    """Its process lives as long as its pipe has not ended, so that the id is no other's."""
    if session.process_id and session.pipe is not None:
        with contextlib.suppress(OSError):
            os.kill(session.process_id, signal.SIGKILL)
