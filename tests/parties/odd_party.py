"""A machine for parties that a test makes different: the real one, or for a session with the option ``words`` the fake
one; each worker begins as a party of another build when the file ``ODD_PARTY`` says so."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import fake_machine

from sfumato.link.base import Link
from sfumato.runtime import machine

MACHINE = "odd_party:make"


def _differ() -> None:
    """In a worker: replace what the file lists, ``[[module, name, value], ...]``."""
    for module, name, value in json.loads(Path(os.environ["ODD_PARTY"]).read_text() or "[]"):
        setattr(importlib.import_module(module), name, value)


os.register_at_fork(after_in_child=_differ)


def make(party: int, link: Link, keys: dict[int, bytes], options: dict[str, Any]) -> Any:
    kind = fake_machine.make if options.get("words") else machine.make_machine
    return kind(party, link, keys, options)
