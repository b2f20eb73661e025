"""Which few steps lose nothing: settings of a sampler on the exact network, against its 50 steps.

    python benchmarks/few_steps.py embedded --images 1000 dpm++:5:3.5:1 dpm++:6:3.5
    python benchmarks/few_steps.py cifar10 --weights FOLDER --images 1000 dpm++:10:3

A setting is SOLVER:STEPS:GUIDANCE[:UNGUIDED], on trailing timesteps (``ddim`` on leading ones); without guidance a
dash. ``few:STEPS`` is the model's student of so many steps (``python -m sfumato.zoo.train.few``). Images are of seeds
that no study draws (``sfumato reproduce`` judges what was chosen here on others). Float throughout: this is what the
sampler loses; what fixed point adds is in the studies. ``cost`` is the number of halves of a guided evaluation, over
that of the 50 steps. Pages: results/few-steps.json and results/few-steps.md, a section a model, and one more for 50
steps at another ``--guidance``; ``--keep`` leaves the rows of other settings that are there.
"""

from __future__ import annotations

import json
from typing import Any

import common
import torch
from tqdm import tqdm

from sfumato.quality import Features, frechet, frechet_difference
from sfumato.study.draw import Drawer
from sfumato.study.setting import Setting
from sfumato.study.subject import Subject, subject
from sfumato.zoo.classes import FEW

RECORD, PAGE = common.RESULTS / "few-steps.json", common.RESULTS / "few-steps.md"
FIRST_SEED = 3_000_000
CHUNK = 100
ORIGINAL = Setting(name="ddim:50")


def setting_of(text: str) -> Setting:
    """A setting from its text.

    Raises:
        ValueError: the text is not of this form.
    """
    if text.startswith(f"{FEW}:"):
        return Setting(name=text, steps=int(text.removeprefix(f"{FEW}:")), network=FEW)
    solver, steps, guidance, unguided = [*text.split(":"), "0"][:4]
    return Setting(
        name=text, solver=solver, steps=int(steps), unguided=int(unguided),
        guidance=None if guidance == "-" else float(guidance),
        spacing=None if solver == "ddim" else "trailing",
    )  # fmt: skip


def drawn(drawer: Drawer, setting: Setting, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the images, and whether each shows what was asked for."""
    model, features, right = drawer.subject, [], []
    assert model.judge is not None
    for start in tqdm(range(0, images, CHUNK), desc=setting.name, leave=False):
        prompts = [(start + i) % len(model.texts) for i in range(CHUNK)]
        found = drawer.draw(setting, prompts, [FIRST_SEED + start + i for i in range(CHUNK)]).images
        seen = (found * 255).round().to(torch.uint8)
        features.append(model.judge.extract(seen))
        wanted = torch.tensor([model.labels[p] for p in prompts])
        right.append((model.judge.classify(seen, among=model.labels) == wanted).double())
    return torch.cat(features), torch.cat(right)


def halves(model: Subject, setting: Setting) -> int:
    """Evaluations of one half that an image takes."""
    guided = model.of(setting.network).guidance is not None
    return setting.steps * (2 if guided else 1) - setting.unguided


def compared(model: Subject, original: Setting, settings: list[Setting], images: int) -> list[dict[str, Any]]:
    """Figures of each setting beside the original's."""
    assert model.reference is not None
    real = Features(model.reference.mean.double(), model.reference.covariance.double())
    rows = []
    with Drawer(model, CHUNK) as drawer:
        base, right = drawn(drawer, original, images)
        rows.append({"setting": original.name, "frechet": frechet(Features.of(base), real),
                     "accuracy": float(right.mean()), "cost": 1.0})  # fmt: skip
        for setting in settings:
            features, hits = drawn(drawer, setting, images)
            apart, points = frechet_difference(features, base, real), 100.0 * (hits - right)
            spread = 1.96 * float(points.std()) / images**0.5
            rows.append({
                "setting": setting.name, "frechet": frechet(Features.of(features), real),
                "accuracy": float(hits.mean()), "cost": halves(model, setting) / halves(model, original),
                "difference": [apart.value, apart.low, apart.high],
                "points": [float(points.mean()), float(points.mean()) - spread, float(points.mean()) + spread],
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def page(record: dict[str, Any]) -> str:
    """The record, to read."""
    lines = [
        "# Few steps of the exact network against fifty", "",
        "`python benchmarks/few_steps.py MODEL SETTING...`: settings are solver, steps, guidance and steps at the end "
        "without it; DPM-Solver++ on trailing timesteps; `few:N` is a student of N steps. Float. "
        "Fréchet distance in a classifier's features and class accuracy, with 95 % intervals of the differences to the "
        "first row (same prompts and seeds). Cost: evaluations "
        "of one half, over the first row's.", "",
    ]  # fmt: skip
    for name, found in record.items():
        lines += [f"## {name}, {found['images']:,} images", "", found["machine"], ""]
        cells = []
        for row in found["rows"]:
            middle, low, high = (100 * x for x in row.get("difference", (0, 0, 0)))
            points = row.get("points", (0, 0, 0))
            cells.append((
                f"`{row['setting']}`", f"{row['cost']:.2f}", f"{row['frechet']:.3f}",
                f"{middle:+.1f} % [{low:+.1f}, {high:+.1f}]" if "difference" in row else "-",
                f"{100 * row['accuracy']:.1f} %",
                "{:+.1f} [{:+.1f}, {:+.1f}]".format(*points) if "points" in row else "-",
            ))  # fmt: skip
        heads = ("setting", "cost", "Fréchet", "difference", "accuracy", "points")
        lines += [common.markdown_table(heads, cells), ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Draw, compare, and write the section of one model."""
    arguments = common.parser(__doc__)
    arguments.add_argument("model")
    arguments.add_argument("settings", nargs="+", type=setting_of)
    arguments.add_argument("--images", type=int, default=1000)
    arguments.add_argument("--weights", default="", help="folder of weights that do not come with sfumato")
    arguments.add_argument("--guidance", type=float, help="of the 50 steps (default: the model's own)")
    arguments.add_argument(
        "--keep", action="store_true", help="keep the rows of other settings, of as many images"
    )
    args = arguments.parse_args()
    if args.images < CHUNK or args.images % CHUNK:
        arguments.error(f"--images must be a multiple of {CHUNK}")
    torch.set_num_threads(1)
    original, section = ORIGINAL, args.model
    if args.guidance is not None:
        original, section = (
            setting_of(f"ddim:50:{args.guidance:g}"),
            f"{args.model} at guidance {args.guidance:g}",
        )
    rows = compared(subject(args.model, args.weights), original, args.settings, args.images)
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    held = record.get(section, {})
    if args.keep and held.get("images") == args.images:
        new = {row["setting"] for row in rows}
        rows = [rows[0], *(row for row in held["rows"] if row["setting"] not in new), *rows[1:]]
    record[section] = {
        "images": args.images,
        "machine": common.machine_line(common.machine()),
        "rows": rows,
    }
    common.write_json(RECORD, record)
    PAGE.write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    main()
