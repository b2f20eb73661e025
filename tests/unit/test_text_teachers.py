"""Teachers of text models: readers, cut vocabularies, batches that no resumed run repeats, scores, the command."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from string import ascii_lowercase
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2TokenizerFast

from sfumato.zoo.train import loop
from sfumato.zoo.train.data import DataError
from sfumato.zoo.train.text import corpora, teacher
from sfumato.zoo.train.text.__main__ import main
from sfumato.zoo.train.text.batches import Blocks, Rows, encode_stream, mask_pieces
from sfumato.zoo.train.text.replace import load_student
from sfumato.zoo.train.text.score import interval, score_classes, score_language
from sfumato.zoo.train.text.vocabulary import cut_merges, cut_pieces, word_pieces

GOOD, BAD = ("fine", "lovely", "great"), ("poor", "dull", "awful")
PIECES = [
    "[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "never", "the", "film", "was", "is",
    *GOOD, *BAD, *ascii_lowercase, *(f"##{letter}" for letter in ascii_lowercase),
]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of made-up data, with files where a user may have put them."""
    folder = tmp_path / "data"
    (folder / "text" / "deep").mkdir(parents=True)

    def table(count: int, start: int) -> str:
        lines = ["sentence\tlabel"]
        for k in range(start, start + count):
            word = (GOOD, BAD)[k % 2][k // 2 % 3]
            lines.append(f"the film {('was', 'is')[k % 4 // 2]} {word} \t{1 - k % 2}")
        return "\n".join(lines) + "\n"

    (folder / "text" / "deep" / "sst2_train_64.tsv").write_text(table(64, 0))
    (folder / "text" / "sst2_dev_20.tsv").write_text(table(20, 3))
    (folder / "text" / "wikitext2_test.txt").write_text("\n = A film = \n\n the film @-@ is <unk> \n" * 30)
    (folder / "text" / "wikitext2_valid.txt").write_text("".join(f" the film was {k} \n" for k in range(50)))
    (folder / "bert_uncased_vocab.txt").write_text("\n".join(PIECES) + "\n")
    return folder


def test_sentences_are_split_into_training_and_test(data: Path) -> None:
    train, test = (corpora.sentences(data, "sst2", train=train) for train in (True, False))
    assert (len(train.texts), len(test.texts)) == (64, 20)
    assert train.texts[:2] == ["the film was fine", "the film was poor"]
    assert train.labels[:2] == [1, 0]
    (data / "uci_sentiment_sentences.tsv").write_text(
        "sentence\tlabel\tsource\n" + "".join(f"line {k}\t{k % 2}\tyelp\n" for k in range(2_200))
    )
    assert len(corpora.sentences(data, "sst2", train=True).texts) == 2_100 + 64
    assert corpora.sentences(data, "uci", train=False).texts == [f"line {k}" for k in range(2_100, 2_200)]


def test_texts_to_learn_from_hold_no_test_sentence(data: Path) -> None:
    texts = corpora.plain_texts(data)
    assert "the film-is <unk>" in texts
    held_out = corpora.language(data, "wikitext2", train=False)
    assert held_out == [f"the film was {k}" for k in range(40, 50)]
    assert not set(held_out) & set(texts)
    assert corpora.words_in(["a b", "c"]) == 5


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("sentence\tclass\na\t1\n", "has no column 'label'"),
        ("sentence\tlabel\na\t2\n", "a label is neither 0 nor 1"),
        ("sentence\tlabel\na\t1\t2\n", "not the 2 columns"),
    ],
)
def test_a_damaged_table_is_named(data: Path, text: str, complaint: str) -> None:
    (data / "text" / "sst2_dev_20.tsv").write_text(text)
    with pytest.raises(DataError, match=complaint):
        corpora.sentences(data, "sst2", train=False)


def test_missing_texts_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file sst2_train\*\.tsv"):
        corpora.sentences(tmp_path, "sst2", train=True)
    with pytest.raises(DataError, match="none of the texts"):
        corpora.plain_texts(tmp_path)
    with pytest.raises(DataError, match=r"bert_uncased_vocab\.txt"):
        word_pieces(tmp_path, ["a"])


# ---- vocabularies ----------------------------------------------------------------------------------------------------


