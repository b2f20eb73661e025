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
    place, cuda = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.is_available()
    if cuda and place < torch.cuda.device_count():
        torch.cuda.set_device(place)  # what "cuda" means in this process
    # Coins are exchanged on the CPU, gradients where they are.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_DEADLINE)
    try:
        yield distributed.get_rank() == 0
    finally:
        distributed.destroy_process_group()
