"""Characters drawn from the fonts that matplotlib brings: balanced, in range, and recognisable."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from sfumato.dp import glyphs as module
from sfumato.dp.glyphs import (
    CHARACTERS,
    Glyphs,
    draw_glyphs,
    glyphs_of_drawings,
    glyphs_of_fonts,
    system_fonts,
    with_habits,
)
from sfumato.errors import JobError

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@pytest.fixture(scope="module")
def digits() -> Glyphs:
    """Of two families, one of them with many styles, and one of symbols, which is left out."""
    wanted = ("DejaVuSans", "DejaVuSansMono.", "cmr10", "cmsy10", "STIXNonUni.")
    return glyphs_of_fonts(
        [p for p in system_fonts([FONTS]) if p.name.startswith(wanted)], characters=CHARACTERS[:10]
    )


def test_fonts_are_found() -> None:
    found = system_fonts([FONTS])
    assert [path.name for path in found] == sorted(path.name for path in found)
    assert {path.name for path in found} <= {path.name for path in system_fonts()}


def test_fonts_without_characters_are_left_out(digits: Glyphs, tmp_path: Path) -> None:
    assert digits.names == tuple("0123456789")
    assert digits.fields.shape == (len(digits.labels), 64, 64)
    assert digits.fields.dtype == torch.float16
    assert len(digits.groups) == len(digits.labels)
    assert int(digits.groups.max()) < 4  # families, not files
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    for fonts in ([], [tmp_path / "broken.ttf"], [FONTS / "cmsy10.ttf"]):
        with pytest.raises(JobError, match="no font with digits and Latin letters was found; name a folder"):
            glyphs_of_fonts(fonts, characters=CHARACTERS[:10])
    assert system_fonts([tmp_path / "nowhere"]) == []


def test_classes_then_families_then_styles(digits: Glyphs) -> None:
    """However many styles a family has, and however many families a class."""
    labels = torch.tensor([0] * 9 + [1] * 2 + [2])
    groups = torch.tensor([0] * 8 + [1] + [0, 1] + [0])
    uneven = Glyphs(torch.zeros(12, 1, 1), labels, groups, ("a", "b", "c"))
    drawn = uneven.choose(60_000, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=12) / 60_000
    wanted = torch.tensor([1 / 48] * 8 + [1 / 6, 1 / 6, 1 / 6, 1 / 3])
    assert (share - wanted).abs().max() < 0.01
    some = digits.choose(3000, torch.Generator().manual_seed(0), classes=(3, 7))
    counts = torch.bincount(digits.labels[some], minlength=10)
    assert counts[[3, 7]].sum() == 3000
    assert (counts[3] - 1500).abs() < 150


def test_habits_stand_beside_the_printed_forms(digits: Glyphs) -> None:
    """A seven gets a bar through its stem, and no more than its share; digits without a habit stay as they are."""
    more = with_habits(digits)
    own, added = len(digits.labels), len(more.labels) - len(digits.labels)
    assert torch.equal(more.fields[:own], digits.fields)
    assert set(more.labels[own:].tolist()) == {7}
    assert added == int((digits.labels == 7).sum())
    printed, barred = digits.fields[digits.labels == 7].float(), more.fields[own:].float()
    assert (barred <= printed).all()
    for before, after in zip(printed, barred, strict=True):
        rows, columns = torch.nonzero((after < 1) & (before >= 1), as_tuple=True)
        assert 20 <= int(rows.min()) <= int(rows.max()) <= 44  # about the middle of 64
        stem = int(before[int(rows.float().mean())].argmin())
        assert int(columns.min()) < stem - 3 < stem + 3 < int(columns.max())
    drawn = more.choose(40_000, torch.Generator().manual_seed(0), classes=(7,))
    assert float((drawn >= own).double().mean()) == pytest.approx(0.4 / 1.4, abs=0.02)
    letters = with_habits(Glyphs(digits.fields[:2], torch.tensor([0, 1]), torch.tensor([0, 0]), ("9", "q")))
    assert letters.labels.tolist() == [0, 1, 0]
    assert torch.equal(letters.fields[2], letters.fields[1])


def test_drawn_as_handwriting(digits: Glyphs) -> None:
    fields = digits.fields[digits.choose(300, torch.Generator().manual_seed(1))]
    drawn = draw_glyphs(fields, torch.Generator().manual_seed(2))
    assert drawn.shape == (300, 1, 28, 28)
    assert drawn.dtype == torch.float32
    assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1
    assert drawn.amax((1, 2, 3)).min() > 0.9  # no image without ink
    assert torch.equal(drawn, draw_glyphs(fields, torch.Generator().manual_seed(2)))
    assert not torch.equal(drawn, draw_glyphs(fields, torch.Generator().manual_seed(3)))
    # Centred by mass, and black at the rim, as MNIST is.
    line = torch.arange(28.0) - 13.5
    mass = drawn.sum((1, 2, 3))
    for axis in (2, 3):
        centre = (drawn.sum((1, 5 - axis)) * line).sum(1) / mass
        assert centre.abs().max() <= 1.0
    assert drawn[:, :, 0].mean() < 0.02


def test_no_strength_draws_one_shape(digits: Glyphs) -> None:
    fields = digits.fields[:40]
    plain = draw_glyphs(fields, torch.Generator().manual_seed(0), strength=0.0)
    assert torch.equal(plain, draw_glyphs(fields, torch.Generator().manual_seed(9), strength=0.0))
    weak = draw_glyphs(fields, torch.Generator().manual_seed(9), strength=0.1)
    full = draw_glyphs(fields, torch.Generator().manual_seed(9))
    assert 0 < (weak - plain).abs().mean() < (full - plain).abs().mean()


def test_digits_are_recognisable(digits: Glyphs) -> None:
    """The mean of what is drawn of a class is most like its own plain glyph."""
    generator = torch.Generator().manual_seed(4)
    first = [int((digits.labels == k).nonzero()[0]) for k in range(10)]
    plain = draw_glyphs(digits.fields[first], generator, strength=0.0).flatten(1)
    means = []
    for k in range(10):
        chosen = digits.choose(80, generator, classes=(k,))
        means.append(draw_glyphs(digits.fields[chosen], generator, strength=0.5).mean(0).flatten())
    likeness = torch.corrcoef(torch.cat([torch.stack(means), plain]))[:10, 10:]
    assert likeness.argmax(1).tolist() == list(range(10))
    assert likeness.diagonal().min() > 0.6


def test_drawings() -> None:
    masks = torch.zeros(4, 105, 105, dtype=torch.bool)
    masks[0, 20:80, 50:56] = True
    masks[1, 50:56, 20:80] = True
    masks[3, 30:40, 30:40] = True  # and one without ink
    found = glyphs_of_drawings(masks, torch.tensor([5, 6, 7, 8]), first_label=2)
    assert found.groups.tolist() == [5, 6, 8]
    assert found.labels.tolist() == [2, 2, 2]
    upright, lying = draw_glyphs(found.fields[:2], torch.Generator(), strength=0.0)[:, 0]
    assert (upright.amax(1) > 0.5).sum() > 2 * (upright.amax(0) > 0.5).sum()
    assert (lying.amax(0) > 0.5).sum() > 2 * (lying.amax(1) > 0.5).sum()


def test_skeletons_are_thin() -> None:
    ink = np.zeros((64, 64), bool)
    ink[10:54, 20:30] = True
    thin = module._skeleton(ink)
    assert thin.sum(1).max() <= 2
    assert thin.any(1).sum() > 30
    assert not (thin & ~ink).any()
