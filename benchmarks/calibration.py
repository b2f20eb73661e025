"""Ranges measured on eight prompts, held against two hundred others: how many runs leave them, and what that costs.

    python benchmarks/calibration.py --prompts FILE [FILE...] --count 200

The embedded pipeline, ten DDIM steps with guidance, its ranges measured on eight prompts alone. Every other
prompt runs on the plaintext twin (the fixed-point words of a real run) with ``certificate="all"``: every element of
every value that was planned for a range is compared with it. A run that leaves is repeated without a certificate, for
the image that would have come out, and with the default one of eight samples a layer, for whether that would have seen
it. The second variant is the same model with outliers: its residual stream is scaled (which changes nothing that a
float computes, as every block normalises) and its attention logits are sharpened, so that both are as large as in
trained checkpoints. FILE holds a prompt a line, or tab-separated fields whose first is the prompt. Pages:
results/calibration.json and results/calibration.md.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from demo import psnr
from sd15 import Maxima
from torch import nn
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import sfumato as sf
from sfumato.diffusion.calibrate import PROMPTS
from sfumato.zoo import RECOMMENDED_GUIDANCE
from sfumato.zoo.train.prompts import class_prompts

RECORD, PAGE = common.RESULTS / "calibration.json", common.RESULTS / "calibration.md"
STEPS = 10
#: What outliers are to reach at least: residual activations, attention logits.
RESIDUAL, LOGIT = 120.0, 22.0


def prompts_of(files: Sequence[Path], count: int) -> list[str]:
    """``count`` prompts spread evenly over the files and over each file's length."""
    found: list[str] = []
    for i, file in enumerate(files):
        lines = file.read_text(encoding="utf-8").splitlines()
        texts = [line.split("\t")[0].strip() for line in lines[1 if file.suffix == ".tsv" else 0 :]]
        share = count // len(files) + (i < count % len(files))
        found += [texts[round(k * (len(texts) - 1) / max(share - 1, 1))] for k in range(share)]
    return found


