"""A party process: listens, meets the client and the other parties, and hands commands to its machine."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import logging
import os
import re
import select
import signal
import socket
import ssl
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sfumato.errors import JobError, LinkError, SfumatoError
from sfumato.link.base import CLIENT, Link, PeerAbort, public_text
from sfumato.link.identity import (
    Credentials,
    answer,
    dial,
    fingerprint_of,
    listen,
    party_identity,
    refuse,
    welcome,
)
from sfumato.link.tls import LinkLimits, TlsLink
from sfumato.runtime.cluster import Cluster, Member

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.runtime.commands import Command

__all__ = ["Machine", "MachineFactory", "PartyServer", "link_limits", "main", "public_reason", "serve_party"]

_log = logging.getLogger("sfumato.runtime.server")  # also when run as __main__
_RUN = re.compile(r"[0-9a-f]{32}\Z")
_MAX_GREETINGS = 32


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
    return f"internal error in party {party} ({type(error).__name__})", "SfumatoError", party


def link_limits(cluster: Cluster) -> LinkLimits:
    """The link's bounds from the cluster file."""
    limits = cluster.limits
    return LinkLimits(max_frame_bytes=limits.max_frame_bytes, stall_s=limits.stall_s)


class PartyServer:
    """One party: any number of sessions, one at a time, each with fresh keys and an empty store.

    ``terms``: extra text all parties must agree on. ``busy_wait_s``: how long a second client waits for the
    first to end.
    """

    def __init__(
        self,
        cluster: Cluster,
        index: int,
        keys_folder: Path | str,
        make_machine: MachineFactory,
        *,
        listener: socket.socket | None = None,
        terms: Mapping[str, str] | None = None,
        busy_wait_s: float = 2.0,
        weights_folder: Path | None = None,
    ) -> None:
        if index not in (0, 1, 2):
            raise JobError(f"there is no party {index}; use 0, 1 or 2")
        self.cluster, self.index = cluster, index
        self._make_machine = make_machine
        self._terms = dict(terms or {})
        # What a client must not choose: which files this host reads.
        self._operator = {
            "weights_folder": "" if weights_folder is None else str(weights_folder),
            "largest_bytes": cluster.limits.max_message_bytes,
        }
        self._busy_wait_s = busy_wait_s
        credentials = Credentials.in_folder(keys_folder)
        self._as_server = credentials.context(server=True)
        self._as_client = credentials.context(server=False)
        member = cluster.parties[index]
        self._listener = listener or listen(member.host, member.port)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._session = threading.Lock()
        self._lobby = threading.Condition()
        self._waiting: dict[
            tuple[str, int], ssl.SSLSocket
        ] = {}  # (run, party): callers whose session has not begun
        self._greetings = threading.BoundedSemaphore(_MAX_GREETINGS)
        self._stopped = threading.Event()
        self._wake_receive, self._wake_send = socket.socketpair()

    def serve_forever(self) -> None:
        """Accept callers until `stop`."""
        poll = select.poll()
        for sock in (self._listener, self._wake_receive):
            poll.register(sock, select.POLLIN)
        _log.info("party %d listens on %s port %d", self.index, *self.address)
        while not self._stopped.is_set():
            poll.poll()
            if self._stopped.is_set():
                break
            try:
                raw, _ = self._listener.accept()
            except OSError as error:
                _log.warning("party %d could not accept a caller (%s)", self.index, type(error).__name__)
                continue
            if not self._greetings.acquire(blocking=False):
                raw.close()
                continue
            threading.Thread(target=self._greet, args=(raw,), name="sfumato-greet", daemon=True).start()

    def stop(self) -> None:
        """Take no more callers. A session that runs goes on until its process ends."""
        self._stopped.set()
        with contextlib.suppress(OSError):
            self._wake_send.send(b"x")
        self._listener.close()

    def _greet(self, raw: socket.socket) -> None:
        try:
            sock, identity, hello = answer(raw, self._as_server, self.cluster.limits.connect_s)
            if identity.startswith("sfumato://client/"):
                self._greet_client(sock, identity, hello)
            else:
                self._greet_party(sock, identity, hello)
        except SfumatoError as error:
            _log.warning("party %d turned a caller away: %s", self.index, public_text(str(error)))
        except Exception as error:
            _log_failure(f"party {self.index} failed to greet a caller", error)
        finally:
            self._greetings.release()

    def _greet_party(self, sock: ssl.SSLSocket, identity: str, hello: dict[str, Any]) -> None:
        callers = {party_identity(i): i for i in range(self.index)}  # lower indices dial higher ones
        run = hello.get("run")
        if identity not in callers or not isinstance(run, str) or not _RUN.match(run):
            refuse(sock, f"party {self.index} takes no call from {identity} here")
            raise LinkError(f"a call from {public_text(identity)} is not expected here")
        pinned = self.cluster.parties[callers[identity]].fingerprint
        if pinned is not None and pinned != fingerprint_of(sock):
            refuse(
                sock,
                f"the certificate of {identity} is not the one in the cluster file of party {self.index}",
            )
            raise LinkError(f"{identity} shows a certificate that is not the one in the cluster file")
        key = (run, callers[identity])
        with self._lobby:
            if key in self._waiting or len(self._waiting) >= _MAX_GREETINGS:
                refuse(sock, f"party {self.index} already has a call from {identity}")
                return
            self._waiting[key] = sock
            self._lobby.notify_all()
            self._lobby.wait_for(lambda: self._waiting.get(key) is not sock, self.cluster.limits.connect_s)
            if self._waiting.get(key) is sock:
                del self._waiting[key]
                refuse(sock, f"party {self.index} was not asked for this run by its client")

    def _greet_client(self, sock: ssl.SSLSocket, identity: str, hello: dict[str, Any]) -> None:
        from sfumato.runtime.handshake import PROTOCOL_VERSION, package_version

        run, options = hello.get("run"), hello.get("options")
        if not isinstance(run, str) or not _RUN.match(run) or not isinstance(options, dict):
            refuse(sock, "the client's hello has no run id or options", "JobError")
            return
        for name, here in (("protocol", PROTOCOL_VERSION), ("package", package_version())):
            if hello.get(name) != here:
                there = public_text(str(hello.get(name)))[:40]
                reason = (
                    f"party {self.index} runs {name} version {here}, the client {there}; install one release"
                )
                refuse(sock, reason, "ProtocolError", self.index)
                return
        if not self._session.acquire(timeout=self._busy_wait_s):
            refuse(
                sock,
                f"party {self.index} is busy with another session; try again later",
                "JobError",
                self.index,
            )
            return
        try:
            self._run_session(sock, identity, run, options)
        finally:
            self._session.release()

    def _run_session(self, sock: ssl.SSLSocket, client: str, run: str, options: dict[str, Any]) -> None:
        started = time.monotonic()
        limits = self.cluster.limits
        welcome(sock, {"party": self.index}, limits.connect_s)
        to_client = TlsLink(self.index, {CLIENT: sock}, link_limits(self.cluster))
        to_peers: TlsLink | None = None
        machine: Machine | None = None
        try:
            to_peers = TlsLink(self.index, self._meet(run, to_client), link_limits(self.cluster))
            machine = self._prepare(to_peers, client, run, options)
            self._serve(to_client, to_peers, machine)
            to_client.close()
            to_peers.close()
        except BaseException as error:
            reason, kind, origin = public_reason(error, self.index)
            if isinstance(error, SfumatoError):
                _log.warning("party %d ends session %s: %s", self.index, run[:8], reason)
            else:
                _log_failure(f"party {self.index} ends session {run[:8]}", error)
            if to_peers is not None:
                to_peers.abort(reason, kind=kind, origin=origin)
            to_client.abort(reason, kind=kind, origin=origin)
            if not isinstance(error, Exception):
                raise
        finally:
            if machine is not None:
                machine.close()
        _log.info("party %d ended session %s after %.1f s", self.index, run[:8], time.monotonic() - started)

    def _meet(self, run: str, to_client: TlsLink) -> dict[int, ssl.SSLSocket]:
        """Connections to both peers for this run: lower indices call, higher ones answer. Ends early without
        a client."""
        timeout_s = self.cluster.limits.connect_s
        peers: dict[int, ssl.SSLSocket] = {}
        try:
            for peer in range(self.index):
                peers[peer] = self._called_by(peer, run, to_client)
                welcome(peers[peer], {"party": self.index}, timeout_s)
            for peer in range(self.index + 1, 3):
                member = self.cluster.parties[peer]
                peers[peer], _ = dial(
                    (member.host, member.port),
                    self._as_client,
                    name=f"party {peer}",
                    identity=party_identity(peer),
                    fingerprint=member.fingerprint,
                    hello={"run": run},
                    timeout_s=timeout_s,
                    give_up=lambda: bool(to_client.problems(0.0)),
                )
        except BaseException:
            for sock in peers.values():
                sock.close()
            raise
        return peers

    def _called_by(self, peer: int, run: str, to_client: TlsLink) -> ssl.SSLSocket:
        deadline = time.monotonic() + self.cluster.limits.connect_s
        with self._lobby:
            while (run, peer) not in self._waiting:
                if lost := to_client.problems(0.0):
                    raise lost[0]
                if time.monotonic() > deadline:
                    waited_s = self.cluster.limits.connect_s
                    raise LinkError(f"party {peer} did not call party {self.index} within {waited_s:g} s")
                self._lobby.wait(0.1)
            sock = self._waiting.pop((run, peer))
            self._lobby.notify_all()
            return sock

    def _prepare(self, link: TlsLink, client: str, run: str, options: dict[str, Any]) -> Machine:
        from sfumato.runtime.handshake import agree, run_terms

        terms = run_terms(run, client, options, self._terms)
        keys = agree(link, self._peers, run, terms, self.cluster.limits.stall_s)
        return self._make_machine(self.index, link, keys, {**options, **self._operator})

    @property
    def _peers(self) -> list[int]:
        return [i for i in range(3) if i != self.index]

    def _serve(self, to_client: TlsLink, to_peers: TlsLink, machine: Machine) -> None:
        from sfumato.runtime.commands import Close, digest, from_message
        from sfumato.runtime.handshake import compare_digests
        from sfumato.runtime.wire import MessageStream

        limits = self.cluster.limits
        stream = MessageStream(to_client, CLIENT, limits.max_message_bytes, limits.max_frame_bytes)
        stream.send({"ready": True})
        for number in range(2**62):
            header, tensors = stream.receive(limits.idle_s, "the next command", limits.stall_s)
            command, attachments = from_message(header, tensors)
            del tensors
            compare_digests(to_peers, self._peers, number, digest(command, attachments), limits.stall_s)
            if isinstance(command, Close):
                stream.send({})
                return
            reply, values = machine.handle(command, attachments)
            del attachments
            stream.send(reply, values)


