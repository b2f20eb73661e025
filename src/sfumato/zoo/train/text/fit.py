"""A better start for Quad: the layer after it, fitted to what it did before, without any training.

Near 0, GELU is about 0.5 x + 0.4 x^2 and 2 Quad - 1 is 0.5 x + 0.25 x^2: most of what Quad changes, another weight and
bias of the next layer undo. They solve a least squares problem on a few batches, layer by layer, each on the student's
own inputs. No paper does this; it leaves distillation far less to make up for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sfumato.errors import JobError

from .batches import Blocks, Rows
from .marill import LoraLinear, layers_of

__all__ = ["fit_outputs"]

#: Batches that the fit sees, and its ridge in relation to the mean square of an input.
BATCHES, RIDGE = 40, 1e-3


def _output(layer: Any) -> Any:
    """The layer after the activation."""
    return layer.output.dense if hasattr(layer, "intermediate") else layer.mlp.c_proj


class _Kept:
    """What goes into a module, and what comes out of it, as rows; while in a ``with``."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.inputs, self.outputs = module, list[Tensor](), list[Tensor]()

    def __enter__(self) -> _Kept:
        def keep(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            self.inputs.append(args[0])
            self.outputs.append(out)

        self.hook = self.module.register_forward_hook(keep)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


@torch.no_grad()
def fit_outputs(
    student: Any, teacher: Any, batches: Rows | Blocks, count: int = BATCHES, *, first: int = 0
) -> None:
    """Give the layer after each activation of ``student`` the weights with which it does most nearly what that of
    ``teacher`` does, in place. Padding is left out; with fake quantization the fit sees the rounded inputs.
    Layers below ``first`` stay as they are.

    Raises:
        JobError: the layer has LoRA, so that its weight is public.
    """
    student.eval()
    teacher.eval()
    shown = [batches(number) for number in range(count)]
    for mine, known in list(zip(layers_of(student), layers_of(teacher), strict=True))[first:]:
        layer = _output(mine)
        if isinstance(layer, LoraLinear):
            raise JobError("--fitted would change the public weights under LoRA; leave one of both out")
        square, product = torch.zeros(1, 1), torch.zeros(1, 1)
        for batch in shown:
            with _Kept(layer) as ours, _Kept(_output(known)) as theirs:
                student(batch.ids, attention_mask=batch.mask)
                teacher(batch.ids, attention_mask=batch.mask)
            real = batch.mask.bool()
            x, y = ours.inputs[0][real].double(), theirs.outputs[0][real].double()
            x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
            square, product = square + x.T @ x, product + x.T @ y
        ridge = RIDGE * square.diagonal().mean()
        found = torch.linalg.solve(
            square + ridge * torch.eye(len(square), dtype=square.dtype), product
        ).float()
        transposed = isinstance(layer, Conv1D) or getattr(layer, "transposed", False)
        layer.weight.copy_(found[:-1] if transposed else found[:-1].T)
        layer.bias.copy_(found[-1])
