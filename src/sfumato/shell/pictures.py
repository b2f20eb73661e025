"""The pictures that ``sfumato generate`` starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL.Image

from sfumato.diffusion.image import SecureImg2ImgPipeline, SecureInpaintPipeline
from sfumato.diffusion.pipeline import SecurePipeline
from sfumato.errors import JobError

__all__ = ["pictures"]


def pictures(
    image: Path | None, mask: Path | None, strength: float | None, height: int | None, width: int | None
) -> tuple[type[SecurePipeline], dict[str, Any]]:
    """The pipeline for these options, and its arguments.

    Raises:
        JobError: options that do not go together, or a file that is no picture.
    """
    if image is None:
        if mask is not None or strength is not None:
            raise JobError("--mask and --strength need --image, the picture to start from")
        return SecurePipeline, {"height": height, "width": width}
    given = {"image": _opened(image), **({} if strength is None else {"strength": strength})}
    if mask is not None:
        size = {"height": height, "width": width}
        return SecureInpaintPipeline, {**given, "mask_image": _opened(mask), **size}
    if height is not None or width is not None:
        raise JobError("with --image the picture's own size is taken; leave out --height and --width")
    return SecureImg2ImgPipeline, given


def _opened(path: Path) -> PIL.Image.Image:
    try:
        with PIL.Image.open(path) as image:
            image.load()
            return image
    except (OSError, ValueError, PIL.Image.DecompressionBombError):
        raise JobError(f"{path} is no picture that can be read") from None
