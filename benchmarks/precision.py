"""Which layers want more bits, the lightest plan for an error, and what scales gain that the engine does not have.

    python benchmarks/precision.py --data TEXTS MODELS/sst2-0 STUDENTS/sst2-ditto-0 [--base]

Folders of ``python -m sfumato.zoo.train.text``. Weights and sentences are secret; sentences are padded to 48 pieces
under a secret mask, 16 in a call; ranges come from 384 sentences of the training set, layers are compared and plans
searched on 32 others of it; profiles and plans that a search found are measured on 208 sentences of the test set,
scales on 64 of them. ``--base``: also BERT-base with 128 tokens and random weights, bytes alone. Pages:
results/precision.json, .md and .png; ``--page`` writes the last two anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from precision_page import draw, kind, page
from tqdm import tqdm
from transformer_utility import BATCH, CALIBRATION, LENGTH, encoded

import sfumato as sf
from sfumato.graph.plan import Plan
from sfumato.graph.quantize import SCHEMES
from sfumato.study.precision import (
    Found,
    Sensitivity,
    Subject,
    layers_of,
    narrow,
    search,
    sensitivity,
    short_frac,
)
from sfumato.study.scales import (
    Imitation,
    Weights,
    channel_tops,
    dropped,
    finest_unit,
    tensor_steps,
    weight_steps,
)
from sfumato.zoo.shapes import SHAPES
from sfumato.zoo.train.text.corpora import sentences
from sfumato.zoo.train.text.replace import load_student

SWEEP, TEST, GRID = 2, 13, 4  # calls
FRACS = (8, 10, 11, 12)
#: How weights are rounded: the first as the engine does, the second as Ditto's profile does.
GRIDS = (
    Weights("2^k per tensor, as fine as sums leave"),
    Weights("2^-8", frac=8),
    Weights("real per tensor, as fine as sums leave", free=True),
    Weights("2^k per channel, as fine as sums leave", rows=True),
    Weights("real per channel, as fine as sums leave", free=True, rows=True),
    Weights("2^k per tensor, 8-bit weights", bits=8),
    Weights("real per tensor, 8-bit weights", bits=8, free=True),
    Weights("2^k per channel, 8-bit weights", bits=8, rows=True),
    Weights("real per channel, 8-bit weights", bits=8, free=True, rows=True),
)
PARTS = ("layers", "profiles", "scales", "searched")
#: Budgets of the search, beside the errors of the profiles' own rules.
BUDGETS = (3e-3,)


class Study:
    """One trained classifier."""

    def __init__(self, folder: Path, data: Path, blocks: Sequence[int] | None) -> None:
        self.name, self.blocks = folder.name, blocks
        model, tokenizer, self.replaced = load_student(folder)
        task = json.loads((folder / "task.json").read_text("utf-8"))["task"]
        test, train = (sentences(data, task, train=known) for known in (False, True))
        rows = np.random.default_rng(0).permutation(len(train.texts)).reshape(-1)

        def calls(texts: list[str]) -> list[dict[str, torch.Tensor]]:
            return [encoded(tokenizer, texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]

        seen, other = np.split(rows[: BATCH * (CALIBRATION + SWEEP)], [BATCH * CALIBRATION])
        self.ranges = calls([train.texts[i] for i in seen])
        sweep, shown = calls([train.texts[i] for i in other]), calls(test.texts[: BATCH * TEST])
        program = sf.capture(model, (), sweep[0])
        measured = sf.make_plan(
            program, secret="inputs+weights", calibration=[((), call) for call in self.ranges]
        ).calibration
        self.sweep = Subject.of(model, program, measured, sweep, profile="fast")
        self.test = Subject.of(model, program, measured, shown, profile="fast")
        self.few = Subject.of(model, program, measured, shown[:GRID], profile="fast")

    def point(self, label: str, plan: Plan, **more: Any) -> dict[str, Any]:
        """A row: cost a sentence, error and agreement on the test set."""
        return self._row(label, self.test.point(plan).to_json(), **more)

    @staticmethod
    def _row(label: str, point: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        return {"label": label, **point, "megabytes": point["megabytes"] / BATCH, **more}

    def profiles(self) -> list[dict[str, Any]]:
        """What the profiles choose by themselves."""
        rows = [
            self.point(f"{profile}, {ring}", self.test.plan(profile=profile, ring=ring))
            for profile in ("fast", "precise")
            for ring in ("mixed", "Z64")
        ]
        paper = "ditto" if self.replaced.activation == "quad" else "puma"
        plan = sf.make_plan(
            self.test.program, secret="inputs+weights", profile=paper,
            calibration=[((), call) for call in self.ranges],
        )  # fmt: skip
        return [*rows, self.point(paper, plan)]

    def searched(self, rows: list[Any]) -> list[dict[str, Any]]:
        """The lightest plans found, at the errors of our profiles' rules and at others."""
        found = []
        wanted: list[tuple[str, float | None]] = [
            ("fast", None),
            *(("fast", b) for b in BUDGETS),
            ("precise", None),
        ]
        for profile, given in wanted:
            subject = self.sweep if profile == "fast" else replace(self.sweep, profile=profile, _known={})
            rule = subject.point(subject.plan())
            budget = rule.error if given is None else given
            best = search(subject, rows, budget, fracs=(None, 11))
            found.append(self._searched(profile, given is None, budget, best))
            print(json.dumps({k: v for k, v in found[-1].items() if k != "wide"}), flush=True)
        return found

    def _searched(self, profile: str, of_rule: bool, budget: float, best: Found) -> dict[str, Any]:
        return self.point(
            f"search, {profile}, {budget:.1e}", best.plan, profile=profile, of_rule=of_rule, budget=budget,
            sweep_error=best.point.error, frac=best.frac, wide=list(best.wide),
        )  # fmt: skip

    def scales(self) -> list[dict[str, Any]]:
        """Fraction bits of activations by grids of weights; what ``fast`` keeps in Z64 stays there."""
        base = narrow("fast")
        own = layers_of(self.test.plan(), base)
        wide = frozenset(layers_of(self.test.plan(base), base)) - frozenset(own)
        rows = []
        tops = channel_tops(self.few.plan(base), self.ranges)
        for frac in (None, *FRACS):
            plan = self.few.plan(replace(narrow("fast", frac), wide=wide))
            used = short_frac(plan)
            point = self.few.point(plan).to_json()
            engine = self._row(f"{used}, engine", point, frac=used, common=frac is None, grid="engine")
            rows.append(engine)
            for how in GRIDS if frac is not None else GRIDS[:1]:
                rows.append(self._imitated(engine, plan, tops, how, Imitation(plan)))
            if frac is None:
                unit = finest_unit(plan)
                rows.append(
                    self._imitated(
                        engine, plan, tops, GRIDS[2], Imitation(plan, unit=unit), step=unit,
                        grid=f"activations real: 2^-{used - math.log2(unit):.2f}",
                    )
                )  # fmt: skip
                steps, casts = tensor_steps(plan)
                rows.append(
                    self._imitated(
                        engine, plan, tops, GRIDS[0], Imitation(plan, own=steps), casts=casts / 1e6,
                        grid="activations 2^k by tensor",
                    )
                )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
        point = self.few.point(self.few.plan(ring="Z64")).to_json()
        return [*rows, self._row("18, Z64", point, frac=18, common=False, grid="engine")]

    def _imitated(
        self, engine: Mapping[str, Any], plan: Plan, tops: Mapping[str, torch.Tensor], how: Weights,
        imitation: Imitation, casts: float = 0.0, **more: Any,
    ) -> dict[str, Any]:  # fmt: skip
        steps = weight_steps(plan, tops, how, imitation.steps)
        own = dropped(plan, weight_steps(plan, tops, GRIDS[0], Imitation(plan).steps))
        found = torch.stack([imitation(call, steps) for call in self.few.calls])
        more = {"grid": how.label, **more}
        return {
            **engine, "label": f"{engine['frac']}, {more['grid']}", "error": self.few.distance(found),
            "agreement": self.few.agreement(found),
            "megabytes": engine["megabytes"] + ((dropped(plan, steps) - own) / 1e6 + casts) / BATCH, **more,
        }  # fmt: skip

    def layers(self) -> list[dict[str, Any]]:
        """Layers one by one, a call's bytes."""
        bar, base = tqdm(desc=self.name, unit="layer"), narrow("fast")
        every = layers_of(self.sweep.plan(base), base)
        skipped = () if self.blocks is None else [n for n in every if _block(n) not in {None, *self.blocks}]
        found = sensitivity(
            self.sweep, layers=[name for name in every if name not in skipped],
            progress=lambda _, done, of: bar.update(done - bar.n),
        )  # fmt: skip
        bar.close()
        return [asdict(row) for row in found]

    def part(self, name: str, known: Sequence[Mapping[str, Any]]) -> Any:
        """One part of the record; the search orders layers by ``known``, a part ``layers``."""
        if name == "searched":
            return self.searched([Sensitivity(**row) for row in known])
        return {"layers": self.layers, "profiles": self.profiles, "scales": self.scales}[name]()


