"""The page of ``sfumato reproduce dp-ldm``: rows that were measured, beside what papers print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfumato.bench.machine import machine, machine_line
from sfumato.bench.page import markdown_table

__all__ = ["accuracy_of", "page", "picture"]

Row = Mapping[str, Any]

#: MNIST, accuracy of a CNN trained on synthetic images, ε = 1 and 10 (papers/dp-latent-diffusion 3 and 4).
PUBLISHED = (
    ("DP-LDM, EMNIST letters public, 4.6 M parameters", "95.9", "97.4"),
    ("DPDM, no public data", "95.3", "98.1"),
    ("DP-SAD, no public data", "96.2", "97.6"),
    ("best published, FETA-Pro (best of three classifiers)", "97.1 to 97.3", "98.6"),
    ("DP-LDM re-run by DPImageBench (δ = 1.7e-6)", "44.2", "95.5"),
    ("DP-Kernel in DPImageBench", "94.0", "93.6"),
)
_READ = """\
Classifiers are trained on synthetic images alone and their epoch is chosen on synthetic images; accuracy is on real
test images that nothing was trained on, mean and sample standard deviation over seeds. Guarantees are for adding or
removing one image with its label; PRV and PLD agree, the larger is printed. Fréchet distance, precision and recall
are in the features of a classifier that was trained on real images: not FID, and comparable within this page alone.
Accuracies and distances were measured on real data and are themselves not covered by ε. CPU seconds are of one core."""
_COSTS = """\
Protocols differ (sample counts, δ, how the classifier is chosen). Cost that DP-LDM prints for CIFAR-10: 15 GPU hours
of private training and 192 of pre-training (RTX A4000), where DP-API takes 500 and DP-Diffusion 1,250 (V100); ours is
in the column of CPU seconds."""
_SHORT = """\
Trained an eighth as long as the main rows, sampled without guidance; 10,000 images, one CNN of one seed, so differences
below about half a point are noise."""
_CHOSEN = """\
Rate, timesteps per record and guidance were chosen on UCI's handwritten digits, a public stand-in. The batch (many
small ones, not few large) and the barred sevens of the public start were chosen after rows of this page's kind had been
looked at, that is on MNIST, as in the papers; no ε covers such a choice."""
#: What keeps the images of a subject from being good, where they are not.
_WHY = {
    "pneumonia": """\
