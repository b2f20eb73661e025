"""Three party processes on three addresses, as three operators start them; one cluster file; the real machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import HOSTS, free_ports
from torch import nn

import sfumato as sf
from sfumato.runtime.authority import init_cluster
from sfumato.runtime.cluster import Limits

pytestmark = pytest.mark.processes


@pytest.fixture
def parties(tmp_path: Path) -> Iterator[tuple[Path, list[subprocess.Popen[str]]]]:
    folder = tmp_path / "cluster"
    init_cluster(folder, hosts=HOSTS, ports=free_ports(3), limits=Limits(connect_s=20.0, stall_s=20.0))
    processes = []
    for index in range(3):
        command = [sys.executable, "-m", "sfumato.runtime.server", "--folder", str(folder / f"party{index}")]
        processes.append(
            subprocess.Popen(
                [*command, "--index", str(index), "--threads", str(1 + index % 2)],
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        )
    for process in processes:
        assert process.stderr is not None
        for line in process.stderr:
            if "listens on" in line:
                break
        # What a party logs later must not fill the pipe.
        threading.Thread(target=process.stderr.read, daemon=True).start()
    yield folder / "client" / "cluster.toml", processes
    for process in processes:
        process.kill()
        process.wait(10)
        assert process.stderr is not None
        process.stderr.close()


def plan() -> tuple[sf.Plan, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 3)).eval()
    x = torch.randn(1, 1, 10, 10)
    return sf.make_plan(sf.capture(module, (x,))), x, module(x).detach()


def test_a_cluster_serves_runs_one_after_the_other(parties: tuple[Path, list[subprocess.Popen[str]]]) -> None:
    cluster, _ = parties
    made, x, expected = plan()
    for _ in range(2):
        result = sf.run(made, (x,), cluster=cluster)
        assert float((result.outputs - expected).abs().max()) < 1e-3
        assert sf.estimate(made).same_cost(result.cost)


def test_a_party_that_dies_between_calls_is_one_clear_error(
    parties: tuple[Path, list[subprocess.Popen[str]]],
) -> None:
    cluster, processes = parties
    made, x, _ = plan()
    with sf.deploy(made, cluster) as deployment:
        deployment(x)
        processes[1].send_signal(signal.SIGKILL)
        processes[1].wait(10)
        with pytest.raises(sf.LinkError, match="party 1"):
            deployment(x)
    with pytest.raises(sf.LinkError, match="party 1"):
        sf.run(made, (x,), cluster=cluster)
