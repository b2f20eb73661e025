"""Reading of images with captions: what is fine-tuned on, what is tested with.

Four forms are read: a folder of class folders; a folder with ``metadata.jsonl`` (``file_name``, ``text``), as the data
library of the model hub has it; an ``.npz`` of images and labels; a folder of idx files. Every step from a file to the
model's pixels is fixed beforehand (size, padding, grey or colour): none of them looks at the data set as a whole.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sfumato.errors import JobError
from sfumato.zoo.train.data import DataError, read_idx

__all__ = ["Records", "fit", "read_records"]

_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Records:
    """``images`` (N, C, H, W) bytes; ``labels`` (N,): which of ``captions`` belongs to each. ``classes``: the captions
    name classes, so they may be told; texts of single images are as private as these."""

    images: Tensor
    labels: Tensor
    captions: tuple[str, ...]
    classes: bool = True

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise JobError(
                f"images are bytes (N, C, H, W), not {self.images.dtype} {tuple(self.images.shape)}"
            )
        if self.images.shape[1] not in (1, 3):
            raise JobError(f"images have {self.images.shape[1]} channels; give grey ones (1) or colours (3)")
        if len(self.images) != len(self.labels) or not len(self.images):
            raise JobError(
                f"{len(self.images)} images and {len(self.labels)} labels; give as many of each, at least one"
            )
        if not self.captions or int(self.labels.max()) >= len(self.captions) or int(self.labels.min()) < 0:
            raise JobError(
                f"a label is {int(self.labels.max())}, but there are {len(self.captions)} captions; name one per class"
            )

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> Records:
        """The first ``count`` records."""
        return Records(self.images[:count], self.labels[:count], self.captions, self.classes)

    def sampled(self, count: int, seed: int = 0) -> Records:
        """At most ``count`` records, chosen at random: files are often sorted by class."""
        rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return Records(self.images[rows], self.labels[rows], self.captions, self.classes)

    def aligned(self, captions: Sequence[str]) -> Records:
        """The same records with labels that index ``captions``: classes are matched by what they are called.

        Raises:
            JobError: a class that is not among them.
        """
        numbers = {text: k for k, text in enumerate(captions)}
        strange = [text for text in self.captions if text not in numbers]
        if strange:
            raise JobError(
                f"there is no class {strange[0]!r} among {', '.join(map(repr, captions))}; name both sets alike"
            )
        labels = torch.tensor([numbers[text] for text in self.captions])[self.labels]
        return Records(self.images, labels, tuple(captions), self.classes)

    def without_captions(self) -> Records:
        """The same images for unconditional training: every caption empty."""
        return Records(self.images, torch.zeros_like(self.labels), ("",))


def read_records(
    path: Path,
    *,
    captions: Sequence[str] = (),
    numbered: Sequence[str] = (),
    split: str = "train",
    unlabelled: str | None = None,
) -> Records:
    """Images and captions at ``path``.

    Args:
        path: of one of the four forms above.
        captions: one per class, in the order of the labels (of the folder names, sorted). May be left out where the
            files have texts of their own, or class folders, whose names are then the captions.
        numbered: captions of labels that are mere numbers, where ``captions`` is left out.
        split: ``"train"`` or ``"test"``: which arrays of an ``.npz``, which of a folder's idx files.
        unlabelled: caption of an ``.npz`` of images without labels; None refuses one.

    Raises:
        JobError: nothing readable there, labels missing, or captions that do not fit.
    """
    path = Path(path)
    if path.is_dir() and (path / "metadata.jsonl").is_file():
        return _captioned(path)
    if path.is_dir() and list(path.glob("*ubyte*")):
        return _idx(path, captions or numbered, split)
    if path.is_dir():
        return _folders(path, captions)
    if path.suffix == ".npz" and path.is_file():
        if not zipfile.is_zipfile(path):
            raise JobError(f"{path} is not a readable .npz: no zip archive, or a damaged one")
        try:
            return _arrays(path, captions, numbered, split, unlabelled)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:  # damaged, or arrays of objects
            raise JobError(f"{path} is not a readable .npz: {error}") from None
    raise JobError(
        f"{path}: no images to read; give a folder of class folders, a folder with metadata.jsonl, an .npz with images "
        "and labels, or a folder of idx files"
    )


def fit(images: Tensor, channels: int, side: int) -> Tensor:
    """Bytes (N, C, H, W) as the model takes them, (N, channels, side, side): grey from colour or copied to it; 28
    pixels padded with black to 32, other sizes resized."""
    if images.shape[1] != channels:
        if channels == 1:
            weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
            images = (images.float() * weights).sum(1, keepdim=True).round().to(torch.uint8)
        else:
            images = images[:, :1].expand(-1, channels, -1, -1)
    size = tuple(images.shape[2:])
    if size == (side, side):
        return images.contiguous()
    if size == (28, 28) and side == 32:
        return torch.nn.functional.pad(images, (2, 2, 2, 2))
    parts = [
        torch.nn.functional.interpolate(
            part.float(), size=(side, side), mode="bilinear", antialias=True, align_corners=False
        )
        for part in images.split(1000)
    ]
    return torch.cat(parts).round().clamp(0, 255).to(torch.uint8)


def _opened(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            if picture.mode[0] in "IF":
                raise JobError(f"{path} has more than 8 bits a channel; convert all images to 8 bits")
            array = np.asarray(picture.convert("L" if picture.mode in {"L", "1"} else "RGB"))
    except (OSError, UnidentifiedImageError):
        raise JobError(f"{path} is not a readable image; remove or replace it") from None
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _stacked(paths: Sequence[Path]) -> Tensor:
    """All pictures as one tensor. They must be alike in size, and all grey or all colour: if one image decided what
    becomes of the others, a set without it would differ in every record."""
    first = _opened(paths[0])
    images = np.empty((len(paths), *first.shape), np.uint8)
    for number, path in enumerate(paths):
        array = _opened(path)
        if len(array) != len(first):
            raise JobError(
                f"{path} is {'grey' if len(array) == 1 else 'colour'} and {paths[0].name} is not; make all alike"
            )
        if array.shape != first.shape:
            raise JobError(
                f"{path} is {array.shape[2]}x{array.shape[1]} pixels and {paths[0].name} is "
                f"{first.shape[2]}x{first.shape[1]}; bring all images to one size"
            )
        images[number] = array
    return torch.from_numpy(images)


def _folders(path: Path, captions: Sequence[str]) -> Records:
    classes = sorted(folder for folder in path.iterdir() if folder.is_dir())
    files = [sorted(f for f in folder.iterdir() if f.suffix.lower() in _PICTURES) for folder in classes]
    if not any(files):
        loose = any(f.suffix.lower() in _PICTURES for f in path.iterdir())
        raise JobError(
            f"{path}: the images have no labels; put each class into a folder of its own, or add metadata.jsonl with a "
            "file_name and a text per line (an empty text for unconditional training)"
            if loose
            else f"{path}: no class folders with images in it"
        )
    names = tuple(captions) or tuple(folder.name.replace("_", " ") for folder in classes)
    if len(names) != len(classes):
        raise JobError(
            f"{len(names)} captions for {len(classes)} class folders in {path}; give one per folder"
        )
    labels = torch.tensor([k for k, group in enumerate(files) for _ in group])
    return Records(_stacked([f for group in files for f in group]), labels, names)


def _captioned(path: Path) -> Records:
    files, texts = [], []
    for number, line in enumerate((path / "metadata.jsonl").read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            file, text = entry["file_name"], entry["text"]
            if not isinstance(file, str) or not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise JobError(f"{path / 'metadata.jsonl'}, line {number}: needs file_name and text") from None
        if not (path / file).resolve().is_relative_to(path.resolve()):
            raise JobError(f"{path / 'metadata.jsonl'}, line {number}: file_name leaves the folder")
        files.append(path / file)
        texts.append(text)
    if not files:
        raise JobError(f"{path / 'metadata.jsonl'} names no images")
    captions = tuple(dict.fromkeys(texts))
    numbers = {text: k for k, text in enumerate(captions)}
    return Records(_stacked(files), torch.tensor([numbers[text] for text in texts]), captions, False)


def _idx(path: Path, captions: Sequence[str], split: str) -> Records:
    prefix = "train" if split == "train" else "t10k"
    try:
        images, labels = (
            read_idx(
                next(iter(sorted(path.glob(f"{prefix}*{kind}*ubyte*"))), path / f"{prefix}-{kind}-ubyte")
            )
            for kind in ("images", "labels")
        )
    except DataError as error:
        raise JobError(str(error)) from None
    if images.ndim != 3:
        raise JobError(
            f"{path}: images of {images.ndim - 1} dimensions; idx files of grey images (N, H, W) are read"
        )
    return _labelled(path, images[:, None], labels, captions)


def _arrays(
    path: Path, captions: Sequence[str], numbered: Sequence[str], split: str, unlabelled: str | None
) -> Records:
    with np.load(path, allow_pickle=False) as arrays:
        names = next((n for n in ((f"{split}_images", f"{split}_labels"), ("images", "labels"), ("x", "y"))
                      if n[0] in arrays), None)  # fmt: skip
        if names is None:
            raise JobError(
                f"{path}: no array 'images' or '{split}_images' in it; it has {', '.join(arrays.files)}"
            )
        images = arrays[names[0]]
        if names[1] in arrays:
            labels = arrays[names[1]]
        elif unlabelled is not None:
            labels, captions = np.zeros(len(images), np.int64), (unlabelled,)
        else:
            raise JobError(
                f"{path}: {names[0]} has no labels; add an array {names[1]!r}, one number per image"
            )
        named = bool(captions)
        if not captions and "captions" in arrays:
            captions = [str(text) for text in arrays["captions"]]
        captions = captions or numbered
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise JobError(
            f"{path}: images are bytes (N, H, W) or (N, H, W, C), not {images.dtype} {images.shape}"
        )
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return _labelled(path, images, labels, captions, named)


def _labelled(
    path: Path, images: np.ndarray, labels: np.ndarray, captions: Sequence[str], named: bool = True
) -> Records:
    if labels.dtype.kind not in "iu":
        raise JobError(f"{path}: labels are whole numbers, not {labels.dtype}; number the classes from 0")
    flat = torch.from_numpy(labels.astype(np.int64).reshape(-1))
    if not captions:
        raise JobError(
            f"{path}: the labels are numbers; say what each class is called in a prompt (--caption, once per class)"
        )
    # A copy: what an idx file's bytes were read into cannot be written to.
    return Records(torch.from_numpy(np.array(images, order="C")), flat, tuple(captions), named)
