"""A board as cells, and as a terminal table, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import fields

from rich.table import Table

from dihal.evaluation.definitions import METRICS
from dihal.evaluation.ranking import Board, Entry
from dihal.evaluation.result import Estimate, TextResult

__all__ = ["COLUMNS", "KIND_TEXT", "cells", "describe", "rank_text", "rich_table", "to_csv", "to_markdown"]

COLUMNS = {
    "rank": "rank",
    "name": "row",
    "kind": "kind",
    "split": "split",
    "steps": "steps",
    "kl": "KL [nats]",
    "nll": "NLL",
    "bits_per_byte": "bits/byte",
    "agreement": "top-1",
    "margin": "margin",
    "explained_variance": "expl. var.",
    "cosine": "cosine",
    "generated": "gen. ppl @ entropy",
    "parameters": "trained",
    "tokens": "diffused",
}
"""Column key -> heading."""

_DIGITS = {"kl": 4, "nll": 3, "bits_per_byte": 3, "agreement": 3, "margin": 2, "explained_variance": 3, "cosine": 3}


def rank_text(entry: Entry) -> str:
    """``3``, or ``1-2`` where the intervals leave several ranks open; empty without a rank."""
    if entry.rank is None:
        return ""
    low, high = entry.rank
    return str(low) if low == high else f"{low}-{high}"


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return ""
    if value == 0:
        return "0"
    if abs(value) < 0.5 * 10**-digits:
        return f"{value:.0e}"
    return f"{value:.{digits}f}"


def with_interval(name: str, found: Estimate) -> str:
    """``0.0312 [0.0290, 0.0335]``."""
    digits = _DIGITS.get(name, 3)
    if found.value is None:
        return ""
    text = _number(found.value, digits)
    if found.low is None or found.high is None or found.low == found.high:
        return text
    return f"{text} [{_number(found.low, digits)}, {_number(found.high, digits)}]"


def _count(value: int | None) -> str:
    if value is None:
        return ""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return str(value)


def generated_text(found: TextResult | None) -> str:
    """``44.2* @ 3.30``; the star marks a self-graded perplexity."""
    if found is None:
        return ""
    star = "*" if found.self_graded else ""
    value = found.generative_perplexity
    return f"{value:.1f}{star} @ {found.entropy:.2f}" if value < 1e4 else f"{value:.1e}{star} @ {found.entropy:.2f}"


def cells(entry: Entry, *, intervals: tuple[str, ...] = ("kl",)) -> dict[str, str]:
    """The texts of one row, by column; ``intervals`` names the metrics shown with theirs."""
    result = entry.result
    metrics = result.metrics[entry.steps]
    found = {
        "rank": rank_text(entry),
        "name": entry.label,
        "kind": KIND_TEXT[result.kind],
        "split": "" if result.split is None else str(result.split),
        "steps": "" if entry.steps == "0" else entry.steps,
        "generated": generated_text(result.text.get(entry.steps)),
        "parameters": _count(result.cost.trainable_parameters),
        "tokens": _count(result.cost.diffused_tokens),
    }
    for name, digits in _DIGITS.items():
        estimate = metrics[name]
        found[name] = with_interval(name, estimate) if name in intervals else _number(estimate.value, digits)
    return {name: found[name] for name in COLUMNS}


_FEW_DOCUMENTS = 10


def describe(board: Board) -> list[str]:
    """What the reader must know beside the table, one sentence each."""
    first, shared = board.first, board.first.comparable
    lines = [
        f"Backbone {first.backbone.get('id')} ({first.backbone.get('dtype')}), {first.details.get('predicted_tokens', shared.tokens)} predicted "
        f"tokens of {len(first.documents)} held-out documents in windows of {shared.sequence_length}; metrics version "
        f"{shared.metric_version}.",
        f"Ranked by {board.metric}, each row at its best number of steps. A range of ranks: the paired differences, "
        f"resampled by document ({first.bootstrap} times, {first.confidence:.0%}), do not separate these rows.",
        "Rows of kind bound and control are not trained: they show what the numbers mean.",
    ]
    texts = [found for entry in board.entries for found in entry.result.text.values()]
    if texts:
        scorers = sorted({found.scorer for found in texts})
        graded = " *: self-graded, the scorer is the backbone or its kin." if any(t.self_graded for t in texts) else ""
        lines.append(
            f"Generated text is scored by {', '.join(scorers)}; perplexity means nothing without the entropy beside "
            f"it (low at both is repetition).{graded}"
        )
    seeds = {str((entry.result.train_config or {}).get("seed")) for entry in board.entries if entry.result.train_config}
    if len(first.documents) < _FEW_DOCUMENTS:
        lines.append(f"Only {len(first.documents)} documents: the intervals are rough; raise tokens.")
    if len(seeds) == 1:
        lines.append(f"One training seed ({seeds.pop()}): the intervals do not cover training.")
    if board.ignored:
        lines.append(f"{board.ignored} other JSON files were left out.")
    if board.duplicates:
        lines.append(f"{board.duplicates} copies of rows were left out.")
    return lines


KIND_TEXT = {"checkpoint": "trained", "bound": "bound", "control": "control", "text": "text"}
"""Kind of row -> word in tables."""

_STYLES = {"checkpoint": "bold", "bound": "dim", "control": "dim", "text": "dim"}


def _used(rows: list[dict[str, str]]) -> list[str]:
    return [name for name in COLUMNS if any(row[name] for row in rows)]


_NARROW = ("rank", "name", "steps", "kl", "interval", "nll", "agreement", "explained_variance")
_TERMINAL = (*_NARROW, "bits_per_byte", "kind", "generated")
_WIDE = 120
"""Terminal columns from which everything in ``_TERMINAL`` fits."""


def rich_table(board: Board, width: int | None = None) -> Table:
    """The board for a terminal of ``width`` columns (None: wide): the metrics that matter; the files hold the rest."""
    from rich import box

    rows = [cells(entry, intervals=()) for entry in board.entries]
    for entry, row in zip(board.entries, rows, strict=True):
        # "0.0312 [0.0288, 0.0335]" in two columns, so that neither wraps.
        _, _, interval = with_interval("kl", entry.result.metrics[entry.steps]["kl"]).partition(" ")
        row["interval"] = interval.strip("[]").replace(", ", " .. ")
    headings = {
        **COLUMNS,
        "kl": "KL",
        "interval": f"{board.first.confidence:.0%} interval",
        "generated": "ppl @ entropy",
    }
    caption = (
        f"Ranked by {board.metric}, lower rank is better; rows that share ranks are not separated by their intervals."
    )
    table = Table(title="Leaderboard", caption=caption, box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    shown = _TERMINAL if width is None or width >= _WIDE else _NARROW
    used = [name for name in shown if any(row[name] for row in rows)]
    for name in used:
        table.add_column(
            headings[name], justify="left" if name in ("name", "kind") else "right", no_wrap=name != "kind"
        )
    for entry, row in zip(board.entries, rows, strict=True):
        table.add_row(*(row[name] for name in used), style=_STYLES[entry.result.kind])
    return table


def to_markdown(board: Board) -> str:
    """The board as a Markdown table with its notes."""
    rows = [cells(entry, intervals=("kl", "nll", "explained_variance")) for entry in board.entries]
    used = _used(rows)

    def line(values: list[str]) -> str:
        return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"

    out = ["# Leaderboard", "", line([COLUMNS[name] for name in used])]
    out.append(line(["---" if name in ("name", "kind") else "---:" for name in used]))
    for entry, row in zip(board.entries, rows, strict=True):
        if entry.result.kind == "checkpoint":
            row["name"] = f"**{row['name']}**"
        out.append(line([row[name] for name in used]))
    return "\n".join([*out, "", *(f"- {sentence}" for sentence in describe(board))]) + "\n"


def to_csv(board: Board) -> str:
    """Every row at every number of steps, every metric with its interval, unrounded."""
    text_names = [field.name for field in fields(TextResult) if field.name != "texts"]
    head = ["rank_low", "rank_high", "best", "name", "method", "kind", "split", "steps"]
    parts = ("value", "low", "high", "difference", "difference_low", "difference_high")
    head += [name if part == "value" else f"{name}_{part}" for name in METRICS for part in parts]
    head += [f"text_{name}" for name in text_names]
    head += ["trainable_parameters", "frozen_parameters", "diffused_tokens", "train_seconds", "nfe"]
    head += ["unique_tokens", "train_flops", "tuning_trials", "sampling_flops"]
    head += ["commit", "config_hash", "train_config_hash", "file"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for entry in board.entries:
        result = entry.result
        for steps, metrics in sorted(result.metrics.items(), key=lambda item: int(item[0])):
            best = steps == entry.steps
            row: list[object] = [*(entry.rank if best and entry.rank else ("", "")), int(best), entry.label]
            row += [result.method, result.kind, result.split, steps]
            row += [getattr(metrics[name], part) for name in METRICS for part in parts]
            text = result.text.get(steps)
            row += [None if text is None else getattr(text, name) for name in text_names]
            cost = result.cost
            row += [cost.trainable_parameters, cost.frozen_parameters, cost.diffused_tokens, cost.train_seconds]
            flops = None if cost.train_flops is None else sum(cost.train_flops.values())
            row += [cost.nfe.get(steps), cost.unique_tokens, flops, cost.tuning_trials, cost.sampling_flops.get(steps)]
            row += [result.provenance.get("commit"), result.config_hash]
            row += [result.train_config_hash, entry.path.name]
            writer.writerow(["" if value is None else value for value in row])
    return out.getvalue()
