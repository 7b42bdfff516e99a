"""Continuations of one point -> metrics with intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from dihal.evaluation.bootstrap import document_weights, estimate
from dihal.evaluation.frontier.definitions import METRICS, SAMPLE_SUMS, SET_METRICS
from dihal.evaluation.frontier.distances import MAUVE_FEWEST, MAUVE_MISSING, RealFeatures, mauve_score
from dihal.evaluation.frontier.result import FrontierRow, Point
from dihal.evaluation.frontier.scoring import Graded
from dihal.evaluation.frontier.statistics import GRAM, TrainingGrams, self_bleu
from dihal.evaluation.text import degenerate, repetition_n, text_metrics, unigram_entropy

if TYPE_CHECKING:
    from dihal.config.frontier import FrontierConfig
    from dihal.evaluation.frontier.sources import Made

__all__ = ["Yardstick", "per_sample", "resample_weights", "set_metrics", "with_intervals"]

REFERENCE = "this row is the reference"
SWITCHED_OFF = "switched off by `mauve`"
TOO_SHORT = "the continuations are too short"

_DECIMALS = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Yardstick:
    """What every set of continuations is compared with."""

    grams: TrainingGrams
    end_token_id: int | None
    real: Graded
    """Of the real continuations of the same prompts."""
    channels: int
    """Directions of the Frechet distance."""

    @cached_property
    def features(self) -> RealFeatures:
        """Those of the real continuations, ready to be compared with."""
        return RealFeatures(self.real.mean, channels=self.channels)


def per_sample(made: Made, graded: Graded, yardstick: Yardstick) -> dict[str, list[float]]:
    """Return the numbers of `definitions.SAMPLE_SUMS` of every continuation.

    They are rounded to what the file holds before anything is computed from them.
    """
    rows = made.tokens.tolist()
    columns: dict[str, list[float]] = {
        "nll": graded.nll.tolist(),
        "scored": graded.scored.tolist(),
        "entropy": [unigram_entropy(ids) for ids in rows],
        "entropy_scorer": graded.entropy.tolist(),
        "agreement": graded.agreement.tolist(),
        "self_agreement": [] if made.agreement is None else made.agreement.tolist(),
        "memorised": yardstick.grams.known(made.tokens.numpy()).sum(-1).tolist(),
        "degenerate": [float(degenerate(ids)) for ids in rows],
        "ended": [float(yardstick.end_token_id in ids) for ids in rows],
    }
    for n in (2, 3, 4):
        # A text shorter than n repeats nothing.
        columns[f"rep_{n}"] = [repetition_n(ids, n) or 0.0 for ids in rows]
    return {name: [round(float(value), _DECIMALS) for value in columns[name]] for name in SAMPLE_SUMS}


def set_metrics(
    made: Made, graded: Graded, yardstick: Yardstick, config: FrontierConfig, *, seed: int, reference: bool
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Return `definitions.SET_METRICS` of one seed's continuations, and why any is null.

    Args:
        made, graded: the continuations.
        yardstick: the real continuations' features.
        config: size of the subsample.
        seed: of the clustering inside MAUVE.
        reference: these are the real continuations: distances to themselves are left out.
    """
    rows = made.tokens.tolist()
    values: dict[str, float | None] = dict.fromkeys(SET_METRICS)
    described = text_metrics(rows)
    values |= {name: described[name] for name in SET_METRICS if name in described}
    missing = {name: TOO_SHORT for name, value in values.items() if name in described and value is None}

    def fill(name: str, compute: Callable[[], float | None], reason: str) -> None:
        values[name] = compute()
        if values[name] is None:
            missing[name] = reason

    if len(rows[0]) < GRAM:
        missing["self_bleu"] = TOO_SHORT
    else:
        fill("self_bleu", lambda: self_bleu(rows[: config.self_bleu_samples]), "one continuation only")
    if reference or len(rows) < 2:
        reason = REFERENCE if reference else "one continuation only"
        missing |= {"frechet": reason, "mauve": reason}
    else:
        fill("frechet", lambda: yardstick.features.distance(graded.mean), "")
        if len(rows) < MAUVE_FEWEST:
            missing["mauve"] = f"it needs {MAUVE_FEWEST} texts a side"
        elif config.mauve:
            fill("mauve", lambda: mauve_score(graded.last, yardstick.real.last, seed=seed), MAUVE_MISSING)
        else:
            missing["mauve"] = SWITCHED_OFF
    return values, missing


def with_intervals(row: FrontierRow, point: Point, weights: Float[np.ndarray, "resamples documents"]) -> Point:
    """Return the point with its metrics computed from its per-sample numbers."""
    sums = row.sums(point)
    metrics = {name: estimate(metric, sums, weights, row.confidence) for name, metric in METRICS.items()}
    return replace(point, metrics=metrics)


def resample_weights(row: FrontierRow) -> Float[np.ndarray, "resamples documents"]:
    """How often each resample drew each document; the same for all rows of the same prompts."""
    return document_weights(len(row.document_keys), row.bootstrap, row.bootstrap_seed)
