"""Tiny transformers models with weights large enough that logits differ, and a tokenizer of whole words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers

from sfumato.inference.texts import TEXTS

WORDS = sorted({word for text in TEXTS for word in text.lower().split()})[:70]
VOCABULARY = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<mask>", *WORDS])}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(VOCABULARY)}
IMAGE = {"image_size": 16, "patch_size": 8}


def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return T.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        mask_token="<mask>",
    )  # fmt: skip


def made(name: str) -> Any:
    """A model with weights large enough that logits differ."""
    torch.manual_seed(3)
    sizes, wide = {**SIZES, **SPECIAL}, {"initializer_range": 0.2}
    gpt = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **SPECIAL, **wide}
    distil = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, **SPECIAL, **wide}
    llama = {**sizes, **wide, "num_key_value_heads": 2, "max_position_embeddings": 64}
    t5 = {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 64, **SPECIAL}
    makers: dict[str, Callable[[], Any]] = {
        "bert": lambda: T.BertForSequenceClassification(T.BertConfig(**sizes, **wide, num_labels=3)),
        "bert-mlm": lambda: T.BertForMaskedLM(T.BertConfig(**sizes, **wide)),
        "distilbert": lambda: T.DistilBertForSequenceClassification(T.DistilBertConfig(**distil)),
        "roberta": lambda: T.RobertaForSequenceClassification(T.RobertaConfig(**sizes, **wide)),
        "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**gpt)),
        "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**llama)),
        "t5": lambda: T.T5EncoderModel(T.T5Config(**t5)),
        "clip-text": lambda: T.CLIPTextModel(T.CLIPTextConfig(**sizes)),
        "vit": lambda: T.ViTForImageClassification(T.ViTConfig(**SIZES, **IMAGE, num_labels=4)),
        "clip-vision": lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**SIZES, **IMAGE)),
    }
    return makers[name]().eval()
