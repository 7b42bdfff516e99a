"""Row files -> comparable curves with intervals, or a refusal that names the field that differs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from dihal.config import TrainConfig
from dihal.config.convert import flatten, named_in, to_dict
from dihal.errors import UsageError
from dihal.evaluation.bootstrap import Interval
from dihal.evaluation.frontier.curve import area
from dihal.evaluation.frontier.matched import Bundle, Matched, interval, matched
from dihal.evaluation.frontier.result import FrontierRow, Point, is_row, read_row
from dihal.io import canonical_json, read_json

__all__ = [
    "Board",
    "Curve",
    "Matched",
    "SeedGroup",
    "braced",
    "build_board",
    "gather",
    "require_comparable",
    "trained_as",
    "written",
]

REFERENCE = "backbone"
"""Row that the others are compared with at equal entropy."""

_NO_WEIGHTS = (
    "seed", "out", "resume", "dry_run", "log.", "data.source", "data.workers", "budget.trials",
    "trainer.validate_every", "trainer.validate_batches", "trainer.save_every", "trainer.keep", "trainer.max_nonfinite",
)  # fmt: skip
"""Options of training in which seeds of one method may differ. The text itself is compared by its fingerprint."""

_WRITING = "method.writing."
"""Options that decide how a checkpoint writes where a row does not say, and no weight."""

_SPENT_ALIKE = 0.05
"""Share by which the diffused tokens of such seeds may differ: time limits end at no round number, stopped runs earlier."""


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

    @property
    def seed(self) -> int | None:
        """Training seed; null for a row that was not trained."""
        return None if self.row.train_config is None else self.row.train_config["seed"]

    @property
    def bound(self) -> Interval:
        """Likelihood bound of the checkpoint (`definitions.BOUND`); null where it was not measured."""
        return _stored(self.row.details.get("bound"))

    @property
    def states(self) -> Interval:
        """Explained variance of the states that it denoises (`definitions.STATES`); null likewise."""
        return _stored((self.row.details.get("bound") or {}).get("states"))


def _stored(found: dict | None) -> Interval:
    return Interval(**{name: (found or {}).get(name) for name in ("value", "low", "high")})


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """How many words at their beginning are the same in all."""
    return sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, zip(*parts, strict=False)))


def braced(labels: Sequence[str]) -> str:
    """What labels share, and in braces where they differ."""
    # Words and what stands between them: `run-1` and `run-11` differ in a word, not in a digit.
    parts = [re.findall(r"\w+|\W", label) for label in labels]
    head = _shared(parts)
    tail = _shared([part[head:][::-1] for part in parts])
    own = ["".join(part[head : len(part) - tail]) for part in parts]
    first = parts[0]
    return "".join(first[:head]) + "{" + ", ".join(own) + "}" + "".join(first[len(first) - tail :])


@dataclass(frozen=True, kw_only=True)
class SeedGroup:
    """Curves of checkpoints that differ in nothing but the training seed, written in the same way.

    Where intervals stand elsewhere, `value` is the mean over seeds here, `low` and `high` the lowest and the highest
    seed; all null where a seed has no value.
    """

    curves: list[Curve]
    """At least two, by seed."""
    matched: list[Matched]
    area: Interval
    bound: Interval
    states: Interval

    @property
    def seeds(self) -> list[int | None]:
        """Training seeds, ascending."""
        return [curve.seed for curve in self.curves]

    @property
    def label(self) -> str:
        """What the labels share, and in braces where they differ."""
        return braced([curve.label for curve in self.curves])


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
    groups: list[SeedGroup] = field(default_factory=list)
    """Further rows: several training seeds of one method, in the order of the curves."""
    ungrouped: list[str] = field(default_factory=list)
    """Why curves that seem to be seeds of one method are not summed up, one sentence each."""

    def lines(self) -> Iterator[Curve | SeedGroup]:
        """Rows of the table of curves: each group stands above the first of its curves."""
        for curve in self.curves:
            yield from (group for group in self.groups if min(group.curves, key=self.curves.index) is curve)
            yield curve

    def single(self, curve: Curve) -> bool:
        """Whether a curve is the only training seed of its method."""
        return curve.seed is not None and not any(curve in group.curves for group in self.groups)

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
        (Bundle(row, _points(row, steps), metric) for _, row in rows if row.name == REFERENCE for steps in _steps(row)),
        None,
    )
    curves = []
    for (path, row), label in zip(rows, labels, strict=True):
        for steps in _steps(row):
            points = _points(row, steps)
            bundle = Bundle(row, points, metric)
            values = area(bundle.entropy, bundle.nll, low=span[0], high=span[1], reference=math.log(row.scorer_vocab))
            curves.append(
                Curve(
                    row=row,
                    path=path,
                    label=label,
                    steps=steps,
                    points=points,
                    matched=[matched(bundle, anchor, place, row.confidence) for place in entropies],
                    area=interval(float(values[0]), values[1:], row.confidence),
                )
            )
    curves.sort(key=_order)
    groups, ungrouped = _seed_groups(curves)
    return Board(
        curves=curves,
        axis=metric,
        entropies=list(entropies),
        range=span,
        ignored=ignored,
        groups=groups,
        ungrouped=ungrouped,
    )


def trained_as(curve: Curve) -> str:
    """What checkpoints must share to be seeds of one method."""
    row = curve.row
    options = {name: value for name, value in _options(row).items() if not named_in(name, (*_NO_WEIGHTS, _WRITING))}
    weights = None if row.checkpoint is None else row.checkpoint.get("weights")
    return canonical_json([options, row.split, weights])


def _options(row: FrontierRow) -> dict[str, object]:
    # A file may be older than an option; it was trained with what is the default now.
    return dict(flatten(to_dict(TrainConfig()))) | dict(flatten(row.train_config))


def written(curve: Curve) -> dict[str, object]:
    """How a row was written: what its variant changes in what the checkpoint says, but for steps and temperature."""
    options = _options(curve.row)
    own = {name.removeprefix(_WRITING): value for name, value in options.items() if name.startswith(_WRITING)}
    # These two are of the grid, unless the variant names them.
    return {name: own[name] for name in own if name not in ("steps", "temperature")} | (curve.row.writing or {})


def _written_as(curve: Curve) -> str:
    """The same, without options that have no effect."""
    found = written(curve)
    idle = () if found["project"] else ("project_below", "temperature_start")
    if found["log_snr_center"] is None:
        idle = (*idle, "log_snr_scale")
    return canonical_json([{name: value for name, value in found.items() if name not in idle}, curve.steps])


def _method(curve: Curve) -> str:
    """What curves must share to be seeds of one method."""
    return canonical_json([trained_as(curve), _written_as(curve)])


def _seed_groups(curves: Sequence[Curve]) -> tuple[list[SeedGroup], list[str]]:
    alike: dict[str, list[Curve]] = {}
    for curve in curves:
        if curve.row.train_config is not None:
            alike.setdefault(_method(curve), []).append(curve)
    groups, ungrouped = [], []
    for members in alike.values():
        members = sorted(members, key=lambda curve: (curve.seed, curve.label))
        reason = _unclear(members)
        if len(members) > 1 and reason is None:
            groups.append(_seed_group(members))
        elif len(members) > 1:
            ungrouped.append(f"Not summed up over training seeds: {', '.join(c.name for c in members)} ({reason}).")
    return groups, ungrouped


def _unclear(members: Sequence[Curve]) -> str | None:
    """Why curves of one method are not its seeds."""
    seeds = [curve.seed for curve in members]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1 and seed is not None})
    if twice:
        return f"training seed {', '.join(map(str, twice))} is there more than once"
    spent = [curve.row.cost.get("diffused_tokens") or 0 for curve in members]
    if max(spent) - min(spent) > _SPENT_ALIKE * max(spent):
        return f"trained on {min(spent):,} to {max(spent):,} tokens"
    return None


def _seed_group(members: list[Curve]) -> SeedGroup:
    matched = [
        Matched(
            entropy=found[0].entropy,
            where=_spread([item.where for item in found]),
            nll=_spread([item.nll for item in found]),
            agreement=_spread([item.agreement for item in found]),
            behind=_spread([item.behind for item in found]),
        )
        for found in zip(*(curve.matched for curve in members), strict=True)
    ]
    return SeedGroup(
        curves=members,
        matched=matched,
        area=_spread([curve.area for curve in members]),
        bound=_spread([curve.bound for curve in members]),
        states=_spread([curve.states for curve in members]),
    )


def _spread(found: Sequence[Interval]) -> Interval:
    """Mean, lowest and highest; all null where one is missing, as the others are no fair sample of the method."""
    values = [item.value for item in found if item.value is not None]
    if len(values) < len(found):
        return Interval(value=None, low=None, high=None)
    return Interval(value=math.fsum(values) / len(values), low=min(values), high=max(values))


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
