"""Teachers: BERT-type and GPT-2-type models of 4 layers of width 256, from random weights to a folder.

BERT-type: masked language modelling on all texts, then the task's sentences. GPT-2-type: WikiText-2, then (for
``shakespeare``) Shakespeare. What the first part gives is kept beside the teacher: it is the public base model of
layer freezing and LoRA.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from ..loop import Step, run
from .batches import Batch, Blocks, Rows, encode_blocks, encode_sentences, encode_stream, mask_pieces
from .corpora import CLASSIFIED, language, plain_texts, words_in
from .score import score_classes, score_language
from .vocabulary import POSITIONS, byte_pairs, word_pieces

__all__ = [
    "label_loss", "load", "measure", "save", "save_atomically", "task_of", "test_set", "train_set", "train_teacher",
]  # fmt: skip

WIDTH, LAYERS, HEADS = 256, 4, 8
#: Sentences of a batch; blocks of a batch and pieces of a block, for a language model and for masked modelling.
SENTENCES, BLOCKS, BLOCK = 32, 8, 128
MASKED_BLOCKS, MASKED_BLOCK = 16, 64
#: Share of a teacher's time that the first part takes.
FIRST = 0.75
TASK = "task.json"


def bert_config(vocabulary: int) -> Any:
    """4 layers of width 256 with 8 heads; dropout 0.1."""
    return BertConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH, max_position_embeddings=POSITIONS,
    )  # fmt: skip


def gpt2_config(vocabulary: int, end: int) -> Any:
    """4 layers of width 256 with 8 heads; dropout 0.1; the output layer is the embedding."""
    return GPT2Config(
        vocab_size=vocabulary, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=POSITIONS,
        bos_token_id=end, eos_token_id=end,
    )  # fmt: skip


def save_atomically(folder: Path, *parts: Any) -> None:
    """``save_pretrained`` of each part into ``folder``, in place of what is there, and never half of it."""
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    for part in parts:
        part.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def save(folder: Path, model: Any, tokenizer: Any, task: str, **notes: Any) -> None:
    """A folder of the hub's form, and ``task.json`` with the task and these notes."""
    save_atomically(folder, model, tokenizer)
    (folder / TASK).write_text(json.dumps({"task": task, **notes}, indent=1) + "\n", "utf-8")


def task_of(folder: Path) -> str:
    """The task that a saved model was trained for."""
    found: str = json.loads((folder / TASK).read_text("utf-8"))["task"]
    return found


