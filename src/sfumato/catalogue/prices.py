"""What an operation costs under each paper's protocol: unit prices, as published or read in released code.

Bits are those of all parties together, for one element; rounds are counted one operation after the other, as
these libraries run them. A missing price makes the derived cost unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from sfumato.catalogue.words import Step

__all__ = ["PRICES", "Cost", "Prices", "count", "price"]

Price = Callable[[Step], tuple[float, int]]


@dataclass(frozen=True, slots=True)
class Cost:
    """Bits of all parties per element and rounds of one call. ``where`` says who measured or how it was
    derived."""

    rounds: int | None
    bits: float | None
    where: str


@dataclass(frozen=True, slots=True)
class Prices:
    """A protocol's unit prices by kind of step, its trust model, and where the prices come from."""

    title: str
    trust: str
    source: str
    of: Mapping[str, Price]


def _each(bits: float, rounds: int) -> Price:
    return lambda step: (bits * step.out, rounds)


def _terms(bits: float, rounds: int) -> Price:
    return lambda step: (bits * step.out * step.terms, rounds)


def _free(_: Step) -> tuple[float, int]:
    return 0.0, 0


def _opened(step: Step) -> tuple[float, int]:
    """A product of two parties with a dealer: both operands are opened, as they are, by both."""
    return 128.0 * (step.left + step.right), 1


def _tournament(bits: float, rounds: int) -> Price:
    return lambda step: (
        bits * step.out * (step.terms - 1),
        rounds * math.ceil(math.log2(max(step.terms, 2))),
    )


#: Two parties, 64 bits: a product 256 bits, a square 128, a comparison 3456 (8 rounds); truncation is local.
_CRYPTEN: Mapping[str, Price] = {
    "mul": _opened,
    "square": _opened,
    "pick": _opened,
    "scale": _free,
    "halve": _free,
    "divide": _free,
    "compare": lambda step: (3456.0 * step.out * step.terms, 8),
    "wave": _each(128.0, 1),
    "row_max": _tournament(3712.0, 9),
}


def _replicated(product: float, product_rounds: int, truncation: float) -> Mapping[str, Price]:
    """Three parties, 64 bits. ``product`` and ``truncation``: bits with the truncation that was in use."""
    return {
        "mul": _each(product, product_rounds),
        "square": _each(product, product_rounds),
        "pick": _each(512.0, 2),
        "scale": _terms(truncation, 2),
        "halve": _each(truncation, 2),
        "divide": _each(truncation, 2),
        "compare": lambda step: (864.0 * step.out * step.terms, 8),
        # Bits of the word, the highest one of them, and back.
        "magnitude": _each(2688.0 + 1152.0 + 2944.0, 24),
        "whole": lambda step: ((2688.0 + 256.0 * step.terms) * step.out, 10),
        "row_max": _tournament(1376.0, 10),
    }


#: By name: the protocols that entries refer to.
PRICES: Mapping[str, Prices] = MappingProxyType(
    {
        "crypten": Prices(
            "two parties and a dealer, Z64",
            "semi-honest; the dealer must not collude; its own traffic is not counted",
            "[CrypTen] 2, released code 0.4.0",
            _CRYPTEN,
        ),
        "aby3": Prices(
            "three parties, Z64, dealer truncation",
            "semi-honest, one of three corrupt",
            "[SPU], released code of the time of [PUMA]; the sums reproduce the tables of [PUMA] within 2 %",
            _replicated(704.0, 3, 512.0),
        ),
        "aby3-2025": Prices(
            "three parties, Z64, wrap-bit truncation",
            "semi-honest, one of three corrupt",
            "[SPU] released code since 2025-04, [GeoTrunc25]",
            _replicated(416.0, 3, 224.0),
        ),
        "two-party": Prices(
            "two parties, homomorphic encryption and oblivious transfer",
            "semi-honest, two parties, no third one",
            "[BumbleBee] publishes prices of comparisons and truncations only",
            {},
        ),
        "fss": Prices(
            "two parties and a dealer of function secret sharing keys",
            "semi-honest; the dealer must not collude",
            "[SIGMA]; prices not published per function",
            {},
        ),
        "ckks": Prices(
            "homomorphic encryption (CKKS)", "semi-honest client and server", "not priced here", {}
        ),
    }
)


def price(steps: Sequence[Step], protocol: str, elements: int) -> Cost:
    """What ``steps`` cost under ``protocol``, per one of ``elements`` elements."""
    prices, bits, rounds = PRICES[protocol].of, 0.0, 0
    for step in steps:
        of = prices.get(step.kind)
        if of is None:
            return Cost(None, None, f"no price of {step.kind.replace('_', ' ')} published")
        more, deeper = of(step)
        bits, rounds = bits + more, rounds + deeper
    return Cost(rounds, bits / elements, f"derived: {PRICES[protocol].title}")


def count(steps: Sequence[Step], kinds: Sequence[str], elements: int) -> float:
    """How many operations of these kinds an element takes; comparisons count every threshold."""
    many = {"compare"}
    total = sum(
        s.out * (s.terms if s.kind in many else max(1, s.terms - 1) if s.kind == "row_max" else 1)
        for s in steps
        if s.kind in kinds
    )
    return total / elements
