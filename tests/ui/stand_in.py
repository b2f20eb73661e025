"""A pipeline that costs nothing and does as it is told, behind the real studio and the real page."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from sfumato.errors import JobError, LinkError
from sfumato.runtime.report import CostReport, PathCost
from sfumato.ui.jobs import Studio
from sfumato.ui.settings import Settings

__all__ = ["Pipe", "StandInStudio", "report"]


def report(steps: int, seconds: float | None = None) -> CostReport:
    rows = {f"/step{k}/conv": PathCost((100, 200, 300), (1, 2, 3)) for k in range(steps)}
    return CostReport(
        protocol="rep3", rounds=7 * steps, bytes_sent=(100 * steps, 200 * steps, 300 * steps), sends=(1, 2, 3),
        client_bytes=50, setup_bytes=0, by_path=rows, seconds=seconds,
    )  # fmt: skip


class Pipe:
    """Steps when `go` is set; draws a picture that depends on the seed."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.calls, self.closed = settings, 0, False
        self.num_timesteps = settings.steps
        self.go = threading.Event()
        self.go.set()
        self.last_shares: tuple[torch.Tensor, ...] = ()

    def plans(self, prompt: str, **arguments: Any) -> dict[str, Any]:
        return {}

    def estimate(self, **arguments: Any) -> CostReport:
        return report(arguments["num_inference_steps"])

    def __call__(
        self, prompt: str, *, num_inference_steps: int, generator: Any, callback_on_step_end: Any, **_: Any
    ) -> Any:
        self.calls += 1
        if prompt == "lost":
            raise LinkError("party 1 is silent")
        if prompt == "broken":
            raise RuntimeError("the words were: broken")
        if prompt == "refused":
            raise JobError("this model takes no such size")
        self.num_timesteps = num_inference_steps
        for k in range(num_inference_steps):
            assert self.go.wait(30)
            callback_on_step_end(self, k, None, {})
        picture = torch.rand((8, 8), generator=generator).numpy()
        words = np.random.default_rng(self.calls).integers(-(2**63), 2**63, (3, 1, 4, 8, 8))
        self.last_shares = tuple(torch.from_numpy(words))
        return SimpleNamespace(images=[picture], report=report(num_inference_steps, seconds=1.2))

    def close(self) -> None:
        self.closed = True


class StandInStudio(Studio):
    """A studio whose pipelines are stand-ins; ``pipes`` lists all that were opened."""

    def __init__(self, **options: Any) -> None:
        super().__init__(start=Settings(steps=4), **options)
        self.pipes: list[Pipe] = []
        self.held = False

    def _open(self, settings: Settings) -> Any:
        if settings.model == "nowhere":
            raise JobError("there is no pipeline folder nowhere")
        pipe = Pipe(settings)
        if self.held:
            pipe.go.clear()
        self.pipes.append(pipe)
        return pipe

    def hold(self) -> None:
        """Let runs stop before their next step."""
        self.held = True
        for pipe in self.pipes:
            pipe.go.clear()

    def release(self) -> None:
        """Let them go on."""
        self.held = False
        for pipe in self.pipes:
            pipe.go.set()