def _block(layer: str) -> int | None:
    """The number of a layer's block, if it is in one."""
    return next((int(part) for part in layer.split(".") if part.isdigit()), None)


def base_rows(tokens: int = 128) -> dict[str, Any]:
    """BERT-base, random weights: gigabytes of all parties and rounds, and what each kind of layer adds in Z64."""
    shape = SHAPES["bert-base"]
    program = sf.capture(shape.build(), (shape.ids(tokens, 9),))
    calibration = [((shape.ids(tokens, seed),), {}) for seed in (1, 2)]
    given = {"secret": "inputs+weights", "profile": "fast"}
    first = sf.make_plan(program, ring="mixed", calibration=calibration, **given)
    base = narrow("fast")

    def cost(**more: Any) -> tuple[float, int]:
        found = sf.estimate(sf.make_plan(program, calibration=first.calibration, **given, **more))
        return sum(found.bytes_sent) / 1e9, found.rounds

    layers = layers_of(
        sf.make_plan(program, calibration=first.calibration, ring="mixed", scheme=base, **given), base
    )
    kinds: dict[str, set[str]] = {}
    for layer in layers:
        kinds.setdefault(kind(layer), set()).add(layer)
    least = cost(ring="mixed", scheme=base)
    rows = {
        "every call with room in Z32": least,
        "fast, mixed": cost(ring="mixed"),
        "fast, Z64": cost(ring="Z64"),
    }
    added = {
        name: cost(ring="mixed", scheme=replace(base, wide=frozenset(of)))[0] - least[0]
        for name, of in tqdm(kinds.items(), desc="BERT-base", leave=False)
    }
    return {"tokens": tokens, "rows": rows, "added": added}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--data", type=Path, help="folder of texts")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the pages")
    parser.add_argument("--base", action="store_true", help="BERT-base with random weights, too")
    parser.add_argument("--page", action="store_true", help="write the page of the record that is there")
    parser.add_argument("--blocks", nargs="+", type=int, help="whose layers are looked at (default: all)")
    parser.add_argument("--order", metavar="NAME", help="search by the layers of this model of the record")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of a folder's figures")
    args = parser.parse_args()
    if args.folders and args.data is None:
        parser.error("folders need --data, the folder of texts")
    path = args.out / "precision.json"
    record = json.loads(path.read_text("utf-8")) if path.is_file() else {"models": {}}
    if not args.page:
        record |= {
            "machine": common.machine(), "profiles": {n: SCHEMES[n].frac for n in ("fast", "precise", "ditto")},
            "length": LENGTH, "batch": BATCH, "sentences": BATCH * TEST, "sweep": BATCH * SWEEP,
            "calibration": BATCH * CALIBRATION, "grid": BATCH * GRID,
        }  # fmt: skip
    for folder in args.folders:
        study = Study(folder, args.data, args.blocks)
        known = record["models"].setdefault(study.name, {})
        known["replaced"] = f"{study.replaced.activation}, {study.replaced.softmax}"
        if args.order:
            known["order"] = args.order
        for part in args.parts:
            order = record["models"][known.get("order", study.name)].get("layers", ())
            known[part] = study.part(part, order)
            common.write_json(path, record)
    if args.base:
        record["base"] = base_rows()
        common.write_json(path, record)
    path.with_suffix(".md").write_text(page(record), encoding="utf-8")
    draw(record, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
