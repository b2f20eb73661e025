"""Images with captions from every form that is read, and one sentence where something does not fit."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.dp.data import Records, fit, read_records
from sfumato.errors import JobError

DIGITS = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 1, 0, 2])
NAMES = ("nought", "one", "two")


def picture(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = head + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(packed) if path.suffix == ".gz" else packed)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def same(found: Records, captions: tuple[str, ...] = NAMES) -> None:
    assert found.captions == captions
    assert found.images.shape == (6, 1, 28, 28)
    by_picture = {
        bytes(image.numpy().tobytes()): int(k) for image, k in zip(found.images, found.labels, strict=True)
    }
    assert by_picture == {image.tobytes(): int(k) for image, k in zip(DIGITS, LABELS, strict=True)}


def test_class_folders(tmp_path: Path) -> None:
    for number, (image, label) in enumerate(zip(DIGITS, LABELS, strict=True)):
        picture(tmp_path / f"{label}_{NAMES[label]}" / f"{number}.png", image)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "0_nought" / "list.csv").write_text("no image")
    same(read_records(tmp_path), ("0 nought", "1 one", "2 two"))
    same(read_records(tmp_path, captions=NAMES))
    with pytest.raises(JobError, match="2 captions for 3 class folders"):
        read_records(tmp_path, captions=NAMES[:2])
    picture(tmp_path / "1_one" / "large.png", np.zeros((30, 28), np.uint8))
    with pytest.raises(JobError, match=r"large.png is 28x30 pixels and 1.png is 28x28; bring all"):
        read_records(tmp_path)
    (tmp_path / "1_one" / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(JobError, match=r"large.png is not a readable image"):
        read_records(tmp_path)
    picture(tmp_path / "1_one" / "large.png", np.zeros((28, 28), np.uint16))
    with pytest.raises(JobError, match="more than 8 bits"):
        read_records(tmp_path)


def test_colours_and_grey_in_one_set(tmp_path: Path) -> None:
    """One picture must not decide how all others are read."""
    colour = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture(tmp_path / "a" / "0.png", colour)
    picture(tmp_path / "a" / "1.png", colour[..., 0])
    with pytest.raises(JobError, match=r"1.png is grey and 0.png is not; make all alike"):
        read_records(tmp_path)
    picture(tmp_path / "a" / "0.png", colour[..., 1])
    picture(tmp_path / "a" / "1.png", colour)
    with pytest.raises(JobError, match=r"1.png is colour and 0.png is not; make all alike"):
        read_records(tmp_path)
    picture(tmp_path / "a" / "0.png", colour[::-1])
    found = read_records(tmp_path)
    assert torch.equal(found.images[1], torch.from_numpy(colour).permute(2, 0, 1))


def test_loose_images_have_no_labels(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no class folders with images"):
        read_records(tmp_path)
    picture(tmp_path / "0.png", DIGITS[0])
    with pytest.raises(JobError, match=r"the images have no labels; put each class into a folder"):
        read_records(tmp_path)
    with pytest.raises(JobError, match="no images to read"):
        read_records(tmp_path / "0.png")
    with pytest.raises(JobError, match="no images to read"):
        read_records(tmp_path / "nowhere")


def captioned(folder: Path, lines: list[Any]) -> Path:
    for number, image in enumerate(DIGITS):
        picture(folder / f"{number}.png", image)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text + "\n\n", "utf-8")
    return folder


def test_texts_of_single_images_are_private(tmp_path: Path) -> None:
    lines = [{"file_name": f"{n}.png", "text": NAMES[k], "more": 1} for n, k in enumerate(LABELS)]
    found = read_records(captioned(tmp_path, list(lines)))
    assert found.captions == ("two", "nought", "one")  # in the order in which they appear
    assert [found.captions[k] for k in found.labels] == [NAMES[k] for k in LABELS]
    assert torch.equal(found.images[:, 0], torch.from_numpy(DIGITS))
    assert not found.classes
    assert not found.first(2).classes
    assert read_records(captioned(tmp_path, [{"file_name": "0.png", "text": ""}])).captions == ("",)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 2: needs file_name and text"),
        ({"file_name": "1.png"}, "line 2: needs file_name and text"),
        ({"file_name": "1.png", "text": None}, "line 2: needs file_name and text"),
        (["1.png", "one"], "line 2: needs file_name and text"),
        ({"file_name": "../secret.png", "text": "one"}, "line 2: file_name leaves the folder"),
        ({"file_name": "7.png", "text": "one"}, "7.png is not a readable image"),
    ],
)
def test_damaged_texts(tmp_path: Path, line: Any, sentence: str) -> None:
    folder = captioned(tmp_path / "images", [{"file_name": "0.png", "text": "one"}, line])
    with pytest.raises(JobError, match=sentence):
        read_records(folder)


def test_a_metadata_file_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="names no images"):
        read_records(captioned(tmp_path, []))


def test_arrays(tmp_path: Path) -> None:
    for names in (("images", "labels"), ("train_images", "train_labels"), ("x", "y")):
        same(
            read_records(
                npz(tmp_path / "a.npz", **dict(zip(names, (DIGITS, LABELS), strict=True))), captions=NAMES
            )
        )
    numbers = npz(tmp_path / "a.npz", images=DIGITS, labels=LABELS)
    same(read_records(numbers, numbered=NAMES))
    same(read_records(numbers, captions=NAMES, numbered=("a", "b", "c")))
    both = npz(tmp_path / "a.npz", train_images=DIGITS[:1], train_labels=LABELS[:1], test_images=DIGITS,
               test_labels=LABELS[:, None], captions=np.array(NAMES))  # fmt: skip
    same(read_records(both, split="test"))
    assert len(read_records(both)) == 1
    colours = np.random.default_rng(1).integers(0, 256, (2, 8, 9, 3), dtype=np.uint8)
    found = read_records(npz(tmp_path / "a.npz", images=colours, labels=np.array([0, 1])), captions=NAMES)
    assert torch.equal(found.images, torch.from_numpy(colours).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("arrays", "captions", "sentence"),
    [
        ({"pictures": DIGITS}, NAMES, "no array 'images' or 'train_images' in it; it has pictures"),
        ({"images": DIGITS}, NAMES, "images has no labels; add an array 'labels'"),
        (
            {"images": DIGITS, "labels": LABELS},
            (),
            r"the labels are numbers; say what each class is called in a prompt .--caption",
        ),
        ({"images": DIGITS, "labels": LABELS}, NAMES[:2], "a label is 2, but there are 2 captions"),
        ({"images": DIGITS, "labels": LABELS - 1}, NAMES, "a label is 1, but there are 3 captions"),
        ({"images": DIGITS, "labels": LABELS[:5]}, NAMES, "6 images and 5 labels"),
        ({"images": DIGITS, "labels": LABELS / 2}, NAMES, "labels are whole numbers, not float64"),
        ({"images": DIGITS, "labels": np.array(["a"] * 6)}, NAMES, "labels are whole numbers, not <U1"),
        ({"images": DIGITS / 255, "labels": LABELS}, NAMES, "images are bytes"),
        ({"images": DIGITS[0], "labels": LABELS}, NAMES, "images are bytes"),
        ({"images": np.zeros((6, 8, 8, 4), np.uint8), "labels": LABELS}, NAMES, "images have 4 channels"),
        ({"images": DIGITS[:0], "labels": LABELS[:0]}, NAMES, "at least one"),
        ({"images": np.array([None, {}]), "labels": LABELS}, NAMES, "is not a readable .npz"),
    ],
)
def test_arrays_that_do_not_fit(
    tmp_path: Path, arrays: dict[str, Any], captions: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(JobError, match=sentence) as raised:
        read_records(npz(tmp_path / "a.npz", **arrays), captions=captions)
    assert "\n" not in str(raised.value)


def test_texts_in_an_archive_are_private(tmp_path: Path) -> None:
    """They may be anyone's report; that they are names of classes is for the caller to say."""
    path = npz(tmp_path / "a.npz", images=DIGITS, labels=LABELS, captions=np.array(NAMES))
    for given in ({}, {"numbered": ("a", "b", "c")}):
        found = read_records(path, **given)  # type: ignore[arg-type]
        assert found.captions == NAMES
        assert not found.classes
    assert read_records(path, captions=NAMES).classes
    assert read_records(npz(tmp_path / "b.npz", images=DIGITS, labels=LABELS), captions=NAMES).classes


