"""Control messages on a link: a JSON header and tensors as raw little-endian bytes, chunked under the frame
bound.

Nothing is unpickled. A message declares dtype and shape of every tensor first; sizes are checked against the
bound before any memory is taken. The n-th message of a direction travels under tag n, so that messages cannot
be mixed up.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import LinkError
from sfumato.link.base import Frame, Link, peer_name
from sfumato.link.frames import DTYPE_CODES, dtype_code, dtype_name
from sfumato.runtime.canonical import canonical, parse_json

__all__ = ["MessageStream", "Parts", "canonical", "pack_message", "parse_json", "tensor_bytes"]

_MAX_HEADER_BYTES = 64 << 20
_MAX_TENSORS = 100_000
_MAX_DIMS = 16
_CHUNK_BYTES = 32 << 20
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_CODES}
_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in _DTYPES.items()}

Parts = list[tuple[int, bytes | memoryview]]  # (dtype code, payload) of each frame of a message

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("sfumato runs on little-endian machines only")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The little-endian bytes of ``tensor``, without a copy when it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 1:
        flat = flat.as_strided((1,), (1,))  # contiguous whatever its stride, where a view of bytes needs 1
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")  # type: ignore[arg-type]


def pack_message(
    header: dict[str, Any], tensors: Sequence[Tensor] = (), chunk_bytes: int = _CHUNK_BYTES
) -> Parts:
    """The frames of one message. Large tensors are not copied: leave them unchanged until they have left.

    Raises ``LinkError`` for a dtype that does not travel or a header that is no JSON or too long.
    """
    chunk_bytes -= chunk_bytes % 8
    described = []
    for tensor in tensors:
        name = _NAMES.get(tensor.dtype)
        if name is None:
            raise LinkError(f"tensors of {tensor.dtype} do not travel; use one of {', '.join(_DTYPES)}")
        described.append({"dtype": name, "shape": list(tensor.shape)})
    try:
        envelope = canonical({"header": header, "tensors": described})
    except (ValueError, TypeError, RecursionError) as error:
        raise LinkError(f"a message header does not fit JSON ({type(error).__name__})") from None
    if len(envelope) > _MAX_HEADER_BYTES:
        raise LinkError(f"a message header of {len(envelope)} bytes is over the bound of {_MAX_HEADER_BYTES}")
    parts: Parts = [(0, len(envelope).to_bytes(8, "little"))]
    parts += [(0, envelope[i : i + chunk_bytes]) for i in range(0, len(envelope), chunk_bytes)]
    for tensor, entry in zip(tensors, described, strict=True):
        code, view = dtype_code(str(entry["dtype"])), tensor_bytes(tensor)
        parts += [(code, view[i : i + chunk_bytes]) for i in range(0, len(view), chunk_bytes)]
    return parts


def read_message(
    next_frame: Callable[[], Frame], max_bytes: int, chunk_bytes: int = _CHUNK_BYTES
) -> tuple[dict[str, Any], list[Tensor]]:
    """Put a message together from frames in order; ``LinkError`` with one sentence for anything that is not
    one."""
    frame = next_frame()
    length = int.from_bytes(frame.payload, "little")
    if frame.nbytes != 8 or not 0 < length <= _MAX_HEADER_BYTES:
        raise LinkError("a message begins with a bad header length")
    text = bytearray()
    while len(text) < length:
        frame = next_frame()
        if frame.dtype != 0 or not 0 < frame.nbytes <= length - len(text):
            raise LinkError("a message header is longer than declared")
        text += frame.payload
    envelope = parse_json(text)
    if set(envelope) != {"header", "tensors"} or not isinstance(envelope["header"], dict):
        raise LinkError("a message envelope has other fields than header and tensors")
    entries = envelope["tensors"]
    if not isinstance(entries, list) or len(entries) > _MAX_TENSORS:
        raise LinkError("a message has no list of tensors, or too long a one")
    specs = [_spec(entry) for entry in entries]
    if sum(size for _, _, size in specs) > max_bytes:
        raise LinkError(f"a message carries more than the bound of {max_bytes} bytes")
    return envelope["header"], [_read_tensor(next_frame, *spec) for spec in specs]


def _spec(entry: Any) -> tuple[torch.dtype, tuple[int, ...], int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape"}:
        raise LinkError("a tensor is described by other fields than dtype and shape")
    name, shape = entry["dtype"], entry["shape"]
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise LinkError("a tensor has an unknown dtype")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS:
        raise LinkError("a tensor has a shape that is no short list")
    if not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise LinkError("a tensor has a dimension that is no size")
    count = math.prod(shape)
    if count == 0 and math.prod(n for n in shape if n) >= 2**62:
        raise LinkError("a tensor has a dimension that is no size")
    return dtype, tuple(shape), count * dtype.itemsize


def _read_tensor(
    next_frame: Callable[[], Frame], dtype: torch.dtype, shape: tuple[int, ...], size: int
) -> Tensor:
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    code = DTYPE_CODES[_NAMES[dtype]]
    buffer: bytearray | None = None
    have = 0
    while have < size:
        frame = next_frame()
        if frame.dtype != code:
            raise LinkError(f"a tensor of {dtype_name(code)} arrives as {dtype_name(frame.dtype)}")
        if not 0 < frame.nbytes <= size - have:
            raise LinkError("a tensor is longer than declared")
        if frame.nbytes == size and isinstance(frame.payload, bytearray):
            buffer = frame.payload  # the receiver's own buffer: no copy
        else:
            if buffer is None:
                buffer = bytearray(size)
            buffer[have : have + frame.nbytes] = frame.payload
        have += frame.nbytes
    assert buffer is not None
    if dtype is torch.bool:  # only 0 and 1 are truth values
        return torch.frombuffer(buffer, dtype=torch.uint8).ne(0).reshape(shape)
    return torch.frombuffer(buffer, dtype=dtype).reshape(shape)


class MessageStream:
    """Messages in both directions between this end of a link and one peer, for one thread."""

    def __init__(
        self, link: Link, peer: int, max_message_bytes: int, max_frame_bytes: int = _CHUNK_BYTES
    ) -> None:
        self._link, self._peer = link, peer
        self._max = max_message_bytes
        self._chunk = min(_CHUNK_BYTES, max_frame_bytes)
        self._sent = self._received = 0
        self.bytes_sent = self.bytes_received = 0

    def send(self, header: dict[str, Any], tensors: Sequence[Tensor] = ()) -> None:
        """Queue one message and flush; returns before it has arrived."""
        parts = pack_message(header, tensors, self._chunk)
        tag = self._sent.to_bytes(8, "little")
        self._sent += 1
        for code, payload in parts:
            self._link.send(self._peer, Frame(tag, code, 0, payload))
            self.bytes_sent += len(payload)
        self._link.flush()

    def receive(
        self, timeout_s: float, what: str, stall_s: float = 120.0
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """The peer's next message: ``timeout_s`` for its beginning, ``stall_s`` for each further frame.

        Raises ``LinkError`` naming the peer and ``what`` is waited for.
        """
        tag = self._received.to_bytes(8, "little")
        self._received += 1
        patience = timeout_s

        def next_frame() -> Frame:
            nonlocal patience
            while (frame := self._link.take(self._peer, tag)) is None:
                self._link.wait([(self._peer, tag, what)], patience)
            patience = stall_s
            self.bytes_received += frame.nbytes
            return frame

        try:
            return read_message(next_frame, self._max, self._chunk)
        except LinkError as error:
            if type(error) is LinkError and str(error).startswith("a "):
                raise LinkError(f"{peer_name(self._peer)} sent a bad message: {error}") from None
            raise
