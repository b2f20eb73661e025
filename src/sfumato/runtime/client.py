"""The client's side of a session: three connections, commands out, replies back, one clear error when it
fails."""

from __future__ import annotations

import logging
import secrets
import ssl
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from sfumato import errors
from sfumato.errors import JobError, LinkError, SfumatoError
from sfumato.link.base import CLIENT, PeerAbort
from sfumato.link.identity import Credentials, dial, party_identity
from sfumato.link.tls import TlsLink
from sfumato.runtime.cluster import Cluster
from sfumato.runtime.commands import Close, Command, to_message
from sfumato.runtime.handshake import PROTOCOL_VERSION, package_version
from sfumato.runtime.server import link_limits
from sfumato.runtime.wire import MessageStream

__all__ = ["RemoteSession", "Reply"]

_log = logging.getLogger(__name__)
_PARTIES = (0, 1, 2)
_GRACE_S = 1.5  # after the first failure: how long to listen for a party that knows the cause

Reply = tuple[dict[str, Any], list[Tensor]]


class RemoteSession:
    """One session with the three parties of a cluster, for one thread.

    ``keys_folder`` is a client's folder made by ``cluster init``; ``options`` are the job's choices that all
    parties must share (JSON). Raises ``LinkError`` when a party cannot be reached, ``JobError`` when one is
    busy, ``ProtocolError`` when they disagree; the first cause is reported, not what followed from it.

    Leaks to each party: the client's certificate name, the options, and what the commands carry in public.
    """

    def __init__(
        self,
        cluster: Cluster,
        keys_folder: Path | str,
        options: Mapping[str, Any] | None = None,
        *,
        reply_s: float | None = None,
    ) -> None:
        self.cluster = cluster
        self.run = secrets.token_hex(16)
        self._reply_s = cluster.limits.idle_s if reply_s is None else reply_s
        self._broken: SfumatoError | None = None
        self._lock = threading.Lock()
        limits = cluster.limits
        sockets = self._dial_all(
            Credentials.in_folder(keys_folder).context(server=False), dict(options or {})
        )
        self._link = TlsLink(CLIENT, sockets, link_limits(cluster))
        self._streams = [
            MessageStream(self._link, party, limits.max_message_bytes, limits.max_frame_bytes)
            for party in _PARTIES
        ]
        self._collect(2 * limits.connect_s + limits.stall_s, "the parties to meet")

    def _dial_all(self, context: ssl.SSLContext, options: dict[str, Any]) -> dict[int, ssl.SSLSocket]:
        hello = {
            "run": self.run,
            "options": options,
            "protocol": PROTOCOL_VERSION,
            "package": package_version(),
        }

        failed = threading.Event()

        def call(party: int) -> ssl.SSLSocket:
            member = self.cluster.parties[party]
            try:
                return dial(
                    (member.host, member.port),
                    context,
                    name=f"party {party}",
                    identity=party_identity(party),
                    fingerprint=member.fingerprint,
                    hello=hello,
                    timeout_s=self.cluster.limits.connect_s,
                    give_up=failed.is_set,
                )[0]
            except BaseException:
                if not failed.is_set():
                    causes.append(party)
                failed.set()
                raise

        causes: list[int] = []
        with ThreadPoolExecutor(3, thread_name_prefix="sfumato-dial") as pool:
            calls = [pool.submit(call, party) for party in _PARTIES]
        failures = [error for c in calls if (error := c.exception()) is not None]
        if failures:
            for c in calls:
                if c.exception() is None:
                    c.result().close()
            first = calls[causes[0]].exception() or failures[0]
            raise _as_raised(first) if isinstance(first, SfumatoError) else first
        return {party: c.result() for party, c in zip(_PARTIES, calls, strict=True)}

    def send(self, command: Command, attachments: Sequence[Sequence[Tensor]] = ((), (), ())) -> list[Reply]:
        """Give ``command`` to all parties, ``attachments[i]`` to party i alone; the three replies in order.

        Attached tensors must not be changed before the replies are there. After an error the session is over.
        """
        if len(attachments) != 3:
            raise JobError("attachments are given for three parties")
        with self._lock:
            if self._broken is not None:
                raise JobError(f"this session is over ({self._broken}); open a new one")
            try:
                for stream, own in zip(self._streams, attachments, strict=True):
                    stream.send(*to_message(command, own))
            except LinkError as error:
                raise self._failed(error) from None
            return self._collect(self._reply_s, f"the reply to {type(command).__name__}")

    def _collect(self, timeout_s: float, what: str) -> list[Reply]:
        stall_s = self.cluster.limits.stall_s
        try:
            return [stream.receive(timeout_s, what, stall_s) for stream in self._streams]
        except LinkError as error:
            raise self._failed(error) from None
        except BaseException:
            self._link.abort("the client was interrupted")
            self._broken = LinkError("it was interrupted")
            raise

    def _failed(self, first: LinkError) -> SfumatoError:
        """The error to raise: wait a little for whoever knows the cause, then end the session on all
        sides."""
        found = [first]
        if not isinstance(first, PeerAbort):
            found += self._link.problems(_GRACE_S)
        error = _as_raised(_root(found))
        self._link.abort(str(error), kind=type(error).__name__, origin=CLIENT)
        self._broken = error
        return error

    @property
    def bytes_sent(self) -> list[int]:
        """Payload bytes sent to each party so far."""
        return [self._link.payload_bytes()[party] for party in _PARTIES]

    @property
    def bytes_received(self) -> list[int]:
        """Payload bytes received from each party so far."""
        return [self._link.received_bytes()[party] for party in _PARTIES]

    def close(self) -> None:
        """End the session in good order; never raises."""
        if self._broken is None:
            try:
                self.send(Close())
            except SfumatoError as error:
                _log.info("the session did not close in good order: %s", error)
            self._broken = LinkError("it was closed")
        self._link.close()

    def __enter__(self) -> RemoteSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if error is not None and self._broken is None:
            self._broken = LinkError("the client gave up")
            self._link.abort("the client gave up", origin=CLIENT)
        self.close()


def _root(found: Sequence[BaseException]) -> BaseException:
    """What says most about the cause: an error of a party's own, then a loss a party reports, then a loss
    seen here."""

    def rank(error: BaseException) -> int:
        if not isinstance(error, PeerAbort):
            return 2
        return 1 if error.kind == "LinkError" else 0

    return min(found, key=rank)


def _as_raised(error: BaseException) -> SfumatoError:
    if isinstance(error, PeerAbort):
        named = getattr(errors, error.kind, None)
        kind = named if isinstance(named, type) and issubclass(named, SfumatoError) else SfumatoError
        who = f"party {error.origin}"
        known = error.origin not in _PARTIES or who in error.reason
        return kind(error.reason if known else f"{who}: {error.reason}")
    return error if isinstance(error, SfumatoError) else LinkError(type(error).__name__)