def load(folder: Path) -> tuple[Any, Any]:
    """A saved model (its class by its task) and its tokenizer."""
    kind = AutoModelForSequenceClassification if task_of(folder) in CLASSIFIED else AutoModelForCausalLM
    model = kind.from_pretrained(folder, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def train_set(tokenizer: Any, data: Path, task: str, seed: int) -> Rows | Blocks:
    """Batches that a task is learnt from."""
    if task in CLASSIFIED:
        return encode_sentences(tokenizer, data, task, train=True, batch=SENTENCES, seed=seed)
    return encode_blocks(tokenizer, data, task, train=True, length=BLOCK, batch=BLOCKS, seed=seed)


def test_set(tokenizer: Any, data: Path, task: str) -> Rows | Blocks:
    """Batches that a task is measured on."""
    if task in CLASSIFIED:
        return encode_sentences(tokenizer, data, task, train=False, batch=SENTENCES, seed=0)
    return encode_blocks(tokenizer, data, task, train=False, length=BLOCK, batch=BLOCKS, seed=0)


def measure(model: Any, tests: Rows | Blocks, data: Path, task: str, teacher: Any = None) -> dict[str, Any]:
    """The scores of a model on its task's test set (:mod:`.score`)."""
    if isinstance(tests, Rows):
        return score_classes(model, tests, teacher)
    return score_language(model, tests, words_in(language(data, task, train=False)), teacher)


def label_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy to the labels: of the class, or of every next piece."""
    logits = model(batch.ids, attention_mask=batch.mask).logits
    if logits.ndim == 2:
        return functional.cross_entropy(logits, batch.labels)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten())


def masked_step(model: Any, tokenizer: Any, stream: Tensor, seed: int) -> Step:
    """Masked language modelling; the output layer is evaluated only where a piece is to be found."""
    blocks = Blocks(stream, MASKED_BLOCK - 2, MASKED_BLOCKS, seed)
    first, last = (
        torch.full((MASKED_BLOCKS, 1), k) for k in (tokenizer.cls_token_id, tokenizer.sep_token_id)
    )

    def step(number: int) -> Tensor:
        ids = torch.cat([first, blocks(number).ids, last], 1)
        changed, chosen = mask_pieces(ids, tokenizer, torch.Generator().manual_seed(number))
        hidden = model.bert(changed).last_hidden_state
        return functional.cross_entropy(model.cls(hidden[chosen]), ids[chosen])

    return step


def _trained(name: str, model: Any, step: Step, checkpoint: Path, minutes: float, peak: float) -> Any:
    average = run(name, model, step, checkpoint, minutes, peak, weight_decay=0.01)
    model.load_state_dict(average.state)
    return model.eval()


def _base_bert(data: Path, out: Path, minutes: float, seed: int) -> Path:
    """The folder of the masked language model: that of an earlier run, or a new one."""
    folder = out / "base-bert"
    if not (folder / "config.json").is_file():
        texts = [text.replace("<unk>", "[UNK]") for text in plain_texts(data)]
        tokenizer = word_pieces(data, texts)
        torch.manual_seed(seed)
        model = BertForMaskedLM(bert_config(len(tokenizer)))
        step = masked_step(model, tokenizer, encode_stream(tokenizer, texts, " "), seed)
        _trained("base-bert", model, step, out / "base-bert.ckpt", minutes, 1e-3)
        save_atomically(folder, model, tokenizer)
    return folder


def _base_gpt2(data: Path, out: Path, minutes: float, seed: int) -> Path:
    """The folder of the language model of WikiText-2, likewise."""
    folder = out / "base-gpt2"
    if not (folder / "config.json").is_file():
        texts = language(data, "wikitext2", train=True) + language(data, "shakespeare", train=True)
        tokenizer = byte_pairs(data, texts)
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(gpt2_config(len(tokenizer), tokenizer.eos_token_id))
        batches = train_set(tokenizer, data, "wikitext2", seed)
        _trained(
            "base-gpt2", model, lambda n: label_loss(model, batches(n)), out / "base-gpt2.ckpt", minutes, 1e-3
        )
        save_atomically(folder, model, tokenizer)
    return folder


def train_teacher(task: str, data: Path, out: Path, minutes: float, seed: int) -> Path:
    """Train and measure a teacher; the folder it is in. Goes on from checkpoints in ``out``, and uses a base model
    that is there (of another task or seed).

    Raises:
        DataError: a text or a published vocabulary is missing below ``data``.
    """
    out.mkdir(parents=True, exist_ok=True)
    folder = out / f"{task}-{seed}"
    if task in CLASSIFIED:
        base = _base_bert(data, out, FIRST * minutes, seed)
        torch.manual_seed(seed)
        model = BertForSequenceClassification.from_pretrained(base, num_labels=2, local_files_only=True)
        peak = 3e-4
    else:
        base = _base_gpt2(data, out, FIRST * minutes if task == "shakespeare" else minutes, seed)
        model = GPT2LMHeadModel.from_pretrained(base, local_files_only=True)
        peak = 5e-4
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    if task != "wikitext2":
        batches = train_set(tokenizer, data, task, seed)
        name = f"{task}-{seed}"
        _trained(
            name,
            model,
            lambda n: label_loss(model, batches(n)),
            out / f"{name}.ckpt",
            (1 - FIRST) * minutes,
            peak,
        )
    scores = measure(model, test_set(tokenizer, data, task), data, task)
    save(
        folder,
        model,
        tokenizer,
        task,
        seed=seed,
        minutes=minutes,
        base=os.path.relpath(base, folder),
        scores=scores,
    )
    return folder
