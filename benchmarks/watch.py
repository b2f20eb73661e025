"""Memory of the party processes while they work, and a line of progress every so often."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

__all__ = ["Watch"]

_SAMPLE_S, _LINE_S = 0.5, 20.0


class Watch:
    """Samples this process's children in a ``with`` block.

    ``peak_private``: most bytes beside mapped files; ``peak_resident``: with them, in the order of process ids.
    ``peak_pss``: most bytes of all children together, a page that several share counted once.
    A child's own ``ru_maxrss`` would not do: on Linux it starts from that of the process that forked it.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self._private: dict[int, int] = {}
        self._resident: dict[int, int] = {}
        self.peak_pss = 0
        self._silent = silent
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    @property
    def peak_private(self) -> list[int]:
        """Bytes per child."""
        return [self._private[pid] for pid in sorted(self._private)]

    @property
    def peak_resident(self) -> list[int]:
        """Bytes per child."""
        return [self._resident[pid] for pid in sorted(self._resident)]

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        started = spoken = time.monotonic()
        while not self._stop.wait(_SAMPLE_S):
            self.peak_pss = max(self.peak_pss, sum(_pss(pid) for pid in _children()))
            for pid in _children():
                found = _sizes(pid)
                self._private[pid] = max(self._private.get(pid, 0), found.get("RssAnon", 0))
                self._resident[pid] = max(self._resident.get(pid, 0), found.get("VmHWM", 0))
            now = time.monotonic()
            if not self._silent and now - spoken >= _LINE_S:
                spoken = now
                held = ", ".join(f"{size / 1e9:.2f}" for size in self.peak_private)
                print(f"  {now - started:.0f} s, private memory so far (GB): {held}", flush=True)


def _children() -> list[int]:
    found = []
    for task in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        try:
            found += [int(pid) for pid in task.read_text().split()]
        except OSError:
            continue
    return found


def _sizes(pid: int) -> dict[str, int]:
    """The memory fields of a process's status, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith("kB"))
    return {name.rstrip(":"): int(size) * 1024 for name, size, _ in fields}


def _pss(pid: int) -> int:
    """A process's proportional share of its pages, in bytes; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
