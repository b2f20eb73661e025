"""How ATen calls run on secrets: one table from target to `Handler`."""

from __future__ import annotations

from sfumato.graph.handlers.kinds import Context, Handler, Options, Stats
from sfumato.graph.handlers.linear import HANDLERS_LINEAR
from sfumato.graph.handlers.look_up import HANDLERS_LOOK_UP
from sfumato.graph.handlers.nonlinear import HANDLERS_NONLINEAR
from sfumato.graph.handlers.shapes import HANDLERS_SHAPES

__all__ = ["HANDLERS", "Context", "Handler", "Options", "Stats"]

#: By ATen target. The non-linear table comes last: where both know one (div, pow), it hands on linear forms.
HANDLERS: dict[str, Handler] = {
    **HANDLERS_LINEAR,
    **HANDLERS_SHAPES,
    **HANDLERS_LOOK_UP,
    **HANDLERS_NONLINEAR,
}