def serve_party(
    cluster: Cluster,
    index: int,
    keys_folder: Path | str,
    *,
    make_machine: MachineFactory | None = None,
    listener: socket.socket | None = None,
    terms: Mapping[str, str] | None = None,
    weights_folder: Path | None = None,
) -> None:
    """Run party ``index`` until the process ends. ``make_machine`` is the real one unless given."""
    server = PartyServer(
        cluster,
        index,
        keys_folder,
        make_machine or _named(_MACHINE),
        listener=listener,
        terms=terms,
        weights_folder=weights_folder,
    )
    server.serve_forever()


_MACHINE = "sfumato.runtime.machine:make_machine"


def _named(name: str) -> MachineFactory:
    module, _, attribute = name.partition(":")
    try:
        factory: MachineFactory = getattr(importlib.import_module(module), attribute or "make_machine")
    except (ImportError, AttributeError):
        raise JobError(f"there is no machine factory {name}") from None
    return factory


def _log_failure(what: str, error: BaseException) -> None:
    """Where it happened, without the exception's text: that may hold values."""
    frames = [
        f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)
    ]
    _log.error("%s: %s at %s", what, type(error).__name__, " < ".join(reversed(frames)))


#: glibc's mallopt: parameter and value. One arena whose freed blocks are kept for the next tensor.
_HOLD = {
    "arena_max": (-8, 1),
    "mmap_threshold": (-3, 32 << 20),
    "trim_threshold": (-1, 512 << 20),
    "top_pad": (-2, 16 << 20),
}


