"""Public images of written characters, rendered from fonts: what a model may learn before it sees private digits.

A glyph is kept as a *distance field*: for every point of a square, the distance to the glyph's skeleton. A pen of any
thickness is then one threshold, so a printed letter becomes a thin or thick stroke, bent, slanted and scaled anew each
time it is drawn. Frames follow MNIST's published description (LeCun et al. 1998): the longer side 20 pixels of 28, the
centre of mass in the middle.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from sfumato.errors import JobError

__all__ = [
    "CHARACTERS", "Glyphs", "draw_glyphs", "glyphs_of_drawings", "glyphs_of_fonts", "system_fonts", "with_habits",
]  # fmt: skip

#: Label k is character k: digits first, so that they keep their own numbers.
CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
#: Side of a distance field, in cells; a glyph's longer side fills `_FILL` of it.
_FIELD, _FILL = 64, 44
#: A control grid of this many points a side bends a glyph.
_BEND = 5
_SIDE = 28
#: TeX's symbols and brackets, which stand where other fonts have digits and letters.
_SYMBOLS = ("cmsy10", "cmex10")
_BOX = 20.0
#: Habits of the hand that print does not have: a bar through the stem, and characters that are also written as another,
#: with how often either is drawn for each time that the printed form is.
_BARRED, _BARS = "7Zz", 0.4
_ALSO = {"1": ("l", 0.5), "9": ("q", 0.3)}


@dataclass(frozen=True, slots=True)
class Glyphs:
    """``fields`` (G, 64, 64) float16, distances in cells; ``labels`` (G,): indices into ``names``; ``groups`` (G,): the
    font family or alphabet, so that one with many styles does not outweigh the others; ``shares`` (G,): how often each
    is drawn beside the others of its label and group, 1 for all where there are none."""

    fields: Tensor
    labels: Tensor
    groups: Tensor
    names: tuple[str, ...]
    shares: Tensor | None = None
    _weights: dict[tuple[int, ...] | None, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def choose(
        self, count: int, generator: torch.Generator, classes: tuple[int, ...] | None = None
    ) -> Tensor:
        """Indices (count,): a class (of ``classes``) at random, a group within it, a glyph within that."""
        weights = self._weights.get(classes)
        if weights is None:
            weights = self._weights[classes] = self._weights_of(classes)
        return torch.multinomial(weights, count, replacement=True, generator=generator)

    def _weights_of(self, classes: tuple[int, ...] | None) -> Tensor:
        wanted = torch.tensor(classes) if classes is not None else self.labels.unique()
        weight = torch.zeros(len(self.labels), dtype=torch.float64)
        for label in wanted.tolist():
            own = self.labels == label
            groups, where = self.groups[own].unique(return_inverse=True)
            share = torch.ones(len(where)) if self.shares is None else self.shares[own]
            total = torch.zeros(len(groups), dtype=torch.float64).index_add_(0, where, share.double())
            weight[own] = share.double() / (len(groups) * total[where])
        return weight


def system_fonts(folders: Sequence[Path] = ()) -> list[Path]:
    """Font files (.ttf, .otf) below ``folders``, or below the system's and matplotlib's own, sorted by name."""
    if not folders:
        import matplotlib

        folders = (Path("/usr/share/fonts"), Path(matplotlib.get_data_path()) / "fonts" / "ttf")
    found = {path.name: path for folder in folders for path in folder.rglob("*.[to]tf")}
    return [found[name] for name in sorted(found)]


def _field(ink: np.ndarray) -> np.ndarray | None:
    """Distance field (64, 64) of the skeleton of a mask; None where there is no ink."""
    from scipy import ndimage

    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    if not len(rows):
        return None
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = _FILL / max(ink.shape)
    size = (max(1, round(ink.shape[1] * scale)), max(1, round(ink.shape[0] * scale)))
    small = np.asarray(Image.fromarray(ink.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)) >= 100
    canvas = np.zeros((_FIELD, _FIELD), bool)
    top, left = (_FIELD - small.shape[0]) // 2, (_FIELD - small.shape[1]) // 2
    canvas[top : top + small.shape[0], left : left + small.shape[1]] = small
    if not canvas.any():
        return None
    return ndimage.distance_transform_edt(~_skeleton(canvas))


def _skeleton(ink: np.ndarray) -> np.ndarray:
    """One-cell-wide middle lines of a mask (Zhang and Suen 1984)."""
    x = np.pad(ink.astype(np.int8), 1)
    changed = True
    while changed:
        changed = False
        for turn in (0, 1):
            # Eight neighbours, clockwise from above.
            n = [np.roll(x, shift, (0, 1)) for shift in
                 ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1))]  # fmt: skip
            around = sum(n)
            turns = sum((n[k] == 0) & (n[(k + 1) % 8] == 1) for k in range(8))
            if turn == 0:
                sides = (n[0] * n[2] * n[4] == 0) & (n[2] * n[4] * n[6] == 0)
            else:
                sides = (n[0] * n[2] * n[6] == 0) & (n[0] * n[4] * n[6] == 0)
            gone = (x == 1) & (around >= 2) & (around <= 6) & (turns == 1) & sides
            if gone.any():
                x[gone] = 0
                changed = True
    return x[1:-1, 1:-1].astype(bool)


def glyphs_of_fonts(fonts: Sequence[Path], characters: str = CHARACTERS) -> Glyphs:
    """The characters of each font that has them all, distinct; others (symbols, other scripts) are left out.

    Raises:
        JobError: no font has them.
    """
    fields, labels, groups, families = [], [], [], dict[str, int]()
    for path in fonts:
        try:
            font = ImageFont.truetype(str(path), 96)
            family = str(font.getname()[0])
            inks = [_ink(font, character) for character in characters]
            missing = _ink(font, "\U0010fffd")
        except (OSError, ValueError):
            continue
        prints = {ink.tobytes() for ink in inks if ink.any()}
        if (
            family in _SYMBOLS
            or len(prints) < len(characters) - 2
            or any(np.array_equal(ink, missing) for ink in inks)
        ):
            continue
        group = families.setdefault(family, len(families))
        for label, ink in enumerate(inks):
            field = _field(ink)
            if field is not None:
                fields.append(torch.from_numpy(field).half())
                labels.append(label)
                groups.append(group)
    if not fields:
        raise JobError(
            "no font with digits and Latin letters was found; name a folder of .ttf or .otf files (--font-folder)"
        )
    return Glyphs(torch.stack(fields), torch.tensor(labels), torch.tensor(groups), tuple(characters))


def with_habits(glyphs: Glyphs) -> Glyphs:
    """Beside the printed forms, those that many hands write: 7, Z and z with a bar through the stem, 1 as a plain
    stroke, 9 with a straight tail. Printed sevens have no bar, and who has only seen those takes a barred one for a 2
    or a 9."""
    fields, labels, groups = [glyphs.fields], [glyphs.labels], [glyphs.groups]
    shares = [torch.ones(len(glyphs.labels))]
    for name in glyphs.names:
        own = glyphs.labels == glyphs.names.index(name)
        added = []
        if name in _BARRED:
            added.append((own, _barred(glyphs.fields[own].float()).half(), _BARS))
        if name in _ALSO and _ALSO[name][0] in glyphs.names:
            other, share = _ALSO[name]
            theirs = glyphs.labels == glyphs.names.index(other)
            added.append((theirs, glyphs.fields[theirs], share))
        for taken, drawn, share in added:
            fields.append(drawn)
            labels.append(torch.full((len(drawn),), glyphs.names.index(name)))
            groups.append(glyphs.groups[taken])
            shares.append(torch.full((len(drawn),), share))
    return Glyphs(torch.cat(fields), torch.cat(labels), torch.cat(groups), glyphs.names, torch.cat(shares))


def _barred(fields: Tensor) -> Tensor:
    """Distance fields (N, 64, 64) with a short bar through the stem, at about half the height."""
    generator = torch.Generator().manual_seed(0)
    height, half, slope = torch.rand(3, len(fields), generator=generator)
    low, high = _extent(fields < 1.0)
    row = low[:, 0] + (0.42 + 0.2 * height) * (high - low)[:, 0]
    at = torch.arange(len(fields))
    stem = fields[at, row.round().long()].argmin(1).float()
    half, slope = 5 + 5 * half, 0.6 * (slope - 0.5)
    line = torch.arange(_FIELD, dtype=torch.float32)
    x, y = line[None, None, :] - stem[:, None, None], line[None, :, None] - row[:, None, None]
    # The bar is where (t, slope t) goes for |t| <= half; the nearest of its points, and how far that is.
    slope = slope[:, None, None]
    t = ((x + slope * y) / (1 + slope**2)).clamp(-half[:, None, None], half[:, None, None])
    return torch.minimum(fields, torch.hypot(x - t, y - slope * t))


def _ink(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    image = Image.new("L", (192, 192))
    ImageDraw.Draw(image).text((48, 32), character, 255, font)
    return np.asarray(image) > 127


def glyphs_of_drawings(drawings: Tensor, groups: Tensor, first_label: int = 0) -> Glyphs:
    """Of masks (N, H, W) bool of handwritten characters, such as Omniglot's; ``groups`` (N,): which character."""
    kept = [(field, k) for k, ink in enumerate(drawings.numpy()) if (field := _field(ink)) is not None]
    at = torch.tensor([k for _, k in kept])
    fields = torch.stack([torch.from_numpy(field).half() for field, _ in kept])
    return Glyphs(fields, torch.full((len(at),), first_label), groups[at].long(), ("glyph",))


