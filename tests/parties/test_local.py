"""A model over three real processes: the value, the estimate, the kernel's own byte count, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sfumato as sf
from sfumato.runtime.backend import Term
from sfumato.runtime.remote import Remote, open_backend

pytestmark = pytest.mark.processes


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.silu(self.norm(self.conv(x)))
        return self.head(h.flatten(2).mean(-1))


@pytest.fixture(scope="module")
def model() -> tuple[nn.Module, torch.Tensor]:
    return Small().eval(), torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("secret", ["inputs", "inputs+weights"])
def test_real_run_matches_float_and_estimate(model: tuple[nn.Module, torch.Tensor], secret: str) -> None:
    module, x = model
    plan = sf.make_plan(sf.capture(module, (x,)), secret=secret)
    result = sf.run(plan, (x,), backend="local")
    expected = module(x).detach()
    assert float((result.outputs - expected).norm() / expected.norm()) < 2e-3
    assert sf.estimate(plan).same_cost(result.cost)
    assert all(
        kernel > ledger
        for kernel, ledger in zip(result.cost.kernel_bytes, result.cost.bytes_sent, strict=True)
    )


def test_handles_keep_values_at_the_parties_and_nothing_is_left() -> None:
    plan = sf.make_plan(sf.capture(nn.Sequential(nn.Linear(4, 4), nn.SiLU()), (torch.randn(3, 4),)))
    inner = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    with sf.deploy(plan, backend="local") as deployment:
        backend = deployment._backend
        assert isinstance(backend, Remote)
        assert backend._local is not None
        pids, folder = backend._local.process_ids, Path(backend._local.folder)
        once = deployment(inner, reveal=False)
        twice = deployment(once)
        plain = deployment(deployment(inner))
        assert isinstance(once, sf.Handle)
        assert float((twice - plain).abs().max()) < 1e-4
        with pytest.raises(sf.JobError, match="shape"):
            deployment(sf.Handle(once.name, (4, 4), once.deployment))
        with pytest.raises(sf.JobError, match="another deployment"):
            deployment(sf.Handle(once.name, once.shape, "else"))
        deployment.drop(once)
        with pytest.raises(sf.JobError, match="no value"):
            deployment(once)
    assert not folder.exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_affine_commands() -> None:
    x = torch.arange(12, dtype=torch.float64).reshape(4, 3) / 7
    with open_backend("local") as backend:
        backend.put("x", x)
        backend.affine("y", [Term("x", 0.25, 0, 2), Term("x", -1.5, 2, 4)], "mix")
        backend.affine("z", [Term("y", 3.0), Term("y", -1.0)], "whole")
        expected = 0.25 * x[:2] - 1.5 * x[2:]
        assert float((backend.reveal("y") - expected).abs().max()) < 1e-4
        assert float((backend.reveal("z") - 2 * expected).abs().max()) < 1e-4
        backend.drop("x")
        with pytest.raises(sf.JobError, match="no value 'x'"):
            backend.reveal("x")


def test_real_parties_refuse_a_protocol_without_secrecy() -> None:
    with (
        pytest.raises(sf.InsecureError, match="no secrecy"),
        Remote(None, None, {"protocol": "plain"}) as backend,
    ):
        backend.report()
