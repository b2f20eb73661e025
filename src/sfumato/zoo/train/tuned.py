"""Training on of a model that draws by class under other functions than its own, which is MPCFormer's remedy for
approximations (Li et al., ICLR 2023), without its distillation: the loss is the model's own.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from ..classes import ClassModel, load_class_model, save_class_model, weights_path
from .classes import Labelled, denoising
from .loop import channels_last, run

__all__ = ["tune_class_model"]

_BATCH = 32
#: A half of what training starts with: the weights are good but for the functions.
_PEAK = 1e-3


class _Tuned(Labelled):
    """The model, and the processor time spent on it, which a checkpoint keeps with the weights."""

    spent_ms: Tensor

    def __init__(self, known: ClassModel) -> None:
        super().__init__(known.kind)
        self.copying(known)
        self.register_buffer("spent_ms", torch.zeros((), dtype=torch.int64))


def tune_class_model(
    name: str, variant: str, functions: AbstractContextManager[object], data: Path, out: Path, minutes: float
) -> Path:
    """Train for ``minutes`` on the loss that the model has within ``functions``, from its weights in ``out``, or those
    that come with sfumato; the file of the averaged weights, named after the ``variant``, with the processor seconds.

    Goes on from a checkpoint of the same variant in ``out``.

    Raises:
        JobError: the weights to start from are not here.
        DataError: the images are not in ``data``.
        FloatingPointError: a gradient is not finite: these functions diverge on this model.
    """
    known = load_class_model(name, out if weights_path(name, out).is_file() else None)
    torch.manual_seed(0)
    model = channels_last(_Tuned(known))
    loss = denoising(name, model, data, out, _BATCH)
    last = time.process_time()

    def step(number: int) -> Tensor:
        nonlocal last
        now = time.process_time()
        model.spent_ms += round(1e3 * (now - last))
        last = now
        with functions:
            return loss(number)

    full = f"{name}-{variant}"
    average = run(full, model, step, out / f"{full}.ckpt", minutes, peak=_PEAK, decay=0.99)
    model.load_state_dict(average.state)
    tuned = ClassModel(
        name, known.kind, model.network.eval(), model.table.weight[:, None].detach(), variant,
        float(model.spent_ms) / 1e3,
    )  # fmt: skip
    return save_class_model(tuned, out)
