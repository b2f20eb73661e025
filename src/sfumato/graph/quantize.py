"""The pass of mixed plans: ring and fraction bits of every secret value, with the casts that follow.

A call works in one ring: in Z32 where its calibrated range and the scheme allow it, else in Z64. Activations in Z32
share one scale, so that sums need no cast; each weight gets the most fraction bits that the sums of its product leave.
Values that calls in both rings use are cast once. A call that a scheme wants in Z32 without room there is refused by
name, or left in Z64 where the scheme is ours.

Source: [Ditto] 2.2 to 2.4 for casts between rings and the map of layers; scales from ranges are our own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sfumato.errors import JobError
from sfumato.graph.activated import layer_of
from sfumato.graph.calibrate import Calibration
from sfumato.graph.edges import NO_EDGES, Edges, stricter
from sfumato.graph.formats import WHOLE, Format
from sfumato.graph.handlers import HANDLERS, Options
from sfumato.graph.handlers.linear import LINEAR_PLUS
from sfumato.graph.handlers.nonlinear_ranges import argument, budget, short_up
from sfumato.graph.look_up import LOOK_UP, is_index
from sfumato.graph.places import Place, Placed
from sfumato.graph.program import Node, Program, Ref, map_refs
from sfumato.ops.softmax import WEIGHT_FRAC
from sfumato.protocol import cost

__all__ = ["SCHEMES", "Quantized", "Scheme", "quantize"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a profile mixes rings.

    ``frac``: fraction bits of activations in Z32, and ``least`` if the squares of a norm ask for fewer; ``weights``:
    the most that weights get there. Rounding of operands may cost a product what the profile's budget says.
    ``fixed``: a paper's map; a range without room is refused then instead of left in Z64. ``expand``: attention call by
    call. ``short``: targets that go into Z32; ``wide``: calls, by name or module path, that stay in Z64 all the same.
    ``loss``: relative L2 error that Z32 may cost a call, instead of the profile's budget.
    """

    frac: int
    least: int
    weights: int
    short: frozenset[str]
    fixed: bool = False
    expand: bool = False
    wide: frozenset[str] = frozenset()
    loss: float | None = None


_PRODUCTS = {
    "aten.linear.default": (0, 1, 2), "aten.addmm.default": (1, 2, 0), LINEAR_PLUS: (0, 1, 2),
    "aten.matmul.default": (0, 1),
    "aten.mm.default": (0, 1), "aten.bmm.default": (0, 1), "aten.conv1d.default": (0, 1, 2),
    "aten.conv2d.default": (0, 1, 2),
}  # fmt: skip
_FACTORS = frozenset(
    ("aten.mul.Tensor", "aten.mul.Scalar", "aten.div.Tensor", "aten.div.Scalar", "aten.true_divide.Tensor")
)
_SUMS = frozenset(
    ("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar", "aten.rsub.Scalar",
     "aten.neg.default")
)  # fmt: skip
_CURVES = frozenset(
    ("aten.gelu.default", "aten.silu.default", "aten.tanh.default", "aten.sigmoid.default",
     "sfumato.quick_gelu", "sfumato.quad")
)  # fmt: skip
_NORMS = {"aten.layer_norm.default": (2, 3), "aten.rms_norm.default": (2,)}
_LARGEST = "aten.argmax.default"
_ATTENTION = frozenset(("aten.scaled_dot_product_attention.default", "sfumato.masked_attention"))
#: Local where what it picks by is public.
_PICK = "aten.where.self"
_LINEAR = (
    frozenset(_PRODUCTS) | _FACTORS | _SUMS | {LOOK_UP, "sfumato.lowered_scores", "sfumato.masked_scores"}
)

#: By profile: those that can mix rings.
SCHEMES: Mapping[str, Scheme] = {
    "ditto": Scheme(
        8, 8, 8, _LINEAR | {"aten.gelu.default", "sfumato.quad", "aten.softmax.int"}, fixed=True, expand=True
    ),
    "fast": Scheme(11, 8, 15, _LINEAR | _CURVES | {*_NORMS, *_ATTENTION}),
    "precise": Scheme(13, 12, 16, _LINEAR | _CURVES | {*_NORMS, *_ATTENTION}),
}
#: Bits below the ring's for |sums|: a quarter of the ring, as truncation asks.
_SPARE = 2
#: How far a sum in Z32 may pass the largest one that calibration saw; watched.
_SUM_SLACK = 2.0
#: How far a value in Z32 may pass the largest one, where it is no sum.
_VALUE_SLACK = 8.0
#: Deviations of a shortened entry and of a truncated one, in units.
_ROUNDED, _TRUNCATED = 0.5, 0.41


