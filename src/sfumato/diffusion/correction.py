"""Public corrections of a run's model outputs: weights and tensors that cost the parties no byte and no round.

Notation (docs/corrections.md). At step i the network gives, on the secret latents z, ``a`` with the prompt and ``b``
without it; guided with weight w they are ``e = b + w (a - b)``. On the public latents u of an unconditional trajectory
from the same noise, ``eps`` is what the exact network gives and ``ehat`` what the approximated one gives. Both
corrections have the form

    e_i + s_i - g_i a_i          with public s_i (a tensor) and g_i (a number):

* scores (SDU Eq. (8) as reconstructed in private-diffusion.md 1.4, and USG 2.3): ``g_i (E_i - a_i)``, E_i the score of
  the exact network on u at that step;
* measured (private-diffusion.md 8.1, a control variate): ``beta_i (eps(u_i) - ehat(u_i))``, with ``g_i = 0``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sfumato.errors import JobError

__all__ = ["WEIGHTS", "Correction", "Pull"]

WEIGHTS = ("kappa", "sigma/abar")


@dataclass(frozen=True, slots=True)
class Correction:
    """What is added to the guided output of each step.

    ``pulls``: g_i, by which the weight of the output with the prompt is lowered; ``additions``: s_i, (images, channels,
    height, width) each.
    """

    pulls: tuple[float, ...]
    additions: tuple[Tensor, ...]

    def check(self, steps: int, shape: Sequence[int]) -> None:
        """
        Raises:
            JobError: it was made for another number of steps or images, or for another size.
        """
        if len(self.pulls) != steps or len(self.additions) != steps:
            raise JobError(f"this correction is for {len(self.pulls)} steps, and the run has {steps}")
        wrong = next((s for s in self.additions if tuple(s.shape) != tuple(shape)), None)
        if wrong is not None:
            raise JobError(
                f"this correction is for latents {tuple(wrong.shape)}, and the run's are {tuple(shape)}"
            )


@dataclass(frozen=True, slots=True)
class Pull:
    """The weight of a score correction: ``g(t) = min(cap, eta * w(t)^exponent)``.

    ``weight``: ``"kappa"`` for sigma / sqrt(abar), the inverse root of the signal-to-noise ratio, or ``"sigma/abar"``,
    as USG prints it (private-diffusion.md 2.3: 17 at the first of SD's steps, so doubtful). sigma^2 = 1 - abar.
    """

    eta: float = 0.1
    weight: str = "kappa"
    exponent: float = 1.0
    cap: float = math.inf

    def at(self, abar: float) -> float:
        """g of a step with this cumulative alpha, in (0, 1].

        Raises:
            JobError: there is no such weight.
        """
        if self.weight not in WEIGHTS:
            raise JobError(f"there is no weight {self.weight!r}; use one of {', '.join(WEIGHTS)}")
        sigma = math.sqrt(1.0 - abar)
        w = sigma / (math.sqrt(abar) if self.weight == "kappa" else abar)
        return min(self.cap, self.eta * w**self.exponent)
