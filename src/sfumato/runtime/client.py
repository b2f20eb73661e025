"""The client's side of a session: a place at each party, three connections, commands out, replies back, and one clear
error when it fails."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from sfumato.errors import JobError, LinkError, SfumatoError
from sfumato.link.base import CLIENT, PeerAbort
from sfumato.link.tls import TlsLink
from sfumato.runtime.cluster import Cluster, link_limits
from sfumato.runtime.commands import Close, Command, to_message
from sfumato.runtime.control import as_raised
from sfumato.runtime.places import Places, new_run
from sfumato.runtime.wire import MessageStream

__all__ = ["RemoteSession", "Reply"]

_log = logging.getLogger(__name__)
_PARTIES = (0, 1, 2)
_GRACE_S = 1.5  # after the first failure: how long to listen for a party that knows the cause

Reply = tuple[dict[str, Any], list[Tensor]]


class RemoteSession:
    """One session with the three parties of a cluster, for one thread.

    ``keys_folder`` is a client's folder made by ``cluster init``; ``options`` are the job's choices that all
    parties must share (JSON). A party that is busy lets the session wait, up to ``wait_s`` in all; ``on_wait(party,
    position)`` is told the place in its queue whenever that changes. Raises ``LinkError`` when a party cannot be
    reached, ``JobError`` when a queue is full or the wait is over, ``ProtocolError`` when they disagree; the first
    cause is reported, not what followed from it.

    Leaks to each party: the client's certificate name, the options, and what the commands carry in public.
    """

    def __init__(
        self,
        cluster: Cluster,
        keys_folder: Path | str,
        options: Mapping[str, Any] | None = None,
        *,
        reply_s: float | None = None,
        wait_s: float = 600.0,
        on_wait: Callable[[int, int], None] | None = None,
    ) -> None:
        self.cluster = cluster
        self.run = new_run()
        self._reply_s = cluster.limits.idle_s if reply_s is None else reply_s
        self._broken: SfumatoError | None = None
        self._lock = threading.Lock()
        self._places = Places(
            cluster, keys_folder, "run", self.run, options or {}, wait_s=wait_s, on_wait=on_wait
        )
        self._link = TlsLink(CLIENT, self._places.sockets, link_limits(cluster))
        limits = cluster.limits
        self._streams = [
            MessageStream(self._link, party, limits.max_message_bytes, limits.max_frame_bytes)
            for party in _PARTIES
        ]
        self._collect(2 * limits.connect_s + limits.stall_s, "the parties to meet")

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
            self._link.abort("the client was interrupted", origin=CLIENT)
            self._broken = LinkError("it was interrupted")
            self._places.close()
            raise

    def _failed(self, first: LinkError) -> SfumatoError:
        """The error to raise: wait a little for whoever knows the cause, then end the session on all
        sides."""
        found = [first]
        if not isinstance(first, PeerAbort):
            found += self._link.problems(_GRACE_S)
        error = as_raised(_root(found))
        self._link.abort(str(error), kind=type(error).__name__, origin=CLIENT)
        self._broken = error
        self._places.close()
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
        self._places.close()

    def __enter__(self) -> RemoteSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if error is not None and self._broken is None:
            self._broken = LinkError("the client gave up")
            self._link.abort("the client gave up", origin=CLIENT)
            self._places.close()
        self.close()


def _root(found: Sequence[BaseException]) -> BaseException:
    """What says most about the cause: an error of a party's own, then a loss a party reports, then a loss
    seen here."""

    def rank(error: BaseException) -> int:
        if not isinstance(error, PeerAbort):
            return 2
        return 1 if error.kind == "LinkError" else 0

    return min(found, key=rank)
