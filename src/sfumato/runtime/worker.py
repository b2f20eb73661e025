"""One session of one party, in a process of its own: meets the client and the other parties, and hands commands to the
machine. When the process ends, the shares are gone."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sfumato.errors import LinkError, SfumatoError
from sfumato.link.base import CLIENT, Link, PeerAbort, peer_name, public_text
from sfumato.link.identity import (
    Credentials,
    answer,
    dial,
    fingerprint_of,
    party_identity,
    refuse,
    welcome,
)
from sfumato.link.tls import TlsLink
from sfumato.runtime import telemetry
from sfumato.runtime.cluster import Cluster, link_limits
from sfumato.runtime.commands import Call, Close, Command, digest, from_message
from sfumato.runtime.control import as_raised
from sfumato.runtime.forkserver import Job
from sfumato.runtime.handshake import agree, compare_digests, run_terms
from sfumato.runtime.memory import bound_memory, hold_memory
from sfumato.runtime.passing import Pipe
from sfumato.runtime.wire import MessageStream

__all__ = ["Machine", "MachineFactory", "public_reason", "serve"]

_log = logging.getLogger(__name__)
_MAX_GREETINGS = 8
_START_S = 30.0
_LAST_WORDS_S = 0.5
_LINGER_S = 1.0
_OVERTIME_S = 5.0  # for a session whose time is up to end by itself


class Machine(Protocol):
    """What executes commands at one party."""

    def handle(self, command: Command, attachments: list[Tensor]) -> tuple[dict[str, Any], list[Tensor]]:
        """Do ``command``; the reply's fields and tensors go to the client."""

    def close(self) -> None:
        """Forget every share."""


MachineFactory = Callable[[int, Link, dict[int, bytes], dict[str, Any]], Machine]
"""``make_machine(party, link, pair_keys, options)``, called once per session."""


def public_reason(error: BaseException, party: int) -> tuple[str, str, int]:
    """(sentence, error class, origin) that others may see of a failure. Texts of foreign exceptions may hold
    values: not shown."""
    if isinstance(error, PeerAbort):
        return error.reason, error.kind, error.origin
    if isinstance(error, SfumatoError):
        return public_text(str(error)), type(error).__name__, party
    if isinstance(error, MemoryError):
        reason = f"party {party} has no memory left for this session; ask for less, or its operator for more"
        return reason, "JobError", party
    return f"internal error in party {party} ({type(error).__name__})", "SfumatoError", party


def serve(pipe: Pipe, make_machine: MachineFactory) -> None:
    """Serve the session that the first message on ``pipe`` describes, then report how it went."""
    with contextlib.suppress(OSError):  # out of memory, the session goes, and not its party
        Path("/proc/self/oom_score_adj").write_text("500")
    pipe.send({"pid": os.getpid()})
    message = pipe.receive(_START_S)
    if message is None:
        return
    job = Job(**{name: value for name, value in message[0].items() if name != "descriptors"})
    telemetry.configure_logging(job.log)
    telemetry.configure_tracing()
    hold_memory()
    bound_memory(job.memory_mb)
    if job.threads:
        torch.set_num_threads(job.threads)
    worker = _Worker(pipe, job, make_machine)
    with telemetry.span("worker", parent=job.trace, party=job.party, run=job.run[:8], kind=job.kind):
        report = worker.run()
    pipe.send(report)
    worker.linger()
    telemetry.flush()


class _End(NamedTuple):
    """Why a session must end, whatever it is doing."""

    reason: str
    kind: str
    outcome: str


