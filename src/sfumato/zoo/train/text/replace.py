"""Cheap operations put into an unmodified model of transformers: Quad for GELU, 2Quad or 2ReLU for softmax.

A student is saved as a folder of the hub's form with ``replaced.json`` beside the weights; :func:`load_student` reads
both. The weights alone, read by ``from_pretrained``, are the network without its replacements: not the student.

Sources: MPCFormer, section 2.2 of the digest (Quad, 2Quad with c = 5, 2ReLU). The additive mask of the published
training is left out, as masked scores are multiplied by 0 before the sum: the same weights, without numbers near 10^8
that no fixed point holds.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from sfumato.errors import JobError

from .fixed import LEVELS, Levels, quantize
from .marill import add_lora, layers_of, prefix_parts, set_heads
from .teacher import load, save

__all__ = [
    "Quad",
    "Replaced",
    "Scores",
    "activations",
    "apply",
    "attentions",
    "load_student",
    "save_student",
    "watched",
]

#: Added to 2ReLU's sum. The published 1e-12 is below any fixed point; this is what a row without a positive score
#: is divided by.
EPSILON = 2.0**-6
_NAME = "sfumato"
REPLACED = "replaced.json"


@dataclass(frozen=True)
class Replaced:
    """What is different in a student.

    ``levels``: whose fixed-point types it was trained with (a key of ``LEVELS``). ``frozen``: layers, from the first,
    that keep the public model's weights and operations, with the embeddings (0: nothing is frozen). ``rank``: of LoRA
    in the other layers (0: their weights are the student's own). ``merged``: heads of one merged head, in the layers
    that are not frozen; where none is frozen, the configuration of the model has the lower number already.
    """

    activation: Literal["gelu", "quad"] = "gelu"
    softmax: Literal["softmax", "2quad", "2relu"] = "softmax"
    levels: str | None = None
    frozen: int = 0
    rank: int = 0
    merged: int = 1


class Quad(nn.Module):
    """0.125 x^2 + 0.25 x + 0.5: an activation of its own, up to 0.88 from GELU on [-3, 3]."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.125 * x * x + 0.25 * x + 0.5


def activations(model: Any) -> list[tuple[nn.Module, str]]:
    """Where the activations of a model are: module and attribute, one for each layer.

    Raises:
        JobError: the model is neither of BERT's nor of GPT-2's type.
    """
    if model.config.model_type == "bert":
        return [(layer.intermediate, "intermediate_act_fn") for layer in layers_of(model)]
    return [(layer.mlp, "act") for layer in layers_of(model)]


class Scores(nn.Module):
    """Attention with a replaced softmax. It keeps the scores before it, masked entries 0, while ``watching``.

    Queries, keys and values (N, heads, L, d); the mask is boolean (N or 1, 1, L, L), True where a key may be seen.
    """

    def __init__(self, softmax: str, levels: Levels | None) -> None:
        super().__init__()
        self.softmax, self.levels = softmax, levels
        self.watching, self.kept = False, torch.empty(0)

    def _weights(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        if self.softmax == "softmax":
            if mask is not None:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            return functional.softmax(scores, -1)
        if self.softmax == "2quad":
            shifted = scores + 5.0
            parts = shifted * shifted
        else:
            parts = functional.relu(scores) + EPSILON / scores.shape[-1]
        if mask is not None:
            parts = parts * mask.to(parts.dtype)
        if self.levels is not None:
            parts = self.levels.wide(parts)
        return parts / parts.sum(-1, keepdim=True)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        scores = torch.matmul(query, key.mT) * scaling
        if self.levels is not None:
            scores = self.levels.linear(scores)
        if self.watching:
            self.kept = scores if mask is None else scores.masked_fill(~mask, 0.0)
        weights = self._weights(scores, mask)
        if self.levels is not None:
            weights = self.levels.linear(self.levels.wide(weights))
        found = torch.matmul(weights, value)
        return found if self.levels is None else self.levels.linear(found)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function of a model that :func:`apply` has been to: its layer's own :class:`Scores`."""
    return module.scores(query, key, value, attention_mask, scaling).transpose(1, 2), None


def _mask(*args: Any, **kwargs: Any) -> Any:
    """The boolean mask of ``sdpa``; a causal one is made in full, as :class:`Scores` has no switch for it."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)


def attentions(model: Any) -> list[Any]:
    """The attention of every layer."""
    return [layer.attention.self if hasattr(layer, "attention") else layer.attn for layer in layers_of(model)]


def watched(
    model: Any, softmax: str = "softmax", levels: Levels | None = None, first: int = 0
) -> list[Scores]:
    """Give every layer of ``model`` its own :class:`Scores`, in place, and list them from the first layer.

    Layers below ``first`` keep the exact softmax and float.
    """
    found = []
    for number, attention in enumerate(attentions(model)):
        attention.scores = Scores(softmax, levels) if number >= first else Scores("softmax", None)
        found.append(attention.scores)
    model.set_attn_implementation(_NAME)
    return found


def apply(model: Any, replaced: Replaced, *, fake: bool = False) -> Any:
    """Put the replacements into a model, in place. ``fake``: to train or to measure, with fake quantization and
    with attention that can be watched.

    Without ``fake`` the result is what a secure run computes, and it can be captured; an exact softmax stays the
    model's own attention, which the plan knows as one call.

    Raises:
        JobError: the model is of another type than BERT's and GPT-2's, or the replacements do not go together.
    """
    first = replaced.frozen  # what is below runs in the clear, as it is
    if replaced.merged > 1 and first:  # else the configuration says so
        set_heads(model, model.config.num_attention_heads // replaced.merged, first)
    if replaced.rank:
        add_lora(model, replaced.rank, first)
    if replaced.activation == "quad":
        for parent, name in activations(model)[first:]:
            setattr(parent, name, Quad())
    if replaced.levels is not None and replaced.levels not in LEVELS:
        raise JobError(f"no levels {replaced.levels!r}; there are {', '.join(LEVELS)}")
    levels = LEVELS[replaced.levels] if fake and replaced.levels else None
    if levels is not None:
        skipped = prefix_parts(model, first) if first else ()
        quantize(model, levels, activations(model)[first:], skipped)
    if fake or replaced.softmax != "softmax":
        watched(model, replaced.softmax, levels, first)
    return model


def save_student(
    folder: Path, model: Any, tokenizer: Any, task: str, replaced: Replaced, **notes: Any
) -> None:
    """A folder of the hub's form with ``replaced.json``. Fake quantization in ``model`` adds no weights."""
    save(folder, model, tokenizer, task, **notes)
    (folder / REPLACED).write_text(json.dumps(asdict(replaced), indent=1) + "\n", "utf-8")


def load_student(folder: Path, *, fake: bool = False) -> tuple[Any, Any, Replaced]:
    """A student, its tokenizer and what is replaced in it (:func:`apply`); a teacher is a student without replacements.

    Raises:
        JobError: ``replaced.json`` is of another version.
    """
    path = folder / REPLACED
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    unknown = set(found) - {field.name for field in fields(Replaced)}
    if unknown:
        raise JobError(f"{path} has {sorted(unknown)[0]!r}, which this version does not know; update sfumato")
    replaced = Replaced(**found)
    model, tokenizer = load(folder)
    apply(model, replaced, fake=fake)
    if replaced.rank:
        missing, _ = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        if any("lora" in name for name in missing):
            raise JobError(f"{folder}: the weights have no {missing[0]}, which replaced.json promises")
    return model.eval(), tokenizer, replaced