def usual_prompts(count: int) -> list[str]:
    """Prompts of the kind that the embedded model was trained on."""
    return [(texts := class_prompts(i % 20))[i // 20 % len(texts)] for i in range(count)]


def with_outliers(unet: nn.Module, residual: float, logit: float) -> None:
    """Scale the residual stream by ``residual`` and attention logits by ``logit``, in place."""
    for name, module in unet.named_modules():
        last = name.rpartition(".")[2]
        if name == "conv_in" or last in ("conv2", "proj_out"):
            module.weight.mul_(residual)
            module.bias.mul_(residual)
        elif last == "conv_shortcut" or re.search(r"samplers\.\d+\.conv$", name):
            module.bias.mul_(residual)
        elif last == "to_q":
            module.weight.mul_(logit)


def opened(outliers: tuple[float, float], certificate: bool | str) -> sf.SecurePipeline:
    """The embedded pipeline on the plaintext twin, its ranges from eight prompts."""
    pipe = sf.SecurePipeline.from_pretrained(
        "embedded", backend="plain", options={"certificate": certificate}, calibration=PROMPTS[:8]
    )
    if outliers != (1.0, 1.0):
        with torch.no_grad():
            with_outliers(pipe.unet, *outliers)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def largest(pipe: sf.SecurePipeline, texts: Sequence[str]) -> tuple[float, float]:
    """Largest residual activation and attention logit of float runs."""
    with torch.inference_mode(), Maxima(pipe.unet) as maxima:
        for seed, text in enumerate(texts):
            pipe.plain(text, generator=_generator(seed), output_type="latent", **arguments())
    return maxima.residual, maxima.logit


def arguments() -> dict[str, Any]:
    return {"num_inference_steps": STEPS, "guidance_scale": RECOMMENDED_GUIDANCE}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(10_000 + seed)


def measure(name: str, outliers: tuple[float, float], texts: Sequence[str]) -> dict[str, Any]:
    """One variant on these prompts: its record."""
    checked, blind, default = (opened(outliers, c) for c in ("all", False, True))
    tops = largest(blind, texts[:8])
    left, layers, images = [], Counter[str](), list[float | None]()
    for seed, text in enumerate(tqdm(texts, desc=name)):
        given = {"output_type": "np", **arguments()}
        exact = blind.plain(text, generator=_generator(seed), **given).images[0]
        problem = None
        try:
            image = checked(text, generator=_generator(seed), **given).images[0]
        except sf.RangeError as error:
            problem = str(error)
            image = _image(blind, text, seed, given)
        images.append(None if image is None else psnr(np.float64(exact), np.float64(image)))
        if problem is not None:
            seen = _refused(default, text, seed, given)
            named = re.search(r"calibrated for, (.*?) (?:\(.*)?first", problem)
            layers[named.group(1) if named else problem] += 1
            left.append(
                {"prompt": text, "psnr_db": images[-1], "default_certificate_saw": seen, "error": problem}
            )
    return {
        "variant": name, "prompts": len(texts), "left_range": len(left),
        "seen_by_default": sum(r["default_certificate_saw"] for r in left),
        "worst_psnr_db": min(_known(images)), "median_psnr_db": float(np.median(_known(images))),
        "refused_by_twin": images.count(None),
        "worst_psnr_of_those_that_left_db": min(_known([r["psnr_db"] for r in left]), default=None),
        "residual_max": tops[0], "logit_max": tops[1], "first_layers": dict(layers), "runs": left,
    }  # fmt: skip


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _image(pipe: sf.SecurePipeline, text: str, seed: int, given: dict[str, Any]) -> Any:
    """None where the twin itself refuses, as words would overflow."""
    try:
        return pipe(text, generator=_generator(seed), **given).images[0]
    except sf.RangeError:
        return None


def _refused(pipe: sf.SecurePipeline, text: str, seed: int, given: dict[str, Any]) -> bool:
    try:
        pipe(text, generator=_generator(seed), **given)
    except sf.RangeError:
        return True
    return False


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def page(record: dict[str, Any]) -> str:
    """The page of a record."""
    rows = [
        [
            r["variant"], r["kind"], str(r["prompts"]), common.number(r["residual_max"]),
            common.number(r["logit_max"]), str(r["left_range"]), str(r["refused_by_twin"]), str(r["seen_by_default"]),
            *(_decibels(r[key]) for key in ("median_psnr_db", "worst_psnr_db", "worst_psnr_of_those_that_left_db")),
        ]
        for r in record["rows"]
    ]  # fmt: skip
    head = [
        "model", "prompts", "runs", "max residual", "max logit", "left a range", "refused by the twin itself",
        "seen by 8 samples or the twin",
        "PSNR median", "worst", "worst of those that left",
    ]  # fmt: skip
    costs = record["costs"]
    return "\n".join([
        "# Ranges from eight prompts, two hundred others", "",
        common.machine_line(record["machine"]), "",
        *(__doc__ or "").split("\n\n")[2].splitlines(), "",
        common.markdown_table(head, rows), "",
        f"`certificate=\"all\"` makes every such run an error that names the layer. It costs "
        f"{costs['all'] / costs['default'] - 1:.0%} more bytes and "
        f"{costs['all_rounds'] - costs['default_rounds']} more rounds than the default "
        f"({costs['default'] / 1e6:.0f} MB, {costs['default_rounds']} rounds for one image, by "
        "the estimate, which is exact).", "",
    ])  # fmt: skip


def costs() -> dict[str, float]:
    """Bytes between the parties and rounds of one image, by kind of certificate."""
    found = {}
    for name, certificate in (("default", True), ("all", "all")):
        report = opened((1.0, 1.0), certificate).estimate("a handwritten seven", **arguments())
        found |= {name: float(report.total_bytes), f"{name}_rounds": report.rounds}
    return found


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="files of prompts")
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()  # remarks on prompts that are longer than the text encoder
    foreign = prompts_of(options.prompts, options.count)
    plain = opened((1.0, 1.0), False)
    residual, logit = largest(plain, usual_prompts(8))
    sharpened = (max(1.0, RESIDUAL / residual), max(1.0, LOGIT / logit))
    record: dict[str, Any] = {"machine": common.machine(), "steps": STEPS, "rows": [], "costs": costs()}
    for kind, texts in (("any subject", foreign), ("what it was trained on", usual_prompts(options.count))):
        for name, outliers in (("embedded", (1.0, 1.0)), ("with outliers", sharpened)):
            record["rows"].append({**measure(name, outliers, texts), "kind": kind})
            common.write_json(RECORD, record)
            PAGE.write_text(page(record), encoding="utf-8")
    print(page(record))


if __name__ == "__main__":
    main()
