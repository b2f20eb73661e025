"""The wire format's known answers: tests/data/vectors.json is computed by scripts/vectors.py without this package."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.link.base import Frame, tag_of
from sfumato.link.frames import HEADER_BYTES, pack_header, parse_header
from sfumato.link.memory import memory_links
from sfumato.link.preamble import PREAMBLE_BYTES, Preamble, preamble
from sfumato.protocol.rep3 import Rep3
from sfumato.ring import dpf
from sfumato.ring.fixed import encode
from sfumato.ring.pack import pack, unpack
from sfumato.ring.prg import stream_words
from sfumato.runtime import handshake
from sfumato.runtime.canonical import canonical
from sfumato.runtime.commands import (
    Affine,
    Call,
    Close,
    Command,
    Describe,
    Load,
    Put,
    PutIndex,
    Reveal,
    Term,
    WeightsSpec,
    digest,
    to_message,
)
from sfumato.runtime.wire import pack_message
from sfumato.session.drive import LockstepLink, simulate, simulation_keys
from sfumato.session.session import Send, Session
from sfumato.types import Z64, Ring, Secret, Shared

ROOT = Path(__file__).resolve().parents[2]
VECTORS: dict[str, Any] = json.loads((ROOT / "tests" / "data" / "vectors.json").read_text(encoding="utf-8"))


def words(values: list[str]) -> Tensor:
    return torch.tensor([int(value) for value in values], dtype=torch.int64)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vectors", ROOT / "scripts" / "vectors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_file_and_page_are_what_the_script_makes(script: ModuleType) -> None:
    made = script.make()
    assert made == VECTORS, "run python scripts/vectors.py"
    page = (ROOT / "docs" / "wire.md").read_text(encoding="utf-8")
    assert script.filled(page, made) == page, "run python scripts/vectors.py"
    assert page.count("<!-- vectors: ") == len(script.tables(made))


def test_preambles() -> None:
    case = VECTORS["preamble"]
    for run, wanted in ((None, case["control"]), (case["run"], case["session"])):
        data = preamble(run)
        assert (data.hex(), len(data)) == (wanted, PREAMBLE_BYTES)
        assert Preamble.parse(data) == (2, run)


def test_frames() -> None:
    for case in VECTORS["frame"]:
        payload, name = bytes.fromhex(case["payload"]), bytes.fromhex(case["tag"])
        header = pack_header(case["kind"], case["dtype"], name, case["clock"], len(payload))
        assert (header + payload).hex() == case["bytes"]
        read = parse_header(bytes.fromhex(case["bytes"]), 1 << 20)
        assert (read.kind, read.dtype, read.tag, read.clock) == (
            case["kind"],
            case["dtype"],
            name,
            case["clock"],
        )
        assert read.length == len(bytes.fromhex(case["bytes"])) - HEADER_BYTES


def test_names_of_messages() -> None:
    assert tag_of("control/digest", 5).hex() == VECTORS["tag"]["control/digest\x005"]
    sent = Recorder()

    async def main(s: Session) -> None:
        if s.party == 0:
            await (
                s.fork("unet").fork("step0").exchange([Send(1, "z2", torch.zeros(1, dtype=torch.int64), 64)])
            )

    simulate(main, links=sent.mesh())
    assert [frame.tag.hex() for _, _, frame in sent.frames] == [VECTORS["tag"]["/unet/step0:z2"]]


@pytest.mark.parametrize("case", VECTORS["pack"], ids=lambda case: f"{case['bits']} bits")
def test_packed_fields(case: dict[str, Any]) -> None:
    bits, values = case["bits"], words(case["words"])
    assert bytes(pack(values, bits)).hex() == case["bytes"]
    low = values if bits == 64 else values & ((1 << bits) - 1)
    assert torch.equal(unpack(bytes.fromhex(case["bytes"]), bits, (len(values),), torch.int64), low)


@pytest.mark.parametrize("case", VECTORS["prg"], ids=lambda case: case["ring"])
def test_streams(case: dict[str, Any]) -> None:
    found = stream_words(bytes.fromhex(case["key"]), case["label"], Ring.named(case["ring"]), (4,))
    assert [str(word) for word in found.tolist()] == case["words"]


def test_pair_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides of a pair, on their fixed nonces."""
    case = VECTORS["handshake"]
    hello1 = canonical({"terms": case["terms"], "nonce": case["nonce1"]})
    hello0 = canonical({"terms": case["terms"], "nonce": case["nonce0"]})
    assert hello0.decode() == case["hello0"]
    for me, own, theirs in ((0, case["nonce0"], hello1), (1, case["nonce1"], hello0)):
        mesh = memory_links(2)
        monkeypatch.setattr(os, "urandom", lambda n, own=own: bytes.fromhex(own)[:n])
        mesh[1 - me].send(me, Frame(bytes.fromhex(case["tag"]), 0, 0, theirs))
        mesh[1 - me].flush()
        assert (
            handshake.agree(mesh[me], [1 - me], case["run"], case["terms"], 5.0)[1 - me].hex() == case["key"]
        )


def test_messages() -> None:
    case = VECTORS["message"]
    parts = pack_message(case["header"], [words(case["words"])])
    name = case["number"].to_bytes(8, "little")
    frames = [pack_header(1, code, name, 0, len(data)) + bytes(data) for code, data in parts]
    assert [frame.hex() for frame in frames] == case["frames"]


