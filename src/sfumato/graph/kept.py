"""Files that are measured or computed once and found again by what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato.errors import CaptureError
from sfumato.graph.calibrate import Calibration

__all__ = ["keep", "load_cached", "place", "release", "save_cached", "weights_digest"]


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


def load_cached(path: Path) -> Calibration | None:
    """The ranges kept in a file, if it is there and whole."""
    try:
        return Calibration.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, CaptureError):
        return None


def save_cached(path: Path, calibration: Calibration) -> None:
    """Keep ranges; a folder that cannot be written is no error."""
    text = json.dumps(calibration.to_json())
    keep(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def release() -> str:
    """Which release measures: another one may measure something else."""
    try:
        return version("sfumato")
    except PackageNotFoundError:
        return "source"


def weights_digest(*modules: nn.Module) -> str:
    """16 hex digits of the modules' configuration and weights."""
    state = hashlib.blake2b(digest_size=8)
    for module in modules:
        config: Any = getattr(module, "config", {})
        state.update(
            repr(sorted((config if isinstance(config, dict) else config.to_dict()).items())).encode()
        )
        for name, tensor in module.state_dict().items():
            state.update(name.encode())
            state.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
