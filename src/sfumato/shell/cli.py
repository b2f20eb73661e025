"""The ``sfumato`` command. Heavy imports happen inside the commands, so that help is instant."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sfumato.errors import JobError
from sfumato.shell.cluster import cluster_app, party, status
from sfumato.shell.command import CALIBRATE_ON, Profile, clean, for_file, for_picture, prompts_in
from sfumato.shell.dp import dp_app
from sfumato.shell.measuring import bench, reproduce
from sfumato.shell.model import model_app
from sfumato.shell.texts import classify, complete
from sfumato.shell.ui import ui

__all__ = ["app", "main"]

app = typer.Typer(
    name="sfumato",
    help="Private generative AI: prompts in, images or texts out, and no machine that computes sees either.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(cluster_app, name="cluster")
app.add_typer(model_app, name="model")
app.add_typer(dp_app, name="dp")
app.command()(party)
app.command()(status)
app.command()(ui)


def _version(asked: bool) -> None:
    if asked:
        try:
            print(f"sfumato {version('sfumato')}")
        except PackageNotFoundError:
            print("sfumato (not installed)")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of every command."""


Model = Annotated[
    str,
    typer.Option(
        help="'embedded', 'embedded-distilled' (guidance in one call), a StableDiffusionPipeline folder, a hub "
        "id, or cluster:NAME."
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
StepsOrOffer = Annotated[
    int | None,
    typer.Option(min=1, help="Denoising steps. [default: 50, or the first that cluster:NAME offers]"),
]
Guidance = Annotated[
    float | None,
    typer.Option(help="Guidance scale. [default: the embedded model's, that of cluster:NAME, else 7.5]"),
]
ClusterFile = Annotated[Path | None, typer.Option(help="Cluster file of three real parties.")]
Keys = Annotated[Path | None, typer.Option(help="Your certificate's folder. [default: that of the file]")]
Seed = Annotated[int, typer.Option(help="Seed of the noise: the same image as diffusers gives for it.")]
BackendName = Annotated[
    str,
    typer.Option(
        "--backend", help="local: three processes over TLS; simulate: one thread; plain: no secrecy."
    ),
]
Secret = Annotated[str, typer.Option(help="inputs, or inputs+weights.")]
PublicComponent = Annotated[
    list[str] | None,
    typer.Option(help="With secret weights: what stays in clear at the client (text_encoder, vae)."),
]
Size = Annotated[int | None, typer.Option(help="In pixels. [default: the model's own]")]
Sampler = Annotated[
    str | None,
    typer.Option(
        help="auto (few steps that keep the quality), ddim, dpm++, unipc, euler, ..., or a corrected few-step run: "
        "sdu, usg. [default: the model's own]"
    ),
]
CalibrateOn = Annotated[Path | None, typer.Option(help=CALIBRATE_ON, metavar="FILE")]


def _guidance(model: str, given: float | None) -> float:
    if given is not None:
        return given
    from sfumato.zoo import DISTILLED, RECOMMENDED_GUIDANCE

    return {"embedded": RECOMMENDED_GUIDANCE, DISTILLED: 1.0}.get(model, 7.5)


def _settings(model: str, steps: int | None, guidance: float | None) -> dict[str, Any]:
    """Steps and guidance; a shared model fills in those of its first offer."""
    from sfumato.runtime.names import shared_name

    if shared_name(model) is not None:
        return {
            n: v for n, v in (("num_inference_steps", steps), ("guidance_scale", guidance)) if v is not None
        }
    return {"num_inference_steps": steps or 50, "guidance_scale": _guidance(model, guidance)}


def _sampled(
    pipe: Any,
    name: str,
    model: str,
    steps: int | None,
    guidance: float | None,
    seed: int,
    image: Path | None,
    height: int | None,
    width: int | None,
) -> dict[str, Any]:
    """Give the pipeline this sampler; the arguments of its call, where ``steps`` and ``guidance`` were not given."""
    from sfumato.diffusion.samplers import CORRECTED, sampler
    from sfumato.runtime.names import shared_name

    shared = shared_name(model) is not None
    if shared and name == "auto":
        raise JobError("the owner of a shared model decides how it draws; leave out --sampler auto")
    if name in CORRECTED and (image is not None or shared):
        raise JobError(
            f"--sampler {name} draws from noise, with a model whose weights are here; leave out --image and "
            "cluster:NAME"
        )
    found = sampler(pipe, name, steps, seed, height=height, width=width)
    pipe.scheduler = found.scheduler
    if shared:
        return {}
    chosen = guidance if guidance is not None else found.guidance
    given = {"num_inference_steps": found.steps, "correction": found.correction, **found.arguments}
    return given if chosen is None else {**given, "guidance_scale": chosen}


@app.command()
@clean
def demo(
    prompt: Annotated[str, typer.Argument(help="What to draw.")] = "a handwritten seven",
    steps: Steps = 10,
    guidance: Guidance = None,
    seed: Seed = 0,
    backend: BackendName = "local",
    profile: Profile = "precise",
    model: Annotated[
        str, typer.Option(help="'embedded', a StableDiffusionPipeline folder, or a hub id.")
    ] = "embedded",
    out: Annotated[Path, typer.Option(help="Folder for the image, the report and the pictures.")] = Path(
        "sfumato-demo"
    ),
) -> None:
    """Draw one image privately with the embedded model, three parties on this machine.

    Example: `sfumato demo "a sneaker" --steps 20`
    """
    from sfumato.shell.demo import Demo, run_demo

    asked = Demo(
        prompt=prompt,
        steps=steps,
        guidance=_guidance(model, guidance),
        seed=seed,
        backend=backend,
        profile=profile,
        model=model,
        out=out,
    )
    run_demo(asked, Console())


@app.command()
@clean
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    model: Model = "embedded",
    steps: StepsOrOffer = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep away from.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to start from; it stays secret.")] = None,
    strength: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="How much of the picture to change. [default: 0.8, with a mask 1]"),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="What of the picture to paint anew: white; it stays secret.")
    ] = None,
    seed: Seed = 0,
    height: Size = None,
    width: Size = None,
    secret: Secret = "inputs",
    public_component: PublicComponent = None,
    cluster: ClusterFile = None,
    keys: Keys = None,
    profile: Profile = "precise",
    calibrate_on: CalibrateOn = None,
    backend: BackendName = "local",
    out: Annotated[Path, typer.Option(help="Where the image goes; its ending names the format.")] = Path(
        "image.png"
    ),
    report: Annotated[Path | None, typer.Option(help="Also write the cost report, as JSON, here.")] = None,
) -> None:
    """Draw an image privately.

    Example: `sfumato generate "a boat at dawn" --model ./stable-diffusion-v1-5 --steps 20 --out boat.png`

    From a picture: `sfumato generate "a boat at dusk" --image boat.png --strength 0.6`; a part: `--mask mask.png`

    With three hosts: `sfumato generate "a boat" --cluster ours/client/cluster.toml`, and with a model that its owner
    shared with them: `--model cluster:NAME`
    """
    for_picture(out)
    if report is not None:
        for_file(report, "report")
    import torch

    from sfumato.shell.pictures import pictures
    from sfumato.shell.report import cost_table

    kind, given = pictures(image, mask, strength, height, width)
    pipe = kind.from_pretrained(
        model,
        secret=secret,
        public_components=public_component or (),
        profile=profile,
        cluster=cluster,
        keys=keys,
        backend=backend,
        calibration=prompts_in(calibrate_on),
    )
    settings = _settings(model, steps, guidance)
    if sampler is not None:
        settings |= _sampled(pipe, sampler, model, steps, guidance, seed, image, height, width)
    output = pipe(
        prompt,
        negative_prompt=negative_prompt,
        **settings,
        **given,
        generator=torch.Generator().manual_seed(seed),
    )
    output.images[0].save(out)
    if report is not None:
        report.write_text(output.report.to_json(), encoding="utf-8")
    Console().print(cost_table(output.report), f"image: {out}")


