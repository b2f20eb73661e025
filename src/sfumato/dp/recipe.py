"""What a fine-tuning does, in numbers: everything that a second run needs to do the same, and nothing private."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from sfumato.dp.accountant import Event, noise_multiplier
from sfumato.errors import JobError

__all__ = ["Recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of DP-LDM's third step (papers/dp-latent-diffusion 1.2), and of what the paper did not try.

    Args:
        epsilon, delta: the budget, for adding or removing one image with its caption. ``epsilon`` infinite: no noise
            and no clipping, for comparison only.
        epochs: expected visits of each record; ``batch``: expected size B of a logical batch, so q = B / N.
        clip: norm bound C. With ``normalise`` every record's gradient is brought to nearly that norm and the step is
            in units of C, so that the rate does not depend on it.
        rate: peak learning rate of AdamW; ``decay``: "cosine" to zero, or "constant".
        draws: timesteps and noises per record, averaged before clipping (noise multiplicity, DPDM).
        average: decay of the exponential average of the weights, which is what is saved; 0 saves the last ones.
        what, first, rank: which parameters (`trainable.choose`).
        drop: share of captions left empty, for guidance.
        physical: rows (records times draws) computed at once; does not change the result. 256 to 512 suit a CPU's
            caches (measured: a quarter less time than 1,024), a GPU takes more.
        interval: steps between checkpoints.
        precision: "float32", or "bfloat16" for the U-Net's arithmetic; gradients are clipped and added in float32.
    """

    epsilon: float
    delta: float = 1e-5
    epochs: float = 10.0
    batch: int = 1024
    clip: float = 1.0
    normalise: bool = True
    rate: float = 2e-3
    decay: str = "cosine"
    draws: int = 2
    average: float = 0.98
    what: str = "attention"
    first: int = 1
    rank: int | None = None
    drop: float = 0.1
    physical: int = 256
    interval: int = 10
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("epsilon", 0.0, math.inf), ("delta", 0.0, 0.1), ("epochs", 0.0, 1e5), ("batch", 0, 1e9),
            ("clip", 0.0, 1e6), ("rate", 0.0, 10.0), ("draws", 0, 1024), ("physical", 0, 1e7), ("interval", 0, 1e7),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low < value <= high:
                raise JobError(f"{name} is {value}; it must be more than {low:g} and at most {high:g}")
        if not 0 <= self.average < 1 or not 0 <= self.drop < 1:
            raise JobError(f"average ({self.average}) and drop ({self.drop}) are shares from 0 to below 1")
        if self.decay not in ("cosine", "constant") or self.precision not in ("float32", "bfloat16"):
            raise JobError("decay is 'cosine' or 'constant', precision 'float32' or 'bfloat16'")

    @property
    def private(self) -> bool:
        return math.isfinite(self.epsilon)

    def steps(self, records: int) -> int:
        """Logical batches in all, at least one: an explicit whole number, for accountant and loop alike."""
        return max(1, round(self.epochs * records / self.batch))

    def sample_rate(self, records: int) -> float:
        """q = B / N.

        Raises:
            JobError: a batch of more than all records.
        """
        if self.batch > records:
            raise JobError(
                f"batch is {self.batch}, but there are {records} records; take about {max(1, records // 60)}"
            )
        return self.batch / records

    def event(self, records: int) -> Event:
        """What the accountants are told: q, σ and the number of steps. σ is 0 where ``epsilon`` is infinite.

        Raises:
            JobError: no noise is enough for this budget.
        """
        q, steps = self.sample_rate(records), self.steps(records)
        sigma = noise_multiplier(self.epsilon, self.delta, q, steps) if self.private else 0.0
        return Event(q, sigma, steps)

    def to_json(self) -> dict[str, Any]:
        """As a ledger keeps it."""
        return {k: ("inf" if v == math.inf else v) for k, v in asdict(self).items()}

    @staticmethod
    def from_json(entries: Mapping[str, Any]) -> Recipe:
        """
        Raises:
            JobError: an entry that is no setting.
        """
        unknown = set(entries) - {field.name for field in fields(Recipe)}
        if unknown:
            raise JobError(f"not settings of a recipe: {', '.join(sorted(unknown))}")
        known: dict[str, Any] = {k: (math.inf if v == "inf" else v) for k, v in entries.items()}
        return Recipe(**known)
