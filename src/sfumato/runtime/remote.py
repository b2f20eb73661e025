"""Real parties behind a `Backend`, and the one place that chooses a backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.errors import JobError
from sfumato.runtime.backend import Backend
from sfumato.runtime.client import RemoteSession
from sfumato.runtime.cluster import Cluster
from sfumato.runtime.commands import Command
from sfumato.runtime.local import LocalCluster
from sfumato.runtime.lockstep import Lockstep

__all__ = ["Remote", "open_backend"]


class Remote(Backend):
    """Three real parties over mTLS: a cluster file's, or those of this machine, started for the session or before.

    ``local``: parties that go on when the session ends.
    """

    _measured = True

    def __init__(
        self,
        cluster: str | Path | None,
        keys: str | Path | None,
        options: Mapping[str, Any],
        local: LocalCluster | None = None,
    ) -> None:
        super().__init__(certificate=options.get("certificate", True))
        self.protocol = str(options.get("protocol", "rep3"))
        self._local: LocalCluster | None = None
        self._open: RemoteSession | None = None
        self._owned = local is None
        if cluster is None:
            self._local = local or LocalCluster(threads=options.get("threads"))
            self._weights_folder = self._local.folder
            self._given = {name: value for name, value in options.items() if name != "threads"}
        else:
            path = Path(cluster)
            self._open = RemoteSession(Cluster.load(path), keys or path.parent, dict(options))

    @property
    def _session(self) -> RemoteSession:
        """The session; with local parties it is opened at the first command, so that they start meanwhile."""
        if self._open is None:
            assert self._local is not None
            self._open = self._local.session(self._given)
        return self._open

    @property
    def _parties(self) -> int:
        return 3

    def _send(
        self, command: Command, attachments: Sequence[Sequence[Tensor]]
    ) -> list[tuple[dict[str, Any], list[Tensor]]]:
        return self._session.send(command, attachments)

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
        if self._local is not None and self._owned:
            self._local.close()


def open_backend(
    backend: str = "local",
    *,
    protocol: str = "rep3",
    cluster: str | Path | None = None,
    keys: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    local: LocalCluster | None = None,
) -> Backend:
    """A session: ``local`` (three processes over mTLS), ``simulate``, ``plain`` or ``meta`` (shapes alone), or the
    parties of a cluster file. With ``local`` the session is one of that cluster's, which goes on when it ends.

    Raises:
        JobError: an unknown backend, or one beside a cluster file.
        LinkError: the parties cannot be reached.
    """
    given = {"protocol": protocol, **(options or {})}
    if cluster is not None and backend != "local":
        raise JobError(f"the parties of a cluster file compute, not backend {backend!r}; give one of the two")
    if cluster is not None:
        return Remote(cluster, keys, given)
    if backend == "local" and protocol != "plain":
        return Remote(None, None, given, local)
    if backend in ("simulate", "plain", "meta", "local"):
        return Lockstep("plain" if protocol == "plain" else backend, given)
    raise JobError(f"there is no backend {backend!r}; use local, simulate, plain or meta")
