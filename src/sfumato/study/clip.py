"""CLIP as the examiner of pipelines that have no classifier of their own: features of images, and of prompts."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion.loading import load_clip
from sfumato.errors import JobError

__all__ = ["ClipExaminer", "clip_examiner"]

_BATCH = 50


class ClipExaminer:
    """Image and text towers of a CLIP checkpoint; features have length one."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model.eval(), tokenizer
        config = model.config.vision_config
        self._size = int(config.image_size)

    def extract(self, images: Tensor) -> Tensor:
        """(N, d) of images (N, C, H, W), bytes or floats in [0, 1]: resized and normalised as CLIP's are."""
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
        deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
        found = []
        for part in images.split(_BATCH):
            x = part.float() / 255 if part.dtype == torch.uint8 else part.float().clamp(0, 1)
            x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
            x = torch.nn.functional.interpolate(x, (self._size, self._size), mode="bicubic", antialias=True)
            with torch.no_grad():
                vision = self._model.vision_model(pixel_values=(x - mean) / deviation).pooler_output
                found.append(self._model.visual_projection(vision))
        return torch.nn.functional.normalize(torch.cat(found), dim=1)

    def of_prompts(self, prompts: list[str]) -> Tensor:
        """(N, d) of texts."""
        found = []
        for start in range(0, len(prompts), _BATCH):
            tokens = self._tokenizer(
                prompts[start : start + _BATCH], padding="max_length", truncation=True, return_tensors="pt",
                max_length=self._model.config.text_config.max_position_embeddings,
            )  # fmt: skip
            with torch.no_grad():
                text = self._model.text_model(**tokens).pooler_output
                found.append(self._model.text_projection(text))
        return torch.nn.functional.normalize(torch.cat(found), dim=1)

    def classify(self, images: Tensor, *, among: Any) -> Tensor:
        """No classes: zeros."""
        return torch.zeros(len(images), dtype=torch.int64)


@cache
def clip_examiner(path_or_id: str) -> ClipExaminer:
    """
    Raises:
        JobError: there is no CLIP model.
    """
    try:
        return ClipExaminer(*load_clip(path_or_id))
    except (OSError, ValueError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise JobError(f"{path_or_id} cannot be loaded as a CLIP model: {line[:200]}") from None
