"""A BERT-type model whose weights and token ids are both secret, at three real parties."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import sfumato as sf
from sfumato.api import Deployment
from sfumato.errors import JobError
from sfumato.ring import dpf
from sfumato.runtime.commands import PutIndex
from sfumato.runtime.local import LocalCluster
from sfumato.runtime.remote import open_backend
from sfumato.types import Z64

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]
VOCABULARY, TOKENS = 301, 8


class Tagger(nn.Module):
    """Embeddings, a layer and a head of a few classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        config = transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, num_labels=3,
        )  # fmt: skip
        self.inner = transformers.BertForSequenceClassification(config)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.inner(input_ids=ids).logits
        return logits


def text(seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def known() -> tuple[nn.Module, Any]:
    module = Tagger().eval()
    calls = [((text(seed),), {}) for seed in range(8)]
    program = sf.capture(module, *calls[0])
    return module, sf.make_plan(program, secret="inputs+weights", calibration=calls)


@pytest.fixture(scope="module")
def parties() -> Iterator[LocalCluster]:
    with LocalCluster(threads=1) as cluster:
        yield cluster


def test_secret_ids_meet_a_secret_table(known: tuple[nn.Module, Any], parties: LocalCluster) -> None:
    """The float result, at the estimated bytes; the client uploads keys and no one-hot rows."""
    module, plan = known
    ids = text(3)
    with open_backend(local=parties) as backend:
        deployment = Deployment(plan, backend)
        found = deployment(ids)
        cost = deployment.cost
    with torch.no_grad():
        want = module(ids)
    assert float((found - want).abs().max()) < 2e-3
    told = sf.estimate(plan)
    assert (cost.bytes_sent, cost.client_bytes, cost.rounds) == (
        told.bytes_sent,
        told.client_bytes,
        told.rounds,
    )
    keys = TOKENS * 6 * dpf.key_bytes(VOCABULARY, Z64)
    assert keys < cost.client_bytes < keys + 4000 < TOKENS * 2 * 8 * VOCABULARY


def test_keys_that_do_not_fit_end_the_session(known: tuple[nn.Module, Any], parties: LocalCluster) -> None:
    short = [[torch.zeros((2, TOKENS, 7), dtype=torch.uint8)] for _ in range(3)]
    with open_backend(local=parties) as backend:
        backend.load("plan", known[1])
        with pytest.raises(
            JobError,
            match=r"the keys of ids are torch.uint8\[2, 8, 7\], and .* need torch.uint8\[2, 8, 168\]",
        ):
            backend._command(PutIndex("ids", "Z64", VOCABULARY, (1, TOKENS), dpf.ALGORITHM), short)
