"""A fine-tuning in a process of its own, for tests that kill it or run several: says what it does, line by line.

Arguments: the public folder, the run's folder, and settings of the recipe as JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sfumato.dp.distributed import joined
from sfumato.dp.finetune import finetune
from sfumato.dp.randomness import SecretStream
from sfumato.dp.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))
from tuning import RECIPE, records_of


def main() -> None:
    torch.set_num_threads(1)
    public, out, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    step, average, normal = Trainer.step, Trainer.use_average, SecretStream.normal

    def told_step(self: Trainer, rows: torch.Tensor) -> None:
        print("step", len(rows), flush=True)
        step(self, rows)

    def told_noise(self: SecretStream, *given: Any, **more: Any) -> torch.Tensor:
        if "device" in more:  # the step's; what is drawn for a record stays on the CPU
            print("noise", flush=True)
        return normal(self, *given, **more)

    def told_weights(self: Trainer) -> None:
        for name, values in (("last", self.choice.parameters), ("average", self.average)):
            flat = torch.cat([value.detach().flatten() for value in values])
            print(name, hashlib.sha256(flat.numpy().tobytes()).hexdigest(), flush=True)
        average(self)

    Trainer.step, Trainer.use_average, SecretStream.normal = told_step, told_weights, told_noise  # type: ignore
    with joined() as leader:
        run = finetune(public, records_of(64), replace(RECIPE, **settings), out)
        print("leads" if leader else "follows", run.ledger.run, run.ledger.reserved, flush=True)


if __name__ == "__main__":
    main()