@dataclass(frozen=True)
class Quantized:
    """The program with casts, a format for each of its secret values, and what that says of single calls' choices."""

    placed: Placed
    formats: Mapping[str, Format]
    choices: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def quantize(
    placed: Placed, measured: Calibration, options: Options, scheme: Scheme, edges: Edges = NO_EDGES
) -> Quantized:
    """Formats by ``scheme`` from calibrated ranges, and casts where calls of different rings meet, or a call and what
    is asked of the plan's edges.

    Raises:
        JobError: a range without room in Z32 under a fixed scheme (names every such call) or at an edge; or an edge
            that no cast leads to.
    """
    return _Quantizer(placed, measured, options, scheme, edges).run()


class _Quantizer:
    """One walk to decide, one to write the casts."""

    def __init__(
        self, placed: Placed, measured: Calibration, options: Options, scheme: Scheme, edges: Edges
    ) -> None:
        self.placed, self.measured, self.options, self.scheme = placed, measured, options, scheme
        self.edges, self.outputs = edges, edges.outputs(placed)
        self.long = Format("Z64", options.frac)
        self.nodes = {n.name: n for n in placed.program.nodes}
        self.activated = {  # products that a function of one opening reads
            path[-1].name
            for n in placed.program.nodes
            if n.target in _CURVES - {"sfumato.quad"} and (path := layer_of(n, self.nodes)) is not None
        }
        self.secret = {n.name for n in placed.program.nodes if placed.places[n.name] is Place.SECRET}
        self.formats: dict[str, Format] = edges.inputs(placed)
        self.choices: dict[str, dict[str, Any]] = {}
        self.wants: dict[str, dict[str, Format]] = {}  # by call: the format of each argument
        self.refused: list[str] = []
        self.frac = min([scheme.frac if scheme.fixed else self._common_frac(), *edges.short_fracs()])
        self.short = Format("Z32", self.frac)
        self.loss = budget(options).words if scheme.loss is None else scheme.loss

    def _common_frac(self) -> int:
        """Fraction bits of activations with which a square of each norm's deviations fits, of those that so many are
        enough for."""
        fits = [_fits_square(self._deviation(n)) for n in self.nodes.values() if n.target in _NORMS]
        return min([self.scheme.frac, *(f for f in fits if f >= self.scheme.least)])

    def _deviation(self, node: Node) -> float:
        """The largest |x - mean| of a norm in future runs."""
        return self.measured.of(node).get("hi_deviation", math.inf) * self.options.margin

    def run(self) -> Quantized:
        nodes = [n for n in self.placed.program.nodes if n.name in self.secret]
        for node in nodes:
            self._decide(node)
        if self.refused:
            raise JobError(
                f"{len(self.refused)} calls leave Z32: {'; '.join(self.refused)}; use another profile or model"
            )
        asked: dict[str, set[Format]] = {}
        for node in nodes:
            for name, format in self.wants[node.name].items():
                asked.setdefault(name, set()).add(format)
        for name, formats in asked.items():
            if name not in self.formats:  # from outside: shared as it is used, here and in other plans
                self.formats[name] = stricter(*formats, self.edges.weights.get(name, min(formats)))
        return self._written()

    # ---- decisions -----------------------------------------------------------------------------------------

    def _decide(self, node: Node) -> None:
        arguments = [name for name in node.refs() if self._is_secret(name)]
        picks = node.target == _PICK and self.placed.places[node.args[0].name] is Place.PUBLIC
        if (HANDLERS[node.target].local or picks) and node.target not in self.scheme.short:
            known = [self.formats[n] for n in arguments if n in self.formats]
            format = known[0] if known else self.long
            if len({f.ring for f in known}) > 1 or picks:  # what comes from elsewhere may have no room in Z32
                format = self.short if self.short in known and self._has_room(node) else self.long
            if all(self._is_whole(n) for n in arguments):
                format = format._replace(frac=0)
            wants = dict.fromkeys(arguments, format)
        elif self._may_shorten(node) and (found := self._in_z32(node, arguments)) is not None:
            format, wants = found
        else:
            format = self.long
            wants = {n: self.long._replace(frac=0) if self._is_whole(n) else self.long for n in arguments}
            if node.target == _LARGEST:  # compares in either ring, and gives a number
                wants = {n: self.formats.get(n, self.long) for n in arguments}
        self.formats[node.name], self.wants[node.name] = format, wants

    def _may_shorten(self, node: Node) -> bool:
        scheme = self.scheme
        return node.target in scheme.short and not {node.name, node.module_path} & scheme.wide

    def _is_secret(self, name: str) -> bool:
        return self.placed.places[name] is not Place.PUBLIC and not is_index(self.nodes.get(name))

    def _is_whole(self, name: str) -> bool:
        """A 0/1 value: words without fraction bits."""
        node = self.nodes.get(name)
        if node is not None and node.target in WHOLE:
            return True
        return name in self.formats and self.formats[name].frac == 0

    def _has_room(self, node: Node | None) -> bool:
        """Whether a value that calibration saw fits Z32 at the common scale."""
        highest = math.inf if node is None else self.measured.of(node).get("hi_out", math.inf)
        return _bits(highest * _VALUE_SLACK) + self.frac <= 30

    def _in_z32(self, node: Node, arguments: list[str]) -> tuple[Format, dict[str, Format]] | None:
        """The call's format and its arguments' in Z32, or None where it has to stay in Z64."""
        highest = self.measured.of(node).get("hi_out", math.inf)
        wants = {n: self.short._replace(frac=0) if self._is_whole(n) else self.short for n in arguments}
        problem = None
        if node.target in _PRODUCTS:
            problem = self._product(node, wants)
        elif node.target in _FACTORS:
            problem = self._factor(node, arguments, highest)
        elif node.target == "sfumato.quad":
            problem = self._square(node)
        elif node.target in _NORMS:
            problem = self._norm(node, wants)
        elif node.target in _ATTENTION:
            problem = self._attention(node, wants)
        if problem is None and not self._has_room(node):
            problem = f"reaches {highest:.3g}"
        if problem is None and not self.scheme.fixed:
            scale = self.measured.of(node).get("lo_scale", 0.0)
            if _TRUNCATED * 2.0**-self.frac > self.loss * scale:
                problem = f"has results of {scale:.1g}, too small for {self.frac} fraction bits"
        if problem is None:
            return self.short, wants
        if self.scheme.fixed:
            self.refused.append(f"{node.name} ({node.module_path or 'the root'}) {problem}")
        self.choices.pop(node.name, None)
        return None

    def _product(self, node: Node, wants: dict[str, Format]) -> str | None:
        """Scales of a product's operands, into ``wants`` and the choices; a problem in words."""
        stats, scheme = self.measured.of(node), self.scheme
        operands = [node.args[i] for i in _PRODUCTS[node.target] if i < len(node.args)]
        x, w = operands[0], operands[1]
        highest = stats.get("hi_out", math.inf)
        if not math.isfinite(highest) or "hi_left" not in stats:
            return "was not calibrated"
        if any(self._is_whole(ref.name) for ref in (x, w)):
            for ref in (x, w):
                wants[ref.name] = self.short._replace(frac=0) if self._is_whole(ref.name) else self.short
            return None  # rows picked by ones: exact
        room = 32 - _SPARE - _bits(highest * _SUM_SLACK)
        # Only an owner's weights have scales of their own; what is computed, or comes with a call, has the common one.
        fixed = {ref.name: self.placed.places[ref.name] not in (Place.OWNER, Place.PUBLIC) for ref in (x, w)}
        fracs = []
        for ref, side in ((x, "left"), (w, "right")):
            own = self.edges.most(ref.name, min(scheme.weights, 31 - _bits(stats[f"hi_{side}"] * _SUM_SLACK)))
            fracs.append(self.frac if fixed[ref.name] or scheme.fixed else own)
        free = [i for i, ref in enumerate((x, w)) if not fixed[ref.name] and not scheme.fixed]
        sizes = [max(stats.get(f"hi_{side}_scale", 0.0), 2.0**-40) for side in ("left", "right")]
        most, noise = list(fracs), math.inf
        # Under an activation a bit above the sums leaves room for the line of its series: see graph/activated.py.
        for kept in (1, 0) if node.name in self.activated else (0,):
            spare, fracs = room - kept - sum(most), list(most)
            if spare < 0:
                if not free or fracs[free[-1]] + spare < 1:
                    continue
                fracs[free[-1]] += spare
            noise = _ROUNDED * math.hypot(*(2.0**-f / size for f, size in zip(fracs, sizes, strict=True)))
            if noise <= self.loss or scheme.fixed:
                break
        if noise == math.inf:
            return f"sums to {highest:.3g}, beyond {2.0 ** (30 - sum(most)) / _SUM_SLACK:.3g}"
        if (noise > self.loss and not scheme.fixed) or sum(fracs) < self.frac:
            return f"would lose {noise:.1%} to rounding"
        for ref, frac in zip((x, w), fracs, strict=True):
            if ref.name in wants:
                wants[ref.name] = Format("Z32", frac)
        if node.target == LINEAR_PLUS:  # both products at one scale
            wants[node.args[4].name] = Format("Z32", fracs[1])
        bound = short_up(max(highest, 2.0**-6) * _SUM_SLACK)
        public = next((f for ref, f in zip((x, w), fracs, strict=True) if ref.name not in wants), None)
        drop = sum(fracs) - self.frac
        move = "bilinear_truncate" if public is None else "linear_truncate"
        self.choices[node.name] = {
            "method": "Z32 product", "error": noise if math.isfinite(noise) else 0.0, "sum": bound,
            "scales": [self.frac, public], "bits": cost.bits(move, k=32, f=drop),
            "headroom": room - sum(fracs),
        }  # fmt: skip
        return None

    def _factor(self, node: Node, arguments: list[str], highest: float) -> str | None:
        """Elementwise products and factors: the sum of scales has to leave the result its room."""
        room = 32 - _SPARE - _bits(highest * _SUM_SLACK) - self.frac
        if len(arguments) > 1:
            return None if room >= self.frac else f"multiplies up to {highest:.3g}"
        if room < 6:
            return f"scales up to {highest:.3g}"
        self.choices[node.name] = {"method": "Z32 factor", "scales": [None, min(room, 20)]}
        return None

    def _square(self, node: Node) -> str | None:
        """(x + 1)^2 has to fit before it is truncated."""
        stats = self.measured.of(node)
        largest = (
            max(abs(stats.get("lo_in", math.inf)), abs(stats.get("hi_in", math.inf))) * self.options.margin
            + 1
        )
        return f"squares {largest:.3g}" if 2 * (_bits(largest) + self.frac) > 30 else None

    def _norm(self, node: Node, wants: dict[str, Format]) -> str | None:
        """A square of each deviation has to fit, and its product with gamma, which gets the bits that are left."""
        deviation, stats = self._deviation(node), self.measured.of(node)
        if not math.isfinite(deviation) or self.frac > _fits_square(deviation):
            return f"normalises deviations of {deviation:.3g}"
        least = 2.0 ** (stats.get("lo_log_square", math.inf) / 2)
        if _ROUNDED * 2.0**-self.frac > self.loss * least:
            return f"normalises deviations of {least:.1g}, too small for {self.frac} fraction bits"
        spare = 30 - self.frac - _bits(deviation * max(stats.get("hi_gain", 1.0), 1.0))
        gamma, *_ = (node.args[i] if i < len(node.args) else None for i in _NORMS[node.target])
        if isinstance(gamma, Ref) and gamma.name in wants:
            if spare < 6:
                return f"scales deviations of {deviation:.3g}"
            wants[gamma.name] = Format("Z32", self.edges.most(gamma.name, min(14, spare)))
        return None

    def _attention(self, node: Node, wants: dict[str, Format]) -> str | None:
        """Products of queries and keys, and of weights and values, have to fit; all three are secret."""
        stats = self.measured.of(node)
        if len({ref.name for ref in node.args[:3]} & set(wants)) < len({ref.name for ref in node.args[:3]}):
            return "reads a public operand"
        scale = node.kwargs["scale"] if "scale" in node.kwargs else argument(node.args, {}, 6, "scale")
        width = self.placed.program.types[node.args[0].name][0][-1]
        factor = width**-0.5 if scale is None else float(scale)
        scores = max(abs(stats.get("lo_score", math.inf)), abs(stats.get("hi_score", math.inf)))
        if _bits(_SUM_SLACK * scores / factor) + 2 * self.frac > 30:
            return f"has scores of {scores:.3g}"
        if _bits(_SUM_SLACK * stats.get("hi_value", math.inf)) + self.frac + WEIGHT_FRAC > 30:
            return f"weighs values of {stats['hi_value']:.3g}"
        return None

    # ---- casts ---------------------------------------------------------------------------------------------

    def _written(self) -> Quantized:
        program, nodes, made = self.placed.program, list[Node](), dict[tuple[str, Format], str]()
        places = dict(self.placed.places)
        types = program.types

        def cast(name: str, format: Format, path: str) -> str:
            """The value in another format, once."""
            if (name, format) not in made:
                have, made[name, format] = self.formats[name], f"{name}_{format.ring.lower()}f{format.frac}"
                if have.ring == format.ring:
                    raise JobError(
                        f"{name} is {have} and read in {format}, and no cast keeps the ring; ask for {have}"
                    )
                node = Node(
                    made[name, format], "sfumato.shorten" if format.ring == "Z32" else "sfumato.widen",
                    (Ref(name), format.ring, format.frac), {}, path, *types[name],
                )  # fmt: skip
                nodes.append(node)
                places[node.name], self.formats[node.name] = Place.SECRET, format
            return made[name, format]

        for node in program.nodes:
            wants = self.wants.get(node.name, {})
            renamed = {
                name: cast(name, format, node.module_path)
                for name, format in wants.items()
                if not _reads(self.formats[name], format)
            }
            nodes.append(_with_refs(node, renamed) if renamed else node)
        for name, format in self.outputs.items():
            if self.formats[name].ring != format.ring == "Z32" and not self._has_room(self.nodes.get(name)):
                raise JobError(f"{name} has no room in {format}; ask for {self.long} at the plan's edge")
        renamed = {n: cast(n, f, "") for n, f in self.outputs.items() if self.formats[n] != f}
        outputs = tuple(map_refs(out, lambda n: Ref(renamed.get(n, n))) for out in program.outputs)
        placed = replace(
            self.placed, program=replace(program, nodes=tuple(nodes), outputs=outputs), places=places,
            per_call=self.placed.per_call | set(made.values()),
        )  # fmt: skip
        self._check(placed.program)
        return Quantized(placed, self.formats, self.choices)

    def _check(self, program: Program) -> None:
        """Nothing is built in which a call meets words of another ring."""
        for node in program.nodes:
            if node.name not in self.secret:
                continue
            rings = {self.formats[name].ring for name in node.refs() if name in self.formats}
            assert len(rings) <= 1, f"{node.name} would read values of {sorted(rings)}"


def _reads(have: Format, want: Format) -> bool:
    """Whether a value serves as it is: same ring, and its scale is lifted where it is used."""
    return have.ring == want.ring and (have.ring == "Z64" or have.frac <= want.frac)


def _with_refs(node: Node, renamed: Mapping[str, str]) -> Node:
    def new(name: str) -> Ref:
        return Ref(renamed.get(name, name))

    return replace(
        node, args=map_refs(node.args, new), kwargs={k: map_refs(v, new) for k, v in node.kwargs.items()}
    )


def _fits_square(size: float) -> int:
    """The most fraction bits with which a square of values up to ``size`` takes a quarter of what Z32 holds: a norm
    sums others to it."""
    return math.floor(14 - math.log2(size)) if 0.0 < size < math.inf else 0 if size else 14


def _bits(size: float) -> int:
    """Bits above the binary point of values up to ``size``, without the sign."""
    return math.frexp(size)[1] if size > 0.0 else 0
