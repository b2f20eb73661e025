"""Everything that reads bytes from elsewhere, as functions of one byte string: each must end, and with nothing but an
error of ours. Driven by hypothesis in the test suite, and by atheris in `run.py` for millions of inputs."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import doors
import torch
from inputs import as_json, changed, changed_fields, refusing

from sfumato.graph.capture import capture
from sfumato.graph.plan import Plan, load_side
from sfumato.graph.planning import make_plan
from sfumato.link.base import Frame, tag_of
from sfumato.link.channel import Channel
from sfumato.link.frames import (
    DTYPE_CODES,
    HEADER_BYTES,
    Kind,
    abort_payload,
    pack_header,
    parse_abort,
    parse_header,
)
from sfumato.link.memory import memory_links
from sfumato.link.tls import LinkLimits
from sfumato.ring import dpf
from sfumato.runtime import handshake
from sfumato.runtime.cluster import Cluster, Member
from sfumato.runtime.commands import (
    Affine,
    Call,
    Certify,
    Command,
    Drop,
    Load,
    Put,
    PutIndex,
    Reveal,
    Stats,
    Term,
    WeightSpec,
    WeightsSpec,
    digest,
    from_message,
    to_message,
)
from sfumato.runtime.machine import PartyMachine
from sfumato.runtime.wire import Parts, pack_message, read_message
from sfumato.session.drive import LockstepLink, Scheduler, lockstep, simulation_keys
from sfumato.session.randomness import PairStreams
from sfumato.types import Z64

__all__ = ["TARGETS", "seeds"]

Machines = list[tuple[PartyMachine, LockstepLink]]

#: No input may make a reader hold more than this: messages are bounded before memory is taken.
_BOUND = 1 << 20


# ---- the byte stream -----------------------------------------------------------------------------------------


class _Bytes:
    """A socket that holds the input and ends."""

    def __init__(self, data: bytes) -> None:
        self._stream = io.BytesIO(data)

    def recv_into(self, view: memoryview) -> int:
        return self._stream.readinto(view[: 1 + len(view) // 2])

    def setblocking(self, flag: bool) -> None:
        pass

    def fileno(self) -> int:
        return -1


class _Owner:
    """Takes a channel's frames and its end."""

    limits = LinkLimits(max_frame_bytes=_BOUND)
    waits = 0

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.problems: list[Exception] = []

    def deliver(self, channel: Channel, frame: Frame) -> None:
        self.frames.append(frame)

    def failed(self, channel: Channel, problem: Exception, left: bool) -> None:
        self.problems.append(problem)


def stream(data: bytes) -> None:
    """A whole connection's bytes through the channel's parser."""
    owner = _Owner()
    channel = Channel(owner, 1, _Bytes(data))  # type: ignore[arg-type]
    while not channel.done:
        channel.advance()
    assert owner.problems, "a connection that ended gives its reason"
    assert not any("internal" in str(problem) for problem in owner.problems), str(owner.problems[0])
    assert sum(frame.nbytes for frame in owner.frames) <= len(data)


def header(data: bytes) -> None:
    """A frame header, and an abort's payload."""
    parse_abort(data)
    with refusing():
        found = parse_header(data.ljust(HEADER_BYTES, b"\0"), _BOUND)
        assert found.length <= _BOUND


def message(data: bytes) -> None:
    """A message put together from frames that the input cuts."""
    rest = memoryview(data)

    def frame() -> Frame:
        nonlocal rest
        if len(rest) < 3:
            raise EOFError
        code, length = rest[0], int.from_bytes(rest[1:3], "little")
        payload, rest = bytearray(rest[3 : 3 + length]), rest[3 + length :]
        return Frame(b"\0" * 8, code, 0, payload)

    try:
        with refusing():
            fields, tensors = read_message(frame, _BOUND)
            command(json.dumps(fields).encode(), tensors)
    except EOFError:
        pass


# ---- what messages say ---------------------------------------------------------------------------------------


