"""A norm's gain and shift, folded into the linear layers that read it.

y = n * gamma + beta is never made. A layer of y becomes one of n with the weight W * gamma and the bias b + W beta,
which whoever holds the weights computes once; the sum of y and another layer's result (a residual after the norm, as in
BERT) becomes one call, whose product takes n * gamma in before it is closed. So a norm with a secret gain costs one
product an element, not two. Source: own (docs/design/015).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch

from sfumato.graph.handlers.linear import LINEAR_PLUS
from sfumato.graph.normalize import without_dead_code
from sfumato.graph.places import Place, Placed
from sfumato.graph.program import Arg, Node, Ref

__all__ = ["fold_norms"]

#: Places of gamma and beta among a norm's arguments.
_NORMS = {"aten.layer_norm.default": (2, 3), "aten.rms_norm.default": (2, None)}
_LINEAR, _ADDMM, _ADD, _RESHAPE = (
    "aten.linear.default", "aten.addmm.default", "aten.add.Tensor", "aten.reshape.default"
)  # fmt: skip
#: Local calls that keep rows whole, with the axis they work on as second argument but for the first.
_PASSING = frozenset((_RESHAPE, "aten.slice.Tensor", "aten.select.int"))
_UNIT = "_unit"
_KNOWN = (Place.OWNER, Place.PUBLIC)


@dataclass
class _Readers:
    """Who reads a norm: layers, calls that pass its rows on to layers, and sums with the layers beside."""

    layers: list[Node] = field(default_factory=list)
    passing: list[Node] = field(default_factory=list)
    sums: list[tuple[Node, Node]] = field(default_factory=list)


def fold_norms(placed: Placed, measured: Collection[str] | None = None) -> Placed:
    """The program without gains and shifts where all readers of a norm can take them.

    ``measured``: calls that a given calibration knows; a norm that it does not know without its gain stays as it is.
    """
    return _Folder(placed, measured).run()


class _Folder:
    def __init__(self, placed: Placed, measured: Collection[str] | None) -> None:
        self.placed, self.measured = placed, measured
        self.program, self.places = placed.program, dict(placed.places)
        self.nodes = {node.name: node for node in self.program.nodes}
        self.readers: dict[str, list[Node]] = defaultdict(list)
        for node in self.program.nodes:
            for name in node.refs():
                self.readers[name].append(node)
        self.outputs = set(self.program.output_names)
        self.changed: dict[str, Node | None] = {}  # by name: what stands there instead
        self.derived: dict[str, Node] = {}  # what whoever holds the weights computes

    def run(self) -> Placed:
        for node in self.program.nodes:
            readers = self._foldable(node) if node.target in _NORMS else None
            if readers is not None:
                self._fold(node, readers)
        if not self.changed:
            return self.placed
        nodes: list[Node] = []
        waiting = dict(self.derived)

        def emit(node: Node) -> None:
            for name in node.refs():
                if (needed := waiting.pop(name, None)) is not None:
                    emit(needed)
            nodes.append(node)

        for node in self.program.nodes:
            changed = self.changed.get(node.name, node)
            if changed is not None:
                emit(changed)
        program = without_dead_code(replace(self.program, nodes=tuple(nodes)))
        places = {name: self.places[name] for name in program.types}
        per_call = {name for name in places if name.removesuffix(_UNIT) in self.placed.per_call}
        return Placed(program, places, frozenset(per_call))

    # ---- what can be folded --------------------------------------------------------------------------------

    def _foldable(self, norm: Node) -> _Readers | None:
        gamma, beta = self._affine(norm)
        axes = norm.args[1]
        if (
            self.places[norm.name] is not Place.SECRET or norm.name in self.outputs or gamma is None
            or not isinstance(axes, Sequence) or len(axes) != 1 or not self._is_weight(gamma, 1)
            or (beta is not None and not self._is_weight(beta, 1))
            or (self.measured is not None and _unit(norm) not in self.measured)
        ):  # fmt: skip
            return None
        found = _Readers()
        return (
            found
            if all(self._takes(reader, norm, norm, gamma, found) for reader in self.readers[norm.name])
            else None
        )

    def _takes(self, reader: Node, value: Node, norm: Node, gamma: Ref, found: _Readers) -> bool:
        """Whether a reader of the norm's rows can do without their gain; it is put into ``found``."""
        read = Ref(value.name)
        place = {_LINEAR: 0, _ADDMM: 1}.get(reader.target)
        if place is not None and reader.args[place] == read and self._own(reader, place + 1):
            found.layers.append(reader)
        elif (
            reader.target == _ADD
            and value is norm
            and (layer := self._beside(reader, norm, gamma)) is not None
        ):
            found.sums.append((reader, layer))
        elif (
            reader.target in _PASSING
            and reader.shape[-1:] == norm.shape[-1:]
            and reader.name not in self.outputs
        ):
            last = len(value.shape) - 1
            if reader.target != _RESHAPE and int(reader.args[1]) % len(value.shape) == last:
                return False
            found.passing.append(reader)
            others = self.readers[reader.name]
            return bool(others) and all(self._takes(other, reader, norm, gamma, found) for other in others)
        else:
            return False
        return True

    def _affine(self, norm: Node) -> tuple[Ref | None, Ref | None]:
        found = [norm.args[i] if i is not None and i < len(norm.args) else None for i in _NORMS[norm.target]]
        gamma, beta = (arg if isinstance(arg, Ref) else None for arg in found)
        return gamma, beta

    def _is_weight(self, arg: Arg, dims: int) -> bool:
        """Whether whoever holds the weights knows it before any call."""
        return (
            isinstance(arg, Ref) and self.places[arg.name] in _KNOWN and arg.name not in self.placed.per_call
            and len(self.program.types[arg.name][0]) == dims
        )  # fmt: skip

    def _own(self, layer: Node, place: int) -> bool:
        """Whether a layer's weight is its own, so that changing it leaves no copy, and all of it is known."""
        weight = layer.args[place]
        rest = [arg for i, arg in enumerate(layer.args) if isinstance(arg, Ref) and self._is_weight(arg, 1)]
        refs = [arg for arg in layer.args if isinstance(arg, Ref)]
        return (
            self._is_weight(weight, 2) and isinstance(weight, Ref) and len(self.readers[weight.name]) == 1
            and len(refs) == 2 + len(rest) and not layer.kwargs and layer.name not in self.changed
        )  # fmt: skip

    def _beside(self, add: Node, norm: Node, gamma: Ref) -> Node | None:
        """The layer whose result is added to the norm's, if nobody else reads it and its weights, with the norm's, are
        secret."""
        others = [arg for arg in add.args if arg != Ref(norm.name)]
        if (
            len(others) != 1
            or add.kwargs
            or add.shape != norm.shape
            or self.places[gamma.name] is not Place.OWNER
        ):
            return None
        layer = self.nodes.get(others[0].name) if isinstance(others[0], Ref) else None
        if layer is None or layer.target != _LINEAR or self.places[layer.name] is not Place.SECRET:
            return None
        x, weight = layer.args[0], layer.args[1]
        bias = layer.args[2] if len(layer.args) > 2 else None
        alone = len(self.readers[layer.name]) == 1 and layer.name not in self.outputs
        hidden = isinstance(weight, Ref) and self.places[weight.name] is Place.OWNER
        secret = isinstance(x, Ref) and self.places[x.name] is Place.SECRET
        shifts = [shift for shift in (bias, self._affine(norm)[1]) if shift is not None]
        known = all(self._is_weight(shift, 1) for shift in shifts)
        # A shift that is public as a whole would be added by itself.
        given = not shifts or any(self.places[s.name] is Place.OWNER for s in shifts if isinstance(s, Ref))
        fits = layer.shape == add.shape and not layer.kwargs
        return layer if alone and hidden and secret and known and given and fits else None

    # ---- folding -------------------------------------------------------------------------------------------

    def _fold(self, norm: Node, readers: _Readers) -> None:
        gamma, beta = self._affine(norm)
        assert gamma is not None
        args = list(norm.args)
        for place in _NORMS[norm.target]:
            if place is not None and place < len(args):
                args[place] = None
        unit = replace(norm, name=_unit(norm), args=tuple(args))
        self.changed[norm.name], self.places[unit.name] = unit, Place.SECRET
        for value in readers.passing:
            self._change(value, tuple(Ref(unit.name) if arg == Ref(norm.name) else arg for arg in value.args))
        for layer in readers.layers:
            self._fold_into(layer, Ref(unit.name), norm, gamma, beta)
        for add, beside in readers.sums:
            layer = self._latest(beside)
            bias = layer.args[2] if len(layer.args) > 2 else None
            if beta is not None:
                bias = beta if bias is None else self._weight(add, "aten.add.Tensor", bias, beta)
            self.changed[add.name] = replace(
                add, target=LINEAR_PLUS, args=(layer.args[0], layer.args[1], bias, Ref(unit.name), gamma),
                module_path=layer.module_path,
            )  # fmt: skip
            self.changed[beside.name] = None

    def _fold_into(self, layer: Node, unit: Ref, norm: Node, gamma: Ref, beta: Ref | None) -> None:
        """x W^T + b, or b + x W, with the norm's gain in W and its shift in b."""
        turned = layer.target == _LINEAR
        x, weight = (layer.args[0], layer.args[1]) if turned else (layer.args[1], layer.args[2])
        bias = layer.args[0] if not turned else layer.args[2] if len(layer.args) > 2 else None
        assert isinstance(weight, Ref)
        column = gamma if turned else self._weight(layer, "aten.unsqueeze.default", gamma, 1)
        new = self._weight(layer, "aten.mul.Tensor", weight, column)
        if beta is not None:
            rows = weight if turned else self._weight(layer, "aten.transpose.int", weight, 0, 1)
            bias = self._weight(layer, _LINEAR, beta, rows, *([] if bias is None else [bias]))
        x = unit if x == Ref(norm.name) else x
        self._change(layer, (x, new, bias) if turned else (bias, x, new))

    def _latest(self, node: Node) -> Node:
        return self.changed.get(node.name) or node

    def _change(self, node: Node, args: tuple[Arg, ...]) -> None:
        self.changed[node.name] = replace(node, args=args)

    def _weight(self, reader: Node, target: str, *args: Arg) -> Ref:
        """A value that whoever holds the weights computes; one for the same arguments."""
        refs = [arg for arg in args if isinstance(arg, Ref)]
        verb = target.split(".")[1]
        name = f"{refs[0].name}_{verb}" + "".join(f"_{ref.name}" for ref in refs[1:])
        if name not in self.derived:
            node = Node(name, target, args, {}, reader.module_path, self._shape(target, args), reader.dtype)
            self.derived[name] = node
            owned = any(self.places[ref.name] is Place.OWNER for ref in refs)
            self.places[name] = Place.OWNER if owned else Place.PUBLIC
        return Ref(name)

    def _shape(self, target: str, args: tuple[Arg, ...]) -> tuple[int, ...]:
        shapes = [self._size(arg) for arg in args if isinstance(arg, Ref)]
        if target == "aten.transpose.int":
            return shapes[0][::-1]
        if target == "aten.unsqueeze.default":
            return (*shapes[0], 1)
        return shapes[1][:1] if target == _LINEAR else tuple(torch.broadcast_shapes(*shapes))

    def _size(self, ref: Ref) -> tuple[int, ...]:
        made = self.derived.get(ref.name)
        return self.program.types[ref.name][0] if made is None else made.shape


def _unit(norm: Node) -> str:
    """What a norm without its gain is called."""
    return f"{norm.name}{_UNIT}"
