"""Reading of MNIST and Fashion-MNIST from idx files."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

SETS = ("mnist", "fashion_mnist")


class DataError(ValueError):
    """A data file is missing or is not what its name says."""


class Split(NamedTuple):
    """Images (N, 1, 32, 32) uint8 and labels (N,) int64 in 0..19 (clothes are 10 and up)."""

    images: torch.Tensor
    labels: torch.Tensor


def read_idx(path: Path) -> np.ndarray:
    """Array of unsigned bytes held in an idx file, gzipped or plain."""
    if not path.is_file():
        raise DataError(f"no such idx file: {path}")
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError) as error:
            raise DataError(f"{path}: damaged gzip data ({error})") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != 8 or not 1 <= raw[3] <= 4:
        raise DataError(f"{path}: not an idx file of unsigned bytes (header {raw[:4].hex() or 'empty'})")
    ndim = raw[3]
    start = 4 + 4 * ndim
    if len(raw) < start:
        raise DataError(f"{path}: the idx header is cut off")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", ndim, 4))
    want = int(np.prod(shape, dtype=np.int64))
    if len(raw) - start != want:
        raise DataError(
            f"{path}: header says {want} bytes of shape {shape}, the file holds {len(raw) - start}"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _find(folder: Path, prefix: str, kind: str) -> Path:
    found = sorted(folder.glob(f"{prefix}*{kind}*ubyte*"))
    if not found:
        raise DataError(f"{folder}: no file like {prefix}*{kind}*ubyte* (the idx files of the data set)")
    return found[0]


def load_split(root: Path, train: bool) -> Split:
    """Both data sets below ``root`` together, 28x28 padded with black to 32x32."""
    prefix = "train" if train else "t10k"
    images, labels = [], []
    for number, name in enumerate(SETS):
        folder = root / name
        if not folder.is_dir():
            raise DataError(f"{root}: no folder {name!r} in it (needed: {', '.join(SETS)})")
        x = read_idx(_find(folder, prefix, "images"))
        y = read_idx(_find(folder, prefix, "labels"))
        if x.ndim != 3 or x.shape[1:] != (28, 28) or y.shape != x.shape[:1]:
            raise DataError(f"{folder}: images {x.shape} and labels {y.shape} do not fit together")
        if y.size and int(y.max()) > 9:
            raise DataError(f"{folder}: a label is {int(y.max())}, more than 9")
        images.append(np.pad(x, ((0, 0), (2, 2), (2, 2)))[:, None])
        labels.append(y.astype(np.int64) + 10 * number)
    return Split(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)))


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """Unsigned bytes to floats in [-1, 1], the range of the autoencoder."""
    return images.float() / 127.5 - 1
