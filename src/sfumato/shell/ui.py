"""``sfumato ui``: the page, on this machine, in a browser."""

from __future__ import annotations

import importlib.util
import threading
import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sfumato.errors import JobError
from sfumato.shell.command import clean

__all__ = ["ui"]


@clean
def ui(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")] = 7860,
    cluster: Annotated[
        Path | None, typer.Option(help="Cluster file of three real parties. [default: three on this machine]")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="Your certificate's folder. [default: that of the file]")
    ] = None,
    model: Annotated[
        str, typer.Option(help="What the page begins with: 'embedded', a folder, a hub id, or cluster:NAME.")
    ] = "embedded",
    profile: Annotated[str, typer.Option(help="precise, or fast (larger errors, fewer bytes).")] = "precise",
    opened: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = True,
) -> None:
    """Draw in a browser, on a page that only this machine can open.

    Example: `sfumato ui --cluster ours/client/cluster.toml`
    """
    if importlib.util.find_spec("gradio") is None:
        raise JobError("the page needs Gradio; install sfumato[ui]")
    console = Console()
    with console.status("opening the page"):
        from sfumato.graph.planning import PROFILES
        from sfumato.ui.jobs import Studio
        from sfumato.ui.server import address, listen, serve
        from sfumato.ui.settings import Settings

        if profile not in PROFILES:
            raise JobError(f"there is no profile {profile!r}; use one of {', '.join(PROFILES)}")
        known = Settings()
        start = Settings.of("", model, known.steps, known.guidance, "public", known.seed, None, cluster)
        studio = Studio(start=start, profile=profile, keys=keys)
        listener = listen(port)
    url = address(listener)
    console.print(f"[bold]{url}[/bold]  (Ctrl-C ends the page, and the parties on this machine with it)")
    if opened:
        threading.Timer(1.0, webbrowser.open, (url,)).start()
    serve(studio, listener)
