"""The embedded demo on a dozen prompts: the image of the secure run against the float one, and what it
took.

    python benchmarks/demo.py --prompts 12

Ten DDIM steps with guidance, profile precise, three party processes over mutual TLS. For each prompt:
PSNR of the secure image against diffusers' own float32 image of the same seed, wall and CPU seconds,
whether the estimate made before the run equals the ledger, and what TLS and framing add to the payload.
Pages: results/demo.json and results/demo.md.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

import sfumato as sf
from sfumato.runtime.remote import open_backend
from sfumato.zoo import RECOMMENDED_GUIDANCE

RECORD, PAGE = common.RESULTS / "demo.json", common.RESULTS / "demo.md"
PROMPTS = (
    "a handwritten seven", "the digit three", "a drawing of the digit eight", "handwritten zero",
    "number five", "a hand drawn two", "a photo of a t-shirt", "a product photo of an ankle boot",
    "a picture of a handbag",
    "a photograph of trousers", "a nice dress", "a sneaker on a black background", "a grey pullover",
    "the figure nine",
)  # fmt: skip


def psnr(exact: np.ndarray, found: np.ndarray) -> float:
    """Of images in [0, 1], in dB; 100 where they are equal."""
    error = float(np.mean((exact - found) ** 2))
    return 100.0 if error == 0 else min(100.0, -10 * np.log10(error))


def startup_cpu(pipe: Any, arguments: Mapping[str, Any]) -> float:
    """CPU seconds that the three processes spend before the first step: imports and loading."""
    plan = pipe.plan(PROMPTS[0], **arguments)
    with open_backend("local") as backend:
        backend.load("unet", plan)
        return sum(backend.report().cpu_seconds)


def one(pipe: Any, prompt: str, seed: int, arguments: Mapping[str, Any], startup: float) -> dict[str, Any]:
    """One prompt: its record."""
    estimate = pipe.estimate(prompt, **arguments)
    float_started = time.perf_counter()
    exact = pipe.plain(prompt, generator=_generator(seed), output_type="np", **arguments).images[0]
    float_s = time.perf_counter() - float_started
    with common.Foreign() as foreign:
        out = pipe(prompt, generator=_generator(seed), output_type="np", **arguments)
    report = out.report
    payload, kernel = report.total_bytes, sum(report.kernel_bytes)
    cpu = sum(report.cpu_seconds)
    return {
        "prompt": prompt,
        "seed": seed,
        "psnr_db": psnr(np.asarray(exact, np.float64), np.asarray(out.images[0], np.float64)),
        "float_s": round(float_s, 3),
        "wall_s": round(report.seconds, 2),
        "wall_with_start_s": round(foreign.wall, 2),
        "cpu_s": round(cpu - startup, 2),
        "cpu_with_start_s": round(cpu, 2),
        "foreign_cpu": round(foreign.share(cpu), 3),
        "rounds": report.rounds,
        "bytes_per_party": list(report.bytes_sent),
        "client_bytes": report.client_bytes,
        "kernel_bytes_per_party": list(report.kernel_bytes),
        "overhead": kernel / payload - 1,
        "peak_memory_per_party": list(report.peak_memory),
        "estimate_exact": estimate.same_cost(report),
    }


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


_TOP = """# The embedded demo

`demo.py`: prompt to image on the embedded model, ten DDIM steps with guidance, profile `precise`, three
party processes over mutual TLS on one machine. PSNR is of the secure image against diffusers' float32
image of the same prompt and seed. CPU is the three parties' together, without starting Python and
loading the model. Overhead is what the kernel sent on the parties' sockets beyond the payload that the
ledger counts: framing, TLS records, handshake.
"""


def page(record: Mapping[str, Any]) -> str:
    """The markdown page of a record."""
    runs = [r for r in record["runs"] if "error" not in r]
    failed = [
        f"- Refused: {r['prompt']} (seed {r['seed']}): {r['error']}" for r in record["runs"] if "error" in r
    ]
    header = [
        "prompt",
        "PSNR dB",
        "wall s (others)",
        "CPU s",
        "MB sent",
        "rounds",
        "overhead",
        "estimate exact",
    ]
    rows = [
        [
            r["prompt"], f"{r['psnr_db']:.1f}", f"{r['wall_s']:.1f} ({r['foreign_cpu']:.0%})",
            common.number(r["cpu_s"]), common.number(sum(r["bytes_per_party"]) / 1e6), f"{r['rounds']:,}",
            f"{r['overhead']:.2%}", "yes" if r["estimate_exact"] else "NO",
        ]
        for r in runs
    ]  # fmt: skip
    levels = [r["psnr_db"] for r in runs]
    summary = (
        f"{len(runs)} prompts: PSNR {min(levels):.1f} to {max(levels):.1f} dB, "
        f"median {statistics.median(levels):.1f}; "
        f"CPU {common.number(statistics.median(r['cpu_s'] for r in runs))} s (median); overhead at most "
        f"{max(r['overhead'] for r in runs):.2%}; estimates exact in "
        f"{sum(r['estimate_exact'] for r in runs)} of {len(runs)}."
    )
    table = common.markdown_table(header, rows)
    return "\n".join([_TOP, common.machine_line(record["machine"]), "", summary, "", table, "", *failed])


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="embedded", help="embedded, a folder or a hub id")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=RECOMMENDED_GUIDANCE)
    parser.add_argument("--profile", default="precise")
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args()
    arguments = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    pipe = sf.SecurePipeline.from_pretrained(args.model, profile=args.profile)
    pipe.set_progress_bar_config(disable=True)
    startup = startup_cpu(pipe, arguments)
    record: dict[str, Any] = {**arguments, "profile": args.profile, "machine": common.machine(), "runs": []}
    for seed, prompt in enumerate(PROMPTS[: args.prompts]):
        try:
            own = one(pipe, prompt, seed, arguments, startup)
        except sf.SfumatoError as error:
            own = {"prompt": prompt, "seed": seed, "error": str(error)}
        print(json.dumps(own), flush=True)
        record["runs"].append(own)
        common.write_json(args.out, record)
    if args.out == RECORD:
        PAGE.write_text(page(record))


if __name__ == "__main__":
    main()
