"""What the benchmark scripts share beside the package: records, command lines, sizes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.bench.machine import Foreign, machine, machine_line
from sfumato.bench.measure import error_against
from sfumato.bench.page import markdown_table, number

__all__ = [
    "RESULTS", "Foreign", "error_against", "machine", "machine_line", "markdown_table", "number", "parser",
    "size", "write_json",
]  # fmt: skip

RESULTS = Path(__file__).parent / "results"


def parser(text: str | None) -> argparse.ArgumentParser:
    """A command line that shows a module's docstring as it is."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record so that a half-written file never replaces a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


def size(count: float) -> str:
    """Bytes in readable units (powers of ten)."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
