"""The result of a sweep, as data: truths, predictors, and how well each predicts each."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dihal.errors import UsageError
from dihal.evaluation.bootstrap import Interval
from dihal.io import ensure_dir, read_json, write_json, write_text
from dihal.sweep.predictors import Predictor
from dihal.sweep.statistics import Relation, interval, mean_regret, relate

if TYPE_CHECKING:
    from dihal.sweep.truth import Truth

__all__ = ["DEFINITIONS", "FILE_NAME", "SCHEMA", "SweepReport", "predictor_record", "related", "truth_baseline"]

SCHEMA = "dihal.sweep/1"
"""Format of sweep.json."""
FILE_NAME = "sweep.json"
"""Its name in a folder."""

DEFINITIONS = {
    "candidates": "the trained splits but split 0 (token space: trained and shown, never selected)",
    "direction": "declared for each predictor before any truth was seen; 'sign' -1 means that small values are expected where the loss is small",
    "spearman": "Spearman rank correlation over the candidates between the predictor in its declared direction and the negative loss: 1 is perfect",
    "kendall": "Kendall's tau-b of the same",
    "above_depth": "that Spearman correlation minus the one of 'the shallower the better'",
    "regret": "loss at the candidate where the predictor is largest (the shallowest of equals) minus the least loss of all candidates, in the truth's unit",
    "opposite_regret": "the same for the candidate where the predictor is smallest",
    "random_regret": "mean loss of the candidates minus the least: what a split drawn at random costs",
    "intervals": (
        "percentiles over resamples of documents: held-out ones for the truth, scored ones (training text) for the predictors, "
        "independent of each other and shared by all splits, so that differences are paired. Neither training seeds nor splits are "
        "resampled: an interval says how far the text decides, not what another model or seed would give. Resampling adds noise, so "
        "correlations near 1 have intervals that lie below the value, and regret has one that lies above it"
    ),
}
"""What the numbers mean."""


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """Truth and predictors of one backbone under one regime."""

    regime: str
    """`replace` or `generate`."""
    truth: str
    """The truth that orders tables and figures."""
    splits: list[int]
    """Trained splits."""
    candidates: list[int]
    """Those that can be selected: without 0."""
    seeds: list[int]
    """Training seeds."""
    truths: dict[str, dict[str, Any]]
    """Name -> label, unit, definition, values and intervals per trained split, values per seed, baseline."""
    predictors: dict[str, dict[str, Any]]
    """Name -> group, label, sign, definition, values and intervals of every split 0 .. L-1."""
    relations: dict[str, dict[str, Relation]]
    """Truth -> predictor -> what it is worth."""
    transfer: dict[str, Any] | None
    """Models, truth and weights of the fitted predictors; null: none."""
    backbone: dict[str, Any]
    """Reference of the backbone."""
    backbone_fingerprint: str
    """sha256 of its weights."""
    method: dict[str, Any]
    """The method's options, but for the split."""
    budget: dict[str, Any]
    """The budget's options, and what each split spent of it."""
    data: dict[str, Any]
    """Scored text and held-out documents."""
    confidence: float
    """Coverage of the intervals."""
    bootstrap: int
    """Resamples."""
    definitions: dict[str, str]
    """What the numbers mean."""
    config: dict[str, Any]
    """The resolved SweepConfig and its hash."""
    provenance: dict[str, Any]
    """Commit, versions, hardware, command, time, seconds."""
    schema: str = SCHEMA
    """Format of this record."""

    @property
    def ranking(self) -> list[str]:
        """Predictors by regret under the main truth, then by correlation; undefined ones last."""

        def key(name: str) -> tuple[float, float]:
            relation = self.relations[self.truth][name]
            cost, rho = relation.regret.value, relation.spearman.value
            return (np.inf if cost is None else cost, np.inf if rho is None else -rho)

        return sorted(self.predictors, key=key)

    def best_split(self, truth: str | None = None) -> int:
        """Candidate with the least loss."""
        return int(self.truths[truth or self.truth]["best_split"])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> SweepReport:
        """Inverse of :meth:`to_dict`.

        Raises:
            UsageError: not a sweep record of this format.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise UsageError(f"not a sweep record: schema {found!r}, expected {SCHEMA!r}. Run `dihal sweep` again.")
        try:
            relations = {
                truth: {name: Relation.from_dict(item) for name, item in rows.items()}
                for truth, rows in data["relations"].items()
            }
            return cls(**{**data, "relations": relations})
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"the sweep record is damaged ({error}). Run `dihal sweep` again.") from error

    @classmethod
    def load(cls, path: str | Path) -> SweepReport:
        """Read sweep.json, or the folder that holds it.

        Raises:
            UsageError: missing, not JSON, or not a sweep record.
        """
        path = Path(path)
        return cls.from_dict(read_json(path / FILE_NAME if path.is_dir() else path))

    def save(self, folder: str | Path, beside: list[SweepReport] | None = None) -> Path:
        """Write sweep.json, sweep.md, predictors.md (with the sweeps ``beside`` this one) and the figure; return the folder.

        Raises:
            UsageError: the folder cannot be written.
        """
        from dihal.sweep.figure import save_figure
        from dihal.sweep.table import beside_markdown, to_markdown

        folder = ensure_dir(folder)
        save_figure(self, folder / f"sweep-{self.regime}.png", folder / f"sweep-{self.regime}.svg")
        write_text(folder / "sweep.md", to_markdown(self))
        write_text(folder / "predictors.md", beside_markdown([self, *(beside or [])]))
        write_json(folder / FILE_NAME, self.to_dict())
        return folder


def predictor_record(predictor: Predictor, confidence: float) -> dict[str, Any]:
    """A predictor as plain data, every split."""
    rows = predictor.resampled
    intervals = [
        interval(float(value), None if rows is None else rows[:, split], confidence)
        for split, value in enumerate(predictor.values)
    ]
    return {
        "group": predictor.group,
        "label": predictor.label,
        "sign": predictor.sign,
        "definition": predictor.definition,
        "values": [item.value for item in intervals],
        "intervals": [None if item.low is None else [item.low, item.high] for item in intervals],
    }


def related(
    predictors: list[Predictor], truth: Truth, splits: list[int], candidates: list[int], confidence: float
) -> dict[str, Relation]:
    """Every predictor against one truth.

    Args:
        predictors: with a value for every split.
        truth: of the trained ``splits``.
        splits: trained.
        candidates: compared; a subset.
        confidence: coverage of the intervals.
    """
    places = [splits.index(split) for split in candidates]
    loss, drawn = truth.values[places], truth.resampled[:, places]
    found = {}
    for predictor in predictors:
        friendliness, rows = predictor.at(candidates)
        found[predictor.name] = relate(friendliness, rows, loss, drawn, np.array(candidates), confidence)
    return found


def truth_baseline(truth: Truth, splits: list[int], candidates: list[int], confidence: float) -> dict[str, Any]:
    """Best candidate, how often it is the best among resamples, and the regret of a split drawn at random."""
    places = [splits.index(split) for split in candidates]
    loss, drawn = truth.values[places], truth.resampled[:, places]
    whole = drawn[np.isfinite(drawn).all(1)]
    best = int(loss.argmin())
    random: Interval = interval(float(mean_regret(loss[None])[0]), mean_regret(whole), confidence)
    return {
        "best_split": candidates[best],
        "best_probability": float((whole.argmin(1) == best).mean()) if len(whole) else None,
        "random_regret": asdict(random),
    }
