"""What a private training promised and what it has spent: the ledger travels with the weights.

The ledger is written ahead. Before a step runs, it is *reserved*, and the file that says so is on the disk; what is
reserved counts as spent, whether it ran, was lost in a crash, or never started. So ε is never reported too low, and no
number of kills and resumes gets past the plan. What a crash loses is training, not privacy.

One ledger prices one run. Several runs on the same records add up (`compose`), and a data holder who wants that held
keeps a `Register` beside the data. Neither sees through copies: a checkpoint folder that is copied and resumed twice is
two releases, and its ledger an old one in each.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from sfumato.dp import accountant
from sfumato.dp.accountant import Event, Spent
from sfumato.errors import BudgetExceeded, JobError

__all__ = ["ADJACENCY", "MECHANISM", "NOT_COVERED", "Ledger", "Register", "compose", "sync"]

FORMAT = 1
ADJACENCY = "add or remove one record (image and its label)"
MECHANISM = "Poisson-subsampled Gaussian"
#: What (ε, δ) does not speak about, printed wherever ε is.
NOT_COVERED = (
    "The choice of hyperparameters (noise, batch, rate, clip norm, epochs, what is trained) if it looked at the "
    "private data; each run on it is a release of its own and adds up.",
    "The images that the public start was trained on; they have no protection here.",
    "The number of records N; the sample rate and the noise are computed from it.",
    "The list of classes or prompts, and how often each is drawn if that follows the private labels; draw uniformly.",
    "Statistics of the private data used before training (means, sizes, a crop or filter chosen by looking).",
    "Any evaluation on private data that is published or that picks a checkpoint or a sampler.",
    "Several records of one person: the guarantee is for one record, and weakens with their number.",
)
_SOFTWARE = ("sfumato", "torch", "opacus", "dp-accounting", "diffusers")


def _now() -> str:
    """The day alone: how long the steps took follows the sizes of their batches."""
    return datetime.now(UTC).date().isoformat()


def _versions() -> dict[str, str]:
    found = {}
    for name in _SOFTWARE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@dataclass(frozen=True)
class Ledger:
    """One run's plan and account. Every change makes a new ledger, which counts once it is written.

    Args:
        epsilon, delta: the budget; ε may be infinite (no privacy).
        event: the whole plan: sample rate, noise multiplier, steps.
        clip: bound C on a record's gradient norm; ε does not depend on it.
        records: N. Private and *not* covered by ε: round it where that matters.
        expected_batch: q N, the constant divisor of the noisy sum.
        trained: what is trained, in words ("attention modules from 2, prompt embedder").
        public: the public start's sources by name, each with its digest (`sources.Sources.digests`).
        private: commitment to the private records, 64 hex digits (`sources.commitment`).
        recipe: the run's settings, as JSON; for the reader only.
        run: this run's random name; a resumed run keeps it.
        reserved: steps that count as spent. ``done``: those of them whose result is in a checkpoint.
        not_covered: what ε does not speak about, one sentence each.
        versions, started, ended: software, and UTC days in ISO 8601; ``ended`` is None while the run lasts.

    Raises:
        JobError: entries that cannot be.
    """

    epsilon: float
    delta: float
    event: Event
    clip: float
    records: int
    expected_batch: float
    trained: str
    public: Mapping[str, str]
    private: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    run: str = field(default_factory=lambda: secrets.token_hex(16))
    reserved: int = 0
    done: int = 0
    not_covered: tuple[str, ...] = NOT_COVERED
    versions: Mapping[str, str] = field(default_factory=_versions)
    started: str = field(default_factory=_now)
    ended: str | None = None

    def __post_init__(self) -> None:
        plan, total = self.event, self.event.steps
        for wrong, text in (
            (not self.epsilon > 0, f"epsilon is {self.epsilon}; it must be above 0"),
            (not 0 < self.delta < 1, f"delta is {self.delta}; it must lie between 0 and 1"),
            (not 0 < self.clip < math.inf, f"clip is {self.clip}; it must be a finite norm above 0"),
            (self.records < 1, f"records is {self.records}; there must be at least one"),
            (
                not math.isclose(self.expected_batch, plan.sample_rate * self.records, rel_tol=1e-6),
                f"expected_batch is {self.expected_batch}, but the sample rate times the records is "
                f"{plan.sample_rate * self.records:g}; make them equal",
            ),
            (
                not 0 <= self.done <= self.reserved <= total,
                f"done {self.done}, reserved {self.reserved} and planned {total} steps are not in ascending order",
            ),
            (not _is_hex(self.private, 64), "private must be a commitment of 64 hex digits"),
            (not _is_hex(self.run, 32), "run must be a name of 32 hex digits"),
        ):
            if wrong:
                raise JobError(f"this ledger cannot be: {text}")

    @property
    def captions(self) -> tuple[str, ...]:
        """Prompts of the classes; one empty prompt where there are none, or where texts are private."""
        return tuple(self.recipe.get("captions", ())) or ("",)

    @property
    def left(self) -> int:
        """Steps that may still be reserved."""
        return self.event.steps - self.reserved

    def verify(self) -> Spent:
        """ε of the whole plan; call before the first step and after every read.

        Raises:
            BudgetExceeded: the plan costs more than its budget.
            JobError: the accountants disagree.
        """
        spent = _priced([self.event], self.delta)
        if spent.epsilon > self.epsilon:
            raise BudgetExceeded(
                f"the planned {self.event.steps} steps cost epsilon {spent.epsilon:.4f}, more than the budget of "
                f"{self.epsilon:g}; raise the noise multiplier or plan fewer steps"
            )
        return spent

    def reserve(self, steps: int) -> Ledger:
        """The ledger with ``steps`` more charged: write it, then run them.

        Raises:
            BudgetExceeded: more than are left of the plan.
            JobError: no step, or a run that has ended.
        """
        if steps < 1:
            raise JobError(f"reserve at least one step, not {steps}")
        if self.ended is not None:
            raise JobError(f"this run ended at {self.ended}; start a new one, with a budget of its own")
        if steps > self.left:
            raise BudgetExceeded(
                f"{steps} steps were asked, but of {self.event.steps} planned ones {self.reserved} are spent and "
                f"{self.left} left (steps lost in a crash stay spent); ask for fewer"
            )
        return replace(self, reserved=self.reserved + steps)

    def complete(self, steps: int) -> Ledger:
        """The ledger with ``steps`` more in a checkpoint.

        Raises:
            JobError: steps that were not reserved.
        """
        if steps < 0 or self.done + steps > self.reserved:
            raise JobError(
                f"{steps} steps were reported, but {self.reserved - self.done} are reserved and not done; reserve first"
            )
        return replace(self, done=self.done + steps)

    def finish(self) -> Ledger:
        """The ledger of a run that takes no more steps; what was reserved stays spent."""
        return replace(self, ended=_now())

    def spent(self) -> Spent:
        """ε of all *reserved* steps.

        Raises:
            JobError: the accountants disagree.
        """
        return compose([self])

    def write(self, path: Path) -> None:
        """Put it on the disk, all or nothing: when this returns, a power cut leaves this ledger, before it the last."""
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        with open(draft, "w", encoding="utf-8") as file:
            file.write(json.dumps(self._to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync(path.parent)

    @staticmethod
    def read(path: Path) -> Ledger:
        """
        Raises:
            JobError: no file, not JSON, another format, unknown or missing entries, wrong types, impossible values.
        """
        try:
            entries = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise JobError(
                f"{path} cannot be read ({error.strerror}); a private model needs its ledger"
            ) from error
        except ValueError as error:
            raise JobError(f"{path} is not a ledger: {error}") from error
        try:
            return _from_json(entries)
        except JobError as error:
            raise JobError(f"{path} is not a ledger: {error}") from error

    def _to_json(self) -> dict[str, Any]:
        entries = {f.name: getattr(self, f.name) for f in fields(self)}
        entries |= {"event": asdict(self.event), "public": dict(self.public), "recipe": dict(self.recipe)}
        entries |= {"versions": dict(self.versions), "not_covered": list(self.not_covered)}
        if math.isinf(self.epsilon):
            entries["epsilon"] = "inf"
        return {"format": FORMAT, "adjacency": ADJACENCY, "mechanism": MECHANISM} | entries


def compose(ledgers: Iterable[Ledger]) -> Spent:
    """ε of everything that several runs reserved, if they read the same records: what running again really costs.

    Raises:
        JobError: ledgers with different δ, or accountants that disagree.
    """
    all_ledgers = list(ledgers)
    deltas = {ledger.delta for ledger in all_ledgers}
    if len(deltas) > 1:
        raise JobError(
            f"ledgers at different delta cannot be added: {sorted(deltas)}; take runs with one delta"
        )
    if not all_ledgers:
        return Spent(0.0, 0.0, 0.0)
    return _priced([replace(ledger.event, steps=ledger.reserved) for ledger in all_ledgers], deltas.pop())


class Register:
    """A data holder's own list of the runs on its data: one JSON line for each, kept beside the data and not published.

    All runs of a register add up, whether they read exactly the same images or not: sets that overlap are the rule (one
    image more, a part left out), and what a list of fingerprints would tell apart, a resized copy would hide. One
    register for each population that shares no image with another.

    A run is charged in full when it starts, so what it holds is never below what was spent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def charge(self, ledger: Ledger, limit_epsilon: float | None = None) -> Spent:
        """Enter a run, and ε of all runs entered with it, at the smallest δ of them. A resumed run is entered already
        and costs nothing more.

        Args:
            ledger: of the run that is about to start or resume.
            limit_epsilon: bound on the sum; None has none.

        Raises:
            BudgetExceeded: the sum would pass the limit; nothing is entered.
            JobError: a damaged register, or a run entered with another plan.
        """
        entry = {"format": FORMAT, "private": ledger.private, "run": ledger.run, "delta": ledger.delta}
        entry |= asdict(ledger.event)
        with self._locked() as file:
            entries = list(self._entries(file))
            known = next((e for e in entries if e["run"] == ledger.run), None)
            if known not in (None, entry):
                raise JobError(
                    f"run {ledger.run} is in the register {self.path} with another plan; start a new run"
                )
            earlier = [e for e in entries if e["run"] != ledger.run]
            events = [Event(e["sample_rate"], e["noise_multiplier"], e["steps"]) for e in earlier]
            # At the smallest δ of them all: a larger one would make the earlier runs look cheaper than they were.
            delta = min([ledger.delta, *(e["delta"] for e in earlier)])
            spent = _priced([*events, ledger.event], delta)
            if limit_epsilon is not None and spent.epsilon > limit_epsilon:
                raise BudgetExceeded(
                    f"with this run all {len(earlier) + 1} of this register would cost epsilon {spent.epsilon:.4f} "
                    f"at delta {delta:g}, more than the limit of {limit_epsilon:g}; lower --epsilon or "
                    "--epochs, or raise the limit"
                )
            if known is None:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
        sync(self.path.parent)
        return spent

    @contextmanager
    def _locked(self) -> Iterator[TextIO]:
        with open(
            self.path, "a+", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)
        ) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            file.seek(0)
            yield file

    def _entries(self, file: TextIO) -> Iterator[dict[str, Any]]:
        kinds = {"format": int, "private": str, "run": str, "delta": float, "sample_rate": float}
        kinds |= {"noise_multiplier": float, "steps": int}
        for number, line in enumerate(file, 1):
            try:
                if not line.endswith("\n"):
                    raise JobError("it is cut off")
                entry = _typed(json.loads(line), kinds)
                Event(entry["sample_rate"], entry["noise_multiplier"], entry["steps"])
                _check_format(entry)
            except (JobError, ValueError) as error:
                raise JobError(
                    f"line {number} of the register {self.path} is damaged ({error}); restore it, or delete the line "
                    "if its run never started"
                ) from error
            yield entry


