"""``sfumato dp``: differentially private fine-tuning of latent diffusion models, from pre-training to the audit."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sfumato.errors import JobError
from sfumato.shell.command import clean

if TYPE_CHECKING:
    from sfumato.dp.ledger import Ledger

__all__ = ["dp_app", "needs_dp"]

dp_app = typer.Typer(
    help="Fine-tune a latent diffusion model on private images with an (ε, δ) guarantee.",
    no_args_is_help=True,
)
P = ParamSpec("P")
Result = TypeVar("Result")

Captions = Annotated[
    list[str] | None,
    typer.Option("--caption", help="What a class is called in a prompt, once per class, in order."),
]
Unconditional = Annotated[bool, typer.Option("--unconditional", help="Leave all captions empty.")]


def needs_dp(command: Callable[P, Result]) -> Callable[P, Result]:
    """A missing package of the extra becomes one sentence; models load without the libraries' bars."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> Result:
        # What the model libraries say while they are imported, of image packages that nothing here needs.
        for library in ("TRANSFORMERS", "DIFFUSERS"):
            os.environ.setdefault(f"{library}_VERBOSITY", "error")
        from sfumato.diffusion.loading import without_bars

        try:
            with without_bars():
                return command(*args, **kwargs)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] in ("opacus", "dp_accounting", "scipy", "peft"):
                raise JobError(f"{error.name} is not installed; pip install 'sfumato[dp]'") from None
            raise

    return run


@dp_app.command("pretrain")
@clean
@needs_dp
def pretrain(
    out: Annotated[Path, typer.Option(help="Folder of the public model.")],
    fonts: Annotated[bool, typer.Option(help="Characters rendered from this machine's fonts.")] = True,
    font_folder: Annotated[
        list[Path] | None, typer.Option(help="Where fonts are; repeat. [default: the system's]")
    ] = None,
    drawings: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Omniglot as an .npz (bits105, labels).")
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Public images with captions (formats as of `dp train --private`); repeat."),
    ] = None,
    word: Annotated[
        list[str] | None,
        typer.Option(help="A caption of the private data, so that its words become tokens; repeat."),
    ] = None,
    channels: Annotated[int, typer.Option(min=1, max=3, help="1 for grey images, 3 for colour.")] = 1,
    minutes: Annotated[float, typer.Option(min=0.0, help="Of one core, half for each network.")] = 36.0,
) -> None:
    """Train an autoencoder and a latent diffusion model on public images alone.

    Example: `sfumato dp pretrain --drawings omniglot.npz --minutes 36 --out public`
    """
    from sfumato.dp.pretrain import Public, pretrain_folder

    given = Public(
        fonts=tuple(font_folder or ()) if fonts else None, drawings=drawings, images=tuple(images or ()),
        words=tuple(word or ()), channels=channels,
    )  # fmt: skip
    pretrain_folder(given, out, minutes)
    print(f"public model: {out}")


