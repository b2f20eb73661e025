"""What a person sets on the page, checked before any work; and how an error is told beside what to change."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sfumato.errors import JobError, LinkError, SfumatoError

__all__ = ["EXAMPLES", "FIELDS", "FieldError", "Problem", "Settings", "problem_of"]

EXAMPLES = ("a handwritten seven", "a sneaker", "the number 3")
#: Places on the page that an error can stand beside.
FIELDS = ("prompt", "model", "parties", "run")

_MOST_STEPS, _MOST_GUIDANCE, _MOST_SEED, _MOST_PIXELS = 1000, 50.0, 2**63 - 1, 4096
_log = logging.getLogger(__name__)


class FieldError(JobError):
    """A setting that cannot be used; ``field`` is one of `FIELDS`."""

    def __init__(self, field: str, text: str) -> None:
        self.field = field
        super().__init__(text)


class Problem(NamedTuple):
    """One public sentence, and beside which field it stands."""

    field: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One image to draw. ``size``: pixels, None for the model's own; ``cluster``: a cluster file, empty for three
    parties on this machine."""

    prompt: str = EXAMPLES[0]
    model: str = "embedded"
    steps: int = 10
    guidance: float = 4.0
    secret_weights: bool = False
    seed: int = 0
    size: int | None = None
    cluster: str = ""

    @staticmethod
    def of(
        prompt: Any, model: Any, steps: Any, guidance: Any, weights: Any, seed: Any, size: Any, cluster: Any
    ) -> Settings:
        """From the page's values, which may be empty or of the wrong kind.

        Raises:
            FieldError: the first setting, from the top of the page, that has to change.
        """
        model, cluster = str(model or "").strip(), str(cluster or "").strip()
        if not model:
            raise FieldError("model", "Choose a model: 'embedded', a folder, a hub id, or cluster:NAME.")
        if model.startswith("cluster:") and not cluster:
            raise FieldError("parties", f"Give the cluster file of the parties that hold {model[8:]!r}.")
        if cluster and not Path(cluster).expanduser().exists():
            raise FieldError("parties", f"There is no cluster file {cluster}.")
        return Settings(
            prompt=str(prompt or "").strip(),
            model=model,
            steps=int(_number(steps, "steps", 1, _MOST_STEPS, whole=True)),
            guidance=_number(guidance, "guidance", 0.0, _MOST_GUIDANCE),
            secret_weights=weights == "secret",
            seed=int(_number(seed, "the seed", 0, _MOST_SEED, whole=True)),
            size=None
            if not str(size or "").strip()
            else int(_number(size, "the image size", 8, _MOST_PIXELS, whole=True)),
            cluster=str(Path(cluster).expanduser()) if cluster else "",
        )

    def with_prompt(self) -> Settings:
        """The same, when there is a prompt.

        Raises:
            FieldError: there is none.
        """
        if not self.prompt:
            raise FieldError("prompt", "Write what to draw, or choose an example.")
        return self

    @property
    def shared(self) -> bool:
        """Whether the parties hold the model already; its owner then decides what is secret."""
        return self.model.startswith("cluster:")

    @property
    def secret(self) -> str:
        """As `SecurePipeline` names it."""
        return "inputs+weights" if self.secret_weights and not self.shared else "inputs"

    @property
    def key(self) -> tuple[str, str, str]:
        """What a pipeline is made for."""
        return self.model, self.secret, self.cluster

    def arguments(self) -> dict[str, Any]:
        """Of a pipeline's call, without prompt and seed."""
        return {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "height": self.size,
            "width": self.size,
        }


def _number(value: Any, name: str, low: float, high: float, *, whole: bool = False) -> float:
    try:
        number = math.nan if value is None else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high or (whole and number != int(number)):
        raise FieldError(
            "run", f"Set {name} to a {'whole ' if whole else ''}number from {low:g} to {high:g}."
        )
    return number


def problem_of(error: BaseException, field: str = "run") -> Problem:
    """The sentence for an error; ``field`` is where it stands unless the error says.

    Errors that are not ours are logged with their trace, in the terminal alone.
    """
    if isinstance(error, FieldError):
        return Problem(error.field, str(error))
    if isinstance(error, SfumatoError):
        lines = str(error).strip().splitlines() or [type(error).__name__]
        more = f" (and {len(lines) - 1} lines more in the terminal)" if len(lines) > 1 else ""
        if more:
            _log.error("%s", error)
        sentence = lines[0][:1].upper() + lines[0][1:].rstrip(".:") + more + "."
        return Problem("parties" if isinstance(error, LinkError) else field, sentence)
    _log.error("an image could not be drawn", exc_info=error)
    return Problem(
        field, f"Something unexpected went wrong ({type(error).__name__}); the terminal has the details."
    )
