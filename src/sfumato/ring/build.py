"""Builds the native kernels beside this file: ``python -m sfumato.ring.build``.

The wheel's build hook runs the same code before anything is installed, so this file needs the standard library alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["LIBRARY", "build", "digest"]

_SOURCES = Path(__file__).with_name("csrc")
LIBRARY = Path(__file__).with_name("_kernels.so")
_OPTIONS = ["-O3", "-std=gnu11", "-shared", "-fPIC", "-fwrapv", "-fvisibility=hidden", "-Wno-psabi"]


def digest() -> str:
    """What the library must say it was made from: its sources and the options they are compiled with."""
    state = hashlib.sha256(" ".join(_OPTIONS).encode())
    for path in sorted(_SOURCES.iterdir()):
        if path.suffix in (".c", ".h"):
            state.update(b"\0" + path.name.encode() + b"\0" + path.read_bytes())
    return state.hexdigest()[:16]


def build() -> str | None:
    """Compile the library in place; None when that worked, otherwise a sentence that says why not."""
    wanted = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    compiler = next((path for path in map(shutil.which, wanted) if path), None)
    if compiler is None:
        return f"no C compiler found ({', '.join(wanted)}; CC names another)"
    with tempfile.TemporaryDirectory(dir=LIBRARY.parent) as folder:
        made = Path(folder) / LIBRARY.name
        command = [compiler, *_OPTIONS, f'-DSFUMATO_DIGEST="{digest()}"', "-o", str(made)]
        command += sorted(map(str, _SOURCES.glob("*.c")))
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except (OSError, subprocess.TimeoutExpired) as problem:
            return f"{compiler} did not run: {problem}"
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), "")
            return f"{compiler} failed (exit {done.returncode}) {first}".rstrip()
        os.replace(made, LIBRARY)
    return None


def main() -> int:
    """Build, and say in one line how it went."""
    problem = build()
    print(f"native kernels: {problem or f'built {LIBRARY.name}, sources {digest()}'}")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
