"""Audits of private training: 10,000 steps with and without an extreme record, for the shipped code and for planted
faults; one real fine-tuning with canaries; membership inference on a released model.

The faults are those of the tests (tests/dp/test_audit.py). Writes ``dp-ldm-mnist-audit.json``, which the page of
``sfumato reproduce dp-ldm`` shows.

    python benchmarks/dp_audit.py --data FOLDER --model FOLDER
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, parser, write_json
from torch import Tensor

from sfumato.dp.attack import attack_folder
from sfumato.dp.audit import audit_step
from sfumato.dp.data import Records, fit
from sfumato.dp.one_run import OneRun, audit_run
from sfumato.dp.parts import encode, load_parts
from sfumato.dp.randomness import SecretStream
from sfumato.dp.recipe import Recipe
from sfumato.dp.subjects import SUBJECTS
from sfumato.dp.trainable import choose
from sfumato.dp.trainer import Trainer
from sfumato.zoo import glyphs_path

FAULTS = {
    "half the noise": "HalfNoise",
    "no clipping": "NoClipping",
    "four unmerged rows per record": "UnmergedRows",
}
#: The one-run audit: ordinary records, canaries (their labels are wrong), steps, expected batch.
RECORDS, CANARIES, STEPS, BATCH = 1500, 150, 8, 800


def faults() -> Any:
    """The module of the tests that plants them."""
    path = Path(__file__).resolve().parents[1] / "tests" / "dp" / "test_audit.py"
    spec = importlib.util.spec_from_file_location("dp_faults", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_run(private: Records, epsilon: float, *, noise: float = 1.0) -> OneRun:
    """Fine-tune on a few records among which canaries are hidden, and guess which; ``noise`` times the true noise."""
    parts = load_parts(glyphs_path())
    some = private.first(RECORDS + CANARIES)
    labels = some.labels.clone()
    labels[RECORDS:] = (labels[RECORDS:] + 5) % 10
    recipe = Recipe(epsilon=epsilon, epochs=STEPS * BATCH / len(some), batch=BATCH, draws=2, drop=0.0)
    event = recipe.event(len(some))
    choice = choose(parts.unet, parts.text_encoder, what=recipe.what)
    trainer = Trainer(
        parts, choice, encode(parts, fit(some.images, parts.channels, parts.side)), labels,
        parts.ids([*some.captions, ""]), recipe, noise_multiplier=event.noise_multiplier * noise, steps=event.steps,
        stream=SecretStream(),
    )  # fmt: skip
    seen: list[Tensor] = []
    trainer.optimizer.original_optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            torch.cat([p.grad.flatten().clone() for p in choice.parameters if p.grad is not None])
        )
    )
    canaries = torch.arange(RECORDS, len(some))

    def step(rows: Tensor) -> Tensor:
        trainer.step(rows)
        return seen.pop()

    def directions() -> Tensor:
        trainer.gradients.backward(trainer.losses(canaries))
        flat: Tensor = torch.cat([g.flatten(1) for _, _, g in trainer.gradients.records()], 1)
        trainer.gradients.clear()
        clipped: Tensor = flat / (flat.norm(dim=1, keepdim=True) + trainer.optimizer.gamma)
        return clipped

    return audit_run(
        step, directions, records=torch.arange(RECORDS), canaries=canaries, steps=event.steps,
        sample_rate=event.sample_rate, claim=epsilon,
    )  # fmt: skip


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--data", type=Path, required=True, help="folder with mnist/ below it")
    args.add_argument("--model", type=Path, help="a fine-tuned folder, for membership inference")
    args.add_argument("--trials", type=int, default=10_000)
    args.add_argument("--out", type=Path, default=RESULTS / "dp-ldm-mnist-audit.json")
    asked = args.parse_args()
    torch.set_num_threads(1)
    told: dict[str, str] = {}
    record: dict[str, Any] = {"machine": machine(), "steps": {}}

    def keep() -> None:
        write_json(asked.out, told)
        write_json(asked.out.with_name(asked.out.stem + "-full.json"), record)

    def audited(name: str, found: Any) -> None:
        told[name] = str(found)
        record["steps"][name] = found.to_json()
        print(f"{name}: {found}", flush=True)
        keep()

    private = SUBJECTS["mnist"].private(asked.data)
    for epsilon in (1.0, 10.0):
        audited(f"canaries in one fine-tuning, claim {epsilon:g}", one_run(private, epsilon))
    audited("the same with a hundredth of the noise, claim 1", one_run(private, 1.0, noise=0.01))
    if asked.model is not None:
        test = SUBJECTS["mnist"].test(asked.data)
        audited("membership inference on the model at ε = 10",
                attack_folder(asked.model, private.first(5000), test.first(5000)))  # fmt: skip
    audited("one full-batch step, shipped code", audit_step(trials=asked.trials))
    planted = faults()
    for name, kind in FAULTS.items():
        audited(f"planted: {name}", audit_step(getattr(planted, kind), trials=asked.trials))


if __name__ == "__main__":
    main()
