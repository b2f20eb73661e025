"""Sums, products, matrix products and convolutions against float64, tiled and not, public and secret operands."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import torch
from torch import Tensor

from sfumato.errors import TypeMismatch
from sfumato.ops import basic
from sfumato.ops.basic import Conv
from sfumato.ops.tiles import Tiles
from sfumato.protocol.base import Protocol
from sfumato.protocol.plain import Plain
from sfumato.protocol.rep3 import Rep3
from sfumato.ring.fixed import decode, encode
from sfumato.session.drive import simulate
from sfumato.session.session import Session
from sfumato.types import Z64, Secret, Shared

FRAC = 18
ULP = 2.0**-FRAC
SMALL = Tiles(elements=64, smallest=16, products=64)
PROTOCOLS = [
    pytest.param(Rep3(), id="rep3"),
    pytest.param(Rep3(fused=False), id="rep3-moves"),
    pytest.param(Plain(), id="plain"),
]

Op = Callable[[Protocol, Session, list[Shared]], Awaitable[Shared]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(p: Protocol, op: Op, *values: Tensor, device: str = "cpu") -> tuple[Tensor, list]:
    async def main(s: Session) -> Tensor | None:
        secrets = []
        for i, value in enumerate(values):
            words = encode(value.to(device), Z64, FRAC)
            secrets.append(await p.share(s.fork(f"in{i}"), words, 0, Secret(Z64, FRAC, tuple(value.shape))))
        out = await op(p, s.fork("op"), secrets)
        assert out.frac == FRAC
        return await p.reveal(s.fork("out"), out, (0, 1, 2))

    results, ledgers = simulate(main, parties=p.parties, device=device)
    return (decode(results[-1], FRAC) if device == "cpu" else results[-1]), ledgers


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance


@pytest.mark.parametrize("p", PROTOCOLS)
@pytest.mark.parametrize("tiles", [Tiles(), SMALL], ids=["whole", "tiled"])
@pytest.mark.parametrize(
    "shapes", [((5, 7), (7, 3)), ((9, 4), (4, 11)), ((2, 3, 8, 5), (2, 3, 5, 6)), ((4, 6, 5), (5, 3))]
)
@pytest.mark.parametrize("public", ["none", "left", "right"])
def test_matmul(p: Protocol, tiles: Tiles, shapes: tuple, public: str) -> None:
    a, b, c = (
        normal(*shapes[0]),
        normal(*shapes[1], seed=1),
        normal(*torch.matmul(normal(*shapes[0]), normal(*shapes[1])).shape, seed=2),
    )

    async def op(p: Protocol, s: Session, xs: list[Shared]) -> Shared:
        left = a if public == "left" else xs[0]
        right = b if public == "right" else xs[1]
        return await basic.matmul(p, s, left, right, factor=0.37, plus=xs[2], tiles=tiles)

    found, _ = run(p, op, a, b, c)
    close(found, 0.37 * (a @ b) + c, 60 * ULP)


@pytest.mark.parametrize("p", PROTOCOLS)
@pytest.mark.parametrize("tiles", [Tiles(), SMALL], ids=["whole", "tiled"])
@pytest.mark.parametrize("secret_weight", [True, False])
def test_linear_with_bias_and_residual(p: Protocol, tiles: Tiles, secret_weight: bool) -> None:
    x, w, bias, plus = normal(2, 7, 5), normal(4, 5, seed=1), normal(4, seed=2), normal(2, 7, 4, seed=3)

    async def op(p: Protocol, s: Session, xs: list[Shared]) -> Shared:
        weight, offset = (xs[1], xs[2]) if secret_weight else (w, bias)
        return await basic.linear(p, s, xs[0], weight, offset, plus=xs[3], tiles=tiles)

    found, _ = run(p, op, x, w, bias, plus)
    close(found, torch.nn.functional.linear(x, w, bias) + plus, 60 * ULP)


@pytest.mark.parametrize("p", PROTOCOLS[::2])
@pytest.mark.parametrize("tiles", [Tiles(), SMALL], ids=["whole", "tiled"])
@pytest.mark.parametrize("secret_weight", [True, False])
@pytest.mark.parametrize(
    ("shape", "kernel", "geometry"),
    [
        ((2, 3, 8, 7), (6, 3, 3, 3), Conv((1, 1), (1, 1), (1, 1))),
        ((1, 4, 9, 9), (8, 2, 3, 2), Conv((2, 3), (1, 0), (1, 2), 2)),
        ((1, 6, 5, 5), (6, 1, 3, 3), Conv((1, 1), (1, 1), (1, 1), 6)),
        ((2, 3, 11), (4, 3, 5), Conv((2,), (2,), (1,))),
    ],
)
def test_conv(
    p: Protocol, tiles: Tiles, secret_weight: bool, shape: tuple, kernel: tuple, geometry: Conv
) -> None:
    x, w, bias = normal(*shape), normal(*kernel, seed=1), normal(kernel[0], seed=2)

    async def op(p: Protocol, s: Session, xs: list[Shared]) -> Shared:
        weight, offset = (xs[1], xs[2]) if secret_weight else (w, bias)
        return await basic.conv(p, s, xs[0], weight, offset, geometry, tiles=tiles)

    found, _ = run(p, op, x, w, bias)
    run_float = torch.nn.functional.conv1d if x.dim() == 3 else torch.nn.functional.conv2d
    expected = run_float(x, w, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    close(found, expected, 60 * ULP)


@pytest.mark.parametrize("p", PROTOCOLS)
def test_elementwise(p: Protocol) -> None:
    x, y, z = normal(50, 300), normal(50, 300, seed=1), normal(50, 1, seed=2)

    async def op(p: Protocol, s: Session, xs: list[Shared]) -> Shared:
        a = await basic.mul(p, s.fork("a"), xs[0], xs[1], plus=xs[0])
        b = await basic.mul(p, s.fork("b"), a, xs[2])
        c = await basic.scale(p, s.fork("c"), b, 0.3)
        d = await basic.mul(p, s.fork("d"), c, torch.full((300,), 1.7))
        e = basic.add(p, s, 2.5, d, alpha=-1.0)
        return basic.sub(p, s, basic.add(p, s, e, xs[2]), await basic.scale(p, s.fork("e"), xs[2], 3))

    found, _ = run(p, op, x, y, z)
    close(found, 2.5 - (x * y + x) * z * 0.3 * 1.7 + z - 3 * z, 200 * ULP)


def test_tiles_balance_the_parties() -> None:
    x, w = normal(96, 64), normal(64, 64, seed=1)

    async def op(p: Protocol, s: Session, xs: list[Shared]) -> Shared:
        return await basic.matmul(p, s, xs[0], w, tiles=Tiles(products=1))

    _, ledgers = run(Rep3(), op, x)
    sent = [sum(row.bytes_sent for path, row in ledger.rows.items()) for ledger in ledgers]
    share = [96 * 64 * 8, 0, 0]
    reveal = 96 * 64 * 8
    work = [a - b - reveal for a, b in zip(sent, share, strict=True)]
    assert max(work) <= 1.02 * min(work)


def test_two_public_operands_are_refused() -> None:
    async def op(p: Protocol, s: Session, xs: list[Shared]) -> Shared:
        return await basic.matmul(p, s, normal(2, 2), normal(2, 2))

    with pytest.raises(TypeMismatch, match="at least one secret"):
        run(Rep3(), op, normal(2, 2))


@pytest.mark.parametrize("tiles", [Tiles(), SMALL], ids=["whole", "tiled"])
def test_cost_on_shapes_is_the_real_cost(tiles: Tiles) -> None:
    x, w = normal(1, 6, 9, 9), normal(6, 6, 3, 3, seed=1)

    async def op(p: Protocol, s: Session, xs: list[Shared]) -> Shared:
        y = await basic.conv(p, s.fork("c"), xs[0], w, None, Conv((1, 1), (1, 1), (1, 1)), tiles=tiles)
        y = await basic.mul(p, s.fork("m"), y, xs[0])
        return await basic.matmul(p, s.fork("mm"), y, xs[0], tiles=tiles)

    _, real = run(Rep3(), op, x)
    _, shapes = run(Rep3(), op, x, device="meta")
    assert [(a.rounds, a.bytes_sent, a.sends, a.rows) for a in real] == [
        (a.rounds, a.bytes_sent, a.sends, a.rows) for a in shapes
    ]
