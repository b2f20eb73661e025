"""``classify`` and ``complete`` on a tiny model, end to end in one thread."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from sfumato.shell.cli import app

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "the", "sea", "was", "calm", "and", "blue"]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def saved(model: T.PreTrainedModel, folder: Path) -> str:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save_pretrained(folder)
    T.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        folder
    )
    return str(folder)


@pytest.mark.usefixtures("own_cache")
def test_classify_and_complete(tmp_path: Path) -> None:
    torch.manual_seed(0)
    common = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    bert = T.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        id2label={0: "dull", 1: "bright"}, **common,
    )  # fmt: skip
    classifier = saved(T.BertForSequenceClassification(bert), tmp_path / "bert")
    writer = saved(
        T.GPT2LMHeadModel(T.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **common)),
        tmp_path / "gpt2",
    )
    texts, report = tmp_path / "texts.txt", tmp_path / "report.json"
    texts.write_text("the sea was calm\nand blue\n")
    more = ["--backend", "simulate", "--calibrate-on", str(texts), "--report", str(report)]
    run = CliRunner().invoke
    found = run(
        app, ["classify", "the sea was blue", "--model", classifier, "--secret", "inputs+weights", *more]
    )
    assert found.exit_code == 0, found.output
    assert re.search("dull|bright", found.output)
    assert json.loads(report.read_text())["rounds"] > 0
    found = run(
        app, ["complete", "the sea was", "--model", writer, "--tokens", "2", "--release", "end", *more]
    )
    assert found.exit_code == 0, found.output
    assert found.output.startswith("the sea was")
    assert "rounds" in found.output
