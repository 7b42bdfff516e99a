"""Frontier rows made by hand: known NLL and agreement at known entropies, every document alike or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dihal.config import BudgetConfig, MethodConfig, TrainConfig
from dihal.config.convert import to_dict
from dihal.evaluation.frontier.assemble import resample_weights, with_intervals
from dihal.evaluation.frontier.definitions import FRONTIER_VERSION, SAMPLE_SUMS, SCORE_TYPE, SET_METRICS
from dihal.evaluation.frontier.result import SCHEMA, Comparable, FrontierRow, Point
from dihal.evaluation.result import BudgetTerms, TextTerms
from dihal.io import hash_json

SAMPLES, NEW = 12, 16

BUDGET = BudgetTerms(name="compare", tokens=100_000_000, seconds=None, flops=None, hardware=None)
TRAINING = TextTerms(data_fingerprint="text", sequence_length=128, seed=0, splice=0.0, splice_length=32)


def train_config(seed: int = 0, *, out: str | None = None, method: dict[str, Any] | None = None) -> TrainConfig:
    """A `generate` run of that seed into a folder of its own."""
    return TrainConfig(
        seed=seed,
        out=out or f"runs/write-{seed}",
        method=MethodConfig(regime="generate", split=8, **(method or {})),
        budget=BudgetConfig(name=BUDGET.name, tokens=BUDGET.tokens),
    )


def _point(steps: int, temperature: float, entropy: float, nll: float, agreement: float, noise: float) -> Point:
    spread = noise * np.random.default_rng(3).standard_normal(SAMPLES)
    numbers = {name: [0.0] * SAMPLES for name in SAMPLE_SUMS}
    numbers |= {
        "nll": (NEW * (nll + spread - spread.mean())).tolist(),
        "scored": [float(NEW)] * SAMPLES,
        "entropy": [entropy] * SAMPLES,
        "entropy_scorer": [entropy] * SAMPLES,
        "agreement": [NEW * agreement] * SAMPLES,
        "self_agreement": [],
    }
    return Point(
        steps=steps,
        temperature=temperature,
        metrics={},
        set_metrics={name: [0.5] for name in SET_METRICS},
        missing={},
        per_sample=numbers,
        seconds=2.0,
        tokens_per_second=96.0,
        nfe=steps or None,
        encodes=0,
        reads=1,
        flops_per_token=3e9,
        texts=["a prompt ||| and its continuation"],
    )


def make_row(
    name: str,
    points: Sequence[tuple[float, float, float]],
    *,
    kind: str = "checkpoint",
    steps: Sequence[int] = (16,),
    train: TrainConfig | None = None,
    writing: dict[str, Any] | None = None,
    noise: float = 0.0,
    tokens: int = BUDGET.tokens,
) -> FrontierRow:
    """A valid row with `points` (entropy, NLL, agreement), the same at every number of steps.

    Args:
        name: of the row.
        points: in the order of temperature.
        kind: `checkpoint`, or what was not trained.
        steps: numbers of steps of a checkpoint.
        train: its training configuration; None: of seed 0.
        writing: what its variant changes.
        noise: deviation of the NLL over documents.
        tokens: diffused in training.
    """
    trained = kind == "checkpoint"
    config = to_dict(train or train_config()) if trained else None
    row = FrontierRow(
        schema=SCHEMA,
        name=name,
        method="bridge" if trained else name,
        kind=kind,
        regime="generate" if trained else None,
        space=config["method"]["space"] if config else None,
        split=8 if trained else None,
        writing=(writing or {}) if trained else None,
        points=[],
        planned=len(points) * (len(steps) if trained else 1),
        documents=list(range(SAMPLES)),
        document_keys=[f"d{index}" for index in range(SAMPLES)],
        confidence=0.95,
        bootstrap=60,
        bootstrap_seed=0,
        self_graded=True,
        scorer_vocab=49_152,
        comparable=Comparable(
            metric_version=FRONTIER_VERSION,
            score_type=SCORE_TYPE,
            tokenizer_fingerprint="tok",
            backbone_fingerprint="bb",
            scorer="embedded",
            scorer_fingerprint="bb",
            samples=SAMPLES,
            prompt_tokens=8,
            new_tokens=NEW,
            seeds=[0],
            data_fingerprint="prompts",
            training_text="text",
            budget=BUDGET if trained else None,
            training=TRAINING if trained else None,
        ),
        cost={"trainable_parameters": 73_000_000, "diffused_tokens": tokens} if trained else {},
        checkpoint={"path": name, "sha256": name, "weights": "ema"} if trained else None,
        config={},
        row_hash=name,
        train_config=config,
        train_config_hash=None if config is None else hash_json(config),
        backbone={"id": "embedded", "dtype": "float32"},
        details={},
        provenance={"commit": "0" * 40, "dirty": False},
        command="dihal frontier",
    )
    weights = resample_weights(row)
    made = [
        with_intervals(row, _point(count, 0.5 + place / 4, *values, noise), weights)
        for count in (steps if trained else (0,))
        for place, values in enumerate(points)
    ]
    return dataclasses.replace(row, points=made)


def line(nll: float, agreement: float = 0.2, *, to: float = 4.0) -> list[tuple[float, float, float]]:
    """Two points, at entropies 3 and `to`, with NLL `nll` + (entropy - 3)."""
    return [(3.0, nll, agreement), (to, nll + to - 3.0, agreement)]


def bounds() -> list[FrontierRow]:
    """Real text and the backbone."""
    return [
        make_row("real text", [(3.9, 3.5, 0.4)], kind="text"),
        make_row("backbone", line(3.0, 0.35), kind="bound"),
    ]
