"""The data sets that `sfumato reproduce dp-ldm` knows, each with its captions and its settings for two processor cores.

The settings were chosen before any of these private sets was looked at: rates and numbers of draws on UCI's
handwritten digits (Alpaydin and Kaynak 1998; 1,797 images of other writers, public) under the noise per step that
MNIST's 60,000 records would have got, never on MNIST itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sfumato.dp.data import Records, read_records
from sfumato.dp.public import caption_of_character
from sfumato.errors import JobError

__all__ = ["SUBJECTS", "Subject"]

_XRAY = ("a chest x-ray of a healthy lung", "a chest x-ray of a lung with pneumonia")
_CIFAR = tuple(
    f"a photo of {'an' if name[0] == 'a' else 'a'} {name}"
    for name in ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
)


@dataclass(frozen=True)
class Subject:
    """A private data set. ``private`` and ``test`` read it below the folder that `--data` names; ``judge``: whose
    features distances are measured in, None where none was trained on such images; ``batch``: expected records a step;
    ``epochs`` of private training; ``delta``; ``mirror``: whether a mirrored image keeps its class."""

    name: str
    captions: tuple[str, ...]
    private: Callable[[Path], Records]
    test: Callable[[Path], Records]
    judge: str | None
    batch: int
    epochs: float
    delta: float = 1e-5
    mirror: bool = False


def _idx_test(folder: Path, captions: tuple[str, ...]) -> Records:
    return read_records(folder, captions=captions, split="test")


def _joined(folder: Path, names: tuple[str, ...]) -> Records:
    """Several .npz files as one set."""
    parts = [read_records(folder / name, captions=_CIFAR) for name in names]
    return Records(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]), _CIFAR)


def _pneumonia(folder: Path, split: str) -> Records:
    path = folder / "pneumonia_mnist" / "pneumoniamnist_balanced_subset.npz"
    if not path.is_file():
        raise JobError(f"{folder}: no pneumonia_mnist/{path.name} in it")
    with np.load(path, allow_pickle=False) as arrays:
        splits = ("test", "val") if split == "test" else (split,)
        images = np.concatenate([arrays[f"{name}_images"] for name in splits])
        labels = np.concatenate([arrays[f"{name}_labels"] for name in splits])
    return Records(
        torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64).ravel()), _XRAY
    )


_DIGITS = tuple(caption_of_character(digit) for digit in "0123456789")
SUBJECTS: Mapping[str, Subject] = {
    "mnist": Subject(
        "mnist",
        _DIGITS,
        lambda folder: read_records(folder / "mnist", captions=_DIGITS),
        lambda folder: _idx_test(folder / "mnist", _DIGITS),
        "grey",
        1024,
        8.0,
    ),
    "pneumonia": Subject(
        "pneumonia",
        _XRAY,
        lambda folder: _pneumonia(folder, "train"),
        lambda folder: _pneumonia(folder, "test"),
        None,
        607,
        20.0,
        1e-5,
    ),
    "cifar10": Subject(
        "cifar10",
        _CIFAR,
        lambda folder: _joined(
            folder / "cifar10", ("cifar10_train_first4000_lossless.npz", "cifar10_train_jpeg_6000.npz")
        ),
        lambda folder: read_records(folder / "cifar10" / "cifar10_test_jpeg_2000.npz", captions=_CIFAR),
        None,  # the zoo's judge of CIFAR-10 does not ship
        512,
        8.0,
        1e-5,
        mirror=True,
    ),
}
