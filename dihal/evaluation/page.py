"""A board as one HTML file that needs nothing else: inline SVG, inline style, a few lines of inline script."""

from __future__ import annotations

import json
from dataclasses import asdict
from html import escape

from dihal.evaluation import series, svg
from dihal.evaluation.definitions import METRICS
from dihal.evaluation.ranking import Board, Entry
from dihal.evaluation.result import TextResult
from dihal.evaluation.table import COLUMNS, cells, describe
from dihal.page_style import SCRIPT, STYLE

__all__ = ["to_html"]

_TEXT_COLUMNS = {
    "name": "row",
    "steps": "steps",
    "generative_perplexity": "gen. ppl",
    "generative_nll": "NLL",
    "entropy": "entropy",
    "dist_2": "dist-2",
    "rep_4": "rep-4",
    "degenerate_rate": "degenerate",
    "tokens_per_second": "tokens/s",
}


def _figure(title: str, drawing: str, caption: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def _figures(board: Board) -> str:
    parts = []
    rows = series.kl_by_row(board)
    if rows:
        parts.append(
            _figure(
                "Distance from the backbone",
                svg.rows_chart(rows, axis="KL(backbone ‖ row), nats", description="KL of every row with its interval"),
                "Suffix-KL with document-bootstrap interval, each row at its best number of steps. "
                "Filled: trained. Hollow: bounds and controls.",
            )
        )
    errors = series.kl_against_error(board)
    if len(errors) > 1:
        parts.append(
            _figure(
                "State error against KL",
                svg.scatter_chart(
                    errors,
                    x_label="state variance not explained (1 − explained variance)",
                    y_label="KL, nats",
                    description="KL against state error",
                ),
                "Low state error can still lose tokens: both axes are logarithmic. Faint points: other numbers of steps.",
            )
        )
    steps = series.kl_by_steps(board)
    if steps:
        parts.append(
            _figure(
                "Sampling steps",
                svg.lines_chart(
                    steps, x_label="sampling steps", y_label="KL, nats", description="KL by sampling steps"
                ),
                "KL of the same checkpoint sampled with more steps.",
            )
        )
    texts = series.frontier(board)
    if len(texts) > 1:
        parts.append(
            _figure(
                "Generated text",
                svg.scatter_chart(
                    texts,
                    x_label="unigram entropy of a sample, nats",
                    y_label="NLL under the scorer, nats/token",
                    description="NLL of generated text against its entropy",
                    logarithmic=False,
                ),
                "A frontier, not a number: low NLL at low entropy is repetition.",
            )
        )
    return f'<div class="figures">{"".join(parts)}</div>'


def _header(names: dict[str, str]) -> str:
    number = ' class="number"'
    cols = "".join(
        f'<th scope="col"{"" if name in ("name", "kind") else number}><button type="button">{escape(text)}<span aria-hidden="true"></span></button></th>'
        for name, text in names.items()
    )
    return f"<thead><tr>{cols}</tr></thead>"


def _cell(text: str, value: float | int | str | None, css: str = "") -> str:
    sort = "" if value is None else f' data-v="{escape(str(value), quote=True)}"'
    kind = f' class="{css}"' if css else ""
    return f"<td{kind}{sort}>{escape(text)}</td>"


def _sort_value(entry: Entry, name: str) -> float | int | str | None:
    result = entry.result
    if name in METRICS:
        return result.metrics[entry.steps][name].value
    if name == "generated":
        found = result.text.get(entry.steps)
        return None if found is None else found.generative_perplexity
    values = {
        "rank": None if entry.rank is None else entry.rank[0] + entry.rank[1] / 1e4,
        "name": entry.label,
        "kind": result.kind,
        "split": result.split,
        "steps": int(entry.steps),
        "parameters": result.cost.trainable_parameters,
        "tokens": result.cost.diffused_tokens,
    }
    return values[name]


def _table(board: Board) -> str:
    rows = [cells(entry) for entry in board.entries]
    used = {name: text for name, text in COLUMNS.items() if any(row[name] for row in rows)}
    body = []
    for entry, row in zip(board.entries, rows, strict=True):
        line = []
        for name in used:
            value = _sort_value(entry, name)
            if name == "name":
                line.append(f'<th scope="row" data-v="{escape(entry.label, quote=True)}">{escape(row[name])}</th>')
            elif name == "kind":
                line.append(f'<td data-v="{row[name]}"><span class="kind">{row[name]}</span></td>')
            else:
                line.append(_cell(row[name], value, "number"))
        body.append(f'<tr class="{entry.result.kind}">{"".join(line)}</tr>')
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Leaderboard"><table>'
        f"{_header(used)}<tbody>{''.join(body)}</tbody></table></div>"
    )