class _Worker:
    """One session."""

    def __init__(self, pipe: Pipe, job: Job, make_machine: MachineFactory) -> None:
        self._pipe, self.job, self._make_machine = pipe, job, make_machine
        self.cluster, self.index = Cluster.parse(job.cluster), job.party
        credentials = Credentials.in_folder(job.folder)
        self._as_server = credentials.context(server=True)
        self._as_client = credentials.context(server=False)
        self._arrivals = threading.Condition()
        self._arrived: dict[int, ssl.SSLSocket | None] = {}  # None once it is taken
        self._greetings = threading.BoundedSemaphore(_MAX_GREETINGS)
        self._leaving: _End | None = None
        self._links: list[TlsLink] = []
        self._calls = 0
        self._started = time.monotonic()
        self._at: dict[str, Any] = {"stage": "arrive"}  # where the session is, for the log
        threading.Thread(target=self._listen, name="sfumato-supervisor", daemon=True).start()

    # what the supervisor says

    def _listen(self) -> None:
        while (message := self._pipe.receive()) is not None:
            fields, descriptors = message
            if "leave" in fields:
                self._leave(_End(str(fields["leave"]), "LinkError", "cancelled"), CLIENT)
            for descriptor in descriptors:
                self._take(descriptor)
        # The supervisor is gone or stops: nothing of the session may outlive it.
        end = _End(f"party {self.index} was stopped", "LinkError", "cancelled")
        try:
            last_words = threading.Thread(target=self._leave, args=(end, self.index), daemon=True)
            last_words.start()
            last_words.join(_LAST_WORDS_S)
        finally:
            os._exit(1)

    def _take(self, descriptor: int) -> None:
        """Greet a caller, in a thread of its own."""
        raw = None
        try:
            raw = socket.socket(fileno=descriptor)
            if not self._greetings.acquire(blocking=False):
                raw.close()
                return
            try:
                threading.Thread(target=self._greet, args=(raw,), name="sfumato-greet", daemon=True).start()
            except BaseException:
                self._greetings.release()
                raise
        except (OSError, RuntimeError, MemoryError) as error:  # the session goes on with whom it has
            if raw is not None:
                raw.close()
            extra = self._facts(error=error)
            _log.warning("party %d could not greet a caller", self.index, extra=extra)

    def _leave(self, end: _End, origin: int) -> None:
        """End the session at all its links, also while it computes."""
        with self._arrivals:
            self._leaving = self._leaving or end
            links = list(self._links)
            self._arrivals.notify_all()
        for link in links:
            link.abort(end.reason, kind=end.kind, origin=origin)

    def _watch_time(self) -> None:
        """End a session that runs too long: what it computes now ends with the next exchange, or with its process."""
        time.sleep(self.job.longest_s)
        reason = f"party {self.index} lets a session run for {self.job.longest_s:g} s, and this one has; begin another"
        self._leave(_End(reason, "JobError", "expired"), self.index)
        time.sleep(_OVERTIME_S)
        _log.warning(
            "party %d ends session %s: %s",
            self.index,
            self.job.run[:8],
            reason,
            extra=self._facts(**self._at),
        )
        self._pipe.send({"outcome": "expired", "seconds": self._seconds(), "spent": {}})
        os._exit(1)

    def _greet(self, raw: socket.socket) -> None:
        try:
            sock, identity, hello = answer(raw, self._as_server, self.cluster.limits.connect_s)
            who, problem = self._place(identity, fingerprint_of(sock), hello)
            with self._arrivals:
                if not problem and who in self._arrived:
                    problem = f"party {self.index} already has a connection from {identity} for this run"
                if not problem:
                    self._arrived[who] = sock
                    self._arrivals.notify_all()
            if problem:
                refuse(sock, problem)
                raise LinkError(problem)
        except SfumatoError as error:
            reason, extra = public_text(str(error)), self._facts(error=error)
            _log.warning("party %d turned a caller away: %s", self.index, reason, extra=extra)
        except Exception as error:
            where, extra = _traced(error), self._facts(error=error)
            _log.error("party %d failed to greet a caller: %s", self.index, where, extra=extra)
        finally:
            self._greetings.release()

    def _place(self, identity: str, fingerprint: str, hello: Mapping[str, Any]) -> tuple[int, str]:
        """(who of this session it is, why it is not let in)."""
        callers = {party_identity(i): i for i in range(self.index) if self.job.kind == "run"}
        if fingerprint in self.job.revoked:
            return CLIENT, f"party {self.index} does not take the certificate of {identity} any more"
        if hello.get("run") != self.job.run:
            return CLIENT, f"party {self.index} serves another run here"
        if identity == self.job.client:
            return CLIENT, ""
        if identity not in callers:
            return CLIENT, f"party {self.index} takes no call from {identity} here"
        pinned = self.cluster.parties[callers[identity]].fingerprint
        if pinned is not None and pinned != fingerprint:
            return CLIENT, (
                f"the certificate of {identity} is not the one in the cluster file of party {self.index}"
            )
        return callers[identity], ""

    # the session

    def run(self) -> dict[str, Any]:
        """The whole session; what the supervisor is told of it."""
        machine: Machine | None = None
        to_peers: TlsLink | None = None
        outcome, sent = "done", 0
        try:
            to_client = self._link({CLIENT: self._arrival(CLIENT, self.job.arrive_s, None)})
            if self.job.longest_s:  # from here: before, the client may wait for its turn at another party
                threading.Thread(target=self._watch_time, name="sfumato-time", daemon=True).start()
            if self.job.kind == "share":
                self._share(to_client)
            else:
                self._at = {"stage": "meet"}
                with telemetry.span("meet"):
                    to_peers = self._link(self._meet(to_client))
                    machine = self._prepare(to_peers)
                self._serve(to_client, to_peers, machine)
            for link in self._links:
                link.close()
        except BaseException as error:
            outcome = self._failed(error)
            if not isinstance(error, Exception):
                raise
        finally:
            rounds = int(getattr(machine, "clock", 0))  # a machine of tests may have none
            if machine is not None:
                machine.close()
        if to_peers is not None:
            sent = sum(to_peers.payload_bytes().values())
        seconds = self._seconds()
        _log.info(
            "party %d ended session %s after %.1f s",
            self.index,
            self.job.run[:8],
            seconds,
            extra=self._facts(seconds=seconds, outcome=outcome),
        )
        spent = {"bytes_sent": sent, "rounds": rounds, "calls": self._calls}
        return {"outcome": outcome, "seconds": seconds, "spent": spent}

    def _failed(self, error: BaseException) -> str:
        """Tell everybody why; how the session ended, in a word."""
        reason, kind, origin = public_reason(error, self.index)
        if (
            self._leaving is not None and kind == "LinkError"
        ):  # its links were closed for that; else it had failed before
            reason, kind = self._leaving.reason, self._leaving.kind
        run, extra = (
            self.job.run[:8],
            self._facts(
                **self._at,
                error=as_raised(error) if isinstance(error, SfumatoError) else error,
                origin="client" if origin == CLIENT else origin,
                seconds=self._seconds(),
            ),
        )
        if isinstance(error, SfumatoError):
            _log.warning("party %d ends session %s: %s", self.index, run, reason, extra=extra)
        else:
            _log.error("party %d ends session %s: %s", self.index, run, _traced(error), extra=extra)
        for link in reversed(self._links):  # the peers first: they find out by the client else
            link.abort(reason, kind=kind, origin=origin)
        if self._leaving is not None:
            return self._leaving.outcome
        if origin == CLIENT or reason.startswith(peer_name(CLIENT)):
            waited = "did not call" in reason or "sent nothing" in reason
            return "expired" if waited else "cancelled"
        return "lost" if kind == "LinkError" else "failed"

    def _facts(self, **more: Any) -> dict[str, Any]:
        """What a line about this session says to a log store, as ``extra`` of the logger."""
        return {"facts": {"party": self.index, "run": self.job.run[:8], "kind": self.job.kind, **more}}

    def _seconds(self) -> float:
        return round(time.monotonic() - self._started, 3)

    def linger(self) -> None:
        """Leave the peers a moment to read what was said last: a closed socket may take it back."""
        deadline = time.monotonic() + _LINGER_S
        for link in self._links:
            link.linger(max(0.0, deadline - time.monotonic()))

    def _link(self, sockets: dict[int, ssl.SSLSocket]) -> TlsLink:
        link = TlsLink(self.index, sockets, link_limits(self.cluster))
        with self._arrivals:
            self._links.append(link)
            leaving = self._leaving
        if leaving is not None:
            raise LinkError(leaving.reason)
        return link

    def _arrival(self, who: int, timeout_s: float, to_client: TlsLink | None) -> ssl.SSLSocket:
        """The connection from ``who``, welcomed. Ends early without a client."""
        deadline = time.monotonic() + timeout_s
        with self._arrivals:
            while (sock := self._arrived.get(who)) is None:
                if self._leaving is not None:
                    raise LinkError(self._leaving.reason)
                if to_client is not None and (lost := to_client.problems(0.0)):
                    raise lost[0]
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise LinkError(
                        f"{peer_name(who)} did not call party {self.index} within {timeout_s:g} s"
                    )
                self._arrivals.wait(left_s if to_client is None else min(left_s, 0.1))
            self._arrived[who] = None
        welcome(sock, {"party": self.index}, self.cluster.limits.connect_s)
        return sock

    def _meet(self, to_client: TlsLink) -> dict[int, ssl.SSLSocket]:
        """Connections to both peers for this run: lower indices call, higher ones answer. Ends early without
        a client."""
        timeout_s = self.cluster.limits.connect_s
        peers: dict[int, ssl.SSLSocket] = {}
        try:
            for peer in range(self.index):
                peers[peer] = self._arrival(peer, timeout_s, to_client)
            for peer in range(self.index + 1, 3):
                member = self.cluster.parties[peer]
                peers[peer], _ = dial(
                    (member.host, member.port),
                    self._as_client,
                    name=f"party {peer}",
                    identity=party_identity(peer),
                    fingerprint=member.fingerprint,
                    hello={"run": self.job.run},
                    run=self.job.run,
                    timeout_s=timeout_s,
                    give_up=lambda: bool(to_client.problems(0.0)),
                )
                if fingerprint_of(peers[peer]) in self.job.revoked:
                    raise LinkError(
                        f"party {self.index} does not take the certificate of party {peer} any more"
                    )
        except BaseException:
            for sock in peers.values():
                sock.close()
            raise
        return peers

    def _prepare(self, link: TlsLink) -> Machine:
        job = self.job
        terms = run_terms(job.run, job.client, job.options, job.terms)
        keys = agree(link, self._peers, job.run, terms, self.cluster.limits.stall_s)
        return self._make_machine(self.index, link, keys, {**job.options, **job.operator})

    @property
    def _peers(self) -> list[int]:
        return [i for i in range(3) if i != self.index]

    def _stream(self, to_client: TlsLink) -> MessageStream:
        limits = self.cluster.limits
        return MessageStream(to_client, CLIENT, limits.max_message_bytes, limits.max_frame_bytes)

    def _serve(self, to_client: TlsLink, to_peers: TlsLink, machine: Machine) -> None:
        limits = self.cluster.limits
        stream = self._stream(to_client)
        stream.send({"ready": True})
        for number in range(2**62):
            self._at["stage"] = "receive"  # beside the command before, if there was one
            header, tensors = stream.receive(limits.idle_s, "the next command", limits.stall_s)
            command, attachments = from_message(header, tensors)
            del tensors
            word = type(command).__name__.lower()
            self._at = {"stage": "compare", "command": word, "step": number}
            compare_digests(to_peers, self._peers, number, digest(command, attachments), limits.stall_s)
            if isinstance(command, Close):
                stream.send({})
                return
            self._calls += isinstance(command, Call)
            self._at["stage"] = "command"
            with telemetry.span(word) if word in telemetry.SPANS else contextlib.nullcontext():
                reply, values = machine.handle(command, attachments)
            del attachments
            self._at["stage"] = "reply"
            stream.send(reply, values)

    def _share(self, to_client: TlsLink) -> None:
        from sfumato.runtime.sharing import receive_model
        from sfumato.runtime.store import ModelStore

        limits, host = self.cluster.limits, self.job.operator["host"]
        self._at = {"stage": "store"}
        store = ModelStore(host["store"], host["key"], self.index)
        stream = self._stream(to_client)
        receive_model(stream, store, self.job.client, idle_s=limits.idle_s, stall_s=limits.stall_s)


def _traced(error: BaseException) -> str:
    """What failed and where, without the exception's text: that may hold values."""
    frames = [
        f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)
    ]
    return f"{type(error).__name__} at {' < '.join(reversed(frames))}"