def draw_glyphs(fields: Tensor, generator: torch.Generator, *, strength: float = 1.0) -> Tensor:
    """Each field (N, 64, 64) drawn once, (N, 1, 28, 28) floats in [0, 1]: bent, slanted, turned, with a pen of its own.

    ``strength``: 0 draws the plain glyph with a pen of middle width; 1 varies as handwriting does.
    """
    count = len(fields)

    def spread(low: float, high: float) -> Tensor:
        middle = (low + high) / 2
        return middle + strength * (torch.rand(count, generator=generator) - 0.5) * (high - low)

    angle, slant = spread(-0.25, 0.25), spread(-0.35, 0.35)
    wide, tall = spread(-0.3, 0.3).exp(), torch.ones(count)
    bends = strength * 0.09 * torch.randn(count, 2, _BEND, _BEND, generator=generator)
    pen, soft = spread(0.75, 1.9), spread(0.45, 0.8)

    turn = torch.stack(
        [torch.stack([angle.cos() * wide, (slant + angle.sin()) * wide], 1),
         torch.stack([-angle.sin() * tall, angle.cos() * tall], 1)], 1)  # fmt: skip
    bend = functional.interpolate(bends, size=(48, 48), mode="bicubic", align_corners=True).movedim(1, -1)
    x = fields[:, None].float()

    # A first look finds the frame; then the frame is drawn with the pen's width in pixels of the result.
    where = _grid(turn, torch.ones(count), torch.zeros(count, 2), 48) + bend
    rough = _sample(x, where) < 2.5  # cells
    low, high = _extent(rough)
    size = (high - low).amax(1).clamp(min=6.0)  # of 48 steps of the look
    middle = (low + high) / 2
    scale = (size * (_SIDE / 48.0) / _BOX).clamp(0.3, 2.0)
    shift = ((middle + 0.5) / 48.0 * 2 - 1)[:, [1, 0]]
    fine = torch.linspace(-1, 1, _SIDE)
    plain = torch.stack(torch.meshgrid(fine, fine, indexing="xy"), -1).expand(count, -1, -1, -1)
    look = plain * scale[:, None, None, None] + shift[:, None, None]
    bent = functional.grid_sample(
        bend.movedim(-1, 1), look, align_corners=True, padding_mode="border"
    ).movedim(1, -1)
    field = _sample(x, torch.einsum("nij,nhwj->nhwi", turn, look) + bent)
    # Cells per pixel of the result, along the frame's own axes.
    cells = _FIELD / _SIDE * scale
    ink = torch.sigmoid((pen[:, None, None] - field / cells[:, None, None]) / (0.5 * soft[:, None, None]))
    ink = (ink / ink.amax((1, 2), keepdim=True).clamp(min=0.3)).clamp(0, 1)
    return _centred(ink)[:, None]