Why this fails: 2,428 private images are few. Over a run, steps^½ · batch / (σ · trained^½), the signal to noise of
a gradient on which all records agree, is 6 at ε = 10 and 1 at ε = 1 (MNIST's 60,000: 58 and 21), and the public start
has seen thin strokes on black, nothing like an X-ray. One noisy release of class means in fixed random features, as the
kernel baseline makes, suits so small a set better.""",
    "cifar10": """\
Why this fails: the public start learned from 28 photographs, in minutes; it draws textures, no objects, and 10,000
private images at these budgets do not teach a U-Net of a million parameters what a horse is. DP-LDM starts from
ImageNet and 192 GPU hours.""",
}
_GRID = ("real", "public", "eps1", "eps10")


def accuracy_of(row: Row, kind: str = "cnn") -> float | None:
    """Mean accuracy of a row's classifiers of a kind, None where there are none."""
    for found in row.get("utility", ()):
        if found["kind"] == kind:
            return float(found["mean"])
    return None


def page(rows: Mapping[str, Row], subject: str, audit: Mapping[str, Any] | None = None) -> str:
    """Markdown."""
    lines = [f"# DP-LDM on {subject}", "", *_verdict(rows), ""]
    lines += [
        f"`sfumato reproduce dp-ldm --model {subject} --data FOLDER --public FOLDER`. {machine_line(machine())}", "",
        _READ, "",
        f"![real images, public model, ε = 1, ε = 10](dp-ldm-{subject}.png)", "",
    ]  # fmt: skip
    main = [row for row in rows.values() if row["main"]]
    if main:
        lines += ["## Main rows", "", *_table(main)]
        lines += [_WHY[subject], ""] if subject in _WHY else []
        lines += [*_floor(main), *_worst(main, subject), *_sanity(main)]
    if subject == "mnist":
        lines += [_CHOSEN, ""]
    for epsilon in (1.0, 10.0):
        few = [
            row
            for row in rows.values()
            if not row["main"] and row.get("recipe", {}).get("epsilon") == epsilon
        ]
        if few:
            title = f"## One change each, ε = {epsilon:g}"
            lines += [
                title, "",
                _SHORT, "",
                *_table(sorted(few, key=lambda row: not row["row"].startswith("base"))),
            ]  # fmt: skip
    if subject == "mnist":
        heads = ("printed by papers, MNIST", "ε = 1, %", "ε = 10, %")
        lines += ["## Printed", "", markdown_table(heads, PUBLISHED), "",
                  _COSTS, ""]  # fmt: skip
    if audit:
        lines += ["## Audit", "", *(f"- **{name}**: {text}" for name, text in audit.items()), ""]
    lines += ["## What ε does not cover here", "", *_uncovered(), ""]
    return "\n".join(lines)


def _spread(row: Row) -> float:
    return max(float(found["spread"]) for found in row["utility"] if found["kind"] == "cnn")


def _verdict(rows: Mapping[str, Row]) -> list[str]:
    """The first paragraph: is it better than the baseline that was run beside it, at both budgets?"""
    parts = []
    for ours, theirs, epsilon in (("eps10", "kernel10", 10), ("eps1", "kernel1", 1)):
        a = accuracy_of(rows[ours]) if ours in rows else None
        b = accuracy_of(rows[theirs]) if theirs in rows else None
        if a is None:
            continue
        sentence = f"At ε = {epsilon} a CNN trained on our images reaches {100 * a:.1f} % on real ones"
        if b is not None:
            word = "above" if a > b else "**not above**"
            if 0 < a - b < max(_spread(rows[ours]), _spread(rows[theirs])):
                word = "above, by less than the spread over seeds,"
            sentence += f", {word} the kernel baseline run here ({100 * b:.1f} %)"
        parts.append(f"{sentence}.")
    public = accuracy_of(rows["public"]) if "public" in rows else None
    if public is not None:
        parts.append(f"The public model alone, which saw no private image, gives {100 * public:.1f} %.")
    free = accuracy_of(rows["eps-inf"]) if "eps-inf" in rows else None
    if free is not None:
        parts.append(f"The same training without clipping and noise gives {100 * free:.1f} %.")
    return [" ".join(parts)] if parts else ["No row has been finished yet."]


def _table(rows: Sequence[Row]) -> list[str]:
    kinds = list(dict.fromkeys(u["kind"] for row in rows for u in row.get("utility", ())))
    heads = [
        "row",
        "ε",
        "σ",
        "steps",
        *(f"{kind}, %" for kind in kinds),
        "Fréchet",
        "precision / recall",
        "training, CPU s",
    ]
    cells = []
    for row in rows:
        far, spent = row.get("distance"), row.get("spent") or {}
        epsilon = max((spent[name] for name in ("prv", "pld") if spent.get(name) is not None), default=None)
        found = {u["kind"]: u for u in row.get("utility", ())}
        cells.append(
            (
                row["title"],
                _number(epsilon if epsilon is not None else row.get("epsilon"), ".3f"),
                _number(row.get("noise_multiplier"), ".3f"),
                _number(row.get("steps"), "d"),
                *(_accuracy(found.get(kind)) for kind in kinds),
                _number(far and far["frechet"], ".2f"),
                "-" if not far else f"{far['precision']:.2f} / {far['recall']:.2f}",
                _number(row.get("cpu_s_training"), ",.0f"),
            )
        )
    return [markdown_table(tuple(heads), cells), ""]


def _accuracy(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    spread = f" ± {100 * found['spread']:.2f}" if len(found["seeds"]) > 1 else ""
    return f"{100 * found['mean']:.2f}{spread}"


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _floor(rows: Sequence[Row]) -> list[str]:
    floors = [
        row["distance"]["floor"]
        for row in rows
        if row.get("distance") and row["distance"]["floor"] is not None
    ]
    if not floors:
        return []
    return [f"Real images through the public autoencoder and back are at a distance of {floors[0]:.2f}.", ""]


def _worst(rows: Sequence[Row], subject: str) -> list[str]:
    """Where the CNN of each row errs most: what is missing in its images."""
    from sfumato.dp.subjects import SUBJECTS

    names = [
        caption.removeprefix("a ").removeprefix("handwritten ") for caption in SUBJECTS[subject].captions
    ]
    told = []
    for row in rows:
        for found in row.get("utility", ()):
            if found["kind"] == "cnn":
                worst = sorted(zip(found["per_class"], names, strict=True))[:2]
                told.append(
                    f"{row['title']}: " + ", ".join(f"{name} {100 * part:.1f} %" for part, name in worst)
                )
    return [f"The CNN's two worst classes. {'; '.join(told)}.", ""] if told else []


def _sanity(rows: Sequence[Row]) -> list[str]:
    told = [
        f"{row['title']}: {100 * row['copies']['nearer']:.2f} %, {row['copies']['identical']} identical"
        for row in rows
        if row.get("copies")
    ]
    if not told:
        return []
    return [
        "Share of samples that are nearer to a private training image, pixel by pixel, than 99 of 100 real test images "
        f"are (real images: 1 %): {'; '.join(told)}. A sanity check, no guarantee.", "",
    ]  # fmt: skip


def _uncovered() -> list[str]:
    from sfumato.dp.ledger import NOT_COVERED

    return [f"- {sentence}" for sentence in NOT_COVERED]


def picture(folder: Path, out: Path) -> None:
    """Grids of some main rows side by side, ten images of each class."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    held = [name for name in _GRID if (folder / f"{name}.png").is_file()]
    if not held:
        return
    titles = {"real": "real images", "public": "public model", "eps1": "ε = 1", "eps10": "ε = 10"}
    with Image.open(folder / f"{held[0]}.png") as grid:
        tall = 4 * grid.height / (grid.width / 2)
    figure, axes = plt.subplots(1, len(held), figsize=(4 * len(held), tall + 0.4), squeeze=False)
    for axis, name in zip(axes[0], held, strict=True):
        with Image.open(folder / f"{name}.png") as grid:
            axis.imshow(grid.crop((0, 0, grid.width // 2, grid.height)), cmap="gray")
        axis.set_title(titles[name])
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)
