"""What a client drives: commands on handles, the same calls for real parties, simulation, plain words and shapes."""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from sfumato.errors import JobError, RangeError
from sfumato.graph.certificate import failed, sample_count, watched
from sfumato.graph.plan import Plan, load_side
from sfumato.protocol.rep3 import Rep3
from sfumato.ring.fixed import decode, encode, encode_scalar
from sfumato.ring.prg import stream_words
from sfumato.runtime import commands, weights
from sfumato.runtime.client import RemoteSession
from sfumato.runtime.cluster import Cluster
from sfumato.runtime.commands import (
    Affine,
    Call,
    Certify,
    Command,
    Drop,
    Load,
    Put,
    Reveal,
    Stats,
    WeightSpec,
    WeightsSpec,
)
from sfumato.runtime.lineage import Lineage
from sfumato.runtime.local import LocalCluster
from sfumato.runtime.machine import PartyMachine
from sfumato.runtime.report import CostReport, Took, merged_rows
from sfumato.session.drive import LockstepLink, Scheduler, lockstep, simulation_keys
from sfumato.session.ledger import Row
from sfumato.session.randomness import PairStreams
from sfumato.types import Z64, Ring, Shared

__all__ = ["Backend", "Lockstep", "Remote", "Term", "open_backend"]

#: Fraction bits of the coefficients of an affine combination.
COEFFICIENT_FRAC = 24
_LARGE_WEIGHTS = 64 << 20
#: Elements that wait for a certificate at the parties: above this they are judged in the middle of a chain of calls.
_MOST_SAMPLES = 1 << 17


class Term(NamedTuple):
    """coefficient * handle[start:stop] (rows of the first axis; all of them by default)."""

    handle: str
    coefficient: float
    start: int | None = None
    stop: int | None = None


