"""Sums -> result files: metrics with intervals, paired differences, provenance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dihal.config import EvalConfig
from dihal.evaluation.bootstrap import difference, document_weights, estimate
from dihal.evaluation.cost import sampling_flops
from dihal.evaluation.definitions import METRICS
from dihal.evaluation.measure import Measured
from dihal.evaluation.result import SCHEMA, Comparable, Cost, Estimate, Result, TextResult
from dihal.evaluation.rows import NO_SAMPLING, Row
from dihal.io import hash_json
from dihal.provenance import provenance

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.data.module import TextDataModule
    from dihal.data.packing import EvaluationWindows

__all__ = ["Context", "assemble", "context_of", "estimates"]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What all rows of one evaluation share."""

    config: EvalConfig
    resolved: dict[str, Any]
    documents: list[str]
    weights: np.ndarray
    """Resample weights: one draw for all rows, so that differences are paired."""
    reference: dict[str, np.ndarray]
    backbone: dict[str, Any]
    details: dict[str, Any]
    provenance: dict[str, Any]
    sampling_flops: Callable[[Row], dict[str, float]]


def context_of(
    config: EvalConfig,
    *,
    backbone: Backbone,
    data: TextDataModule,
    windows: EvaluationWindows,
    facts: dict[str, Any],
    reference: dict[str, np.ndarray],
) -> Context:
    """Collect what all rows share; draws the resample weights."""
    resolved = asdict(replace(config, data=data.config))
    return Context(
        config=config,
        resolved=resolved,
        documents=[document.key for document in windows.documents],
        weights=document_weights(len(windows.documents), config.bootstrap, config.seed),
        reference=reference,
        backbone=asdict(backbone.reference),
        details={
            **facts,
            "windows": len(windows),
            "predicted_tokens": sum(document.tokens for document in windows.documents),
            "data": data.fingerprint(),
            "metrics": {name: metric.definition for name, metric in METRICS.items()},
        },
        provenance=provenance(),
        sampling_flops=partial(sampling_flops, backbone, length=data.config.sequence_length),
    )


def estimates(
    sums: dict[str, np.ndarray], reference: dict[str, np.ndarray], weights: np.ndarray, confidence: float
) -> dict[str, Estimate]:
    """Return every metric with its interval and its paired difference against the reference."""
    found = {}
    for name, metric in METRICS.items():
        own = estimate(metric, sums, weights, confidence)
        apart = difference(metric, sums, reference, weights, confidence)
        found[name] = Estimate(
            value=own.value,
            low=own.low,
            high=own.high,
            difference=apart.value,
            difference_low=apart.low,
            difference_high=apart.high,
        )
    return found


def _undefined() -> dict[str, Estimate]:
    blank = Estimate(value=None, low=None, high=None, difference=None, difference_low=None, difference_high=None)
    return dict.fromkeys(METRICS, blank)


def assemble(
    row: Row,
    measured: dict[str, Measured],
    text: dict[str, TextResult],
    comparable: Comparable,
    config_hash: str,
    context: Context,
) -> Result:
    """Make the result of one row.

    Args:
        row: the row.
        measured: its sums by number of steps; empty for real text, whose metrics are all null.
        text: statistics of its continuations by number of steps.
        comparable: what it may be compared with.
        config_hash: hash of what decides its numbers.
        context: what all rows share.
    """
    config = context.config
    metrics = {
        steps: estimates(found.sums, context.reference, context.weights, config.confidence)
        for steps, found in measured.items()
    }
    trained = row.trained
    train_config = None if trained is None else asdict(trained.config)
    state = {} if trained is None else trained.checkpoint.state
    ledger = state.get("budget", {})
    return Result(
        schema=SCHEMA,
        name=row.name,
        method=row.method,
        kind=row.kind,
        split=row.split,
        regime="replace" if trained is None else trained.config.method.regime,
        metrics=metrics or {str(NO_SAMPLING): _undefined()},
        per_document={
            steps: {name: values.tolist() for name, values in found.sums.items()} for steps, found in measured.items()
        },
        documents=context.documents,
        text=text,
        confidence=config.confidence,
        bootstrap=config.bootstrap,
        bootstrap_seed=config.seed,
        reference=config.reference,
        comparable=comparable,
        cost=Cost(
            trainable_parameters=row.trainable_parameters,
            frozen_parameters=row.frozen_parameters,
            diffused_tokens=state.get("tokens"),
            unique_tokens=ledger.get("unique_tokens"),
            train_flops=state.get("flops"),
            train_seconds=state.get("seconds"),
            train_peak_memory=state.get("peak_memory"),
            train_hardware=None if trained is None else trained.hardware,
            tuning_trials=None if trained is None else trained.config.budget.trials,
            nfe=row.nfe,
            sampling_flops=context.sampling_flops(row),
            evaluation_seconds={steps: found.seconds for steps, found in measured.items() if row.source is not None},
        ),
        checkpoint=None if trained is None else trained.identity(),
        config=context.resolved,
        config_hash=config_hash,
        train_config=train_config,
        train_config_hash=None if train_config is None else hash_json(train_config),
        backbone=context.backbone,
        details={**context.details, "notes": list(row.notes)},
        provenance=context.provenance,
        command=context.provenance["command"],
    )
