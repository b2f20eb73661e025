"""What the benchmarks share: the machine, JSON records, errors against a reference, small tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = [
    "RESULTS", "Foreign", "error_against", "machine", "machine_line", "markdown_table", "number", "parser",
    "size", "write_json",
]  # fmt: skip

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "diffusers", "transformers", "cryptography", "numpy")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, operating system and package versions, as the system itself names them."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(_memory_bytes() / 2**30),
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


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
        return max(0.0, self.busy - ours) / (self.wall * (os.cpu_count() or 1))


def _busy_seconds() -> float:
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, _ = map(int, fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def error_against(reference: Tensor, found: Tensor) -> dict[str, float]:
    """Largest absolute error and relative error in L2 norm, in float64."""
    exact = reference.double()
    difference = found.double() - exact
    return {
        "max_abs_err": float(difference.abs().max()),
        "rel_l2_err": float(difference.norm() / exact.norm()),
    }


def parser(text: str | None) -> argparse.ArgumentParser:
    """A command line that shows a module's docstring as it is."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record so that a half-written file never replaces a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table, cells as text."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def number(value: float | None, digits: int = 3) -> str:
    """A few significant digits, no exponent for ordinary sizes; empty for None."""
    if value is None:
        return ""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:.{digits}g}"
        return f"{value:,.0f}" if "e" in text else text
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def size(count: float) -> str:
    """Bytes in readable units (powers of ten)."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
