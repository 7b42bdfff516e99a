"""Graph arithmetic."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dihal.circuits.graph import GraphSpec, align
from dihal.circuits.types import Circuit, EdgeScores
from dihal.errors import UsageError

# layers, heads, key-value heads, readers of keys and values, edges
PUBLISHED = {
    "GPT-2 small": (12, 12, 12, "query", 32_491),
    "Qwen2.5-0.5B": (24, 14, 2, "query", 179_749),
    "InterpBench": (6, 4, 4, "query", 1_108),
    "Qwen2.5-7B": (28, 28, 4, "query", 935_747),
    "Qwen2.5-7B grouped": (28, 28, 4, "grouped", 408_227),
    "Llama-2-7B": (32, 32, 32, "grouped", 1_592_881),
    "Llama-3.1-8B": (32, 32, 8, "query", 1_592_881),
    "Llama-3.1-8B grouped": (32, 32, 8, "grouped", 805_681),
    "Qwen3-8B": (36, 32, 8, "query", 2_022_463),
    "SmolLM2-135M": (30, 9, 3, "grouped", 70_651),
}


def spec(**changes) -> GraphSpec:
    return dataclasses.replace(GraphSpec(layers=3, heads=4, kv_heads=2), **changes)


SPECS = [
    spec(),
    spec(kv="query"),
    spec(parallel=True),
    spec(seam=1, lower="bridge"),
    spec(mlps=False),
    spec(kv_heads=4),
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_edges(name: str) -> None:
    layers, heads, kv_heads, kv, edges = PUBLISHED[name]
    assert GraphSpec(layers=layers, heads=heads, kv_heads=kv_heads, kv=kv).n_edges == edges


@pytest.mark.parametrize("graph", SPECS)
def test_prev_against_brute_force(graph: GraphSpec) -> None:
    """Which writer a reader sees follows from names alone."""

    def time_of(name: str) -> float:
        if name == graph.lower:
            return -1.0
        if name == "logits":
            return np.inf
        kind, layer = name[0], int(name[1:].split(".")[0])
        return layer + (0.5 if kind == "m" else 0.0)

    def sees(writer: str, reader: str) -> bool:
        if graph.parallel and writer[0] == "a" and reader == f"m{writer[1:].split('.')[0]}":
            return False
        return time_of(writer) < time_of(reader)

    expected = np.array([[sees(writer, reader) for reader in graph.readers] for writer in graph.writers])
    assert (graph.edge_mask == expected).all()
    assert graph.n_edges == expected.sum()
    assert (len(graph.writers), len(graph.readers)) == (graph.n_writers, graph.n_readers) == expected.shape


@pytest.mark.parametrize("graph", SPECS)
def test_names_go_round(graph: GraphSpec) -> None:
    pairs = np.argwhere(graph.edge_mask)
    names = [graph.edge_name(u, v) for u, v in pairs]
    assert len(set(names)) == graph.n_edges
    assert [graph.edge_index(name) for name in names] == [tuple(pair) for pair in pairs.tolist()]
    assert Circuit.named(graph, names[::3]).names == names[::3]
    assert GraphSpec(**graph.record()) == graph
    layers = [graph.layers if n == "logits" else int(n[1:].split(".")[0]) for n in graph.readers]
    assert graph.layer_of_reader.tolist() == layers
    assert graph.layer_of_writer.tolist() == [graph.seam - 1, *(int(n[1:].split(".")[0]) for n in graph.writers[1:])]


@pytest.mark.parametrize("name", ["m0->a0.h0<q>", "m9->logits", "logits", "m0->m0"])
def test_what_is_no_edge_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="edge"):
        spec().edge_index(name)


def test_grouping_sums_over_the_heads_of_a_group() -> None:
    ungrouped = spec(kv="query")
    scores = np.random.default_rng(0).normal(size=ungrouped.edge_mask.shape) * ungrouped.edge_mask
    graph, grouped = ungrouped.group(scores)
    assert graph == spec()
    for name in ("input->a0.g1<k>", "m1->a2.g0<v>", "a0.h3->a1.g1<v>"):
        writer, reader = name.split("->")
        layer, group, slot = reader[1], int(reader[4]), reader[-3:]
        parts = [scores[ungrouped.edge_index(f"{writer}->a{layer}.h{2 * group + i}{slot}")] for i in range(2)]
        assert grouped[graph.edge_index(name)] == pytest.approx(sum(parts))
    for name in ("input->a0.h1<q>", "a1.h2->m2", "m2->logits"):
        assert grouped[graph.edge_index(name)] == scores[ungrouped.edge_index(name)]
    with pytest.raises(UsageError, match="already"):
        graph.group(grouped)


def test_contraction_sums_what_is_below() -> None:
    whole = spec()
    scores = np.random.default_rng(0).normal(size=whole.edge_mask.shape) * whole.edge_mask
    graph, upper = whole.contract(scores, 2)
    assert graph == spec(seam=2, lower="lower")
    assert upper.shape == graph.edge_mask.shape
    assert upper[0, -1] == pytest.approx(scores[: whole.writer_at(2), -1].sum())
    assert upper[graph.edge_index("a2.h1->m2")] == scores[whole.edge_index("a2.h1->m2")]
    again, same = graph.contract(upper, 2)
    assert again == graph
    assert (same == upper).all()
    with pytest.raises(UsageError, match="starts at layer 2"):
        graph.contract(upper, 1)


def test_reordering_heads_renames_edges() -> None:
    graph = spec()
    scores = np.random.default_rng(0).normal(size=graph.edge_mask.shape) * graph.edge_mask
    order = [3, 2, 0, 1]
    renamed = graph.reorder(scores, 1, order)
    assert renamed[graph.edge_index("a1.h0->m2")] == scores[graph.edge_index("a1.h3->m2")]
    assert renamed[graph.edge_index("m0->a1.h2<q>")] == scores[graph.edge_index("m0->a1.h0<q>")]
    assert renamed[graph.edge_index("m0->a1.g0<k>")] == scores[graph.edge_index("m0->a1.g1<k>")]
    assert renamed[graph.edge_index("m0->a2.g0<k>")] == scores[graph.edge_index("m0->a2.g0<k>")]
    assert (graph.reorder(renamed, 1, np.argsort(order).tolist()) == scores).all()
    with pytest.raises(UsageError, match="permute"):
        graph.reorder(scores, 1, [0, 2, 1, 3])


def test_pruning_leaves_paths_only() -> None:
    graph = spec(mlps=False)
    path = ["input->a0.g0<v>", "a0.h0->a1.g0<k>", "a1.h1->logits"]
    dead = ["a0.h2->logits", "input->a1.h3<q>", "a1.h1->a2.h0<q>"]
    pruned = Circuit.named(graph, path + dead).pruned()
    # The group's other head is fed by the key, but nothing reads it; a1.h1 is fed by the group's key.
    assert sorted(pruned.names) == sorted(path)
    assert Circuit.full(graph).pruned().size == graph.n_edges
    assert Circuit.empty(graph).pruned().size == 0


def scores_of(graph: GraphSpec, seed: int = 0) -> EdgeScores:
    values = np.random.default_rng(seed).normal(size=graph.edge_mask.shape).astype(np.float32) * graph.edge_mask
    return EdgeScores(
        spec=graph, scores=values, n=4, parts=np.stack([values, 3 * values]), part_counts=(2, 2), passes={"forward": 7}
    )


def test_top_edges() -> None:
    scores = scores_of(spec())
    values = scores.scores[scores.spec.edge_mask]
    for by, key in (("magnitude", abs(values)), ("signed", -values)):
        circuit = scores.top(20, by=by)
        inside = key[circuit.edges[scores.spec.edge_mask]]
        assert circuit.size == 20
        assert inside.min() >= np.sort(key)[-20]
    assert scores.top(fraction=0.5).size == round(0.5 * scores.spec.n_edges)
    assert scores.top(scores.spec.n_edges).size == scores.spec.n_edges
    assert (scores.top(scores.spec.n_edges).edges == scores.spec.edge_mask).all()
    assert scores.top(30, connected=True).size < 30
    for bad in ({}, {"k": 1, "fraction": 0.1}, {"k": 10_000}, {"k": -1}):
        with pytest.raises(UsageError):
            scores.top(**bad)


def test_scores_go_round_the_disk(tmp_path) -> None:
    scores = scores_of(spec())
    scores.save(tmp_path)
    back = EdgeScores.load(tmp_path)
    assert back.spec == scores.spec
    for name in ("scores", "parts"):
        assert (getattr(back, name) == getattr(scores, name)).all()
    assert back.squares is None
    assert (back.n, back.passes, back.part_counts) == (4, {"forward": 7}, (2, 2))
    assert np.isnan(back.clean)
    (tmp_path / "scores.npz").write_bytes((tmp_path / "scores.npz").read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"scores\.npz"):
        EdgeScores.load(tmp_path)


def test_halves_are_weighted_means_of_parts() -> None:
    graph = spec(mlps=False)
    parts = np.stack([np.full(graph.edge_mask.shape, float(value)) for value in (1, 2, 3, 4)])
    scores = EdgeScores(spec=graph, scores=parts[0], n=6, parts=parts, part_counts=(1, 1, 3, 1))
    even, odd = scores.halves
    assert even.max() == even.min() == 2.5
    assert odd.max() == 3.0
    with pytest.raises(UsageError, match="parts"):
        _ = EdgeScores(spec=graph, scores=parts[0], n=6).halves


@pytest.mark.parametrize("changes", [{"layers": 4}, {"heads": 8}, {"kv": "query"}, {"seam": 1}, {"mlps": False}])
def test_graphs_of_different_structure_do_not_align(changes) -> None:
    with pytest.raises(UsageError, match="different graphs"):
        align(spec(), spec(**changes))
    align(spec(seam=1, lower="lower"), spec(seam=1, lower="bridge"))
    align(spec(kv_heads=4), spec(kv_heads=4, kv="query"))


@pytest.mark.parametrize("changes", [{"seam": 3}, {"seam": -1}, {"kv_heads": 3}])
def test_impossible_graphs_are_refused(changes) -> None:
    with pytest.raises(UsageError):
        spec(**changes)


def test_circuits_of_another_graph_are_refused() -> None:
    with pytest.raises(UsageError, match="fit"):
        Circuit(spec=spec(), edges=spec(layers=4).edge_mask)
    with pytest.raises(UsageError, match="does not have"):
        Circuit(spec=spec(), edges=np.ones_like(spec().edge_mask))
