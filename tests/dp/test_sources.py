"""Fingerprints, the record of what a model has seen, and the refusal of starts that know the private images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import interpolate, pad

from sfumato.dp.sources import (
    DECLARED,
    Seen,
    Sources,
    commitment,
    embedded_sources,
    fingerprint,
    private_key,
    read_sources,
    refuse_overlap,
)
from sfumato.errors import JobError
from sfumato.zoo import embedded_path
from sfumato.zoo.train.data import load_split


def drawings(count: int, seed: int = 0, channels: int = 1, side: int = 12) -> Tensor:
    """Random images of two values with an empty margin, as digits have: uint8 (count, channels, side, side)."""
    bits = torch.randint(
        0, 2, (count, channels, side - 4, side - 4), generator=torch.Generator().manual_seed(seed)
    )
    return pad(255 * bits.to(torch.uint8), (2, 2, 2, 2))


def test_fingerprints_are_a_sorted_set() -> None:
    images = drawings(40)
    found = fingerprint(torch.cat([images, images.flip(0)]))
    assert found.dtype == torch.int64
    assert len(found) == 40
    assert bool((found[1:] > found[:-1]).all())
    assert torch.equal(found, fingerprint(images[torch.randperm(40)]))
    assert fingerprint(images[:0]).shape == (0,)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: pad(x, (2, 2, 2, 2)),
        lambda x: pad(x, (0, 4, 3, 0), value=200),
        lambda x: pad(pad(x, (1, 1, 1, 1), value=9), (5, 0, 2, 1)),
        lambda x: x.expand(-1, 3, -1, -1),
        lambda x: pad(x, (2, 2, 2, 2)).expand(-1, 3, -1, -1),
        lambda x: x[:, :, 2:-2, 2:-2],
    ],
)
@pytest.mark.parametrize("margin", [True, False])
def test_copies_that_match(change: Callable[[Tensor], Tensor], margin: bool) -> None:
    images = drawings(30)
    if not margin:  # no line of one colour outside; nothing is cut from inside
        images = torch.randint(
            0, 256, (30, 1, 12, 9), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
        )
        if change(images).shape[-1] < 9:
            images = pad(images, (2, 2, 2, 2))
    assert torch.equal(fingerprint(change(images)), fingerprint(images))


def test_colour_copies_match_through_padding() -> None:
    images = drawings(30, channels=3)
    padded = torch.cat([pad(images[:, k : k + 1], (2, 2, 2, 2), value=10 * k) for k in range(3)], 1)
    assert torch.equal(fingerprint(padded), fingerprint(images))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.flip(-1),
        lambda x: 255 - x,
        lambda x: x.clamp(max=254),
        lambda x: interpolate(x.float(), scale_factor=2).to(torch.uint8),
        lambda x: x.transpose(-1, -2),
    ],
)
def test_copies_that_do_not_match(change: Callable[[Tensor], Tensor]) -> None:
    # Stated in the documentation as not caught: near-duplicates have other fingerprints.
    images = drawings(30)
    assert not torch.isin(fingerprint(change(images)), fingerprint(images)).any()


def test_every_pixel_counts() -> None:
    images = torch.randint(
        0, 255, (1, 3, 8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.uint8
    )
    copies = images.repeat(3 * 64 + 1, 1, 1, 1)
    copies.view(len(copies), -1)[range(192), range(192)] += 1
    assert len(fingerprint(copies)) == 193


def test_the_shape_counts() -> None:
    image = torch.randint(0, 256, (1, 1, 6, 8), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    assert not torch.equal(fingerprint(image), fingerprint(image.reshape(1, 1, 8, 6)))


def test_images_without_identity_are_left_out() -> None:
    flat = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 8, 8)
    stripes = torch.arange(8, dtype=torch.uint8).reshape(1, 1, 8, 1).expand(1, 3, 8, 8)
    dot = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    dot[..., 3, 4] = 255
    assert len(fingerprint(torch.cat([flat, stripes, dot]))) == 0


def test_only_bytes() -> None:
    for wrong in (torch.zeros(2, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)):
        with pytest.raises(JobError, match="uint8 images"):
            fingerprint(wrong)


def test_overlap_is_refused() -> None:
    private = fingerprint(torch.cat([drawings(20, seed=1), drawings(5, seed=2)]))
    sources = Sources(
        (Seen.of("fonts", "made here", drawings(30)), Seen.of("scans", "MIT", drawings(5, seed=2)))
    )
    assert sources.overlap(private) == {"scans": 5}
    with pytest.raises(JobError, match=r"has seen 5 of the 25 private images \(source scans\)"):
        refuse_overlap(sources, private)
    refuse_overlap(sources, fingerprint(drawings(20, seed=1)))


def test_a_sample_finds_a_copied_set_but_not_every_image() -> None:
    images = drawings(2000)
    sources = Sources((Seen.of("digits", "MIT", images, sampled=True),))
    kept = len(sources.seen[0].fingerprints)
    assert sources.seen[0].count == 2000
    assert 10 <= kept <= 60  # about 2000 / 64
    with pytest.raises(JobError, match=f"at least {kept} of the 2000 private images"):
        refuse_overlap(sources, fingerprint(pad(images, (2, 2, 2, 2))))
    unsampled = [image for image in images[:5] if int(fingerprint(image[None])) % 64]
    refuse_overlap(sources, fingerprint(torch.stack(unsampled)))


def test_sources_are_saved_with_a_model(tmp_path: Path) -> None:
    sources = Sources(
        (
            Seen.of("fonts", "rendered here", drawings(30)),
            Seen.of("digits", "MIT", drawings(300, seed=3), sampled=True),
            Seen.declared("LAION-400M"),
        )
    )
    sources.write(tmp_path)
    found = Sources.read(tmp_path)
    for a, b in zip(found.seen, sources.seen, strict=True):
        assert torch.equal(a.fingerprints, b.fingerprints)
        assert (a.name, a.note, a.digest, a.count, a.sampled) == (
            b.name,
            b.note,
            b.digest,
            b.count,
            b.sampled,
        )
    assert found.digests()["LAION-400M"] == DECLARED
    assert len(set(found.digests().values())) == 3
    with pytest.raises(JobError, match="names that differ"):
        Sources((sources.seen[0], sources.seen[0]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda entries, tensors: entries.update(format=2), "'format' 1"),
        (lambda entries, tensors: entries.update(more=2), "'format' 1"),
        (lambda entries, tensors: entries["sources"][0].update(sampled=1), "wrong type"),
        (lambda entries, tensors: entries["sources"][0].pop("note"), "exactly name, note"),
        (lambda entries, tensors: entries["sources"][0].update(count=29), "do not fit"),
        (lambda entries, tensors: entries["sources"][0].update(digest="00" * 32), "do not fit"),
        (lambda entries, tensors: entries["sources"][0].update(sampled=True), "do not fit"),
        (lambda entries, tensors: entries["sources"][0].update(digest=DECLARED), "do not fit"),
        (lambda entries, tensors: entries["sources"].clear(), "unknown sources: fonts"),
        (lambda entries, tensors: tensors.clear(), "no fingerprints of fonts"),
        (lambda entries, tensors: tensors.update(fonts=tensors["fonts"][:-1].clone()), "do not fit"),
        (lambda entries, tensors: tensors.update(fonts=tensors["fonts"].flip(0)), "ascending"),
        (lambda entries, tensors: tensors.update(fonts=tensors["fonts"].int()), "int64"),
    ],
)
def test_reading_is_strict(
    tmp_path: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], Any], message: str
) -> None:
    Sources((Seen.of("fonts", "rendered here", drawings(30)),)).write(tmp_path)
    entries = json.loads((tmp_path / "sources.json").read_text())
    tensors = load_file(tmp_path / "sources.safetensors")
    edit(entries, tensors)
    (tmp_path / "sources.json").write_text(json.dumps(entries))
    save_file(tensors, tmp_path / "sources.safetensors")
    with pytest.raises(JobError, match=message):
        read_sources(tmp_path)


def test_a_model_that_does_not_say(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="name its training data"):
        read_sources(tmp_path)
    assert read_sources(tmp_path, ["LAION-400M"]).digests() == {"LAION-400M": DECLARED}
    Sources((Seen.of("fonts", "rendered here", drawings(30)),)).write(tmp_path)
    assert set(read_sources(tmp_path, ["LAION-400M"]).digests()) == {"fonts", "LAION-400M"}
    # Half a record is no record: a declaration does not stand in for what was lost.
    (tmp_path / "sources.json").unlink()
    with pytest.raises(JobError, match="cannot be read"):
        read_sources(tmp_path, ["LAION-400M"])


def test_commitment_hides_and_binds(tmp_path: Path) -> None:
    key = private_key(tmp_path / "private.key")
    assert private_key(tmp_path / "private.key") == key
    assert (tmp_path / "private.key").stat().st_mode & 0o777 == 0o600
    images = drawings(30)
    shuffled = pad(images[torch.randperm(30)], (2, 2, 2, 2))
    first = commitment(fingerprint(images), key)
    assert first == commitment(fingerprint(shuffled), key)
    assert len(first) == 64
    assert (
        len({first, commitment(fingerprint(images[1:]), key), commitment(fingerprint(images), bytes(32))})
        == 3
    )
    with pytest.raises(JobError, match="32 bytes, not 5"):
        commitment(fingerprint(images), b"short")


def test_a_key_that_is_not_private(tmp_path: Path) -> None:
    path = tmp_path / "private.key"
    private_key(path)
    path.chmod(0o644)
    with pytest.raises(JobError, match="chmod 600"):
        private_key(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(JobError, match="not a key of 32"):
        private_key(path)


def test_the_embedded_pipeline_says_what_it_has_seen() -> None:
    sources = Sources.read(embedded_path())
    assert {source.name: source.count for source in sources.seen} == {
        "mnist": 60_000,
        "fashion_mnist": 60_000,
    }
    assert all(not source.sampled and len(source.fingerprints) == 60_000 for source in sources.seen)


def test_the_embedded_pipeline_is_no_public_start_for_mnist(data_dir: Path) -> None:
    sources = read_sources(embedded_path())
    split = load_split(data_dir / "images", train=True)
    made = embedded_sources(data_dir / "images")
    assert made.digests() == sources.digests()
    for a, b in zip(made.seen, sources.seen, strict=True):
        assert torch.equal(a.fingerprints, b.fingerprints)
    digits = split.images[split.labels < 10, :, 2:-2, 2:-2]  # 28 x 28, as they come
    with pytest.raises(JobError, match=r"has seen 5000 of the 5000 private images \(source mnist\)"):
        refuse_overlap(sources, fingerprint(digits[:5000]))
    with pytest.raises(JobError, match="has seen 1 of the 1 private images"):
        refuse_overlap(sources, fingerprint(digits[:1].expand(-1, 3, -1, -1)))
    test = load_split(data_dir / "images", train=False)
    assert "mnist" not in sources.overlap(fingerprint(test.images[test.labels < 10]))
