"""What images of real data look like to a judge: means, covariances and some feature vectors, so that nobody needs the
data to measure with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.errors import JobError

__all__ = ["Reference", "load_reference", "reference_of", "save_references"]

_FILE = Path(__file__).resolve().parent / "weights" / "references.safetensors"
_FEATURES = 2000


@dataclass(frozen=True, slots=True)
class Reference:
    """``mean`` (d,) and ``covariance`` (d, d) over all real training images; ``features`` (2000, d) of some of them."""

    mean: Tensor
    covariance: Tensor
    features: Tensor


def reference_of(features: Tensor) -> Reference:
    """Of the features (N, d) of real images, in any order."""
    x = features.double()
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:_FEATURES]
    return Reference(x.mean(0), torch.cov(x.T), features[some].float())


def load_reference(name: str, folder: Path | None = None) -> Reference:
    """
    Raises:
        JobError: the file is not there, or has no such reference.
    """
    file = _FILE if folder is None else folder / _FILE.name
    try:
        held = load_file(file)
        return Reference(*(held[f"{name}.{part}"] for part in ("mean", "covariance", "features")))
    except (OSError, KeyError):
        raise JobError(
            f"there are no features of real images for {name} in {file.name}; train it with python -m sfumato.zoo.train"
        ) from None


def save_references(references: Mapping[str, Reference], folder: Path) -> Path:
    """Write them, the feature vectors in half precision; the file."""
    tensors = {}
    for name, reference in references.items():
        tensors[f"{name}.mean"] = reference.mean
        tensors[f"{name}.covariance"] = reference.covariance
        tensors[f"{name}.features"] = reference.features.half()
    path = folder / _FILE.name
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path
