"""Three parties of this machine that serve call after call of one pipeline."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from sfumato.errors import LinkError
from sfumato.runtime.backend import Backend
from sfumato.runtime.local import LocalCluster
from sfumato.runtime.remote import open_backend

__all__ = ["KeptParties"]


class KeptParties:
    """Party processes that start with the first session and end with `close`; those that fail are replaced."""

    def __init__(self) -> None:
        self._cluster: LocalCluster | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def session(self, options: Mapping[str, Any]) -> Iterator[Backend]:
        """A session of its own with the parties; its shares are gone afterwards.

        Raises:
            LinkError: a party does not start, or is gone; the next session starts others.
        """
        try:
            with open_backend("local", options=options, local=self._running(options)) as backend:
                yield backend
        except LinkError:
            self.close()
            raise

    def close(self) -> None:
        """End the processes; may be called twice. A later session starts them again."""
        with self._lock:
            if self._cluster is not None:
                self._cluster.close()
                self._cluster = None

    @property
    def process_ids(self) -> list[int]:
        """Of the parties that run now."""
        with self._lock:
            return [] if self._cluster is None else self._cluster.process_ids

    def _running(self, options: Mapping[str, Any]) -> LocalCluster:
        with self._lock:
            if self._cluster is not None and not self._cluster.alive:
                self._cluster.close()
                self._cluster = None
            if self._cluster is None:
                self._cluster = LocalCluster(threads=options.get("threads"))
            return self._cluster
