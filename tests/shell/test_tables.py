"""Tables for the terminal: what fits into 80 and 120 columns, and what an estimate does not claim."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console, RenderableType

from sfumato.runtime.report import CostReport
from sfumato.shell.cluster import in_common, status_table
from sfumato.shell.report import cost_table

HOSTS = ["a.example", "sfumato-party1.sfumato-party1.svc.cluster.local", "2001:db8::12"]


def drawn(width: int, what: RenderableType) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(what)
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]  # type: ignore[attr-defined]


def party(**fields: Any) -> dict[str, Any]:
    usual = {"reachable": True, "ready": True, "package": "0.1.0", "protocol": 2, "uptime_s": 86400.0 * 999}
    return {
        **usual,
        "running": 64,
        "at_once": 64,
        "queued": 100_000,
        "models": 12,
        "certificate_days": 364.6,
        **fields,
    }


@pytest.mark.parametrize("width", [80, 120])
def test_status_is_read_at_a_glance(width: int) -> None:
    found = [
        party(),
        party(ready=False, certificate_days=-1.0, uptime_s=59.9),
        {"reachable": False, "ready": False},
    ]
    lines = drawn(width, status_table(HOSTS, found))
    head = re.split(r" {2,}", lines[0].strip())
    assert head == ["party", "host", "state", "running", "waiting", "up", "certificate"]
    rows = [line for line in lines[2:] if re.match(r" ?\d ", line)]
    assert [re.split(r" {2,}", row.strip())[2:] for row in rows] == [
        ["ready", "64 of 64", "100000", "999 d", "365 days left"],
        ["not ready", "64 of 64", "100000", "59 s", "0 days left"],
        ["not reachable"],
    ]
    assert all(len(line) <= width and "…" not in line for line in lines), "nothing is cut off"
    at = lines[0].index("host"), lines[0].index("state")
    assert "".join(line[slice(*at)].strip() for line in lines[2:]) == "".join(HOSTS)
    assert (len(lines) == 5) is (width == 120), "one line a party where the host's name has room"


def test_status_says_once_what_parties_have_in_common() -> None:
    lost = {"reachable": False, "ready": False}
    assert in_common([party(), lost, party()]) == "release 0.1.0; protocol 2; models 12"
    assert in_common([party(), party(package="0.2.0"), lost]).startswith(
        "release 0.1.0 at party 0, 0.2.0 at party 1;"
    )
    assert in_common([lost] * 3) == ""


def test_an_estimate_shows_no_time() -> None:
    counted = CostReport("rep3", 7, (1, 2, 3), (1, 1, 1), 4, 5, steps=(0.25, 0.35))
    assert "second" not in "".join(drawn(80, cost_table(counted)))
    measured = "".join(drawn(80, cost_table(replace(counted, seconds=0.7))))
    assert "seconds" in measured
    assert "0.30" in measured
