"""``python -m sfumato.study.tune --classes NAME ... --profile PAPER --data FOLDER --out FOLDER [--minutes N]``.

Studies that list such a network (`sfumato.study.tables`) find it in their ``--weights`` folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from sfumato.catalogue import get
from sfumato.catalogue.differentiable import Approximated
from sfumato.errors import JobError
from sfumato.graph.published import PAPERS, methods_of
from sfumato.zoo.classes import NAMES, TUNED
from sfumato.zoo.train.data import DataError
from sfumato.zoo.train.tuned import tune_class_model

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Train models that draw by class on, under the approximations of a paper."""
    parser = argparse.ArgumentParser(prog="python -m sfumato.study.tune", description=main.__doc__)
    parser.add_argument(
        "--classes", nargs="+", choices=NAMES, required=True, metavar="NAME",
        help=f"models, --minutes each: {', '.join(NAMES)}",
    )  # fmt: skip
    parser.add_argument(
        "--profile", choices=PAPERS, required=True, metavar="PAPER", help="whose functions replace the exact"
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with mnist/ and so on, as for training"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and weights")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="training time of each model (default 10)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error("--minutes must be positive")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    functions = Approximated({name: get(entry) for name, entry in methods_of(args.profile, {}).items()})
    for name in args.classes:
        try:
            path = tune_class_model(name, TUNED + args.profile, functions, args.data, args.out, args.minutes)
        except (JobError, DataError, FloatingPointError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"saved {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
