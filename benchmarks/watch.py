"""Memory of the party processes while they work, and a line of progress every so often."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

__all__ = ["Watch"]

_SAMPLE_S, _LINE_S = 0.5, 20.0


class Watch:
    """Samples this process's children in a ``with`` block; ``peak_private``: bytes beside mapped files."""

    def __init__(self, *, silent: bool = False) -> None:
        self._peaks: dict[int, int] = {}
        self._silent = silent
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    @property
    def peak_private(self) -> list[int]:
        """In the order of the process ids."""
        return [self._peaks[pid] for pid in sorted(self._peaks)]

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        started = spoken = time.monotonic()
        while not self._stop.wait(_SAMPLE_S):
            for pid in _children():
                self._peaks[pid] = max(self._peaks.get(pid, 0), _private_bytes(pid))
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


def _private_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    sizes = [int(line.split()[1]) for line in lines if line.startswith("RssAnon:")]
    return sizes[0] * 1024 if sizes else 0