class Backend(ABC):
    """A client's session with the parties. Use as a context manager; shares are gone when it ends."""

    protocol: str
    device = "cpu"

    #: What each party sent in the latest :meth:`reveal`: uniform words that add up to the value.
    last_components: Sequence[Tensor] = ()
    #: What each party spent on the latest :meth:`call`, and on the latest certificate; empty where nobody measures.
    last_call: Sequence[Took] = ()
    last_certificate: Sequence[Took] = ()

    def __init__(self, *, certify: bool = True) -> None:
        self._client_bytes = 0
        self._setup_bytes = 0
        self._secret_weights: dict[str, dict[str, str]] = {}
        self._plans: dict[str, Plan] = {}
        self._certify = certify
        self._lineage = Lineage()
        self._certificates = 0
        self._started = time.monotonic()

    # ---- the calls ----------------------------------------------------------------------------------------------

    def load(self, name: str, plan: Plan) -> None:
        """Give the parties a plan and its weights: public words to all, or shares of secret ones.

        Runs of another plan of this name are judged by that one first.
        """
        before = self._lineage.waiting().get(name)
        if before:
            self._judge({name: before})
        self._plans[name] = plan
        values = load_side(plan)
        public = {n: t.contiguous() for n, t in values.publics.items()}
        items = tuple(WeightSpec(n, str(Z64), 0, tuple(t.shape)) for n, t in public.items())
        document = plan.for_parties()
        folder = self._weights_folder
        if folder is not None and _bytes(list(public.values())) > _LARGE_WEIGHTS:
            document["weights_file"] = weights.stored(folder, public)
            self._command(Load(name, document, WeightsSpec("stored", items)), setup=True)
        else:
            attached = [list(public.values())] * self._parties
            self._command(Load(name, document, WeightsSpec("public", items)), attached, setup=True)
        self._secret_weights[name] = {n: f"{name}:{n}" for n in values.secrets}
        for weight, tensor in values.secrets.items():
            type = plan.secret_type(weight)
            self.put(self._secret_weights[name][weight], tensor, type.frac, type.ring, setup=True)

    def put(
        self, handle: str, values: Tensor, frac: int = 18, ring: Ring = Z64, *, setup: bool = False
    ) -> None:
        """Share the client's reals: each party gets two of three components, seeds instead of words where possible."""
        command = Put(handle, str(ring), frac, tuple(values.shape))
        self._command(command, self._split(values, ring, frac), setup=setup)
        self._release(self._lineage.derive([handle], []))

    def call(
        self,
        name: str,
        path: str,
        inputs: Mapping[str, str],
        publics: Mapping[str, Tensor],
        outputs: Sequence[str],
    ) -> None:
        """Run a loaded plan once; ``path`` is new in this session. Outputs become handles.

        A few elements of every watched call are kept at the parties until something that descends from this run is
        revealed.

        Raises:
            RangeError: an input descends from a run that is known to have left its ranges.
        """
        given = {**self._secret_weights.get(name, {}), **inputs}
        self._refuse(given.values())
        samples = _samples_of(path) if self._certify and watched(self._plans[name]) else None
        command = Call(name, path, given, dict(publics), tuple(outputs), samples)
        self.last_call = self._call(command)
        run = {"run": path, "plan": name} if samples else {}
        self._release(self._lineage.derive(outputs, given.values(), **run))
        waiting = self._lineage.waiting()
        if sum(sample_count(self._plans[plan]) * len(runs) for plan, runs in waiting.items()) > _MOST_SAMPLES:
            self._judge(waiting)

    def _call(self, command: Call) -> Sequence[Took]:
        return _took(self._command(command))

    def affine(self, handle: str, terms: Sequence[Term], path: str, frac: int = 18) -> None:
        """Public combination of handles with one truncation (none when all coefficients are whole)."""
        whole = all(float(t.coefficient).is_integer() for t in terms)
        bits = 0 if whole else COEFFICIENT_FRAC
        words = tuple(
            commands.Term(t.handle, encode_scalar(t.coefficient, bits), t.start, t.stop) for t in terms
        )
        self._command(Affine(handle, words, bits, path))
        self._release(self._lineage.derive([handle], [t.handle for t in terms]))

    def reveal(self, handle: str) -> Tensor:
        """The value, in float64, at the client alone, once the runs that it descends from are certified.

        Raises:
            RangeError: see :meth:`certify`.
        """
        self.certify(handle)
        replies = self._command(Reveal(handle))
        self.last_components = [tensors[0] for _, tensors in replies]
        return self._opened(replies)

    def _opened(self, replies: Sequence[tuple[dict[str, Any], list[Tensor]]]) -> Tensor:
        components = [tensors[0] for _, tensors in replies]
        if self.device == "meta":
            return torch.zeros(components[0].shape, dtype=torch.float64)
        ring, frac = Ring.named(str(replies[0][0]["ring"])), int(replies[0][0]["frac"])
        words = components[0] if len(components) == 1 else Rep3.combine(components, ring)
        return decode(words, frac)

    def certify(self, *handles: str) -> None:
        """Learn, at the client alone, whether the runs that these values descend from stayed in their plans' calibrated
        ranges. A run is judged once; one certificate covers all that were not.

        Raises:
            RangeError: names the layers whose samples were outside; the values are not to be trusted.
        """
        waiting = self._lineage.waiting(handles)
        if waiting:
            self._judge(waiting)
        self._refuse(handles)

    def _judge(self, waiting: Mapping[str, Sequence[str]]) -> None:
        path, self._certificates = f"ranges{self._certificates}", self._certificates + 1
        runs = tuple((plan, tuple(map(_samples_of, paths))) for plan, paths in waiting.items())
        replies = self._command(Certify(path, runs))
        self.last_certificate = _took(replies)
        counts = self._opened(replies).tolist()
        for name, paths in waiting.items():
            plan = self._plans[name]
            own, counts = counts[: len(watched(plan))], counts[len(watched(plan)) :]
            outside = failed(plan, own, len(paths))
            problem = None
            if outside:
                problem = (
                    f"{len(outside)} layers left the range that {plan.program.title} was calibrated for, "
                    f"{outside[0]} first; calibrate on inputs like this one"
                )
            self._lineage.judge(paths, problem)

    def _refuse(self, handles: Iterable[str]) -> None:
        problem = self._lineage.failure(handles)
        if problem is not None:
            raise RangeError(problem)

    def _release(self, runs: Iterable[str]) -> None:
        """Let the parties forget samples from which no handle descends any more."""
        for run in runs:
            self._command(Drop(_samples_of(run)))

    def drop(self, *handles: str) -> None:
        """Forget values at the parties."""
        for handle in handles:
            self._command(Drop(handle))
            self._release(self._lineage.forget(handle))

    def report(self, *, steps: Sequence[float] = ()) -> CostReport:
        """Cost of this session so far."""
        stats = [reply for reply, _ in self._command(Stats(), count=False)]
        rows = merged_rows([reply["rows"] for reply in stats])
        measured = self._measured
        return CostReport(
            protocol=self.protocol,
            rounds=max(int(reply["rounds"]) for reply in stats),
            bytes_sent=tuple(sum(cost.bytes_sent[i] for cost in rows.values()) for i in range(self._parties)),
            sends=tuple(int(reply["sends"]) for reply in stats),
            client_bytes=self._client_bytes,
            setup_bytes=self._setup_bytes,
            by_path=rows,
            seconds=time.monotonic() - self._started if self.device != "meta" else None,
            cpu_seconds=tuple(float(reply["cpu_s"]) for reply in stats) if measured else (),
            peak_memory=tuple(int(reply["peak_memory"]) for reply in stats) if measured else (),
            kernel_bytes=tuple(int(reply["kernel_bytes"]) for reply in stats) if measured else (),
            steps=tuple(steps),
        )

    def start_clock(self) -> None:
        """Measure seconds from now: set-up is over."""
        self._started = time.monotonic()

    # ---- inside -------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def _parties(self) -> int: ...

    @abstractmethod
    def _send(
        self, command: Command, attachments: Sequence[Sequence[Tensor]]
    ) -> list[tuple[dict[str, Any], list[Tensor]]]: ...

    @abstractmethod
    def close(self) -> None:
        """End the session; shares are gone afterwards."""

    _weights_folder: Path | None = None
    _measured = False

    def _command(
        self,
        command: Command,
        attachments: Sequence[Sequence[Tensor]] | None = None,
        *,
        setup: bool = False,
        count: bool = True,
    ) -> list[tuple[dict[str, Any], list[Tensor]]]:
        given = attachments or [[] for _ in range(self._parties)]
        replies = self._send(command, given)
        size = sum(_bytes(tensors) for tensors in given) + sum(_bytes(tensors) for _, tensors in replies)
        if isinstance(command, Call):
            size += self._parties * _bytes(list(command.publics.values()))
        if setup:
            self._setup_bytes += size
        elif count:
            self._client_bytes += size
        return replies

    def _split(self, values: Tensor, ring: Ring, frac: int) -> list[list[Tensor]]:
        """Attachments per party: components 0 and 1 are seeded streams, component 2 is the rest."""
        meta = self.device == "meta"
        words = encode(values.to("meta") if meta else values, ring, frac)
        if self._parties == 1:
            return [[words]]
        seeds = [torch.frombuffer(bytearray(os.urandom(32)), dtype=torch.uint8) for _ in range(2)]
        shape = tuple(words.shape)
        device = "meta" if meta else "cpu"
        masks = [stream_words(seed.numpy().tobytes(), "put", ring, shape, device) for seed in seeds]
        rest = Rep3.split(words, ring, masks)[2]
        return [[seeds[0], seeds[1]], [seeds[1], rest], [rest, seeds[0]]]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _samples_of(run: str) -> str:
    """The handle of a run's samples."""
    return f"{run}:samples"


