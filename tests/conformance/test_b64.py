"""Words under xor: shares, public constants, and, on full 64-bit words."""

from __future__ import annotations

import pytest
import torch

from sfumato.protocol.base import Protocol
from sfumato.protocol.plain import Plain
from sfumato.protocol.rep3 import Rep3
from sfumato.session.drive import simulate
from sfumato.session.session import Session
from sfumato.types import B64, Secret


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
