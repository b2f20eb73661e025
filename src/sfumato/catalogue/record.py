"""Records the inputs of every function in real models: ``python -m sfumato.catalogue.record``.

The calls are watched in the clear, by torch's own function hook. Recorded: the embedded pipeline on every prompt of
the zoo, and a BERT and a GPT-2 of standard width with random weights (their scores are smaller than trained ones;
they stand for shapes, not for quality).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sfumato.zoo import RECOMMENDED_GUIDANCE, embedded_path

__all__ = ["Watch", "main", "watched"]

#: Told on an axis of powers.
LOG = ("reciprocal", "rsqrt", "sqrt")
BINS = 64
#: Values kept of one call; rows kept of one function and source, and the longest of them.
_KEPT, _ROWS, _LONGEST = 4_000, 12, 800
#: Values of rows in the file, for one function and source.
_VALUES = 1_600
_QUANTILES = (0.0001, 0.001, 0.01, 0.5, 0.99, 0.999, 0.9999)
_SEED = 20


@dataclass
class Kept:
    """Values of one function: a thinned sample, exact extremes, and a few rows."""

    values: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    count: int = 0
    low: float = math.inf
    high: float = -math.inf

    def add(self, x: Tensor) -> None:
        flat = x.detach().reshape(-1).to(torch.float32)
        if not flat.numel():
            return
        self.count += flat.numel()
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        # An odd stride meets every position of every row in turn.
        stride = max(1, flat.numel() // _KEPT) | 1
        self.values.append(flat[::stride].clone())

    def add_rows(self, x: Tensor) -> None:
        """One row from the middle of a call; later calls displace earlier ones in turn."""
        rows = x.detach().reshape(-1, x.shape[-1])
        row = rows[rows.shape[0] // 2].to(torch.float32).clone()
        if row.numel() > _LONGEST or row.numel() < 4:
            return
        self.rows.append(row)


class Watch(TorchFunctionMode):
    """Sees every call of torch's functions and keeps what the catalogue's functions are given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Kept] = {}
        self._inside = False

    def keep(self, name: str, x: Tensor) -> None:
        self.found.setdefault(name, Kept()).add(x)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._inside:
            self._inside = True
            try:
                with torch.no_grad():
                    self._see(func, args, kwargs)
            finally:
                self._inside = False
        return func(*args, **kwargs)

    def _see(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        name = getattr(func, "__name__", "")
        if name == "silu":
            self.keep("silu", args[0])
            self.keep("sigmoid", args[0])
        elif name == "gelu":
            self._gelu(args[0], kwargs.get("approximate", "none"))
        elif name in ("sigmoid", "tanh", "erf"):
            self.keep(name, args[0])
        elif name == "softmax":
            self._scores(args[0])
        elif name == "scaled_dot_product_attention":
            self._attention(*args, **kwargs)
        elif name == "layer_norm":
            self._layer_norm(args[0], len(args[1]), args[4] if len(args) > 4 else kwargs.get("eps", 1e-5))
        elif name == "group_norm":
            groups, x = int(args[1]), args[0]
            eps = args[4] if len(args) > 4 else kwargs.get("eps", 1e-5)
            self._variance(x.reshape(x.shape[0], groups, -1), eps)

    def _gelu(self, x: Tensor, approximate: str) -> None:
        self.keep("gelu", x)
        self.keep("erf", x * math.sqrt(0.5))
        self.keep("tanh", math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))

    def _variance(self, rows: Tensor, eps: float) -> None:
        variance = rows.var(-1, unbiased=False) + eps
        self.keep("rsqrt", variance)
        self.keep("sqrt", variance)

    def _layer_norm(self, x: Tensor, axes: int, eps: float) -> None:
        rows = x.flatten(-axes)
        self._variance(rows, eps)
        self.keep("layer_norm", rows)
        self.found["layer_norm"].add_rows(rows)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> None:
        scale = kwargs.get("scale") or 1.0 / math.sqrt(q.shape[-1])
        scores = q @ k.transpose(-1, -2) * scale
        mask = args[0] if args else kwargs.get("attn_mask")
        if kwargs.get("is_causal") or (len(args) > 2 and args[2]):
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
            scores = scores.masked_fill(~allowed, -math.inf)
        elif isinstance(mask, Tensor):
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        self._scores(scores)

    def _scores(self, scores: Tensor) -> None:
        """Public masks leave a row before any function sees it."""
        seen = scores > -1e3
        self.keep("softmax", scores[seen])
        moved = (scores - scores.amax(-1, keepdim=True)).masked_fill(~seen, -math.inf)
        self.keep("exp", moved[seen])
        self.keep("reciprocal", moved.exp().sum(-1))
        rows = scores.reshape(-1, scores.shape[-1])
        # The last row of a head where a causal mask leaves all of it.
        middle = rows[2 * rows.shape[0] // 3 - 1]
        self.found["softmax"].add_rows(middle[middle > -1e3][None])


def _record(function: str, source: str, note: str, kept: Kept) -> dict[str, Any]:
    values = torch.cat(kept.values).to(torch.float64).numpy()
    low, high = kept.low, max(kept.high, kept.low + 1e-6)
    if function in LOG:
        edges = np.exp(np.linspace(math.log(low), math.log(high), BINS + 1))
    else:
        edges = np.linspace(low, high, BINS + 1)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    record: dict[str, Any] = {
        "function": function, "source": source, "note": note, "count": kept.count,
        "low": _short(kept.low), "high": _short(kept.high),
        "quantiles": {f"{q:g}": _short(float(np.quantile(values, q))) for q in _QUANTILES},
        "edges": [_short(float(e)) for e in edges], "counts": [int(c) for c in counts],
    }  # fmt: skip
    if kept.rows:
        wanted = min(_ROWS, len(kept.rows), max(3, _VALUES // kept.rows[0].numel()))
        # An index that drifts, so that the same layer is not met every time.
        chosen = [kept.rows[(i * len(kept.rows) // wanted + 3 * i) % len(kept.rows)] for i in range(wanted)]
        record["rows"] = [[_short(v, 4) for v in row.tolist()] for row in chosen]
    return record


def _short(value: float, digits: int = 6) -> float:
    return float(f"{value:.{digits}g}")


@contextmanager
def watched(modules: Sequence[torch.nn.Module] = ()) -> Iterator[Watch]:
    """Watch every call inside; modules of transformers' own GELU are watched at their input."""
    watch, hooks = Watch(), []

    def own(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        watch.keep("gelu", args[0])
        watch.keep("erf", args[0] * math.sqrt(0.5))

    for root in modules:
        for module in root.modules():
            if type(module).__name__ == "NewGELUActivation":
                hooks.append(module.register_forward_pre_hook(own))
    try:
        with watch:
            yield watch
    finally:
        for hook in hooks:
            hook.remove()


def _embedded(steps: int, most: int | None) -> tuple[Watch, int]:
    from diffusers import StableDiffusionPipeline

    from sfumato.zoo.train.prompts import CLASS_NAMES, class_prompts

    pipe = StableDiffusionPipeline.from_pretrained(embedded_path())
    pipe.set_progress_bar_config(disable=True)
    prompts = [prompt for label in range(len(CLASS_NAMES)) for prompt in class_prompts(label)][:most]
    with watched() as watch, torch.no_grad():
        for start in range(0, len(prompts), 64):
            batch = prompts[start : start + 64]
            pipe(
                batch, num_inference_steps=steps, guidance_scale=RECOMMENDED_GUIDANCE,
                generator=torch.Generator().manual_seed(_SEED + start),
            )  # fmt: skip
    return watch, len(prompts)


def _bert() -> Watch:
    from transformers import BertConfig, BertModel

    return _on_random_tokens(lambda: BertModel(BertConfig(num_hidden_layers=2)), 30_000)


def _gpt2() -> Watch:
    from transformers import GPT2Config, GPT2Model

    return _on_random_tokens(lambda: GPT2Model(GPT2Config(n_layer=2)), 50_000)


def _on_random_tokens(make: Callable[[], torch.nn.Module], vocabulary: int) -> Watch:
    torch.manual_seed(_SEED)
    model = make().eval()
    with watched([model]) as watch, torch.no_grad():
        for seed in range(4):
            model(torch.randint(0, vocabulary, (1, 128), generator=torch.Generator().manual_seed(seed)))
    return watch


def main(arguments: Sequence[str] | None = None) -> None:
    """Rebuild the file that ships with the package."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("recorded.json"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=None, help="at most so many")
    asked = parser.parse_args(arguments)
    watch, count = _embedded(asked.steps, asked.prompts)
    sources = [
        ("embedded", f"the embedded pipeline, all its parts, {count} prompts of the zoo, {asked.steps} DDIM steps, "
         f"guidance {RECOMMENDED_GUIDANCE:g}", watch),
        ("bert-base, random", "two layers of BERT-base, random weights, random tokens, 128 of them", _bert()),
        ("gpt2, random", "two layers of GPT-2, random weights, random tokens, 128 of them", _gpt2()),
    ]  # fmt: skip
    records = []
    for source, note, seen in sources:
        for function, kept in sorted(seen.found.items()):
            records.append(_record(function, source, note, kept))
    silu = next(r for r in records if r["function"] == "silu" and r["source"] == "embedded")
    stand_in = "no model here has Mish; the inputs of SiLU in the embedded pipeline stand in"
    records.append({**silu, "function": "mish", "note": stand_in})
    text = json.dumps({"format": 1, "records": records}, separators=(",", ":"))
    asked.out.write_text(text.replace('{"function"', '\n{"function"') + "\n", encoding="utf-8")
    for record in records:
        print(
            f"{record['source']:20s} {record['function']:12s} {record['count']:12,d} values in "
            f"[{record['low']:.4g}, {record['high']:.4g}]"
        )


if __name__ == "__main__":
    main()
