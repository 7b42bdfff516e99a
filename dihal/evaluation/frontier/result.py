"""One JSON per row: schema ``dihal.frontier/1``. Tables, figure and page are derived from these files, never typed.

The dataclasses below *are* the schema: every field is required, none else is allowed, on writing and on reading.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dihal.errors import UsageError
from dihal.evaluation.bootstrap import Interval
from dihal.evaluation.frontier.definitions import METRICS, SAMPLE_SUMS, SET_METRICS
from dihal.evaluation.frontier.statistics import GRAM
from dihal.evaluation.result import BudgetTerms, TextTerms
from dihal.evaluation.schema import from_data, to_data
from dihal.io import canonical_json, read_json, write_text

__all__ = ["KINDS", "SCHEMA", "Comparable", "FrontierRow", "Point", "is_row", "read_row", "write_row"]

SCHEMA = "dihal.frontier/1"

KINDS = ("checkpoint", "bound", "control", "text")
"""`checkpoint`: a trained method. `bound`: the backbone. `control`: n-grams. `text`: real continuations."""


@dataclass(frozen=True, kw_only=True)
class Comparable:
    """What must agree before two rows share a table; causes before consequences."""

    metric_version: str
    score_type: str
    """How likelihoods arise: `generated`, of the row's own text."""
    tokenizer_fingerprint: str
    backbone_fingerprint: str
    scorer: str
    scorer_fingerprint: str
    samples: int
    prompt_tokens: int
    new_tokens: int
    seeds: list[int]
    data_fingerprint: str
    """Of the prompts, their real continuations and their documents."""
    training_text: str
    """Fingerprint of the text that n-grams are counted on and memorisation is looked up in."""
    budget: BudgetTerms | None
    """Null for a row that was not trained, which any budget may be compared with."""
    training: TextTerms | None
    """Null for a row that was not trained."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One temperature at one number of steps."""

    steps: int
    """0: the row does not take steps."""
    temperature: float
    """0 also for real text."""
    metrics: dict[str, Interval]
    """By `definitions.METRICS`."""
    set_metrics: dict[str, list[float | None]]
    """By `definitions.SET_METRICS`: one value per seed."""
    missing: dict[str, str]
    """Why a set metric is null."""
    per_sample: dict[str, list[float]]
    """By `definitions.SAMPLE_SUMS`: one number per continuation, seed after seed; or none."""
    seconds: float | None
    """Wall seconds of writing, all seeds, with the comparison of readouts."""
    tokens_per_second: float | None
    nfe: int | None
    """Calls of the denoiser per text, guidance included; null where there is no network."""
    encodes: int | None
    """Passes of tokens through the blocks below the split, per text."""
    reads: int | None
    """Passes of states through the blocks above, per text."""
    flops_per_token: float | None
    """FLOPs per new token of one continuation, prompt included, as torch counted them."""
    texts: list[str]
    """The first continuations, prompt and text separated by ' ||| '."""


@dataclass(frozen=True, kw_only=True)
class FrontierRow:
    """One row: a source of text at all its temperatures and steps."""

    schema: str
    name: str
    method: str
    kind: str
    """One of :data:`KINDS`."""
    regime: str | None
    space: str | None
    split: int | None
    writing: dict[str, Any] | None
    """What the variant changes in how a `generate` checkpoint writes; null for other rows."""
    points: list[Point]
    planned: int
    """Points that the last call wanted; fewer in `points` means that it was interrupted."""
    documents: list[int]
    """Document of each prompt, an index of `document_keys`; the same for every seed."""
    document_keys: list[str]
    confidence: float
    bootstrap: int
    bootstrap_seed: int
    self_graded: bool
    """The scorer is the backbone, or of its family: it favours its own text."""
    scorer_vocab: int
    comparable: Comparable
    cost: dict[str, Any]
    """Parameters and what training took (see `plan.PlannedRow.cost`); null where it does not apply or was not metered."""
    checkpoint: dict[str, Any] | None
    config: dict[str, Any]
    """Resolved evaluation configuration."""
    row_hash: str
    """Hash of what decides the numbers of a point: options, fingerprints, checkpoint, variant."""
    train_config: dict[str, Any] | None
    train_config_hash: str | None
    backbone: dict[str, Any]
    details: dict[str, Any]
    provenance: dict[str, Any]
    command: str

    def facts(self) -> dict[str, Any]:
        """What must agree between two rows, by name, causes before consequences: the first that differs is to be named.

        Names without a value are left out: a row that was not trained has neither budget nor training.
        """
        found: dict[str, Any] = {}
        for name in (field.name for field in fields(self.comparable)):
            value = getattr(self.comparable, name)
            if is_dataclass(value):
                found |= {f"{name}.{field.name}": getattr(value, field.name) for field in fields(value)}
            elif value is not None:
                found[name] = value
        return found | {name: getattr(self, name) for name in ("confidence", "bootstrap", "bootstrap_seed")}

    def sums(self, point: Point) -> dict[str, np.ndarray]:
        """Per-document sums of a point over all its seeds, with those that follow from the lengths."""
        seeds, new = len(self.comparable.seeds), self.comparable.new_tokens
        owners = np.tile(np.array(self.documents), seeds)

        def summed(values: np.ndarray) -> np.ndarray:
            return np.bincount(owners, weights=values, minlength=len(self.document_keys))

        ones = np.ones(len(owners))
        found = {name: summed(np.array(values) if values else 0 * ones) for name, values in point.per_sample.items()}
        found |= {"samples": summed(ones), "tokens": new * summed(ones), "grams": max(new - GRAM + 1, 0) * summed(ones)}
        return found | {"self_samples": summed(ones if point.per_sample["self_agreement"] else 0 * ones)}


