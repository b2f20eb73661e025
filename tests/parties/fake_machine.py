"""A machine for tests of the party server: real exchanges over the link, no protocol."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import RangeError
from sfumato.link.base import Frame, Link, tag_of
from sfumato.runtime.commands import Call, Command, Put, Reveal
from sfumato.runtime.wire import tensor_bytes

MACHINE = "fake_machine:make"


class FakeMachine:
    def __init__(self, party: int, link: Link, keys: dict[int, bytes], options: dict[str, Any]) -> None:
        self.party, self.link, self.keys, self.options = party, link, keys, options
        self.store: dict[str, Tensor] = {}

    def handle(self, command: Command, attachments: list[Tensor]) -> tuple[dict[str, Any], list[Tensor]]:
        match command:
            case Put():
                self.store[command.handle] = attachments[0]
                return {"handles": sorted(self.store)}, []
            case Reveal():
                return {"party": self.party}, [self.store[command.handle]]
            case Call():
                self.misbehave(command.name)
                value = self.store[command.inputs["x"]]
                for number in range(int(command.publics["rounds"])):
                    value = self.exchange(f"{command.path}#{number}", value)
                self.store[command.outputs[0]] = value
                check = {str(peer): key.hex() for peer, key in self.keys.items()}
                return {"keys": check, "options": self.options}, []
        return {}, []

    def misbehave(self, name: str) -> None:
        """``value-error/1``: party 1 does it, the others go on."""
        kind, _, who = name.partition("/")
        if who and int(who) != self.party:
            return
        if kind == "value-error":
            raise ValueError("the secret is marmalade")
        if kind == "range-error":
            raise RangeError("layer mid.attn left its range")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)

    def exchange(self, path: str, value: Tensor) -> Tensor:
        """Send to the next party, add what came from the one before."""
        tag, after, before = tag_of(path), (self.party + 1) % 3, (self.party + 2) % 3
        self.link.send(after, Frame(tag, 4, 0, tensor_bytes(value)))
        self.link.flush()
        while (frame := self.link.take(before, tag)) is None:
            self.link.wait([(before, tag, path)], 3.0)
        return value + torch.frombuffer(frame.payload, dtype=torch.int64).reshape(value.shape)

    def close(self) -> None:
        self.store.clear()


def make(party: int, link: Link, keys: dict[int, bytes], options: dict[str, Any]) -> FakeMachine:
    return FakeMachine(party, link, keys, options)
