"""One JSON per row: schema ``dihal.result/2``. Tables are derived from these files, never typed.

A result is self-describing: metrics with intervals, the per-document sums they come from, what it may be
compared with, what it cost, and where it came from. The dataclasses below *are* the schema: every field is
required, none else is allowed, on writing and on reading.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dihal.errors import UsageError
from dihal.evaluation.bootstrap import Interval
from dihal.evaluation.definitions import METRICS, SUMS
from dihal.evaluation.schema import from_data, to_data
from dihal.io import read_json, write_json
from dihal.meter import PARTS

__all__ = [
    "KINDS",
    "SCHEMA",
    "TEXT_FACTS",
    "BudgetTerms",
    "Comparable",
    "Cost",
    "Estimate",
    "Result",
    "TextResult",
    "TextTerms",
    "facts",
    "is_result",
    "read_result",
    "write_result",
]

SCHEMA = "dihal.result/2"

KINDS = ("checkpoint", "bound", "control", "text")
"""`checkpoint`: a trained method. `bound`: backbone and identity. `control`: floors. `text`: real continuations."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric of one row at one number of steps; null where it is undefined."""

    value: float | None
    low: float | None
    high: float | None
    difference: float | None
    """Row minus the reference row, paired by document; null for want of a reference."""
    difference_low: float | None
    difference_high: float | None

    @property
    def interval(self) -> Interval:
        """The value with its interval."""
        return Interval(value=self.value, low=self.low, high=self.high)


@dataclass(frozen=True, kw_only=True)
class TextResult:
    """Statistics of generated continuations. Perplexity means nothing without the entropy beside it."""

    samples: int
    prompt_tokens: int
    new_tokens: int
    temperature: float
    scorer: str
    """Id of the causal LM that scored the samples."""
    self_graded: bool
    """The scorer is the backbone, or of its family: it favours its own text."""
    scored_tokens: int
    """New tokens in the scorer's own tokens."""
    generative_nll: float
    """Mean NLL of the new tokens under the scorer given the prompt, nats per scorer token."""
    generative_perplexity: float
    """exp of the mean NLL."""
    entropy: float
    """Unigram entropy of a sample, mean over samples, nats over backbone tokens."""
    entropy_pooled: float
    """Unigram entropy of all samples as one text."""
    dist_1: float | None
    dist_2: float | None
    dist_3: float | None
    dist_4: float | None
    rep_2: float | None
    rep_3: float | None
    rep_4: float | None
    degenerate_rate: float
    tokens_per_second: float | None
    """New tokens of all samples over wall seconds of generation (those of every process, if several share it); null for
    real text."""
    texts: list[str]
    """The first samples, prompt and continuation separated by ' ||| '."""


@dataclass(frozen=True, kw_only=True)
class BudgetTerms:
    """What a trained row was allowed to spend: `BudgetConfig` without what is only shown."""

    name: str
    tokens: int
    seconds: float | None
    flops: float | None
    hardware: str | None
    """What it was trained on, where the budget has seconds, whose worth depends on it; else null."""


@dataclass(frozen=True, kw_only=True)
class TextTerms:
    """What a trained row was trained on, and in which order."""

    data_fingerprint: str
    """Of the training documents."""
    sequence_length: int
    seed: int
    """Of the order of sequences."""
    splice: float
    """Share of sequences put together from spans of text."""
    splice_length: int


@dataclass(frozen=True, kw_only=True)
class Comparable:
    """What must agree before two rows are ranked in one table."""

    metric_version: str
    score_type: str
    """How likelihoods arise, e.g. `teacher_forced` (each token given the true ones before it)."""
    tokenizer_fingerprint: str
    backbone_fingerprint: str
    sequence_length: int
    tokens: int
    """Tokens asked for."""
    data_fingerprint: str
    """Of the evaluated windows: token ids, documents and counted positions."""
    budget: BudgetTerms | None
    """Null for a row that was not trained, which any budget may be compared with."""
    training: TextTerms | None
    """Null for a row that was not trained."""


def facts(result: Result) -> dict[str, Any]:
    """Return what must agree between two rows, by name, causes before consequences: the first that differs is to be named.

    Names without a value are left out: a row that was not trained has neither budget nor training.
    """
    shared, found = result.comparable, {}
    for name in ("metric_version", "score_type"):
        found[name] = getattr(shared, name)
    found["regime"] = result.regime
    for name in ("tokenizer_fingerprint", "backbone_fingerprint", "sequence_length", "tokens", "data_fingerprint"):
        found[name] = getattr(shared, name)
    for group in ("budget", "training"):
        terms = getattr(shared, group)
        if terms is not None:
            found |= {f"{group}.{field.name}": getattr(terms, field.name) for field in fields(terms)}
    # Ranks and intervals of one table come from one set of resamples.
    return found | {name: getattr(result, name) for name in ("confidence", "bootstrap", "bootstrap_seed")}


