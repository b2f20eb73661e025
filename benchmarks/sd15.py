"""One evaluation of the full Stable Diffusion 1.5 U-Net (860 M parameters) under three parties on one
machine.

    python benchmarks/sd15.py --size small        # seconds: the same code on a small configuration
    python benchmarks/sd15.py                     # the real size, random weights, then rescaled ones
    python benchmarks/sd15.py --pixels 512 --estimate    # bytes and rounds alone

Random weights, public, in half precision; 128x128 pixels or more (latents an eighth of it), batch 1, three processes
over mutual TLS. The second variant rescales weights so that residual activations pass 100 and attention
logits pass 20, as in trained checkpoints. A variant that is in the record already is skipped. Results:
results/sd15.json and .md.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from watch import Watch

import sfumato as sf
from sfumato.diffusion.denoiser import Denoiser
from sfumato.graph.memory import peak_memory
from sfumato.graph.plan import Plan, client_side
from sfumato.graph.prices import priced
from sfumato.runtime.backend import Backend
from sfumato.runtime.remote import open_backend

RECORD, PAGE = common.RESULTS / "sd15.json", common.RESULTS / "sd15.md"
TIMESTEP = 500.0
#: Factors of the rescaled variant: of conv_in and the resnets' second convolutions; of attention logits.
RESIDUAL_FACTOR, LOGIT_FACTOR = 60.0, 14.0
SIZES: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8},
    "small": {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": 4, "norm_num_groups": 8},
}


def build(size: str, rescaled: bool, seed: int = 0) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's configuration with random weights, rounded to half precision, in float32."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(sample_size=16, cross_attention_dim=768, **SIZES[size])
    unet.eval().requires_grad_(False)
    if rescaled:
        for name, module in unet.named_modules():
            if name == "conv_in" or name.endswith(".conv2"):
                module.weight.mul_(RESIDUAL_FACTOR)
            elif name.endswith(("attn1.to_q", "attn1.to_k", "attn2.to_q", "attn2.to_k")):
                module.weight.mul_(LOGIT_FACTOR**0.5)
    for parameter in unet.parameters():
        parameter.data = parameter.data.half().float()
    return unet


def arguments(unet: nn.Module, seed: int, pixels: int) -> tuple[tuple[Tensor], dict[str, Tensor]]:
    """A latent and a text embedding of ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)
    sample = torch.randn(1, 4, pixels // 8, pixels // 8, generator=generator)
    return (sample,), {"timestep": torch.tensor(TIMESTEP), "encoder_hidden_states": text}


class Maxima:
    """Largest residual activation and attention logit while a ``with`` block runs the module."""

    def __init__(self, unet: nn.Module) -> None:
        self.residual = self.logit = 0.0
        self._queries: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        for name, module in unet.named_modules():
            if type(module).__name__ in ("ResnetBlock2D", "Transformer2DModel") or name == "conv_in":
                self._handles.append(module.register_forward_hook(self._seen))
            if name.endswith(("attn1", "attn2")):
                self._watch_logits(name, module)

    def _seen(self, module: nn.Module, args: Any, output: Any) -> None:
        value = output if isinstance(output, Tensor) else output[0]
        self.residual = max(self.residual, float(value.abs().max()))

    def _watch_logits(self, name: str, module: nn.Module) -> None:
        def queries(_: nn.Module, args: Any, output: Tensor) -> None:
            self._queries[name] = output

        def keys(_: nn.Module, args: Any, output: Tensor) -> None:
            q, k = (_heads(x, module.heads) for x in (self._queries.pop(name), output))
            self.logit = max(
                self.logit, float((q @ k.transpose(-1, -2)).abs().max()) / math.sqrt(q.shape[-1])
            )

        self._handles.append(module.to_q.register_forward_hook(queries))
        self._handles.append(module.to_k.register_forward_hook(keys))

    def __enter__(self) -> Maxima:
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()


def _heads(x: Tensor, heads: int) -> Tensor:
    batch, tokens, width = x.shape
    return x.reshape(batch, tokens, heads, width // heads).transpose(1, 2)


# ---- one variant -------------------------------------------------------------------------------------------


def measure(size: str, rescaled: bool, profile: str, pixels: int, backend: str | None) -> dict[str, Any]:
    """One variant: its record; without ``backend`` the estimate alone."""
    name = "rescaled" if rescaled else "random"
    say(f"{name}: building {size}")
    unet = build(size, rescaled)
    denoiser = Denoiser(unet, guided=False).eval()
    args, kwargs = arguments(unet, 1, pixels)
    with torch.inference_mode(), Maxima(unet) as maxima:
        exact = denoiser(*args, **kwargs)
    parameters = sum(p.numel() for p in unet.parameters())
    tops = f"residual up to {maxima.residual:.1f}, logits up to {maxima.logit:.1f}"
    say(f"{parameters / 1e6:.0f} M parameters; {tops}")
    started = time.perf_counter()
    plan = _plan(unet, denoiser, profile, pixels)
    plan_s = time.perf_counter() - started
    say(f"plan made in {plan_s:.1f} s; " + "; ".join(plan.notes)[:300])
    estimate = _estimated(plan, args, kwargs)
    record: dict[str, Any] = {
        "variant": name,
        "size": size,
        "profile": profile,
        "pixels": pixels,
        "parameters": parameters,
        "residual_max": maxima.residual,
        "logit_max": maxima.logit,
        "plan_s": round(plan_s, 1),
        "estimate": estimate,
    }
    say(f"estimate: {estimate['rounds']:,} rounds, {common.size(sum(estimate['bytes_per_party']))}")
    if backend is None:
        return record
    record |= _run(plan, args, kwargs, exact, backend)
    record["estimate_exact"] = (
        estimate["rounds"] == record["rounds"] and estimate["bytes_per_party"] == record["bytes_per_party"]
    )
    return record


def _plan(unet: nn.Module, denoiser: nn.Module, profile: str, pixels: int) -> Plan:
    """In half precision, so that the parties map 2 bytes a weight; calibrated on two other inputs."""
    unet.half()
    gc.collect()
    (sample,), kwargs = arguments(unet, 1, pixels)
    traced = {"timestep": kwargs["timestep"], "encoder_hidden_states": kwargs["encoder_hidden_states"].half()}
    program = sf.capture(denoiser, (sample.half(),), traced)
    return sf.make_plan(
        program,
        client_known=("encoder_hidden_states",),
        profile=profile,
        calibration=[arguments(unet, seed, pixels) for seed in (2, 3)],
    )


def _call(backend: Backend, plan: Plan, args: Any, kwargs: Mapping[str, Any]) -> None:
    values = client_side(plan, args, kwargs)
    for name, tensor in values.secrets.items():
        backend.put(name, tensor, plan.secret_type(name).frac)
    backend.call("unet", "call", {n: n for n in values.secrets}, values.publics, ["out"])


def _estimated(plan: Plan, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    with open_backend("meta") as backend:
        backend.load("unet", plan)
        _call(backend, plan, args, kwargs)
        report = backend.report()
    grouped = {path: list(cost.bytes_sent) for path, cost in list(report.grouped(2).items())[:20]}
    return {
        "rounds": report.rounds,
        "bytes_per_party": list(report.bytes_sent),
        "sends_per_party": list(report.sends),
        "client_bytes": report.client_bytes,
        "setup_bytes": report.setup_bytes,
        "memory": peak_memory(plan),
        "budget_bytes": priced(plan).budget_bytes,
        "spu_bytes": priced(plan).spu_bytes,
        "largest_paths": grouped,
    }


def _run(plan: Plan, args: Any, kwargs: Mapping[str, Any], exact: Tensor, kind: str) -> dict[str, Any]:
    started = time.perf_counter()
    with open_backend(kind) as backend, Watch() as watch:
        backend.load("unet", plan)
        load_s = time.perf_counter() - started
        before = backend.report()
        say(f"loaded in {load_s:.1f} s; evaluating")
        with common.Foreign() as foreign:
            _call(backend, plan, args, kwargs)
        after = backend.report()
        found = backend.reveal("out")
    cpu = [b - a for a, b in zip(before.cpu_seconds, after.cpu_seconds, strict=True)]
    record = {
        "load_s": round(load_s, 1),
        "wall_s": round(foreign.wall, 2),
        "cpu_s_per_party": [round(c, 2) for c in cpu],
        "foreign_cpu": round(foreign.share(sum(cpu)), 3),
        "rounds": after.rounds,
        "bytes_per_party": list(after.bytes_sent),
        "kernel_bytes_per_party": list(after.kernel_bytes),
        "client_bytes": after.client_bytes,
        "setup_bytes": after.setup_bytes,
        "peak_memory_per_party": watch.peak_resident,
        "peak_private_memory": watch.peak_private,
        "peak_pss": watch.peak_pss,
        "output_max": float(exact.abs().max()),
        **common.error_against(exact, found),
    }
    say(f"done in {record['wall_s']:.1f} s, relative error {record['rel_l2_err']:.2g}")
    return record


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


# ---- the page ----------------------------------------------------------------------------------------------

_TOP = """# Stable Diffusion 1.5's U-Net, one evaluation

The full configuration (860 M parameters) with random weights, batch 1. Weights public, in half precision, in one file
that the parties map; the latent secret; the text's keys and values are computed by the client and shared. Three party
processes over mutual TLS on one machine. "Rescaled" multiplies weights so that residual activations and attention
logits are as large as in trained checkpoints. Calibrated on two other inputs. The error is against the same module in
float32. PSS counts a page that several processes share once. "Of the budget": bytes over those of the same operations
at the prices of docs/design/003.
"""


def page(record: Mapping[str, Any]) -> str:
    """The markdown page of a record."""
    header = [
        "variant", "pixels", "profile", "max residual", "max logit", "wall s (others)", "CPU s a party",
        "sent, all parties", "of the budget", "rounds", "peak PSS, all parties", "private, a party", "max / rel error",
    ]  # fmt: skip
    rows = [_row(v) for v in record["variants"] if v["size"] == "sd15"]
    exact = all(v.get("estimate_exact", True) for v in record["variants"])
    text = (
        "Bytes and rounds equal the estimate made before the run." if exact else "An estimate was NOT exact."
    )
    table = common.markdown_table(header, rows)
    return "\n".join([_TOP, common.machine_line(record["machine"]), "", table, "", text, ""])


def _row(v: Mapping[str, Any]) -> list[str]:
    estimate = v["estimate"]
    sent = sum(estimate["bytes_per_party"])
    start = [
        v["variant"],
        str(v["pixels"]),
        v["profile"],
        common.number(v["residual_max"]),
        common.number(v["logit_max"]),
    ]
    cost = [common.size(sent), f"{sent / estimate['budget_bytes']:.2f}", f"{estimate['rounds']:,}"]
    if "wall_s" not in v:
        return [*start, "estimate", "", *cost, "", f"about {common.size(estimate['memory'])}", ""]
    return [
        *start, f"{v['wall_s']:.0f} ({v['foreign_cpu']:.0%})", ", ".join(f"{c:.0f}" for c in v["cpu_s_per_party"]),
        *cost, common.size(v["peak_pss"]), common.size(max(v["peak_private_memory"], default=0)),
        f"{common.number(v['max_abs_err'], 2)} / {common.number(v['rel_l2_err'], 2)}",
    ]  # fmt: skip


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", choices=tuple(SIZES), default="sd15")
    parser.add_argument("--variants", default="random,rescaled")
    parser.add_argument("--profile", default="precise")
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--estimate", action="store_true", help="bytes and rounds alone, without a run")
    parser.add_argument("--backend", choices=("local", "simulate", "plain"), default="local")
    parser.add_argument(
        "--again", action="store_true", help="measure variants that are in the record already"
    )
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args()
    record = json.loads(args.out.read_text()) if args.out.exists() else {"variants": []}
    for variant in args.variants.split(","):
        key = (variant, args.size, args.profile, args.pixels)
        known = [v for v in record["variants"] if (v["variant"], v["size"], v["profile"], v["pixels"]) == key]
        if known and not args.again:
            say(f"{variant} is in {args.out.name} already; --again measures it anew")
            continue
        backend = None if args.estimate else args.backend
        own = measure(args.size, variant == "rescaled", args.profile, args.pixels, backend)
        record["variants"] = [v for v in record["variants"] if v not in known] + [own]
        record["machine"] = common.machine()
        common.write_json(args.out, record)
    if args.out == RECORD and any(v["size"] == "sd15" for v in record["variants"]):
        PAGE.write_text(page(record))


if __name__ == "__main__":
    main()
