"""What this machine is, and who else keeps it busy."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["Foreign", "cores", "machine", "machine_line"]

_PACKAGES = ("torch", "diffusers", "transformers", "cryptography", "numpy")


def cores() -> int:
    """Processors of this machine."""
    return os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Processor, cores, memory, operating system and package versions, as the system itself names them."""
    return {
        "cpu": _processor(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def machine_line(found: Mapping[str, Any]) -> str:
    """One sentence about the machine of a record."""
    packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items())
    return (
        f"{found['cores']} vCPU {found['cpu']}, {found['memory_gib']} GiB, {found['system']}, "
        f"Python {found['python']}, {packages}."
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


class Foreign:
    """Share of the machine that other processes used while a ``with`` block ran."""

    def __enter__(self) -> Foreign:
        self._started, self._busy = time.perf_counter(), _busy_seconds()
        return self

    def __exit__(self, *exc: object) -> None:
        self.wall = time.perf_counter() - self._started
        self.busy = _busy_seconds() - self._busy

    def share(self, ours: float) -> float:
        """Of all cores, between 0 and 1; ``ours`` is the CPU seconds of the processes measured."""
        return max(0.0, self.busy - ours) / (self.wall * cores())


def _busy_seconds() -> float:
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, fields)
    return float(user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
