"""What happens behind the page: pipelines that live between runs, one run at a time, and each browser's history."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.errors import JobError
from sfumato.runtime.cluster import Cluster
from sfumato.runtime.control import ask
from sfumato.runtime.report import CostReport
from sfumato.ui.figures import Bar, bars_of, png_of
from sfumato.ui.settings import FieldError, Problem, Settings, problem_of

__all__ = ["Drawn", "Estimate", "Progress", "Run", "Session", "Studio"]

_PIPELINES, _SESSIONS, _HISTORY = 2, 64, 24
_POLL_S, _REACH_S = 0.1, 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Exact cost of a run to come; ``seconds`` is None until a run of this model was measured here."""

    rounds: int
    total_bytes: int
    seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """An image with its settings and cost. ``shares``: what each party sent of it, as PNG; ``name`` is its alone."""

    settings: Settings
    image: bytes
    shares: tuple[bytes, ...]
    report: CostReport
    bars: tuple[Bar, ...]
    name: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run is: ``waiting``, ``loading``, ``planning``, ``starting``, ``drawing``, ``opening``,
    ``cancelling``."""

    phase: str
    step: int
    steps: int
    left_s: float | None


class _Cancelled(Exception):
    """A run that a person ended."""


class Run:
    """One image in the making, in a thread of its own. At its end one of ``drawn``, ``problem`` and ``cancelled``
    is set."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.drawn: Drawn | None = None
        self.problem: Problem | None = None
        self.cancelled = False
        self._stop, self._done = threading.Event(), threading.Event()
        self._phase, self._step = "waiting", 0
        self._steps = settings.steps  # some schedulers take one more, or twice as many
        self._step_s: float | None = None  # expected, then measured
        self._step_began = time.monotonic()

    def cancel(self) -> None:
        """End as soon as the current step is over, with nothing opened. After the last step it is too late: the image
        is being opened, and the run comes to its end."""
        self._stop.set()

    def wait(self, timeout_s: float) -> bool:
        """Whether the run is over, at the latest after this time."""
        return self._done.wait(timeout_s)

    @property
    def active(self) -> bool:
        """Whether it still runs or waits."""
        return not self._done.is_set()

    def progress(self) -> Progress:
        """Where it is now."""
        left = None
        if self._step_s is not None and self._phase in ("drawing", "starting"):
            spent = time.monotonic() - self._step_began if self._phase == "drawing" else 0.0
            left = max(0.0, self._step_s * (self._steps - self._step) - min(spent, self._step_s))
        phase = "cancelling" if self._stop.is_set() and self._phase != "opening" else self._phase
        return Progress(phase=phase, step=self._step, steps=self._steps, left_s=left)

    # ---- for the studio ------------------------------------------------------------------------------------

    def enter(self, phase: str) -> None:
        """Begin a phase, unless the run is to end."""
        if self._stop.is_set():
            raise _Cancelled
        self._phase = phase

    def expect(self, step_s: float | None) -> None:
        """Set what a step is expected to take."""
        self._step_s = step_s

    def stepped(self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """`callback_on_step_end` of the pipeline: opens nothing. A run that is to end is left by its exception, so that
        the session closes before anything is opened; ``pipe.interrupt`` would open what there is."""
        now = time.monotonic()
        if self._step:  # the first step also loads the weights
            took = now - self._step_began
            known = self._step_s if self._step > 1 else None
            self._step_s = took if known is None else 0.7 * known + 0.3 * took
        self._step_began = now
        self._step, self._steps = step + 1, pipe.num_timesteps
        self.enter("opening" if self._step == self._steps else "drawing")
        return {}

    def check(self) -> None:
        """Raise when the run is to end."""
        if self._stop.is_set():
            raise _Cancelled

    def finish(self) -> None:
        """Nothing follows."""
        self._done.set()


@dataclass(slots=True)
class Session:
    """One browser: its latest run, and its images, newest first. ``shown``: the one that is looked at; ``cancelled``:
    whether the latest run was, and none has been looked at since."""

    run: Run | None = None
    history: list[Drawn] = field(default_factory=list)
    shown: Drawn | None = None
    cancelled: bool = False

    @property
    def busy(self) -> bool:
        """Whether its image is being drawn, or waits to be."""
        return self.run is not None and self.run.active

    def show(self, drawn: Drawn) -> None:
        """Look at this image."""
        self.shown, self.cancelled = drawn, False


class Studio:
    """Pipelines for one page server. Everything that computes holds one lock: one run or estimate at a time.

    ``start`` is what the page begins with. ``keys`` are those of real parties' clients, as `SecurePipeline` takes them;
    ``backend`` is what runs without a cluster file.
    """

    def __init__(
        self,
        *,
        start: Settings | None = None,
        backend: str = "local",
        profile: str = "precise",
        keys: Path | str | None = None,
    ) -> None:
        self.start_with = start or Settings()
        self.backend, self.profile, self.keys = backend, profile, keys
        self._pipes: OrderedDict[tuple[str, str, str], Any] = OrderedDict()
        self._rates: dict[tuple[str, str, str], float] = {}
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock, self._guard = threading.Lock(), threading.Lock()
        self._runs: set[Run] = set()
        self._closed = False

    # ---- sessions ------------------------------------------------------------------------------------------

    def session(self, name: str) -> Session:
        """The session of a browser, by the name in its cookie; the oldest idle ones are forgotten, and none that
        draws."""
        with self._guard:
            found = self._sessions.setdefault(name, Session())
            self._sessions.move_to_end(name)
            idle = [other for other, known in self._sessions.items() if other != name and not known.busy]
            for other in idle[: max(0, len(self._sessions) - _SESSIONS)]:
                del self._sessions[other]
            return found

    @property
    def drawing(self) -> bool:
        """Whether some browser's image is being drawn, or waits to be."""
        return any(run.active for run in self._runs)

    # ---- work ----------------------------------------------------------------------------------------------

    def models(self, settings: Settings) -> list[str]:
        """Names of the models that the parties of the cluster file hold for this client; none without such a file.

        Raises:
            FieldError: the cluster file or the keys cannot be used, or a party refuses.
            LinkError: a party cannot be reached within seconds.
        """
        if not settings.cluster:
            return []
        try:
            cluster, path = Cluster.load(settings.cluster), Path(settings.cluster)
            keys = self.keys or (path if path.is_dir() else path.parent)
            request = {"ask": "models"}
            replies = [
                ask(cluster, keys, i, request, timeout_s=_REACH_S) for i in range(len(cluster.parties))
            ]
        except JobError as error:
            raise FieldError("parties", problem_of(error).text) from None
        held = [{str(entry["name"]) for entry in reply["models"]} for reply in replies]
        return sorted(set.intersection(*held))

    def estimate(self, settings: Settings, *, unless: Callable[[], bool] = lambda: False) -> Estimate | None:
        """What a run would cost. Waits while another run or estimate computes, until ``unless`` says that nobody wants
        to know any more; then None.

        Raises:
            SfumatoError: what has to change.
        """
        while not self._lock.acquire(timeout=_POLL_S):
            if unless():
                return None
        try:
            if unless():
                return None
            report = self._pipe(settings).estimate(**settings.arguments())
        finally:
            self._lock.release()
        counted = Estimate(rounds=report.rounds, total_bytes=report.total_bytes, seconds=None)
        return self.timed(counted, settings)

    def timed(self, estimate: Estimate, settings: Settings) -> Estimate:
        """The same with the time that these settings' bytes take, as last measured."""
        rate = self._rates.get(settings.key)
        seconds = None if rate is None else rate * estimate.total_bytes
        return dataclasses.replace(estimate, seconds=seconds)

    def start(self, settings: Settings, session: Session) -> Run:
        """Begin an image; it lands in the session's history.

        Raises:
            FieldError: this session has a run already, or there is no prompt.
        """
        run = Run(settings.with_prompt())
        with self._guard:
            if self._closed:
                raise FieldError("run", "The page's server is closing; start it again.")
            if session.busy:
                raise FieldError("run", "An image is being drawn already; wait for it, or cancel it.")
            session.run, session.cancelled = run, False
            self._runs = {other for other in self._runs if other.active} | {run}
        threading.Thread(target=self._work, args=(run, session), name="sfumato-run", daemon=True).start()
        return run

    def _work(self, run: Run, session: Session) -> None:
        place = "model"
        try:
            self.models(run.settings)  # whether the parties are there, before any work
            while not self._lock.acquire(timeout=_POLL_S):
                run.check()
            try:
                run.enter("loading")
                pipe = self._pipe(run.settings)
                run.enter("planning")
                plans = pipe.plans(run.settings.prompt, **run.settings.arguments())
                place = "run"
                run.enter("starting")
                run.drawn = self._draw(run, pipe, plans)
                session.history.insert(0, run.drawn)
                del session.history[_HISTORY:]
                session.show(run.drawn)
            finally:
                self._lock.release()
        except _Cancelled:
            run.cancelled = session.cancelled = True
        except BaseException as error:
            run.problem = problem_of(error, place)
        finally:
            run.finish()

    def _draw(self, run: Run, pipe: Any, plans: Any) -> Drawn:
        import torch

        from sfumato.diffusion.seen import blocks_of, share_picture

        settings = run.settings
        rate = self._rates.get(settings.key)
        if rate is not None:
            run.expect(rate * pipe.estimate(**settings.arguments()).total_bytes / settings.steps)
        output = pipe(
            settings.prompt,
            **settings.arguments(),
            generator=torch.Generator().manual_seed(settings.seed),
            callback_on_step_end=run.stepped,
        )
        report = output.report
        self._rates[settings.key] = report.seconds / max(1, report.total_bytes)
        shares = tuple(png_of(share_picture(share)) for share in pipe.last_shares)
        bars = tuple(bars_of(blocks_of(report, plans)))
        return Drawn(
            settings=settings, image=png_of(output.images[0]), shares=shares, report=report, bars=bars
        )

    def _pipe(self, settings: Settings) -> Any:
        """The pipeline for these settings, kept for the next run; the oldest is closed to make room."""
        if self._closed:
            raise JobError("the page's server is closing")
        known = self._pipes.get(settings.key)
        if known is None:
            while len(self._pipes) >= _PIPELINES:
                _close(self._pipes.popitem(last=False)[1])
            try:
                known = self._pipes[settings.key] = self._open(settings)
            except JobError as error:
                raise FieldError("model", problem_of(error).text) from None
        self._pipes.move_to_end(settings.key)
        return known

    def _open(self, settings: Settings) -> Any:
        from sfumato.diffusion.pipeline import SecurePipeline

        made: dict[str, Any] = {} if settings.shared else {"secret": settings.secret, "profile": self.profile}
        if not settings.cluster:
            made["backend"] = self.backend
        pipe = SecurePipeline.from_pretrained(
            settings.model,
            cluster=settings.cluster or None,
            keys=self.keys,
            **made,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def close(self, timeout_s: float = 10.0) -> None:
        """Cancel what runs, and stop the parties of this machine; may be called twice."""
        with self._guard:
            self._closed, runs = True, list(self._runs)
        for run in runs:
            run.cancel()
        held = self._lock.acquire(timeout=timeout_s)  # a step that takes longer is cut off
        try:
            while self._pipes:
                _close(self._pipes.popitem()[1])
        finally:
            if held:
                self._lock.release()


def _close(pipe: Any) -> None:
    with contextlib.suppress(Exception):
        pipe.close()
