"""A sweep made by hand: known truths and predictors of a model with any number of layers."""

from __future__ import annotations

import numpy as np

from dihal.sweep.predictors import PROXIES, Predictor
from dihal.sweep.report import DEFINITIONS, SweepReport, predictor_record, related, truth_baseline
from dihal.sweep.truth import Truth, truth_record

RESAMPLES = 40


def predictor(
    name: str,
    values: np.ndarray,
    *,
    group: str = "proxy",
    sign: float = 1.0,
    spread: float | None = None,
    seed: int = 0,
) -> Predictor:
    """``spread``: deviation of its resamples; None: it has none."""
    noise = np.random.default_rng(seed).normal(size=(RESAMPLES, len(values)))
    return Predictor(
        name=name,
        group=group,
        label=f"the {name}",
        sign=sign,
        definition="made by hand",
        values=np.asarray(values, float),
        resampled=None if spread is None else values + spread * noise,
    )


def truth(name: str, values: np.ndarray, *, spread: float = 0.0, seed: int = 1) -> Truth:
    noise = np.random.default_rng(seed).normal(size=(RESAMPLES, len(values)))
    values = np.asarray(values, float)
    return Truth(
        name=name,
        label=name.upper(),
        unit="nats",
        definition="made by hand",
        values=values,
        resampled=values + spread * noise,
        per_seed=values[None],
    )


def proxies(layers: int, seed: int, kind: str = "rms") -> list[Predictor]:
    """Random proxies and their score."""
    rows = np.random.default_rng(seed).normal(size=(3, layers))
    found = [predictor(f"{name}/{kind}", row, spread=0.1, seed=i) for i, (name, row) in enumerate(zip(PROXIES, rows))]
    return [*found, predictor(f"score/{kind}", rows.sum(0), group="score", spread=0.1)]


def report(
    predictors: list[Predictor],
    truths: list[Truth],
    *,
    splits: list[int] | None = None,
    regime: str = "replace",
    model: str = "model",
) -> SweepReport:
    layers = len(predictors[0].values)
    splits = list(range(layers)) if splits is None else splits
    candidates = [split for split in splits if split > 0]
    return SweepReport(
        regime=regime,
        truth=truths[0].name,
        splits=splits,
        candidates=candidates,
        seeds=[0],
        truths={
            item.name: {**truth_record(item, 0.9), **truth_baseline(item, splits, candidates, 0.9)} for item in truths
        },
        predictors={item.name: predictor_record(item, 0.9) for item in predictors},
        relations={item.name: related(predictors, item, splits, candidates, 0.9) for item in truths},
        transfer=None,
        backbone={"id": model},
        backbone_fingerprint=f"fingerprint of {model}",
        method={"name": "bridge", "space": "hidden"},
        budget={"name": "tiny", "tokens": 1000, "spent": {}},
        data={"scored": {"tokens": 500, "documents": 9}, "held_out_documents": 7},
        confidence=0.9,
        bootstrap=RESAMPLES,
        definitions=DEFINITIONS,
        config={},
        provenance={},
    )
