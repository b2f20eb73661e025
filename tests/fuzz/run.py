"""Millions of inputs for the readers of `targets.py`, found by coverage (atheris, extra ``fuzz``).

    python tests/fuzz/run.py stream --runs 1000000 --record benchmarks/results/fuzz.json

A crash leaves its input as crash-HASH in the current folder; add it to `regressions.py`.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["sfumato"]):
    sys.path.insert(0, str(Path(__file__).parent))
    from targets import TARGETS, seeds


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
    done, started = 0, time.monotonic()

    def one(data: bytes) -> None:
        nonlocal done
        done += 1
        TARGETS[options.target](data)

    def note() -> None:
        if options.record is None:
            return
        known = json.loads(options.record.read_text()) if options.record.exists() else {}
        known[options.target] = {
            "inputs": done, "seconds": round(time.monotonic() - started, 1),
            "largest_bytes": 4096, "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "findings": 0,
        }  # fmt: skip
        options.record.write_text(json.dumps(known, indent=1) + "\n")

    import atexit

    atexit.register(note)
    arguments = [
        sys.argv[0],
        f"-runs={options.runs}",
        "-max_len=4096",
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
