"""What a party reads before a session and beside it: preambles, control requests, ``party.toml``, its own pipes."""

from __future__ import annotations

import io
import json
import os
import secrets
import socket
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from inputs import changed_fields, refusing

from sfumato.link.frames import Kind, abort_payload, pack_header
from sfumato.link.identity import client_identity, owner_identity, party_identity, read_fields
from sfumato.link.memory import memory_links
from sfumato.link.preamble import PREAMBLE_BYTES, PROTOCOL_VERSION, Preamble, preamble
from sfumato.runtime.authority import init_cluster
from sfumato.runtime.cluster import Cluster
from sfumato.runtime.control import greeting
from sfumato.runtime.forkserver import Job
from sfumato.runtime.handshake import run_terms
from sfumato.runtime.jobs import JobQueue
from sfumato.runtime.machine import make_machine
from sfumato.runtime.metrics import Metrics
from sfumato.runtime.passing import Pipe
from sfumato.runtime.requests import Requests
from sfumato.runtime.settings import PartySettings
from sfumato.runtime.supervision import Supervised, Workplace

__all__ = ["SEEDS", "TARGETS"]

_WHO = (client_identity("client"), owner_identity("owner"), party_identity(1))


def said(data: bytes) -> None:
    """A connection's first bytes."""
    for part in (data, data[:PREAMBLE_BYTES].ljust(PREAMBLE_BYTES, b"\0")):
        with refusing():
            found = Preamble.parse(part)
            assert found.version != PROTOCOL_VERSION or preamble(found.run) == part


class _Socket(io.BytesIO):
    """A TLS socket of a caller, with the input to read."""

    def settimeout(self, seconds: float | None) -> None:
        pass

    def recv(self, count: int) -> bytes:
        return self.read(1 + count // 2)

    def sendall(self, data: bytes) -> None:
        pass

    def getpeercert(self, binary_form: bool = False) -> bytes:
        return b"a certificate"


def hello(data: bytes) -> None:
    """A hello, or an answer to one, as it is read off the wire."""
    with refusing():
        read_fields(_Socket(data), "party 0", 10.0)  # type: ignore[arg-type]


class _Place(Workplace):
    """Sessions that are granted: to the worker's machine, over the pipe, without a process."""

    def serve(self, session: Supervised, sock: Any) -> None:
        ours, theirs = Pipe.pair()
        try:
            assert ours.send(asdict(self._job(session, None)))
            message = theirs.receive(10.0)
            assert message is not None, "a job that its worker cannot read"
        finally:
            ours.close()
            theirs.close()
        job = Job(**{name: value for name, value in message[0].items() if name != "descriptors"})
        Cluster.parse(job.cluster)
        terms = run_terms(job.run, job.client, job.options, job.terms)
        json.dumps(terms).encode()
        link = memory_links(3)[0]
        keys = {1: b"\1" * 32, 2: b"\2" * 32}
        make_machine(0, link, keys, {**job.options, **job.operator}).close()


@cache
def _requests() -> Requests:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    init_cluster(folder / "c")
    home = folder / "c" / "party0"
    settings = PartySettings.load(home)
    place = _Place(
        cluster=Cluster.load(home), index=0, folder=home, settings=settings, forkserver=None,  # type: ignore[arg-type]
        queue=JobQueue(1, 1, 1), metrics=Metrics(0), terms={}, weights_folder="", threads=None, log="text",
        came=lambda session: None,
    )  # fmt: skip
    return Requests(place, dict)


def request(data: bytes) -> None:
    """A control request, of a client, an owner and a party: checked, and done up to the worker's machine."""
    payload = pack_header(Kind.HELLO, 0, bytes(8), 0, min(len(data), 65536)) + data[:65536]
    with refusing():
        fields = read_fields(_Socket(payload), "a caller", 10.0)  # type: ignore[arg-type]
        for identity in _WHO:
            sock: Any = _Socket()
            with refusing():
                _requests()._check(sock, identity, fields, Preamble(PROTOCOL_VERSION, None))
                _requests()._reply(sock, identity, fields)


def request_fields(data: bytes) -> None:
    """A real request with fields that the input changes."""
    choices = iter(data)
    known = _known()
    request(json.dumps(changed_fields(known[next(choices, 0) % len(known)], choices)).encode())


def party_file(data: bytes) -> None:
    """The text of a ``party.toml``."""
    with refusing(1 << 20):
        PartySettings.parse(data.decode("utf-8", "replace"))


def pipe(data: bytes) -> None:
    """What another process of the party writes before it ends, in the middle of a message or of nonsense."""
    ours, theirs = socket.socketpair()
    end = Pipe(theirs)
    with ours:
        ours.sendall(data)
        socket.send_fds(ours, [b"\n"], [theirs.fileno()])
    try:
        while (message := end.receive(1.0)) is not None:
            assert isinstance(message[0], dict)
            for descriptor in message[1]:
                os.close(descriptor)
    finally:
        end.close()


def _known() -> list[dict[str, Any]]:
    session = {
        "ask": "session", "run": secrets.token_hex(16), "kind": "run", "wait_s": 60.0,
        "options": {"protocol": "rep3", "fused": True, "certificate": "all", "tiles": 4},
    }  # fmt: skip
    asked = [
        session,
        {**session, "kind": "share", "options": {}},
        *({"ask": what} for what in ("status", "models")),
    ]
    return [{**greeting(), **one} for one in [*asked, {"ask": "remove", "model": "house"}]]


TARGETS: dict[str, Callable[[bytes], None]] = {
    "preamble": said, "hello": hello, "request": request, "request_fields": request_fields,
    "party_file": party_file, "pipe": pipe,
}  # fmt: skip


def _framed(kind: int, payload: bytes) -> bytes:
    return pack_header(kind, 0, bytes(8), 0, len(payload)) + payload


_SETTINGS = b"""[sessions]
at_once = 3
wait_s = 60.5
[accept]
programs = "approved"
revoked = ["sha256:%s"]
[operations]
host = "127.0.0.1"
port = 9464
[storage]
folder = "store"
""" % (b"ab" * 32)

#: Inputs that the real writers make, by target.
SEEDS: dict[str, list[bytes]] = {
    "preamble": [preamble(), preamble("0123456789abcdef" * 2), b"sfumato\x07" + bytes(16)],
    "hello": [_framed(Kind.HELLO, b'{"run": "00"}'), _framed(Kind.ABORT, abort_payload("no", "JobError", 1))],
    "request": [json.dumps(one).encode() for one in _known()],
    "request_fields": [b"", bytes(range(12)), bytes(range(64, 80))],
    "party_file": [_SETTINGS],
    "pipe": [b'{"pid": 7, "descriptors": 0}\n', b'{"outcome": "done", "spent": {}, "descriptors": 1}'],
}