def test_the_cut_keeps_what_is_frequent_and_spells_the_rest(data: Path) -> None:
    counts = Counter({"film": 9, "never": 8, "was": 1, "z": 1})
    kept = cut_pieces(PIECES, counts, 31)
    assert kept[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert {"film", "never", "f", "##f", "z"} <= set(kept)
    assert "lovely" not in kept
    assert kept == [piece for piece in PIECES if piece in set(kept)]
    tokenizer = word_pieces(data, corpora.plain_texts(data), size=60)
    assert tokenizer.unk_token_id not in tokenizer("The film was film")["input_ids"]
    assert "never" not in tokenizer.get_vocab()


def test_merges_are_kept_with_all_that_they_are_made_of() -> None:
    merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("x", "y"), ("abcd", "x")]
    assert cut_merges(merges, Counter({"abcd": 5, "xy": 1}), 257 + 3) == merges[:3]
    assert cut_merges(merges, Counter({"abcd": 5, "xy": 1}), 257 + 4) == merges[:4]
    assert cut_merges(merges, Counter({"abcdx": 5, "xy": 1}), 257 + 3) == [("x", "y")]


def byte_tokenizer() -> Any:
    letters = [chr(k) for k in range(33, 127)] + ["Ġ", "Ċ", "<|endoftext|>"]
    return GPT2TokenizerFast(vocab={letter: k for k, letter in enumerate(letters)}, merges=[])


def test_a_stream_is_the_texts_one_after_the_other() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(encode_stream(tokenizer, ["ab c", "d"]).tolist()) == "ab c\nd\n"


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_a_pass_shows_every_sentence_once_and_a_resumed_run_goes_on() -> None:
    rows = [[k] * (1 + k % 7) for k in range(1, 97)]
    labels = [k % 2 for k in range(1, 97)]
    batches, again = (Rows(rows, labels, 0, 8, seed=1) for _ in range(2))
    seen = [batches(number) for number in range(12)]
    firsts = torch.cat([batch.ids[:, 0] for batch in seen])
    assert sorted(firsts.tolist()) == list(range(1, 97))
    assert torch.equal(torch.cat([batch.labels for batch in seen]), firsts % 2)
    for batch in seen:
        assert torch.equal(batch.mask, (batch.ids != 0).long())
    assert torch.equal(again(7).ids, seen[7].ids)
    assert not torch.equal(torch.cat([batches(12 + k).ids[:, 0] for k in range(12)]), firsts)
    assert not torch.equal(Rows(rows, labels, 0, 8, seed=2)(0).ids[:, 0], seen[0].ids[:, 0])
    padding = sum(int((batch.mask == 0).sum()) for batch in seen)
    assert padding < 0.1 * sum(len(row) for row in rows)


def test_blocks_are_pieces_of_the_text() -> None:
    blocks = Blocks(torch.arange(100), 10, 4, seed=0)
    batch = blocks(3)
    assert torch.equal(batch.ids - batch.ids[:, :1], torch.arange(10).expand(4, 10))
    assert torch.equal(blocks(3).ids, batch.ids)
    assert torch.equal(torch.cat([b.ids.flatten() for b in blocks.in_order()]), torch.arange(100))
    with pytest.raises(ValueError, match="name a longer text"):
        Blocks(torch.arange(5), 10, 4, seed=0)


