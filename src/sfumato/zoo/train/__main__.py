"""``python -m sfumato.zoo.train --data FOLDER --out FOLDER [--minutes N]``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging as diffusers_logging

from .. import RECOMMENDED_GUIDANCE
from ..classes import NAMES
from ..judge import load_judge
from .build import save_pipeline, unet_macs
from .classes import train_classes
from .data import DataError, load_split
from .evaluate import draw_grid, evaluate, save_report
from .judge import train_judge
from .unet import LATENTS, train_unet
from .vae import encode_all, train_vae

SHARES = {"judge": 0.12, "vae": 0.14, "unet": 0.74}


def _vae(data: Path, out: Path, minutes: float) -> AutoencoderKL:
    """The finished autoencoder of an earlier run, or a new one."""
    folder = out / "vae"
    if not (folder / "config.json").is_file():
        vae = train_vae(data, out, minutes)
        partial = out / "vae.part"
        vae.save_pretrained(partial)
        os.replace(partial, folder)
    return AutoencoderKL.from_pretrained(folder).eval()


def main(argv: list[str] | None = None) -> int:
    """Train judge, autoencoder and U-Net, then measure; what is already there is kept."""
    parser = argparse.ArgumentParser(prog="python -m sfumato.zoo.train", description=main.__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with mnist/ and fashion_mnist/ (idx files)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and results")
    parser.add_argument("--minutes", type=float, default=60.0, help="training time in all (default 60)")
    parser.add_argument(
        "--threads", type=int, default=2, help="threads of torch, and processes of the U-Net training"
    )
    parser.add_argument(
        "--guidance", type=float, default=RECOMMENDED_GUIDANCE, help="scale used for measuring"
    )
    parser.add_argument("--per-class", type=int, default=100, help="images per class used for measuring")
    parser.add_argument(
        "--classes", nargs="+", choices=NAMES, metavar="NAME",
        help=f"train these models that draw by class instead, --minutes each: {', '.join(NAMES)}",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error("--minutes must be positive")
    torch.set_num_threads(args.threads)
    diffusers_logging.disable_progress_bar()
    if args.classes:
        try:
            train_classes(args.classes, args.data, args.out, args.minutes)
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    try:
        split = load_split(args.data, train=True)
        load_split(args.data, train=False)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    minutes = {name: share * args.minutes for name, share in SHARES.items()}
    weights = args.out / "judge.safetensors"
    if not weights.is_file():
        train_judge(args.data, args.out, minutes["judge"])
    vae = _vae(args.data, args.out, minutes["vae"])
    encode_all(vae, split.images, args.out / LATENTS)
    pipeline = train_unet(vae, split.labels, args.out, minutes["unet"], args.threads)
    folder = args.out / "embedded"
    shutil.rmtree(folder, ignore_errors=True)
    save_pipeline(pipeline, folder)
    parameters = sum(p.numel() for p in pipeline.unet.parameters())
    print(f"U-Net: {parameters} parameters, {unet_macs(pipeline.unet) / 1e6:.1f} M multiply-adds a sample")
    draw_grid(pipeline, args.guidance, folder / "grid.png")
    save_report(evaluate(pipeline, load_judge(weights), args.data, args.guidance, args.per_class), args.out)
    print(f"saved in {folder}; measured in {args.out / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
