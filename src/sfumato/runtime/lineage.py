"""What the client remembers of its handles: from which runs each descends, and what became of those runs' samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = ["Lineage"]


class Lineage:
    """Runs whose samples wait at the parties, and runs that left their ranges, by the handles that descend from them.

    A run is named by its path. Public knowledge throughout: names of commands, never values.
    """

    def __init__(self) -> None:
        self._ancestors: dict[str, frozenset[str]] = {}
        self._holders: Counter[str] = Counter()  # handles that descend from a run
        self._waiting: dict[str, str] = {}  # run -> its plan, in the order of the runs
        self._failed: dict[str, str] = {}  # run -> why nothing that descends from it is to be trusted

    def derive(
        self, handles: Iterable[str], sources: Iterable[str], *, run: str = "", plan: str = ""
    ) -> list[str]:
        """``handles`` are made from ``sources``, in a ``run`` of ``plan`` that left samples if one is named.

        Returns the runs whose samples nobody needs any more: no handle descends from them.
        """
        if run:
            self._waiting[run] = plan
        known = self._waiting.keys() | self._failed.keys()
        found = frozenset().union(*(self._ancestors.get(source, ()) for source in sources)) & known
        found |= {run} if run else frozenset()
        made, gone = list(handles), []
        for handle in made:
            self._holders.update(found)
            gone += self.forget(handle)  # a name may be used again
            self._ancestors[handle] = found
        return gone + ([self._drop(run)] if run and not made else [])

    def forget(self, handle: str) -> list[str]:
        """The handle is gone; the runs whose samples nobody needs any more."""
        gone = []
        for run in self._ancestors.pop(handle, ()):
            self._holders[run] -= 1
            if self._holders[run] == 0:
                waits = run in self._waiting
                self._drop(run)
                if waits:
                    gone.append(run)
        return gone

    def _drop(self, run: str) -> str:
        del self._holders[run]
        self._waiting.pop(run, None)
        self._failed.pop(run, None)
        return run

    def waiting(self, handles: Iterable[str] | None = None) -> dict[str, list[str]]:
        """By plan: the runs that ``handles`` (all handles by default) descend from and that nobody has judged."""
        wanted = (
            self._waiting.keys()
            if handles is None
            else frozenset().union(*(self._ancestors.get(handle, ()) for handle in handles))
        )
        found: dict[str, list[str]] = {}
        for run, plan in self._waiting.items():
            if run in wanted:
                found.setdefault(plan, []).append(run)
        return found

    def judge(self, runs: Sequence[str], failure: str | None) -> None:
        """The samples of ``runs`` were looked at; ``failure`` says what was wrong, if anything."""
        for run in runs:
            self._waiting.pop(run, None)
            if failure is not None:
                self._failed[run] = failure

    def failure(self, handles: Iterable[str]) -> str | None:
        """Why a value that descends from a run that left its ranges is not to be trusted; None when all is well."""
        for handle in handles:
            for run in sorted(self._ancestors.get(handle, frozenset()) & self._failed.keys()):
                return self._failed[run]
        return None
