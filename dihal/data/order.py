"""Deterministic, stateless order of training sequences.

Sample k of a run is window `permutation(k % windows)` of epoch `k // windows`. The permutation is keyed by
(seed, epoch) and computed per index, so any position of a run is reached without replaying what came before,
and nothing but the integer `samples_seen` is needed to resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

__all__ = ["draw", "micro_batches", "permute", "sample_order"]

_ROUNDS = 8
_SMALL = 1024


def draw(limit: int, *key: int | str) -> int:
    """Return an integer in [0, limit), a fixed function of `limit` and the key (bias below 2^-64 * limit)."""
    text = "/".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little") % limit


def _mix(x: np.ndarray) -> np.ndarray:
    # The finaliser of splitmix64 (Steele, Lea, Flood 2014): every output bit depends on every input bit.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(indices: Int64[np.ndarray, "n"], size: int, *key: int | str) -> Int64[np.ndarray, "n"]:
    """Apply a keyed permutation of range(size) to indices.

    A balanced Feistel network over the next power of four, walked until it lands inside the range (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains"): constant memory, any size.

    Args:
        indices: values in [0, size).
        size: number of elements permuted.
        key: what the permutation depends on, e.g. seed and epoch.
    """
    assert indices.size == 0 or (indices.min() >= 0 and indices.max() < size)
    keys = np.array([draw(1 << 64, *key, round_) for round_ in range(_ROUNDS)], dtype=np.uint64)
    if size <= _SMALL:
        # Few bits a side give a Feistel network few permutations; a small range is sorted by random numbers.
        return np.argsort(_mix(_mix(np.arange(size, dtype=np.uint64) + keys[0]) ^ keys[1]), kind="stable")[indices]
    half = np.uint64(((size - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << int(half)) - 1)
    x = indices.astype(np.uint64)
    outside = np.ones(x.shape, dtype=bool)
    while outside.any():
        left, right = x[outside] >> half, x[outside] & low
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & low)
        x[outside] = (left << half) | right
        outside = x >= size
    return x.astype(np.int64)


def sample_order(
    sample_ids: Int64[np.ndarray, "n"], windows: int, seed: int
) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """Return (epoch, window) of each sample of the run."""
    epochs, places = np.divmod(sample_ids, windows)
    chosen = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = permute(places[here], windows, "order", seed, int(epoch))
    return epochs, chosen


def micro_batches(
    *, start: int, batch_size: int, rank: int = 0, world_size: int = 1, first: int = 0, stride: int = 1
) -> Iterator[Int64[np.ndarray, "batch"]]:
    """Yield, without end, the sample ids of this rank's micro-batches.

    Micro-batch m of rank r holds the samples start + (m * world_size + r) * batch_size + (0 .. batch_size - 1):
    the ranks together consume the run in order, so at equal global batch the same samples are used whatever the
    number of ranks.

    Args:
        start: samples consumed by all ranks before.
        batch_size: sequences per rank and micro-batch.
        rank: this process.
        world_size: number of processes.
        first: first micro-batch yielded (loader workers take every `stride`-th).
        stride: micro-batches from one yielded to the next.
    """
    micro = first
    while True:
        begin = start + (micro * world_size + rank) * batch_size
        yield np.arange(begin, begin + batch_size, dtype=np.int64)
        micro += stride
