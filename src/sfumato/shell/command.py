"""What several commands share: errors, and the file of prompts."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

import typer

from sfumato.errors import JobError, SfumatoError

__all__ = ["CALIBRATE_ON", "clean", "prompts_in"]

#: Help of the option whose file `prompts_in` reads.
CALIBRATE_ON = "Prompts to measure ranges on, one a line; not secret. [default: built-in ones]"

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
