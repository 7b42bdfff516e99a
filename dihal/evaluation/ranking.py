"""Result files -> an ordered table, or a refusal that names the field that differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dihal.errors import UsageError
from dihal.evaluation.bootstrap import document_weights
from dihal.evaluation.definitions import METRICS, direction, ratio
from dihal.evaluation.result import TEXT_FACTS, Result, facts, is_result, read_result
from dihal.io import read_json

__all__ = ["Board", "Entry", "build_board", "gather", "require_comparable"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row at its best number of steps for the ranking metric."""

    result: Result
    path: Path
    label: str
    """The row's name, with its folder where two rows share a name."""
    steps: str
    """Best number of steps for the ranking metric; the fewest where it is undefined."""
    value: float | None
    """The ranking metric there."""
    rank: tuple[int, int] | None
    """Best and worst rank that the intervals of the paired differences allow; None: not ranked."""


@dataclass(frozen=True, kw_only=True)
class Board:
    """Rows that may be compared, best first; those without the metric last and unranked."""

    metric: str
    entries: list[Entry]
    ignored: int
    """JSON files in the folders that are not results."""
    duplicates: int
    """Rows left out because another file holds the same numbers under the same name."""

    @property
    def first(self) -> Result:
        """Any result: what all of them share can be read from it."""
        return self.entries[0].result


def gather(paths: Sequence[str | Path]) -> tuple[list[tuple[Path, Result]], int]:
    """Read result files; folders are searched, and JSON in them that is no result is counted and left out.

    Returns:
        (path, result) in the order of the paths, and the number of other JSON files.

    Raises:
        UsageError: a path that does not exist, a file that is damaged or breaks the schema, or no result at all.
    """
    found: dict[Path, Result] = {}
    ignored = 0
    for given in paths:
        path = Path(given)
        if path.is_dir():
            for file in sorted(path.rglob("*.json")):
                if any(part.startswith(".") for part in file.relative_to(path).parts):
                    continue
                if is_result(read_json(file)):
                    found.setdefault(file.resolve(), read_result(file))
                else:
                    ignored += 1
        else:
            found.setdefault(path.resolve(), read_result(path))
    if not found:
        raise UsageError(
            f"no result in {', '.join(map(str, paths)) or 'an empty list of paths'} ({ignored} other JSON files). "
            "Make some with `dihal evaluate`, or name the files."
        )
    return list(found.items()), ignored


def require_comparable(results: Sequence[tuple[Path, Result]], *, metric: str | None = None) -> None:
    """Refuse rows that must not share a table.

    Budget and training text are compared among trained rows only; a row that was not trained goes with any. Where
    rows are ranked by a text metric, how the texts were made and scored must agree, too.

    Args:
        results: files and their results.
        metric: the ranking metric; None: what any table needs.

    Raises:
        UsageError: naming the first field that differs, both values and both files, and further fields.
    """
    rows = [(path, result, facts(result)) for path, result in results]
    if metric is not None and metric not in METRICS:
        rows = [(path, result, known | _text_facts(result, metric)) for path, result, known in rows]
    for field in dict.fromkeys(name for _, _, known in rows for name in known):
        having = [row for row in rows if field in row[2]]
        path, result, known = having[0]
        for other_path, other, found in having[1:]:
            if found[field] == known[field]:
                continue
            others = [name for name in known if name != field and name in found and found[name] != known[name]]
            more = f" Also different: {', '.join(others)}." if others else ""
            raise UsageError(
                f"these rows are not comparable: {field} is {known[field]!r} in {result.name!r} ({path}) and "
                f"{found[field]!r} in {other.name!r} ({other_path}).{more} Rank them separately, or evaluate them "
                "alike."
            )


def _text_facts(result: Result, metric: str) -> dict[str, Any]:
    # All texts of a row are made in one call, with the same options.
    found = {f"text.{name}": getattr(text, name) for text in result.text.values() for name in TEXT_FACTS}
    if found and metric == "tokens_per_second":
        found["provenance.hardware"] = result.provenance.get("hardware")
    return found


