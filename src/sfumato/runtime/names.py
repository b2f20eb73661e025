"""How a client names a model that an owner has shared: ``cluster:NAME``."""

from __future__ import annotations

from pathlib import Path

from sfumato.runtime.store import check_name

__all__ = ["shared_name"]

_SCHEME = "cluster:"


def shared_name(reference: str | Path) -> str | None:
    """NAME where a model is given as ``cluster:NAME``; None where it is anything else.

    Raises:
        JobError: ``cluster:`` with something that no model is called.
    """
    text = str(reference)
    return check_name(text.removeprefix(_SCHEME)) if text.startswith(_SCHEME) else None
