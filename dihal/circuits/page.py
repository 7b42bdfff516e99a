"""A run or a comparison as one HTML file that needs nothing else: images, style and a few lines of script inline."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from typing import Any

from dihal.circuits.figures import Drawn
from dihal.circuits.report import Run
from dihal.page_style import SCRIPT, STYLE

__all__ = ["comparison_page", "run_page"]

# The figures are drawn on white: they keep it in a dark page.
_OWN = "figure img{width:100%;height:auto;display:block;background:#fff;border-radius:4px}.call{font-size:1.1rem;font-weight:700}"


def _figure(drawn: Drawn) -> str:
    # An image of its own, so that the page's style does not reach into the drawing.
    data = base64.b64encode(drawn.svg.encode()).decode()
    return (
        f'<figure><h3>{escape(drawn.title)}</h3><img alt="{escape(drawn.title, quote=True)}" '
        f'src="data:image/svg+xml;base64,{data}"><figcaption>{escape(drawn.caption)}</figcaption></figure>'
    )


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _interval(item: dict[str, Any], form: str = ".2f") -> str:
    if item["value"] is None:
        return ""
    band = "" if item["low"] is None else f" [{item['low']:{form}}, {item['high']:{form}}]"
    return f"{item['value']:{form}}{band}"


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A sortable table; the first column names the row. A cell is a value, or (value to sort by, text)."""
    head = "".join(
        f'<th scope="col"{"" if i == 0 else " class=number"}><button type="button">{escape(name)}<span aria-hidden="true"></span></button></th>'
        for i, name in enumerate(header)
    )
    body = []
    for row in rows:
        cells = []
        for i, cell in enumerate(row):
            value, text = cell if isinstance(cell, tuple) else (cell, _number(cell))
            sort = "" if value is None else f' data-v="{escape(str(value), quote=True)}"'
            name = f'<th scope="row"{sort}>{escape(text)}</th>'
            cells.append(name if i == 0 else f'<td class="number"{sort}>{escape(text)}</td>')
        body.append(f'<tr class="checkpoint">{"".join(cells)}</tr>')
    return (
        f'<h2>{escape(title)}</h2><div class="scroll" tabindex="0" role="region" aria-label="{escape(title, quote=True)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _facts(title: str, facts: dict[str, Any]) -> str:
    lines = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value if isinstance(value, str) else json.dumps(value))}</dd>"
        for name, value in facts.items()
        if value is not None
    )
    return f"<details><summary>{escape(title)}</summary><dl>{lines}</dl></details>"


def _page(title: str, notes: Sequence[str], body: str) -> str:
    said = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f"<style>{STYLE}{_OWN}</style></head><body><main><h1>{escape(title)}</h1><ul>{said}</ul>{body}</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _figures(drawn: Sequence[Drawn]) -> str:
    return f'<div class="figures">{"".join(_figure(one) for one in drawn)}</div>'


def _about_task(task: dict[str, Any]) -> list[str]:
    return [
        f"Task {task['task']} (hash {task['template_hash']}): {task['corruption']}.",
        f"{task['n']} pairs score the edges, {task['test']} others run the circuits; {task['split_rule']}.",
    ]


def _provenance(details: dict[str, Any]) -> dict[str, Any]:
    found = details["provenance"]
    return {
        "commit": found.get("commit"),
        "measured": found.get("time"),
        "command": found.get("command"),
        "versions": ", ".join(f"{name} {value}" for name, value in found.get("versions", {}).items() if value),
        "hardware": found.get("hardware"),
        "configuration": details["config"]["hash"],
    }


def run_page(run: Run, drawn: Sequence[Drawn]) -> str:
    """The page of a run: figures, curves and top edges as tables, where it comes from."""
    scores, details = run.scores, run.details
    curves = details["curves"]
    shares = next(iter(curves.values()))["fractions"]
    rows = [
        [name, row["cpr"], (row["cmd"], f"{row['cmd']:.3f}"), *[(v, f"{v:.2f}") for v in row["faithfulness"]]]
        for name, row in curves.items()
    ]
    edges = [[row["edge"], row["score"], row["standard_error"]] for row in details["top_edges"]]
    notes = [
        *_about_task(details["task"]),
        f"Accuracy {scores.accuracy:.2f}; {details['metric'].replace('_', ' ')} clean {scores.clean:.2f}, corrupted "
        f"{scores.corrupted:.2f}; {details['edges']:,} edges.",
        f"{scores.method}, {scores.steps} steps ({scores.rule or 'fixed points'}), path {scores.path}; "
        f"{scores.passes.get('forward', 0)} forward and {scores.passes.get('backward', 0)} backward passes, "
        f"{scores.seconds:.0f} s.",
        "A score is the estimated change of the metric when the edge carries the corrupted value: negative edges serve the task.",
    ]
    body = (
        _figures(drawn)
        + _table("Faithfulness", ["ranking", "CPR", "CMD", *[f"{100 * share:g} %" for share in shares]], rows)
        + _table("Top edges", ["edge", "score", "standard error"], edges)
        + "<h2>Where it comes from</h2>"
        + _facts("Model", details["subject"])
        + _facts("Task", details["task"])
        + _facts("Checks: largest relative errors of the identities", scores.residuals)
        + _facts("Provenance", _provenance(details))
    )
    return _page(f"Circuits of {run.label} on {details['task']['task']}", notes, body)


