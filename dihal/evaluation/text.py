"""Statistics of generated token ids. None of them needs a model.

Entropies and n-gram statistics depend on the tokenizer and on the length: compare only equal ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from dihal.errors import UsageError

__all__ = [
    "DEGENERATE_DISTINCT",
    "DEGENERATE_REP4",
    "degenerate",
    "distinct_n",
    "repetition_n",
    "text_metrics",
    "unigram_entropy",
]

DEGENERATE_REP4 = 0.5
"""A sample is degenerate if more than this share of its 4-grams repeat an earlier one ..."""
DEGENERATE_DISTINCT = 0.125
"""... or if it has fewer distinct tokens than this share of its length."""


def _ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def unigram_entropy(ids: Sequence[int]) -> float:
    """Return the entropy of the token frequencies of one sample, in nats, in [0, log len(ids)]."""
    total = len(ids)
    return abs(-sum(c / total * math.log(c / total) for c in Counter(ids).values()))


def distinct_n(samples: Sequence[Sequence[int]], n: int) -> float | None:
    """Return distinct n-grams over all n-grams, pooled over samples (Li et al. 2016); None where none exists."""
    grams = [gram for ids in samples for gram in _ngrams(ids, n)]
    return len(set(grams)) / len(grams) if grams else None


def repetition_n(ids: Sequence[int], n: int) -> float | None:
    """Return 1 - distinct/all n-grams of one sample (Welleck et al. 2020), in [0, 1); None if shorter than n."""
    grams = _ngrams(ids, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else None


def degenerate(ids: Sequence[int]) -> bool:
    """Return whether a sample is degenerate: see :data:`DEGENERATE_REP4` and :data:`DEGENERATE_DISTINCT`."""
    repeated = repetition_n(ids, 4)
    return (repeated is not None and repeated > DEGENERATE_REP4) or len(set(ids)) < DEGENERATE_DISTINCT * len(ids)


def text_metrics(samples: Sequence[Sequence[int]]) -> dict[str, float | None]:
    """Return the statistics of a set of samples.

    Args:
        samples: token ids of each continuation, without its prompt; all of one length.

    Returns:
        ``entropy`` (mean over samples, nats), ``entropy_pooled`` (all samples as one), ``dist_1`` .. ``dist_4``,
        ``rep_2`` .. ``rep_4`` (means over samples), ``degenerate_rate``.

    Raises:
        UsageError: no sample, an empty one, or unlike lengths.
    """
    lengths = {len(ids) for ids in samples}
    if len(lengths) != 1 or 0 in lengths:
        raise UsageError(f"text metrics need samples of one non-zero length, got lengths {sorted(lengths)}.")
    values: dict[str, float | None] = {
        "entropy": sum(unigram_entropy(ids) for ids in samples) / len(samples),
        "entropy_pooled": unigram_entropy([token for ids in samples for token in ids]),
    }
    for n in (1, 2, 3, 4):
        values[f"dist_{n}"] = distinct_n(samples, n)
    for n in (2, 3, 4):
        repeated = [value for ids in samples if (value := repetition_n(ids, n)) is not None]
        values[f"rep_{n}"] = sum(repeated) / len(repeated) if repeated else None
    values["degenerate_rate"] = sum(degenerate(ids) for ids in samples) / len(samples)
    return values