def command(data: bytes, tensors: list[torch.Tensor] | None = None) -> None:
    """A command's header: read, written again, hashed, and done by a party's machine."""
    fields = as_json(data)
    if not isinstance(fields, dict):
        return
    with refusing():
        _done(_machines(), fields, [torch.zeros(2, 2, dtype=torch.int64)] if tensors is None else tensors)


def _done(machines: Machines, fields: dict[str, Any], tensors: list[torch.Tensor]) -> None:
    """A message's command at three machines, as their parties would do it."""
    found, attachments = from_message(fields, tensors)
    again, _ = from_message(*to_message(found, attachments))
    assert digest(again, attachments) == digest(found, attachments)
    tasks = [Scheduler(link, machine.perform(found, list(attachments))) for machine, link in machines]
    with torch.inference_mode():
        lockstep(tasks)


#: What running a plan that does not fit itself may raise.
_MISFITS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)


def session(data: bytes) -> None:
    """A whole session of real commands, some of them changed by the input; an error ends it, as it does for parties.

    A plan that reads well may still name methods that do not fit its calls. Who runs such a plan of its own is told
    *internal error in party 1 (KeyError)* and has lost its session, so that counts as refused here, and only then.
    """
    choices, machines = iter(data), _machines()
    own: tuple[type[Exception], ...] = ()
    with refusing():
        for known, tensors in _story():
            fields, sent = to_message(known, tensors)
            if next(choices, 1) % 4 == 0:
                fields = changed(fields, choices)
                own = _MISFITS if isinstance(known, Load) else own
            fields = as_json(json.dumps(fields).encode())
            if fields is None:
                continue
            try:
                _done(machines, fields, sent)
            except own:
                if isinstance(known, Load):
                    raise
                return


def _machines() -> Machines:
    seed = b"\1" * 32
    return [
        (PartyMachine(i, link, PairStreams(simulation_keys(seed, i, 3)), {"largest_bytes": _BOUND}), link)
        for i, link in enumerate(LockstepLink.mesh(3))
    ]


def plan(data: bytes) -> None:
    """The JSON of a plan, as a client sends it."""
    fields = as_json(data)
    if isinstance(fields, dict):
        with refusing():
            Plan.from_json(fields)


def command_fields(data: bytes) -> None:
    """A real command with fields that the input changes."""
    choices = iter(data)
    known = _commands()
    fields = to_message(known[next(choices, 0) % len(known)], [torch.arange(4)])[0]
    fields = changed_fields(fields, choices)
    if isinstance(fields, dict):
        command(json.dumps(fields).encode())


def plan_fields(data: bytes) -> None:
    """A real plan with fields that the input changes."""
    choices = iter(data)
    fields = json.loads(json.dumps(_plan().for_parties()))
    fields = changed_fields(fields, choices)
    plan(json.dumps(fields).encode())


def terms(data: bytes) -> None:
    """A peer's side of the key agreement."""
    ours, theirs = memory_links(2)
    theirs.send(0, Frame(tag_of("control/handshake"), DTYPE_CODES["uint8"], 0, bytearray(data)))
    theirs.flush()
    with refusing():
        handshake.agree(ours, [1], "0" * 32, {"protocol version": "1"}, 0.05)


# ---- files of operators --------------------------------------------------------------------------------------


def cluster_file(data: bytes) -> None:
    """A cluster file's text."""
    with refusing(1 << 20):
        Cluster.parse(data.decode("utf-8", "replace"))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "stream": stream, "header": header, "message": message, "command": command, "plan": plan, "terms": terms,
    "command_fields": command_fields, "plan_fields": plan_fields, "session": session, "cluster_file": cluster_file,
    **doors.TARGETS,
}  # fmt: skip


# ---- where to begin ------------------------------------------------------------------------------------------


