"""``sfumato bench`` and ``sfumato reproduce``: what is measured, as commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sfumato.errors import JobError
from sfumato.shell.command import Profile, clean, prompts_in

__all__ = ["bench", "reproduce"]


@clean
def bench(
    cases: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CASE]...", help="Names or patterns ('*_1e5'). [default: all]"),
    ] = None,
    json_lines: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Append the records here, as JSON lines.")
    ] = None,
    peers: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="The peers' JSON lines: a file or a folder; repeat for more."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Weights public (the cases that have some).")
    ] = False,
    profile: Profile = "precise",
    repeat: Annotated[int, typer.Option(min=1, help="Timed calls of a case, after a warm-up.")] = 3,
    budget: Annotated[
        float, typer.Option(min=0, help="Seconds of calls after which a case ends early.")
    ] = 60.0,
    out: Annotated[Path | None, typer.Option(metavar="PAGE", help="Write a page (Markdown) here.")] = None,
    names: Annotated[bool, typer.Option("--list", help="Print the names of the cases and stop.")] = False,
) -> None:
    """Measure the cases that SPU and CrypTen are measured on, through three real processes over TLS.

    Each time stands beside its floor on this machine: GEMM work, bytes and rounds at measured rates.

    Example: `sfumato bench 'silu_*' bert_layer_128 --json ours.jsonl --peers benchmarks/results/peers --out page.md`
    """
    from sfumato.bench.measure import Settings
    from sfumato.shell.bench import Bench, list_cases, run_bench

    if names:
        list_cases(Console())
        return
    settings = Settings(public=public, profile=profile, repeat=repeat, budget_s=budget)
    asked = Bench(cases=cases or (), settings=settings, json=json_lines, peers=peers or (), out=out)
    run_bench(asked, Console())


#: Options of some papers alone; every other is for the papers on diffusion, and some of those for dp-ldm too.
_OF_COSTS = {"network", "run", "scores"}
_OF_DP = {"data", "public", "rows", "guidance", "classifiers", "device"}
_OF_IMAGES = {"images", "inception"}


def _refuse_others(context: typer.Context, paper: str) -> None:
    """
    Raises:
        JobError: an option that this paper's study would pass over in silence.
    """
    from sfumato.shell.costs import DEFAULT_MODELS

    own = {"paper", "model", "out"}
    if paper in DEFAULT_MODELS:
        own |= _OF_COSTS
    elif paper == "dp-ldm":
        own |= _OF_DP | _OF_IMAGES
    else:
        own = set(context.params) - _OF_COSTS - _OF_DP
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name not in own:
            option = {"main_rows": "main"}.get(name, name).replace("_", "-")
            raise JobError(f"{paper} has no use for --{option}; leave it out")


@clean
def reproduce(
    context: typer.Context,
    paper: Annotated[
        str, typer.Argument(help="sdu, usg, cipherdm, puma, ditto, mpcformer, marill or dp-ldm.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="embedded, dit, cifar10, mnist10, mnist01, mnist01-mish; with --prompts a folder or hub id. For "
            "papers on transformers NAME:TOKENS of bert-base, bert-large, roberta-base, gpt2-base, gpt2-medium, with "
            "commas. For dp-ldm: mnist, pneumonia, cifar10. [default: the paper's first]"
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            min=100, help="Of each row, simulated in the clear. [default: 1000; dp-ldm: 50000 of main rows]"
        ),
    ] = None,
    secure: Annotated[int, typer.Option(min=0, help="Of each main row, through the real protocol.")] = 0,
    secure_steps: Annotated[
        int | None, typer.Option(min=1, help="Of main rows with at most so many steps.")
    ] = None,
    main_rows: Annotated[bool, typer.Option("--main", help="The main table alone.")] = False,
    ours: Annotated[bool, typer.Option("--ours", help="Our settings and the original alone.")] = False,
    weights: Annotated[
        Path | None, typer.Option(help="Folder of weights that do not come with sfumato (cifar10).")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What to draw, one a line, with any pipeline.")
    ] = None,
    clip: Annotated[
        str, typer.Option(metavar="MODEL", help="A CLIP model, folder or hub id: score and distances.")
    ] = "",
    inception: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="torch-fidelity's InceptionV3 weights: distances in its features."),
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Fan out over a Ray cluster, or 'auto'.")
    ] = None,
    network: Annotated[
        list[str] | None,
        typer.Option(help="Also time transformers on emulated links: lan, wan or none; may be repeated."),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            metavar="NAME:TOKENS",
            help="Of transformers: which of --model are also run, by commas, for error and seconds; all, or none, "
            "where bytes and rounds are counted on shapes alone. [default: all of --model, or the paper's first]",
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="scores.json of students, for the utility of ditto, mpcformer, marill."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="dp-ldm: mnist/, pneumonia_mnist/, cifar10/ below it."),
    ] = None,
    public: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="dp-ldm: the public model, of `sfumato dp pretrain`, or 'glyphs'."
        ),
    ] = None,
    rows: Annotated[str, typer.Option(help="dp-ldm: main, ablation, or names of rows, by commas.")] = "main",
    guidance: Annotated[float, typer.Option(help="dp-ldm: weight of the prompt in sampling.")] = 1.0,
    classifiers: Annotated[str, typer.Option(help="dp-ldm: cnn, mlp, wrn-40-4, ... by commas.")] = "cnn,mlp",
    device: Annotated[str, typer.Option(help="dp-ldm: cpu, cuda, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for chunks, records and the page.")] = Path("reproduce"),
) -> None:
    """Rebuild a paper's tables at this machine's scale, with the controls beside them: JSON, and a page.

    An interrupted run goes on where it was.

    Example: `sfumato reproduce sdu --model embedded --images 1000 --secure 200`
    """
    from sfumato.shell.costs import DEFAULT_MODELS, Costs, run_costs
    from sfumato.shell.reproduce import run_reproduce
    from sfumato.study.reproduce import Asked
    from sfumato.study.tables import STUDIES

    _refuse_others(context, paper)
    if paper in DEFAULT_MODELS:
        told = Costs(
            paper=paper, model=model or "", run=run or "", networks=network or (), scores=scores, out=out
        )
        run_costs(told, Console())
        return
    if paper == "dp-ldm":
        from sfumato.shell.dp_reproduce import run_dp_ldm, setting_of

        if data is None or public is None:
            raise JobError(
                "dp-ldm needs --data, the private and test images, and --public, a model to start from"
            )
        setting = setting_of(
            subject=model or "mnist", data=data, public=public, out=out, images=images or 50_000,
            kinds=tuple(classifiers.split(",")), device=device, inception=inception,
        )  # fmt: skip
        run_dp_ldm(Console(), setting, rows.split(","), guidance)
        return
    if paper not in STUDIES:
        known = ", ".join((*STUDIES, *DEFAULT_MODELS, "dp-ldm"))
        raise JobError(f"there is no study of {paper!r}; use one of {known}")
    asked = Asked(
        paper=paper, model=model or STUDIES[paper][1][0], images=images or 1000, secure=secure,
        secure_steps=secure_steps, main=main_rows, ours=ours,
        ray=ray, weights="" if weights is None else str(weights.resolve()), out=out,
        prompts=tuple(prompts_in(prompts) or ()), clip=clip,
    )  # fmt: skip
    run_reproduce(asked, Console(), inception)
