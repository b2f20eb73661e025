"""Several processes that train together, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

__all__ = ["joined"]

#: A process that is silent for so long is lost, and the others end.
_DEADLINE = timedelta(minutes=10)


@contextmanager
def joined() -> Iterator[bool]:
    """Join the processes that ``torchrun`` started, if any; whether this one leads (accounts, adds noise, writes)."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield True
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=_DEADLINE)
    try:
        yield distributed.get_rank() == 0
    finally:
        distributed.destroy_process_group()
