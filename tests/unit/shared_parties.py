"""Three parties in one process with stores on disk: what the tests of shared models stand on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sfumato as sf
from sfumato.graph.plan import Plan
from sfumato.link.base import CLIENT
from sfumato.link.memory import MemoryLink, memory_links
from sfumato.runtime.cluster import Limits
from sfumato.runtime.commands import Command, digest, from_message, to_message
from sfumato.runtime.lockstep import Lockstep
from sfumato.runtime.machine import PartyMachine
from sfumato.runtime.policy import Host
from sfumato.runtime.sharing import ModelToShare, receive_model, send_model
from sfumato.runtime.store import ModelStore
from sfumato.runtime.wire import MessageStream
from sfumato.session.drive import simulation_keys
from sfumato.session.randomness import PairStreams

OWNER, OTHER_OWNER = "sfumato://owner/owner", "sfumato://owner/other"
CLIENT_A, CLIENT_B = "sfumato://client/a", "sfumato://client/b"
LIMITS = Limits(stall_s=20.0, connect_s=5.0)


def owner_links() -> tuple[list[Any], list[MemoryLink]]:
    """(the owner's three links, each party's link to the owner); ends are numbered as on real links."""
    mine, theirs = [], []
    for party in range(3):
        links = memory_links(CLIENT + 1)
        mine.append(links[CLIENT])
        theirs.append(links[party])
    return mine, theirs


def stores(folder: Path, keys: Sequence[bytes] = ()) -> list[ModelStore]:
    """A store and a key for each party."""
    made = []
    for party in range(3):
        home = folder / f"party{party}"
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (home / "storage.key").exists():
            (home / "storage.key").write_bytes(keys[party] if keys else os.urandom(32))
        made.append(ModelStore(home / "store", home / "storage.key", party))
    return made


def share(
    at: Sequence[ModelStore],
    model: ModelToShare,
    owner: str = OWNER,
    *,
    meddle: Callable[[int, Any], Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Share a model as ``owner`` with three parties in threads; the share id, or the owner's error.

    ``meddle(party, stream)`` may put another stream in a party's place.
    """
    mine, theirs = owner_links()

    def party(index: int) -> str:
        link = theirs[index]
        try:
            stream: Any = MessageStream(link, CLIENT, LIMITS.max_message_bytes, LIMITS.max_frame_bytes)
            stream = meddle(index, stream) if meddle is not None else stream
            name = receive_model(stream, at[index], owner, idle_s=LIMITS.stall_s, stall_s=LIMITS.stall_s)
            link.close()
            return name
        except BaseException as error:
            link.abort(str(error), kind=type(error).__name__, origin=index)
            raise

    with ThreadPoolExecutor(3) as pool:
        parties = [pool.submit(party, index) for index in range(3)]
        try:
            share_id = send_model(mine, model, LIMITS, progress)
        finally:
            for link in mine:
                link.close()
            for call in parties:
                call.exception()
    assert [call.result() for call in parties] == [model.name] * 3
    return share_id


class Parties(Lockstep):
    """A client's session with three parties that have stores, in one thread; commands go over their wire form."""

    def __init__(
        self,
        at: Sequence[ModelStore],
        client: str = CLIENT_A,
        *,
        programs: Any = "any",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__("simulate", options or {})
        seed = os.urandom(32)
        self._machines = [
            PartyMachine(
                i,
                self._links[i],
                PairStreams(simulation_keys(seed, i, 3)),
                {**(options or {}), "protocol": "rep3"},
                host=Host(at[i], client, programs),
            )
            for i in range(3)
        ]

    def _send(self, command: Command, attachments: Sequence[Sequence[Tensor]]) -> Any:
        arrived = [from_message(*to_message(command, own)) for own in attachments]
        assert len({digest(*message) for message in arrived}) == 1
        return super()._send(arrived[0][0], [own for _, own in arrived])


# ---- models -------------------------------------------------------------------------------------------------------


class Timed(nn.Module):
    """A secret input and a public time whose embedding comes from weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.time = nn.Linear(1, 8)
        self.register_buffer("rate", torch.linspace(0.5, 1.5, 8), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        moved: Tensor = torch.tanh(self.inner(x) + self.time(t.reshape(1, 1))) * self.rate
        return moved


def batch(seed: int = 3) -> Tensor:
    return 0.5 * torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))


def chain(seed: int) -> nn.Module:
    made = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).eval()
    drawn = torch.Generator().manual_seed(
        seed
    )  # not the process's generator: tests make chains in several threads
    with torch.no_grad():
        for weight in made.parameters():
            weight.uniform_(-(8**-0.5), 8**-0.5, generator=drawn)
    return made


def planned(module: nn.Module, secret: str = "inputs+weights", *args: Tensor) -> Plan:
    given = args or (batch(),)
    return sf.make_plan(sf.capture(module, given), secret=secret)


def timed(secret: str) -> Plan:
    torch.manual_seed(7)
    return planned(Timed().eval(), secret, batch(), torch.tensor(0.5))


def a_model(name: str = "house", **changes: Any) -> ModelToShare:
    """Two secret parts that fit each other, the second's results open, and a part with public weights."""
    first, last, known = planned(chain(1)), planned(chain(2)), timed("inputs")
    parts = {"first": first.digest(), "last": last.digest(), "known": known.digest()}
    if first.digest() == last.digest():  # plans of equal shape differ in their calibrated ranges
        raise AssertionError("the two parts have one digest")
    given: dict[str, Any] = {
        "name": name,
        "plans": {plan.digest(): plan for plan in (first, last, known)},
        "offers": [{"settings": {"steps": 2}, "parts": parts, "reveal": ["last", "known"]}],
        "files": {"tokenizer/vocab.json": json.dumps({"a": 1}).encode(), "readme.txt": b"hello"},
    }
    return ModelToShare(**{**given, **changes})


def part_of(model: Any, name: str) -> str:
    return str(model.offers[0]["parts"][name])
