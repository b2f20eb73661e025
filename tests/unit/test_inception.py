"""Distances in Inception's features: torch-fidelity's own network, with weights made here."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sfumato.errors import JobError
from sfumato.study.inception import Inception, inception_distances

#: What torch-fidelity imports for extractors other than this one.
OTHERS = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


class _Empty(ModuleType):
    """A module of whatever is imported from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@pytest.fixture(scope="module")
def extractor() -> type[torch.nn.Module]:
    """torch-fidelity's class; where torchvision does not load, it is imported beside an empty one."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip('no torch-fidelity: pip install "sfumato[eval]"')
    name = "torch_fidelity.feature_extractor_inceptionv3"
    with pytest.MonkeyPatch.context() as patch:
        try:
            found = importlib.import_module(name)
        except (ImportError, RuntimeError):
            for other in OTHERS:
                patch.setitem(sys.modules, other, _Empty(other))
            found = importlib.import_module(name)
    return found.FeatureExtractorInceptionV3


@pytest.fixture(scope="module")
def weights(extractor: type[torch.nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the form that torch-fidelity publishes, with random weights."""
    file = tmp_path_factory.mktemp("weights") / "weights-inception-2015-12-05-6726825d.pth"
    torch.save({}, file)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "load_state_dict", lambda self, state: None)
        made = extractor("made", ["2048"], feature_extractor_weights_path=str(file))
    torch.save(made.state_dict(), file)
    return file


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_distances_order_rows_and_features_are_kept(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examiner = Inception(weights)
    source = torch.Generator().manual_seed(1)
    base = torch.randint(0, 100, (3, 1, 32, 32), dtype=torch.uint8, generator=source)
    far = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8, generator=source)
    rows = {"base": base, "near": base[:2] + 1, "far": far}
    seen: list[tuple[int, int]] = []
    found = inception_distances(examiner, rows, "base", lambda done, all: seen.append((done, all)))
    assert found["base"] == 0.0
    assert 0.0 < found["near"] < 0.1 * found["far"]
    assert seen == [(k, 3) for k in range(4)]
    torch.testing.assert_close(examiner.extract(far.expand(-1, 3, -1, -1)), examiner.extract(far))
    known = examiner.extract(base)
    monkeypatch.setattr(examiner, "_network", None)  # not asked again
    assert torch.equal(examiner.extract(base), known)
    with pytest.raises(JobError, match="base has 3 images, far only 2; draw as many"):
        inception_distances(examiner, rows, "far")


def test_a_file_of_something_else_is_refused_and_runs_no_code(weights: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(2)}, other)
    with pytest.raises(JobError, match="does not hold torch-fidelity's weights"):
        Inception(other)
    state = torch.load(weights, weights_only=True)
    torch.save(state | {"fc.bias": _Trap(tmp_path / "touched")}, other)
    with pytest.raises(JobError, match="does not hold torch-fidelity's weights"):
        Inception(other)
    assert not (tmp_path / "touched").exists()


class _Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path,)


def test_without_the_file_or_torch_fidelity_one_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(JobError, match=r"there is no file .*; give torch-fidelity's weights"):
        Inception(tmp_path / "none.pth")
    (tmp_path / "some.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(JobError, match=r'pip install "sfumato\[eval\]"'):
        Inception(tmp_path / "some.pth")