@dp_app.command("train")
@clean
@needs_dp
def train(
    public: Annotated[
        Path, typer.Option(help="Pipeline folder to start from, or 'glyphs', which comes with sfumato.")
    ],
    private: Annotated[
        Path,
        typer.Option(
            help="Private images: a folder of class folders, one with metadata.jsonl, an .npz, a folder of idx files."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of this run; its 'model' is what may be published.")],
    epsilon: Annotated[
        float,
        typer.Option(help="The budget ε. inf: no noise and no clipping, to compare with, not to publish."),
    ],
    delta: Annotated[float, typer.Option(help="The budget δ; below 1 / records.")] = 1e-5,
    epochs: Annotated[float, typer.Option(help="Expected visits of each image.")] = 10.0,
    batch: Annotated[int, typer.Option(help="Expected images a step; about a 60th of all does well.")] = 1024,
    draws: Annotated[int, typer.Option(help="Timesteps per image, averaged before clipping.")] = 2,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    decay: Annotated[str, typer.Option(help="cosine or constant.")] = "cosine",
    clip: Annotated[float, typer.Option(help="Bound on an image's gradient norm.")] = 1.0,
    normalise: Annotated[
        bool, typer.Option(help="Bring every image's gradient near the bound (the rate is then free of it).")
    ] = True,
    average: Annotated[float, typer.Option(help="Decay of the averaged weights; 0 keeps the last.")] = 0.98,
    what: Annotated[str, typer.Option(help="attention, lora, conditioning or all.")] = "attention",
    first: Annotated[int, typer.Option(help="First attention module that is trained.")] = 1,
    rank: Annotated[int | None, typer.Option(help="Of LoRA (needed there).")] = None,
    drop: Annotated[float, typer.Option(help="Share of captions left empty.")] = 0.1,
    physical: Annotated[int, typer.Option(help="Images times draws computed at once.")] = 256,
    interval: Annotated[int, typer.Option(help="Steps between checkpoints, at most a quarter of all.")] = 10,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    caption: Captions = None,
    unconditional: Unconditional = False,
    seen: Annotated[
        list[str] | None,
        typer.Option(help="What the public model was trained on, where its folder does not say; repeat."),
    ] = None,
    register: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Your list of all runs on this data; its key lies beside it."),
    ] = None,
    limit_epsilon: Annotated[
        float | None, typer.Option(help="Most that all runs of the register may cost, at their smallest δ.")
    ] = None,
) -> None:
    """Fine-tune on private images. The noise is computed from the budget; an interrupted run goes on where it was.

    Example: `sfumato dp train --public public --private digits --epsilon 10 --out run`
    """
    from sfumato.dp.data import read_records
    from sfumato.dp.distributed import joined
    from sfumato.dp.finetune import finetune
    from sfumato.dp.recipe import Recipe
    from sfumato.shell.reproduce import bars

    recipe = Recipe(
        epsilon=epsilon, delta=delta, epochs=epochs, batch=batch, clip=clip, normalise=normalise, rate=rate,
        decay=decay, draws=draws, average=average, what=what, first=first, rank=rank, drop=drop, physical=physical,
        interval=interval, precision=precision,
    )  # fmt: skip
    records = read_records(private, captions=caption or ())
    records = records.without_captions() if unconditional else records
    with joined() as leader, bars(Console(quiet=not leader)) as progress:
        run = finetune(
            public, records, recipe, out, declared=seen or (), register=register, limit_epsilon=limit_epsilon,
            device=device, progress=progress,
        )  # fmt: skip
    if leader:
        show_ledger(run.ledger, Console())
        print(f"model: {run.model}" + ("" if recipe.private else " (not private: do not publish it)"))


@dp_app.command("sample")
@clean
@needs_dp
def sample(
    model: Annotated[Path, typer.Argument(help="A fine-tuned model's folder, a public one, or 'glyphs'.")],
    images: Annotated[int, typer.Option(min=1, help="How many, evenly over the prompts.")] = 1000,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Repeat for several. [default: the ledger's captions; where it has none, no prompt]"
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 25,
    guidance: Annotated[
        float, typer.Option(help="Weight of the prompt; 1 is none beyond the model's own.")
    ] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="An .npz; a grid .png beside it.")] = Path("samples.npz"),
) -> None:
    """Draw images and say under which guarantee. Sampling costs no privacy.

    Example: `sfumato dp sample run/model --images 50000 --prompt "a handwritten seven" --out samples.npz`
    """
    import torch

    from sfumato.dp.ledger import Ledger
    from sfumato.dp.parts import folder_of, load_parts
    from sfumato.dp.sample import draw, grid, save_samples
    from sfumato.shell.reproduce import bars

    ledger = Ledger.read(model / "ledger.json") if (model / "ledger.json").is_file() else None
    captions = tuple(prompt or ()) or (("",) if ledger is None else ledger.captions)
    if out.suffix != ".npz":
        raise JobError(f"--out is {out}; name an .npz file")
    parts = load_parts(folder_of(model))
    labels = torch.arange(images) % len(captions)
    out.parent.mkdir(parents=True, exist_ok=True)
    with bars(Console()) as progress:
        made = draw(
            parts, captions, labels, steps=steps, guidance=guidance, seed=seed, precision=precision,
            device=device, progress=lambda done, of: progress("images", done, of),
        )  # fmt: skip
    save_samples(made, out)
    order = torch.argsort(labels[: 20 * len(captions)], stable=True)
    grid(made.images[order], 20, 2).save(out.with_suffix(".png"))
    print(f"images: {out}, {out.with_suffix('.png')}")
    if ledger is None:
        print("no ledger: nothing is claimed about the images this model was trained on")
    else:
        show_ledger(ledger, Console())


