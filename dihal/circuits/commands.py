"""What `dihal circuits plot` and `selftest` do; `run`, `compare` and `hybrid` have files of their own."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from dihal.circuits.contrast import draw_comparison
from dihal.circuits.report import load_run
from dihal.circuits.run import draw_run
from dihal.config.circuits import CircuitsPlotConfig
from dihal.errors import UsageError

__all__ = ["plot", "selftest"]


def plot(config: CircuitsPlotConfig, *, console: Console | None = None) -> None:
    """Draw figures and page of a run or a comparison again, from its files.

    Raises:
        UsageError: no such files in the folder.
    """
    console = Console(highlight=False) if console is None else console
    folder = Path(config.folder)
    if (folder / "compare.json").is_file():
        draw_comparison(folder)
    elif (folder / "run.json").is_file():
        draw_run(load_run(folder), edges=config.edges)
    else:
        raise UsageError(
            f"{config.folder!r} holds neither run.json nor compare.json: --folder takes the folder of "
            "`dihal circuits run`, `compare` or `hybrid`."
        )
    console.print(f"wrote figures and index.html to {folder}")


def selftest(*, console: Console | None = None) -> bool:
    """Hold the package against models whose circuits are known; print one line per claim; return whether all hold."""
    from dihal.circuits.toy import selftest as claims

    console = Console(highlight=False) if console is None else console
    found = claims()
    for row in found:
        mark = "[green]ok[/]  " if row["passed"] else "[bold red]FAIL[/]"
        console.print(f"{mark} {row['name']}: expected {row['expected']:.4g}, found {row['found']:.4g}", soft_wrap=True)
    passed = all(row["passed"] for row in found)
    console.print(f"{sum(row['passed'] for row in found)} of {len(found)} claims hold")
    return passed
