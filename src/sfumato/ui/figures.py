"""Pictures and bars of a run, as the page shows them: PNG bytes and numbers, no HTML."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from sfumato.diffusion.seen import Block

__all__ = ["Bar", "bars_of", "png_of"]

_NAMES = {
    "text_encoder": "Text encoder",
    "conv_in": "First layer",
    "mid_block": "Middle",
    "conv_norm_out": "Last norm",
    "conv_act": "Last activation",
    "conv_out": "Last layer",
    "image_decoder": "Image decoder",
    "sampler": "Sampler",
    "other": "Other layers",
}


class Bar(NamedTuple):
    """One block of the model: its bytes, the share of them in all bytes, and the messages of the busiest party."""

    label: str
    total_bytes: int
    share: float
    messages: int


def bars_of(blocks: Sequence[Block]) -> list[Bar]:
    """A bar for each block, in the model's order."""
    total = max(1, sum(block.total_bytes for block in blocks))
    return [
        Bar(_label(block.name), block.total_bytes, block.total_bytes / total, block.messages)
        for block in blocks
    ]


def _label(block: str) -> str:
    kind, _, index = block.partition(".")
    if index and kind in ("down_blocks", "up_blocks"):
        return f"{'Down' if kind == 'down_blocks' else 'Up'} {int(index) + 1}"
    return _NAMES.get(block, block)


def png_of(picture: Any) -> bytes:
    """A PIL image, or an array (H, W) or (H, W, C) in [0, 1], as PNG."""
    if not isinstance(picture, Image.Image):
        words = np.clip(np.asarray(picture) * 255.0 + 0.5, 0, 255).astype(np.uint8)
        picture = Image.fromarray(words[..., 0] if words.ndim == 3 and words.shape[-1] == 1 else words)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
