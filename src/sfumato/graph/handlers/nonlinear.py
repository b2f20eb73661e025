"""Non-linear calls: what calibration measures of them, which approximation the plan chooses, and how they
run."""

from __future__ import annotations

from sfumato.graph.handlers.kinds import Handler
from sfumato.graph.handlers.nonlinear_elementwise import ELEMENTWISE
from sfumato.graph.handlers.nonlinear_rows import ROWS

__all__ = ["HANDLERS_NONLINEAR"]

#: By ATen target. Quotients and powers hand what is linear to the linear table.
HANDLERS_NONLINEAR: dict[str, Handler] = {**ELEMENTWISE, **ROWS}