def _took(replies: Sequence[tuple[dict[str, Any], list[Tensor]]]) -> tuple[Took, ...]:
    """What the parties say they spent; empty where they do not."""
    return tuple(Took(**reply["took"]) for reply, _ in replies if "took" in reply)


#: The clock of a party that a message chain does not start from.
_NEVER = -(1 << 40)


class _Repeat(NamedTuple):
    """What one call of a plan costs: path lengths from party j's start to party i's end, ledger rows, the lengths at
    which something leaves for a peer, result types."""

    lengths: list[tuple[int, ...]]
    rows: list[dict[str, Row]]
    departures: list[set[tuple[int, tuple[int, ...]]]]
    values: list[list[Shared]]

    @staticmethod
    def of(machines: Sequence[PartyMachine], command: Call) -> _Repeat:
        """Read it off machines that have just run the call from unit clocks."""
        prefix = f"/{command.path}"
        rows = [
            {
                p[len(prefix) :]: row
                for p, row in machine.ledger.rows.items()
                if p == prefix or p.startswith(f"{prefix}/")
            }
            for machine in machines
        ]
        departures = [set(machine.ledger.relative) for machine in machines]
        for machine in machines:
            machine.ledger.relative.clear()
        lengths = [machine.clock for machine in machines]
        return _Repeat(
            [clock if isinstance(clock, tuple) else (clock,) for clock in lengths],
            rows,
            departures,
            [machine.known(command) for machine in machines],
        )

    def book(self, machines: Sequence[PartyMachine], command: Call) -> None:
        """The same call under another path: rows and result types."""
        for machine, rows, values in zip(machines, self.rows, self.values, strict=True):
            for suffix, row in rows.items():
                machine.ledger.rows[f"/{command.path}{suffix}"] = replace(row)
            machine.remember(command, values)

    def advance(self, machines: Sequence[PartyMachine], starts: Sequence[int]) -> None:
        """Move the parties' clocks on from where they start, and count what leaves on the way by true rounds."""

        def after(lengths: tuple[int, ...]) -> int:
            return max(length + start for length, start in zip(lengths, starts, strict=True))

        for machine, lengths, departures in zip(machines, self.lengths, self.departures, strict=True):
            machine.ledger.begin()
            for to, departure in departures:
                machine.ledger.depart(to, after(departure))
            machine.clock = after(lengths)