@app.command()
@clean
def estimate(
    model: Annotated[
        str, typer.Argument(help="'embedded', a folder, a hub id, or cluster:NAME.")
    ] = "embedded",
    steps: StepsOrOffer = None,
    guidance: Guidance = None,
    height: Size = None,
    width: Size = None,
    images: Annotated[int | None, typer.Option(min=1, help="Images in one batch. [default: 1]")] = None,
    secret: Secret = "inputs",
    public_component: PublicComponent = None,
    cluster: Annotated[Path | None, typer.Option(help="Cluster file, for cluster:NAME.")] = None,
    keys: Keys = None,
    profile: Profile = "precise",
    calibrate_on: CalibrateOn = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole record as JSON.")] = False,
    show_plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Print each plan as well: method, error, headroom and bits of every layer."
        ),
    ] = False,
) -> None:
    """What a run will cost, exactly, before it runs: rounds and bytes.

    Example: `sfumato estimate embedded --steps 10 --plan`
    """
    from sfumato.diffusion.pipeline import SecurePipeline
    from sfumato.graph.memory import peak_memory
    from sfumato.graph.prices import priced
    from sfumato.shell.report import cost_table

    pipe = SecurePipeline.from_pretrained(
        model,
        secret=secret,
        public_components=public_component or (),
        profile=profile,
        cluster=cluster,
        keys=keys,
        calibration=prompts_in(calibrate_on),
    )
    arguments: dict[str, Any] = {
        **_settings(model, steps, guidance), "height": height, "width": width,
        **({"num_images_per_prompt": images} if images else {}),
    }  # fmt: skip
    report = pipe.estimate(**arguments)
    if as_json:
        print(replace(report, steps=()).to_json())  # the times of a run on shapes tell nothing
        return
    Console().print(
        cost_table(report, f"{arguments.get('num_inference_steps', len(report.steps))} steps of {model}")
    )
    for name, plan in pipe.plans(**arguments).items() if show_plan else ():
        prices = priced(plan)
        print(f"\n{name}\n{plan.table()}")
        print(
            f"one run of the same operations: {prices.budget_bytes / 1e6:,.1f} MB by the budget of docs/design/003, "
            f"{prices.spu_bytes / 1e6:,.1f} MB at SPU's prices; about {peak_memory(plan) / 1e6:,.0f} MB of memory each"
        )


@app.command()
@clean
def catalogue(
    function: Annotated[
        str | None, typer.Argument(help="exp, reciprocal, rsqrt, gelu, softmax, ... [default: all, in short]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for a page with figures, one for each function asked for.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every number as JSON.")] = False,
) -> None:
    """What papers approximate a function with: error, range, cost, and known defects, all measured here.

    Example: `sfumato catalogue gelu --out pages`
    """
    from sfumato.catalogue import function as known

    if function is not None:
        known(function)
    from sfumato.shell.catalogue import show

    show(function, out, as_json, Console())


app.command()(classify)
app.command()(complete)
app.command()(bench)
app.command()(reproduce)


def main() -> None:
    """Entry point."""
    app(prog_name="sfumato")


if __name__ == "__main__":
    main()
