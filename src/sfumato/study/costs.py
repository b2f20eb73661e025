"""What transformers of published sizes cost under a paper's profile and under ours: bytes, rounds, agreement, time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from sfumato.api import Deployment, deploy
from sfumato.bench.emulated import NETWORKS, Emulated
from sfumato.errors import JobError
from sfumato.graph.capture import capture
from sfumato.graph.plan import Plan
from sfumato.graph.planning import make_plan
from sfumato.runtime.remote import open_backend
from sfumato.zoo.shapes import SHAPES, Shape, with_quad

__all__ = ["PUBLISHED", "ROWS", "CostRow", "Profile", "Published", "cost_rows"]

_CALIBRATION = (1, 2)  # seeds of the ids that ranges come from; others are run
_RUN = 9


@dataclass(frozen=True, slots=True)
class Profile:
    """A row of the tables: ``quad`` puts the quadratic in place of GELU, as a distilled student has it."""

    label: str
    profile: str
    ring: str = "Z64"
    quad: bool = False


#: Profiles by paper, the paper's own first.
ROWS: dict[str, tuple[Profile, ...]] = {
    "puma": (
        Profile("PUMA", "puma"),
        Profile("ours, precise", "precise"),
        Profile("ours, fast, one ring", "fast"),
        Profile("ours, fast", "fast", "mixed"),
    ),
    "ditto": (
        Profile("PUMA", "puma"),
        Profile("Ditto", "ditto", "mixed", quad=True),
        Profile("ours, precise", "precise", "mixed"),
        Profile("ours, fast", "fast", "mixed"),
        Profile("ours, fast, with Quad", "fast", "mixed", quad=True),
    ),
}


@dataclass(frozen=True, slots=True)
class Published:
    """What a paper prints, in the units it uses: GiB of all parties, seconds on its machines."""

    label: str
    gib: float
    seconds: float | None = None
    how: str = ""


#: By (model, tokens). [PUMA] tables 1 to 3; Ditto's cells could not be read, its figures are derived from ratios.
PUBLISHED: dict[tuple[str, int], tuple[Published, ...]] = {
    ("bert-base", 64): (Published("PUMA", 4.881, 21.141), Published("MPCFormer", 5.707, 36.354)),
    ("bert-base", 128): (
        Published("PUMA", 10.773, 33.913),
        Published("MPCFormer", 12.089, 55.320),
        Published("Ditto", 4.4, None, "derived from its ratios and code, 4.2 to 4.5"),
    ),
    ("bert-base", 256): (Published("PUMA", 26.004, 61.210), Published("MPCFormer", 29.927, 112.453)),
    ("bert-large", 128): (
        Published("PUMA", 27.246, 73.720),
        Published("MPCFormer", 32.577, 141.222),
        Published("Ditto", 10.7, None, "derived from its ratios and code, 10.3 to 11.1"),
    ),
    ("roberta-base", 128): (Published("PUMA", 11.463, 41.641),),
    ("gpt2-base", 32): (
        Published("PUMA", 3.774, 15.506),
        Published("MPCFormer", 4.999, 34.889),
        Published("Ditto", 0.9, None, "derived, without the final argmax"),
    ),
    ("gpt2-medium", 32): (Published("PUMA", 7.059, 30.272), Published("MPCFormer", 11.766, 73.078)),
}


@dataclass(frozen=True, slots=True)
class CostRow:
    """Bytes of all parties and of the client's own link, exact; rounds; ``error``: relative L2 error of the result
    against float, by the plan's arithmetic in the clear (None: the result is a token's id, and ``same`` says whether it
    is the same). ``seconds`` by network: of one call with its certificate, three threads on emulated links, and
    ``least``, what that network allows."""

    model: str
    tokens: int
    label: str
    bytes_sent: tuple[int, ...]
    client_bytes: int
    setup_bytes: int
    rounds: int
    error: float | None = None
    same: bool | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    least: dict[str, float] = field(default_factory=dict)

    @property
    def total_gb(self) -> float:
        """GB (1e9 bytes) of all parties and of the client's link."""
        return (sum(self.bytes_sent) + self.client_bytes) / 1e9

    def to_json(self) -> dict[str, Any]:
        """Numbers by name."""
        return asdict(self)


def cost_rows(
    paper: str,
    models: Sequence[tuple[str, int]],
    networks: Sequence[str] = (),
    *,
    errors: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[CostRow]:
    """The paper's rows for each (model, tokens), weights secret.

    Raises:
        JobError: an unknown paper, model or network.
    """
    if paper not in ROWS:
        raise JobError(f"costs are told for {', '.join(ROWS)}, not for {paper!r}")
    for name, _ in models:
        if name not in SHAPES:
            raise JobError(f"there is no model {name!r}; there are {', '.join(SHAPES)}")
    for network in networks:
        if network not in NETWORKS:
            raise JobError(f"there is no network {network!r}; use {', '.join(NETWORKS)}")
    work = [(SHAPES[name], tokens, profile) for name, tokens in models for profile in ROWS[paper]]
    rows = []
    for done, (shape, tokens, profile) in enumerate(work):
        if progress is not None:
            progress("costs", done, len(work))
        rows.append(_row(shape, tokens, profile, networks, errors))
    if progress is not None:
        progress("costs", len(work), len(work))
    return rows


def _row(shape: Shape, tokens: int, profile: Profile, networks: Sequence[str], errors: bool) -> CostRow:
    model = shape.build()
    if profile.quad:
        with_quad(model)
    ids = shape.ids(tokens, _RUN)
    plan = make_plan(
        capture(model, (ids,)),
        secret="inputs+weights",
        profile=profile.profile,
        ring=profile.ring,
        calibration=[((shape.ids(tokens, seed),), {}) for seed in _CALIBRATION],
    )
    with deploy(plan, backend="meta") as deployment:
        deployment.call_on_shapes()
        cost = deployment.cost
    error, same = _agreement(shape, model, plan, ids) if errors else (None, None)
    seconds, least = dict[str, float](), dict[str, float]()
    for name in networks:
        network = NETWORKS[name]
        emulated = Emulated(network)
        with Deployment(plan, emulated) as deployment:
            deployment(ids)
            seconds[name] = emulated.call_s
        least[name] = network.least_s(cost.bytes_sent, cost.rounds)
    sent = tuple(cost.bytes_sent)
    return CostRow(
        shape.name, tokens, profile.label, sent, cost.client_bytes, cost.setup_bytes, cost.rounds,
        error, same, seconds, least,
    )  # fmt: skip


def _agreement(
    shape: Shape, model: torch.nn.Module, plan: Plan, ids: torch.Tensor
) -> tuple[float | None, bool | None]:
    """(relative L2 error of the result or None, whether the token is the same or None)."""
    # A published polynomial may overflow where a comparison takes it out: the parties' words wrap there, too.
    with Deployment(plan, open_backend("plain", options={"wraps": True, "certificate": False})) as deployment:
        found = deployment(ids)
    with torch.no_grad():
        wanted = model(ids)
    if shape.causal:
        return None, bool((found.round() == wanted).all())
    return float((found - wanted).norm() / wanted.norm()), None


def records(rows: Sequence[CostRow]) -> str:
    """The rows as JSON text."""
    return json.dumps([row.to_json() for row in rows], indent=1) + "\n"
