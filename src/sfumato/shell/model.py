"""``sfumato model``: what owners keep at the parties, for clients to use without ever having it."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sfumato.errors import JobError, SfumatoError
from sfumato.shell.command import CALIBRATE_ON, clean, prompts_in

if TYPE_CHECKING:
    from sfumato.runtime.sharing import ModelToShare

__all__ = ["agreed", "bar", "folder_of", "found", "model_app", "offer_tables"]

model_app = typer.Typer(
    help="Models that owners keep at the parties, and clients use as cluster:NAME.", no_args_is_help=True
)
_PARTIES = (0, 1, 2)

ClusterFile = Annotated[Path, typer.Option("--cluster", help="The cluster file.", metavar="FILE")]
Keys = Annotated[
    Path | None,
    typer.Option(help="Your certificate's folder. [default: that of the file]", metavar="FOLDER"),
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask first.")]


@model_app.command("share")
@clean
def share(
    path: Annotated[str, typer.Argument(help="'embedded', a StableDiffusionPipeline folder, or a hub id.")],
    cluster: ClusterFile,
    name: Annotated[str, typer.Option(help="What clients call it: cluster:NAME.")],
    keys: Keys = None,
    secret: Annotated[
        str, typer.Option(help="inputs+weights, or inputs (everyone may have the weights).")
    ] = ("inputs+weights"),
    public_component: Annotated[
        list[str] | None,
        typer.Option(help="Whose weights clients get all the same: text_encoder, vae. Repeat."),
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option(help="Denoising steps to offer; repeat. [default: 50]", min=1)
    ] = None,
    guidance: Annotated[
        list[float] | None,
        typer.Option(help="Guidance scales to offer; repeat. [default: the embedded model's, else 7.5]"),
    ] = None,
    scheduler: Annotated[
        list[str] | None, typer.Option(help="ddim, euler, dpm++, ...; repeat. [default: the model's own]")
    ] = None,
    height: Annotated[int | None, typer.Option(help="In pixels. [default: the model's own]")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels. [default: the model's own]")] = None,
    images: Annotated[int, typer.Option(min=1, help="Images of one call.")] = 1,
    opens: Annotated[
        str | None,
        typer.Option(
            "--open",
            help="What a client may see: image, or latents (of every step). [default: image; latents if the "
            "decoder is public]",
        ),
    ] = None,
    client: Annotated[
        list[str] | None, typer.Option(help="Who may use it; repeat. [default: every client of the cluster]")
    ] = None,
    profile: Annotated[str, typer.Option(help="precise, or fast (larger errors, fewer bytes).")] = "precise",
    calibrate_on: Annotated[Path | None, typer.Option(help=CALIBRATE_ON, metavar="FILE")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="In place of your model of this name.")] = False,
    yes: Yes = False,
) -> None:
    """Share a pipeline: plans for each combination of steps, guidance and scheduler, and weights as shares.

    Ranges are measured here, in the clear. Nothing leaves this machine before you have seen who learns what.

    Example: `sfumato model share ./sd15 --name sd --cluster ours/owner/cluster.toml --steps 20`
    """
    from sfumato.diffusion.offers import Terms, offered
    from sfumato.diffusion.pipeline import SecurePipeline
    from sfumato.runtime.cluster import Cluster
    from sfumato.runtime.names import shared_name
    from sfumato.runtime.sharing import share_model
    from sfumato.zoo import RECOMMENDED_GUIDANCE

    shared_name(f"cluster:{name}")
    parties = Cluster.load(cluster)
    terms = Terms(
        steps=steps or (50,),
        guidance=guidance or (RECOMMENDED_GUIDANCE if path == "embedded" else 7.5,),
        schedulers=scheduler or (),
        height=height,
        width=width,
        images=images,
        opens=opens,
        clients=client,
    )
    pipe = SecurePipeline.from_pretrained(
        path,
        secret=secret,
        public_components=public_component or (),
        profile=profile,
        calibration=prompts_in(calibrate_on),
    )
    console = Console()
    model = offered(pipe, name, terms, replace=replace)
    console.print(*offer_tables(model))
    agreed(f"Share it as cluster:{name}?", yes)
    with bar(console) as progress:
        share_id = share_model(parties, keys or folder_of(cluster), model, progress=progress)
    console.print(f"shared as cluster:{name} (share {share_id[:8]})", highlight=False)


@model_app.command("list")
@clean
def list_models(
    cluster: ClusterFile,
    keys: Keys = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every field as JSON.")] = False,
) -> None:
    """Models at the parties: an owner's own, or those that a client may use.

    Example: `sfumato model list --cluster ours/owner/cluster.toml`
    """
    replies, silent = _ask_all(cluster, keys, {"ask": "models"})
    if not replies:
        raise next(iter(silent.values()))
    models = found(replies)
    if as_json:
        print(json.dumps({"models": models, "parties": sorted(replies)}, indent=1))
    else:
        console = Console()
        console.print(_models_table(models) if models else "no models")
    for party, error in silent.items():
        print(f"sfumato: {_of_party(party, error)}", file=sys.stderr)


@model_app.command("remove")
@clean
def remove(
    name: Annotated[str, typer.Argument(help="The model's name, without cluster:.")],
    cluster: ClusterFile,
    keys: Keys = None,
    yes: Yes = False,
) -> None:
    """Have the parties delete a model of yours.

    Example: `sfumato model remove sd --cluster ours/owner/cluster.toml`
    """
    agreed(f"Remove {name} from the parties?", yes)
    replies, failed = _ask_all(cluster, keys, {"ask": "remove", "model": name})
    if failed:
        party, error = next(iter(failed.items()))
        done = f"removed at {_parties(replies)}; " if replies else ""
        raise type(error)(done + _of_party(party, error))
    print(f"{name} is removed at all parties")


# ---- inside ------------------------------------------------------------------------------------------------


def agreed(question: str, yes: bool) -> None:
    """Ask, unless told not to; ``JobError`` where nobody can answer."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise JobError("there is nobody here to confirm this; say --yes")
    typer.confirm(question, abort=True)


