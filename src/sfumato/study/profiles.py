"""Rows of the cost tables by paper: a profile, what a student has changed in the model, and what the paper prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from sfumato.graph.program import Program
from sfumato.zoo.train.text.marill import layers_of, prefix_parts
from sfumato.zoo.train.text.replace import Replaced

__all__ = ["PUBLISHED", "ROWS", "Profile", "Published", "public_weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A row.

    ``activation`` and ``softmax``: what a student has in their place. ``published``: the softmax is replaced by the
    profile's own entry, in an unchanged attention, not in the model. ``frozen``: share of the layers, from the first,
    that are public with the embeddings. ``rank``: of LoRA in the other layers, whose weights are public then.
    ``merged``: heads of one merged head, in layers that are not frozen. ``methods``: entries of the catalogue in place
    of the profile's. ``against``: label of the row that factors are against (empty: the model's first). ``printed``:
    the paper's factor for such a change.
    """

    label: str
    profile: str
    ring: str = "Z64"
    activation: Literal["gelu", "quad"] = "gelu"
    softmax: Literal["softmax", "2quad", "2relu"] = "softmax"
    published: bool = False
    frozen: float = 0.0
    rank: int = 0
    merged: int = 1
    methods: tuple[tuple[str, str], ...] = ()
    against: str = ""
    printed: str = ""

    def replaced(self, model: Any) -> Replaced:
        """What is different in ``model``, a transformer of BERT's or GPT-2's type if layers are frozen."""
        frozen = round(self.frozen * len(layers_of(model))) if self.frozen else 0
        return Replaced(self.activation, self.softmax, None, frozen, self.rank, self.merged)


def _mpcformer() -> tuple[Profile, ...]:
    base, fast = "CrypTen, unchanged", "ours, fast, unchanged"
    quad: dict[str, Any] = {"activation": "quad"}
    papers: dict[str, Any] = {**quad, "published": True, "against": base}
    ours: dict[str, Any] = {**quad, "profile": "fast", "ring": "mixed", "against": fast}
    printed = {
        "quad": "1.24x at 512",
        "2relu": "1.93x at 128, 2.61x at 512",
        "2quad": "2.2x at 128, 5.26x at 512",
    }
    return (
        Profile(label="PUMA, unchanged", profile="puma"),
        Profile(label=base, profile="crypten", against=base),
        Profile(label="MPCFormer, Quad", profile="mpcformer", methods=(("softmax", "crypten.softmax"),),
                printed=printed["quad"], **papers),
        Profile(label="MPCFormer, Quad+2ReLU", profile="mpcformer-2relu", softmax="2relu",
                printed=printed["2relu"], **papers),
        Profile(label="MPCFormer, Quad+2Quad", profile="mpcformer", softmax="2quad",
                printed=printed["2quad"], **papers),
        Profile(label="MPCFormer, Quad+2Quad, our division", profile="mpcformer", softmax="2quad",
                printed=printed["2quad"], **{**papers, "published": False}),
        Profile(label=fast, profile="fast", ring="mixed", against=fast),
        Profile(label="ours, fast, Quad", printed=printed["quad"], **ours),
        Profile(label="ours, fast, Quad+2ReLU", softmax="2relu", printed=printed["2relu"], **ours),
        Profile(label="ours, fast, Quad+2Quad", softmax="2quad", printed=printed["2quad"], **ours),
    )  # fmt: skip


def _marill() -> tuple[Profile, ...]:
    fast: dict[str, Any] = {"profile": "fast", "ring": "mixed", "against": "all secret"}
    return (
        Profile(label="all secret, PUMA", profile="puma", against="all secret"),
        Profile(label="all secret", **fast),
        Profile(label="frozen 1/2", frozen=0.5, **fast),
        Profile(label="frozen 3/4", frozen=0.75, **fast),
        *(Profile(label=f"LoRA, rank {rank}", rank=rank, **fast) for rank in (4, 16, 64)),
        *(Profile(label=f"heads merged by {merged}", merged=merged, **fast) for merged in (2, 4)),
        Profile(label="frozen 1/2, rank 16, merged by 2", frozen=0.5, rank=16, merged=2, **fast),
        Profile(label="frozen 3/4, rank 16, merged by 4", frozen=0.75, rank=16, merged=4, **fast),
    )


#: By paper.
ROWS: Mapping[str, tuple[Profile, ...]] = {
    "puma": (
        Profile(label="PUMA", profile="puma"),
        Profile(label="ours, precise", profile="precise"),
        Profile(label="ours, fast, one ring", profile="fast"),
        Profile(label="ours, fast", profile="fast", ring="mixed"),
    ),
    "ditto": (
        Profile(label="PUMA", profile="puma"),
        Profile(label="Ditto", profile="ditto", ring="mixed", activation="quad"),
        Profile(label="ours, precise", profile="precise", ring="mixed"),
        Profile(label="ours, fast", profile="fast", ring="mixed"),
        Profile(label="ours, fast, with Quad", profile="fast", ring="mixed", activation="quad"),
    ),
    "mpcformer": _mpcformer(),
    "marill": _marill(),
}


@dataclass(frozen=True, slots=True)
class Published:
    """What a paper prints, in the units it uses: GiB of all parties, seconds on its machines."""

    label: str
    gib: float
    seconds: float | None = None
    how: str = ""


#: By (model, tokens). [PUMA] tables 1 to 3; Ditto's cells could not be read, its figures are derived from ratios.
PUBLISHED: Mapping[tuple[str, int], tuple[Published, ...]] = {
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


def public_weights(program: Program, model: nn.Module, inner: Any, replaced: Replaced) -> tuple[str, ...]:
    """Names of the program's weights that a fine-tuned student shares with its public base ([Marill] 4.2).

    With frozen layers those of embeddings and prefix; with LoRA all of the base model's but the low-rank changes and a
    pooler, which are learnt, as a head is. ``model`` is what was captured, ``inner`` the transformer in it. A head that
    is tied to the embeddings is public with them.
    """
    base = inner.base_model
    parts = [base] if replaced.rank else prefix_parts(inner, replaced.frozen) if replaced.frozen else []
    shared = {id(p) for part in parts for name, p in part.named_parameters() if "lora_" not in name}
    if getattr(base, "pooler", None) is not None:
        shared -= {id(p) for p in base.pooler.parameters()}
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in shared}
    return tuple(i.source for i in program.inputs if i.kind != "user" and i.source in names)
