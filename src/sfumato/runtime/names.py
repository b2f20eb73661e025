"""What things are called: models, members of a cluster, certificates; and ``cluster:NAME``, a model that is shared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sfumato.errors import JobError

__all__ = ["check_name", "is_fingerprint", "is_name", "shared_name"]

_SCHEME = "cluster:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}\Z")


def is_name(text: Any) -> bool:
    """Whether something can be a name: 1 to 63 letters, digits, '.', '_' or '-', the first a letter or digit. As a
    folder's it leads nowhere else."""
    return isinstance(text, str) and _NAME.match(text) is not None


def is_fingerprint(text: Any) -> bool:
    """Whether something is a certificate's: ``sha256:`` and 64 hex digits."""
    return isinstance(text, str) and _FINGERPRINT.match(text) is not None


def check_name(name: Any) -> str:
    """A model's name; ``JobError`` when it cannot be one."""
    if not is_name(name):
        raise JobError(
            "a model's name must be 1 to 63 letters, digits, '.', '_' or '-', beginning with a letter or digit"
        )
    return str(name)


def shared_name(reference: str | Path) -> str | None:
    """NAME where a model is given as ``cluster:NAME``; None where it is anything else.

    Raises:
        JobError: ``cluster:`` with something that no model is called.
    """
    text = str(reference)
    return check_name(text.removeprefix(_SCHEME)) if text.startswith(_SCHEME) else None
