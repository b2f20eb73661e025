"""Millions of inputs for the readers of `targets.py`, found by coverage (atheris, extra ``fuzz``).

    python tests/fuzz/run.py stream --runs 1000000 --record benchmarks/results/fuzz.json

A finding leaves its input as crash-HASH in the current folder: mend the reader, and add the input to the seeds of its
target, which the test suite runs.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["sfumato"]):
    sys.path.insert(0, str(Path(__file__).parent))
    from targets import TARGETS, seeds

_LARGEST = 4096


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seconds", type=int, default=0, help="end after so long (0: no limit)")
    parser.add_argument("--record", type=Path, help="JSON file of records by target")
    options = parser.parse_args()
    corpus = Path(tempfile.mkdtemp(prefix="fuzz-"))
    for i, seed in enumerate(seeds(options.target)):
        (corpus / f"seed{i}").write_bytes(seed)
    executed = memoryview(mmap.mmap(-1, 8)).cast("Q")  # shared with the child, which libFuzzer ends
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        fuzz(options, corpus, executed)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    shutil.rmtree(corpus)
    if options.record is not None:
        known = json.loads(options.record.read_text()) if options.record.exists() else {}
        known[options.target] = {
            "inputs": executed[0], "findings": int(ended != 0), "seconds": round(time.monotonic() - started, 1),
            "largest_bytes": _LARGEST,
            "peak_memory": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
            "python": platform.python_version(), "atheris": metadata.version("atheris"),
        }  # fmt: skip
        options.record.write_text(json.dumps(known, indent=1) + "\n")
    sys.exit(ended)


def fuzz(options: argparse.Namespace, corpus: Path, executed: memoryview) -> None:
    """Run the target; never returns."""

    def one(data: bytes) -> None:
        executed[0] += 1
        TARGETS[options.target](data)

    arguments = [
        sys.argv[0],
        f"-runs={options.runs}",
        f"-max_len={_LARGEST}",
        "-timeout=10",
        "-rss_limit_mb=3000",
        "-print_final_stats=1",
    ]
    if options.seconds:
        arguments.append(f"-max_total_time={options.seconds}")
    atheris.Setup([*arguments, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