def build_board(results: Sequence[tuple[Path, Result]], *, sort_by: str, ignored: int = 0) -> Board:
    """Order rows by a metric.

    Ranks come from paired differences: two rows are apart if the interval of their difference, resampled by
    document with shared weights, excludes zero. A row's ranks run from 1 + (rows better and apart) to
    n - (rows worse and apart). Text metrics have no intervals: equal values share a rank.

    Raises:
        UsageError: unknown metric, rows that are not comparable, or none that has the metric.
    """
    lower = direction(sort_by)
    require_comparable(results, metric=sort_by)
    kept, duplicates = _without_copies(results)
    labels = _labels(kept)
    ranked, rest = [], []
    for (path, result), label in zip(kept, labels, strict=True):
        values = _values(result, sort_by)
        if values:
            steps = (min if lower else max)(values, key=lambda key: (values[key], int(key) if lower else -int(key)))
            ranked.append((values[steps], path, result, label, steps))
        else:
            rest.append((path, result, label, min(result.metrics, key=int)))
    if not ranked:
        raise UsageError(f"no row has the metric {sort_by!r}. Choose another `sort_by`, or evaluate with samples > 0.")
    ranked.sort(key=lambda item: (item[0] if lower else -item[0], _order(item[2]), item[3]))
    ranks = _ranks([(item[2], item[4], item[0]) for item in ranked], sort_by, lower)
    entries = [
        Entry(result=result, path=path, label=label, steps=steps, value=value, rank=rank)
        for (value, path, result, label, steps), rank in zip(ranked, ranks, strict=True)
    ]
    entries += [
        Entry(result=result, path=path, label=label, steps=steps, value=None, rank=None)
        for path, result, label, steps in rest
    ]
    return Board(metric=sort_by, entries=entries, ignored=ignored, duplicates=duplicates)


def _order(result: Result) -> int:
    return ("bound", "checkpoint", "control", "text").index(result.kind)


def _values(result: Result, metric: str) -> dict[str, float]:
    if metric in METRICS:
        found = {steps: block[metric].value for steps, block in result.metrics.items()}
    else:
        found = {steps: getattr(block, metric) for steps, block in result.text.items()}
    return {steps: value for steps, value in found.items() if value is not None}


def _without_copies(results: Sequence[tuple[Path, Result]]) -> tuple[list[tuple[Path, Result]], int]:
    kept: list[tuple[Path, Result]] = []
    for path, result in results:
        same = (
            other.name == result.name and other.per_document == result.per_document and other.text == result.text
            for _, other in kept
        )
        if not any(same):
            kept.append((path, result))
    return kept, len(results) - len(kept)


def _labels(results: Sequence[tuple[Path, Result]]) -> list[str]:
    names = [result.name for _, result in results]
    labels = [
        name if names.count(name) == 1 else f"{name} ({path.parent.name})"
        for name, (path, _) in zip(names, results, strict=True)
    ]
    return [
        label if labels.count(label) == 1 else f"{name} ({path})"
        for label, name, (path, _) in zip(labels, names, results, strict=True)
    ]


def _ranks(rows: list[tuple[Result, str, float]], metric: str, lower: bool) -> list[tuple[int, int]]:
    count = len(rows)
    values = np.array([value for _, _, value in rows])
    better = values[:, None] < values[None, :] if lower else values[:, None] > values[None, :]
    apart = _apart(rows, metric) if metric in METRICS else values[:, None] != values[None, :]
    above, below = (better & apart).sum(0), (better & apart).sum(1)
    return [(1 + int(above[i]), count - int(below[i])) for i in range(count)]


def _apart(rows: list[tuple[Result, str, float]], metric: str) -> np.ndarray:
    first = rows[0][0]
    weights = document_weights(len(first.documents), first.bootstrap, first.bootstrap_seed)
    definition = METRICS[metric]
    needed = (definition.numerator, definition.denominator)
    resampled = np.stack(
        [
            ratio(definition, {name: np.array(result.per_document[steps][name]) for name in needed}, weights)
            for result, steps, _ in rows
        ]
    )
    tail = (1.0 - first.confidence) / 2.0
    low, high = np.nanquantile(resampled[:, None, :] - resampled[None, :, :], [tail, 1.0 - tail], axis=-1)
    return (low > 0) | (high < 0)
