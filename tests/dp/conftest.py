"""Public models of the smallest size, with random weights, to fine-tune: what they draw does not matter here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sfumato.dp.data import Records
from sfumato.dp.finetune import Run, finetune
from sfumato.dp.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))
from tuning import RECIPE, images_of, records_of, remembering, save_public, save_unconditional


@pytest.fixture(scope="session")
def remembered() -> Iterator[None]:
    with remembering():
        yield


@pytest.fixture(scope="session")
def public_images() -> torch.Tensor:
    """What the public models say that they have seen."""
    return images_of(50, 1000)


@pytest.fixture(scope="session")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("public") / "model"
    save_public(folder)
    return folder


@pytest.fixture(scope="session")
def public_unconditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unconditional") / "model"
    save_unconditional(folder)
    return folder


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every private step that really runs."""
    ran: list[int] = []
    original = Trainer.step

    def counted(self: Trainer, rows: torch.Tensor) -> None:
        ran.append(len(rows))
        original(self, rows)

    monkeypatch.setattr(Trainer, "step", counted)
    return ran


@pytest.fixture(scope="module")
def records() -> Records:
    return records_of(64)


@pytest.fixture(scope="module")
def run(public: Path, records: Records, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finetune(public, records, RECIPE, tmp_path_factory.mktemp("run") / "out")
