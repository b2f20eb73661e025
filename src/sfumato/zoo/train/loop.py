"""What all trainings share: a time budget that survives restarts, batches, averaged weights."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import distributed, nn

Step = Callable[[int], torch.Tensor]
Trained = TypeVar("Trained", bound=nn.Module)


def channels_last(module: Trained) -> Trained:
    """The module with its convolution weights laid out channels last, which is faster here."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module


class Average:
    """Exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's present weights (faster at the start)."""
        rate = 1 - min(self.decay, (1 + step) / (10 + step))
        mine, theirs = [], []
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                mine.append(self.state[key])
                theirs.append(value)
            else:
                self.state[key].copy_(value)
        torch._foreach_lerp_(mine, theirs, rate)


def learning_rate(progress: float, peak: float, warm: float = 0.02) -> float:
    """Linear warm-up, then half a cosine to zero, over progress 0..1."""
    if progress < warm:
        return peak * (0.05 + 0.95 * progress / warm)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm) / (1 - warm))))


class Indices:
    """Endless shuffled batches of indices below ``count``."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count, self.batch = count, batch
        self.generator = torch.Generator().manual_seed(seed)
        self.rest = torch.empty(0, dtype=torch.long)

    def __call__(self) -> torch.Tensor:
        if len(self.rest) < self.batch:
            self.rest = torch.cat([self.rest, torch.randperm(self.count, generator=self.generator)])
        now, self.rest = self.rest[: self.batch], self.rest[self.batch :]
        return now


def rank() -> int:
    """Number of this process among those that train together (0 where there is one)."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def _share(module: nn.Module, used: float) -> float:
    """Average the gradients, and the time used, over the processes that train together."""
    if not distributed.is_initialized():
        return used
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor([used])])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    parts = flat[:-1].split([g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return float(flat[-1])


def run(
    name: str,
    module: nn.Module,
    step: Step,
    checkpoint: Path,
    minutes: float,
    peak: float,
    decay: float = 0.999,
    weight_decay: float = 1e-4,
) -> Average:
    """Train ``module`` for ``minutes`` of work in all, going on from ``checkpoint`` if there is one.

    The learning rate follows the share of the time used, so a run ends when it should on any machine. Time is that of
    the calling thread's core: what else runs beside a training does not shorten it.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=weight_decay)
    average = Average(module, decay)
    number, used = 0, 0.0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        average.state = saved["average"]
        number, used = saved["number"], saved["used"]
        if not rank():
            print(f"{name}: goes on at step {number}, {used / 60:.1f} min used", flush=True)
    torch.manual_seed(1000 + number + 10_000_000 * rank())

    def keep() -> None:
        if rank():
            return
        partial = checkpoint.with_suffix(".part")
        state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "average": average.state}
        torch.save({**state, "number": number, "used": used}, partial)
        os.replace(partial, checkpoint)

    module.train()
    last, kept, total = time.thread_time(), used, 0.0
    while used < 60 * minutes:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(used / (60 * minutes), peak)
        optimizer.zero_grad(set_to_none=True)
        loss = step(number)
        loss.backward()
        now = time.thread_time()
        used, last = _share(module, used + now - last), now
        norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        if not math.isfinite(float(norm)):
            raise FloatingPointError(f"{name}: the gradient at step {number} is not finite")
        optimizer.step()
        number += 1
        average.update(module, number)
        total += float(loss.detach())
        if number % 100 == 0 and not rank():
            print(
                f"{name} {number} {used / 60:.1f} min loss {total / 100:.5f} grad {float(norm):.3f}",
                flush=True,
            )
            total = 0.0
        if used - kept > 60:
            kept = used
            keep()
    keep()
    return average