def _check(row: FrontierRow, where: str) -> None:
    def require(valid: bool, message: str) -> None:
        if not valid:
            raise UsageError(f"{where}: {message}. Write the file again with `dihal frontier`.")

    require(row.schema == SCHEMA, f"schema is {row.schema!r}, this version reads {SCHEMA!r}")
    require(row.kind in KINDS, f"kind {row.kind!r} is none of {', '.join(KINDS)}")
    require(bool(row.points), "points is empty")
    require(len(row.documents) == row.comparable.samples, "documents does not name one document per sample")
    require(all(0 <= number < len(row.document_keys) for number in row.documents), "documents is out of range")
    keys = [(point.steps, point.temperature) for point in row.points]
    require(len(set(keys)) == len(keys), "two points share steps and temperature")
    expected = row.comparable.samples * len(row.comparable.seeds)
    for index, point in enumerate(row.points):
        for field, names in (
            ("metrics", set(METRICS)),
            ("set_metrics", set(SET_METRICS)),
            ("per_sample", set(SAMPLE_SUMS)),
        ):
            block = getattr(point, field)
            extra, lacking = sorted(set(block) - names), sorted(names - set(block))
            require(not extra, f"points[{index}].{field}: unknown field {', '.join(map(repr, extra))}")
            require(not lacking, f"points[{index}].{field}: missing field {', '.join(map(repr, lacking))}")
        for name, values in point.per_sample.items():
            whole = len(values) == expected or (name == "self_agreement" and not values)
            require(whole, f"points[{index}].per_sample.{name} has {len(values)} numbers, not {expected}")
            require(
                all(map(math.isfinite, values)), f"points[{index}].per_sample.{name} holds numbers that are not finite"
            )
        for name, seeds in point.set_metrics.items():
            require(
                len(seeds) == len(row.comparable.seeds), f"points[{index}].set_metrics.{name} lacks one value per seed"
            )
            require(
                None not in seeds or name in point.missing, f"points[{index}].missing does not say why {name} is null"
            )


def _read(data: Any, where: str) -> FrontierRow:
    try:
        row = from_data(FrontierRow, data, where)
    except UsageError as error:
        # The reader is shared with `dihal evaluate`, whose name stands in its message.
        raise UsageError(str(error).replace("`dihal evaluate`", "`dihal frontier`")) from error
    _check(row, where)
    return row


def write_row(path: str | Path, row: FrontierRow) -> None:
    """Validate, then write atomically.

    Raises:
        UsageError: the row breaks its own schema, or the file cannot be written.
    """
    data = to_data(row)
    _read(data, str(path))
    # Thousands of numbers per point: one line each, as elsewhere, would triple the file.
    write_text(path, canonical_json(data) + "\n")


def is_row(data: Any) -> bool:
    """Whether JSON data claims to be a row of some version."""
    return isinstance(data, dict) and str(data.get("schema", "")).startswith("dihal.frontier/")


def read_row(path: str | Path) -> FrontierRow:
    """Read and validate one row.

    Raises:
        UsageError: missing, not JSON, not a row, of another version, or a field unknown, missing or mistyped.
    """
    data = read_json(path)
    if not is_row(data):
        raise UsageError(f"{str(path)!r} is not a frontier row (no schema {SCHEMA!r}). Give files of `dihal frontier`.")
    if data["schema"] != SCHEMA:
        raise UsageError(f"{path}: schema is {data['schema']!r}, this version reads {SCHEMA!r}. Evaluate again.")
    return _read(data, str(path))
