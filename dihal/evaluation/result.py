"""One JSON per row: schema ``dihal.result/1``. Tables are derived from these files, never typed.

A result is self-describing: metrics with intervals, the per-document sums they come from, what it may be
compared with, what it cost, and where it came from. The dataclasses below *are* the schema: every field is
required, none else is allowed, on writing and on reading.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dihal.errors import UsageError
from dihal.evaluation.bootstrap import Interval
from dihal.evaluation.definitions import METRICS, SUMS
from dihal.evaluation.schema import from_data, to_data
from dihal.io import read_json, write_json

__all__ = [
    "COMPARABLE",
    "KINDS",
    "SCHEMA",
    "Comparable",
    "Cost",
    "Estimate",
    "Result",
    "TextResult",
    "is_result",
    "read_result",
    "write_result",
]

SCHEMA = "dihal.result/1"

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
    """New tokens of all samples over wall seconds of generation; null for real text."""
    texts: list[str]
    """The first samples, prompt and continuation separated by ' ||| '."""


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
    budget: str | None
    """Hash of the training budget; null for a row that was not trained, which any budget may be compared with."""


COMPARABLE = (
    "metric_version",
    "score_type",
    "tokenizer_fingerprint",
    "backbone_fingerprint",
    "sequence_length",
    "tokens",
    "data_fingerprint",
    "budget",
)
"""Fields of :class:`Comparable`, causes before consequences: the first that differs is the one to name."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the row cost; null where it does not apply."""

    trainable_parameters: int | None
    frozen_parameters: int | None
    """Backbone parameters still needed at inference."""
    diffused_tokens: int | None
    train_seconds: float | None
    tuning_trials: int | None
    nfe: dict[str, int]
    """Denoiser evaluations per position, by number of steps."""
    evaluation_seconds: dict[str, float]
    """Wall seconds of the row's own states and suffix over the whole evaluation, by number of steps."""


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
