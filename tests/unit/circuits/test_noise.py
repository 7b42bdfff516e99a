"""Noise of known size at the seam of a model that has learned a task: which edges matter changes first, what they do later."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from dihal.circuits.attribute import attribute
from dihal.circuits.evaluate import ends, faithfulness, run_circuits
from dihal.circuits.overlap import edge_values, jaccard, top_edges
from dihal.circuits.seam import perturbed
from dihal.circuits.types import Circuit, EdgeScores, PairBatch
from tests.unit.circuits.models import float64_model, random_pairs

SEAM = 1
SIZES = (0.1, 0.3, 1.0)
SHARE = 0.3
"""Of all edges: enough to carry the task."""


def recall_pairs(n: int, seed: int) -> PairBatch:
    """The third of seven tokens is the answer; another one stands there in the corrupted prompt."""
    drawn = random_pairs(n, 7, seed=seed)
    words, first = 8, 3
    clean = drawn.clean % words + first
    corrupted = clean.clone()
    corrupted[:, 2] = (clean[:, 2] - first + 1 + drawn.answers[:, 0, 0] % (words - 1)) % words + first
    answers, foils = clean[:, 2, None, None], corrupted[:, 2, None, None]
    return dataclasses.replace(drawn, clean=clean, corrupted=corrupted, answers=answers, foils=foils)


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny model that has learned the task, in seconds; in float64, so that it is the same one everywhere."""
    made = float64_model(layers=4)
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    for step in range(200):
        batch = recall_pairs(32, 100 + step)
        loss = torch.nn.functional.cross_entropy(made(batch.clean).logits[:, -1], batch.answers[:, 0, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return made.requires_grad_(False)


@pytest.mark.parametrize("shared", [True, False])
def test_overlap_falls_with_noise_and_transfer_later(model: Any, shared: bool) -> None:
    pairs = [recall_pairs(32, 0)]
    own = attribute(model, pairs, seam=SEAM, path="seam")
    assert own.accuracy > 0.9
    k = round(SHARE * own.spec.n_edges)
    circuit = own.top(k)

    def overlap(other: EdgeScores) -> float:
        one, two = (top_edges(edge_values(scores.spec, scores.scores), k) for scores in (own, other))
        return jaccard(one, two)

    def transfer(noisy: Any, found: EdgeScores) -> float:
        """Faithfulness of the circuit of the model without noise, run in the one with noise."""
        moved = Circuit(spec=found.spec, edges=circuit.edges)
        values = run_circuits(noisy, pairs, [moved])
        return float(faithfulness(values, ends(noisy, pairs, found.spec))[0])

    overlaps, transfers, gaps = [1.0], [], [own.clean - own.corrupted]
    for size in SIZES:
        noisy = perturbed(model, SEAM, size, shared=shared)
        found = attribute(noisy, pairs, path="seam")
        overlaps.append(overlap(found))
        transfers.append(transfer(noisy, found))
        gaps.append(found.clean - found.corrupted)
    assert np.all(np.diff(overlaps) < 0)
    assert overlaps[-1] < 0.7
    # The circuit still does its work where a third of its edges is no longer among the highest.
    assert min(transfers) > 0.85
    assert np.all(np.array(transfers) > np.array(overlaps[1:]))
    # And the noise is no small one: the task suffers.
    assert np.all(np.diff(gaps) < 0)
    assert 0 < gaps[-1] < 0.75 * gaps[0]
