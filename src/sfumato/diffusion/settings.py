"""The settings of a call that an owner offers, as they are written down and as they are said. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sfumato.errors import JobError

__all__ = ["SCHEDULERS", "WEIGHED", "Settings", "in_words"]

#: Parts of a plan by component: what runs under the protocol where the component's weights are secret.
WEIGHED = {"text_encoder": "text", "unet": "unet", "vae": "vae"}
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a call must ask for to be one that was offered. One prompt a call, ``images`` of it.

    ``configured``: digest of the configuration that the scheduler had when ranges were measured; empty in what an
    earlier release wrote.
    """

    scheduler: str
    steps: int
    guidance: float
    height: int
    width: int
    images: int = 1
    configured: str = ""

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Settings:
        """Read what ``asdict`` wrote.

        Raises:
            JobError: something else was given.
        """
        try:
            counts = [data[n] for n in ("steps", "height", "width", "images")]
            if not all(type(n) is int and n > 0 for n in counts) or not str(data["scheduler"]).isidentifier():
                raise ValueError
            return Settings(**{**data, "guidance": float(data["guidance"])})
        except (KeyError, TypeError, ValueError):
            raise JobError(
                "the settings of this offer cannot be read; its owner must share it again"
            ) from None

    def is_but_for_configuration(self, other: Settings) -> bool:
        """Whether the same is asked for, of a scheduler of the same class."""
        return replace(self, configured=other.configured) == other

    def arguments(self) -> dict[str, Any]:
        """The same as arguments of a call."""
        return {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "height": self.height,
            "width": self.width,
            "num_images_per_prompt": self.images,
        }


def in_words(settings: Sequence[Settings]) -> str:
    """All of them in a few words: ``10 or 20 steps at guidance 4 with DDIM, 256x256 pixels, 1 image``."""

    def either(values: Iterator[Any]) -> str:
        return " or ".join(dict.fromkeys(str(value) for value in values))

    steps, images = either(s.steps for s in settings), either(s.images for s in settings)
    return (
        f"{steps} step{'s' * (steps != '1')} at guidance {either(f'{s.guidance:g}' for s in settings)} "
        f"with {either(s.scheduler.removesuffix('Scheduler') for s in settings)}, "
        f"{either(f'{s.width}x{s.height}' for s in settings)} pixels, {images} image{'s' * (images != '1')}"
    )
