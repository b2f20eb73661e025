"""Files that are measured or computed once and found again by what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["keep", "place"]


def place(kind: str, facts: Mapping[str, Any], suffix: str) -> Path:
    """Where the file of these facts is kept; its name tells nothing but their digest."""
    text = json.dumps(facts, sort_keys=True)
    name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfumato" / kind
    return folder / f"{name}{suffix}"


def keep(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make the file, which is there whole or not at all; a folder that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}.part")
        write(scratch)
        scratch.replace(path)
    except OSError:
        return
