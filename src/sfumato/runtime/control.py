"""Control connections to a party: one JSON object each way. A session lasts as long as the one it was granted on."""

from __future__ import annotations

import select
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sfumato import errors
from sfumato.errors import LinkError, SfumatoError
from sfumato.link.base import PeerAbort
from sfumato.link.identity import Credentials, connect, explained, party_identity, read_fields, send_fields
from sfumato.runtime.cluster import Cluster
from sfumato.runtime.handshake import PROTOCOL_VERSION, package_version

__all__ = ["ControlConnection", "as_raised", "ask", "greeting", "heartbeat_s", "patience_s"]

_PARTIES = (0, 1, 2)
_HEARTBEAT_S, _PATIENCE_S = 5.0, 30.0


def heartbeat_s(cluster: Cluster) -> float:
    """How often a party that lets a client wait shows that it lives."""
    return min(_HEARTBEAT_S, cluster.limits.stall_s / 4)


def patience_s(cluster: Cluster) -> float:
    """After what silence a client gives such a party up."""
    return min(_PATIENCE_S, max(cluster.limits.stall_s, cluster.limits.connect_s))


def greeting() -> dict[str, Any]:
    """What every request tells about who asks."""
    return {"protocol": PROTOCOL_VERSION, "package": package_version()}


class ControlConnection:
    """To one party, checked by its certificate. Raises ``LinkError`` when the party cannot be reached."""

    def __init__(self, cluster: Cluster, context: ssl.SSLContext, party: int, timeout_s: float) -> None:
        member = cluster.parties[party]
        self.party = party
        self._where = f"party {party} ({member.host}:{member.port})"
        self._sock = connect(
            (member.host, member.port),
            context,
            name=f"party {party}",
            identity=party_identity(party),
            fingerprint=member.fingerprint,
            timeout_s=timeout_s,
        )

    def send(self, request: Mapping[str, Any], timeout_s: float) -> None:
        """Ask. A party that does not take it says so at the next `read`."""
        try:
            send_fields(self._sock, {**greeting(), **request}, timeout_s)
        except ConnectionError:
            pass
        except ssl.SSLError as error:  # its refusal of our certificate may come before we have asked
            raise explained(error, self._where, timeout_s) from None
        except OSError:
            raise LinkError(f"{self._where} takes no request ({timeout_s:g} s)") from None

    def read(self, timeout_s: float, give_up: Callable[[], bool] | None = None) -> dict[str, Any]:
        """The next answer. Raises `PeerAbort` when the party refuses, ``LinkError`` when it is silent or gone."""
        return read_fields(self._sock, self._where, timeout_s, give_up)

    def ended(self) -> bool:
        """Whether the party has said something more, or gone, after its last answer."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(0)) or self._sock.pending() > 0

    def close(self) -> None:
        """End what was granted on it."""
        self._sock.close()


def ask(
    cluster: Cluster,
    keys: Path | str,
    party: int,
    request: Mapping[str, Any],
    *,
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """One request (``{"ask": "status"}``, ...) to one party, as the holder of the folder ``keys``; its answer.

    Raises the party's own error (`JobError`, ...), or ``LinkError`` when it cannot be reached within ``timeout_s``
    (the cluster's ``connect_s`` unless given).
    """
    patience = cluster.limits.connect_s if timeout_s is None else timeout_s
    try:
        connection = ControlConnection(
            cluster, Credentials.in_folder(keys).context(server=False), party, patience
        )
        try:
            connection.send(request, patience)
            return connection.read(patience)
        finally:
            connection.close()
    except LinkError as error:
        raise as_raised(error) from None


def as_raised(error: BaseException) -> SfumatoError:
    """What a caller of ours sees of a failure: the class and the sentence of whoever failed first."""
    if isinstance(error, PeerAbort):
        named = getattr(errors, error.kind, None)
        kind = named if isinstance(named, type) and issubclass(named, SfumatoError) else SfumatoError
        who = f"party {error.origin}"
        known = error.origin not in _PARTIES or who in error.reason
        return kind(error.reason if known else f"{who}: {error.reason}")
    return error if isinstance(error, SfumatoError) else LinkError(type(error).__name__)
