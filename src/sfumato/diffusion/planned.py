"""The network of a plan, run in the clear with the plan's own fixed-point arithmetic (backend ``plain``)."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from torch import Tensor

from sfumato.diffusion.loop import call_kwargs
from sfumato.graph.plan import Plan, client_side
from sfumato.runtime.remote import open_backend

__all__ = ["PlannedNetwork"]


class PlannedNetwork:
    """What the parties would open of a denoiser's output, without parties: the approximations of its plan, no secrecy.

    Called as a float network is: ``(sample, timestep, text) -> outputs``, in float64. The batch is the plan's.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self._calls = plan, 0
        # The checks of ranges are for the parties' runs; here they would double the time.
        self._backend = open_backend("plain", options={"certificate": False})
        self._backend.load("unet", plan)

    def __call__(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        self._calls += 1
        call = f"call{self._calls}"
        given = client_side(self._plan, (sample,), call_kwargs(timestep.reshape(()), text, None))
        names = {name: f"{name}.{call}" for name in given.secrets}
        for name, tensor in given.secrets.items():
            self._backend.put_input(names[name], self._plan, name, tensor)
        self._backend.call("unet", call, names, given.publics, [f"output.{call}"])
        output: Tensor = self._backend.reveal(f"output.{call}")
        self._backend.drop(*names.values(), f"output.{call}")
        return output

    def close(self) -> None:
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
