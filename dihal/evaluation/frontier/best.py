"""The reading by which each trained method does best at an entropy.

A checkpoint can be read in many ways, and which serves it best depends on the space; so methods are compared by the
best of theirs. Least NLL at an entropy of at least e is the frontier that the area integrates. Two cautions: the least of
many rows is a little too low, the more so the more rows there are, and a reading that takes as many passes as there are
tokens could leave writing to the frozen model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dihal.evaluation.frontier.board import Board, Curve, SeedGroup, braced, trained_as, written
from dihal.evaluation.frontier.matched import Matched
from dihal.evaluation.frontier.table import elsewhere, markdown_table, with_interval, with_spread
from dihal.evaluation.frontier.variants import label_of

__all__ = ["Best", "best_cells", "best_columns", "best_markdown", "best_readings"]


@dataclass(frozen=True, kw_only=True)
class Best:
    """One trained method at each entropy of comparison."""

    run: str
    """Name of its runs, in braces where seeds differ."""
    rows: int
    """Rows of which the best was taken, those of several seeds counted once."""
    found: list[tuple[Curve | SeedGroup, Matched] | None]
    """Row and values by entropy; None where no row reaches it."""

    def reading(self, line: Curve | SeedGroup) -> str:
        """The row's name without that of its run."""
        first = _curves(line)[0]
        label = _reading_of(first) or "as trained"
        return label if first.name == first.label else f"{label}, {first.steps} steps"


def best_readings(board: Board, *, passes: int | None = None) -> list[Best]:
    """Return the best reading of each trained method at each entropy, methods in the order of the first of these.

    Rows of a method that differ in the number of their seeds are not equals: those with fewer seeds than another row of the
    same method that reaches the entropy are left out there. So are rows in which the frozen stack alone decides (readout
    `suffix` with projection: a Jacobi iteration towards its own sample).

    Args:
        board: rows.
        passes: only rows with fewer passes of the denoiser per text; None: all.
    """
    grouped = [curve for group in board.groups for curve in group.curves]
    methods: dict[str, list[Curve | SeedGroup]] = {}
    for line in board.lines():
        first = _curves(line)[0]
        taken = first.points[0].nfe
        if first.row.train_config is None or (isinstance(line, Curve) and line in grouped):
            continue
        if not _frozen_alone(first) and (passes is None or (taken is not None and taken < passes)):
            methods.setdefault(trained_as(first), []).append(line)
    best = [
        Best(
            run=_run(lines),
            rows=len(lines),
            found=[_least([(line, line.matched[index]) for line in lines]) for index in range(len(board.entropies))],
        )
        for lines in methods.values()
    ]
    return sorted(best, key=_place)


def _frozen_alone(curve: Curve) -> bool:
    writing = written(curve)
    return writing["readout"] == "suffix" and writing["project"] > 0


def _seeds(line: Curve | SeedGroup) -> int:
    return len(line.seeds) if isinstance(line, SeedGroup) else 1


def _least(lines: Sequence[tuple[Curve | SeedGroup, Matched]]) -> tuple[Curve | SeedGroup, Matched] | None:
    reached = [(line, matched) for line, matched in lines if matched.nll.value is not None]
    most = max((_seeds(line) for line, _ in reached), default=0)
    return min(
        ((line, matched) for line, matched in reached if _seeds(line) == most),
        key=lambda pair: pair[1].nll.value,
        default=None,
    )


def _curves(line: Curve | SeedGroup) -> list[Curve]:
    return line.curves if isinstance(line, SeedGroup) else [line]


def _reading_of(curve: Curve) -> str:
    """Label of the row's variant; empty: written as the checkpoint says."""
    labels = map(label_of, curve.row.config.get("variants", ()))
    return max((label for label in labels if curve.row.name.endswith(f" {label}")), key=len, default="")


def _run_of(curve: Curve) -> str:
    return curve.row.name.removesuffix(_reading_of(curve)).strip()


def _run(lines: Sequence[Curve | SeedGroup]) -> str:
    runs = {curve.seed: _run_of(curve) for line in lines for curve in _curves(line)}
    names = [runs[seed] for seed in sorted(runs, key=lambda seed: (seed is None, seed))]
    return names[0] if len(names) == 1 else braced(names)


def _place(item: Best) -> tuple[float, ...]:
    # What reaches no entropy comes last.
    return tuple(float("inf") if pair is None else pair[1].nll.value for pair in item.found)


def best_columns(board: Board) -> dict[str, str]:
    """Column key -> heading of the table of best readings."""
    columns = {"run": "trained"}
    for index, entropy in enumerate(board.entropies):
        columns |= {f"nll_{index}": f"least NLL @ {entropy:.2f}", f"reading_{index}": "read by (passes)"}
    return columns | {"rows": "rows"}


def best_cells(best: Best) -> dict[str, str]:
    """The texts of one trained method by column; empty where no row reaches an entropy."""
    cells = {"run": best.run, "rows": str(best.rows)}
    for index, pair in enumerate(best.found):
        cells |= {f"nll_{index}": "", f"reading_{index}": ""}
        if pair is not None:
            line, matched = pair
            shown = with_spread if isinstance(line, SeedGroup) else with_interval
            cells[f"nll_{index}"] = shown(matched.nll) + elsewhere(matched)
            cells[f"reading_{index}"] = f"{best.reading(line)} ({_curves(line)[0].points[0].nfe})"
    return cells


def best_markdown(board: Board) -> str:
    """The table as a section; empty where no method has several rows."""
    words = board.first.comparable.new_tokens
    found = best_readings(board, passes=words)
    if all(item.rows < 2 for item in found):
        return ""
    lines = [
        "## Best reading of each trained method",
        "",
        *markdown_table(best_columns(board), [best_cells(item) for item in found], [False] * len(found)),
        "",
        f"- Least NLL at an entropy of at least the one named, over rows with fewer passes than the {words} tokens that are "
        "written; rows of the frozen stack alone do not count, nor those with fewer training seeds than another that "
        "reaches the entropy. The least of many rows is a little too low: compare methods with as many.",
    ]
    return "\n" + "\n".join(lines) + "\n"
