"""Linear and shape calls on secrets against float32, with public and secret weights; cost exact on meta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.graph.capture import capture
from sfumato.graph.execute import execute
from sfumato.graph.plan import Plan, client_side, load_side
from sfumato.graph.planning import make_plan
from sfumato.protocol.base import Protocol
from sfumato.protocol.plain import Plain
from sfumato.protocol.rep3 import Rep3
from sfumato.ring.fixed import decode, encode
from sfumato.session.drive import simulate
from sfumato.session.ledger import Ledger
from sfumato.session.session import Session
from sfumato.types import Shared


class Call(nn.Module):
    """One function of an image x (2, 4, 6, 6), a table w (4, 4), a kernel and a vector."""

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        self.f = f
        self.w = nn.Parameter(torch.randn(4, 4))
        self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.vector = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Any:
        return self.f(x, self)


MASK = torch.tensor([True, False, True, True, False, True])
CALLS: dict[str, Callable[[Tensor, Call], Any]] = {
    "permute": lambda x, m: x.permute(3, 1, 0, 2).flatten(1).unflatten(1, (4, 12)).squeeze(),
    "movedim": lambda x, m: x.movedim(1, -1).transpose(0, 2).unsqueeze(1).flip(0).roll(2, -1),
    "split": lambda x, m: torch.cat([x.split([1, 3], 1)[1], x.chunk(2, 1)[0], x.narrow(1, 0, 1)], 1),
    "stack": lambda x, m: torch.stack([x.select(1, 0), x[:, 1], torch.ones(2, 6, 6)], 1),
    "cat-public": lambda x, m: torch.cat([m.w.reshape(1, 4, 2, 2).expand(2, 4, 2, 2), x[..., :2, :2]], 1),
    "repeat": lambda x, m: x.repeat(1, 2, 1, 1).expand(3, 2, 8, 6, 6).mean((0, 2)),
    "nearest": lambda x, m: F.interpolate(x, scale_factor=2.0),
    "nearest-size": lambda x, m: F.interpolate(x, size=(9, 9)),
    "bilinear": lambda x, m: F.interpolate(x, size=(9, 8), mode="bilinear"),
    "pads": lambda x, m: F.pad(F.pad(x, (1, 2, 0, 1), value=0.5), (1, 1, 1, 1), mode="reflect"),
    "replicate": lambda x, m: F.pad(x, (1, 1, 2, 0), mode="replicate"),
    "shuffle": lambda x, m: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 3),
    "avg": lambda x, m: (F.avg_pool2d(x, 2), F.avg_pool2d(x, 3, 1, 1), F.adaptive_avg_pool2d(x, (3, 4))),
    "pool": lambda x, m: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "sums": lambda x, m: (x.sum(), x.sum((1, 2)), x.mean(), x.mean(-1, keepdim=True), x.cumsum(2)),
    "index": lambda x, m: (x[:, torch.tensor([3, 0])], x.index_select(2, torch.tensor([1, 1])), x[0, :, 1:3]),
    "gather": lambda x, m: x.gather(3, torch.zeros(2, 4, 6, 2, dtype=torch.int64)),
    "where": lambda x, m: (torch.where(MASK, x, 2.0), torch.where(MASK, 0.0, x), torch.where(MASK, x, -x)),
    "fill": lambda x, m: x.masked_fill(~MASK, 3.0) * MASK,
    "write": lambda x, m: torch.slice_scatter(x, x[:, :, :2] * 2, 2, 1, 3),
    "linear": lambda x, m: F.linear(x.permute(0, 2, 3, 1), m.w, m.vector),
    "matmul": lambda x, m: x.flatten(2).transpose(1, 2) @ m.w @ x.flatten(2),
    "addmm": lambda x, m: torch.addmm(m.vector, x[0, :, :, 0].t(), m.w, alpha=0.5, beta=2.0),
    "baddbmm": lambda x, m: torch.baddbmm(x[:, 0, :4, :4], x[:, 1, :4, :4], x[:, 2, :4, :4], alpha=0.1),
    "vector": lambda x, m: (m.w @ x[0, :, 0, 0], x[0, :, :, 0].t() @ m.vector),
    "conv": lambda x, m: F.conv2d(x, m.kernel, m.vector, stride=2, padding=1),
    "conv-groups": lambda x, m: F.conv2d(x, m.kernel[:, :1], None, padding=2, dilation=2, groups=4),
    "conv1d": lambda x, m: F.conv1d(x[:, :, 0], m.kernel[:, :, 0], m.vector, padding="same"),
    "conv-transpose": lambda x, m: F.conv_transpose2d(x, m.kernel, m.vector, 2, 1, 1),
    "einsum": lambda x, m: (torch.einsum("nchw->whcn", x), torch.einsum("nchw,cd->ndhw", x, m.w)),
    "sum-of": lambda x, m: (x + m.vector.reshape(4, 1, 1), 1.5 - x, torch.add(x, x.flip(1), alpha=0.3)),
    "scaled": lambda x, m: (x * 0.3, x * m.vector.reshape(4, 1, 1), -x / 3.0, x / torch.tensor(7.0), x * 2),
    "products": lambda x, m: (x * x.flip(0), x[:, :1] * x, x.pow(2), x**3, x.square()),
    "addcmul": lambda x, m: torch.addcmul(x, x, x.flip(1), value=0.5),
    "lerp": lambda x, m: torch.lerp(x, x.flip(0), 0.25),
    "broadcast": lambda x, m: x[:, :, :1, :1] + torch.arange(6.0) - x[:1, :1, :1],
}  # fmt: skip


def simulated(
    plan: Plan, kind: type[Protocol], x: Tensor, device: str = "cpu"
) -> tuple[list[Tensor] | None, list[Ledger]]:
    call, load = client_side(plan, (x,)), load_side(plan)

    async def main(session: Session) -> list[Tensor | None]:
        moves = kind()

        async def share(name: str, value: Tensor) -> Shared:
            type = plan.secret_type(name)
            words = encode(value.to(device), type.ring, type.frac) if session.party == 0 else None
            return await moves.share(session.fork(name), words, 0, type)

        secrets = {name: await share(name, value) for name, value in call.secrets.items()}
        weights: dict[str, Any] = {name: await share(name, value) for name, value in load.secrets.items()}
        weights |= load.publics  # on meta, too: their size decides their fraction bits
        outs = await execute(moves, session.fork("run"), plan, secrets, call.publics, weights)
        opened = [await moves.reveal(session.fork(f"open{i}"), out, (0,)) for i, out in enumerate(outs)]
        if device == "meta":
            return []
        return [None if w is None else decode(w, o.frac) for w, o in zip(opened, outs, strict=True)]

    results, ledgers = simulate(main, parties=kind.parties, device=device)
    return results[0], ledgers


@pytest.mark.parametrize("secret", ["inputs", "inputs+weights"])
@pytest.mark.parametrize("name", CALLS)
def test_calls_equal_float(name: str, secret: str) -> None:
    torch.manual_seed(3)
    module, x = Call(CALLS[name]).eval(), torch.randn(2, 4, 6, 6)
    plan = make_plan(capture(module, (x,)), secret=secret)
    with torch.no_grad():
        want = module(x)
    want = want if isinstance(want, tuple) else (want,)
    costs = []
    for kind in (Plain, Rep3):
        got, ledgers = simulated(plan, kind, x)
        assert got is not None
        values = dict(zip(plan.secret_outputs, got, strict=True))
        for a, b in zip(torch.utils._pytree.tree_leaves(plan.program.assemble(values)), want, strict=True):
            torch.testing.assert_close(a.float(), b, atol=2e-3, rtol=1e-3)
        costs.append([(led.bytes_sent, led.rounds) for led in ledgers])
    _, on_meta = simulated(plan, Rep3, x, "meta")
    assert [(led.bytes_sent, led.rounds) for led in on_meta] == costs[1]