def folder_of(cluster: Path) -> Path:
    """The folder of a cluster file, where keys lie."""
    return cluster if cluster.is_dir() else cluster.parent


@contextmanager
def bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of bytes that are shared."""
    columns = (TextColumn("sharing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("sharing", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _ask_all(
    cluster: Path, keys: Path | None, request: Mapping[str, Any]
) -> tuple[dict[int, dict[str, Any]], dict[int, SfumatoError]]:
    """Replies, and errors, by party."""
    from sfumato.runtime.cluster import Cluster
    from sfumato.runtime.control import ask

    parties, folder = Cluster.load(cluster), keys or folder_of(cluster)
    replies, failed = dict[int, dict[str, Any]](), dict[int, SfumatoError]()
    for party in _PARTIES:
        try:
            replies[party] = ask(parties, folder, party, request)
        except SfumatoError as error:
            failed[party] = error
    return replies, failed


def found(replies: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Models by name and share, each with its bytes at the parties that answered, in order, and those that have it
    whole; ``complete`` where all three do."""
    at, known = defaultdict[tuple[str, str], list[int]](list), dict[tuple[str, str], dict[str, Any]]()
    sizes, problems = (
        defaultdict[tuple[str, str], list[int]](list),
        defaultdict[tuple[str, str], list[str]](list),
    )
    for party, reply in sorted(replies.items()):
        for entry in reply["models"]:
            key = str(entry["name"]), str(entry["share_id"])
            known.setdefault(key, dict(entry))
            sizes[key].append(int(entry["nbytes"]))
            if entry.get("problem"):
                problems[key].append(f"party {party}: {entry['problem']}")
            else:
                at[key].append(party)
    return [
        {
            **known[key],
            "nbytes": sizes[key],
            "problem": "; ".join(problems[key]),
            "parties": at[key],
            "complete": len(at[key]) == 3,
        }
        for key in sorted(known)
    ]


def _models_table(models: list[dict[str, Any]]) -> Table:
    from sfumato.runtime.report import readable

    table = Table(title="models", title_justify="left")
    for column in ("name", "owner", "shared", "weights", "for", "parties", "offers"):
        table.add_column(column, overflow="fold")
    for model in models:
        clients, at = model["clients"], model["shared_at"]
        table.add_row(
            str(model["name"]),
            _last(model["owner"]),
            time.strftime("%Y-%m-%d", time.localtime(at)) if at else "",
            f"{'secret' if model['secret'] else 'public'}\n{readable(sum(model['nbytes']))}",
            "all" if clients is None else ", ".join(_last(c) for c in clients),
            "all" if model["complete"] else model["problem"] or f"only {_parties(model['parties'])}",
            _offers_in_words(model["offers"]),
        )
    return table


def _offers_in_words(offers: list[dict[str, Any]]) -> str:
    from sfumato.diffusion.settings import Settings, in_words

    if all("steps" in settings for settings in offers) and offers:
        return in_words([Settings.from_json(settings) for settings in offers])
    return ", ".join(str(settings.get("title", "a module")) for settings in offers)


def _of_party(party: int, error: SfumatoError) -> str:
    """An error that says which party it is about."""
    return str(error) if f"party {party}" in str(error) else f"party {party}: {error}"


def _last(identity: str) -> str:
    return str(identity).rsplit("/", 1)[-1]


def _parties(numbers: Any) -> str:
    return ", ".join(f"P{number}" for number in sorted(numbers)) or "none"


def offer_tables(model: ModelToShare) -> tuple[Table, Table]:
    """What a client can ask for, and who learns what by it."""
    from sfumato.diffusion.offers import lessons
    from sfumato.runtime.offered import stored_bytes
    from sfumato.runtime.report import readable

    offers = Table(title=f"cluster:{model.name} will offer", title_justify="left")
    for column in ("steps", "guidance", "scheduler", "pixels", "images", "under the protocol", "opened"):
        offers.add_column(column, overflow="fold")
    for offer in model.offers:
        s = offer["settings"]
        offers.add_row(
            str(s["steps"]), f"{s['guidance']:g}", s["scheduler"].removesuffix("Scheduler"),
            f"{s['width']}x{s['height']}", str(s["images"]), ", ".join(offer["parts"]),
            "image" if offer["reveal"] == ["vae"] else "latents",
        )  # fmt: skip
    learnt = Table(title="who learns what", title_justify="left", show_header=False)
    for who, what in lessons(model):
        learnt.add_row(who, what)
    learnt.add_row("kept at all parties", f"about {readable(stored_bytes(model))}")
    learnt.add_row(
        "for", "every client of the cluster" if model.clients is None else ", ".join(model.clients)
    )
    return offers, learnt
