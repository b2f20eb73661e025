"""What a plan is asked to take and to give, so that values and weights can pass from one plan to another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sfumato.errors import JobError
from sfumato.graph.formats import Format
from sfumato.graph.places import Place, Placed
from sfumato.graph.plan import Plan
from sfumato.graph.program import Program, Ref
from sfumato.graph.structure import leaves
from sfumato.types import Secret

__all__ = ["NO_EDGES", "Edges", "activations", "argument_type", "check_handed", "result_type", "stricter"]


@dataclass(frozen=True, slots=True)
class Edges:
    """Formats at the edges of a plan of mixed rings; what is not named is up to its calls.

    ``arguments``: by name, and ``results``: by place; exactly so, with a cast where the calls want something else.
    ``weights``: secret ones by the name of the value that is shared, in a ring as wide and with as few fraction bits at
    least; calls in Z32 shorten a weight in Z64 where they read it, which is local.
    """

    arguments: Mapping[str, Format] = field(default_factory=dict)
    results: Mapping[int, Format] = field(default_factory=dict)
    weights: Mapping[str, Format] = field(default_factory=dict)

    def inputs(self, placed: Placed) -> dict[str, Format]:
        """The formats of ``arguments`` by input.

        Raises:
            JobError: no such argument, or one that is not secret.
        """
        found = {}
        for argument, format in self.arguments.items():
            name = _input(placed.program, argument)
            if placed.places[name] is not Place.SECRET:
                raise JobError(
                    f"the argument {argument} is not secret and has no format; leave it out of the edges"
                )
            found[name] = format
        return found

    def outputs(self, placed: Placed) -> dict[str, Format]:
        """The formats of ``results`` by value.

        Raises:
            JobError: no such result, one that is not secret, or one value asked for in two formats.
        """
        found: dict[str, Format] = {}
        for place, format in self.results.items():
            name = _output(placed.program, place)
            if placed.places[name] is not Place.SECRET:
                raise JobError(
                    f"the result {place} is not secret and has no format; leave it out of the edges"
                )
            if found.setdefault(name, format) != format:
                raise JobError(
                    f"the value {name} is several results, in {format} and {found[name]}; ask for one of them"
                )
        return found

    def most(self, weight: str, frac: int) -> int:
        """Fraction bits of a weight in Z32: those that a call has room for, and no more than its other readers."""
        given = self.weights.get(weight)
        return frac if given is None or given.ring == "Z64" else min(frac, given.frac)

    def short_fracs(self) -> Iterator[int]:
        """Fraction bits of what comes and goes in Z32, without whole numbers."""
        for format in (*self.arguments.values(), *self.results.values()):
            if format.ring == "Z32" and format.frac > 0:
                yield format.frac


NO_EDGES = Edges()


def stricter(first: Format, *others: Format) -> Format:
    """The format that serves all calls which want one of these: Z64 if any of them does, else the fewest fraction
    bits."""
    formats = (first, *others)
    wide = [format for format in formats if format.ring == "Z64"]
    return max(wide) if wide else min(formats)


def activations(plan: Plan) -> Format | None:
    """The one format of all results of calls in Z32; None where no call works there."""
    found = (
        plan.format_of(n.name) for n in plan.secret_nodes if not n.target.endswith((".shorten", ".widen"))
    )
    return next((format for format in found if format.ring == "Z32" and format.frac > 0), None)


def argument_type(plan: Plan, argument: str) -> Secret:
    """Ring, fraction bits and shape in which a plan takes a secret argument.

    Raises:
        JobError: it has no such argument.
    """
    return plan.secret_type(_input(plan.program, argument))


def result_type(plan: Plan, place: int) -> Secret:
    """The same of the secret result at this place.

    Raises:
        JobError: it has no such result.
    """
    return plan.secret_type(_output(plan.program, place))


def check_handed(source: Plan, place: int, target: Plan, argument: str) -> None:
    """Whether one plan's result at ``place`` is what the other takes as ``argument``.

    Raises:
        JobError: they differ in ring, fraction bits or shape.
    """
    given, taken = result_type(source, place), argument_type(target, argument)
    whole = given.frac == 0  # words without fraction bits are lifted where they are read
    if (given.ring, given.shape) != (taken.ring, taken.shape) or not (whole or given.frac == taken.frac):
        raise JobError(
            f"the result {place} of {source.program.title} is {given}, and {target.program.title} takes {taken} as "
            f"{argument}; ask both plans for one format (edges=)"
        )


def _input(program: Program, argument: str) -> str:
    found = list(leaves(program.arguments[argument])) if argument in program.arguments else []
    if len(found) != 1:
        raise JobError(
            f"{program.title} has no argument {argument!r} that is one tensor; it has {', '.join(program.arguments)}"
        )
    return found[0]


def _output(program: Program, place: int) -> str:
    found = program.outputs[place] if 0 <= place < len(program.outputs) else None
    if not isinstance(found, Ref):
        raise JobError(
            f"{program.title} has no result {place} that is a tensor; it has {len(program.outputs)} results"
        )
    return found.name
