"""Row files -> comparable curves with intervals, or a refusal that names the field that differs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from dihal.errors import UsageError
from dihal.evaluation.bootstrap import Interval
from dihal.evaluation.definitions import ratio
from dihal.evaluation.frontier.assemble import resample_weights
from dihal.evaluation.frontier.curve import area, at_entropy
from dihal.evaluation.frontier.definitions import METRICS
from dihal.evaluation.frontier.result import FrontierRow, Point, is_row, read_row
from dihal.io import read_json

__all__ = ["Board", "Curve", "Matched", "build_board", "gather", "require_comparable"]

REFERENCE = "backbone"
"""Row that the others are compared with at equal entropy."""


@dataclass(frozen=True, kw_only=True)
class Matched:
    """A curve at one entropy; all null where it does not pass it."""

    entropy: float
    nll: Interval
    agreement: Interval
    behind: Interval
    """NLL minus that of the backbone's own sampling at the same entropy, paired by document."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The points of one row at one number of steps, by temperature."""

    row: FrontierRow
    path: Path
    label: str
    """The row's name, with its folder where two rows share a name."""
    steps: int
    points: list[Point]
    matched: list[Matched]
    area: Interval

    @property
    def name(self) -> str:
        """Label with the number of steps where the row has several."""
        several = len({point.steps for point in self.row.points}) > 1
        return f"{self.label}, {self.steps} step{'s' * (self.steps != 1)}" if several else self.label


@dataclass(frozen=True, kw_only=True)
class Board:
    """Curves that may be compared: real text, backbone, trained ones by area, n-grams by order."""

    curves: list[Curve]
    axis: str
    """Metric on the entropy axis: `entropy` or `entropy_scorer`."""
    entropies: list[float]
    """Entropies at which curves are compared."""
    range: tuple[float, float]
    """Entropies of the area."""
    ignored: int
    """JSON files in the folders that are no rows."""

    @property
    def first(self) -> FrontierRow:
        """Any row: what all share can be read from it."""
        return self.curves[0].row

    def rows(self) -> list[tuple[str, FrontierRow]]:
        """Distinct rows with their labels, in the order of the curves."""
        return list({curve.label: (curve.label, curve.row) for curve in self.curves}.values())


def gather(paths: Sequence[str | Path]) -> tuple[list[tuple[Path, FrontierRow]], int]:
    """Read row files; folders are searched (not below them), and other JSON in them is counted and left out.

    Raises:
        UsageError: a path that does not exist, a file that is damaged, or no row at all.
    """
    found: dict[Path, FrontierRow] = {}
    ignored = 0
    for given in paths:
        path = Path(given)
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            if file.name.startswith("."):
                continue
            if path.is_dir() and not is_row(read_json(file)):
                ignored += 1
            else:
                found.setdefault(file.resolve(), read_row(file))
    if not found:
        raise UsageError(f"no frontier row in {', '.join(map(str, paths))}. Make some with `dihal frontier`.")
    return list(found.items()), ignored


def require_comparable(rows: Sequence[tuple[Path, FrontierRow]]) -> None:
    """Refuse rows that must not share a table. Budget and training text are compared among trained rows only.

    Raises:
        UsageError: naming the first field that differs, both values and both files.
    """
    facts = [(path, row, row.facts()) for path, row in rows]
    for name in dict.fromkeys(name for _, _, found in facts for name in found):
        held = [(path, row, found[name]) for path, row, found in facts if name in found]
        for path, row, value in held[1:]:
            first, other, wanted = held[0]
            if value != wanted:
                raise UsageError(
                    f"these rows are not comparable: {name} is {wanted!r} in {other.name!r} ({first}) and {value!r} in "
                    f"{row.name!r} ({path}). Show them separately, or measure them alike."
                )


def _interval(value: float, resampled: Float[np.ndarray, " resamples"], confidence: float) -> Interval:
    if not math.isfinite(value):
        return Interval(value=None, low=None, high=None)
    tail = (1.0 - confidence) / 2.0
    finite = resampled[np.isfinite(resampled)]
    # Where many resamples leave the range of the curve, the others are no fair sample of it.
    if len(finite) < (1.0 - tail) * len(resampled):
        return Interval(value=value, low=None, high=None)
    low, high = np.quantile(finite, [tail, 1.0 - tail])
    return Interval(value=value, low=float(low), high=float(high))


