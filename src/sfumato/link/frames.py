"""The framing on a byte stream: a fixed header of 21 bytes, then the payload. Nothing is ever unpickled.

Header, little endian: magic ``sf``, version, kind, dtype code, 8-byte tag, u32 clock, u32 payload length.
"""

from __future__ import annotations

import json
import struct
from typing import NamedTuple

from sfumato.errors import LinkError
from sfumato.link.base import public_text

__all__ = [
    "DTYPE_CODES",
    "HEADER_BYTES",
    "HIGHEST_BOUND",
    "WIRE_VERSION",
    "Header",
    "Kind",
    "abort_payload",
    "check_frame",
    "PACKED",
    "dtype_code",
    "dtype_name",
    "pack_header",
    "parse_abort",
    "parse_header",
]

WIRE_VERSION = 1
HIGHEST_BOUND = 2**32 - 1
_MAGIC = b"sf"
_HEADER = struct.Struct("<2sBBB8sII")
HEADER_BYTES = _HEADER.size
_MAX_ABORT_BYTES = 4096


class Kind:
    """What a frame is for."""

    DATA = 1
    HELLO = 2
    ABORT = 3
    BYE = 4
    ALL = frozenset((DATA, HELLO, ABORT, BYE))


_SHORT = {Kind.HELLO: 65536, Kind.ABORT: _MAX_ABORT_BYTES, Kind.BYE: 0}

# code -> (torch's name of the dtype, bytes an item); a code is never reused for something else
_DTYPES: dict[int, tuple[str, int]] = {
    0: ("uint8", 1),
    1: ("int8", 1),
    2: ("int16", 2),
    3: ("int32", 4),
    4: ("int64", 8),
    5: ("bool", 1),
    6: ("float32", 4),
    7: ("float64", 8),
    8: ("float16", 2),
    9: ("bfloat16", 2),
}
DTYPE_CODES: dict[str, int] = {name: code for code, (name, _) in _DTYPES.items()}
#: Codes above this one: densely packed fields of (code - PACKED) bits, 1 to 64, as protocols send them.
PACKED = 64
_ITEM_BYTES: dict[int, int] = {code: size for code, (_, size) in _DTYPES.items()}
_ITEM_BYTES |= {PACKED + bits: 1 for bits in range(1, 65)}


class Header(NamedTuple):
    """A parsed and checked frame header."""

    kind: int
    dtype: int
    tag: bytes
    clock: int
    length: int


def dtype_code(name: str) -> int:
    """The wire code of a torch dtype name such as ``int64``; ``LinkError`` when it does not travel."""
    try:
        return DTYPE_CODES[name]
    except KeyError:
        raise LinkError(
            f"values of dtype {public_text(name)} do not travel; use one of {', '.join(DTYPE_CODES)}"
        ) from None


def dtype_name(code: int) -> str:
    """The torch dtype name of a wire code; ``LinkError`` for an unknown code."""
    try:
        return _DTYPES[code][0]
    except KeyError:
        raise LinkError(f"a frame has the unknown dtype code {code}") from None


def check_frame(dtype: int, tag: bytes, clock: int, length: int, max_bytes: int) -> None:
    """Refuse to send what a peer would refuse to read."""
    if dtype not in _ITEM_BYTES:
        raise LinkError(f"a frame has the unknown dtype code {dtype}")
    if len(tag) != 8:
        raise LinkError(f"a frame tag has {len(tag)} bytes, not 8")
    if not 0 <= clock < 2**32:
        raise LinkError("a frame clock does not fit 32 bits")
    if length > max_bytes:
        raise LinkError(
            f"a message of {length} bytes is over the bound of {max_bytes}; tile it or raise max_frame_bytes"
        )
    if length % _ITEM_BYTES[dtype]:
        raise LinkError(f"{length} bytes are no whole number of {_ITEM_BYTES[dtype]}-byte items")


def pack_header(kind: int, dtype: int, tag: bytes, clock: int, length: int) -> bytes:
    """The header's bytes; the caller has checked the fields with `check_frame`."""
    return _HEADER.pack(_MAGIC, WIRE_VERSION, kind, dtype, tag, clock, length)


def parse_header(buffer: bytes | bytearray | memoryview, max_bytes: int, offset: int = 0) -> Header:
    """Read and check the header at ``offset``; ``LinkError`` with one sentence for anything that is not
    one."""
    magic, version, kind, dtype, tag, clock, length = _HEADER.unpack_from(buffer, offset)
    if magic != _MAGIC:
        raise LinkError("sent bytes that are not a sfumato frame")
    if version != WIRE_VERSION:
        raise LinkError(
            f"speaks wire version {version}, this side {WIRE_VERSION}; install the same release on both"
        )
    if kind not in Kind.ALL:
        raise LinkError(f"sent a frame of unknown kind {kind}")
    item = _ITEM_BYTES.get(dtype)
    if item is None:
        raise LinkError(f"sent a frame with the unknown dtype code {dtype}")
    bound = max_bytes if kind == Kind.DATA else min(max_bytes, _SHORT[kind])
    if length > bound:
        raise LinkError(f"sent a frame of {length} bytes, over the bound of {bound}")
    if length % item:
        raise LinkError(f"sent a frame of {length} bytes, no whole number of {_ITEM_BYTES[dtype]}-byte items")
    return Header(kind, dtype, tag, clock, length)


def abort_payload(reason: str, kind: str, origin: int) -> bytes:
    """The payload of an abort frame: why, which error class, which party failed first."""
    return json.dumps({"reason": public_text(reason), "kind": kind, "origin": origin}).encode()[
        :_MAX_ABORT_BYTES
    ]


def parse_abort(payload: bytes | bytearray | memoryview) -> tuple[str, str, int]:
    """(reason, kind, origin) of an abort frame; what does not parse gives a neutral sentence, never an
    exception."""
    try:
        fields = json.loads(bytes(payload))
        reason, kind, origin = fields["reason"], fields["kind"], fields["origin"]
        if (
            isinstance(reason, str)
            and isinstance(kind, str)
            and kind.isidentifier()
            and isinstance(origin, int)
        ):
            return public_text(reason) or "no reason given", kind[:40], origin
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return "no readable reason given", "LinkError", -1
