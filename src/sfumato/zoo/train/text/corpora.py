"""Readers of the texts: SST-2, the UCI sentiment sentences, WikiText-2, Shakespeare.

A folder holds, at any depth, the files that :data:`FILES` names; a task asks for those that it needs. QNLI serves as
plain text only: its labels, like CoLA's, cannot be learnt from a few thousand examples without a large pre-trained
model, so neither is a task here.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..data import DataError

__all__ = ["CLASSIFIED", "FILES", "MODELLED", "Sentences", "language", "plain_texts", "sentences", "words_in"]

#: What a file is called, by what it holds.
FILES = {
    "sst2 train": "sst2_train*.tsv",
    "sst2 test": "sst2_dev*.tsv",
    "uci": "uci_sentiment_sentences.tsv",
    "qnli": "qnli_dev*.tsv",
    "wikitext2 one": "wikitext2_test.txt",
    "wikitext2 two": "wikitext2_valid.txt",
    "shakespeare": "*shakespeare*.txt",
}
#: Tasks whose answer is a class, and tasks whose answer is the next token.
CLASSIFIED = ("sst2", "uci")
MODELLED = ("wikitext2", "shakespeare")
#: The UCI sentences (shuffled as they come) that train; the rest tests.
UCI_TRAIN = 2_100


class Sentences(NamedTuple):
    """Sentences and the class (0 negative, 1 positive) of each."""

    texts: list[str]
    labels: list[int]


def find(data: Path, what: str) -> Path:
    """The file of :data:`FILES`.

    Raises:
        DataError: it is not below ``data``.
    """
    found = sorted(data.rglob(FILES[what]))
    if not found:
        raise DataError(f"{data}: no file {FILES[what]} below it ({what})")
    return found[0]


def _table(path: Path, *columns: str) -> list[tuple[str, ...]]:
    """These columns of a tab-separated file with a header and no quoting."""
    lines = path.read_text("utf-8").rstrip("\n").split("\n")
    head = lines[0].split("\t")
    missing = [column for column in columns if column not in head]
    if missing:
        raise DataError(f"{path}: the header has no column {missing[0]!r} (it is {' '.join(head)})")
    places = [head.index(column) for column in columns]
    rows = [line.split("\t") for line in lines[1:]]
    if any(len(row) != len(head) for row in rows):
        raise DataError(f"{path}: a row has not the {len(head)} columns of the header")
    return [tuple(row[place].strip() for place in places) for row in rows]


def _sentences(path: Path) -> Sentences:
    rows = _table(path, "sentence", "label")
    if not {label for _, label in rows} <= {"0", "1"}:
        raise DataError(f"{path}: a label is neither 0 nor 1")
    return Sentences([text for text, _ in rows], [int(label) for _, label in rows])


def sentences(data: Path, task: str, *, train: bool) -> Sentences:
    """The labelled sentences of a task of :data:`CLASSIFIED`.

    Both tasks train on all that there is of SST-2's training phrases and of the first 2,100 UCI sentences; ``sst2``
    is tested on SST-2's development sentences, ``uci`` on the remaining UCI sentences.
    """
    if not train and task == "sst2":
        return _sentences(find(data, "sst2 test"))
    uci = _sentences(find(data, "uci")) if task == "uci" or list(data.rglob(FILES["uci"])) else None
    if not train:
        assert uci is not None
        return Sentences(uci.texts[UCI_TRAIN:], uci.labels[UCI_TRAIN:])
    texts, labels = [], []
    if uci is not None:
        texts, labels = uci.texts[:UCI_TRAIN], uci.labels[:UCI_TRAIN]
    if task == "sst2" or list(data.rglob(FILES["sst2 train"])):
        phrases = _sentences(find(data, "sst2 train"))
        texts, labels = texts + phrases.texts, labels + phrases.labels
    return Sentences(texts, labels)


def _wikitext(path: Path) -> list[str]:
    """Paragraphs; hyphens, commas and points inside words and numbers are put back together."""
    text = path.read_text("utf-8")
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    return [line.strip() for line in text.split("\n") if line.strip()]


def language(data: Path, task: str, *, train: bool) -> list[str]:
    """The paragraphs of a task of :data:`MODELLED`, in their order.

    WikiText-2's training file is not needed: the articles of its test file and the first four fifths of its
    validation file train, the last fifth tests. Of Shakespeare the first nine tenths train.
    """
    if task == "wikitext2":
        two = _wikitext(find(data, "wikitext2 two"))
        cut = len(two) * 4 // 5
        return _wikitext(find(data, "wikitext2 one")) + two[:cut] if train else two[cut:]
    text = find(data, "shakespeare").read_text("utf-8")
    speeches = [part for part in text.split("\n\n") if part.strip()]
    cut = len(speeches) * 9 // 10
    return speeches[:cut] if train else speeches[cut:]


def plain_texts(data: Path) -> list[str]:
    """Everything for masked language modelling: the training parts of all tasks and QNLI's questions and sentences,
    as far as the files are there. No test sentence is among them.

    Raises:
        DataError: there is no text at all.
    """
    texts: list[str] = []
    if list(data.rglob(FILES["uci"])) or list(data.rglob(FILES["sst2 train"])):
        task = "sst2" if list(data.rglob(FILES["sst2 train"])) else "uci"
        texts += sentences(data, task, train=True).texts
    if list(data.rglob(FILES["qnli"])):
        pairs = _table(find(data, "qnli"), "question", "sentence")
        texts += [part for pair in pairs for part in pair]
    for task, needed in (("wikitext2", "wikitext2 two"), ("shakespeare", "shakespeare")):
        if list(data.rglob(FILES[needed])):
            texts += language(data, task, train=True)
    if not texts:
        raise DataError(f"{data}: none of the texts is below it ({', '.join(FILES.values())})")
    return texts


def words_in(texts: list[str]) -> int:
    """Words between spaces, and the end of each paragraph: what a perplexity by words divides by."""
    return sum(len(text.split()) + 1 for text in texts)
