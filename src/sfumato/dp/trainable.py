"""Which parameters of a latent diffusion model are trained on private data; all others keep their public values.

[DPLDM] trains the attention modules of the U-Net and the embedder of the condition. An attention module is the whole
block: its norms, projections in and out, self-attention, cross-attention and feed-forward, not only Q, K, V. They are
numbered down, middle, up; `first=i` freezes the first i - 1 (the paper's ablation). Which i is best is a choice, and
made by looking at private results it is not covered by ε. The autoencoder is never trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from sfumato.errors import JobError

__all__ = ["CHOICES", "Choice", "attention_modules", "choose", "merge"]

CHOICES = ("attention", "lora", "conditioning", "all")
# Parts of a U-Net that embed the condition: a class label, or a text's embedding on its way in.
EMBEDDERS = ("class_embedding", "encoder_hid_proj", "add_embedding")
# The projections of attention that get an adapter; to_out.0 is the linear layer before dropout.
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0")
ORDER = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}


@dataclass(frozen=True)
class Choice:
    """What `choose` set: names as `unet.NAME` and `conditioning.NAME`, and numbers of parameters."""

    what: str
    first: int
    rank: int | None
    modules: tuple[str, ...]  # attention modules that are trained or adapted
    of_modules: int  # attention modules in all
    names: tuple[str, ...]  # trained parameters
    trained: int  # numbers in them
    total: int  # numbers in the U-Net and the conditioning model, adapters included
    parameters: tuple[nn.Parameter, ...] = field(repr=False, compare=False)

    def describe(self) -> str:
        """One line for a ledger or a page."""
        share = f"{self.trained:,} of {self.total:,} parameters"
        attention = f"attention modules {self.first} to {self.of_modules} of {self.of_modules}"
        parts = {
            "attention": [attention],
            "lora": [f"adapters of rank {self.rank} in {attention}"],
            "conditioning": [],
            "all": ["the whole U-Net"],
        }[self.what]
        embedders = ("conditioning.", *(f"unet.{name}." for name in EMBEDDERS))
        if any(name.startswith(embedders) for name in self.names):
            parts.append("the conditioning embedder")
        return f"{' and '.join(parts)}: {share}"

    def watch(self) -> Callable[[], None]:
        """Remember the trained values; the function returned raises JobError unless every group has since changed.

        To be called after the first step: an optimizer or wrapper that was made before the adapters, or before the
        model moved to its device, steps on parameters that the model no longer uses ([Opacus] issue 820).
        """
        groups: dict[str, list[tuple[nn.Parameter, torch.Tensor]]] = {}
        for name, p in zip(self.names, self.parameters, strict=True):
            group = "adapters" if ".lora_" in name else name.split(".")[0]
            groups.setdefault(group, []).append((p, p.detach().clone()))

        def check() -> None:
            for group, pairs in groups.items():
                if all(torch.equal(p.detach().to(before.device), before) for p, before in pairs):
                    raise JobError(
                        f"a step left all trained parameters of {group} as they were: move the model to its device, "
                        "choose what is trained, then make the optimizer"
                    )

        return check


def attention_modules(unet: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of the U-Net's attention blocks, in the order down, middle, up.

    A `Transformer2DModel` counts as one block; elsewhere (`UNet2DModel`) an `Attention` does.
    """
    found: dict[str, nn.Module] = {}
    for name, part in unet.named_modules():
        inside = any(name.startswith(outer + ".") for outer in found)
        if isinstance(part, Transformer2DModel | Attention) and not inside:
            found[name] = part
    return dict(sorted(found.items(), key=lambda item: _position(item[0])))


def _position(name: str) -> tuple[int, list[int], str]:
    # diffusers registers the middle block after the up blocks, and "10" sorts before "9" as text.
    return ORDER.get(name.split(".")[0], 3), [int(n) for n in re.findall(r"\d+", name)], name


