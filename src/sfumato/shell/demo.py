"""``sfumato demo``: one prompt, one image, three local parties, and proof of what was seen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from rich.console import Console

from sfumato.diffusion.pipeline import SecurePipeline
from sfumato.diffusion.seen import blocks_of, share_picture
from sfumato.errors import JobError
from sfumato.runtime.names import shared_name
from sfumato.shell import report as pages
from sfumato.shell.command import for_folder
from sfumato.zoo import RECOMMENDED_GUIDANCE

__all__ = ["Demo", "run_demo"]

_ENLARGED = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What to draw and where to write."""

    prompt: str = "a handwritten seven"
    model: str = "embedded"
    steps: int = 10
    guidance: float = RECOMMENDED_GUIDANCE
    seed: int = 0
    backend: str = "local"
    profile: str = "precise"
    out: Path = Path("sfumato-demo")


def run_demo(demo: Demo, console: Console) -> dict[str, Any]:
    """Draw the image privately and in the clear, compare, and write everything into ``demo.out``.

    Raises:
        JobError: a shared model, which cannot be run in the clear; or the folder cannot be made.
    """
    if shared_name(demo.model) is not None:
        raise JobError(
            f"the demo compares with the model in the clear, and the weights of {demo.model} are at the parties alone; "
            "use sfumato generate --cluster FILE"
        )
    for_folder(demo.out, "demo")
    pipe = SecurePipeline.from_pretrained(demo.model, backend=demo.backend, profile=demo.profile)
    where = {"local": "three processes, TLS 1.3 with certificates on both sides"}.get(
        demo.backend, demo.backend
    )
    console.print(f"[bold]{demo.prompt!r}[/bold], {demo.steps} steps, guidance {demo.guidance:g}; {where}")
    pipe.set_progress_bar_config(disable=not console.is_terminal)
    arguments: dict[str, Any] = {
        "prompt": demo.prompt,
        "num_inference_steps": demo.steps,
        "guidance_scale": demo.guidance,
        "output_type": "np",
    }

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(demo.seed)

    plan = pipe.plan(**arguments)
    output = pipe(**arguments, generator=seeded())
    pipe.set_progress_bar_config(disable=True)
    plain = pipe.plain(**arguments, generator=seeded()).images[0]
    image, report, share = output.images[0], output.report, pipe.last_share
    assert share is not None
    exact = pipe.estimate(**arguments).same_cost(report) if demo.backend != "plain" else None
    similarity = pages.psnr(image, plain)
    sampler = type(pipe.scheduler).__name__
    facts = {
        "prompt": demo.prompt,
        "steps": f"{demo.steps} ({sampler}, guidance {demo.guidance:g}, seed {demo.seed})",
        "parties": where,
        "PSNR against plain float32": f"{similarity:.1f} dB",
        "sent by P0, P1, P2": ", ".join(map(pages.readable, report.bytes_sent)),
        "rounds": f"{report.rounds:,}",
        "estimate": {True: "the same, byte for byte and round for round", False: "DIFFERS", None: "-"}[exact],
        "seconds": f"{report.seconds:.2f}",
        "seconds a step": f"{sum(report.steps) / len(report.steps):.2f}",
    }
    enlarged(pipe, image).save(demo.out / "image.png")
    pages.save_panels(
        demo.out / "comparison.png",
        [
            ("drawn privately", image),
            ("plain float32", plain),
            ("what party 0 sent of it", share_picture(share)),
        ],
    )
    pages.save_bars(demo.out / "bytes.png", blocks_of(report, {"unet": plan}))
    (demo.out / "report.json").write_text(report.to_json(), encoding="utf-8")
    pages.write_page(demo.out / "report.md", facts, report, ["comparison.png", "bytes.png"])
    console.print(pages.cost_table(report))
    console.print(f"PSNR against the plain pipeline: {similarity:.1f} dB; estimate: {facts['estimate']}")
    console.print(f"image, comparison, report: {demo.out}/", style="bold")
    return {"psnr": similarity, "report": report}


def enlarged(pipe: Any, image: NDArray[Any]) -> Any:
    """A PIL image, small ones enlarged in whole pixels so that they can be looked at."""
    picture = pipe.image_processor.numpy_to_pil(image[None])[0]
    factor = max(1, _ENLARGED // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), 0)
