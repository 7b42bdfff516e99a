"""A board as one HTML file that needs nothing else: the figure inline, sortable tables, samples, provenance."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from html import escape

from dihal.evaluation.frontier.board import Board, Curve
from dihal.evaluation.frontier.definitions import METRICS, SET_METRICS
from dihal.evaluation.frontier.result import FrontierRow
from dihal.evaluation.frontier.table import (
    ENDS,
    curve_columns,
    describe,
    line_cells,
    point_cells,
    point_columns,
)
from dihal.evaluation.generation import SEPARATOR
from dihal.page_style import SCRIPT, STYLE

__all__ = ["to_html"]

_OWN_STYLE = ".drawing{background:#fff;border-radius:6px;padding:.4rem;overflow-x:auto}.drawing svg{min-width:640px;max-width:980px;margin:auto}.drawing svg text{fill:revert-layer}"

_LEFT = ("name", "kind")


def _table(columns: dict[str, str], rows: list[tuple[str, dict[str, str]]], label: str) -> str:
    used = [name for name in columns if any(row[name] for _, row in rows)]
    head = "".join(
        f'<th scope="col"{"" if name in _LEFT else NUMBER}><button type="button">{escape(columns[name])}'
        '<span aria-hidden="true"></span></button></th>'
        for name in used
    )
    body = []
    for kind, row in rows:
        line = []
        for name in used:
            text = row[name]
            # The value before its interval or its seeds sorts; a cell without one stays last.
            key = re.sub(r"(?<=\d)[kMGT]$", lambda unit: _POWERS[unit[0]], re.split(r"(?<=\d) (?:[\[(]|at )", text)[0])
            value = f' data-v="{escape(key, quote=True)}"' if text and not text.startswith(ENDS) else ""
            if name == "name":
                line.append(f'<th scope="row"{value}>{escape(text)}</th>')
            elif name == "kind":
                line.append(f'<td{value}><span class="kind">{escape(text)}</span></td>')
            else:
                line.append(f"<td{NUMBER}{value}>{escape(text)}</td>")
        body.append(f'<tr class="{kind}">{"".join(line)}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label, quote=True)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


NUMBER = ' class="number"'
_POWERS = {"k": "e3", "M": "e6", "G": "e9", "T": "e12"}


def _samples(curves: list[Curve]) -> str:
    parts = []
    for curve in curves:
        for point in curve.points:
            mark = [] if curve.row.kind == "text" else [f"T {point.temperature:g}"]
            mark += [f"{point.steps} steps"] if point.steps else []
            for text in point.texts:
                prompt, _, new = text.partition(SEPARATOR)
                label = f'<span class="kind">{escape(", ".join(mark))}</span> ' if mark else ""
                parts.append(
                    f'<blockquote>{label}<span class="prompt">{escape(prompt)}</span>{escape(new)}</blockquote>'
                )
    return "".join(parts)


def _provenance(label: str, row: FrontierRow, curves: list[Curve]) -> str:
    commit = row.provenance.get("commit")
    facts = {
        "file": curves[0].path.name,
        "command": row.command,
        "commit": None if commit is None else commit[:12] + (" (dirty)" if row.provenance.get("dirty") else ""),
        "measured": row.provenance.get("time"),
        "writing": None if not row.writing else json.dumps(row.writing),
        "configuration": row.row_hash,
        "training configuration": row.train_config_hash,
        "checkpoint": None if row.checkpoint is None else json.dumps(row.checkpoint),
        "budget": None if row.comparable.budget is None else json.dumps(asdict(row.comparable.budget)),
        "cost": json.dumps({key: value for key, value in row.cost.items() if value is not None}),
        "backbone": f"{row.backbone.get('id')} {row.comparable.backbone_fingerprint[:16]}",
        "scorer": f"{row.comparable.scorer} {row.comparable.scorer_fingerprint[:16]}",
        "prompts": row.comparable.data_fingerprint[:16],
        "versions": ", ".join(f"{k} {v}" for k, v in (row.provenance.get("versions") or {}).items() if v),
        "hardware": json.dumps(row.provenance.get("hardware")),
    }
    lines = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v is not None)
    return f"<details><summary>{escape(label)}</summary><dl>{lines}</dl>{_samples(curves)}</details>"


def to_html(board: Board, drawing: str) -> str:
    """Return the page.

    Args:
        board: the curves.
        drawing: the figure as SVG.
    """
    notes = "".join(f"<li>{escape(sentence)}</li>" for sentence in describe(board))
    curves = line_cells(board)
    points = [(curve.row.kind, point_cells(curve, point, board)) for curve in board.curves for point in curve.points]
    terms = [(metric.label, metric.definition) for metric in METRICS.values()] + list(SET_METRICS.values())
    defined = "".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in terms)
    rows = "".join(
        _provenance(label, row, [curve for curve in board.curves if curve.label == label])
        for label, row in board.rows()
    )
    svg = drawing[drawing.index("<svg") :]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><title>DiHAL frontier</title>'
        f"<style>{STYLE}{_OWN_STYLE}</style></head><body><main><h1>DiHAL frontier</h1><ul>{notes}</ul>"
        f'<div class="drawing" role="img" aria-label="NLL of generated text against its entropy">{svg}</div>'
        f"<h2>At equal entropy</h2>{_table(curve_columns(board), curves, 'Curves at equal entropy')}"
        f"<h2>Points</h2>{_table(point_columns(board), points, 'Points')}"
        f"<h2>Where each row comes from</h2>{rows}"
        f'<h2>Definitions</h2><dl class="terms">{defined}</dl></main><script>{SCRIPT}</script></body></html>\n'
    )
