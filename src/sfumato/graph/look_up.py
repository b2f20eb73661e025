"""Row numbers of secret tables: which values of a program a client shares as such, and that nothing else takes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from sfumato.graph.program import Arg, Node, Ref, refs_of
from sfumato.ring import dpf
from sfumato.types import Z64

__all__ = ["LOOK_UP", "index_problems", "is_index", "numbers_are_lighter", "rows_of"]

LOOK_UP = "sfumato.look_up"
#: The client's side of a look-up: (ids, rows) and (indices, leading axes of the table).
_NUMBERS, _POSITIONS = "sfumato.row_numbers", "sfumato.row_positions"


def numbers_are_lighter(rows: int) -> bool:
    """Whether a number's keys are less to upload than its one-hot row: six keys, or two of three components in words.

    For words of 64 bits: from 44 rows on. What the parties send one another is the same.
    """
    return 6 * dpf.key_bytes(rows, Z64) < 2 * rows * Z64.dtype.itemsize


def is_index(node: Node | None) -> bool:
    """Whether a client shares this value as row numbers."""
    return node is not None and node.target in (_NUMBERS, _POSITIONS)


def rows_of(node: Node) -> int:
    """How many rows the table of these row numbers has."""
    size = node.args[1]
    return math.prod(size) if isinstance(size, tuple) else int(size)


def index_problems(nodes: Iterable[Node], by_name: Mapping[str, Node]) -> list[str]:
    """One line for each of these secret calls that takes row numbers and is no look-up, or the other way round."""
    found = []
    for node in nodes:
        given: tuple[Arg, ...] = (*node.args, *node.kwargs.values())
        first, rest = (given[:1], given[1:]) if node.target == LOOK_UP else ((), given)
        wrong = [name for name in refs_of(rest) if is_index(by_name.get(name))]
        where = f"{node.target} at {node.module_path or 'the root'} ({node.name})"
        if node.target == LOOK_UP and not (
            len(node.args) == 2 and isinstance(first[0], Ref) and is_index(by_name.get(first[0].name))
        ):
            found.append(f"{where}: it takes row numbers and a table")
        elif wrong:
            found.append(f"{where}: row numbers are only looked up")
    for node in by_name.values():
        if is_index(node) and not (len(node.args) == 2 and _is_size(node.args[1]) and rows_of(node) > 0):
            found.append(f"{node.target} ({node.name}): row numbers of no table")
    return found


def _is_size(value: object) -> bool:
    return type(value) is int or (isinstance(value, tuple) and all(type(n) is int for n in value))
