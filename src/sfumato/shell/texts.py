"""``sfumato classify``, ``sfumato complete`` and ``sfumato model share-text``: transformers models on texts that nobody
else reads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sfumato.shell.command import Profile, clean, for_file, prompts_in
from sfumato.shell.model import agreed, bar, folder_of, model_app

__all__ = ["classify", "complete", "share_text"]

Model = Annotated[str, typer.Option(help="Folder of a transformers model, a hub id, or cluster:NAME.")]
Secret = Annotated[str, typer.Option(help="inputs, or inputs+weights.")]
ClusterFile = Annotated[
    Path | None, typer.Option(help="Cluster file of three real parties. [default: three on this machine]")
]
Keys = Annotated[Path | None, typer.Option(help="Your certificate's folder. [default: that of the file]")]
BackendName = Annotated[
    str,
    typer.Option(
        "--backend", help="local: three processes over TLS; simulate: one thread; plain: no secrecy."
    ),
]
MaxLength = Annotated[
    int | None, typer.Option(min=1, help="Tokens of a text at most. [default: 512, or the model's]")
]
Padding = Annotated[
    bool,
    typer.Option("--padding/--exact-length", help="Keep the text's length secret, up to a public bucket."),
]
CalibrateOn = Annotated[
    Path | None,
    typer.Option(help="Texts to measure ranges on, one a line; not secret. [default: built-in ones]"),
]
Report = Annotated[Path | None, typer.Option(help="Also write the cost report, as JSON, here.")]


def _opened(model: str, task: str | None, calibrate_on: Path | None, **options: Any) -> Any:
    from sfumato.inference.model import SecureModel

    return SecureModel.from_pretrained(model, task=task, calibration=prompts_in(calibrate_on), **options)


def _finish(report: Any, file: Path | None) -> None:
    from sfumato.shell.report import cost_table

    if file is not None:
        file.write_text(report.to_json(), encoding="utf-8")
    Console().print(cost_table(report))


@clean
def classify(
    text: Annotated[list[str], typer.Argument(help="Texts; all of them in one batch.")],
    model: Model,
    secret: Secret = "inputs",
    cluster: ClusterFile = None,
    keys: Keys = None,
    profile: Profile = "precise",
    backend: BackendName = "local",
    max_length: MaxLength = None,
    padding: Padding = True,
    calibrate_on: CalibrateOn = None,
    report: Report = None,
) -> None:
    """Classify texts privately.

    Example: `sfumato classify "what a waste of an evening" --model ./sst2-model --secret inputs+weights`
    """
    if report is not None:
        for_file(report, "report")
    with _opened(
        model, "sequence-classification", calibrate_on, secret=secret, cluster=cluster, keys=keys, profile=profile,
        backend=backend, max_length=max_length, padding=padding,
    ) as opened:  # fmt: skip
        found = opened(text)
    table = Table(show_header=False)
    for line, label, scores in zip(text, found.labels, found.logits.softmax(-1), strict=True):
        table.add_row(line, str(label), f"{float(scores.max()):.3f}")
    Console().print(table)
    _finish(found.report, report)


@clean
def complete(
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    model: Model,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 20,
    release: Annotated[
        str, typer.Option(help="What is opened to you alone: tokens one by one, all at the end, or logits.")
    ] = "tokens",
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="Of the draws.")] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Draw among so many of the likeliest; with --release logits.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop after this text; may be given several times.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    secret: Secret = "inputs",
    cluster: ClusterFile = None,
    keys: Keys = None,
    profile: Profile = "precise",
    backend: BackendName = "local",
    max_length: MaxLength = None,
    padding: Padding = True,
    calibrate_on: CalibrateOn = None,
    report: Report = None,
) -> None:
    """Write a text on privately, token by token.

    Example: `sfumato complete "The harbour was empty, and" --model ./gpt2 --tokens 12`

    Nothing before the end, to anybody: `sfumato complete "Dear doctor," --model ./gpt2 --tokens 12 --release end`
    """
    if report is not None:
        for_file(report, "report")
    with _opened(
        model, "causal-lm", calibrate_on, secret=secret, cluster=cluster, keys=keys, profile=profile,
        backend=backend, max_length=max_length, padding=padding,
    ) as opened:  # fmt: skip
        opened.set_progress_bar_config(disable=not sys.stderr.isatty())
        found = opened.generate(
            prompt, max_new_tokens=tokens, release=release, do_sample=sample, temperature=temperature, top_k=top_k,
            stop=stop, seed=seed,
        )  # fmt: skip
    print(prompt + found.text)
    _finish(found.report, report)


@model_app.command("share-text")
@clean
def share_text(
    path: Annotated[str, typer.Argument(help="Folder of a transformers model, or a hub id.")],
    cluster: Annotated[Path, typer.Option(help="The cluster file.", metavar="FILE")],
    name: Annotated[str, typer.Option(help="What clients call it: cluster:NAME.")],
    keys: Keys = None,
    task: Annotated[str | None, typer.Option(help="[default: what the model's architecture is for]")] = None,
    secret: Annotated[
        str, typer.Option(help="inputs+weights, or inputs (everyone may have the weights).")
    ] = "inputs+weights",
    length: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens that texts are padded to; repeat. [default: 32]")
    ] = None,
    texts: Annotated[int, typer.Option(min=1, help="Texts of one call.")] = 1,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="New tokens to make room for, so that texts are written on. [default: one call alone]"
        ),
    ] = None,
    release: Annotated[
        list[str] | None,
        typer.Option(help="What clients may see of it: tokens, end, logits; repeat. [default: tokens]"),
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Of draws; repeat. [default: the likeliest token alone]")
    ] = None,
    client: Annotated[
        list[str] | None, typer.Option(help="Who may use it; repeat. [default: every client of the cluster]")
    ] = None,
    profile: Profile = "precise",
    padding: Padding = True,
    calibrate_on: CalibrateOn = None,
    replace: Annotated[bool, typer.Option("--replace", help="In place of your model of this name.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask first.")] = False,
) -> None:
    """Share a transformers model: plans for each length, and weights as shares.

    Ranges are measured here, in the clear. Nothing leaves this machine before you have seen who learns what.

    Example: `sfumato model share-text ./sst2-model --name reviews --cluster ours/owner/cluster.toml --length 64`
    """
    from sfumato.inference.offers import Terms, lessons, offered
    from sfumato.runtime.cluster import Cluster
    from sfumato.runtime.names import shared_name
    from sfumato.runtime.sharing import share_model

    shared_name(f"cluster:{name}")
    parties = Cluster.load(cluster)
    terms = Terms(
        lengths=length or (32,), texts=texts, tokens=tokens, releases=release or ("tokens",),
        temperatures=temperature or (None,), clients=client,
    )  # fmt: skip
    model = _opened(path, task, calibrate_on, secret=secret, profile=profile, padding=padding)
    made, console = offered(model, name, terms, replace=replace), Console()
    table = Table(
        title=f"cluster:{name} will offer; who learns what", title_justify="left", show_header=False
    )
    for who, what in lessons(made):
        table.add_row(who, what)
    console.print(table)
    agreed(f"Share it as cluster:{name}?", yes)
    with bar(console) as progress:
        share_id = share_model(parties, keys or folder_of(cluster), made, progress=progress)
    console.print(f"shared as cluster:{name} (share {share_id[:8]})", highlight=False)