def _overlap_table(data: dict[str, Any]) -> str:
    rows = []
    for row in data["overlap"]:
        value = row["jaccard"]["value"]
        rows.append(
            [
                (row["k"], f"{row['k']:,}"),
                (row["fraction"], f"{100 * row['fraction']:.2g} %"),
                (value, _interval(row["jaccard"])),
                row["shared"],
                row["chance"],
                row["null"]["layer"]["mean"],
                row["null"]["kind"]["mean"],
                row["ceiling"],
                row["halves"]["across"],
                row["corrected"],
            ]
        )
    header = [
        "K",
        "share",
        "J",
        "shared",
        "chance",
        "layer null",
        "kind null",
        "ceiling",
        "J across halves",
        "corrected",
    ]
    return _table("Overlap", header, rows)


def _depth_table(data: dict[str, Any]) -> str:
    rows = []
    for side, found in data["depth"].items():
        for name, text in (
            ("early", "share in the first third"),
            ("center", "centre of mass, layers"),
            ("lower", "share of the lowest"),
        ):
            values = [model[name] for model in found["models"]]
            change = found["change"][name]
            rows.append(
                [f"{side}: {text}", *[(v["value"], _interval(v)) for v in values], (change["value"], _interval(change))]
            )
        distance = found["wasserstein"]
        within = ", ".join(f"{value:.2f}" for value in found["wasserstein_halves"])
        rows.append(
            [
                f"{side}: Wasserstein-1, layers (halves of one model: {within})",
                None,
                None,
                (distance, f"{distance:.2f}"),
            ]
        )
    return _table("Depth", ["quantity", *data["labels"], "difference"], rows)


def _spread_table(data: dict[str, Any]) -> str:
    """How concentrated both models are: on edges, components, neurons, and components on tokens."""
    rows: list[list[Any]] = []
    for name, found in data["whole"]["concentration"].items():
        cells = [(found[side]["value"], _interval(found[side], ".1f")) for side in ("first", "second")]
        change = found["change"]
        rows.append([f"{name} that carry the scores: participation ratio; log2 of second over first", *cells])
        rows[-1].append((change["value"], _interval(change)))
    layers, change = data["neurons"]["layers"], data["neurons"]["change"]
    if layers:
        means = [sum(row[side]["participation"] for row in layers) / len(layers) for side in ("first", "second")]
        text = "neurons that carry a layer, mean over layers: participation ratio; mean log2 of second over first"
        rows.append([text, *[(value, f"{value:.1f}") for value in means], (change["value"], _interval(change))])
    lens = data["lens"]
    if lens and lens["difference"] is not None:
        low, high = lens["difference_interval"]
        change = {"value": lens["difference"], "low": low, "high": high}
        medians = [(value, f"{value:.3f}") for value in lens["median_specialisation"]]
        rows.append(["top components' specialisation, median", *medians, (change["value"], _interval(change, ".3f"))])
    return _table("Concentration", ["quantity", *data["labels"], "change"], rows)


def _component_table(data: dict[str, Any]) -> str:
    names = data["components"]["names"]
    first, second = data["components"]["top"]["first"], data["components"]["top"]["second"]
    order = sorted(range(len(names)), key=lambda i: -max(abs(first[i]), abs(second[i])))[:50]
    return _table(
        "Components: s(v) over the top edges",
        ["component", *data["labels"]],
        [[names[i], first[i], second[i]] for i in order],
    )


def comparison_page(data: dict[str, Any], drawn: Sequence[Drawn]) -> str:
    """The page of a comparison: verdict with its rule first."""
    verdict = data["verdict"]
    call = (
        '<p class="call">No verdict: circuits were not run in each other\'s model.</p>'
        if verdict is None
        else f'<p class="call">{escape(verdict["call"])}</p><p>{escape(verdict["rule"])}.</p><p>Null: {escape(verdict["null"])}.</p>'
    )
    notes = [
        *_about_task(data["task"]),
        *[
            f"{label}: accuracy {one['accuracy']:.2f}, metric clean {_number(one['clean'])}, corrupted {_number(one['corrupted'])}."
            for label, one in zip(data["labels"], data["behaviour"], strict=True)
        ],
        f"Over all edges: weighted Jaccard {_interval(data['whole']['weighted_jaccard'])} (ceiling "
        f"{data['whole']['weighted_jaccard']['ceiling']:.2f}), Spearman {_interval(data['whole']['spearman'])} (ceiling "
        f"{data['whole']['spearman']['ceiling']:.2f}).",
        "Few shared edges are no evidence of another mechanism: the verdict rests on running circuits in both models.",
    ]
    body = (
        f"<h2>Verdict</h2>{call}"
        + _figures(drawn)
        + _overlap_table(data)
        + _depth_table(data)
        + _spread_table(data)
        + _component_table(data)
        + "<h2>Where it comes from</h2>"
        + "".join(_facts(label, model) for label, model in zip(data["labels"], data["models"], strict=True))
        + _facts("Task", data["task"])
        + _facts("Provenance", _provenance(data))
    )
    return _page(f"Circuits compared: {data['labels'][0]} and {data['labels'][1]}", notes, body)
