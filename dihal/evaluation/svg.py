"""Figures as inline SVG for the page: no script, no font, no file from elsewhere. Colours are the page's."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dihal.evaluation.scale import Scale, linear_scale, log_scale, tick_text
from dihal.evaluation.series import Mark, Series

__all__ = ["lines_chart", "rows_chart", "scatter_chart"]

# Drawn at about the width of a telephone, so that text keeps its size there; wide pages put figures side by side.
_WIDTH = 440.0
# Widths of a character, taken generously: SVG cannot measure text without a script.
_CHARACTER = 7.5
_BOLD = 8.2
_COLOURS = 6


def _tone(series: Series) -> str:
    return "grey" if series.colour is None else f"c{series.colour % _COLOURS}"


def _width(text: str, series: Series) -> float:
    return len(text) * (_BOLD if series.kind == "checkpoint" else _CHARACTER)


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


def _text(x: float, y: float, text: str, *, anchor: str = "start", css: str = "") -> str:
    kind = f' class="{css}"' if css else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def _dot(x: float, y: float, series: Series, mark: Mark, title: str) -> str:
    hollow = " hollow" if series.kind != "checkpoint" else ""
    faint = "" if mark.best else " faint"
    radius = 4.5 if mark.best else 3.2
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="dot {_tone(series)}{hollow}{faint}">'
        f"<title>{escape(title)}</title></circle>"
    )


def _wrap(height: float, description: str, body: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(description, quote=True)}">'
        + "".join(body)
        + "</svg>"
    )


def _title(series: Series, mark: Mark, *, value: float | None = None) -> str:
    shown = mark.y if value is None else value
    interval = "" if mark.low is None or mark.high is None else f" [{mark.low:.4g}, {mark.high:.4g}]"
    return f"{mark.label or series.label}: {shown:.4g}{interval}"


def rows_chart(series: Sequence[Series], *, axis: str, description: str) -> str:
    """One line per row: value and interval on a logarithmic x axis, the value written at the right."""
    marks = [item.marks[0] for item in series]
    scale = log_scale([v for m in marks for v in (m.x, m.low, m.high) if v is not None])
    names = [_cut(item.label, 22) for item in series]
    left = 12 + max(_width(name, item) for name, item in zip(names, series, strict=True))
    right, step, top = _WIDTH - 58.0, 24.0, 8.0
    bottom = top + step * len(series)

    def place(value: float) -> float:
        return left + (right - left) * scale(value)

    body = _x_axis(scale, place, top, bottom, axis, left, right)
    for index, (item, name) in enumerate(zip(series, names, strict=True)):
        mark, y = item.marks[0], top + step * (index + 0.5)
        css = "name" if item.kind == "checkpoint" else "name muted"
        body.append(_text(left - 8, y + 4, name, anchor="end", css=css))
        if mark.low is not None and mark.high is not None:
            body.append(_line(place(mark.low), y, place(mark.high), y, f"whisker {_tone(item)}"))
        body.append(_dot(place(mark.x), y, item, mark, _title(item, mark, value=mark.x)))
        body.append(_text(_WIDTH - 4, y + 4, _short(mark.x), anchor="end", css="value"))
    return _wrap(bottom + 38, description, body)


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.3g}"


def _x_axis(scale: Scale, place, top: float, bottom: float, label: str, left: float, right: float) -> list[str]:
    body = []
    for tick in scale.ticks:
        x = place(tick)
        body.append(_line(x, top, x, bottom, "grid"))
        body.append(_text(x, bottom + 15, tick_text(tick), anchor="middle", css="tick"))
    body.append(_text((left + right) / 2, bottom + 32, label, anchor="middle", css="axis"))
    return body


def _frame(
    x_scale: Scale, y_scale: Scale, *, x_label: str, y_label: str, margin: float = 10.0
) -> tuple[list[str], float, float, float, float]:
    left = 14 + _CHARACTER * max(len(tick_text(tick)) for tick in y_scale.ticks)
    right, top, bottom = _WIDTH - margin, 26.0, 280.0
    body = []
    for tick in y_scale.ticks:
        y = bottom - (bottom - top) * y_scale(tick)
        body += [_line(left, y, right, y, "grid"), _text(left - 6, y + 4, tick_text(tick), anchor="end", css="tick")]
    body += _x_axis(x_scale, lambda v: left + (right - left) * x_scale(v), top, bottom, x_label, left, right)
    body.append(_text(2.0, 13.0, y_label, css="axis"))
    return body, left, right, top, bottom


def _place_labels(
    wanted: list[tuple[float, float, str, Series]], left: float, right: float, bottom: float
) -> list[str]:
    """Write labels beside their points, moved up or down where they would cover one another."""
    taken: list[tuple[float, float, float, float]] = []
    for x, y, _, _ in wanted:
        taken.append((x - 5, x + 5, y - 5, y + 5))
    body = []
    for x, y, text, item in sorted(wanted, key=lambda entry: entry[1]):
        text = _cut(text, 26)
        width = _width(text, item)
        best = None
        for shift in sorted(range(-8, 9), key=abs):
            for outward in (x + 9, x - 9 - width):
                base = y + 4 + shift * 13
                box = (outward - 1, outward + width, base - 10, base + 2)
                if box[0] < left or box[1] > right + 8 or box[2] < 14 or box[3] > bottom:
                    continue
                if all(box[1] < t[0] or box[0] > t[1] or box[3] < t[2] or box[2] > t[3] for t in taken):
                    best = (shift, outward, base, box)
                    break
            if best:
                break
        if best is None:
            continue  # no room: the point still names itself when pointed at
        shift, outward, base, box = best
        taken.append(box)
        if shift:
            end = outward - 2 if outward > x else outward + width + 2
            body.append(_line(x, y, end, base - 4, f"leader {_tone(item)}"))
        body.append(_text(outward, base, text, css="name" if item.kind == "checkpoint" else "name muted"))
    return body


def scatter_chart(
    series: Sequence[Series], *, x_label: str, y_label: str, description: str, logarithmic: bool = True
) -> str:
    """Points with the intervals of y; the best number of steps of each row is labelled, others are faint."""
    make = log_scale if logarithmic else linear_scale
    marks = [mark for item in series for mark in item.marks]
    x_scale, y_scale = (
        make([m.x for m in marks]),
        make([v for m in marks for v in (m.y, m.low, m.high) if v is not None]),
    )
    body, left, right, top, bottom = _frame(x_scale, y_scale, x_label=x_label, y_label=y_label)
    labels: list[tuple[float, float, str, Series]] = []
    dots = []
    for item in series:
        for mark in item.marks:
            x = left + (right - left) * x_scale(mark.x)
            y, low, high = (
                bottom - (bottom - top) * y_scale(mark.y if value is None else value)
                for value in (mark.y, mark.low, mark.high)
            )
            if abs(low - high) > 3:
                dots.append(_line(x, low, x, high, f"whisker {_tone(item)}"))
            dots.append(_dot(x, y, item, mark, _title(item, mark)))
            if mark.best or not logarithmic:
                labels.append((x, y, mark.label, item))
    return _wrap(bottom + 38, description, body + _place_labels(labels, left, right, bottom) + dots)


def lines_chart(series: Sequence[Series], *, x_label: str, y_label: str, description: str) -> str:
    """One line per row against the number of steps, both axes logarithmic, intervals as bars."""
    steps = sorted({mark.x for item in series for mark in item.marks})
    x_base = log_scale(steps)
    x_scale = Scale(low=x_base.low, high=x_base.high, logarithmic=True, ticks=tuple(steps))
    y_scale = log_scale([v for item in series for m in item.marks for v in (m.y, m.low, m.high) if v is not None])
    # Room for the names at the ends of the lines.
    margin = 14 + min(130.0, max(_width(item.label, item) for item in series))
    body, left, right, top, bottom = _frame(x_scale, y_scale, x_label=x_label, y_label=y_label, margin=margin)
    labels: list[tuple[float, float, str, Series]] = []
    for item in series:
        points = []
        for mark in item.marks:
            x = left + (right - left) * x_scale(mark.x)
            y, low, high = (
                bottom - (bottom - top) * y_scale(mark.y if value is None else value)
                for value in (mark.y, mark.low, mark.high)
            )
            points.append((x, y))
            body.append(_line(x, low, x, high, f"whisker {_tone(item)}"))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        body.append(f'<polyline points="{path}" class="path {_tone(item)}"/>')
        body += [_dot(x, y, item, mark, _title(item, mark)) for (x, y), mark in zip(points, item.marks, strict=True)]
        labels.append((*points[-1], item.label, item))
    return _wrap(bottom + 38, description, body + _place_labels(labels, left, _WIDTH - 10.0, bottom))