def test_masking_spares_special_pieces(data: Path) -> None:
    tokenizer = word_pieces(data, corpora.plain_texts(data))
    ids = torch.randint(5, len(tokenizer), (200, 50), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = tokenizer.cls_token_id
    changed, chosen = mask_pieces(ids, tokenizer, torch.Generator().manual_seed(1))
    assert not chosen[:, 0].any()
    assert float(chosen[:, 1:].double().mean()) == pytest.approx(0.15, abs=0.02)
    assert torch.equal(changed[~chosen], ids[~chosen])
    assert float((changed[chosen] == tokenizer.mask_token_id).double().mean()) == pytest.approx(0.8, abs=0.05)


# ---- scores ----------------------------------------------------------------------------------------------------------


class Says(nn.Module):
    """A model that answers the parity of the first piece, wrongly for the pieces named."""

    def __init__(self, *wrong: int) -> None:
        super().__init__()
        self.wrong = torch.tensor(wrong)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Any:
        answer = (ids[:, 0] % 2) ^ torch.isin(ids[:, 0], self.wrong).long()
        return SimpleNamespace(logits=nn.functional.one_hot(answer, 2).float())


def test_accuracy_has_an_interval_and_is_compared_in_pairs() -> None:
    rows = Rows([[k] for k in range(100)], [k % 2 for k in range(100)], 0, 8, 0)
    found = score_classes(Says(1, 2, 3, 4, 5), rows, Says(5, 6))
    assert (found["majority"], found["accuracy"], found["teacher"]) == (50.0, 95.0, 98.0)
    assert (found["difference"], found["agreement"], found["counts"]) == (-3.0, 95.0, True)
    low, high = found["interval"]
    assert 88 < low < 93 < 97 < high <= 100  # the exact binomial interval is 88.7 to 98.4
    low, high = found["difference_interval"]
    assert -9 < low < -3 < high < 3
    assert json.loads(json.dumps(found)) == found
    assert score_classes(Says(*range(0, 80, 2)), rows)["counts"] is False  # 60 % against 50 %
    assert interval(np.full(10, 0.5)) == (0.5, 0.5)


class Uniform(nn.Module):
    """A language model without any idea."""

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=torch.zeros(*ids.shape, 16))


def test_perplexity_of_no_idea_is_the_vocabulary() -> None:
    blocks = Blocks(torch.arange(160) % 8, 10, 4, seed=0)
    found = score_language(Uniform(), blocks, words=80, teacher=Uniform())
    assert found["perplexity"] == pytest.approx(16, abs=1e-3)
    assert found["word_perplexity"] == pytest.approx(16**2, abs=0.1)  # two pieces a word
    assert 7.9 < found["unigram"] <= 8
    assert (found["ratio"], found["agreement"], found["pieces"]) == (1.0, 100.0, 16 * 9)
    assert math.isclose(found["interval"][0], found["interval"][1])


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Tiny models, and a clock by which each step of training takes a second."""
    found = count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(thread_time=lambda: float(next(found))))
    monkeypatch.setattr(teacher, "WIDTH", 32)
    monkeypatch.setattr(teacher, "LAYERS", 2)
    monkeypatch.setattr(teacher, "FIRST", 0.1)
    monkeypatch.setattr(teacher, "MASKED_BLOCKS", 4)
    return found


def test_the_command_trains_a_teacher_and_its_student(
    tmp_path: Path, data: Path, small: Iterator[int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    common = ["--data", str(data), "--out", str(out), "--minutes", "3"]
    assert main(["teacher", "--task", "sst2", *common]) == 0
    folder = out / "sst2-0"
    noted = json.loads((folder / "task.json").read_text())
    assert (noted["task"], noted["base"]) == ("sst2", "../base-bert")
    assert noted["scores"]["accuracy"] == 100.0
    assert noted["scores"]["counts"] is True
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    answers = model(
        **tokenizer(["the film is great", "the film is dull"], return_tensors="pt", padding=True)
    ).logits
    assert answers.argmax(-1).tolist() == [1, 0]

    recipe = ["--recipe", "mpcformer", "--merged", "2", "--base", str(out / "base-bert")]
    assert main(["distil", "--teacher", str(folder), *recipe, *common, "--minutes", "1"]) == 0
    student, _, replaced = load_student(out / "sst2-mpcformer-merged2-0")
    assert (replaced.softmax, replaced.merged, student.config.num_attention_heads) == ("2quad", 2, 4)
    scores = json.loads((out / "sst2-mpcformer-merged2-0" / "task.json").read_text())["scores"]
    assert scores["agreement"] >= 90
    capsys.readouterr()
    assert main(["summary", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == ["sst2", "sst2-mpcformer-merged2"]


def test_the_command_says_what_is_missing(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", str(data), "--out", str(tmp_path / "out")]
    assert main(["teacher", "--task", "shakespeare", *common]) == 2
    assert "*shakespeare*.txt" in capsys.readouterr().err
    assert main(["distil", "--teacher", str(data), "--recipe", "ditto", *common]) == 2
    assert "make one with the command teacher" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["teacher", "--task", "sst2", *common, "--minutes", "0"])
    assert "--minutes must be positive" in capsys.readouterr().err
