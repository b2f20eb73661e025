"""What every command does with errors."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from sfumato.errors import SfumatoError

__all__ = ["clean"]

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
