"""What several commands share: errors, the file of prompts, and where results may go."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from sfumato.errors import JobError, SfumatoError

__all__ = ["CALIBRATE_ON", "Profile", "clean", "for_file", "for_folder", "for_picture", "prompts_in"]

#: Help of the option whose file `prompts_in` reads.
CALIBRATE_ON = "Prompts to measure ranges on, one a line; not secret. [default: built-in ones]"

#: An option of commands that plan.
Profile = Annotated[str, typer.Option(help="precise, or fast (larger errors, fewer bytes).")]

P = ParamSpec("P")


def clean(command: Callable[P, None]) -> Callable[P, None]:
    """Errors of ours become one line and exit code 2; Ctrl-C ends quietly."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except SfumatoError as error:
            print(f"sfumato: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("sfumato: interrupted", file=sys.stderr)
            raise typer.Exit(130) from None

    return run


def prompts_in(file: Path | None) -> list[str] | None:
    """The lines of a file that are not blank; None without a file.

    Raises:
        JobError: the file cannot be read, or has no such line.
    """
    if file is None:
        return None
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{file} cannot be read as a file of prompts: {error}") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise JobError(f"{file} has no prompt; write one on each line")
    return prompts


# ---- where results go: looked at before any work ------------------------------------------------------------


def for_file(path: Path, what: str) -> None:
    """Raises:
    JobError: no file can be written there."""
    if not path.parent.is_dir():
        raise JobError(f"there is no folder {path.parent} for the {what}")
    if path.is_dir():
        raise JobError(f"{path} is a folder; name a file in it for the {what}")


def for_picture(path: Path) -> None:
    """Raises:
    JobError: no picture can be written there, or its ending names no format that can be."""
    import PIL.Image

    for_file(path, "image")
    try:
        # Formats that can be read alone, or that need a library which is not there, show only when they are written.
        PIL.Image.new("RGB", (8, 8)).save(
            io.BytesIO(), PIL.Image.registered_extensions()[path.suffix.lower()]
        )
    except (KeyError, OSError, ValueError):
        raise JobError(
            f"{path} names no picture format that can be written; let it end in .png or .jpg"
        ) from None


def for_folder(path: Path, what: str) -> None:
    """Make a folder unless it is there.

    Raises:
        JobError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(f"cannot make the folder {path} for the {what} ({error.strerror})") from None
