"""What every test shares: no network, one thread, the data folder, and no skip that nobody expected."""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from pathlib import Path

# Before anything imports a hub client.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")
# Before torch and numpy: on tensors as small as the tests', threads that wait for each other cost more than they give,
# and several test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]

NO_DATA = "data folder not found"
NO_CUDA = "no CUDA device"
WRONG_PLATFORM = "not on this platform"
NO_KERNELS = "no native kernels"
NO_BROWSER = "no browser"
NO_PEFT = "no peft"
NO_FIDELITY = "no torch-fidelity"

# A skip whose reason starts with none of these is a failure: a test that silently stopped running is worse
# than a red one.
EXPECTED_SKIPS = (NO_DATA, NO_CUDA, WRONG_PLATFORM, NO_KERNELS, NO_BROWSER, NO_PEFT, NO_FIDELITY)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets: `SFUMATO_DATA`, or `shared/data` beside the repository."""
    named = os.environ.get("SFUMATO_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not (folder / "images").is_dir():
        pytest.skip(f"{NO_DATA}: set SFUMATO_DATA to a folder with images/, models/, prompts/ and text/")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason=NO_CUDA))


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str | None:
    """The reason of a skip, or None when the report is no skip (an expected failure is none)."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return None
    longrepr = report.longrepr
    reason = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return re.sub(r"^Skipped: ", "", reason)


def fail_unexpected_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip for a reason that is not in `EXPECTED_SKIPS` into a failure, in place."""
    reason = skip_reason(report)
    if reason is not None and not reason.startswith(EXPECTED_SKIPS):
        report.outcome = "failed"
        report.longrepr = f"unexpected skip: {reason!r} (reasons that are allowed: tests/conftest.py)"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    fail_unexpected_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    fail_unexpected_skip(report)
    return report
