"""Noise and coins of differentially private training: AES-256-CTR under a key that nobody kept.

A generator that can be predicted (torch's, numpy's) or a seed that is written down lets a reader of the weights
subtract the noise, so a stream takes its key from the operating system and never shows it. Floating-point noise has
a second hole: which floats are possible depends on the value that it hides. Each draw here is therefore the sum of
four Gaussians over two, which puts the search for the four out of reach. Source: FIPS 197, SP 800-38A; Mironov 2012,
"On significance of the least significant bits"; Holohan and Braghin 2021, "Secure random sampling in differential
privacy".
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from sfumato.errors import JobError, ProtocolError

__all__ = ["SecretStream"]

_KEY_BYTES = 32
#: Draws made in one piece: the temporaries of a piece stay in a core's cache, and a large request needs little memory.
_PIECE = 1 << 16
#: Gaussians behind one draw.
_TERMS = 4


class SecretStream:
    """A stream of secret random words, read once from front to back.

    Args:
        key: 32 bytes; None (the rule) takes them from the operating system. A key of one's own makes the noise
            reproducible and so removable: tests only.

    Raises:
        JobError: a key of another length.
    """

    def __init__(self, key: bytes | None = None) -> None:
        if key is not None and len(key) != _KEY_BYTES:
            raise JobError(
                f"a stream's key has {_KEY_BYTES} bytes, not {len(key)}; give no key outside tests"
            )
        self._key = os.urandom(_KEY_BYTES) if key is None else bytes(key)
        # The words' key differs from every child's, so the counter may start at zero in each.
        self._cipher = Cipher(algorithms.AES256(self._derive("words", "")), modes.CTR(bytes(16))).encryptor()
        self._labels: set[str] = set()
        self._process = os.getpid()

    def child(self, label: str) -> SecretStream:
        """An independent stream for one purpose ("noise", "coins"), the same whatever was drawn before.

        Raises:
            ProtocolError: the label was given out before; two users of one stream would see the same noise.
        """
        self._refuse_copies()
        if label in self._labels:
            raise ProtocolError(f"the stream {label!r} was given out twice; every use needs its own label")
        self._labels.add(label)
        return SecretStream(self._derive("child", label))

    def coins(self, count: int, probability: float) -> Tensor:
        """Independent coins, bool ``(count,)``, each True with the given probability.

        *Error*: the probability is rounded down to a multiple of 2⁻⁶⁴, so never above what is accounted.

        Raises:
            JobError: a probability outside [0, 1] or a negative count.
        """
        if not 0.0 <= probability <= 1.0:
            raise JobError(f"a probability lies between 0 and 1, not at {probability}")
        words = self._words(count)
        threshold = int(math.ldexp(probability, 64))  # a power of two moves only the exponent: exact
        heads = words < np.uint64(threshold) if threshold < 1 << 64 else np.ones(count, np.bool_)
        return torch.from_numpy(heads)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Independent numbers in [0, 1), multiples of 2⁻²⁴, float32 of the given shape."""
        words = self._words(math.prod(shape)) >> np.uint64(40)
        return torch.from_numpy(words.astype(np.float32) * np.float32(2.0**-24)).reshape(tuple(shape))

    def normal(self, shape: Sequence[int], std: float, device: str | torch.device = "cpu") -> Tensor:
        """Independent Gaussians of mean 0 and standard deviation ``std``, float32 of the given shape.

        Made on the CPU in float64 and rounded once, after the scaling.

        *Error*: the four terms end at 8.57 standard deviations each (probability below 2⁻⁵³).

        Raises:
            JobError: a negative or infinite ``std``.
        """
        if not 0.0 <= std < math.inf:
            raise JobError(f"a standard deviation is a finite number of at least 0, not {std}")
        count = math.prod(shape)
        values = np.empty(count, np.float32)
        for start in range(0, count, _PIECE):
            stop = min(start + _PIECE, count)
            values[start:stop] = self._gaussians(stop - start) * std
        return torch.from_numpy(values).reshape(tuple(shape)).to(device)

    def _gaussians(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Unit Gaussians, float64 ``(count,)``, by Box and Muller's method."""
        half = (count + 1) // 2
        uniform = (self._words(2 * _TERMS * half) >> np.uint64(11)).astype(np.float64)  # 53 bits: exact
        radius, angle = uniform.reshape(2, _TERMS, half)
        radius += 1.0  # in (0, 1] after the scaling, so that the logarithm is finite
        radius *= 2.0**-53
        radius = np.sqrt(-2.0 * np.log(radius))
        angle *= 2.0**-52 * math.pi
        # The two halves of a pair go to two draws: in one sum they would make a single Gaussian, not two.
        first, second = (radius * np.cos(angle)).sum(0), (radius * np.sin(angle)).sum(0)
        return np.concatenate([first, second])[:count] / math.sqrt(_TERMS)

    def _words(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        self._refuse_copies()
        if count < 0:
            raise JobError(f"{count} random words were asked for; ask for none or more")
        return np.frombuffer(self._cipher.update(bytes(8 * count)), "<u8").copy()

    def _derive(self, purpose: str, label: str) -> bytes:
        return hmac.new(self._key, f"sfumato-dp-{purpose}:{label}".encode(), hashlib.sha256).digest()

    def _refuse_copies(self) -> None:
        if os.getpid() != self._process:
            raise ProtocolError(
                "a secret stream was copied into another process; make a stream of its own there"
            )

    def __reduce__(self) -> NoReturn:
        raise ProtocolError("a secret stream cannot be copied or saved; a new run draws a new key")
