"""One row of a study as data: which network, which sampler, which correction. Its digest names its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sfumato.diffusion.correction import Pull
from sfumato.errors import JobError

__all__ = ["KINDS", "Offline", "Setting"]

#: What is added to the outputs (docs/corrections.md): scores of the exact network; the measured error; both, with the
#: weights of each step fitted on images that are not in the study.
KINDS = ("scores", "measured", "blend")


@dataclass(frozen=True, slots=True, kw_only=True)
class Offline:
    """A correction from records.

    ``fine``: steps of the record (the papers' T_f = N m). ``pull``: weight of the scores; ``reading`` A or B of them.
    ``independent``: records of other seeds than the images' own. ``beta``: weight of the measured error.
    """

    kind: str = "scores"
    fine: int = 50
    pull: Pull = field(default_factory=Pull)
    reading: str = "A"
    independent: bool = False
    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise JobError(f"there is no correction {self.kind!r}; use one of {', '.join(KINDS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How images of a row are drawn.

    Args:
        name: for tables; not part of the digest.
        steps, solver: of the scheduler, by its name in ``sfumato.diffusion.settings.SCHEDULERS``.
        spacing: of timesteps (``"leading"``, ``"trailing"``, ``"linspace"``); None for the model's own.
        aligned: whether the grid starts where that of the record does, see ``scores.aligned``; leading DDIM alone.
        guidance: None for the model's own.
        lowered: the control without records: guidance w - g_t with this weight.
        unguided: the last so many steps run without guidance. ``public_first``: the first noise is public, so that the
            first step's half without a prompt is computed in the clear.
        profile: of the plan; None for the exact network in float. ``methods``: pairs of function and catalogue entry
            that replace its own.
        offline: the correction.
        network: another network of the same subject (`Subject.of`), such as ``"tuned-sdu"``; empty for its own. All of
            the row is then of that network, ranges and corrections included.
    """

    name: str
    steps: int = 50
    solver: str = "ddim"
    spacing: str | None = None
    aligned: bool = False
    guidance: float | None = None
    lowered: Pull | None = None
    unguided: int = 0
    public_first: bool = False
    profile: str | None = None
    methods: tuple[tuple[str, str], ...] = ()
    offline: Offline | None = None
    network: str = ""

    @property
    def digest(self) -> str:
        """Of everything but the name."""
        facts = {k: v for k, v in asdict(self).items() if k != "name"}
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Setting:
        """What ``to_json`` wrote."""
        found = dict(data)
        if found.get("lowered") is not None:
            found["lowered"] = Pull(**found["lowered"])
        if found.get("offline") is not None:
            offline = dict(found["offline"])
            found["offline"] = Offline(**{**offline, "pull": Pull(**offline["pull"])})
        found["methods"] = tuple((name, entry) for name, entry in found.get("methods", ()))
        return Setting(**found)
