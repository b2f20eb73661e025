"""Nested arguments and results as plain JSON trees, so that a plan can be sent and results keep their
module's structure.

A tree is a one-key dict: ``leaf`` (the name of a value), ``const`` (a plain constant), ``list``, ``tuple``,
``dict`` (key-value pairs) or ``class`` (a mapping or named tuple of a class that the reader looks up among
loaded modules).
"""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from sfumato.errors import CaptureError, JobError

__all__ = ["Tree", "describe", "leaves", "match", "rebuild"]

Tree = dict[str, Any]
_PLAIN = (bool, int, float, str, type(None))


def describe(value: Any, leaf: Callable[[Any], Tree]) -> Tree:
    """The tree of a nested value; ``leaf`` turns each leaf, in depth-first order, into its tree."""
    if _is_leaf(value):
        return leaf(value)
    if type(value) is list or type(value) is tuple:
        return {type(value).__name__: [describe(v, leaf) for v in value]}
    items = list(_items(value))
    pairs = [[key, describe(v, leaf)] for key, v in items]
    if type(value) is dict or type(value) is OrderedDict:
        return {"dict": pairs}
    return {"class": f"{type(value).__module__}:{type(value).__qualname__}", "fields": pairs}


def _is_leaf(value: Any) -> bool:
    if isinstance(value, Tensor | Mapping | list | tuple):
        return isinstance(value, Tensor)
    return not (dataclasses.is_dataclass(value) and not isinstance(value, type))


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)
    elif dataclasses.is_dataclass(value):
        yield from ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    else:
        raise CaptureError(
            f"a value of type {type(value).__name__} is neither a tensor nor a list, tuple, dict or dataclass"
        )


def leaves(tree: Tree) -> Iterator[str]:
    """The leaf names of a tree in order."""
    if "leaf" in tree:
        yield tree["leaf"]
    for child in _children(tree):
        yield from leaves(child)


def _children(tree: Tree) -> list[Tree]:
    for kind in ("list", "tuple"):
        if kind in tree:
            return list(tree[kind])
    return [child for _, child in _pairs(tree)]


def _pairs(tree: Tree) -> list[Any]:
    found: list[Any] = tree["dict"] if "dict" in tree else tree.get("fields", [])
    return found


def rebuild(tree: Tree, leaf: Callable[[str], Any]) -> Any:
    """The nested value of a tree; ``leaf`` gives each leaf's value by name.

    A class is used only if its module is loaded already (nothing is ever imported by name); else a dict
    stands for it.
    """
    if "leaf" in tree:
        return leaf(tree["leaf"])
    if "const" in tree:
        return tree["const"]
    if "list" in tree:
        return [rebuild(child, leaf) for child in tree["list"]]
    if "tuple" in tree:
        return tuple(rebuild(child, leaf) for child in tree["tuple"])
    if "dict" in tree:
        return {key: rebuild(child, leaf) for key, child in tree["dict"]}
    fields = {key: rebuild(child, leaf) for key, child in tree["fields"]}
    found = _loaded_class(tree["class"])
    return fields if found is None else found(**fields)


def _loaded_class(name: str) -> Callable[..., Any] | None:
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        return None
    plain_record = (
        dataclasses.is_dataclass(found) or hasattr(found, "_fields") or issubclass(found, OrderedDict)
    )
    return found if plain_record else None


def match(tree: Tree, value: Any, where: str, found: dict[str, Any]) -> None:
    """Collect into ``found`` the leaves of ``value``, which must have the structure of ``tree``.

    Raises:
        JobError: another structure, or another constant than the captured one; the sentence names the
        argument.
    """
    if "leaf" in tree:
        found[tree["leaf"]] = value
        return
    if "const" in tree:
        same = (
            value is None if tree["const"] is None else isinstance(value, _PLAIN) and value == tree["const"]
        )
        if not same:
            raise JobError(
                f"the argument {where} was captured as the constant {tree['const']!r}; "
                "capture the module again to change it"
            )
        return
    if "list" in tree or "tuple" in tree:
        children = _children(tree)
        if not isinstance(value, list | tuple) or len(value) != len(children):
            raise JobError(
                f"the argument {where} must be a list or tuple of {len(children)} values, as it was captured"
            )
        for i, child in enumerate(children):
            match(child, value[i], f"{where}[{i}]", found)
        return
    given = dict(_items(value)) if not _is_leaf(value) else {}
    pairs = _pairs(tree)
    if set(given) != {key for key, _ in pairs}:
        raise JobError(
            f"the argument {where} must have the keys {', '.join(str(k) for k, _ in pairs)}, as captured"
        )
    for key, child in pairs:
        match(child, given[key], f"{where}.{key}", found)
