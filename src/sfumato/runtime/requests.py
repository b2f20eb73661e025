"""What a party is asked on control connections, and who may ask it."""

from __future__ import annotations

import logging
import math
import re
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any

from sfumato.errors import JobError, LinkError, ProtocolError, SfumatoError
from sfumato.link.base import public_text
from sfumato.link.identity import (
    Credentials,
    answer,
    fingerprint_of,
    refuse,
    welcome,
)
from sfumato.link.preamble import PROTOCOL_VERSION, Preamble
from sfumato.runtime.handshake import package_version
from sfumato.runtime.store import ModelStore
from sfumato.runtime.supervision import Supervised, Workplace

__all__ = ["Requests"]

_log = logging.getLogger(__name__)
_RUN = re.compile(r"[0-9a-f]{32}\Z")
_ROLES = {"run": "client", "share": "owner"}
_DEEPEST = 8  # options within options
_LONGEST_S = 1e9


class Requests:
    """Answers one party's control connections, each in a thread of its own."""

    def __init__(self, place: Workplace, health: Callable[[], Mapping[str, Any]]) -> None:
        self.version = PROTOCOL_VERSION
        self._place, self._health = place, health
        self._context = Credentials.in_folder(place.folder).context(server=True)
        self._store = ModelStore(place.settings.storage_folder, place.settings.storage_key, place.index)
        self._started = time.monotonic()

    def serve(self, raw: socket.socket, preamble: Preamble, known: Callable[[], None]) -> None:
        """One connection. ``known`` is called once it is known who is there, or that nobody is."""
        index, limits = self._place.index, self._place.cluster.limits
        try:
            try:
                raw.setblocking(True)
                sock, identity, request = answer(raw, self._context, limits.connect_s)
            except SfumatoError:
                self._place.metrics.refused("certificate")
                raise
            finally:
                known()
            try:
                self._check(sock, identity, request, preamble)
                self._reply(sock, identity, request)
                sock.close()
            except Exception as error:
                ours = isinstance(error, SfumatoError)
                kind = type(error).__name__
                reason = str(error) if ours else f"internal error in party {index} ({kind})"
                refuse(sock, reason, kind if ours else "SfumatoError", index)
                raise
        except SfumatoError as error:
            facts = {"party": index, "error": error}
            _log.warning(
                "party %d turned a caller away: %s", index, public_text(str(error)), extra={"facts": facts}
            )
        except Exception as error:
            facts = {"party": index, "error": error}
            _log.exception("party %d failed to answer a caller", index, extra={"facts": facts})

    def _check(
        self, sock: ssl.SSLSocket, identity: str, request: Mapping[str, Any], preamble: Preamble
    ) -> None:
        party = f"party {self._place.index}"
        if fingerprint_of(sock) in self._place.settings.revoked:
            self._place.metrics.refused("revoked")
            raise LinkError(f"{party} does not take the certificate of {identity} any more")
        asked = {
            "protocol": preamble.version if preamble.version != self.version else request.get("protocol")
        }
        here: dict[str, Any] = {"protocol": self.version}
        if request.get("ask") == "session":
            asked["package"], here["package"] = request.get("package"), package_version()
        for name, version in here.items():
            if asked[name] != version:
                self._place.metrics.refused("version")
                there = public_text(str(asked[name]))[:40]
                raise ProtocolError(
                    f"{party} runs {name} version {version}, the client {there}; install one release"
                )

    def _reply(self, sock: ssl.SSLSocket, identity: str, request: Mapping[str, Any]) -> None:
        limits = self._place.cluster.limits
        match request.get("ask"):
            case "session":
                self._place.serve(self._session(identity, request), sock)
            case "status":
                welcome(sock, self._status(identity), limits.connect_s)
            case "models":
                welcome(sock, {"models": self._models(identity)}, limits.connect_s)
            case "remove":
                if not identity.startswith("sfumato://owner/"):
                    self._place.metrics.refused("role")
                    raise JobError("a model is removed by its owner, with an owner's certificate")
                self._store.remove(str(request.get("model")), identity)
                welcome(sock, {"removed": True}, limits.connect_s)
            case other:
                raise JobError(f"there is no request {public_text(str(other))[:40]!r}")

    def _session(self, identity: str, request: Mapping[str, Any]) -> Supervised:
        kind, run, options, wait_s = (request.get(name) for name in ("kind", "run", "options", "wait_s"))
        if not isinstance(kind, str) or kind not in _ROLES:
            raise JobError("a session is of the kind run or share")
        if not isinstance(run, str) or not _RUN.match(run) or not isinstance(options, dict):
            raise JobError("a session is asked with a run id and options")
        if not _is_plain(options, _DEEPEST):
            raise JobError(
                f"the options of a session are JSON, nested {_DEEPEST} deep at most, without NaN or Infinity"
            )
        if not isinstance(wait_s, (int, float)) or isinstance(wait_s, bool) or not abs(wait_s) <= _LONGEST_S:
            raise JobError("a session is asked with the seconds that it can wait")
        if not identity.startswith(f"sfumato://{_ROLES[kind]}/"):
            self._place.metrics.refused("role")
            if identity.startswith("sfumato://party/"):
                raise LinkError(f"party {self._place.index} takes no call from {identity} here")
            raise JobError(
                f"a session to {kind} is for the certificate of {'a' if kind == 'run' else 'an'} {_ROLES[kind]}, "
                f"not for {identity}"
            )
        return Supervised(run, kind, identity, options, max(0.0, float(wait_s)))

    def _models(self, identity: str) -> list[dict[str, Any]]:
        """What the asker may see; an operator sees all."""
        return [
            entry.to_json()
            for entry in self._store.models("" if identity.startswith("sfumato://party/") else identity)
        ]

    def _status(self, identity: str) -> dict[str, Any]:
        place = self._place
        return {
            **self._health(),
            "party": place.index,
            "package": package_version(),
            "protocol": self.version,
            "uptime_s": round(time.monotonic() - self._started, 1),
            "at_once": place.queue.at_once,
            "queue_limit": place.settings.queued,
            "models": len(self._models(identity)),
        }


def _is_plain(value: Any, levels: int) -> bool:
    """Whether a peer's JSON can be written as JSON again, by code that recurses."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return levels > 0 and all(_is_plain(one, levels - 1) for one in inner)
    return not isinstance(value, float) or math.isfinite(value)
