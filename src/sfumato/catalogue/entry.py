"""One published method as data: where it comes from, what it is meant for, and how to run it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sfumato.catalogue.machine import Machine
from sfumato.catalogue.prices import Cost, count, price
from sfumato.catalogue.words import Arithmetic, Exact, Reals, Words, run

__all__ = ["FUNCTIONS", "Entry", "Function"]

Method = Callable[..., Coroutine[Any, Any, Any]]


@dataclass(frozen=True, slots=True)
class Function:
    """A function that methods approximate. ``relative``: how its error is told; ``lo``, ``hi``: a usual range.

    ``rows``: it works on the last axis. ``log``: its axis is told in powers.
    """

    name: str
    truth: Callable[[Reals], Reals]
    lo: float
    hi: float
    relative: bool = False
    rows: bool = False
    log: bool = False


def _torch(f: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Reals], Reals]:
    return lambda x: np.asarray(f(torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64))).numpy())


#: By name.
FUNCTIONS: dict[str, Function] = {
    f.name: f
    for f in (
        Function("exp", _torch(torch.exp), -14.0, 0.0),
        Function("reciprocal", lambda x: 1.0 / x, 1.0, 4096.0, relative=True, log=True),
        Function("rsqrt", lambda x: 1.0 / np.sqrt(x), 1e-3, 1e3, relative=True, log=True),
        Function("sqrt", np.sqrt, 1e-3, 1e3, relative=True, log=True),
        Function("log", np.log, 1e-2, 1e2, log=True),
        Function("sigmoid", _torch(torch.sigmoid), -8.0, 8.0),
        Function("tanh", np.tanh, -4.0, 4.0),
        Function("erf", _torch(torch.erf), -3.0, 3.0),
        Function("gelu", _torch(torch.nn.functional.gelu), -8.0, 8.0),
        Function("silu", _torch(torch.nn.functional.silu), -12.0, 12.0),
        Function("mish", _torch(torch.nn.functional.mish), -12.0, 12.0),
        Function("softmax", _torch(lambda t: torch.softmax(t, -1)), -8.0, 8.0, rows=True),
        Function("layer_norm", _torch(lambda t: torch.nn.functional.layer_norm(t, t.shape[-1:])), -8.0, 8.0, rows=True),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """A method under the name ``paper.what``.

    ``lo``, ``hi``: the range its source states, or, with ``range_is`` saying so, one that we chose. ``frac``
    and ``bits``: the source's fixed point. ``published``: a cost that was measured or printed elsewhere.
    ``uncertain``: what could not be read at the source. ``another``: the method replaces the function and
    needs re-training, so its error is a distance and no defect. ``secure``: it runs on shares here.
    """

    name: str
    function: str
    source: str
    what: str
    method: Method
    options: Mapping[str, Any] = field(default_factory=dict)
    lo: float = 0.0
    hi: float = 0.0
    range_is: str = "stated"
    frac: int = 16
    bits: int = 64
    protocol: str = "crypten"
    cut_constants: bool = True
    published: Cost | None = None
    notes: str = ""
    uncertain: str = ""
    another: bool = False
    secure: bool = True

    @property
    def paper(self) -> str:
        return self.name.split(".")[0]

    @property
    def of(self) -> Function:
        return FUNCTIONS[self.function]

    def arithmetic(self, frac: int | None = None, salt: int = 0) -> Arithmetic:
        """The source's fixed point, or the same with other fraction bits."""
        return Arithmetic(self.frac if frac is None else frac, self.bits, self.cut_constants, salt)

    def evaluate(self, machine: Machine[Any], x: Any) -> Coroutine[Any, Any, Any]:
        """The method's coroutine on a machine's value."""
        return self.method(machine, x, **self.options)

    def approximate(self, x: Reals, frac: int | None = None, *, salt: int = 0) -> Reals:
        """The method in fixed point: words of ``frac`` fraction bits, rounded at every product, wrapped in
        their ring. ``salt`` draws another rounding."""
        words = Words(self.arithmetic(frac, salt))
        with np.errstate(over="ignore"):
            return words.decode(run(self.evaluate(words, words.encode(x))))

    def exact(self, x: Reals) -> Reals:
        """The formula in float64, without rounding or ring."""
        with np.errstate(all="ignore"):
            return np.asarray(run(self.evaluate(Exact(), np.asarray(x, dtype=np.float64))))

    def _steps(self, count_of: int) -> tuple[list[Any], int]:
        shape = (4, count_of) if self.of.rows else (16,)
        middle = np.full(shape, (self.lo + self.hi) / 2 if not self.of.log else 1.0)
        words = Words(self.arithmetic())
        with np.errstate(over="ignore"):
            run(self.evaluate(words, words.encode(middle)))
        return words.steps, middle.size

    def derived(self, row: int = 128, protocol: str | None = None) -> Cost:
        """Cost from unit prices, under the source's protocol or another; rows have ``row`` elements."""
        steps, elements = self._steps(row)
        return price(steps, protocol or self.protocol, elements)

    def cost(self, row: int = 128) -> Cost:
        """The published cost where there is one, else the derived one."""
        return self.published or self.derived(row)

    def multiplications(self, row: int = 128) -> float:
        """Products of two secrets per element, those with a bit included."""
        steps, elements = self._steps(row)
        return count(steps, ("mul", "square", "pick"), elements)

    def comparisons(self, row: int = 128) -> float:
        """Comparisons per element, those of a maximum included."""
        steps, elements = self._steps(row)
        return count(steps, ("compare", "row_max"), elements)