def _grid(turn: Tensor, scale: Tensor, shift: Tensor, side: int) -> Tensor:
    line = torch.linspace(-1, 1, side)
    plain = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)  # (side, side, xy)
    return torch.einsum("nij,hwj->nhwi", turn * scale[:, None, None], plain) + shift[:, None, None]


def _sample(fields: Tensor, where: Tensor) -> Tensor:
    # Beyond the edge the field goes on as at the edge: far from ink.
    return functional.grid_sample(fields, where, align_corners=True, padding_mode="border")[:, 0]


def _extent(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First and last row and column (N, 2) that hold ink."""
    lows, highs = [], []
    for axis in (2, 1):
        line = mask.any(axis).float()
        lows.append(line.argmax(1))
        highs.append(line.shape[1] - 1 - line.flip(1).argmax(1))
    return torch.stack(lows, 1).float(), torch.stack(highs, 1).float()


def _centred(ink: Tensor) -> Tensor:
    """Moved by whole pixels so that the centre of mass is in the middle."""
    side = ink.shape[-1]
    line = torch.arange(side, dtype=torch.float32)
    mass = ink.sum((1, 2)).clamp(min=1e-3)
    shift = torch.stack([(ink.sum(2) * line).sum(1), (ink.sum(1) * line).sum(1)], 1) / mass[:, None]
    moves = (shift - (side - 1) / 2).round().long().clamp(-6, 6)
    rows = torch.arange(side)[None, :] + moves[:, :1] + 6
    columns = torch.arange(side)[None, :] + moves[:, 1:] + 6
    padded = functional.pad(ink, (6, 6, 6, 6))
    at = torch.arange(len(ink))[:, None, None]
    return padded[at, rows[:, :, None], columns[:, None, :]]
