"""Batches by number: batch n of a seed is the same in every run, so that a training which goes on repeats nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .corpora import language, sentences

__all__ = ["Batch", "Blocks", "Rows", "encode_blocks", "encode_sentences", "mask_pieces"]

#: Batches among which sentences are sorted by length, so that little of a batch is padding.
_POOL = 16
#: Longest sentence, in pieces; longer ones are cut.
LONGEST = 64


class Batch(NamedTuple):
    """``ids`` (N, L) int64, ``mask`` (N, L) int64 with 0 where there is padding, ``labels``: classes (N,), or for a
    language model the ids themselves."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


def padded(rows: list[list[int]], labels: list[int], pad: int) -> Batch:
    """Rows of pieces as one batch, as long as the longest."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    return Batch(ids, mask, torch.tensor(labels))


class Rows:
    """Shuffled batches of labelled sentences; an incomplete last batch is left out."""

    def __init__(self, rows: list[list[int]], labels: list[int], pad: int, batch: int, seed: int) -> None:
        self.rows, self.labels, self.pad, self.seed = rows, labels, pad, seed
        self.batch = min(batch, len(rows))
        self.lengths = torch.tensor([len(row) for row in rows])
        self._epoch, self._order = -1, torch.empty(0, 0, dtype=torch.long)

    def _batches(self, epoch: int) -> Tensor:
        """Indices (batches, batch) of one pass: sorted by length within a pool, the batches in random order."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            order = torch.randperm(len(self.rows), generator=generator)
            pools = [pool[self.lengths[pool].argsort()] for pool in order.split(_POOL * self.batch)]
            flat = torch.cat(pools)
            batches = flat[: len(flat) // self.batch * self.batch].view(-1, self.batch)
            self._epoch, self._order = epoch, batches[torch.randperm(len(batches), generator=generator)]
        return self._order

    def __call__(self, number: int) -> Batch:
        epoch, place = divmod(number, len(self.rows) // self.batch)
        chosen = self._batches(epoch)[place].tolist()
        return padded([self.rows[k] for k in chosen], [self.labels[k] for k in chosen], self.pad)

    def in_order(self) -> list[Batch]:
        """Everything once, the last batch shorter, without shuffling."""
        steps = range(0, len(self.rows), self.batch)
        ends = [(start, start + self.batch) for start in steps]
        return [padded(self.rows[a:b], self.labels[a:b], self.pad) for a, b in ends]


class Blocks:
    """Blocks of ``length`` pieces at random places of one long text."""

    def __init__(self, stream: Tensor, length: int, batch: int, seed: int) -> None:
        if len(stream) < length + 1:
            raise ValueError(f"a text of {len(stream)} pieces has no block of {length}; name a longer text")
        self.stream, self.length, self.batch, self.seed = stream, length, batch, seed

    def _at(self, starts: Tensor) -> Batch:
        ids = self.stream[starts[:, None] + torch.arange(self.length)]
        return Batch(ids, torch.ones_like(ids), ids)

    def __call__(self, number: int) -> Batch:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + number)
        return self._at(torch.randint(len(self.stream) - self.length + 1, (self.batch,), generator=generator))

    def in_order(self) -> list[Batch]:
        """The text once, block after block; what is left at the end is left out."""
        starts = torch.arange(0, len(self.stream) - self.length + 1, self.length)
        return [self._at(part) for part in starts.split(self.batch)]


def encode_sentences(tokenizer: Any, data: Any, task: str, *, train: bool, batch: int, seed: int) -> Rows:
    """Batches of a task of ``CLASSIFIED``, cut to :data:`LONGEST` pieces."""
    found = sentences(data, task, train=train)
    rows = tokenizer(found.texts, truncation=True, max_length=LONGEST)["input_ids"]
    return Rows(rows, found.labels, tokenizer.pad_token_id, batch, seed)


def encode_stream(tokenizer: Any, texts: list[str], between: str = "\n") -> Tensor:
    """One long row of pieces, ``between`` after every text."""
    encoded = tokenizer.backend_tokenizer.encode_batch(
        [text + between for text in texts], add_special_tokens=False
    )
    return torch.tensor([piece for encoding in encoded for piece in encoding.ids])


def encode_blocks(
    tokenizer: Any, data: Any, task: str, *, train: bool, length: int, batch: int, seed: int
) -> Blocks:
    """Blocks of a task of ``MODELLED``."""
    between = "\n" if task == "wikitext2" else "\n\n"
    stream = encode_stream(tokenizer, language(data, task, train=train), between)
    return Blocks(stream, length, batch, seed)


def mask_pieces(ids: Tensor, tokenizer: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """BERT's masking: 15 % of the pieces are to be found; of these 80 % are masked, 10 % replaced, 10 % left.

    Returns the changed ids and a boolean tensor of the places to be found, both shaped like ``ids``. Special and
    unknown pieces are never chosen.
    """
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    chosen = (torch.rand(ids.shape, generator=generator) < 0.15) & ~special
    chance = torch.rand(ids.shape, generator=generator)
    drawn = torch.randint(len(tokenizer), ids.shape, generator=generator)
    changed = torch.where(chosen & (chance < 0.8), tokenizer.mask_token_id, ids)
    changed = torch.where(chosen & (chance >= 0.9), drawn, changed)
    return changed, chosen
