"""Models that come with sfumato: the embedded latent diffusion pipeline and its judge."""

from __future__ import annotations

from pathlib import Path

RECOMMENDED_GUIDANCE = 4.0
"""Guidance scale at which the embedded model was measured (see its model card)."""


def embedded_path() -> Path:
    """Folder of the embedded text-to-image pipeline (diffusers layout)."""
    return Path(__file__).resolve().parent / "embedded"