def _priced(events: Iterable[Event], delta: float) -> Spent:
    spent = accountant.spent(events, delta)
    accountant.check(spent)
    return spent


def sync(folder: Path) -> None:
    """Put a folder's names on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- strict reading ------------------------------------------------------------------------------------------

_KINDS: dict[str, Any] = {
    "format": int, "adjacency": str, "mechanism": str, "epsilon": (float, str), "delta": float, "event": dict,
    "clip": float, "records": int, "expected_batch": float, "trained": str, "public": dict, "private": str,
    "recipe": dict, "run": str, "reserved": int, "done": int, "not_covered": list, "versions": dict, "started": str,
    "ended": (str, type(None)),
}  # fmt: skip


def _from_json(entries: Any) -> Ledger:
    found = _typed(entries, _KINDS)
    _check_format(found)
    for name, only in (("adjacency", ADJACENCY), ("mechanism", MECHANISM)):
        if found.pop(name) != only:
            raise JobError(f"{name} must be {only!r}")
    del found["format"]
    if found["epsilon"] == "inf":
        found["epsilon"] = math.inf
    elif isinstance(found["epsilon"], str):
        raise JobError("epsilon must be a number or 'inf'")
    found["event"] = Event(
        **_typed(found["event"], {"sample_rate": float, "noise_multiplier": float, "steps": int})
    )
    for name in ("public", "versions"):
        _typed(found[name], dict.fromkeys(found[name], str))
    if not all(isinstance(sentence, str) for sentence in found["not_covered"]):
        raise JobError("not_covered must be a list of sentences")
    found["not_covered"] = tuple(found["not_covered"])
    return Ledger(**found)


def _typed(entries: Any, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a JSON object that has exactly these entries, of these types; a whole number may stand for a float."""
    if not isinstance(entries, dict):
        raise JobError("a JSON object is wanted")
    if wrong := sorted(set(entries) ^ set(kinds)):
        raise JobError(f"missing or unknown entries: {', '.join(wrong)}")
    found = {}
    for name, kind in kinds.items():
        value = entries[name]
        wants_float = kind is float or (isinstance(kind, tuple) and float in kind)
        if wants_float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool) or value != value:
            raise JobError(f"{name} has the wrong type: {value!r}")
        found[name] = value
    return found


def _check_format(entries: Mapping[str, Any]) -> None:
    if entries["format"] != FORMAT:
        raise JobError(
            f"its format is {entries['format']}, this version reads {FORMAT}; use the version that wrote it"
        )


def _is_hex(text: str, digits: int) -> bool:
    return len(text) == digits and not set(text) - set("0123456789abcdef")
