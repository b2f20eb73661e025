"""What people look at after a run: its cost by block of the model, and pictures of what each party sent."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.graph.plan import Plan
from sfumato.runtime.report import CostReport

__all__ = ["Block", "blocks_of", "share_picture"]

_NODE = re.compile(r"(step\d+|text|vae)/(?:~\d+/)?(?:#\d+/)?([^/#]+)")
_BLOCK = re.compile(r"(conv_in|conv_out|conv_norm_out|conv_act|mid_block|(?:down|up)_blocks\.\d+)")
#: Parts of the model that are one block, by their plan.
_WHOLE = {"text": "text_encoder", "vae": "image_decoder"}
_ORDER = ("text_encoder", "conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out",
          "other", "sampler", "image_decoder")  # fmt: skip
_KINDS = {
    "conv2d": "convolution",
    "linear": "linear",
    "group_norm": "norm",
    "layer_norm": "norm",
    "silu": "activation",
    "gelu": "activation",
    "scaled_dot_product_attention": "attention",
}


class Block(NamedTuple):
    """Cost of one block over all calls. ``kinds``: bytes of all parties by kind of layer; ``messages``: of the party
    that sent most."""

    name: str
    kinds: dict[str, int]
    messages: int

    @property
    def total_bytes(self) -> int:
        """Payload of all parties together."""
        return sum(self.kinds.values())


def blocks_of(report: CostReport, plans: Mapping[str, Plan]) -> list[Block]:
    """The blocks in the model's order. ``plans``: ``"unet"`` and, where they ran under the protocol, ``"text"`` and
    ``"vae"``, as `SecurePipeline.plans` gives them."""
    nodes = {part: {node.name: node for node in plan.program.nodes} for part, plan in plans.items()}
    kinds: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    messages: dict[str, list[int]] = defaultdict(lambda: [0] * len(report.bytes_sent))
    for path, cost in report.by_path.items():
        found = _NODE.match(path.strip("/"))
        place, name = found.groups() if found else ("", "")
        part = place if place in _WHOLE else "unet"
        node = nodes.get(part, {}).get(name)
        if node is None:
            block, kind = _WHOLE.get(part, "sampler"), "sampler"
        else:
            match = _BLOCK.search(node.module_path)
            block = _WHOLE.get(part) or (match.group(1) if match else "other")
            kind = _KINDS.get(node.target.split(".")[1], "other")
        kinds[block][kind] += sum(cost.bytes_sent)
        messages[block] = [a + b for a, b in zip(messages[block], cost.messages, strict=True)]
    return [
        Block(name, dict(kinds[name]), max(messages[name], default=0)) for name in sorted(kinds, key=_depth)
    ]


def _depth(block: str) -> tuple[int, str]:
    return next((i for i, name in enumerate(_ORDER) if block.startswith(name)), len(_ORDER)), block


def share_picture(share: Tensor) -> NDArray[Any]:
    """The top eight bits of the words that one party sent of the result (1, C, H, W), channels side by side: (H, W)
    in [0, 1]."""
    top: NDArray[Any] = ((share[0] >> 56) & 255).to(torch.float64).numpy() / 255.0
    rows = max(1, int(len(top) ** 0.5))
    columns = len(top) // rows
    return np.concatenate(
        [np.concatenate(list(top[r * columns : (r + 1) * columns]), 1) for r in range(rows)]
    )
