"""What a machine keeps for a session: values by handle, each with its label, and plans by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from sfumato.errors import JobError
from sfumato.graph.plan import Plan
from sfumato.runtime.policy import Label, Part, after_own
from sfumato.types import Shared, SharedIndex

__all__ = ["Handles", "Loaded"]


class Handles:
    """Shares and their labels: one entry holds both, so that neither is ever replaced without the other."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Shared | SharedIndex, Label]] = {}

    def keep(self, handle: str, value: Shared | SharedIndex, label: Label) -> None:
        """``handle`` is this value from now on."""
        self._kept[handle] = (value, label)

    def __contains__(self, handle: str) -> bool:
        return handle in self._kept

    def value(self, handle: str) -> Shared:
        """``JobError`` when there is none, or row numbers in its place."""
        value = self._entry(handle)[0]
        if isinstance(value, SharedIndex):
            raise JobError(f"the value {handle!r} holds row numbers, which only a look-up takes")
        return value

    def index(self, handle: str) -> SharedIndex:
        """``JobError`` when there is none, or another value in its place."""
        value = self._entry(handle)[0]
        if not isinstance(value, SharedIndex):
            raise JobError(f"the value {handle!r} is {value.type}, and a look-up takes row numbers")
        return value

    def label(self, handle: str) -> Label:
        """Who keeps the value closed; ``JobError`` when there is none."""
        return self._entry(handle)[1]

    def drop(self, handle: str) -> None:
        """Forget it; ``JobError`` when there is none."""
        self._entry(handle)
        del self._kept[handle]

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()

    def _entry(self, handle: str) -> tuple[Shared | SharedIndex, Label]:
        if handle not in self._kept:
            raise JobError(f"there is no value {handle!r} here; put it first")
        return self._kept[handle]


class Loaded(NamedTuple):
    """A plan with what this party holds of its weights; ``part``: which approved part it is, None for a client's."""

    plan: Plan
    held: Mapping[str, Any]
    part: Part | None = None

    def check(self, inputs: Iterable[str], publics: Mapping[str, Tensor]) -> None:
        """``JobError`` unless an approved part gets exactly its inputs: a weight is not the client's to give."""
        if self.part is None:
            return
        plan, who = self.plan, self.part.model.name
        if set(inputs) != set(plan.client_inputs) or set(publics) != set(plan.public_inputs):
            raise JobError(
                f"a call of a part of {who} takes exactly its inputs, {', '.join(plan.client_inputs)}"
            )
        for name, tensor in publics.items():
            shape, dtype = plan.program.types[name]
            if tuple(tensor.shape) != shape or tensor.is_floating_point() != dtype.is_floating_point:
                raise JobError(f"the public input {name} of a part of {who} must be {dtype}{list(shape)}")

    def outcome(self, inputs: Iterable[Label]) -> tuple[Label, Label]:
        """The labels of a run's results and of its certificate."""
        labels = list(inputs)
        if self.part is None:
            return after_own(labels), after_own(labels)
        return self.part.after(labels), self.part.judged(labels)
