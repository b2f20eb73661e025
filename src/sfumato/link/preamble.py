"""The first bytes of a connection, in clear: which process of a party is meant, before anybody is known."""

from __future__ import annotations

from typing import NamedTuple

from sfumato.errors import LinkError

__all__ = ["PREAMBLE_BYTES", "PROTOCOL_VERSION", "Preamble", "preamble"]

PROTOCOL_VERSION = 2
"""Of everything above the frames. Parties and clients of another version are told so."""

PREAMBLE_BYTES = 24
_MAGIC = b"sfumato"
_NO_RUN = bytes(16)


class Preamble(NamedTuple):
    """What a caller says in clear: its protocol version, and the run it belongs to (None: a control connection)."""

    version: int
    run: str | None

    @staticmethod
    def parse(data: bytes) -> Preamble:
        """``LinkError`` for anything else."""
        if len(data) != PREAMBLE_BYTES or not data.startswith(_MAGIC):
            raise LinkError("did not begin with sfumato's preamble")
        run = data[8:]
        return Preamble(data[7], None if run == _NO_RUN else run.hex())


def preamble(run: str | None = None) -> bytes:
    """The first bytes of a connection; ``run``: 32 hex digits, None for a control connection."""
    return _MAGIC + bytes([PROTOCOL_VERSION]) + (_NO_RUN if run is None else bytes.fromhex(run))