class Lockstep(Backend):
    """All parties in this process, in one thread: ``simulate``, ``plain`` and ``meta``."""

    def __init__(self, kind: str, options: Mapping[str, Any], *, seed: bytes | None = None) -> None:
        super().__init__(certify=bool(options.get("certificate", True)))
        self.protocol = "plain" if kind == "plain" else str(options.get("protocol", "rep3"))
        self.device = "meta" if kind == "meta" else "cpu"
        count = 1 if self.protocol == "plain" else 3
        links = LockstepLink.mesh(count)
        seed = seed or os.urandom(32)
        self._machines = [
            PartyMachine(
                i,
                links[i],
                PairStreams(simulation_keys(seed, i, count), self.device),
                {**options, "protocol": self.protocol},
                device=self.device,
            )
            for i in range(count)
        ]
        self._links = links
        self._repeats: dict[str, _Repeat] = {}

    @property
    def _parties(self) -> int:
        return len(self._machines)

    def _send(
        self, command: Command, attachments: Sequence[Sequence[Tensor]]
    ) -> list[tuple[dict[str, Any], list[Tensor]]]:
        if isinstance(command, Load):
            # A plan reaches real parties as JSON text; what does not survive that must fail here, too.
            command = replace(command, plan=json.loads(json.dumps(command.plan)))
        tasks = [
            Scheduler(link, machine.perform(command, list(own)))
            for link, machine, own in zip(self._links, self._machines, attachments, strict=True)
        ]
        # Here and not in the coroutines: those are interleaved, and would leave the mode on.
        with torch.inference_mode():
            return lockstep(tasks)

    def _call(self, command: Call) -> Sequence[Took]:
        """On shapes, a plan's calls all cost the same: the first is run, the others repeat its rows, and its matrix of
        path lengths moves the clocks on."""
        if self.device != "meta":
            return super()._call(command)
        machines = self._machines
        starts = [clock for machine in machines if isinstance(clock := machine.clock, int)]
        repeat = self._repeats.get(command.name)
        if repeat is None:
            for i, machine in enumerate(machines):
                machine.clock = tuple(0 if j == i else _NEVER for j in range(len(starts)))
            super()._call(command)
            repeat = self._repeats[command.name] = _Repeat.of(machines, command)
        else:
            self._client_bytes += self._parties * _bytes(list(command.publics.values()))
            repeat.book(machines, command)
        repeat.advance(machines, starts)
        return ()

    def close(self) -> None:
        for machine in self._machines:
            machine.close()


class Remote(Backend):
    """Three real parties over mTLS: a cluster file's, or processes of this machine started for the session."""

    _measured = True

    def __init__(
        self, cluster: str | Path | None, keys: str | Path | None, options: Mapping[str, Any]
    ) -> None:
        super().__init__(certify=bool(options.get("certificate", True)))
        self.protocol = str(options.get("protocol", "rep3"))
        self._local: LocalCluster | None = None
        self._open: RemoteSession | None = None
        if cluster is None:
            self._local = LocalCluster(threads=options.get("threads"))
            self._weights_folder = self._local.folder
            self._given = {name: value for name, value in options.items() if name != "threads"}
        else:
            path = Path(cluster)
            self._open = RemoteSession(Cluster.load(path), keys or path.parent, dict(options))

    @property
    def _session(self) -> RemoteSession:
        """The session; with local parties it is opened at the first command, so that they start meanwhile."""
        if self._open is None:
            assert self._local is not None
            self._open = self._local.session(self._given)
        return self._open

    @property
    def _parties(self) -> int:
        return 3

    def _send(
        self, command: Command, attachments: Sequence[Sequence[Tensor]]
    ) -> list[tuple[dict[str, Any], list[Tensor]]]:
        return self._session.send(command, attachments)

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
        if self._local is not None:
            self._local.close()


def open_backend(
    backend: str = "local",
    *,
    protocol: str = "rep3",
    cluster: str | Path | None = None,
    keys: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Backend:
    """A session: ``local`` (three processes over mTLS), ``simulate``, ``plain`` or ``meta`` (shapes alone), or the
    parties of a cluster file.

    Raises:
        JobError: an unknown backend.
        LinkError: the parties cannot be reached.
    """
    given = {"protocol": protocol, **(options or {})}
    if cluster is not None:
        return Remote(cluster, keys, given)
    if backend == "local" and protocol != "plain":
        return Remote(None, None, given)
    if backend in ("simulate", "plain", "meta", "local"):
        return Lockstep("plain" if protocol == "plain" else backend, given)
    raise JobError(f"there is no backend {backend!r}; use local, simulate, plain or meta")
