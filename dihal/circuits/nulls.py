"""What overlap is worth without any shared mechanism, and what it is worth with one: nulls and ceilings.

*Chance.* Two uniform sets of K edges share K^2 / E.

*Layer-preserving null.* Two circuits of a decoder resemble each other because both use the layers that do the work.
Permute one of them within blocks of edges that have the writer's and the reader's layer in common (and, stricter,
the kinds of both): per block the shared edges are then hypergeometric, so that draws need no permutation of the table.

*Ceiling.* The same model on other prompts: split halves. For two models sqrt(J_AA J_BB), to be held against the
overlap of A's one half with B's other half, which has the same noise and shares no prompt either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import hypergeom

from dihal.circuits.graph import GraphSpec
from dihal.circuits.overlap import Chosen, edge_values, jaccard, jaccards, part_weights, resampled_edges, top_edges
from dihal.circuits.types import EdgeScores
from dihal.random import uniform

__all__ = ["Halves", "Null", "blocks_of", "halves", "permutation_null", "stability"]

Null = Literal["layer", "kind"]


def blocks_of(spec: GraphSpec, null: Null = "layer") -> Int[np.ndarray, " edges"]:
    """Block of each edge: the pair of its layers; under `kind` also which kind of writer and which slot of reader."""
    writer = spec.layer_of_writer - spec.layer_of_writer.min()
    reader = spec.layer_of_reader - spec.layer_of_reader.min()
    if null == "kind":
        writer_kind = np.array(["input", *spec.writers[1:]], dtype=object)
        kinds = np.array([0 if name == "input" else 1 if ".h" in name else 2 for name in writer_kind])
        slots = {"q": 0, "k": 1, "v": 2}
        reads = np.array([slots.get(name[-2], 3) if name.endswith(">") else 3 for name in spec.readers])
        writer, reader = writer * 3 + kinds, reader * 4 + reads
    table = writer[:, None] * (reader.max() + 1) + reader[None, :]
    return np.unique(table[spec.edge_mask], return_inverse=True)[1]


def permutation_null(
    one: Chosen, other: Chosen, blocks: Int[np.ndarray, " edges"], resamples: int, seed: int
) -> Float[np.ndarray, " resamples"]:
    """J when the edges of one circuit are permuted within blocks; one value per draw.

    Exact in distribution: with a of n edges of a block in one circuit and b in the other, they share a
    hypergeometric number of edges, independently over blocks.
    """
    sizes = np.bincount(blocks)
    first, second = (np.bincount(blocks, weights=chosen, minlength=len(sizes)).astype(int) for chosen in (one, other))
    used = np.flatnonzero((first > 0) & (second > 0))
    shared = np.zeros(resamples)
    if len(used):
        draws = uniform(seed, torch.arange(resamples), "circuits-null", (len(used),), dtype=torch.float64).numpy()
        for column, block in enumerate(used):
            support = np.arange(min(first[block], second[block]) + 1)
            below = hypergeom.cdf(support, sizes[block], first[block], second[block])
            shared += np.minimum(np.searchsorted(below, draws[:, column]), support[-1])
    return shared / (one.sum() + other.sum() - shared)


@dataclass(frozen=True, kw_only=True)
class Halves:
    """Overlaps between disjoint halves of the prompts, at one K."""

    first: float
    """J_AA: even against odd sample ids in the first model."""
    second: float
    """J_BB: the same in the second."""
    across: float
    """Mean J of one model's half with the other model's other half."""

    @property
    def ceiling(self) -> float:
        """sqrt(J_AA J_BB)."""
        return float(np.sqrt(self.first * self.second))


def halves(first: EdgeScores, second: EdgeScores, ks: Int[np.ndarray, " budgets"]) -> list[Halves]:
    """Split-half overlaps at each K.

    Raises:
        UsageError: scores without parts, or a half without prompts.
    """
    a, b = ([edge_values(s.spec, half) for half in s.halves] for s in (first, second))
    found = []
    for k in ks:
        tops_a, tops_b = ([top_edges(half, int(k)) for half in pair] for pair in (a, b))
        across = [jaccard(tops_a[0], tops_b[1]), jaccard(tops_a[1], tops_b[0])]
        found.append(Halves(first=jaccard(*tops_a), second=jaccard(*tops_b), across=float(np.mean(across))))
    return found


def stability(
    scores: EdgeScores, ks: Int[np.ndarray, " budgets"], resamples: int, seed: int
) -> Float[np.ndarray, "resamples budgets"]:
    """J of a model's own circuit with that of each bootstrap resample of its prompts, at each K."""
    values = edge_values(scores.spec, scores.scores)
    weights = part_weights(scores.part_counts, resamples, seed)
    return np.array([jaccards(values, resampled_edges(scores, row), ks) for row in weights])