@cache
def seeds(target: str) -> tuple[bytes, ...]:
    """Inputs that the real writers make, so that a search starts behind the first checks."""
    found: list[bytes] = [b"", b"{}", b"\0" * 64, *doors.SEEDS.get(target, ())]
    header_of = [pack_header(kind, 0, b"\0" * 8, 0, 0) for kind in (Kind.DATA, Kind.HELLO, Kind.BYE)]
    abort = abort_payload("a reason", "LinkError", 1)
    if target == "header":
        found += [*header_of, abort]
    elif target == "stream":
        data = pack_header(Kind.DATA, 4, b"\1" * 8, 3, 16) + bytes(16)
        found += [
            data * 3 + header_of[2],
            data + pack_header(Kind.ABORT, 0, b"\0" * 8, 0, len(abort)) + abort,
        ]
    elif target == "message":
        found += [_cut(pack_message(*to_message(c, [torch.arange(4)]))) for c in _commands()]
    elif target == "command":
        found += [json.dumps(to_message(c, [torch.arange(4)])[0]).encode() for c in _commands()]
        found.append(
            re.sub(rb"\d+\.\d+", b"1e999", found[-1])
        )  # a number that no JSON can be written with again
    elif target == "plan":
        found.append(json.dumps(_plan().for_parties()).encode())
    elif target == "terms":
        found.append(json.dumps({"terms": {"protocol version": "1"}, "nonce": "00" * 32}).encode())
    elif target == "cluster_file":
        members = [Member(name=f"p{i}", host="127.0.0.1", port=8440 + i) for i in range(3)]
        found.append(Cluster(parties=(members[0], members[1], members[2])).to_toml().encode())
    return tuple(found)


def _cut(parts: Parts) -> bytes:
    """A message as the target ``message`` reads it."""
    return b"".join(
        bytes([code]) + len(payload).to_bytes(2, "little") + bytes(payload) for code, payload in parts
    )


def _commands() -> list[Command]:
    return [
        Put("x", "Z64", 18, (4,)), PutIndex("ids", "Z64", 9, (2,), dpf.ALGORITHM),
        Call("model", "call0", {"x": "x"}, {}, ("y",), "y:samples"),
        Affine("y", (Term("x", 1 << 24, 0, 2),), 24, "affine0"), Certify("ranges0", (("model", ("y:samples",)),)),
        Reveal("x"), Drop("x"), Stats(), Load("model", _plan().for_parties(), WeightsSpec("public", ())),
    ]  # fmt: skip


def _story() -> list[tuple[Command, list[torch.Tensor]]]:
    """Load, put, call, certify, open, drop: what a client does, with each command's tensors."""
    plan, x = _plan(), [torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64)]
    keys = torch.zeros((2, 2, dpf.key_bytes(9, Z64)), dtype=torch.uint8)
    weights = load_side(plan).publics
    document = json.loads(json.dumps(plan.for_parties()))
    items = tuple(WeightSpec(n, "Z64", 0, tuple(t.shape)) for n, t in weights.items())
    inputs, outputs = (
        dict.fromkeys(plan.client_inputs, "x"),
        tuple(f"y{i}" for i in range(len(plan.secret_outputs))),
    )
    return [
        (Load("model", document, WeightsSpec("public", items)), list(weights.values())),
        (Put("x", "Z64", 18, (2, 4)), x), (PutIndex("ids", "Z64", 9, (2,), dpf.ALGORITHM), [keys]),
        (Call("model", "call0", inputs, {}, outputs, "y:samples"), []),
        (Affine("z", (Term("y0", 1 << 24, 0, 1), Term("x", 5, 0, 1)), 24, "affine0"), []),
        (Certify("ranges0", (("model", ("y:samples",)),)), []), (Reveal("z"), []), (Drop("x"), []), (Stats(), []),
    ]  # fmt: skip


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A layer of each kind."""
        return self.norm(torch.nn.functional.silu(self.first(x))).softmax(-1).relu()


@cache
def _plan() -> Plan:
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    return make_plan(capture(_Net().eval(), (x,)), calibration=[((x,), {})])
