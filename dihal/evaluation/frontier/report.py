"""Row files -> frontier.md, .csv, .html, .png, .svg and curves.csv."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dihal.config.frontier import FrontierConfig
from dihal.evaluation.frontier.best import best_markdown
from dihal.evaluation.frontier.board import Board, build_board, gather
from dihal.evaluation.frontier.table import curves_csv, points_csv, rich_table, to_markdown
from dihal.io import ensure_dir, write_text

__all__ = ["frontier", "report"]


def report(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    entropies: Sequence[float] = (),
    span: tuple[float, float] | None = None,
    axis: str = "backbone",
) -> Board:
    """Write all derived files of the given rows (files or folders) into a folder; see `board.build_board`.

    Raises:
        UsageError: no row, a damaged one, rows that are not comparable, or a folder that cannot be written.
    """
    from dihal.evaluation.frontier.figure import save_figure
    from dihal.evaluation.frontier.page import to_html

    rows, ignored = gather(paths)
    board = build_board(rows, entropies=entropies, span=span, axis=axis, ignored=ignored)
    folder = ensure_dir(out)
    write_text(folder / "frontier.md", to_markdown(board) + best_markdown(board))
    write_text(folder / "frontier.csv", points_csv(board))
    write_text(folder / "curves.csv", curves_csv(board))
    drawings = {path.suffix: path for path in save_figure(board, folder)}
    write_text(folder / "frontier.html", to_html(board, drawings[".svg"].read_text(encoding="utf-8")))
    return board


def frontier(config: FrontierConfig, *, console: Console | None = None) -> Table:
    """Measure what is missing, write tables, figure and page, and return the table for a terminal.

    Raises:
        UsageError: see `run.measure_frontier` and :func:`report`.
    """
    from dihal.evaluation.frontier.run import measure_frontier

    if config.measure:
        measured = measure_frontier(config, console=console)
    else:
        # A folder that is still to be made has no rows; those of `results` alone go into it.
        measured = [Path(config.out)] if Path(config.out).exists() or not config.results else []
    board = report(
        [*measured, *config.results],
        config.out,
        entropies=config.entropies,
        span=config.area,
        axis=config.entropy,
    )
    return rich_table(board)
