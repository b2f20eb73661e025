"""A party's machine: a store of named shares, and what each command does to it. Every value has a label that says
whether the client may open it; weights are no values of this store, so that no command can name, replace or open them.

The same class serves real party processes, one-thread simulations, runs on shapes alone, and ``plain``.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import InsecureError, JobError
from sfumato.graph.certificate import Samples, Taken, violations, watched
from sfumato.graph.execute import execute
from sfumato.graph.plan import Plan
from sfumato.link.base import Link
from sfumato.protocol.base import Protocol
from sfumato.protocol.plain import Plain
from sfumato.protocol.rep3 import Rep3
from sfumato.runtime import weights as weight_files
from sfumato.runtime.commands import (
    Affine,
    Call,
    Certify,
    Command,
    Describe,
    Drop,
    Load,
    Put,
    PutIndex,
    Reveal,
    Stats,
    Term,
    WeightSpec,
)
from sfumato.runtime.components import component, index_keys
from sfumato.runtime.handles import Handles, Loaded
from sfumato.runtime.policy import OPEN, Host, Label, check_open
from sfumato.runtime.shared_model import SharedModels
from sfumato.session.drive import Scheduler
from sfumato.session.ledger import Ledger
from sfumato.session.randomness import PairStreams
from sfumato.session.session import Clock, Session
from sfumato.types import Index, Ring, Secret, Shared, SharedIndex

__all__ = ["PartyMachine", "make_machine", "make_protocol"]

_DEFAULT_STALL_S = 300.0
_LARGEST_BYTES = 16 << 30


def make_protocol(options: Mapping[str, Any]) -> Protocol:
    """The protocol that a job's options name: ``{"protocol": "rep3" | "plain", "fused": bool}``; with ``"wraps"`` as in
    `Plain`."""
    name, fused = options.get("protocol", "rep3"), bool(options.get("fused", True))
    if name == "plain":
        return Plain(fused=fused, wraps=bool(options.get("wraps", False)))
    if name != "rep3":
        raise JobError(f"there is no protocol {name!r}; use rep3 or plain")
    return Rep3(fused=fused)


class PartyMachine:
    """One party's store and what it does for a client. Holds shares only as long as the session lives."""

    def __init__(
        self,
        party: int,
        link: Link,
        streams: PairStreams,
        options: Mapping[str, Any],
        *,
        device: str = "cpu",
        host: Host | None = None,
    ) -> None:
        self.protocol = make_protocol(options)
        self.ledger = Ledger()
        self.party = party
        self._link = link
        self._device = device
        self._stall_s = float(options.get("stall_s", _DEFAULT_STALL_S))
        self._largest = int(options.get("largest_bytes", _LARGEST_BYTES))
        self._files = str(options.get("weights_folder", ""))
        self._every = options.get("certificate") == "all"
        self._root = Session(party, link, streams, self.ledger, device=device)
        self._host = host or Host()
        self._models = SharedModels(self._host)
        self._handles = Handles()
        # What runs left for their certificates, with the plan that judges it; no command opens or replaces it.
        self._samples: dict[str, tuple[Plan, Taken, Label]] = {}
        self._reveals = 0
        self._plans: dict[str, Loaded] = {}

    # ---- commands -----------------------------------------------------------------------------------------------

    def handle(self, command: Command, attachments: list[Tensor]) -> tuple[dict[str, Any], list[Tensor]]:
        """Do a command over real links; every wait is bounded.

        Raises:
            JobError: an unknown name or a value of the wrong type.
            LinkError: a peer is gone or silent.
        """
        meter = _Meter(self._link) if isinstance(command, Call | Certify) else None
        with torch.inference_mode():
            fields, tensors = Scheduler(self._link, self.perform(command, attachments)).run(self._stall_s)
        if meter is not None:
            self._link.settle(self._stall_s)
            fields = {**fields, "took": meter.stop()}
        return fields, tensors

    async def perform(
        self, command: Command, attachments: list[Tensor]
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """The command as a coroutine for any driver: (reply fields, reply tensors)."""
        reply: tuple[dict[str, Any], list[Tensor]] = ({}, [])
        self.ledger.begin()
        match command:
            case Load():
                self._plans[command.name] = self._loaded(command, attachments)
            case Describe():
                reply = self._models.describe(command.model)
            case Put():
                spec = WeightSpec(command.handle, command.ring, command.frac, command.shape)
                self._handles.keep(command.handle, self._received(spec, attachments), OPEN)
            case PutIndex():
                self._handles.keep(command.handle, self._received_index(command, attachments), OPEN)
            case Call():
                await self._call(command)
            case Certify():
                reply = await self._certify(command)
            case Affine():
                label = _joined(self._handles.label(term.handle) for term in command.terms)
                self._handles.keep(command.handle, await self._affine(command), label)
            case Reveal():
                x = self._handles.value(command.handle)
                check_open(self._handles.label(command.handle), repr(command.handle))
                self._reveals += 1
                session = self._root.fork(f"reveal{self._reveals}")
                reply = ({"ring": str(x.ring), "frac": x.frac}, [self.protocol.summand(session, x)])
            case Drop():
                if self._samples.pop(command.handle, None) is None:
                    self._handles.drop(command.handle)
            case Stats():
                reply = (self._stats(), [])
            case _:
                raise JobError(f"a machine does not know the command {type(command).__name__}")
        return reply

    @property
    def clock(self) -> Clock:
        """Rounds so far at this party; a run on shapes sets it to learn how a call moves it on."""
        return self._root.clock

    @clock.setter
    def clock(self, now: Clock) -> None:
        self._root.clock = now

    def known(self, command: Call) -> tuple[list[Shared], Taken | None]:
        """What a call made: its outputs, and its samples if it left any."""
        left = None if command.samples is None else self._samples[command.samples][1]
        return [self._handles.value(handle) for handle in command.outputs], left

    def remember(self, command: Call, made: tuple[Sequence[Shared], Taken | None]) -> None:
        """Keep what :meth:`known` gave of another call as if this one had run: for runs on shapes."""
        loaded = self._plans[command.name]
        results, judged = loaded.outcome(map(self._handles.label, command.inputs.values()))
        for handle, value in zip(command.outputs, made[0], strict=True):
            self._handles.keep(handle, value, results)
        if command.samples is not None and made[1] is not None:
            self._samples[command.samples] = (loaded.plan, made[1], judged)

    def close(self) -> None:
        """Forget every share and plan."""
        self._handles.clear()
        self._samples.clear()
        self._plans.clear()
        self._models.close()

    # ---- what they do -------------------------------------------------------------------------------------------

    def _loaded(self, command: Load, attachments: list[Tensor]) -> Loaded:
        if command.weights.form == "model":
            return self._models.load(command.plan)
        self._host.check_own_plan()
        document = dict(command.plan)
        stored = document.pop("weights_file", None)
        plan = Plan.from_json(document)
        held: Mapping[str, Tensor] = {}
        form, items = command.weights.form, command.weights.items
        if form == "public":
            if len(items) != len(attachments):
                raise JobError(f"{len(items)} weights are named and {len(attachments)} came")
            held = {item.name: tensor for item, tensor in zip(items, attachments, strict=True)}
        else:
            held = weight_files.opened(Path(self._files), str(stored), [item.name for item in items])
        return Loaded(plan, held)

    @property
    def _parts_per_value(self) -> int:
        return 2 if self.protocol.parties == 3 else 1

    def _received(self, spec: WeightSpec, attachments: list[Tensor]) -> Shared:
        """The client's share of a value: two components, each as words or as a 32-byte seed of them."""
        type = Secret(Ring.named(spec.ring), spec.frac, spec.shape)
        if type.numel * type.ring.bits // 8 > self._largest:
            raise JobError(
                f"the value {spec.name} is larger than a party takes at once ({self._largest} bytes)"
            )
        if len(attachments) != self._parts_per_value:
            raise JobError(
                f"a share of {spec.name} comes as {self._parts_per_value} tensors, not {len(attachments)}"
            )
        if self._device == "meta":
            blank = torch.empty(type.shape, dtype=type.ring.dtype, device="meta")
            return Shared(type, (blank,) * self._parts_per_value)
        return Shared(type, tuple(component(type, spec.name, tensor) for tensor in attachments))

    def _received_index(self, command: PutIndex, attachments: list[Tensor]) -> SharedIndex:
        """The client's row numbers as this party's keys; in ``plain`` the numbers themselves."""
        ring = Ring.named(command.ring)
        if ring.kind != "Z":
            raise JobError("row numbers are shared in Z64 or Z32")
        type = Index(ring, command.rows, command.shape)
        if type.rows * ring.bits // 8 > self._largest:
            raise JobError(
                f"the table of {command.handle} has more rows than a party takes at once ({self._largest} bytes)"
            )
        if len(attachments) != 1:
            raise JobError(f"keys of {command.handle} come as one tensor, not {len(attachments)}")
        if self.protocol.parties == 1:
            return SharedIndex(type, (attachments[0],))
        return SharedIndex(type, index_keys(type, command.handle, command.form, attachments[0]))

    async def _call(self, command: Call) -> None:
        if command.name not in self._plans:
            raise JobError(f"there is no plan {command.name!r} here; load it first")
        loaded = self._plans[command.name]
        plan = loaded.plan
        loaded.check(command.inputs, command.publics)
        results, judged = loaded.outcome(map(self._handles.label, command.inputs.values()))
        secrets = {
            argument: self._argument(plan, argument, name) for argument, name in command.inputs.items()
        }
        session = self._root.fork(command.path)
        samples = None
        if command.samples is not None:
            if not watched(plan):
                raise JobError(f"nothing of the plan {command.name!r} is watched; it leaves no samples")
            samples = Samples(self.protocol, plan, session.path, every=self._every)
        outputs = await execute(
            self.protocol, session, plan, secrets, command.publics, loaded.held, samples=samples
        )
        if len(outputs) != len(command.outputs):
            raise JobError(
                f"the plan {command.name!r} has {len(outputs)} outputs, {len(command.outputs)} were named"
            )
        if samples is not None and command.samples is not None:
            if command.samples in self._samples:
                raise JobError(f"the run {command.path!r} has left samples before")
            self._samples[command.samples] = (plan, samples.taken(), judged)
        for handle, output in zip(command.outputs, outputs, strict=True):
            self._handles.keep(handle, output, results)

    async def _certify(self, command: Certify) -> tuple[dict[str, Any], list[Tensor]]:
        """The client's summand of the violations of these runs; their samples are forgotten."""
        runs = []
        every = [handle for _, handles in command.runs for handle in handles]
        if not every or len(set(every)) != len(every) or any(handle not in self._samples for handle in every):
            raise JobError("a certificate needs samples of at least one run, each once, that wait here")
        for name, handles in command.runs:
            known = [self._samples[handle] for handle in handles]
            if name not in self._plans or any(plan is not self._plans[name].plan for plan, _, _ in known):
                raise JobError(f"these runs are not of the plan {name!r} that is loaded here")
            check_open(_joined(label for _, _, label in known), f"the certificate of {name!r}")
            runs.append((self._plans[name].plan, [taken for _, taken, _ in known]))
        session = self._root.fork(command.path).fork("certificate", row=True)
        found = await violations(self.protocol, session, runs)
        for handle in every:
            del self._samples[handle]
        summand = self.protocol.summand(session.fork("reveal"), found)
        return {"ring": str(found.ring), "frac": found.frac}, [summand]

    def _argument(self, plan: Plan, argument: str, handle: str) -> Shared | SharedIndex:
        if argument not in plan.program.types:
            raise JobError(f"the plan has no input {argument!r}")
        index = plan.index_type(argument)
        if index is not None:
            at = self._handles.index(handle)
            if at.type != index:
                raise JobError(f"the value {handle!r} holds {at.type}, the input {argument} takes {index}")
            return at
        x = self._handles.value(handle)
        expected = plan.secret_type(argument)
        if x.shape != expected.shape or x.ring != expected.ring or x.frac not in (0, expected.frac):
            hint = (
                "; plans that hand values on take one ring, such as ring='Z64'" if plan.options.mixed else ""
            )
            raise JobError(f"the value {handle!r} is {x.type}, the input {argument} is {expected}{hint}")
        return x

    async def _affine(self, command: Affine) -> Shared:
        p = self.protocol
        if not command.terms:
            raise JobError("an affine command needs at least one term")
        xs = [self._sliced(term) for term in command.terms]
        coefficients = [_signed(term.coefficient) for term in command.terms]

        def combine(*parts: Tensor) -> Tensor:
            total = parts[0] * coefficients[0]
            for part, c in zip(parts[1:], coefficients[1:], strict=True):
                total = total + part * c
            return total

        frac = xs[0].frac
        if any(x.frac != frac for x in xs):
            raise JobError("the terms of an affine command have different scales")
        session = self._root.fork(command.path, row=True)
        total = p.linear(combine, *xs, frac=frac + command.frac_bits)
        if command.constant is not None:
            total = p.add_public(session, total, command.constant)
        return (
            total
            if command.frac_bits == 0
            else await p.truncate(session.fork("close"), total, command.frac_bits)
        )

    def _sliced(self, term: Term) -> Shared:
        x = self._handles.value(term.handle)
        if term.start is None:
            return x
        return self.protocol.linear(lambda part: part[term.start : term.stop], x)

    def _stats(self) -> dict[str, Any]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        stats: dict[str, Any] = {
            "rounds": self.clock,
            "sends": self.ledger.sends,
            "rows": {path: [row.bytes_sent, row.messages] for path, row in self.ledger.rows.items()},
            "peak_memory": _peak_memory(),
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "threads": threading.active_count(),
        }
        if (sent := self._link.wire_bytes()) >= 0:
            stats["kernel_bytes"] = sent
        return stats


def _joined(labels: Iterable[Label]) -> Label:
    return OPEN.union(*labels)


class _Meter:
    """What this process spends between two moments: wall and CPU seconds, and bytes on the wire to its peers."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._start = self._now()

    def _now(self) -> tuple[float, float, int]:
        return time.perf_counter(), time.process_time(), self._link.wire_bytes()

    def stop(self) -> dict[str, Any]:
        wall, cpu, sent = (b - a for a, b in zip(self._start, self._now(), strict=True))
        return {"wall_s": wall, "cpu_s": cpu, "kernel_bytes": int(sent)}


def _peak_memory() -> int:
    """Bytes that were resident at most. On Linux ru_maxrss begins with the size of the parent that forked."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def make_machine(
    party: int, link: Link, pair_keys: dict[int, bytes], options: dict[str, Any]
) -> PartyMachine:
    """What a party process runs for one session. The operator says how long it waits for a peer, and with
    ``options["host"]`` (see `Host.of`; never the client's word) which models there are and whose plans run.

    Raises:
        InsecureError: the client asks for a protocol without secrecy.
    """
    if options.get("protocol", "rep3") == "plain":
        raise InsecureError(
            "real parties do not run plain, which has no secrecy; use backend='plain' at the client"
        )
    limits = getattr(link, "limits", None)
    stall_s = _DEFAULT_STALL_S if limits is None else limits.stall_s
    host = Host.of(party, options.get("host"))
    return PartyMachine(party, link, PairStreams(pair_keys), {**options, "stall_s": stall_s}, host=host)
