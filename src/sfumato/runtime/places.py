"""How a session of a client or owner begins: a place at each party in turn, then a data connection to each."""

from __future__ import annotations

import logging
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from sfumato.errors import LinkError
from sfumato.link.identity import Credentials, dial, party_identity
from sfumato.runtime.cluster import Cluster
from sfumato.runtime.control import ControlConnection, as_raised, patience_s

__all__ = ["Places", "new_run"]

_log = logging.getLogger(__name__)
_PARTIES = (0, 1, 2)


class _Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=_Closable)


def new_run() -> str:
    """The id of a new run: 32 hex digits."""
    return secrets.token_hex(16)


class Places:
    """A place at each of the three parties, and a data connection to each, for the run ``run``.

    ``kind``: "run" for a client's session, "share" for an owner's. A party that is busy lets it wait, up to ``wait_s``
    in all; ``on_wait(party, position)`` is told the place in its queue whenever that changes. `close` ends what was
    granted; ``sockets`` belong to the caller.

    Raises:
        JobError: a party refuses, its queue is full, or the wait is over.
        LinkError: a party cannot be reached, or shows another certificate.
        ProtocolError: a party is of another release.
    """

    def __init__(
        self,
        cluster: Cluster,
        keys_folder: Path | str,
        kind: Literal["run", "share"],
        run: str,
        options: Mapping[str, Any],
        *,
        wait_s: float = 600.0,
        on_wait: Callable[[int, int], None] | None = None,
    ) -> None:
        self.cluster, self.run = cluster, run
        self._on_wait = on_wait or _told
        self._controls: list[ControlConnection] = []
        context = Credentials.in_folder(keys_folder).context(server=False)
        try:
            self._take(context, kind, dict(options), wait_s)
            sockets = self._at_all(lambda party, failed: self._dial(context, party, failed))
        except BaseException as error:
            self.close()
            if isinstance(error, LinkError):
                raise as_raised(error) from None
            raise
        self.sockets: dict[int, ssl.SSLSocket] = dict(enumerate(sockets))

    def close(self) -> None:
        """Give the places back. May be called twice."""
        for control in self._controls:
            control.close()

    def _at_all(self, job: Callable[[int, threading.Event], T]) -> list[T]:
        """``job(party, failed)`` for the three at once; raises what failed first, with the others' results closed."""
        failed, first = threading.Event(), list[BaseException]()

        def one(party: int) -> T | None:
            try:
                return job(party, failed)
            except BaseException as error:
                first.append(error)
                failed.set()
                return None

        with ThreadPoolExecutor(3, thread_name_prefix="sfumato-dial") as pool:
            try:
                results = list(pool.map(one, _PARTIES))
            except BaseException:  # Ctrl-C
                failed.set()
                raise
        if first:
            for result in results:
                if result is not None:
                    result.close()
            raise first[0]
        return [result for result in results if result is not None]

    def _take(self, context: ssl.SSLContext, kind: str, options: dict[str, Any], wait_s: float) -> None:
        """A place at party 0, then 1, then 2: all clients in this order, so that none waits for another in a circle."""
        deadline, connect_s = time.monotonic() + wait_s, self.cluster.limits.connect_s
        for party in _PARTIES:
            control = ControlConnection(self.cluster, context, party, connect_s)
            self._controls.append(control)
            left_s = max(0.0, deadline - time.monotonic())
            control.send(
                {"ask": "session", "run": self.run, "kind": kind, "options": options, "wait_s": left_s},
                connect_s,
            )
            place = 0
            while not (answer := control.read(patience_s(self.cluster), self._lost_a_place(party))).get(
                "granted"
            ):
                position = answer.get("queued")
                if isinstance(position, int) and position != place:
                    place = position
                    self._on_wait(party, position)

    def _lost_a_place(self, party: int) -> Callable[[], bool]:
        """Asked while it waits at ``party``: whether one before has ended what it had granted. Raises what it says."""

        def ended() -> bool:
            for control in self._controls[:party]:
                if control.ended():
                    control.read(0.5)
                    raise LinkError(
                        f"party {control.party} ended the session while it waited for party {party}"
                    )
            return False

        return ended

    def _dial(self, context: ssl.SSLContext, party: int, failed: threading.Event) -> ssl.SSLSocket:
        member = self.cluster.parties[party]
        return dial(
            (member.host, member.port),
            context,
            name=f"party {party}",
            identity=party_identity(party),
            fingerprint=member.fingerprint,
            hello={"run": self.run},
            run=self.run,
            timeout_s=self.cluster.limits.connect_s,
            give_up=failed.is_set,
        )[0]


def _told(party: int, position: int) -> None:
    if position:
        _log.info("waiting for a turn at party %d, number %d in its queue", party, position)
