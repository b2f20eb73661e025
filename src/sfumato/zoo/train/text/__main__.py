"""``python -m sfumato.zoo.train.text teacher | distil | summary``; ``--help`` after each says what it takes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers.utils import logging

from sfumato.errors import JobError

from ..data import DataError
from .corpora import CLASSIFIED, MODELLED
from .distil import RECIPES, distil, summary
from .replace import Replaced
from .teacher import TASK, train_teacher


def main(argv: list[str] | None = None) -> int:
    """Train a teacher, or distil a student from one; what is already there is kept."""
    parser = argparse.ArgumentParser(prog="python -m sfumato.zoo.train.text", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    teacher = commands.add_parser("teacher", help="train a model from random weights")
    teacher.add_argument("--task", choices=(*CLASSIFIED, *MODELLED), required=True)
    student = commands.add_parser("distil", help="distil a student with cheap operations from a teacher")
    student.add_argument("--teacher", type=Path, required=True, help="folder of the teacher")
    student.add_argument("--recipe", choices=RECIPES, required=True, help="what is replaced")
    student.add_argument(
        "--without",
        choices=("d", "pd", "all"),
        default="",
        help="no distillation; nor the teacher's weights; no training",
    )
    student.add_argument("--base", type=Path, help="folder of the public model (for --frozen and --rank)")
    student.add_argument("--frozen", type=int, default=0, help="first layers that keep the public weights")
    student.add_argument("--rank", type=int, default=0, help="rank of LoRA in the other layers")
    student.add_argument("--merged", type=int, default=1, help="heads that are merged into one")
    student.add_argument(
        "--fitted", action="store_true", help="start with least squares for the layers after the activations"
    )
    collect = commands.add_parser("summary", help="scores over the seeds, of all models in a folder")
    collect.add_argument("--out", type=Path, required=True, help="folder with the models")
    for command in (teacher, student):
        command.add_argument(
            "--data", type=Path, required=True, help="folder with the texts and vocabularies"
        )
        command.add_argument("--out", type=Path, required=True, help="folder for checkpoints and models")
        command.add_argument("--minutes", type=float, default=60.0, help="training time in all (default 60)")
        command.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default 0)")
        command.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    args = parser.parse_args(argv)
    if args.command == "summary":
        for row in summary(args.out):
            print(json.dumps({key: value for key, value in row.items() if key != "scores"}))
        return 0
    if args.minutes <= 0:
        parser.error("--minutes must be positive")
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        if args.command == "teacher":
            folder = train_teacher(args.task, args.data, args.out, args.minutes, args.seed)
        else:
            folder = distil(
                args.teacher, args.data, args.out, args.recipe, args.minutes, args.seed,
                changes=Replaced(frozen=args.frozen, rank=args.rank, merged=args.merged),
                without=args.without, base=args.base, fitted=args.fitted,
            )  # fmt: skip
    except (DataError, JobError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    scores = json.loads((folder / TASK).read_text("utf-8"))["scores"]
    print(f"saved in {folder}: {json.dumps(scores)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