COMMANDS: list[tuple[Command, list[Tensor]]] = [
    (Put("x", "Z64", 18, (2, 3)), []),
    (Call("unet", "step0", {"sample": "x"}, {"t": torch.tensor([0.5, -2.0])}, ("y",)), []),
    (Affine("z", (Term("x", 3), Term("y", -1, 0, 2)), 24, "mix"), []),
    (PutIndex("ids", "Z64", 30522, (1, 128), "dpf-aes128-v1"), []),
    (Describe("digits"), []),
    (
        Load(
            "unet",
            {"model": "digits", "share": VECTORS["preamble"]["run"], "plan": "00ff"},
            WeightsSpec("model"),
        ),
        [],
    ),
    (Reveal("y"), []),
    (Close(), []),
]


@pytest.mark.parametrize(("pair", "case"), list(zip(COMMANDS, VECTORS["command"], strict=True)))
def test_digests(pair: tuple[Command, list[Tensor]], case: dict[str, Any]) -> None:
    command, attachments = pair
    assert digest(command, attachments).hex() == case["digest"]
    header, _ = to_message(command, attachments)
    assert json.loads(case["header"]) == {name: value for name, value in header.items() if name != "common"}


def test_shares_of_a_client() -> None:
    case = VECTORS["share"]
    encoded = encode(torch.tensor(case["reals"], dtype=torch.float64), Z64, case["frac"])
    assert torch.equal(encoded, words(case["words"]))
    masks = [stream_words(bytes.fromhex(case[f"seed{i}"]), "put", Z64, (3,)) for i in range(2)]
    for i, component in enumerate(Rep3.split(encoded, Z64, masks)):
        assert torch.equal(component, words(case[f"component{i}"]))


@pytest.mark.parametrize("case", VECTORS["point"], ids=lambda case: case["ring"])
def test_keys_of_row_numbers(case: dict[str, Any]) -> None:
    ring, rows = Ring.named(case["ring"]), case["rows"]
    roots = bytes.fromhex(case["root0"] + case["root1"])
    keys = dpf.make_keys(torch.tensor([case["number"]]), rows, ring, draw=lambda size: roots[:size])
    for i, key in enumerate(keys):
        assert key.numpy().tobytes().hex() == case[f"key{i}"]
        assert torch.equal(
            dpf.expand(key, rows, ring, first=i == 0)[0], words(case[f"words{i}"]).to(ring.dtype)
        )


class Recorder:
    """Links of a simulation that keep what is sent."""

    def __init__(self) -> None:
        self.frames: list[tuple[int, int, Frame]] = []

    def mesh(self) -> list[LockstepLink]:
        frames, links = self.frames, LockstepLink.mesh(3)

        class Kept(LockstepLink):
            def send(self, to: int, frame: Frame) -> None:
                frames.append((self.party, to, frame))
                super().send(to, frame)

        return [Kept(link.party, link._boxes) for link in links]


def sent_words(frames: list[tuple[int, int, Frame]], frm: int, to: int, bits: int) -> list[str]:
    found = [f for a, b, f in frames if (a, b, f.dtype) == (frm, to, 64 + bits)]
    assert len(found) == 1
    return [str(word) for word in unpack(found[0].payload, bits, (4,), torch.int64).tolist()]


def run_move(move: Callable[[Session, Shared, Shared], Any], path: str) -> tuple[list[Any], Recorder]:
    case, sent = VECTORS["moves"], Recorder()
    x, y = ([words(part) for part in case[name]] for name in ("x", "y"))
    type = Secret(Z64, 0, (4,))

    async def main(s: Session) -> Any:
        i, j = s.party, (s.party + 1) % 3
        result = move(s.fork(path), Shared(type, (x[i], x[j])), Shared(type, (y[i], y[j])))
        return result if isinstance(result, Tensor) else await result

    results, _ = simulate(main, seed=case["seed"].encode(), links=sent.mesh())
    return results, sent


def test_simulation_keys() -> None:
    for party in range(3):
        for peer, key in simulation_keys(b"vectors", party).items():
            low, high = sorted((party, peer))
            assert key.hex() == VECTORS["moves"]["keys"][f"{low}{high}"]


def test_a_product() -> None:
    results, sent = run_move(lambda s, x, y: Rep3().bilinear(s, torch.mul, x, y), "product")
    for i in range(3):
        assert sent_words(sent.frames, i, (i + 2) % 3, 64) == VECTORS["moves"]["product"][i]
        assert torch.equal(results[i].parts[0], words(VECTORS["moves"]["product"][i]))


def test_a_truncation() -> None:
    case = VECTORS["moves"]["truncate"]
    bits = VECTORS["moves"]["bits"]
    results, sent = run_move(lambda s, x, y: Rep3().truncate(s, x, bits), "truncate")
    for name, frm, to, width in (
        ("a", 0, 1, 1),
        ("b", 1, 0, 1),
        ("ab", 2, 1, bits),
        ("y0", 0, 1, 64),
        ("y1", 1, 0, 64),
    ):
        assert sent_words(sent.frames, frm, to, width) == case[name], name
    for i in range(3):
        assert torch.equal(results[i].parts[0], words(case[f"c{i}"]))
    value = words(VECTORS["moves"]["value_truncated"])
    exact = words(VECTORS["moves"]["value_x"]).double() / 2.0**bits
    assert bool(((value.double() - exact).abs() < 1).all())


def test_a_reveal_to_the_client() -> None:
    results, sent = run_move(lambda s, x, y: Rep3().summand(s, x), "reveal")
    assert sent.frames == []
    for i, summand in enumerate(results):
        assert torch.equal(summand, words(VECTORS["moves"]["reveal"][i]))
    assert torch.equal(Rep3.combine(results, Z64), words(VECTORS["moves"]["value_x"]))
