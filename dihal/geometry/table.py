"""The report in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dihal.geometry.report import CoordinateReport, ScoreReport, SplitReport

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["build_table", "rival_line", "sink_line", "text_line"]

FEW_DOCUMENTS = 20
"""Below this many documents an interval is said to be rough."""


def _score(item: SplitReport) -> str:
    if item.score_interval is None:
        return f"{item.score:+.2f}"
    low, high = item.score_interval
    return f"{item.score:+.2f} [{low:+.2f}, {high:+.2f}]"


def text_line(report: ScoreReport) -> str:
    """What was scored, and a word of caution where it was little."""
    data = report.data
    line = f"{data['tokens']:,} tokens of {data['documents']} documents"
    if data["tokens"] < data["tokens_asked"]:
        line += f" (all there are; {data['tokens_asked']:,} were asked for)"
    if report.config["bootstrap"] and data["documents"] < FEW_DOCUMENTS:
        line += "; so few documents make intervals rough"
    return line


def sink_line(report: ScoreReport) -> str:
    """How many tokens were dropped, and what that changed where it changed most."""
    first = max(layer.dropped_first for layer in report.layers)
    most = max(report.layers, key=lambda layer: layer.dropped_norm)
    if not first and not most.dropped_norm:
        return "sinks: no token dropped"
    name, worst = max(
        ((name, item) for name, part in report.coordinates.items() for item in part.splits),
        key=lambda pair: abs(pair[1].rank - pair[1].rank_with_sinks),
    )
    return (
        f"sinks: per layer {first} first positions and up to {most.dropped_norm} tokens of large norm dropped; "
        f"largest effect: log rank {worst.rank_with_sinks:.2f} -> {worst.rank:.2f} (split {worst.split}, {name})"
    )


def rival_line(name: str, item: CoordinateReport) -> str:
    """How far trivial predictors explain the score."""
    values = ", ".join(
        f"{label} {value:+.2f}" if value is not None else f"{label} n/a"
        for label, value in (
            ("depth", item.rivals["depth"]),
            ("norm", item.rivals["median_norm"]),
            ("cosine", item.rivals["mean_cosine"]),
            ("trace", item.rivals["log_trace"]),
        )
    )
    where = "" if item.argmax_interval is None else " in [{:g}, {:g}]".format(*item.argmax_interval)
    return f"{name}: argmax {item.argmax}{where}; Spearman of the score with {values}"


WIDE = 120
"""Terminal columns from which the table shows everything."""


def build_table(report: ScoreReport, width: int | None = None) -> Table:
    """One row per split; columns of the selecting coordinates in full, the others' scores beside them.

    Args:
        report: what is shown.
        width: columns of the terminal; below 120 only the selecting coordinates are shown. None: everything.
    """
    from rich.table import Table

    chosen = report.coordinates[report.select_by]
    wide = width is None or width >= WIDE
    others = [name for name in report.coordinates if name != report.select_by and wide]
    notes = [text_line(report), sink_line(report)]
    notes += [rival_line(name, item) for name, item in report.coordinates.items()]
    table = Table(
        title=f"Geometry score of {report.backbone['id']} ({report.select_by} coordinates select split {report.selected_split})",
        caption="\n".join(notes),
        caption_justify="left",
        header_style="bold",
    )
    table.add_column("split", justify="right", no_wrap=True)
    for header in (
        f"score ({report.select_by})",
        "P(best)",
        "kappa",
        "s",
        "r",
        *(f"score ({name})" for name in others),
    ):
        table.add_column(header, justify="right", no_wrap=True)
    if wide:
        table.add_column("norm", justify="right")
        table.add_column("cosine", justify="right")
    for item, layer in zip(chosen.splits, report.layers):
        best = item.split == report.selected_split
        probability = "" if item.argmax_probability is None else f"{item.argmax_probability:.2f}"
        table.add_row(
            f"{'> ' if best else ''}{item.split}",
            _score(item),
            probability if item.candidate else "control",
            f"{item.curvature:.2f}",
            f"{item.stiffness:.2f}",
            f"{item.rank:.2f}",
            *(f"{report.coordinates[name].splits[item.split].score:+.2f}" for name in others),
            *((f"{layer.median_norm:.4g}", f"{layer.mean_cosine:.2f}") if wide else ()),
            style="bold green" if best else ("dim" if not item.candidate else None),
            end_section=not item.candidate,
        )
    return table