@dp_app.command("evaluate")
@clean
@needs_dp
def evaluate(
    samples: Annotated[Path, typer.Argument(help="An .npz of `dp sample`, or images in another form.")],
    test: Annotated[Path, typer.Option(help="Real images that were not trained on.")],
    caption: Captions = None,
    kinds: Annotated[
        str, typer.Option(help="Classifiers: cnn, mlp, wrn-40-4, wrn-16-2, ... by commas.")
    ] = "cnn,mlp",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Of each; the best on synthetic images counts.")] = 8,
    mirror: Annotated[bool, typer.Option("--mirror", help="A mirrored image keeps its class.")] = False,
    judge: Annotated[str | None, typer.Option(help="grey or cifar10: distances in its features.")] = None,
    private: Annotated[
        Path | None, typer.Option(help="The private images: how near samples come to them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every number as JSON.")] = False,
) -> None:
    """Train classifiers on synthetic images, chosen on synthetic ones, and test them on real images.

    What it prints was measured on real data and is not covered by ε.

    Example: `sfumato dp evaluate samples.npz --test mnist --caption "a handwritten zero" ... --kinds cnn`
    """
    from sfumato.dp import evaluate as measures
    from sfumato.dp.data import fit, read_records

    made = read_records(samples, captions=caption or ())
    real = read_records(test, captions=caption or (), numbered=made.captions, split="test").aligned(
        made.captions
    )
    side, channels = int(made.images.shape[-1]), int(made.images.shape[1])
    tested = fit(real.images, channels, side)
    recipe = measures.ClassifierRecipe(epochs=epochs, mirror=mirror)
    found = measures.utility(
        (made.images, made.labels),
        (tested, real.labels),
        kinds=tuple(kinds.split(",")),
        seeds=range(seeds),
        recipe=recipe,
    )
    report: dict[str, object] = {"utility": [u.to_json() for u in found]}
    table = Table(
        title=f"{len(made):,} synthetic images, {len(real):,} real ones to test on", title_justify="left"
    )
    for head in ("classifier", "accuracy", "spread", "worst class", "CPU s each"):
        table.add_column(head, justify="left" if head == "classifier" else "right")
    for u in found:
        worst = min((a for a in u.per_class if not math.isnan(a)), default=math.nan)
        table.add_row(
            u.kind, f"{100 * u.mean:.2f} %", f"{100 * u.spread:.2f}", f"{100 * worst:.1f} %",
            f"{sum(u.cpu_s) / len(u.cpu_s):.0f}",
        )  # fmt: skip
    lines = []
    if judge is not None:
        far = measures.distance(
            made.images, tested, features=measures.judge_features(judge), name=f"judge {judge}"
        )
        report["distance"] = far.to_json()
        lines.append(
            f"Fréchet distance in the judge's features {far.frechet:.3f} (not FID), precision {far.precision:.2f}, "
            f"recall {far.recall:.2f}"
        )
    if private is not None:
        theirs = read_records(private, captions=caption or (), numbered=made.captions)
        near = measures.copies(made.images[:2000], fit(theirs.images, channels, side), tested[:2000])
        report["copies"] = near.to_json()
        lines.append(
            f"nearer to a private image than 99 of 100 other real ones are: {100 * near.nearer:.2f} % of the samples "
            f"(real images: 1 %); identical: {near.identical}"
        )
    if as_json:
        print(json.dumps(report, indent=1))
        return
    Console().print(table)
    for line in lines:
        print(line)


