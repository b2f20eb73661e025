"""Every exception that sfumato raises on purpose.

::

    SfumatoError
    ├── CaptureError      a model cannot be captured or planned; carries every unsupported node
    ├── TypeMismatch      ring, fraction bits or shape of two values do not fit
    ├── RangeError        a value does not fit its ring, or left its calibrated range
    ├── ProtocolError     a path used twice, a handshake that differs, a broken invariant between parties
    ├── LinkError         a peer is gone, silent, or sends what is not a frame; names peer and path
    ├── JobError          a request that cannot be served (unknown name, bad argument, refused by policy)
    ├── BudgetExceeded    a privacy budget (ε, δ) that a training would pass
    └── InsecureError     a protocol without secrecy was asked of real parties
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "BudgetExceeded",
    "CaptureError",
    "InsecureError",
    "JobError",
    "LinkError",
    "ProtocolError",
    "RangeError",
    "SfumatoError",
    "TypeMismatch",
]


class SfumatoError(Exception):
    """Base of all errors of this package; the text is one public sentence and never holds a secret."""


class CaptureError(SfumatoError):
    """A model that cannot run. ``problems`` lists every unsupported node, one line each."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems)
        lines = "".join(f"\n  - {p}" for p in self.problems)
        super().__init__(message + lines)


class TypeMismatch(SfumatoError):
    """Two secret values whose ring, fraction bits or shapes do not fit."""


class RangeError(SfumatoError):
    """A value outside the range its ring or its calibration allows."""


class ProtocolError(SfumatoError):
    """The parties disagree, or a rule of the protocol was broken (a path forked twice, a hash that differs)."""


class LinkError(SfumatoError):
    """A channel failed: the peer is gone, stalled, or sent something that is not a valid frame."""


class JobError(SfumatoError):
    """A request that the runtime cannot or may not serve."""


class BudgetExceeded(SfumatoError):
    """More private training was asked than the privacy budget allows."""


class InsecureError(SfumatoError):
    """A protocol without secrecy was asked of real parties."""