TEXT_FACTS = ("scorer", "samples", "prompt_tokens", "new_tokens", "temperature")
"""Fields of :class:`TextResult` that must agree between rows ranked by a text metric."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the row cost; null where it does not apply, or was not metered."""

    trainable_parameters: int | None
    frozen_parameters: int | None
    """Backbone parameters still needed at inference."""
    diffused_tokens: int | None
    """Positions denoised in training."""
    unique_tokens: int | None
    """Distinct tokens of the training text among them; an upper bound where sequences are spliced."""
    train_flops: dict[str, float] | None
    """FLOPs of training as executed, forward and backward, by part of `dihal.meter.PARTS`."""
    train_seconds: float | None
    train_peak_memory: int | None
    """Bytes of one process."""
    train_hardware: str | None
    tuning_trials: int | None
    """Configurations tried for this method (`BudgetConfig.trials`); null: not recorded."""
    nfe: dict[str, int]
    """Denoiser evaluations per position, by number of steps."""
    sampling_flops: dict[str, float]
    """FLOPs per predicted token of a whole window: state, suffix and head, by number of steps ("0": the row does not
    sample); empty where they are not counted."""
    evaluation_seconds: dict[str, float]
    """Wall seconds of the row's own states and suffix over the whole evaluation (those of every process, if several share
    it), by number of steps."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row."""

    schema: str
    name: str
    method: str
    kind: str
    """One of :data:`KINDS`."""
    split: int | None
    regime: str
    metrics: dict[str, dict[str, Estimate]]
    """By number of sampling steps ("0": the row does not sample), then by metric name."""
    per_document: dict[str, dict[str, list[float]]]
    """By number of steps, then by sum (see `definitions.SUMS`): one number per document, in one order for all rows."""
    documents: list[str]
    """Keys of the documents."""
    text: dict[str, TextResult]
    """By number of steps; empty where nothing was generated."""
    confidence: float
    bootstrap: int
    bootstrap_seed: int
    reference: str
    comparable: Comparable
    cost: Cost
    checkpoint: dict[str, Any] | None
    """Path, step, tokens, samples seen, manifest hash."""
    config: dict[str, Any]
    """Resolved evaluation configuration."""
    config_hash: str
    """Hash of what decides this row's numbers: evaluation options, fingerprints, checkpoint."""
    train_config: dict[str, Any] | None
    train_config_hash: str | None
    backbone: dict[str, Any]
    """Reference of the backbone."""
    details: dict[str, Any]
    """Definitions and counts worth reading beside the numbers (sink policy, parity, warnings)."""
    provenance: dict[str, Any]
    command: str


def _check(result: Result, where: str) -> None:
    def require(valid: bool, message: str) -> None:
        if not valid:
            raise UsageError(f"{where}: {message}. Write the file again with `dihal evaluate`.")

    require(result.schema == SCHEMA, f"schema is {result.schema!r}, this version reads {SCHEMA!r}")
    unknown = sorted(set(result.cost.train_flops or {}) - set(PARTS))
    require(not unknown, f"cost.train_flops: unknown part {', '.join(map(repr, unknown))}")
    require(result.kind in KINDS, f"kind {result.kind!r} is none of {', '.join(KINDS)}")
    require(bool(result.metrics), "metrics is empty")
    for field, names, blocks in (
        ("metrics", set(METRICS), result.metrics),
        ("per_document", set(SUMS), result.per_document),
    ):
        for steps, block in blocks.items():
            require(steps.isdigit(), f"{field}: {steps!r} is not a number of steps")
            extra, lacking = sorted(set(block) - names), sorted(names - set(block))
            require(not extra, f"{field}.{steps}: unknown field {', '.join(map(repr, extra))}")
            require(not lacking, f"{field}.{steps}: missing field {', '.join(map(repr, lacking))}")
    for steps, block in result.per_document.items():
        require(steps in result.metrics, f"per_document.{steps} has no metrics")
        for name, values in block.items():
            require(
                len(values) == len(result.documents),
                f"per_document.{steps}.{name} has {len(values)} numbers for {len(result.documents)} documents",
            )
            require(all(map(math.isfinite, values)), f"per_document.{steps}.{name} holds numbers that are not finite")


def write_result(path: str | Path, result: Result) -> None:
    """Validate, then write atomically.

    Raises:
        UsageError: the result breaks its own schema, or the file cannot be written.
    """
    data = to_data(result)
    _check(from_data(Result, data, str(path)), str(path))
    write_json(path, data)


def is_result(data: Any) -> bool:
    """Whether JSON data claims to be a result of some version."""
    return isinstance(data, dict) and str(data.get("schema", "")).startswith("dihal.result/")


def read_result(path: str | Path) -> Result:
    """Read and validate one result.

    Raises:
        UsageError: missing, not JSON, not a result, of another version, or a field unknown, missing or mistyped.
    """
    data = read_json(path)
    if not is_result(data):
        raise UsageError(f"{str(path)!r} is not a DiHAL result (no schema {SCHEMA!r}). Give files of `dihal evaluate`.")
    if data["schema"] != SCHEMA:
        raise UsageError(f"{path}: schema is {data['schema']!r}, this version reads {SCHEMA!r}. Evaluate again.")
    result = from_data(Result, data, str(path))
    _check(result, str(path))
    return result