def _text_table(board: Board) -> str:
    body = []
    for entry in board.entries:
        for steps, found in sorted(entry.result.text.items(), key=lambda item: int(item[0])):
            line = [f'<th scope="row" data-v="{escape(entry.label, quote=True)}">{escape(entry.label)}</th>']
            line.append(_cell("" if steps == "0" else steps, int(steps), "number"))
            for name in list(_TEXT_COLUMNS)[2:]:
                value = getattr(found, name)
                shown = "" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
                if name == "generative_perplexity" and found.self_graded:
                    shown += "*"
                line.append(_cell(shown, value, "number"))
            body.append(f'<tr class="{entry.result.kind}">{"".join(line)}</tr>')
    if not body:
        return ""
    return (
        '<h2>Generated text</h2><div class="scroll" tabindex="0" role="region" aria-label="Generated text"><table>'
        f"{_header(_TEXT_COLUMNS)}<tbody>{''.join(body)}</tbody></table></div>"
    )


def _samples(found: dict[str, TextResult]) -> str:
    parts = []
    for steps, block in sorted(found.items(), key=lambda item: int(item[0])):
        for text in block.texts:
            prompt, _, new = text.partition(" ||| ")
            label = "" if steps == "0" else f'<span class="kind">{escape(steps)} steps</span> '
            parts.append(f'<blockquote>{label}<span class="prompt">{escape(prompt)}</span>{escape(new)}</blockquote>')
    return "".join(parts)


def _provenance(entry: Entry) -> str:
    result, cost = entry.result, entry.result.cost
    commit = result.provenance.get("commit")
    facts = {
        "file": entry.path.name,
        "command": result.command,
        "commit": None if commit is None else commit[:12] + (" (dirty)" if result.provenance.get("dirty") else ""),
        "measured": result.provenance.get("time"),
        "configuration": result.config_hash,
        "training configuration": result.train_config_hash,
        "checkpoint": None if result.checkpoint is None else json.dumps(result.checkpoint),
        "budget": None if result.comparable.budget is None else json.dumps(asdict(result.comparable.budget)),
        "backbone": f"{result.backbone.get('id')} {result.comparable.backbone_fingerprint[:16]}",
        "text": result.comparable.data_fingerprint[:16],
        "tokenizer": result.comparable.tokenizer_fingerprint[:16],
        "versions": ", ".join(f"{k} {v}" for k, v in (result.provenance.get("versions") or {}).items() if v),
        "hardware": json.dumps(result.provenance.get("hardware")),
        "evaluations of the denoiser": json.dumps(cost.nfe) if cost.nfe else None,
        "training seconds": cost.train_seconds,
        "training FLOPs": None if cost.train_flops is None else f"{sum(cost.train_flops.values()):.4g}",
        "training FLOPs by part": None if cost.train_flops is None else json.dumps(cost.train_flops),
        "unique training tokens": cost.unique_tokens,
        "training hardware": cost.train_hardware,
        "training peak memory": None if cost.train_peak_memory is None else f"{cost.train_peak_memory:,} bytes",
        "configurations tried": cost.tuning_trials,
        "FLOPs per predicted token": json.dumps(cost.sampling_flops) if cost.sampling_flops else None,
        "notes": "; ".join(result.details.get("notes", [])) or None,
    }
    lines = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v is not None)
    return f"<details><summary>{escape(entry.label)}</summary><dl>{lines}</dl>{_samples(result.text)}</details>"


def to_html(board: Board) -> str:
    """Return the page: figures, sortable tables, samples and provenance of every row, definitions."""
    notes = "".join(f"<li>{escape(sentence)}</li>" for sentence in describe(board))
    terms = "".join(
        f"<dt>{escape(metric.label)}</dt><dd>{escape(metric.definition)}</dd>" for metric in METRICS.values()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><title>DiHAL leaderboard</title>'
        f"<style>{STYLE}</style></head><body><main><h1>DiHAL leaderboard</h1><ul>{notes}</ul>"
        f"{_table(board)}{_figures(board)}{_text_table(board)}"
        f"<h2>Where each row comes from</h2>{''.join(_provenance(entry) for entry in board.entries)}"
        f'<h2>Definitions</h2><dl class="terms">{terms}</dl></main><script>{SCRIPT}</script></body></html>\n'
    )
