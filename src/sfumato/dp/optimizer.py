"""The private step: clip each record, add up, add noise once, divide by a constant.

Algorithm 1 of [DPLDM] in two calls. `accumulate()` takes the per-record gradients that `sfumato.dp.gradients` left,
scales each record's to a norm of at most C and adds them to a running sum, as often as a logical batch has physical
ones. `step()` makes of it, once per logical batch,

    g = (sum + N(0, (σC)² I)) / B

with B the *expected* batch q·N, whatever the batch really held, and hands g to the ordinary optimizer. So the noise in
g has standard deviation σC/B. A logical batch that drew nobody is `step()` alone: noise, no more.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
import torch.distributed
from opacus.optimizers import DPOptimizer
from torch import Tensor
from torch.optim import Optimizer

from sfumato.dp.randomness import SecretStream
from sfumato.errors import JobError

__all__ = ["PrivateOptimizer"]

# A clipped record is scaled in float32; this much is taken off so that rounding cannot push it over C.
ROUNDING = 1e-6
# Entries whose squares are added up at once: what they take in float64 stays small beside the gradients.
BLOCK = 1 << 20


class PrivateOptimizer(DPOptimizer):
    """`optimizer` behind clipping and noise.

    `noise_multiplier` is σ (0 for none), `clip` is C, `expected_batch` is B in records over all processes, `stream`
    gives the noise. Learning-rate schedulers and `state_dict` act on `optimizer` through this object.

    A record is scaled by min(1, C/‖g‖). With `normalise` it is scaled by C/(‖g‖ + `gamma`), which is still below C in
    norm (Bu et al. 2023, automatic clipping), and the step is in units of C: the noise in it has standard deviation
    σ/B, and a learning rate holds for any C. A record whose gradient is not finite counts as zero: an error would tell
    that it is there.

    With `torch.distributed` set up, every process accumulates its own records and all call `step()` together: the sums
    are added up, noise comes from rank 0 alone.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        clip: float,
        expected_batch: float,
        stream: SecretStream,
        normalise: bool = False,
        gamma: float = 0.01,
    ) -> None:
        for name, value, low in (
            ("noise_multiplier", noise_multiplier, 0.0),
            ("clip", clip, math.ulp(0.0)),
            ("expected_batch", expected_batch, math.ulp(0.0)),
            ("gamma", gamma, math.ulp(0.0)),
        ):
            if not (math.isfinite(value) and value >= low):
                raise JobError(
                    f"{name} must be finite and {'positive' if low else 'not negative'}, not {value}"
                )
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip,
            expected_batch_size=expected_batch,
        )
        self._made_for = [id(p) for p in self.params]
        if not self._made_for:
            raise JobError(
                "the optimizer has no parameter that requires a gradient: choose what is trained first"
            )
        self.stream = stream
        self.normalise = normalise
        self.gamma = gamma

    def accumulate(self) -> None:
        """Clip the records that `backward` left and add them to the logical batch; their gradients are then gone.

        JobError if a parameter has no per-record gradient, or parameters disagree on the number of records.
        """
        parameters = self._parameters()
        gradients: list[Any] = [getattr(p, "grad_sample", None) for p in parameters]
        missing = sum(g is None for g in gradients)
        if missing:
            raise JobError(f"{missing} parameters have no per-record gradient: call Gradients.backward first")
        if len({len(g) for g in gradients}) > 1:
            raise JobError(
                "parameters have gradients of different numbers of records: give all the same batch"
            )
        factors = self._factors(gradients)
        for p, g in zip(parameters, gradients, strict=True):
            clipped = torch.mv(_flat(g).t(), factors.to(g.dtype))
            clipped = clipped.view_as(p)
            p.summed_grad = clipped if p.summed_grad is None else p.summed_grad + clipped
            p.grad_sample = None

    def _parameters(self) -> list[Any]:
        """What is trained; Any, because Opacus puts `grad_sample` and `summed_grad` on it."""
        parameters = self.params
        if [id(p) for p in parameters] != self._made_for:
            raise JobError(
                "what is trained has changed since: make the optimizer after the choice of parameters"
            )
        return parameters

    def _factors(self, gradients: list[Tensor]) -> Tensor:
        """What each record is multiplied by, (records,); rows that are not finite become zeros, in place."""
        norms = torch.stack([_norms(_flat(g)) for g in gradients]).square().sum(0).sqrt()
        finite = norms.isfinite()
        if not bool(finite.all()):
            for g in gradients:
                g[~finite] = 0  # zero times infinity would be no number
        if self.normalise:
            factors = self.max_grad_norm / ((norms + self.gamma) * (1 + ROUNDING))
        else:
            factors = self.max_grad_norm / torch.clamp(norms * (1 + ROUNDING), min=self.max_grad_norm)
        return torch.where(finite, factors, torch.zeros_like(factors))

    def step(self, closure: Any = None) -> None:
        """End the logical batch: noise once on the sum, divide by the expected batch, let the optimizer step."""
        if closure is not None:
            raise JobError("a private step takes no closure: call backward, accumulate and step in turn")
        parameters = self._parameters()
        # One vector: one draw of noise, and one exchange between processes.
        total = torch.cat(
            [
                (torch.zeros_like(p) if p.summed_grad is None else p.summed_grad).flatten().float()
                for p in parameters
            ]
        )
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.noise_multiplier > 0 and not (several and torch.distributed.get_rank()):
            std = self.noise_multiplier * self.max_grad_norm
            total += self.stream.normal(total.shape, std, device=total.device)
        if several:
            torch.distributed.all_reduce(total)
        total /= self.expected_batch_size * (self.max_grad_norm if self.normalise else 1.0)
        for p, g in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
            p.grad = g.view_as(p).to(p.dtype)
        self.original_optimizer.step()
        self.zero_grad(set_to_none=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients and the running sum of the logical batch; `step` does so by itself."""
        for p in self.params:
            p.grad_sample = None
            p.summed_grad = None
        self.original_optimizer.zero_grad(set_to_none)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise JobError("a private step is two calls, accumulate() and step(): nothing is skipped or queued")

    # Opacus' parts of a step, whose order and number a caller could get wrong.
    signal_skip_step = pre_step = clip_and_accumulate = add_noise = scale_grad = _refuse


def _norms(rows: Tensor) -> Tensor:
    """Norm of each row in float64: in float32 that of a few million entries may come out a thousandth too small."""
    blocks = rows.split(max(1, BLOCK // max(1, rows.shape[1])))
    return torch.cat([torch.linalg.vector_norm(block.double(), dim=1) for block in blocks])


def _flat(gradient: Tensor) -> Tensor:
    """(records, numbers of the parameter), without a copy; also of no records."""
    return gradient.reshape(len(gradient), math.prod(gradient.shape[1:]))
