"""What a client drives: commands on handles, the same calls for real parties, simulation, plain words and shapes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from sfumato.errors import JobError, RangeError
from sfumato.graph.certificate import failed, sample_count, watched
from sfumato.graph.plan import Plan, load_side
from sfumato.protocol.rep3 import Rep3
from sfumato.ring import dpf
from sfumato.ring.fixed import decode, encode, encode_scalar
from sfumato.runtime import commands, weights
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
    WeightSpec,
    WeightsSpec,
)
from sfumato.runtime.components import split, split_index
from sfumato.runtime.lineage import Lineage
from sfumato.runtime.report import CostReport, Took, merged_rows
from sfumato.runtime.shared_model import Description, read_description
from sfumato.types import Z64, Index, Ring

__all__ = ["Backend", "Term", "tensor_bytes"]

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

    def __init__(self, *, certificate: bool | str = True) -> None:
        self._client_bytes = 0
        self._setup_bytes = 0
        self._secret_weights: dict[str, dict[str, str]] = {}
        self._weight_handles: dict[tuple[str, ...], str] = {}  # by name, content, ring and fraction bits
        self._weights = 0
        self._plans: dict[str, Plan] = {}
        if certificate not in (True, False, "all"):
            raise JobError(f"certificate must be True, False or 'all', not {certificate!r}")
        self._certify, self._every = bool(certificate), certificate == "all"
        self._lineage = Lineage()
        self._certificates = 0
        self._started = time.monotonic()

    # ---- the calls ----------------------------------------------------------------------------------------------

    def load(self, name: str, plan: Plan) -> None:
        """Give the parties a plan and its weights: public words to all, or shares of secret ones. A secret weight that
        plans have in common, under one name, is shared once.

        Runs of another plan of this name are judged by that one first.
        """
        self._begin(name, plan)
        values = load_side(plan)
        public = {n: t.contiguous() for n, t in values.publics.items()}
        items = tuple(WeightSpec(n, str(Z64), 0, tuple(t.shape)) for n, t in public.items())
        document = plan.for_parties()
        folder = self._weights_folder
        if folder is not None and tensor_bytes(list(public.values())) > _LARGE_WEIGHTS:
            document["weights_file"] = weights.stored(folder, public)
            self._command(Load(name, document, WeightsSpec("stored", items)), setup=True)
        else:
            attached = [list(public.values())] * self._parties
            self._command(Load(name, document, WeightsSpec("public", items)), attached, setup=True)
        self._share_weights(name, plan, values.secrets)

    def _share_weights(self, name: str, plan: Plan, secrets: Mapping[str, Tensor]) -> None:
        before, mine = self._secret_weights.pop(name, {}), dict[str, str]()
        for weight, tensor in secrets.items():
            type = plan.secret_type(weight)
            # By its name, too: that two weights of one model are equal is nobody's business.
            key = (weight, *map(str, weights.weight_key(tensor, type)))
            handle = self._weight_handles.get(key)
            if handle is None:
                self._weights += 1
                handle = self._weight_handles[key] = f"{name}:{weight}#{self._weights}"
                self.put(handle, tensor, type.frac, type.ring, setup=True)
            mine[weight] = handle
        self._secret_weights[name] = mine
        used = {handle for known in self._secret_weights.values() for handle in known.values()}
        gone = set(before.values()) - used
        self._weight_handles = {key: h for key, h in self._weight_handles.items() if h not in gone}
        self.drop(*sorted(gone))

    def describe(self, model: str) -> Description:
        """What the owner of a shared model offers, the same at all three parties.

        Raises:
            JobError: there is no such model for this client, the parties differ, or these are no parties of a cluster.
        """
        return read_description(self._command(Describe(model), setup=True))

    def load_shared(self, name: str, description: Description, digest: str) -> None:
        """Like :meth:`load`, of a plan that the owner approved, with the weights that the parties keep.

        Raises:
            JobError: the parties hold another share of the model by now, or their files are damaged.
        """
        self._begin(name, description.plans[digest])
        named = {"model": description.name, "share": description.share_id, "plan": digest}
        self._command(Load(name, named, WeightsSpec("model")), setup=True)
        self._secret_weights[name] = {}

    def _begin(self, name: str, plan: Plan) -> None:
        """Runs of another plan of this name are judged by that one, before ``plan`` takes it."""
        before = self._lineage.waiting().get(name)
        if before:
            self._judge({name: before})
        self._plans[name] = plan

    def put(
        self, handle: str, values: Tensor, frac: int = 18, ring: Ring = Z64, *, setup: bool = False
    ) -> None:
        """Share the client's reals: each party gets two of three components, seeds instead of words where possible."""
        command = Put(handle, str(ring), frac, tuple(values.shape))
        self._command(command, self._split(values, ring, frac), setup=setup)
        self._release(self._lineage.derive([handle], []))

    def put_index(self, handle: str, numbers: Tensor, type: Index) -> None:
        """Share the client's row numbers: each party gets its keys of point functions, a few hundred bytes a number.

        Raises:
            RangeError: a number is no row of the table.
        """
        command = PutIndex(handle, str(type.ring), type.rows, type.shape, dpf.ALGORITHM)
        given = numbers.to(device=self.device, dtype=torch.int64)
        self._command(command, [[given]] if self._parties == 1 else split_index(given, type))
        self._release(self._lineage.derive([handle], []))

    def put_input(self, handle: str, plan: Plan, name: str, values: Tensor) -> None:
        """Share what :func:`client_side` gives for the input ``name`` of a plan, as the plan takes it."""
        index = plan.index_type(name)
        if index is not None:
            self.put_index(handle, values, index)
        else:
            type = plan.secret_type(name)
            self.put(handle, values, type.frac, type.ring)

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
        count = sum(sample_count(self._plans[plan]) * len(runs) for plan, runs in waiting.items())
        if count > (0 if self._every else _MOST_SAMPLES):
            self._judge(waiting)

    def _call(self, command: Call) -> Sequence[Took]:
        return _took(self._command(command))

    def affine(
        self,
        handle: str,
        terms: Sequence[Term],
        path: str,
        frac: int = 18,
        *,
        constant: Tensor | None = None,
    ) -> None:
        """Public combination of handles, of ``frac`` fraction bits, plus public reals, with one truncation (none when
        all coefficients are whole). ``constant`` travels to each party in clear; between them it costs nothing."""
        whole = all(float(t.coefficient).is_integer() for t in terms)
        bits = 0 if whole else COEFFICIENT_FRAC
        words = tuple(
            commands.Term(t.handle, encode_scalar(t.coefficient, bits), t.start, t.stop) for t in terms
        )
        added = None if constant is None else encode(constant.to(self.device), Z64, frac + bits)
        self._command(Affine(handle, words, bits, path, added))
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
            outside = failed(plan, own, len(paths), every=self._every)
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
        size = sum(tensor_bytes(tensors) for tensors in given) + sum(
            tensor_bytes(tensors) for _, tensors in replies
        )
        if isinstance(command, Call):
            size += self._parties * tensor_bytes(list(command.publics.values()))
        if isinstance(command, Affine) and command.constant is not None:
            size += self._parties * tensor_bytes([command.constant])
        if setup:
            self._setup_bytes += size
        elif count:
            self._client_bytes += size
        return replies

    def _split(self, values: Tensor, ring: Ring, frac: int) -> list[list[Tensor]]:
        """Attachments per party: seeds and words of its components."""
        meta = self.device == "meta"
        words = encode(values.to("meta") if meta else values, ring, frac)
        if self._parties == 1:
            return [[words]]
        return split(words, ring)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of their elements, as they travel."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _samples_of(run: str) -> str:
    """The handle of a run's samples."""
    return f"{run}:samples"


def _took(replies: Sequence[tuple[dict[str, Any], list[Tensor]]]) -> tuple[Took, ...]:
    """What the parties say they spent; empty where they do not."""
    return tuple(Took(**reply["took"]) for reply, _ in replies if "took" in reply)