@dp_app.command("audit")
@clean
@needs_dp
def audit(
    trials: Annotated[int, typer.Option(min=100, help="Steps with and without the canary.")] = 10_000,
    model: Annotated[
        Path | None, typer.Option(help="A fine-tuned folder: membership inference on it; needs the next two.")
    ] = None,
    members: Annotated[Path | None, typer.Option(help="Private images it was trained on.")] = None,
    others: Annotated[Path | None, typer.Option(help="Images of the same kind that it was not.")] = None,
    caption: Captions = None,
    images: Annotated[int, typer.Option(min=100, help="Of each side, for membership inference.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print every number as JSON.")] = False,
) -> None:
    """Attack the shipped private step, and a released model if one is named: lower bounds on ε, beside the claim. Exit
    code 1 if a bound is above it.

    Example: `sfumato dp audit --trials 10000`
    """
    from sfumato.dp.audit import audit_step
    from sfumato.shell.reproduce import bars

    if (model is None) != (members is None) or (model is None) != (others is None):
        raise JobError("membership inference needs --model, --members and --others together")
    with bars(Console()) as progress:
        found = audit_step(trials=trials, progress=lambda done, of: progress("steps", done, of))
    report = {"step": found.to_json()}
    lines = [str(found)]
    refuted = found.verdict != "consistent"
    if model is not None and members is not None and others is not None:
        from sfumato.dp.attack import attack_folder
        from sfumato.dp.data import read_records
        from sfumato.dp.ledger import Ledger

        inside = read_records(members, captions=caption or ())
        outside = read_records(others, captions=caption or (), numbered=inside.captions, split="test")
        claim = Ledger.read(model / "ledger.json")
        outside = outside.aligned(inside.captions).sampled(images)
        told = attack_folder(model, inside.sampled(images), outside, delta=claim.delta)
        claimed = claim.spent().epsilon
        report["membership"] = {**told.to_json(), "claim": claimed}
        lines.append(f"{told} The ledger claims ε = {claimed:.4f}.")
        refuted = refuted or told.epsilon > claimed
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        print("\n".join(lines))
    if refuted:
        raise typer.Exit(1)


@dp_app.command("ledger")
@clean
@needs_dp
def ledger(
    files: Annotated[list[Path], typer.Argument(help="Ledgers, or folders that hold one.")],
) -> None:
    """Print privacy ledgers; of several on the same data also what they cost together.

    Example: `sfumato dp ledger run1/model run2/model`
    """
    from sfumato.dp.ledger import Ledger, compose

    held = [Ledger.read(path / "ledger.json" if path.is_dir() else path) for path in files]
    for one in held:
        show_ledger(one, Console())
    if len(held) > 1:
        same = len({one.private for one in held}) == 1
        total = compose(held)
        print(
            f"together ε = {total.epsilon:.4f} at δ = {held[0].delta:g}"
            + (
                ""
                if same
                else ", if they read the same records (their commitments differ: other data, or other keys)"
            )
        )


def show_ledger(ledger: Ledger, console: Console) -> None:
    """The guarantee in a table, and what it does not cover."""
    spent, plan = ledger.spent(), ledger.event
    table = Table(title="privacy ledger", title_justify="left", show_header=False)
    rows = (
        ("guarantee", f"ε = {spent.epsilon:.4f} at δ = {ledger.delta:g} (budget ε = {ledger.epsilon:g})"),
        ("accountants", f"PRV {spent.prv:.4f}, PLD {spent.pld:.4f}; RDP bound {spent.rdp:.4f}"),
        (
            ("protects", "adding or removing one record (image and its label)")
            if math.isfinite(ledger.epsilon)
            else ("protects", "nothing: there was no noise")
        ),
        ("steps", f"{ledger.reserved} of {ledger.event.steps} spent, {ledger.done} in the weights"),
        ("each step", f"sample rate {plan.sample_rate:.5f}, noise multiplier {plan.noise_multiplier:.4f}"),
        ("trained", ledger.trained),
        ("public start", ", ".join(ledger.public) or "nothing is known"),
    )  # fmt: skip
    for name, value in rows:
        table.add_row(name, escape(value))
    console.print(table)
    console.print("not covered:", style="bold")
    for sentence in ledger.not_covered:
        console.print(f"- {sentence}", markup=False)
