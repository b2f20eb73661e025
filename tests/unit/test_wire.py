"""Control messages and commands: round trips, and what a hostile peer may send."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.errors import JobError, LinkError
from sfumato.link.base import Frame
from sfumato.link.memory import memory_links
from sfumato.runtime.commands import (
    Affine,
    Call,
    Close,
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
    WeightsSpec,
    digest,
    from_message,
    to_message,
)
from sfumato.runtime.wire import MessageStream, canonical, pack_message, read_message

DTYPES = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.float32,
    torch.float64,
]
DTYPES += [torch.float16, torch.bfloat16]
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    dtype = draw(st.sampled_from(DTYPES))
    words = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    if dtype is torch.bool:
        return (words > 127).reshape(shape)
    tensor = words.view(dtype).reshape(shape)
    return tensor.nan_to_num() if dtype.is_floating_point else tensor


def frames_of(parts: list[tuple[int, Any]]) -> Any:
    frames = iter([Frame(bytes(8), code, 0, bytearray(payload)) for code, payload in parts])
    return lambda: next(frames)


@given(
    st.dictionaries(st.text(), json_values, max_size=4),
    st.lists(tensors(), max_size=4),
    st.sampled_from([8, 64, 4096]),
)
@settings(max_examples=150, deadline=None)
def test_round_trip(header: dict[str, Any], values: list[Tensor], chunk: int) -> None:
    parts = pack_message(header, values, chunk)
    assert all(len(payload) <= chunk for _, payload in parts)
    found, back = read_message(frames_of(parts), 1 << 30, chunk)
    assert found == header
    assert [(t.dtype, t.shape) for t in back] == [(t.dtype, t.shape) for t in values]
    assert all(torch.equal(a, b) for a, b in zip(values, back, strict=True))


def test_views_travel_as_they_look() -> None:
    tensor = torch.arange(24).reshape(2, 3, 4).transpose(0, 2)[1:]
    (back,) = read_message(frames_of(pack_message({}, [tensor])), 1 << 20)[1]
    assert torch.equal(tensor, back)


def test_stream_over_a_link() -> None:
    links = memory_links(2)
    streams = [MessageStream(links[i], 1 - i, 1 << 20, 64) for i in range(2)]
    for number in range(3):
        streams[0].send({"number": number}, [torch.arange(100)])
    for number in range(3):
        header, values = streams[1].receive(1.0, "a message")
        assert header == {"number": number}
        assert torch.equal(values[0], torch.arange(100))
    assert streams[0].bytes_sent == streams[1].bytes_received > 2400
    with pytest.raises(LinkError, match=r"party 0 sent nothing .*the next command"):
        streams[1].receive(0.05, "the next command")


def envelope(text: bytes) -> list[tuple[int, bytes]]:
    return [(0, len(text).to_bytes(8, "little")), (0, text)]


ONE = canonical({"header": {}, "tensors": [{"dtype": "int64", "shape": [2]}]})


@pytest.mark.parametrize(
    "parts",
    [
        [(0, b"")],
        [(0, bytes(8))],
        [(0, b"\xff" * 8)],
        [(0, (5).to_bytes(8, "little")), (0, b"123456")],
        envelope(b"not json"),
        envelope(b"\xff\xfe"),
        envelope(b"[1]"),
        envelope(b"[" * 100_000),
        envelope(b'{"header": {"a": NaN}, "tensors": []}'),
        envelope(b'{"header": {"a": 1, "a": 2}, "tensors": []}'),
        envelope(b'{"header": {"a": ' + b"9" * 5000 + b'}, "tensors": []}'),
        envelope(b'{"header": {}}'),
        envelope(b'{"header": {}, "tensors": [], "more": 1}'),
        envelope(b'{"header": {}, "tensors": {}}'),
        envelope(b'{"header": {}, "tensors": [{"dtype": "object", "shape": [1]}]}'),
        envelope(b'{"header": {}, "tensors": [{"dtype": ["int64"], "shape": [1]}]}'),
        envelope(b'{"header": {}, "tensors": [{"dtype": "int64", "shape": [-1]}]}'),
        envelope(b'{"header": {}, "tensors": [{"dtype": "int64", "shape": [true]}]}'),
        envelope(b'{"header": {}, "tensors": [{"dtype": "int64", "shape": [1.5]}]}'),
        envelope(b'{"header": {}, "tensors": [{"dtype": "int64", "shape": [99999999999999999999]}]}'),
        envelope(
            b'{"header": {}, "tensors": [{"dtype": "int64", "shape": [0, 200000000000000, 200000000000000]}]}'
        ),
        envelope(b'{"header": {}, "tensors": [{"dtype": "int64", "shape": [1000000, 1000000]}]}'),
        envelope(b'{"header": {}, "tensors": [{"dtype": "int8", "shape": ' + b"[" + b"1," * 40 + b"1]}]}"),
        [*envelope(ONE), (3, bytes(16))],
        [*envelope(ONE), (4, bytes(24))],
        [*envelope(ONE), (4, b"")],
    ],
)
def test_hostile_messages(parts: list[tuple[int, bytes]]) -> None:
    with pytest.raises(LinkError) as caught:
        read_message(frames_of(parts), 1 << 30)
    assert "\n" not in str(caught.value)


def test_what_does_not_travel() -> None:
    with pytest.raises(LinkError, match="complex64"):
        pack_message({}, [torch.zeros(1, dtype=torch.complex64)])
    with pytest.raises(LinkError, match="JSON"):
        pack_message({"x": float("nan")})
    with pytest.raises(LinkError, match="JSON"):
        pack_message({"x": object()})


COMMANDS: list[Command] = [
    Load(
        "unet", {"nodes": [1, 2.5, "x"]}, WeightsSpec("public", (WeightSpec("a.weight", "Z64", 18, (2, 3)),))
    ),
    Load("unet", {}, WeightsSpec("stored")),
    Load("unet", {"model": "house", "share": "ab", "plan": "cd"}, WeightsSpec("model")),
    Describe("house"),
    Put("x", "Z64", 18, (1, 4, 8, 8)),
    PutIndex("ids", "Z64", 30522, (1, 128), "dpf-aes128-v1"),
    Call("unet", "step/3", {"sample": "x"}, {"b": torch.ones(2), "a": torch.tensor(3)}, ("y", "z")),
    Affine("x", (Term("y", -5, 0, 1), Term("z", 2**63)), 18, "step/3/ddim", torch.arange(4)),
    Affine("x", (Term("y", 1),), 0, "p"),
    Reveal("x"),
    Drop("x"),
    Stats(),
    Close(),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: type(c).__name__)
def test_commands_round_trip(command: Command) -> None:
    extra = [torch.arange(3)]
    header, values = to_message(command, extra)
    header, values = read_message(frames_of(pack_message(header, values)), 1 << 20)
    back, attachments = from_message(header, values)
    assert to_message(back)[0] == to_message(command)[0]
    assert digest(back) == digest(command)
    assert len(attachments) == 1
    with pytest.raises(JobError, match="unknown field 'zzz'"):
        from_message({**header, "zzz": 1}, values)
    for field in header:
        with pytest.raises(JobError):
            from_message({k: v for k, v in header.items() if k != field}, values)
        with pytest.raises(JobError):
            from_message({**header, field: object()}, values)


def test_digests_differ_where_commands_do() -> None:
    assert len({digest(command) for command in COMMANDS}) == len(COMMANDS)
    call = Call("n", "p", {}, {"t": torch.tensor([1, 2])}, ())
    for other in (torch.tensor([1, 3]), torch.tensor([[1, 2]]), torch.tensor([1, 2], dtype=torch.int32)):
        assert digest(Call("n", "p", {}, {"t": other}, ())) != digest(call)


def test_attached_weights_are_part_of_the_digest_and_files_go_by_name() -> None:
    public, stored = (Load("n", {}, WeightsSpec(form)) for form in ("public", "stored"))
    a, b = [torch.tensor([1])], [torch.tensor([2])]
    assert digest(public, a) != digest(public, b)
    assert digest(stored, a) == digest(stored, b)


def test_the_share_of_a_model_is_part_of_the_digest() -> None:
    named = {"model": "house", "share": "ab", "plan": "cd"}
    ours = digest(Load("n", named, WeightsSpec("model")))
    for field in named:
        assert digest(Load("n", {**named, field: "other"}, WeightsSpec("model"))) != ours


@pytest.mark.parametrize(
    "changes",
    [
        {"plan": {}},
        {"plan": {"model": "house", "share": "ab"}},
        {"plan": {"model": "house", "share": "ab", "plan": "cd", "weights_file": "x"}},
        {"plan": {"model": "house", "share": None, "plan": "cd"}},
        {"weights": {"form": "model", "items": [["w", "Z64", 18, [2]]]}},
        {"weights": {"form": "models", "items": []}},
    ],
)
def test_a_shared_model_is_loaded_by_name_alone(changes: dict[str, Any]) -> None:
    header, values = to_message(
        Load("n", {"model": "house", "share": "ab", "plan": "cd"}, WeightsSpec("model"))
    )
    with pytest.raises(JobError):
        from_message({**header, **changes}, values)


@pytest.mark.parametrize("handle", ["", "../x y", "a" * 300, "é", "-x", "a\n"])
def test_bad_names(handle: str) -> None:
    with pytest.raises(JobError):
        from_message({"command": "Drop", "handle": handle, "common": 0}, [])


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 0},
        {"rows": -1},
        {"rows": 2**48},
        {"rows": True},
        {"rows": 1.0},
        {"ring": "B8"},
        {"shape": [-1]},
    ],
)
def test_bad_row_numbers(changes: dict[str, Any]) -> None:
    header, values = to_message(PutIndex("ids", "Z64", 30522, (1, 128), "dpf-aes128-v1"))
    with pytest.raises(JobError):
        from_message({**header, **changes}, values)


@pytest.mark.parametrize(
    "term",
    [
        ["y", 1.0, None, None],
        ["y", 2**64, None, None],
        ["y", 1, 0, None],
        ["y", 1, 3, 2],
        ["y", 1, True, 2],
        ["y", 1],
    ],
)
def test_bad_terms(term: list[Any]) -> None:
    header, values = to_message(Affine("x", (), 0, "p"))
    with pytest.raises(JobError):
        from_message({**header, "terms": [term]}, values)