def _hold_memory() -> None:
    """Keep freed memory instead of giving it back at once: fresh pages of large tensors cost more time than what is
    computed on them. No more is held than was in use before; where there is no such setting, nothing changes."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _HOLD.values():
            mallopt(parameter, value)


def _leave_with_parent() -> None:
    """End this process when standard input ends, which it does when the parent is gone, however it went."""

    def watch() -> None:
        while os.read(0, 4096):  # not sys.stdin: its lock would be held when the interpreter ends
            pass
        os._exit(0)

    threading.Thread(target=watch, name="sfumato-parent", daemon=True).start()


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m sfumato.runtime.server``: one party; with ``--child`` under the control of a local
    cluster."""
    parser = argparse.ArgumentParser(prog="sfumato.runtime.server", description="Run one party.")
    parser.add_argument("--folder", required=True, type=Path, help="the party's folder made by cluster init")
    parser.add_argument("--index", required=True, type=int, choices=(0, 1, 2))
    parser.add_argument("--machine", default=_MACHINE, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument(
        "--term", action="append", default=[], metavar="NAME=TEXT", help="a term all parties must share"
    )
    parser.add_argument(
        "--weights", type=Path, help="folder of public weights that a client on this host may name"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--die-with-parent", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=os.environ.get("SFUMATO_LOG", "INFO").upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if options.die_with_parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    _hold_memory()
    try:
        cluster = Cluster.load(options.folder)
        listener = listen(cluster.parties[options.index].host, cluster.parties[options.index].port)
        if options.child:
            print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
            ports = json.loads(sys.stdin.buffer.readline() or b"null")
            if not isinstance(ports, list) or len(ports) != 3:
                return 0  # the parent left before the cluster was up
            _leave_with_parent()
            cluster = with_ports(cluster, ports)
        if options.threads:
            import torch

            torch.set_num_threads(options.threads)
        terms = dict(term.partition("=")[::2] for term in options.term)
        serve_party(
            cluster,
            options.index,
            options.folder,
            make_machine=_named(options.machine),
            listener=listener,
            terms=terms,
            weights_folder=options.weights,
        )
    except SfumatoError as error:
        print(f"sfumato party {options.index}: {error}", file=sys.stderr, flush=True)
        if options.child:
            os._exit(1)  # at once, without taking torch down: the parent is waiting for the reason
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def with_ports(cluster: Cluster, ports: Sequence[int]) -> Cluster:
    """The same cluster on other ports."""
    members = [
        Member(name=m.name, host=m.host, port=int(port), fingerprint=m.fingerprint)
        for m, port in zip(cluster.parties, ports, strict=True)
    ]
    return Cluster(parties=(members[0], members[1], members[2]), limits=cluster.limits)


if __name__ == "__main__":
    sys.exit(main())
