"""Figures are drawn from the files alone; a drawing shows the edges it was given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import FancyArrowPatch

from dihal.circuits.drawing import draw_circuit, draw_map, places_of, small_circuit
from dihal.circuits.figures import comparison_figures, draw_curves, new_figure
from dihal.circuits.graph import GraphSpec
from dihal.circuits.metrics import logit_difference
from dihal.circuits.page import comparison_page
from dihal.circuits.profile import component_scores
from dihal.circuits.toy import INDUCTION_EDGES, induction_model
from dihal.circuits.transfer import Running, ablations
from dihal.circuits.types import Circuit
from dihal.errors import UsageError
from tests.unit.circuits.test_run import _swapped, _toy, _verdict

SPEC = GraphSpec(layers=6, heads=4, kv_heads=2)


def test_the_drawn_circuit_is_connected_and_as_large_as_asked(make_scores, heavy_tail) -> None:
    scores = make_scores(SPEC, heavy_tail(SPEC), noise=0.1)
    for edges in (5, 30, 50):
        found = small_circuit(scores, edges)
        assert 0 < found.size <= edges
        assert (found.pruned().edges == found.edges).all()
        # One more edge in the ranking would give a larger one.
        k = next(k for k in range(1, SPEC.n_edges) if scores.top(k, connected=True).size > edges)
        assert (found.edges == scores.top(k - 1, connected=True).edges).all()
    for edges in (0, 51):
        with pytest.raises(UsageError, match="1 to 50 edges"):
            small_circuit(scores, edges)


def test_every_edge_is_an_arrow_between_its_nodes() -> None:
    _, party = _toy(induction_model(3.0), "one")
    circuit = small_circuit(party.scores, 3)
    assert set(circuit.names) == set(INDUCTION_EDGES)
    figure = new_figure(4.0, 4.0)
    axes = figure.subplots()
    draw_circuit(axes, circuit, party.scores)
    arrows = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    assert len(arrows) == 3
    shown = {text.get_text() for text in axes.texts}
    assert shown == {"input", "a0.h0", "a1.h0", "logits"}
    places = places_of(circuit)
    heights = {("logits" if n == -1 else party.scores.spec.writers[n]): y for n, (_, y) in places.items()}
    assert heights["input"] < heights["a0.h0"] < heights["a1.h0"] < heights["logits"]
    with pytest.raises(UsageError, match="at most 50"):
        draw_circuit(axes, Circuit.full(SPEC), party.scores)


def test_map_has_a_cell_per_component(make_scores, heavy_tail) -> None:
    scores = make_scores(SPEC, heavy_tail(SPEC), noise=0.1)
    values = component_scores(SPEC, scores.scores)
    figure = new_figure(4.0, 4.0)
    image = draw_map(figure.subplots(), SPEC, values, 1.0)
    table = np.asarray(image.get_array())
    assert table.shape == (6, 5)
    assert table[2, 3] == pytest.approx(values[SPEC.writer_index("a2.h3")])
    assert table[5, 4] == pytest.approx(values[SPEC.writer_index("m5")])


def test_curves_show_what_the_record_says() -> None:
    row = {
        "fractions": [0.01, 0.1, 1.0],
        "faithfulness": [0.2, 0.8, 1.0],
        "intervals": [[0.1, 0.7, 1.0], [0.3, 0.9, 1.0]],
        "cpr": 0.9,
        "cmd": 0.05,
    }
    figure = draw_curves({"magnitude": row, "random": {**row, "faithfulness": [0.0, 0.0, 1.0]}})
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    (label,) = [name for name in lines if "EAP-IG" in name]
    assert "CMD 0.050" in label
    assert list(lines[label].get_ydata()) == [0.2, 0.8, 1.0]


def test_all_figures_of_a_comparison(tmp_path: Path) -> None:
    found = _verdict(induction_model(3.0), _swapped(induction_model(3.0)))
    parties = [
        _toy(model, name)[1] for model, name in ((induction_model(3.0), "a"), (_swapped(induction_model(3.0)), "b"))
    ]
    found.function["ablations"] = ablations(parties, 1, Running(metric=logit_difference, resamples=20))
    own = found.function["ablations"]["models"][0]["own"]
    # Both heads carry everything: without one of them the clean metric falls to the corrupted one.
    assert own["corrupt"]["value"] == pytest.approx(1.0)
    found.details["task"] |= {"template_hash": "0", "corruption": "c", "n": 48, "test": 48, "split_rule": "s"}
    found.details |= {"config": {"hash": "0"}, "provenance": {"versions": {}}}
    data = found.record()
    drawn = comparison_figures(data, tmp_path)
    names = {one.name for one in drawn}
    assert names == {"overlap", "depth", "components", "transfer-matrix", "transfer", "ablations"}
    for name in names:
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
        assert (tmp_path / f"{name}.svg").read_text(encoding="utf-8").lstrip().startswith("<?xml")
    page = comparison_page(data, drawn)
    assert ">rewired<" in page
    assert "Concentration" in page
    assert "<script src" not in page
