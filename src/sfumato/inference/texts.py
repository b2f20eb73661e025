"""Texts as padded batches of tokens, and those that ranges are measured on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import JobError

__all__ = ["BUCKETS", "TEXTS", "bucket_of", "padded", "rows_of", "streams", "tokenized"]

#: Lengths that a text may be padded to: which of them is public, and nothing else about the length.
BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_SEED, _VARIED = 11, 8

#: Of many kinds and lengths; not secret, and not in any data set that results are given for.
TEXTS = (
    "The meeting has been moved to Thursday at ten.",
    "I loved every minute of it, and so did my sister.",
    "What a waste of an evening!",
    "Water boils at a lower temperature in the mountains than it does by the sea.",
    "She opened the letter, read it twice, and put it back without a word.",
    "How do I return a parcel that was delivered to the wrong address?",
    "The committee approved the budget after a debate of almost five hours, with two members abstaining.",
    "Add two eggs, a pinch of salt and 250 g of flour, then stir until the dough is smooth.",
    "It was neither as good as its friends say nor as bad as its enemies hope.",
    "Rain is expected in the north; the south stays dry, with highs of 24 degrees.",
    "My order number is 48213 and nothing has arrived yet.",
    "The museum, which opened in 1902, keeps more than 12,000 drawings.",
    "Not bad. Not bad at all.",
    "He asked whether the patient had taken any other medicine that week.",
    "In the beginning the universe was created. This made some people angry.",
    "Please find attached the signed contract and let me know if anything is missing.",
    "The film starts slowly, finds its feet in the second act and ends with a scene that nobody will forget.",
    "def add(a, b): return a + b",
    "Shares fell by 3.2 % on Monday after the company cut its forecast for the year.",
    "To whom it may concern: the undersigned hereby confirms receipt.",
    "Birds were singing; the old gate creaked; nobody came.",
    "Is it true that the river was once so clean that one could drink from it?",
    "Terrible service, cold food, and the bill was wrong.",
    "Thank you so much for your kind help, it made our day.",
)  # fmt: skip


def bucket_of(count: int, limit: int, *, exact: bool = False, buckets: Sequence[int] = BUCKETS) -> int:
    """The length that ``count`` tokens are padded to, at most ``limit``; ``exact``: to none.

    Raises:
        JobError: there are more tokens than ``limit``.
    """
    if count > limit:
        raise JobError(
            f"a text of {count} tokens is longer than max_length={limit}; shorten it, or raise max_length"
        )
    return count if exact else min(next((size for size in buckets if size >= count), limit), limit)


def tokenized(
    tokenizer: Any, texts: Sequence[Any], limit: int, names: Sequence[str]
) -> list[dict[str, list[int]]]:
    """What the tokenizer makes of each text (or pair of texts), of what the model takes.

    Raises:
        JobError: a text is too long, or empty.
    """
    found = []
    for text in texts:
        pair = text if isinstance(text, tuple) else (text,)
        if not all(isinstance(part, str) for part in pair) or len(pair) > 2:
            raise JobError("give texts as strings, or pairs of texts as tuples of two strings")
        made = tokenizer(*pair, add_special_tokens=True)
        if not made["input_ids"]:
            raise JobError("a text without tokens has nothing to compute on; give some text")
        bucket_of(len(made["input_ids"]), limit)
        found.append({name: list(made[name]) for name in ("input_ids", *names) if name in made})
    return found


def padded(rows: Sequence[dict[str, list[int]]], length: int, pad: int) -> dict[str, Tensor]:
    """Tensors (rows, length) with padding at the end, and the ``attention_mask`` that tells it."""
    names = dict.fromkeys(name for row in rows for name in row)
    filled = {
        name: torch.tensor(
            [row[name] + [pad if name == "input_ids" else 0] * (length - len(row[name])) for row in rows]
        )
        for name in names
    }
    sizes = torch.tensor([[len(row["input_ids"])] for row in rows])
    return {**filled, "attention_mask": (torch.arange(length)[None] < sizes).to(torch.int64)}


def rows_of(
    tokenizer: Any, texts: Sequence[Any], length: int, names: Sequence[str], table: Tensor
) -> list[Any]:
    """Rows to measure ranges on: the texts, cut to ``length``, and rows of tokens drawn at random, every other with the
    tokens whose embeddings (rows of ``table``) are largest and smallest: a text of the caller holds other tokens."""
    rows = []
    for text in texts:
        made = tokenizer(*(text if isinstance(text, tuple) else (text,)), truncation=True, max_length=length)
        rows.append({name: list(made[name])[:length] for name in ("input_ids", *names) if name in made})
    for ids in _varied(table, length):
        blank: dict[str, list[int]] = {name: [0] * length for name in rows[0]}
        rows.append({**blank, "input_ids": ids})
    return rows


def _varied(table: Tensor, length: int) -> Iterator[list[int]]:
    source = torch.Generator().manual_seed(_SEED)
    by_size, some = table.detach().norm(dim=1).argsort(), max(1, min(length // 4, table.shape[0] // 4))
    for i in range(_VARIED):
        row = torch.randint(table.shape[0], (length,), generator=source)
        if i % 2 == 0:
            row[torch.randperm(length, generator=source)[:some]] = by_size[:some]
            row[torch.randperm(length, generator=source)[:some]] = by_size[-some:]
        yield row.tolist()


def streams(tokenizer: Any, texts: Sequence[str], length: int, table: Tensor) -> list[list[int]]:
    """Rows of at least ``length`` tokens to write on from: each text and those that follow it."""
    known = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    known = [ids for ids in known if ids]
    if not known:
        raise JobError("calibration has no text with a token in it; give at least one")
    rows = []
    for i in range(len(known)):
        row, k = list(known[i]), i
        while len(row) < length:
            k += 1
            row += known[k % len(known)]
        rows.append(row[:length])
    return [*rows, *_varied(table, length)]
