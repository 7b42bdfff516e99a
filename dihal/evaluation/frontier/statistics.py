"""Statistics of token ids that need no model: self-BLEU, and 4-grams known from training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Integer, UInt64

from dihal.errors import UsageError

__all__ = ["GRAM", "TrainingGrams", "self_bleu"]

GRAM = 4
"""Length of the n-grams looked up in the training text, and the longest of BLEU."""

_SMOOTHING = 0.1


def _grams(ids: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))


def self_bleu(samples: Sequence[Sequence[int]]) -> float | None:
    """Return the mean BLEU-4 of each sample with all others as references (Zhu et al. 2018); None below two samples.

    Precisions are clipped by the largest count in any one reference, weights are uniform over 1- to 4-grams, a zero
    count is replaced by 0.1 (Chen & Cherry 2014, method 1). All samples have one length, so there is no brevity
    penalty.

    Raises:
        UsageError: samples of unlike lengths, or shorter than four tokens.
    """
    lengths = {len(ids) for ids in samples}
    if len(lengths) > 1 or (lengths and min(lengths) < GRAM):
        raise UsageError(f"self-BLEU needs samples of one length of at least {GRAM} tokens, got {sorted(lengths)}.")
    if len(samples) < 2:
        return None
    logs = np.zeros(len(samples))
    for n in range(1, GRAM + 1):
        counts = [_grams(ids, n) for ids in samples]
        # The largest count over the *other* samples follows from the two largest over all: no pairs are compared.
        first: dict[tuple[int, ...], tuple[int, int]] = {}
        second: dict[tuple[int, ...], int] = {}
        for index, found in enumerate(counts):
            for gram, count in found.items():
                best = first.get(gram, (0, -1))[0]
                if count > best:
                    second[gram] = best
                    first[gram] = (count, index)
                elif count > second.get(gram, 0):
                    second[gram] = count
        for index, found in enumerate(counts):
            total = sum(found.values())
            clipped = sum(
                min(count, second.get(gram, 0) if first[gram][1] == index else first[gram][0])
                for gram, count in found.items()
            )
            logs[index] += math.log((clipped or _SMOOTHING) / total) / GRAM
    return float(np.exp(logs).mean())


def _mix(words: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    # splitmix64 (Steele et al. 2014): a bijection of 64-bit words that spreads every bit.
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _keys(tokens: Integer[np.ndarray, "... length"]) -> UInt64[np.ndarray, "... grams"]:
    words = tokens.astype(np.uint64)
    count = words.shape[-1] - GRAM + 1
    key = np.zeros((*words.shape[:-1], max(count, 0)), dtype=np.uint64)
    for place in range(GRAM):
        key = _mix(key + words[..., place : place + max(count, 0)] + np.uint64(0x9E3779B97F4A7C15))
    return key


class TrainingGrams:
    """The 4-grams of the training documents, as a sorted array of 64-bit hashes.

    Two different 4-grams share a hash with probability 2^-64: over ten million of training and a million looked up
    a wrong hit has a chance of one in a million.

    Args:
        tokens: ids of all documents, one after the other.
        ends: exclusive end of each document; no 4-gram crosses it.
    """

    def __init__(self, tokens: Integer[np.ndarray, " tokens"], ends: Integer[np.ndarray, " documents"]) -> None:
        keys = _keys(tokens)
        crosses = np.zeros(len(keys) + GRAM, dtype=bool)
        for back in range(1, GRAM):
            starts = np.asarray(ends)[:-1] - back
            crosses[starts[starts >= 0]] = True
        self._keys = np.unique(keys[~crosses[: len(keys)]])

    def __len__(self) -> int:
        """Distinct 4-grams."""
        return len(self._keys)

    def known(self, samples: Integer[np.ndarray, "samples length"]) -> Bool[np.ndarray, "samples grams"]:
        """Whether each 4-gram of each sample occurs in a training document."""
        keys = _keys(samples)
        if not len(self._keys):
            return np.zeros(keys.shape, dtype=bool)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return self._keys[places] == keys
