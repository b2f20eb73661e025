"""Models that come with sfumato: the embedded latent diffusion pipeline and its judge."""

from __future__ import annotations

from pathlib import Path

RECOMMENDED_GUIDANCE = 4.0
"""Guidance scale at which the embedded model was measured (see its model card)."""


DISTILLED = "embedded-distilled"
"""Name of the embedded pipeline with a U-Net that has guidance in it (`sfumato.zoo.train.distil`): drawn without."""


def distilled_weights() -> Path:
    """The U-Net's weights of that pipeline, in half precision; all else is the embedded pipeline's."""
    return Path(__file__).resolve().parent / "weights" / f"{DISTILLED}.safetensors"


GLYPHS = "glyphs"
"""Name of the public start of private training: written characters, trained on public images alone."""


def glyphs_path() -> Path:
    """Folder of that pipeline (diffusers layout, with the record of what it has seen)."""
    return Path(__file__).resolve().parent / GLYPHS


def embedded_path() -> Path:
    """Folder of the embedded text-to-image pipeline (diffusers layout)."""
    return Path(__file__).resolve().parent / "embedded"
