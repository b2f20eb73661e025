"""Vocabularies cut from the published ones to what the texts use: WordPiece for BERT-type, byte pairs for GPT-type.

A small model cannot pay for 30,000 or 50,000 rows of embeddings. The cut keeps the most frequent pieces of the texts
and whatever the tokenizer needs to spell everything else with them.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import BertTokenizerFast, GPT2TokenizerFast

from ..data import DataError

__all__ = ["byte_pairs", "cut_merges", "cut_pieces", "word_pieces"]

WORD_PIECES, BYTE_PAIRS = 8_192, 4_096
#: Longest sequence of both kinds of model.
POSITIONS = 128
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_END = "<|endoftext|>"


def _find(data: Path, name: str) -> Path:
    found = sorted(data.rglob(name))
    if not found:
        raise DataError(f"{data}: no file {name} below it (the published vocabulary that is cut)")
    return found[0]


def cut_pieces(known: list[str], counts: Counter[str], size: int) -> list[str]:
    """The special pieces, all single characters that occur, then the most frequent pieces; in the published order.

    With every character that occurs, alone and after the start of a word, each word of the texts can be spelt.
    """
    letters = {letter for piece in counts for letter in piece.removeprefix("##")}
    single = {piece for piece in known if len(piece.removeprefix("##")) == 1 and piece[-1] in letters}
    kept = set(_SPECIAL) | single
    for piece, _ in counts.most_common():
        if len(kept) >= size:
            break
        kept.add(piece)
    return [piece for piece in known if piece in kept]


def word_pieces(data: Path, texts: list[str], size: int = WORD_PIECES) -> Any:
    """A BERT tokenizer with at most ``size`` pieces (more only if the single characters alone are more)."""
    known = _find(data, "bert_uncased_vocab.txt").read_text("utf-8").split("\n")
    known = [piece for piece in known if piece]
    full = BertTokenizerFast(vocab={piece: place for place, piece in enumerate(known)})
    counts: Counter[str] = Counter()
    for encoding in full.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
        counts.update(encoding.tokens)
    kept = cut_pieces(known, counts, size)
    vocabulary = {piece: place for place, piece in enumerate(kept)}
    return BertTokenizerFast(vocab=vocabulary, model_max_length=POSITIONS)


def cut_merges(merges: list[tuple[str, str]], counts: Counter[str], size: int) -> list[tuple[str, str]]:
    """The merges that the most frequent pieces are made by, in the published order, at most ``size`` pieces in all
    with the 256 bytes and the end mark."""
    made = {left + right: (left, right) for left, right in reversed(merges)}

    def needed(piece: str, into: set[str]) -> set[str]:
        if piece in made and piece not in into:
            into.add(piece)
            for part in made[piece]:
                needed(part, into)
        return into

    kept: set[str] = set()
    for piece, _ in counts.most_common():
        wanted = needed(piece, set()) - kept
        if len(kept) + len(wanted) + 257 <= size:
            kept |= wanted
    return [pair for pair in merges if pair[0] + pair[1] in kept and made[pair[0] + pair[1]] == pair]


def byte_pairs(data: Path, texts: list[str], size: int = BYTE_PAIRS) -> Any:
    """A GPT-2 tokenizer with at most ``size`` pieces. Byte pairs spell every text."""
    vocabulary: dict[str, int] = json.loads(_find(data, "gpt2_encoder.json").read_text("utf-8"))
    lines = _find(data, "gpt2_vocab.bpe").read_text("utf-8").split("\n")
    merges = [(a, b) for a, _, b in (line.partition(" ") for line in lines[1:]) if a and b]
    full = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    full.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    counts: Counter[str] = Counter()
    for encoding in full.encode_batch(texts):
        counts.update(encoding.tokens)
    kept = cut_merges(merges, counts, size)
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in kept), _END]
    return GPT2TokenizerFast(
        vocab={piece: place for place, piece in enumerate(pieces)}, merges=kept, model_max_length=POSITIONS
    )
