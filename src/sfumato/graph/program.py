"""A captured model: a frozen list of ATen calls on named values, with its inputs, weights and outputs.

Programs travel as JSON and never as pickles; the weights are held aside and travel on their own.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sfumato.errors import CaptureError, JobError
from sfumato.graph.structure import Tree, leaves, match, rebuild

__all__ = ["Arg", "Input", "Node", "Program", "Ref", "canonical_json", "digest_of", "map_refs", "refs_of"]

FORMAT = 1
#: Calls that a program may name: torch's own without in-place writes and without files, and ours.
_TARGET = re.compile(r"aten\.(?!from_file\b|save\b)\w+(?<!(?<!_)[a-z0-9]_)\.\w+|sfumato\.\w+")


class Ref(NamedTuple):
    """The use of a named value."""

    name: str


#: Ref, plain scalar, string, dtype, None, or a tuple of these.
Arg = Any
InputKind = Literal["user", "parameter", "buffer", "constant"]


@dataclass(frozen=True, slots=True)
class Input:
    """A value that a program starts from. ``source``: the argument (``user``) or the attribute path (the
    others)."""

    name: str
    kind: InputKind
    source: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    persistent: bool = True


@dataclass(frozen=True, slots=True)
class Node:
    """One call. ``target`` is an ATen overload (``aten.linear.default``) or one of ours
    (``sfumato.one_hot``)."""

    name: str
    target: str
    args: tuple[Arg, ...]
    kwargs: Mapping[str, Arg]
    module_path: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def refs(self) -> list[str]:
        """Names of the values used, in order of use, each once."""
        return list(dict.fromkeys([*refs_of(self.args), *refs_of(tuple(self.kwargs.values()))]))

    def __str__(self) -> str:
        shown = [_show(a) for a in self.args] + [f"{k}={_show(v)}" for k, v in self.kwargs.items()]
        where = f"   # {self.module_path}" if self.module_path else ""
        return f"{self.name}: {_type_text(self.dtype, self.shape)} = {self.target}({', '.join(shown)}){where}"


def refs_of(arg: Arg) -> Iterator[str]:
    """Names of all values used in a nested argument."""
    if isinstance(arg, Ref):
        yield arg.name
    elif isinstance(arg, tuple):
        for item in arg:
            yield from refs_of(item)


def map_refs(arg: Arg, f: Callable[[str], Any]) -> Any:
    """A nested argument with every use of a value replaced by ``f(name)``."""
    if isinstance(arg, Ref):
        return f(arg.name)
    if isinstance(arg, tuple):
        return tuple(map_refs(item, f) for item in arg)
    return arg


@dataclass(frozen=True)
class Program:
    """A model as a list of calls. ``weights`` and ``examples`` (the capture's arguments) are not part of its
    identity."""

    title: str
    inputs: tuple[Input, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Arg, ...]
    result: Tree
    positional: tuple[str, ...]
    arguments: Mapping[str, Tree]
    weights: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    examples: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    # ---- parts ---------------------------------------------------------------------------------------------

    @cached_property
    def types(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every value."""
        return {v.name: (v.shape, v.dtype) for v in self._values()}

    def _values(self) -> Iterator[Input | Node]:
        yield from self.inputs
        yield from self.nodes

    @property
    def user_inputs(self) -> tuple[Input, ...]:
        return tuple(i for i in self.inputs if i.kind == "user")

    @property
    def output_names(self) -> list[str]:
        """Names of the values that are results, each once."""
        return list(dict.fromkeys(refs_of(self.outputs)))

    def last_uses(self) -> dict[str, list[str]]:
        """For each node name: the values that nobody needs after it."""
        last: dict[str, str] = {}
        for node in self.nodes:
            for name in node.refs():
                last[name] = node.name
        kept, freed = set(self.output_names), dict[str, list[str]]()
        for name, node_name in last.items():
            if name not in kept:
                freed.setdefault(node_name, []).append(name)
        return freed

    # ---- calls ---------------------------------------------------------------------------------------------

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """Tensors of a call by input name, checked against the captured structure, shapes and dtypes.

        Raises:
            JobError: one sentence on the argument that does not fit.
        """
        found = self.matched(args, kwargs)
        return {i.name: _checked(i, found[i.name]) for i in self.user_inputs}

    def matched(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The arguments of a call by input name, as they are: structure checked, values not.

        Raises:
            JobError: one sentence on the argument that is missing, unknown or given twice.
        """
        given = dict(zip(self.positional, args, strict=False))
        if len(args) > len(self.positional):
            raise JobError(
                f"{self.title} takes at most {len(self.positional)} positional arguments, not {len(args)}"
            )
        for key, value in (kwargs or {}).items():
            if key in given:
                raise JobError(f"the argument {key} was given twice")
            given[key] = value
        found: dict[str, Any] = {}
        for key, tree in self.arguments.items():
            if key in given:
                match(tree, given.pop(key), key, found)
            elif next(leaves(tree), None) is not None:
                raise JobError(f"the argument {key} is missing")
        for key, value in given.items():
            if value is not None:
                raise JobError(
                    f"the argument {key} was not part of the capture ({', '.join(self.arguments)}); "
                    "capture the module again with it"
                )
        return found

    def assemble(self, values: Mapping[str, Any]) -> Any:
        """The module's result structure from the values by name."""
        flat = {f"o{i}": map_refs(out, lambda name: values[name]) for i, out in enumerate(self.outputs)}
        return rebuild(self.result, lambda leaf: flat[leaf])

    # ---- text, JSON, identity ------------------------------------------------------------------------------

    def __str__(self) -> str:
        uses = dict.fromkeys(name for node in self.nodes for name in node.refs())
        lines = [f"program {self.title}"]
        for i in self.inputs:
            if i.kind == "user" or i.name in uses:
                lines.append(f"  {i.name}: {_type_text(i.dtype, i.shape)}   # {i.kind}")
        lines += [f"  {node}" for node in self.nodes]
        return "\n".join([*lines, f"  return {', '.join(_show(o) for o in self.outputs)}"])

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict without weights."""
        return {
            "format": FORMAT,
            "title": self.title,
            "inputs": [
                [i.name, i.kind, i.source, list(i.shape), _dtype_name(i.dtype), i.persistent]
                for i in self.inputs
            ],
            "nodes": [
                [n.name, n.target, [_encode(a) for a in n.args], {k: _encode(v) for k, v in n.kwargs.items()},
                 n.module_path, list(n.shape), _dtype_name(n.dtype)]
                for n in self.nodes
            ],
            "outputs": [_encode(o) for o in self.outputs],
            "result": self.result,
            "positional": list(self.positional),
            "arguments": dict(self.arguments),
        }  # fmt: skip

    @staticmethod
    def from_json(data: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> Program:
        """Read and verify what `to_json` wrote.

        Raises:
            CaptureError: not a program of this format.
        """
        try:
            if data["format"] != FORMAT:
                raise CaptureError(
                    f"a program of format {data['format']!r}; this release reads format {FORMAT}"
                )
            program = Program(
                title=str(data["title"]),
                inputs=tuple(
                    Input(str(n), kind, str(source), tuple(shape), _dtype(dtype), bool(persistent))
                    for n, kind, source, shape, dtype, persistent in data["inputs"]
                ),
                nodes=tuple(
                    Node(str(n), str(t), tuple(_decode(a) for a in args),
                         {k: _decode(v) for k, v in kw.items()}, str(path), tuple(shape), _dtype(dtype))
                    for n, t, args, kw, path, shape, dtype in data["nodes"]
                ),
                outputs=tuple(_decode(o) for o in data["outputs"]),
                result=dict(data["result"]),
                positional=tuple(data["positional"]),
                arguments=dict(data["arguments"]),
                weights=weights or {},
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise CaptureError(f"this is not the JSON of a program ({type(error).__name__})") from error
        program.verify()
        return program

    def digest(self) -> str:
        """Hex BLAKE2b over the canonical JSON; the same on every machine."""
        return digest_of(self.to_json())

    def verify(self) -> None:
        """Check that names are unique and defined before use, shapes are plain and targets well-formed.

        Raises:
            CaptureError: lists everything that is wrong.
        """
        problems: list[str] = []
        known: set[str] = set()
        for value in self._values():
            if isinstance(value, Node):
                problems += [
                    f"{value.name} uses {r} before it exists" for r in value.refs() if r not in known
                ]
                if not _TARGET.fullmatch(value.target):
                    problems.append(f"{value.name} has the unknown target {value.target}")
            if value.name in known:
                problems.append(f"{value.name} is defined twice")
            if not all(type(d) is int and d >= 0 for d in value.shape):
                problems.append(f"{value.name} has no fixed shape")
            known.add(value.name)
        problems += [f"the result {r} does not exist" for r in refs_of(self.outputs) if r not in known]
        if problems:
            raise CaptureError(f"the program of {self.title} is broken:", problems)


def _checked(i: Input, value: Any) -> Tensor:
    if isinstance(value, bool | int | float):
        value = torch.tensor(value)
    if not isinstance(value, Tensor):
        raise JobError(f"the argument {i.source} must be a tensor, not {type(value).__name__}")
    if tuple(value.shape) != i.shape:
        raise JobError(
            f"the argument {i.source} has shape {list(value.shape)}, but was captured with {list(i.shape)}; "
            "capture the module again for another shape"
        )
    if i.dtype.is_floating_point:
        return value.detach().to(torch.float32)
    if value.dtype.is_floating_point and not bool((value == value.round()).all()):
        raise JobError(f"the argument {i.source} must hold whole numbers")
    return value.detach().to(i.dtype)


# ---- JSON of arguments -------------------------------------------------------------------------------------


def _encode(arg: Arg) -> Any:
    if isinstance(arg, Ref):
        return {"ref": arg.name}
    if isinstance(arg, tuple):
        return [_encode(a) for a in arg]
    if isinstance(arg, torch.dtype):
        return {"dtype": _dtype_name(arg)}
    if isinstance(arg, float) and not math.isfinite(arg):
        return {"float": str(arg)}
    if arg is None or isinstance(arg, bool | int | float | str):
        return arg
    raise CaptureError(f"an argument of type {type(arg).__name__} cannot be part of a program")


def _decode(data: Any) -> Arg:
    if isinstance(data, list):
        return tuple(_decode(d) for d in data)
    if isinstance(data, dict):
        (kind, value), = data.items()  # fmt: skip
        readers: dict[str, Callable[[Any], Any]] = {"ref": Ref, "dtype": _dtype, "float": float}
        return readers[kind](value)
    return data


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no dtype {name!r}")
    return found


def _show(arg: Arg) -> str:
    if isinstance(arg, Ref):
        return arg.name
    if isinstance(arg, tuple):
        return f"[{', '.join(_show(a) for a in arg)}]"
    return _dtype_name(arg) if isinstance(arg, torch.dtype) else repr(arg)


def _type_text(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{_dtype_name(dtype)}[{', '.join(map(str, shape))}]"


def canonical_json(data: Any) -> str:
    """JSON text with one spelling per value, for hashing."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_of(data: Any) -> str:
    """Hex BLAKE2b (32 bytes) of a JSON-able value."""
    return hashlib.blake2b(canonical_json(data).encode(), digest_size=32).hexdigest()
