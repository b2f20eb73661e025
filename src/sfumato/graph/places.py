"""The secrecy pass: where every value of a program lives, and the rewrites that follow from it.

==========  ===============================================================================================
PUBLIC      from public weights, constants and public inputs only: known to all
OWNER       from secret weights and constants only: the model owner computes it once, in float, and shares it
CLIENT      from public values and inputs that the client knows in clear: it computes, in float, and shares
what is used SECRET      everything else: runs under the protocol ==========
==========================================================================================================

Nothing that one side does not know by itself reaches it: a value is moved to a side only if that side knows
every input.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase

from sfumato.errors import JobError
from sfumato.graph.normalize import without_dead_code
from sfumato.graph.program import Input, Node, Program
from sfumato.graph.rewrite import FORMS, Rewriter
from sfumato.graph.structure import leaves

__all__ = ["SECRETS", "Place", "Placed", "place"]

#: What a plan may keep secret.
SECRETS = ("inputs", "inputs+weights")


class Place(StrEnum):
    """Where a value lives."""

    PUBLIC = "public"
    OWNER = "owner"
    CLIENT = "client"
    SECRET = "secret"


@dataclass(frozen=True)
class Placed:
    """A program, rewritten, with the place of every value. ``per_call``: what depends on an argument of the
    call."""

    program: Program
    places: Mapping[str, Place]
    per_call: frozenset[str]


def place(
    program: Program,
    *,
    secret: str,
    public: Iterable[str],
    client_known: Iterable[str],
    relocate: bool,
    public_weights: Iterable[str] = (),
) -> Placed:
    """Give every value its place; rewrite look-ups by client values into products, and fold batch norms.

    ``public_weights``: patterns (``fnmatch``) of weights that everyone may see although weights are secret.

    Raises:
        JobError: an unknown option or argument name, or a pattern that fits no weight.
    """
    if secret not in SECRETS:
        raise JobError(f"secret must be one of {', '.join(map(repr, SECRETS))}, not {secret!r}")
    public, client_known = frozenset(public), frozenset(client_known)
    for name in sorted(public | client_known):
        if name not in program.arguments and name not in {i.name for i in program.user_inputs}:
            raise JobError(
                f"the module has no captured argument {name!r}; it has {', '.join(program.arguments)}"
            )
    if public & client_known:
        raise JobError(
            f"the argument {sorted(public & client_known)[0]} cannot be public and known to the client alone"
        )
    patterns = tuple(public_weights)
    weights = [i.source for i in program.inputs if i.kind != "user"]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in weights):
            known = f", such as {weights[0]}" if weights else ""
            raise JobError(f"public_weights: {pattern!r} fits no weight of {program.title}{known}")
    placer = _Placer(program, secret, public, client_known, relocate, patterns)
    return placer.run()


class _Placer(Rewriter):
    """One walk over the program in order."""

    def __init__(
        self,
        program: Program,
        secret: str,
        public: frozenset[str],
        client_known: frozenset[str],
        relocate: bool,
        public_weights: tuple[str, ...],
    ) -> None:
        super().__init__(program)
        self.public_weights = public_weights
        self.secret_weights = secret == "inputs+weights"
        self.public, self.client_known, self.relocate = public, client_known, relocate
        self.places: dict[str, Place] = {}
        self.per_call: set[str] = set()
        self._looked_up: set[str] = set()  # CLIENT floats that were read from a weight
        self._uses = Counter(name for node in program.nodes for name in node.refs())
        self._uses.update(program.output_names)

    def run(self) -> Placed:
        argument = {leaf: key for key, tree in self.program.arguments.items() for leaf in leaves(tree)}
        for i in self.program.inputs:
            self.places[i.name] = self._input_place(i, argument.get(i.name, ""))
            if i.kind == "user":
                self.per_call.add(i.name)
        for node in self.program.nodes:
            form = FORMS.get(node.target)
            for emitted in (form(self, node) if form else None) or [node]:
                self.emit(emitted)
        names = {i.name for i in self.program.inputs} | {n.name for n in self.nodes}
        program = without_dead_code(replace(self.program, nodes=tuple(self.nodes)))
        places = {name: where for name, where in self.places.items() if name in names}
        return Placed(program, places, frozenset(self.per_call & names))

    def emit(self, node: Node) -> None:
        """Add a node and place it."""
        self.nodes.append(node)
        self.types[node.name] = (node.shape, node.dtype)
        self.places[node.name] = where = self._node_place(node)
        if any(name in self.per_call for name in node.refs()):
            self.per_call.add(node.name)
        if where is Place.CLIENT and self._reads_weights(node):
            self._looked_up.add(node.name)

    def used_once(self, name: str) -> bool:
        return self._uses[name] == 1

    def is_client(self, name: str) -> bool:
        return self.places[name] is Place.CLIENT

    def is_hidden(self, name: str) -> bool:
        return self.places[name] in (Place.OWNER, Place.SECRET)

    def is_secret(self, name: str) -> bool:
        return self.places[name] is Place.SECRET

    def _input_place(self, i: Input, argument: str) -> Place:
        if i.kind != "user":
            hidden = (
                self.secret_weights
                and i.dtype.is_floating_point
                and (i.persistent if i.kind != "constant" else i.shape != ())
                and not any(fnmatchcase(i.source, pattern) for pattern in self.public_weights)
            )
            return Place.OWNER if hidden else Place.PUBLIC
        given = {i.name, argument}
        if given & self.public:
            return Place.PUBLIC
        if given & self.client_known:
            return Place.CLIENT
        if i.shape == ():
            return Place.PUBLIC
        return Place.SECRET if i.dtype.is_floating_point else Place.CLIENT

    def _node_place(self, node: Node) -> Place:
        refs = node.refs()
        found = {self.places[name] for name in refs}
        if found <= {Place.PUBLIC}:
            return Place.PUBLIC
        if Place.SECRET in found:
            return Place.SECRET
        if Place.OWNER in found:
            if Place.CLIENT in found or any(name in self.per_call for name in refs):
                return Place.SECRET
            return Place.OWNER
        if not self.relocate and any(name in self._looked_up for name in refs):
            return Place.SECRET
        return Place.CLIENT

    def _reads_weights(self, node: Node) -> bool:
        """A float read from a weight by the client's integers: with ``relocate=False`` the client's work ends
        here."""
        clients = [name for name in node.refs() if self.is_client(name)]
        if any(name in self._looked_up for name in clients):
            return True
        from_integers = all(not self.types[name][1].is_floating_point for name in clients)
        return from_integers and node.dtype.is_floating_point and any(self._is_weight(n) for n in node.refs())

    def _is_weight(self, name: str) -> bool:
        return (
            self.places[name] is Place.PUBLIC
            and name not in self.per_call
            and math.prod(self.types[name][0]) > 1
        )
