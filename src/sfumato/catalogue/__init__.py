"""What the papers approximate with, method by method: source, true error, cost, and a form that runs.

``get("puma.gelu")`` is an entry; ``PROFILES["puma"]`` names the entries of one paper by function. Every formula
is written once and runs on fixed-point words (:mod:`~sfumato.catalogue.words`) and on secrets
(:mod:`~sfumato.catalogue.shares`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sfumato.catalogue.entries import PUBLISHED
from sfumato.catalogue.entry import FUNCTIONS, Entry, Function
from sfumato.errors import RangeError

__all__ = ["ENTRIES", "FUNCTIONS", "PROFILES", "Entry", "Function", "entries_of", "function", "get"]

#: Every published entry by name.
ENTRIES: Mapping[str, Entry] = MappingProxyType({entry.name: entry for entry in PUBLISHED})


def get(name: str) -> Entry:
    """The entry of this name.

    Raises:
        RangeError: there is none; lists the names of that paper, or all papers.
    """
    if name in ENTRIES:
        return ENTRIES[name]
    paper = name.split(".")[0]
    own = [known for known in ENTRIES if known.startswith(paper + ".")]
    known = ", ".join(own) if own else "papers " + ", ".join(sorted({e.paper for e in PUBLISHED}))
    raise RangeError(f"the catalogue has no entry {name!r}; there are {known}")


def function(name: str) -> Function:
    """The function of this name; ``layer-norm`` and ``layer_norm`` are the same.

    Raises:
        RangeError: there is none; lists them.
    """
    found = FUNCTIONS.get(name.replace("-", "_"))
    if found is None:
        raise RangeError(f"the catalogue has no function {name!r}; there are {', '.join(FUNCTIONS)}")
    return found


def entries_of(name: str) -> list[Entry]:
    """The entries of a function, in the order of the papers."""
    return [entry for entry in PUBLISHED if entry.function == function(name).name]


def _profile(**chosen: str) -> Mapping[str, str]:
    return MappingProxyType(chosen)


_SPU = {
    "exp": "spu.exp", "reciprocal": "spu.reciprocal", "rsqrt": "spu.rsqrt", "sqrt": "spu.sqrt",
    "log": "spu.log", "sigmoid": "spu.sigmoid", "tanh": "spu.tanh", "erf": "spu.erf", "gelu": "spu.gelu",
    "silu": "spu.silu", "softmax": "spu.softmax", "layer_norm": "spu.layer-norm",
}  # fmt: skip
_CRYPTEN = {
    "exp": "crypten.exp", "reciprocal": "crypten.reciprocal", "rsqrt": "crypten.rsqrt", "sqrt": "crypten.sqrt",
    "log": "crypten.log", "sigmoid": "crypten.sigmoid", "tanh": "crypten.tanh", "erf": "crypten.erf",
    "gelu": "crypten.gelu", "silu": "crypten.silu", "softmax": "crypten.softmax",
    "layer_norm": "crypten.layer-norm",
}  # fmt: skip

#: Paper -> function -> entry. What a paper does not replace is what its base library does.
PROFILES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "crypten": _profile(**_CRYPTEN),
        "sdu": _profile(
            **{
                **_CRYPTEN, "reciprocal": "sdu.reciprocal-d64", "rsqrt": "sdu.rsqrt-d4", "gelu": "sdu.gelu",
                "softmax": "sdu.softmax", "layer_norm": "sdu.layer-norm",
            }
        ),
        "sdu-doubted": _profile(
            **{
                **_CRYPTEN, "exp": "sdu.exp", "reciprocal": "sdu.reciprocal-d64", "rsqrt": "sdu.rsqrt-d4",
                "gelu": "sdu.gelu", "softmax": "sdu.softmax-doubted", "layer_norm": "sdu.layer-norm",
            }
        ),
        "puma": _profile(
            **{
                **_SPU, "exp": "puma.exp", "gelu": "puma.gelu", "silu": "puma.silu", "softmax": "puma.softmax",
            }
        ),
        "ditto": _profile(
            **{
                **_SPU, "exp": "puma.exp", "gelu": "mpcformer.gelu", "reciprocal": "ditto.reciprocal",
                "softmax": "ditto.softmax",
            }
        ),
        "cipherdm": _profile(
            **{
                **_SPU, "exp": "cipherdm.exp", "silu": "cipherdm.silu", "mish": "cipherdm.mish",
                "softmax": "cipherdm.softmax",
            }
        ),
        "cipherdm-mended": _profile(
            **{
                **_SPU, "exp": "cipherdm.exp-fixed", "silu": "cipherdm.silu-fixed",
                "softmax": "cipherdm.softmax-even",
            }
        ),
        "bumblebee": _profile(
            **{
                **_SPU, "exp": "bumblebee.exp", "sigmoid": "bumblebee.sigmoid", "gelu": "bumblebee.gelu",
                "silu": "bumblebee.silu", "softmax": "bumblebee.softmax",
            }
        ),
        "iron": _profile(gelu="iron.gelu", softmax="iron.softmax"),
        "mpcformer": _profile(
            **{**_CRYPTEN, "gelu": "mpcformer.gelu", "softmax": "mpcformer.softmax-2quad"}
        ),
        "mpcformer-2relu": _profile(
            **{**_CRYPTEN, "gelu": "mpcformer.gelu", "softmax": "mpcformer.softmax-2relu"}
        ),
        "secformer": _profile(
            **{
                **_CRYPTEN, "reciprocal": "secformer.reciprocal", "rsqrt": "secformer.rsqrt",
                "erf": "secformer.erf", "gelu": "secformer.gelu", "softmax": "secformer.softmax-2quad",
                "layer_norm": "secformer.layer-norm",
            }
        ),
        "shaft": _profile(
            **{
                **_CRYPTEN, "rsqrt": "shaft.rsqrt", "gelu": "shaft.gelu", "silu": "shaft.silu",
                "softmax": "shaft.softmax", "layer_norm": "shaft.layer-norm",
            }
        ),
        "usg-precise": _profile(
            **{
                **_SPU, "exp": "usg-precise.exp", "gelu": "usg-precise.gelu", "silu": "usg-precise.silu",
                "softmax": "usg-precise.softmax",
            }
        ),
        "usg-loose": _profile(
            **{
                **_SPU, "exp": "usg-loose.exp", "gelu": "usg-loose.gelu", "silu": "usg-loose.silu",
                "softmax": "usg-loose.softmax",
            }
        ),
        "spu": _profile(**_SPU),
    }
)  # fmt: skip
