"""Images of one setting: in float, by the plan's arithmetic in the clear, or under the protocol."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sfumato.diffusion.correction import Correction
from sfumato.diffusion.cuts import ways
from sfumato.diffusion.loop import Denoising
from sfumato.diffusion.parties import KeptParties
from sfumato.diffusion.sampling import sample
from sfumato.errors import JobError, RangeError
from sfumato.graph.calibrate import Calibration
from sfumato.graph.published import PAPERS
from sfumato.runtime.backend import Backend
from sfumato.runtime.remote import open_backend
from sfumato.runtime.report import CostReport
from sfumato.study.offline import Fit, correction, fitted
from sfumato.study.plans import Plans, course, plans, ranges
from sfumato.study.setting import Setting
from sfumato.study.subject import Subject

__all__ = ["BACKENDS", "Drawer", "Drawn"]

#: As `open_backend` knows them; a setting without a profile needs none.
BACKENDS = ("plain", "simulate", "local")
#: Attempts at a chunk: each measures ranges on twice as many runs as the one before.
_ATTEMPTS = 4
#: Times as many runs after which ranges are not the reason.
_HOPELESS = 4


@dataclass(frozen=True, slots=True)
class Drawn:
    """Images (N, C, H, W) in [0, 1], in seconds and processor seconds of this process (and of the parties)."""

    images: Tensor
    seconds: float
    cpu_s: float


class Drawer:
    """Draws images of one subject, ``images`` at a time; plans are kept. A context manager: it ends its parties."""

    def __init__(self, subject: Subject, images: int, backend: str = "plain") -> None:
        if backend not in BACKENDS:
            raise JobError(f"there is no backend {backend!r} for studies; use one of {', '.join(BACKENDS)}")
        self.subject, self.images, self.backend = subject, images, backend
        self._parties = KeptParties()
        self._effort = dict[Setting, int]()
        self._plans = lru_cache(maxsize=6)(self._planned)
        self._fits = lru_cache(maxsize=32)(self._fitted)

    def draw(self, setting: Setting, prompts: Sequence[int], seeds: Sequence[int]) -> Drawn:
        """One image of each pair of prompt (its index) and seed; as many as ``images`` says.

        Raises:
            JobError: the setting does not fit the subject.
        """
        if len(prompts) != self.images or len(seeds) != self.images:
            raise JobError(f"this drawer draws {self.images} images at a time, not {len(seeds)}")
        started, cpu = time.monotonic(), time.process_time()
        if setting.profile is None:
            latents, more_s = self._exact(setting, prompts, seeds), 0.0
        else:
            latents, more_s = self._approximated(setting, prompts, seeds)
        images = self.subject.decode(latents.float())
        return Drawn(images, time.monotonic() - started, time.process_time() - cpu + more_s)

    def cost(self, setting: Setting) -> CostReport:
        """Exact cost of one image under the protocol, from a run on shapes.

        Raises:
            JobError: the setting has no profile, so it does not run under the protocol.
        """
        if setting.profile is None:
            raise JobError(f"{setting.name}: the exact network does not run under the protocol")
        model = self._model(setting)
        one = plans(model, setting, 1, self._ranges(setting))
        added = None
        if setting.offline is not None:  # of the right shape; what it holds does not move a byte
            steps = len(course(model, setting).times)
            added = Correction((0.1,) * steps, (torch.zeros((1, *model.shape)),) * steps)
        with open_backend("meta") as backend:
            self._denoise(backend, one, setting, [0], [0], added)
            return backend.report()

    def fit(self, setting: Setting) -> Fit:
        """Weights of a blend; of another correction, what they would be."""
        return self._fits(setting)

    def close(self) -> None:
        """End the parties of this drawer."""
        self._parties.close()

    def __enter__(self) -> Drawer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- how -------------------------------------------------------------------------------------------------

    def _model(self, setting: Setting) -> Subject:
        """The subject with the network that the setting names."""
        return self.subject.of(setting.network)

    def _exact(self, setting: Setting, prompts: Sequence[int], seeds: Sequence[int]) -> Tensor:
        model = self._model(setting)
        going = course(model, setting)
        first = model.noise(seeds) * going.schedule.init_sigma
        return sample(
            model, going.schedule, first, model.text(prompts, guided=going.guided),
            going.guidance if going.guided else None, correction=correction(model, setting, seeds, None),
        )  # fmt: skip

    def _approximated(
        self, setting: Setting, prompts: Sequence[int], seeds: Sequence[int]
    ) -> tuple[Tensor, float]:
        for attempt in range(_ATTEMPTS):
            try:
                return self._attempt(setting, prompts, seeds)
            except RangeError:
                # A run says so, and its user measures ranges on more; so does a study.
                if attempt == _ATTEMPTS - 1:
                    raise
                self._effort[setting] = 2 * self._effort.get(setting, 1)
                self._plans.cache_clear()
        raise AssertionError

    def _attempt(
        self, setting: Setting, prompts: Sequence[int], seeds: Sequence[int]
    ) -> tuple[Tensor, float]:
        made = self._plans(setting)
        fit = None
        if setting.offline is not None and setting.offline.kind == "blend":
            fit = self._fits(setting)
        added = correction(self._model(setting), setting, seeds, made["unet"], fit)
        with self._session(setting) as backend:
            latents = self._denoise(backend, made, setting, prompts, seeds, added)
            spent = backend.report().cpu_seconds if self.backend == "local" else ()
        return latents, sum(spent)

    def _denoise(
        self,
        backend: Backend,
        made: Plans,
        setting: Setting,
        prompts: Sequence[int],
        seeds: Sequence[int],
        added: Correction | None,
    ) -> Tensor:
        model = self._model(setting)
        going, first = course(model, setting), model.noise(seeds)
        first = first * going.schedule.init_sigma
        for name, plan in made.items():
            backend.load(name, plan)
        public = setting.public_first and going.guided
        known = {}
        if public:
            seen = (first * going.schedule.steps[0].input_scale).float()
            null = model.null.expand(len(seeds), -1, -1)
            known[0] = model(seen, going.schedule.timesteps[0], null).double()
        run = Denoising(
            backend, made, going.schedule, model.text(prompts, guided=going.guided), None,
            going.guidance if going.guided else None, correction=added, known=known,
            ways=ways(len(going.guidance), guided=going.guided, unguided=setting.unguided, known=public),
        )  # fmt: skip
        return run.run(first)

    def _session(self, setting: Setting) -> AbstractContextManager[Backend]:
        if self.backend == "local":
            return self._parties.session({})
        # The checks of ranges would double the time of thousands of images; the protocol's own runs have them.
        options = {"certificate": self.backend != "plain"}
        # Published functions overflow inside, where no range of theirs helps; the parties' words wrap there, too.
        published = setting.profile in PAPERS or bool(setting.methods)
        hopeless = self._effort.get(setting, 1) >= _HOPELESS
        return open_backend(self.backend, options={**options, "wraps": published and hopeless})

    def _planned(self, setting: Setting) -> Plans:
        return plans(self._model(setting), setting, self.images, self._ranges(setting))

    def _ranges(self, setting: Setting) -> dict[str, Calibration]:
        return ranges(self._model(setting), setting, self._effort.get(setting, 1))

    def _fitted(self, setting: Setting) -> Fit:
        return fitted(self._model(setting), setting, self._plans(setting)["unet"], self.images)
