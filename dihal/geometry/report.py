"""The result of scoring: every number with its definition, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dihal.errors import UsageError
from dihal.io import ensure_dir, read_json, write_json

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["FILE_NAME", "SCHEMA", "CoordinateReport", "LayerReport", "ScoreReport", "SplitReport", "read_split"]

SCHEMA = "dihal.scores/1"
"""Format of scores.json."""
FILE_NAME = "scores.json"
"""Its name in a folder."""

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer, whatever the coordinates: tokens kept and dropped, rival predictors."""

    split: int
    """Index of the layer."""
    kept: int
    """Tokens behind the proxies."""
    dropped_first: int
    """Tokens dropped because they are at position 0 of a window."""
    dropped_norm: int
    """Tokens dropped because of their norm (not counted among the first)."""
    norm_threshold: float | None
    """Norm above which a token is dropped; null: none."""
    pilot_median_norm: float
    """Median norm that the threshold is a multiple of."""
    median_norm: float
    """Median norm of kept tokens. Rival predictor."""
    mean_cosine: float
    """Mean cosine between two kept tokens. Rival predictor (dispersion)."""
    log_trace: float
    """log tr(S), raw coordinates, nats. Rival predictor (dispersion)."""


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """One split in one kind of coordinates."""

    split: int
    """Number of blocks replaced."""
    candidate: bool
    """Whether it can be selected (split 0 cannot)."""
    curvature: float
    """Local curvature kappa, nats."""
    stiffness: float
    """Global stiffness s, nats."""
    rank: float
    """Log effective rank r, nats."""
    z_curvature: float
    """z(kappa) over the candidates."""
    z_stiffness: float
    """z(s) over the candidates."""
    z_rank: float
    """z(r) over the candidates."""
    score: float
    """z(kappa) + z(s) - z(r)."""
    curvature_interval: Interval | None
    """Document-bootstrap interval; null: not asked for."""
    stiffness_interval: Interval | None
    """As above."""
    rank_interval: Interval | None
    """As above."""
    score_interval: Interval | None
    """As above; z-scores taken anew in each resample."""
    argmax_probability: float | None
    """Share of resamples in which this split has the highest score; null for split 0 or without resamples."""
    stiffness_with_sinks: float
    """s when no token is dropped."""
    rank_with_sinks: float
    """r when no token is dropped."""
    largest_eigenvalue: float
    """e_1."""
    mean_eigenvalue: float
    """mu = tr(S) / d."""
    anchors: int
    """Anchors of the local curvature."""
    floored: float
    """Share of anchors whose neighbours are copies of each other (curvature at its floor)."""
    duplicates: float
    """Share of anchors with a copy among the neighbours."""


@dataclass(frozen=True, kw_only=True)
class CoordinateReport:
    """All splits in one kind of coordinates."""

    splits: tuple[SplitReport, ...]
    """By split, from 0."""
    argmax: int
    """Candidate with the highest score."""
    argmax_interval: Interval | None
    """Percentile interval of the argmax over resamples."""
    resamples_used: int
    """Resamples in which every proxy was defined."""
    rivals: dict[str, float | None]
    """Spearman correlation, over the candidates, of the score with depth, norm and dispersion."""


@dataclass(frozen=True, kw_only=True)
class ScoreReport:
    """Scores of the layers of one backbone on one text."""

    selected_split: int
    """Argmax in the coordinates `select_by`."""
    select_by: str
    """Coordinates that select."""
    candidates: tuple[int, ...]
    """Splits that can be selected."""
    coordinates: dict[str, CoordinateReport]
    """By name."""
    layers: tuple[LayerReport, ...]
    """By split, from 0."""
    definitions: dict[str, str]
    """Formula of every number, with the options that were in force."""
    data: dict[str, Any]
    """Documents, windows, tokens and fingerprints of the scored text."""
    config: dict[str, Any]
    """The resolved ScoreConfig and its hash."""
    backbone: dict[str, Any]
    """Reference of the backbone."""
    provenance: dict[str, Any]
    """Commit, versions, hardware, command, time, seconds."""
    schema: str = SCHEMA
    """Format of this record."""

    @property
    def scores(self) -> dict[str, list[float]]:
        """Coordinates -> score of each split, from 0."""
        return {name: [split.score for split in item.splits] for name, item in self.coordinates.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> ScoreReport:
        """Inverse of :meth:`to_dict`.

        Raises:
            UsageError: not a score record of this format.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise UsageError(f"not a score record: schema {found!r}, expected {SCHEMA!r}. Run `dihal score` again.")
        try:
            return cls(
                **{
                    **data,
                    "candidates": tuple(data["candidates"]),
                    "layers": tuple(LayerReport(**item) for item in data["layers"]),
                    "coordinates": {name: _coordinates(item) for name, item in data["coordinates"].items()},
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"the score record is damaged ({error}). Run `dihal score` again.") from error

    @classmethod
    def load(cls, path: str | Path) -> ScoreReport:
        """Read scores.json, or the folder that holds it.

        Raises:
            UsageError: missing, not JSON, or not a score record.
        """
        return cls.from_dict(read_json(_file(path)))

    def save(self, folder: str | Path) -> Path:
        """Write scores.json, scores.png and scores.svg; each is whole or absent. Returns the folder.

        Raises:
            UsageError: the folder cannot be written.
        """
        from dihal.geometry.figure import save_figure

        folder = ensure_dir(folder)
        save_figure(self, folder / "scores.png", folder / "scores.svg")
        write_json(folder / FILE_NAME, self.to_dict())
        return folder

    def table(self, width: int | None = None) -> Table:
        """Terminal table: one row per split, the selected one marked; fewer columns where ``width`` is small."""
        from dihal.geometry.table import build_table

        return build_table(self, width)


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _coordinates(data: dict[str, Any]) -> CoordinateReport:
    splits = tuple(SplitReport(**{key: _pair(value) for key, value in item.items()}) for item in data["splits"])
    return CoordinateReport(**{**data, "splits": splits, "argmax_interval": _pair(data["argmax_interval"])})


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


def read_split(path: str | Path) -> int:
    """The selected split of a scores.json (or of the folder that holds it).

    Raises:
        UsageError: missing, not JSON, not a score record, or without a split.
    """
    data = read_json(_file(path))
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise UsageError(f"{str(path)!r} is not a score record ({SCHEMA}). Give the scores.json of `dihal score`.")
    split = data.get("selected_split")
    if isinstance(split, bool) or not isinstance(split, int) or split < 0:
        raise UsageError(f"{str(path)!r} names no selected split ({split!r}). Run `dihal score` again.")
    return split
