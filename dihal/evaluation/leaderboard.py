"""`dihal leaderboard`: rank result files that may be compared."""

from __future__ import annotations

from rich.table import Table

from dihal.config import LeaderboardConfig
from dihal.evaluation.ranking import build_board, gather
from dihal.evaluation.table import rich_table, to_csv, to_markdown
from dihal.io import ensure_dir, write_text

__all__ = ["leaderboard"]


def leaderboard(config: LeaderboardConfig, *, width: int | None = None) -> Table:
    """Rank results as a table for a terminal of ``width`` columns; with ``config.out``, write leaderboard.md, .csv, .html, .png and .svg there.

    Raises:
        UsageError: no result, a damaged one, rows that are not comparable (naming the field, both values and both
            files), an unknown metric, or a folder that cannot be written.
    """
    results, ignored = gather(config.results)
    board = build_board(results, sort_by=config.sort_by, ignored=ignored)
    if config.out is not None:
        from dihal.evaluation.page import to_html
        from dihal.evaluation.plots import save_figure

        folder = ensure_dir(config.out)
        write_text(folder / "leaderboard.md", to_markdown(board))
        write_text(folder / "leaderboard.csv", to_csv(board))
        write_text(folder / "leaderboard.html", to_html(board))
        save_figure(board, folder)
    return rich_table(board, width)