def test_a_damaged_archive(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", images=DIGITS, labels=LABELS)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(JobError, match=r"is not a readable \.npz"):
        read_records(path, captions=NAMES)


def test_idx_files(tmp_path: Path) -> None:
    idx(tmp_path / "train-images-idx3-ubyte.gz", DIGITS)
    idx(tmp_path / "train-labels-idx1-ubyte.gz", LABELS)
    idx(tmp_path / "t10k-images-idx3-ubyte", DIGITS[:2])
    same(read_records(tmp_path, captions=NAMES))
    with pytest.raises(JobError, match="labels are numbers"):
        read_records(tmp_path)
    with pytest.raises(JobError, match=r"no such idx file: .*t10k-labels"):
        read_records(tmp_path, captions=NAMES, split="test")
    idx(tmp_path / "t10k-labels-idx1-ubyte", LABELS[:2])
    assert read_records(tmp_path, captions=NAMES, split="test").labels.tolist() == [2, 0]


def test_classes_are_matched_by_what_they_are_called() -> None:
    found = Records(torch.from_numpy(DIGITS)[:, None], torch.from_numpy(LABELS), NAMES, classes=False)
    there = found.aligned(("three", "two", "nought", "one"))
    assert [there.captions[k] for k in there.labels] == [NAMES[k] for k in LABELS]
    assert torch.equal(there.images, found.images)
    assert not there.classes
    with pytest.raises(JobError, match=r"no class 'two' among 'nought', 'one'; name both sets alike"):
        found.aligned(("nought", "one"))


def test_some_records_by_chance() -> None:
    """The first of a file that is sorted by class are of one class."""
    images = torch.arange(200, dtype=torch.uint8).view(200, 1, 1, 1).expand(-1, 1, 2, 2)
    found = Records(images, torch.arange(200) // 20, tuple("abcdefghij"), classes=False)
    few = found.sampled(100)
    rows = few.images[:, 0, 0, 0].long()
    assert len(rows.unique()) == 100
    assert torch.equal(few.labels, rows // 20)
    assert set(few.labels.tolist()) == set(range(10))
    assert torch.equal(few.images, found.sampled(100).images)
    assert not torch.equal(few.images, found.sampled(100, seed=1).images)
    assert (len(found.sampled(1000)), few.captions, few.classes) == (200, found.captions, False)


def test_what_the_model_takes() -> None:
    grey = torch.from_numpy(DIGITS)[:, None]
    padded = fit(grey, 1, 32)
    assert torch.equal(padded[:, :, 2:-2, 2:-2], grey)
    assert int(padded.sum()) == int(grey.sum())  # black around
    assert torch.equal(fit(grey, 3, 28), grey.expand(-1, 3, -1, -1))
    colour = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert fit(colour, 1, 4).unique().tolist() == [76]
    flat = torch.full((2, 1, 64, 64), 200, dtype=torch.uint8)
    assert fit(flat, 1, 32).unique().tolist() == [200]
    # Every image by itself: none depends on the others.
    large = torch.randint(
        0, 256, (3, 1, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(fit(large, 1, 32)[1:2], fit(large[1:2], 1, 32))


def test_without_captions() -> None:
    found = Records(torch.from_numpy(DIGITS)[:, None], torch.from_numpy(LABELS), NAMES).without_captions()
    assert found.captions == ("",)
    assert found.labels.unique().tolist() == [0]
    with pytest.raises(JobError, match="images are bytes"):
        Records(torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.long), NAMES)