class _Bundle:
    """One curve on the whole sample (first) and on every resample: (1 + resamples, points) by metric."""

    def __init__(self, row: FrontierRow, points: list[Point], axis: str) -> None:
        weights = resample_weights(row)
        rows = np.concatenate([np.ones((1, weights.shape[1])), weights])
        sums = [row.sums(point) for point in points]
        self.nll, self.agreement, self.entropy = (
            np.stack([ratio(METRICS[name], own, rows) for own in sums], axis=1) for name in ("nll", "agreement", axis)
        )

    def at(self, value: np.ndarray, entropy: float) -> np.ndarray:
        return at_entropy(self.entropy, self.nll, value, entropy)


def _order(curve: Curve) -> tuple:
    place = ("text", "bound", "checkpoint", "control").index(curve.row.kind)
    # n-grams by their order, all else by area.
    return place, curve.row.details.get("order", 0), -(curve.area.value or 0.0), curve.label, curve.steps


def build_board(
    rows: Sequence[tuple[Path, FrontierRow]],
    *,
    entropies: Sequence[float] = (),
    span: tuple[float, float] | None = None,
    axis: str = "backbone",
    ignored: int = 0,
) -> Board:
    """Compare rows.

    Args:
        rows: (path, row).
        entropies: where they are compared; empty: at the real text's entropy.
        span: range of the area; None: from one nat below the real text's entropy to it.
        axis: tokenizer of the entropies, `backbone` or `scorer`.
        ignored: passed on.

    Raises:
        UsageError: rows that are not comparable, or no real text where its entropy is needed.
    """
    require_comparable(rows)
    metric = "entropy" if axis == "backbone" else "entropy_scorer"
    real = next((row for _, row in rows if row.kind == "text"), None)
    if real is None and (not entropies or span is None):
        raise UsageError("no row of real text: name `entropies` and `area`, or add the file real-text.json.")
    if real is not None:
        own = real.points[0].metrics[metric].value
        assert own is not None
        entropies, span = entropies or (own,), span or (own - 1.0, own)
    assert span is not None
    labels = _labels(rows)
    anchor = next(
        (
            _Bundle(row, _points(row, steps), metric)
            for _, row in rows
            if row.name == REFERENCE
            for steps in _steps(row)
        ),
        None,
    )
    curves = []
    for (path, row), label in zip(rows, labels, strict=True):
        for steps in _steps(row):
            points = _points(row, steps)
            bundle = _Bundle(row, points, metric)
            values = area(bundle.entropy, bundle.nll, low=span[0], high=span[1], reference=math.log(row.scorer_vocab))
            curves.append(
                Curve(
                    row=row,
                    path=path,
                    label=label,
                    steps=steps,
                    points=points,
                    matched=[_matched(bundle, anchor, place, row.confidence) for place in entropies],
                    area=_interval(float(values[0]), values[1:], row.confidence),
                )
            )
    return Board(curves=sorted(curves, key=_order), axis=metric, entropies=list(entropies), range=span, ignored=ignored)


def _matched(bundle: _Bundle, anchor: _Bundle | None, place: float, confidence: float) -> Matched:
    def interval(values: np.ndarray) -> Interval:
        return _interval(float(values[0]), values[1:], confidence)

    nll = bundle.at(bundle.nll, place)
    behind = np.full_like(nll, np.nan) if anchor is None else nll - anchor.at(anchor.nll, place)
    return Matched(
        entropy=place,
        nll=interval(nll),
        agreement=interval(bundle.at(bundle.agreement, place)),
        behind=interval(behind),
    )


def _steps(row: FrontierRow) -> list[int]:
    return sorted({point.steps for point in row.points})


def _points(row: FrontierRow, steps: int) -> list[Point]:
    return sorted((point for point in row.points if point.steps == steps), key=lambda point: point.temperature)


def _labels(rows: Sequence[tuple[Path, FrontierRow]]) -> list[str]:
    names = [row.name for _, row in rows]
    return [
        name if names.count(name) == 1 else f"{name} ({path.parent.name})"
        for name, (path, _) in zip(names, rows, strict=True)
    ]
