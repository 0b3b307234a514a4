"""Randomness is derived, never drawn from a shared generator.

Everything random is a pure function of (seed, purpose, ids...): the data order, dropout, sampling, rollouts.
So a resume needs no saved generator, and looking at a model never changes its training.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

import numpy as np


def derive(seed: int, purpose: str, *ids: int) -> int:
    """A 63-bit integer that depends on all arguments and nothing else."""
    message = purpose.encode() + struct.pack(f"<{len(ids) + 1}q", seed, *ids)
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little") >> 1


def uniform(seed: int, purpose: str, *ids: int) -> float:
    """A number in [0, 1) that depends on all arguments and nothing else."""
    return (derive(seed, purpose, *ids) >> 10) / 2.0**53


def uniforms(purpose: str, rows: Iterable[tuple[int, ...]]) -> np.ndarray:
    """uniform(seed, purpose, *ids) of each (seed, *ids), in less than half of the time."""
    name, begin = purpose.encode(), hashlib.blake2b
    digests = [begin(name + struct.pack(f"<{len(row)}q", *row), digest_size=8).digest() for row in rows]
    return (np.frombuffer(b"".join(digests), "<u8") >> np.uint64(11)) / 2.0**53


class Permutation:
    """A pseudo-random permutation of range(n) with random access and no memory.

    A four-round Feistel network on the smallest even number of bits that holds n; values outside range(n)
    are walked along their cycle until they fall inside (Black & Rogaway, "Ciphers with Arbitrary Finite
    Domains", 2002, section 3). The order of 150 million windows costs nothing to hold or to resume.
    """

    _ROUNDS = 4

    def __init__(self, n: int, key: int) -> None:
        assert n > 0
        self.n = n
        self._half = max(1, (max(2, n) - 1).bit_length() + 1 >> 1)
        self._mask = np.uint64((1 << self._half) - 1)
        self._keys = [np.uint64(derive(key, "feistel", r)) for r in range(self._ROUNDS)]

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """Positions `index` (int64, each in range(n)) of the permutation."""
        out = self._encrypt(np.asarray(index, np.uint64))
        while (outside := out >= self.n).any():
            out[outside] = self._encrypt(out[outside])
        return out.astype(np.int64)

    def _encrypt(self, x: np.ndarray) -> np.ndarray:
        shift = np.uint64(self._half)
        left, right = x >> shift, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea & Flood 2014): every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
