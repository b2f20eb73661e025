"""Words under xor: shares, public constants, and, on full 64-bit words."""

from __future__ import annotations

import pytest
import torch

from sfumato.protocol.base import Protocol
from sfumato.protocol.plain import Plain
from sfumato.protocol.rep3 import Rep3
from sfumato.session.drive import simulate
from sfumato.session.session import Session
from sfumato.types import B64, Z32, Secret


@pytest.mark.parametrize("p", [Rep3(), Plain()], ids=["rep3", "plain"])
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_boolean_words(p: Protocol, turn: int) -> None:
    generator = torch.Generator().manual_seed(turn)
    x, y, c = (torch.randint(-(2**62), 2**62, (5, 7), generator=generator) for _ in range(3))
    type = Secret(B64, 0, (5, 7))

    async def main(s: Session) -> torch.Tensor | None:
        s = s.fork("op", turn=turn)
        a = await p.share(s.fork("x"), x, 0, type)
        b = await p.share(s.fork("y"), y, 2 % p.parties, type)
        both = await p.bilinear(s.fork("and"), torch.bitwise_and, a, b)
        mixed = p.add_public(s, p.add(both, p.sub(a, b)), c)
        return await p.reveal(s.fork("out"), mixed, (0, 1, 2))

    results, ledgers = simulate(main, parties=p.parties)
    assert all(torch.equal(found, (x & y) ^ x ^ y ^ c) for found in results if found is not None)
    if p.parties == 3:
        # share 2 x 64 bits, and 3 x 64, reveal 3 x 64, for 35 elements
        assert sum(ledger.bytes_sent for ledger in ledgers) == 35 * 8 * (2 + 3 + 3)


@pytest.mark.parametrize("p", [Rep3(), Rep3(fused=False), Plain()], ids=["rep3", "rep3-moves", "plain"])
def test_sums_stay_in_the_small_ring(p: Protocol) -> None:
    x = torch.arange(-20, 20, dtype=torch.int32).reshape(4, 10) << 8
    type = Secret(Z32, 8, (4, 10))

    async def main(s: Session) -> list[torch.Tensor | None]:
        a = await p.share(s.fork("x"), x, 0, type)
        added = p.linear(lambda part: part.sum(-1), a)
        folded = await p.linear_truncate(s.fork("l"), lambda part: part.sum(-1), a, 4, shape=(4,))
        inner = await p.bilinear_truncate(s.fork("b"), lambda u, v: (u * v).sum(-1), a, a, 8)
        return [await p.reveal(s.fork(f"r{i}"), y, (0, 1, 2)) for i, y in enumerate((added, folded, inner))]

    results, _ = simulate(main, parties=p.parties)
    added, folded, inner = results[0]
    values = x.to(torch.int64) >> 8
    assert torch.equal(added, x.sum(-1).to(torch.int32))
    assert int((folded - (x.sum(-1) >> 4)).abs().max()) <= 1
    assert int((inner - ((values * values).sum(-1) << 8)).abs().max()) <= 1
