"""The sweep as sentences, as a terminal table and as Markdown; all derived from the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dihal.evaluation.bootstrap import Interval
from dihal.sweep.predictors import GROUPS
from dihal.sweep.report import SweepReport
from dihal.sweep.statistics import Relation

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["beside_markdown", "build_table", "to_markdown", "verdict"]

WIDE = 120
"""Terminal columns from which the table shows everything."""


def _number(value: float | None, digits: int, sign: bool = False) -> str:
    if value is None:
        return "n/a"
    if value == 0:
        return "0"
    if abs(value) < 0.5 * 10**-digits and not sign:
        return f"{value:.0e}"
    return f"{value:{'+' if sign else ''}.{digits}f}"


def _interval(item: Interval, digits: int, *, sign: bool = False) -> str:
    text = _number(item.value, digits, sign)
    if item.low is None or item.high is None:
        return text
    return f"{text} [{_number(item.low, digits, sign)}, {_number(item.high, digits, sign)}]"


def _loss(report: SweepReport, truth: str, split: int) -> str:
    item = report.truths[truth]["intervals"][report.splits.index(split)]
    return f"{_interval(Interval(**item), 4)} {report.truths[truth]['unit']}"


def _best(report: SweepReport, truth: str) -> tuple[list[str], float] | None:
    """Predictors with the highest correlation, and it."""
    found = {
        name: item.spearman.value for name, item in report.relations[truth].items() if item.spearman.value is not None
    }
    if not found:
        return None
    top = max(found.values())
    return [name for name, value in found.items() if value >= top - 1e-12], top


def verdict(report: SweepReport, truth: str | None = None) -> list[str]:
    """What the sweep says about one truth (None: the main one), in plain sentences."""
    name = truth or report.truth
    about, rows = report.truths[name], report.relations[name]
    label = {key: item["label"] for key, item in report.predictors.items()}
    best = report.best_split(name)
    share = about["best_probability"]
    sure = "" if share is None else f" (the best in {share:.0%} of the resamples)"
    lines = [
        f"{about['label']} is least at split {best}: {_loss(report, name, best)}{sure}. A split drawn at random costs "
        f"{_interval(Interval(**about['random_regret']), 4)} {about['unit']} more."
    ]
    top = _best(report, name)
    if top is None:
        lines.append("No predictor is defined at every candidate split.")
    else:
        names = ", ".join(label[key] for key in top[0])
        lines.append(f"Highest Spearman correlation: {names}, {_interval(rows[top[0][0]].spearman, 2, sign=True)}.")
    free = [label[key] for key, item in rows.items() if item.regret.value == 0]
    lines.append(f"Predictors that choose the best split: {', '.join(free) if free else 'none'}.")
    for key, item in report.predictors.items():
        if item["group"] == "score" and rows[key].choice is not None:
            relation = rows[key]
            lines.append(
                f"Choosing by the {label[key]} selects split {relation.choice} and costs "
                f"{_interval(relation.regret, 4)} {about['unit']}; Spearman {_interval(relation.spearman, 2, sign=True)}, "
                f"{_interval(relation.above_depth, 2, sign=True)} against the shallower the better."
            )
    return lines


def _cells(report: SweepReport, name: str, relation: Relation) -> dict[str, str]:
    item = report.predictors[name]
    return {
        "predictor": item["label"],
        "kind": GROUPS[item["group"]],
        "Spearman": _interval(relation.spearman, 2, sign=True),
        "Kendall": _interval(relation.kendall, 2, sign=True),
        "over depth": _interval(relation.above_depth, 2, sign=True),
        "chooses": "n/a" if relation.choice is None else str(relation.choice),
        "regret": _interval(relation.regret, 4),
        "opposite": _number(relation.opposite_regret, 4),
    }


_NARROW = ("predictor", "Spearman", "chooses", "regret")


def build_table(report: SweepReport, width: int | None = None) -> Table:
    """One row per predictor, the cheapest choice first; fewer columns where ``width`` is small (None: all)."""
    from rich import box
    from rich.table import Table

    about = report.truths[report.truth]
    table = Table(
        title=f"What predicts {about['label']} of {report.backbone['id']} under {report.regime}",
        caption="\n".join(verdict(report)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        header_style="bold",
        padding=(0, 1, 0, 0),
    )
    wide = width is None or width >= WIDE
    headings = [
        name
        for name in ("predictor", "Spearman", "Kendall", "over depth", "chooses", "regret", "opposite")
        if wide or name in _NARROW
    ]
    for name in headings:
        # Square brackets would be markup.
        unit = f", {about['unit']}" if name == "regret" else ""
        table.add_column(name + unit, justify="left" if name == "predictor" else "right", no_wrap=True)
    for name in report.ranking:
        cells = _cells(report, name, report.relations[report.truth][name])
        style = "bold" if report.predictors[name]["group"] == "score" else None
        table.add_row(*(cells[heading] for heading in headings), style=style)
    return table


def _line(values: list[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def _markdown(headings: list[str], rows: list[list[str]], *, text_columns: int) -> list[str]:
    rule = ["---"] * text_columns + ["---:"] * (len(headings) - text_columns)
    return [_line(headings), _line(rule), *map(_line, rows)]


def _about(report: SweepReport) -> str:
    seeds = f"{len(report.seeds)} training seeds" if len(report.seeds) > 1 else f"one training seed ({report.seeds[0]})"
    scored = report.data["scored"]
    return (
        f"Backbone {report.backbone['id']}; regime {report.regime}, space {report.method['space']}, method "
        f"{report.method['name']}; budget {report.budget['name']!r} ({report.budget['tokens']:,} diffused tokens a split); "
        f"{len(report.splits)} splits, {seeds}; {report.data['held_out_documents']} held-out documents; predictors from "
        f"{scored['tokens']:,} tokens of {scored['documents']} training documents; intervals: {report.confidence:.0%} of "
        f"{report.bootstrap} resamples of documents."
    )


def _truth_table(report: SweepReport) -> list[str]:
    headings = ["split", *(f"{item['label']} [{item['unit']}]" for item in report.truths.values())]
    rows = []
    for place, split in enumerate(report.splits):
        cells = [str(split)]
        for name, item in report.truths.items():
            text = _interval(Interval(**item["intervals"][place]), 4)
            cells.append(f"**{text}**" if split == report.best_split(name) else text)
        rows.append(cells)
    return _markdown(headings, rows, text_columns=0)


def to_markdown(report: SweepReport) -> str:
    """The whole sweep: sentences, predictors against every truth, the truths, definitions."""
    out = [f"# Sweep over splits, regime {report.regime}", "", _about(report), ""]
    order = [report.truth, *(name for name in report.truths if name != report.truth)]
    headings = ["predictor", "kind", "Spearman", "Kendall", "over depth", "chooses", "regret", "opposite"]
    for name in order:
        about = report.truths[name]
        out += [f"## {about['label']}", "", *(f"- {sentence}" for sentence in verdict(report, name)), ""]
        rows = []
        for predictor in report.ranking:
            cells = _cells(report, predictor, report.relations[name][predictor])
            rows.append([cells[heading] for heading in headings])
        shown = [f"{heading} [{about['unit']}]" if heading == "regret" else heading for heading in headings]
        out += [*_markdown(shown, rows, text_columns=2), ""]
    out += ["## Truth", "", *_truth_table(report), ""]
    out += [f"- {item['label']}: {item['definition']}" for item in report.truths.values()]
    if report.transfer is not None:
        out += [
            "",
            "## Fitted weights",
            "",
            f"Fitted to {report.transfer['truth']} on {', '.join(report.transfer['models'])}.",
            "",
        ]
        for name, weights in report.transfer["weights"].items():
            shares = ", ".join(f"{report.predictors[part]['label']} {weight:+.2f}" for part, weight in weights.items())
            out.append(f"- {report.predictors[name]['label']}: {shares}")
    out += ["", "## Definitions", ""]
    out += [f"- {name.replace('_', ' ')}: {text}." for name, text in report.definitions.items()]
    out += [
        f"- {item['label']} ({'larger' if item['sign'] > 0 else 'smaller'} is expected to be better): {item['definition']}."
        for item in report.predictors.values()
    ]
    return "\n".join(out) + "\n"


def _heading(report: SweepReport, all_reports: list[SweepReport]) -> str:
    about = report.truths[report.truth]
    models = {item.backbone["id"] for item in all_reports}
    model = f", {report.backbone['id']}" if len(models) > 1 else ""
    return f"{report.regime}{model}: {about['label']}"


def beside_markdown(reports: list[SweepReport]) -> str:
    """Predictor x sweep: correlation and regret of each under its main truth. One sweep is a table of its own."""
    rows: dict[str, list[str]] = {}
    labels: dict[str, str] = {}
    for report in reports:
        labels |= {name: item["label"] for name, item in report.predictors.items() if name not in labels}
    for name, label in labels.items():
        cells = [label]
        for report in reports:
            relation: Any = report.relations[report.truth].get(name)
            if relation is None:
                cells += ["", "", ""]
            else:
                shown = _cells(report, name, relation)
                cells += [shown["Spearman"], shown["chooses"], shown["regret"]]
        rows[name] = cells
    headings = ["predictor"]
    for report in reports:
        title = _heading(report, reports)
        headings += [f"{title}: Spearman", "chooses", f"regret [{report.truths[report.truth]['unit']}]"]
    out = ["# Predictors", "", *_markdown(headings, list(rows.values()), text_columns=1), ""]
    for report in reports:
        out += [f"{_heading(report, reports)}. {_about(report)}", "", *(f"- {line}" for line in verdict(report)), ""]
    return "\n".join(out)
