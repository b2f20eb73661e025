"""The readers of bytes from elsewhere, on inputs near real ones and on noise; `run.py` goes further with atheris."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

_FILE = Path(__file__).with_name("targets.py")
sys.path.insert(0, str(_FILE.parent))
_SPEC = importlib.util.spec_from_file_location("fuzz_targets", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
targets = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = targets
_SPEC.loader.exec_module(targets)

#: Inputs of mutated seeds, by target; a plan or a machine takes milliseconds, a header microseconds.
MUTANTS = {
    "plan_fields": 2000,
    "command_fields": 2000,
    "header": 400,
    "stream": 400,
    "message": 200,
    "command": 200,
    "plan": 60,
    "terms": 40,
    "request_fields": 600,
    "party_file": 200,
}


def mutated(seed: bytes, source: random.Random) -> bytes:
    data = bytearray(seed)
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(data) + 1)
        match source.randrange(4):
            case 0 if data:
                data[place % len(data)] = source.randrange(256)
            case 1:
                data[place:place] = source.randbytes(source.randint(1, 8))
            case 2:
                del data[place : place + source.randint(1, 8)]
            case _:
                data[place:place] = data[: source.randint(0, 32)]
    return bytes(data)


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_real_inputs_and_their_neighbours_end_well(name: str) -> None:
    source = random.Random(name)
    for seed in targets.seeds(name):
        targets.TARGETS[name](seed)
        for _ in range(MUTANTS.get(name, 100) // len(targets.seeds(name)) + 1):
            targets.TARGETS[name](mutated(seed, source))


@pytest.mark.parametrize(
    "name",
    [
        "header",
        "stream",
        "message",
        "cluster_file",
        "command_fields",
        "plan_fields",
        "preamble",
        "hello",
        "request",
        "request_fields",
        "party_file",
        "pipe",
    ],
)
@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=300))
def test_noise_ends_well(name: str, data: bytes) -> None:
    targets.TARGETS[name](data)