def choose(
    unet: nn.Module,
    conditioning: nn.Module | None = None,
    *,
    what: str = "attention",
    first: int = 1,
    rank: int | None = None,
) -> Choice:
    """Set `requires_grad` of both models' parameters, or put adapters in place, and say what is trained.

    `what`: "attention" (blocks from number `first` on, and the conditioning embedder), "lora" (adapters of `rank` on
    those blocks' projections, and the conditioning embedder), "conditioning" (the embedder alone), "all". The embedder
    is `conditioning` (the text encoder) and what the U-Net itself embeds conditions with. Move the models to their
    device before, wrap them in `Gradients` and make the optimizer after. JobError names what does not fit.
    """
    if what not in CHOICES:
        raise JobError(f"what is trained is one of {', '.join(CHOICES)}, not '{what}'")
    if (rank is not None) != (what == "lora") or (rank is not None and rank < 1):
        raise JobError(
            "LoRA needs a rank of at least 1 (--rank)"
            if what == "lora"
            else f"a rank belongs to LoRA alone (--what lora); leave it out with '{what}'"
        )
    if first != 1 and what not in ("attention", "lora"):
        raise JobError(f"first={first} numbers attention modules: leave it at 1 for '{what}'")
    blocks = attention_modules(unet)
    if what in ("attention", "lora"):
        if not blocks:
            raise JobError(f"{type(unet).__name__} has no attention module: train 'all' or 'conditioning'")
        if not 1 <= first <= len(blocks):
            raise JobError(f"first={first} is outside the attention modules 1 to {len(blocks)}")
    chosen = list(blocks)[first - 1 :] if what in ("attention", "lora") else []

    unet.requires_grad_(what == "all")
    if what == "attention":
        for name in chosen:
            blocks[name].requires_grad_(True)
    elif what == "lora":
        assert rank is not None
        _adapt(unet, chosen, rank)
    for name in EMBEDDERS:
        if isinstance(part := getattr(unet, name, None), nn.Module):
            part.requires_grad_(True)
    if conditioning is not None:
        conditioning.requires_grad_(True)

    both = {"unet": unet} | ({} if conditioning is None else {"conditioning": conditioning})
    every = [(f"{of}.{name}", p) for of, model in both.items() for name, p in model.named_parameters()]
    trained = [(name, p) for name, p in every if p.requires_grad]
    if not trained:
        raise JobError(f"'{what}' trains nothing here: the model has no conditioning embedder")
    return Choice(
        what=what,
        first=first,
        rank=rank,
        modules=tuple(chosen),
        of_modules=len(blocks),
        names=tuple(name for name, _ in trained),
        trained=sum(p.numel() for _, p in trained),
        total=sum(p.numel() for _, p in every),
        parameters=tuple(p for _, p in trained),
    )


def _adapt(unet: Any, blocks: list[str], rank: int) -> None:
    """Put adapters of `rank` on the attention projections inside `blocks`; the base weights stay frozen."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise JobError("LoRA needs the package peft: pip install 'sfumato[dp]'") from None
    if not hasattr(unet, "add_adapter"):
        raise JobError(
            f"{type(unet).__name__} takes no adapters: use a diffusers U-Net, or train 'attention'"
        )
    targets = [
        name
        for name, part in unet.named_modules()
        if isinstance(part, nn.Linear)
        and any(name.startswith(f"{block}.") for block in blocks)
        and any(name.endswith(f".{leaf}") for leaf in ADAPTED)
    ]
    # Scale alpha/r = 1. The pattern is of whole names: peft would also match them as endings of others.
    pattern = "|".join(map(re.escape, targets))
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern))


def merge(unet: Any) -> nn.Module:
    """Fold the adapters of `choose(what="lora")` into the weights, in place, and return the plain `unet`.

    What it computes stays the same up to rounding, and its saved folder has the names of a model without adapters.
    A U-Net without adapters is left as it is.
    """
    if getattr(unet, "peft_config", None):
        unet.fuse_lora(safe_fusing=False)
        unet.unload_lora()
    return unet
