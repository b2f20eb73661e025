"""The 20 classes, the prompts that name them, and the tokenizer made from these prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from transformers import CLIPTokenizer

MAX_LENGTH = 16
BOS, EOS = "<|startoftext|>", "<|endoftext|>"

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLOTHES: tuple[tuple[str, ...], ...] = (
    ("t-shirt", "tshirt", "t-shirt top", "tee"),
    ("trousers", "trouser", "pants", "pair of trousers"),
    ("pullover", "sweater", "jumper"),
    ("dress", "gown"),
    ("coat", "jacket", "overcoat"),
    ("sandal", "sandals", "open sandal"),
    ("shirt", "button shirt", "dress shirt"),
    ("sneaker", "sneakers", "trainer", "running shoe"),
    ("bag", "handbag", "purse"),
    ("ankle boot", "boot", "ankle boots"),
)
CLASS_NAMES = DIGITS + tuple(names[0] for names in CLOTHES)

_BOTH = (
    "{n}", "{a}", "an image of {a}", "a picture of {a}", "a photo of {a}", "a small picture of {a}",
    "a grey image of {a}", "a black and white image of {a}", "a low resolution photo of {a}", "the {n}",
    "one picture of {a}", "show me {a}", "{a} on a black background", "please draw {a}",
)  # fmt: skip
_DIGIT = (
    "a handwritten {n}", "handwritten {n}", "the digit {n}", "digit {n}", "the number {n}", "number {n}",
    "a handwritten digit {n}", "a handwritten number {n}", "a drawing of the digit {n}", "the figure {n}",
    "a scan of the digit {n}", "the numeral {n}", "someone wrote {a}", "the digit {n} written by hand",
    "mnist {n}", "an mnist digit {n}", "a photo of the number {n}", "a hand drawn {n}",
)  # fmt: skip
_CLOTHES = (
    "a photograph of {a}", "a product photo of {a}", "a piece of clothing {n}", "fashion {n}",
    "a fashion mnist {n}", "a catalogue picture of {a}", "a picture of clothes {n}", "a drawing of {a}",
    "a grey {n}", "something to wear {n}", "a nice {n}", "{a} from a shop", "a product shot of {a}",
    "clothing {n}",
)  # fmt: skip


def _article(noun: str) -> str:
    if noun in {"trousers", "pants", "sandals", "sneakers", "ankle boots"}:
        return noun
    return ("an " if noun[0] in "aeiou8" else "a ") + noun


def class_prompts(label: int) -> list[str]:
    """Every training prompt of one class; the first is the plainest sentence for it."""
    names: tuple[str, ...] = CLOTHES[label - 10] if label >= 10 else (DIGITS[label], str(label))
    own = ("a photo of {a}", *_CLOTHES) if label >= 10 else _DIGIT
    templates = (*own, *_BOTH)
    prompts = [t.format(n=name, a=_article(name)) for t in templates for name in names]
    return list(dict.fromkeys(prompts))


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes used by byte-level BPE, in the order of CLIP."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + k) for k in range(len(other))]


def _learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until every word is one symbol."""
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts in pieces.values():
            at = 0
            while at < len(parts) - 1:
                if (parts[at], parts[at + 1]) == best:
                    parts[at : at + 2] = ["".join(best)]
                at += 1


def make_tokenizer(prompts: Iterable[str] | None = None) -> CLIPTokenizer:
    """CLIP tokenizer whose merges cover the prompts (default: of all classes); any other text falls back to bytes."""
    splitter = CLIPTokenizer(vocab={BOS: 0, EOS: 1}, merges=[]).backend_tokenizer
    words: Counter[str] = Counter()
    if prompts is None:
        prompts = [prompt for label in range(20) for prompt in class_prompts(label)]
    for prompt in prompts:
        split = splitter.pre_tokenizer.pre_tokenize_str(splitter.normalizer.normalize_str(prompt))
        words.update(word for word, _ in split)
    merges = _learn_merges(words)
    symbols = _byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges)]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    vocab[BOS] = len(vocab)
    vocab[EOS] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)
