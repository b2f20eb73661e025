"""How ATen calls run on secrets: one table from target to `Handler`."""

from __future__ import annotations

from sfumato.graph.handlers.kinds import Context, Handler, Options, Stats
from sfumato.graph.handlers.linear import HANDLERS_LINEAR
from sfumato.graph.handlers.shapes import HANDLERS_SHAPES

try:
    from sfumato.graph.handlers.nonlinear import HANDLERS_NONLINEAR
except ModuleNotFoundError:
    HANDLERS_NONLINEAR = {}

__all__ = ["HANDLERS", "Context", "Handler", "Options", "Stats"]

#: By ATen target. The non-linear table comes first: where both know a target, the linear one is the special form.
HANDLERS: dict[str, Handler] = {**HANDLERS_NONLINEAR, **HANDLERS_LINEAR, **HANDLERS_SHAPES}
