"""``sfumato status``: what it says of three parties that run, and of one that does not."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))

from processes import start, status, wait_for

from sfumato.runtime.local import LocalCluster
from sfumato.shell.cli import app

pytestmark = [pytest.mark.processes, pytest.mark.timeout(90)]


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with start() as made:
        ready = made.ready()
        (made.client_folder / "cluster.toml").write_text(ready.to_toml())
        for party in range(3):
            wait_for(lambda party=party: status(made, party)["ready"] is True, 60.0)  # type: ignore[misc]
        yield made


def test_status_of_three_parties_and_of_two(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    asked = ["status", "--cluster", str(cluster.client_folder / "cluster.toml")]
    with cluster.session():
        result = CliRunner().invoke(app, [*asked, "--json"])
        rows = json.loads(result.stdout)
        assert result.exit_code == 0
        assert [row["party"] for row in rows] == [0, 1, 2]
        for row in rows:
            assert row["ready"] is row["reachable"] is row["listening"] is row["storage"] is True
            assert (row["protocol"], row["running"], row["at_once"], row["queued"]) == (2, 1, 2, 0)
            assert 364 < row["certificate_days"] <= 365
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0
    assert shown.stdout.count(" ready ") == 3
    assert "0 of 2" in shown.stdout
    assert "days left" in shown.stdout

    os.kill(cluster.process_ids[1], signal.SIGKILL)
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 1
    assert shown.stdout.count(" ready ") == 2
    assert "not reachable" in shown.stdout
    assert "\nparty 1 (127.0.0.2" in shown.stdout


def test_a_certificate_that_ends_soon_is_told(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sfumato.runtime.control.ask",
        lambda _cluster, _keys, party, _request, **_: {
            **status(cluster, party),
            "certificate_days": 12.3,
            "storage": False,
        },
    )
    shown = CliRunner().invoke(app, ["status", "--cluster", str(cluster.client_folder)])
    assert "party 0: its certificate ends soon" in shown.stdout
    assert "party 2: its store cannot be written" in shown.stdout
