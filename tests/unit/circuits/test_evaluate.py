"""Circuits that run, curves, ablations, and random controls."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import dihal.circuits.evaluate as evaluate
from dihal.circuits.adapters import open_model
from dihal.circuits.attribute import attribute
from dihal.circuits.evaluate import (
    FRACTIONS,
    Ends,
    ablate,
    ablate_edges,
    ablate_sets,
    curve,
    ends,
    faithfulness,
    run_circuit,
    run_circuits,
)
from dihal.circuits.exact import exact_scores
from dihal.circuits.metrics import logit_difference
from dihal.circuits.random_circuits import DEPTHS, matched_components, random_circuit
from dihal.circuits.toy import induction_model, induction_pair
from dihal.circuits.types import Circuit
from dihal.errors import UsageError
from dihal.geometry.intervals import resample_documents
from tests.kit import tiny_model
from tests.unit.circuits.models import float64_model, random_pairs

FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "mistral", "phi3")
PAIRS = [random_pairs(4, 7), random_pairs(3, 9, targets=2, seed=1, first_id=4)]


def plain(model, which: str) -> np.ndarray:
    """The metric by the library's own forward."""
    found = []
    for batch in PAIRS:
        logits = model(getattr(batch, which)).logits
        rows = torch.arange(len(batch))[:, None]
        found.append(logit_difference(logits[rows, batch.positions], batch))
    return torch.cat(found).detach().numpy()


@pytest.mark.parametrize("kv", ["grouped", "query"])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_is_clean_and_empty_is_corrupted(family: str, kv: str) -> None:
    model = float64_model(family)
    if family == "phi3" and kv == "query":
        with pytest.raises(UsageError, match="kv=grouped"):
            open_model(model).spec(kv=kv)
        return
    for seam in (0, 2):
        spec = open_model(model).spec(kv=kv, seam=seam)
        full, empty = run_circuits(model, PAIRS, [Circuit.full(spec), Circuit.empty(spec)], batch_size=3)
        assert abs(full - plain(model, "clean")).max() < 1e-12
        assert abs(empty - plain(model, "corrupted")).max() < 1e-12
        both = ends(model, PAIRS, spec, batch_size=2)
        assert abs(both.clean - full).max() < 1e-12
        assert abs(both.empty - empty).max() < 1e-12


def test_no_edge_to_the_logits_but_one_writer() -> None:
    """Only `m2->logits`, and nothing below: m2 runs on corrupted inputs, so the circuit is the corrupted run."""
    model = float64_model()
    spec = open_model(model).spec()
    one = run_circuit(model, PAIRS, Circuit.named(spec, ["m2->logits"]))
    assert abs(one - plain(model, "corrupted")).max() < 1e-12
    whole = [name for name in Circuit.full(spec).names if name.split("->")[1] != "logits"]
    # Everything but the logits' own inputs: all run clean, and the logits read what they would have written corrupted.
    assert abs(run_circuit(model, PAIRS, Circuit.named(spec, whole)) - plain(model, "corrupted")).max() < 1e-12


def test_readers_with_equal_inputs_are_run_once_without_changing_anything() -> None:
    """A circuit in which no two readers miss the same edges, against its runs in the ungrouped graph."""
    model = float64_model()
    grouped, ungrouped = (open_model(model).spec(kv=kv) for kv in ("grouped", "query"))
    circuit = random_circuit(grouped, 90, seed=3)
    names = []
    for name in circuit.names:
        writer, reader = name.split("->")
        if ".g" in reader:
            head = 2 * int(reader[4])
            names += [f"{writer}->a{reader[1]}.h{head + i}{reader[-3:]}" for i in range(2)]
        else:
            names.append(name)
    same = Circuit.named(ungrouped, names)
    assert abs(run_circuit(model, PAIRS, circuit) - run_circuit(model, PAIRS, same)).max() < 1e-12


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_other_ablations(ablation: str) -> None:
    model = float64_model()
    spec = open_model(model).spec()
    full, empty = run_circuits(model, PAIRS, [Circuit.full(spec), Circuit.empty(spec)], ablation=ablation, batch_size=3)
    assert abs(full - plain(model, "clean")).max() < 1e-12
    assert abs(ends(model, PAIRS, spec, ablation=ablation).empty - empty).max() < 1e-12
    # What every position reads is the same: prompts differ no more, up to answers and foils.
    other = dataclasses.replace(PAIRS[0], clean=PAIRS[0].corrupted, corrupted=PAIRS[0].clean)
    if ablation == "zero":
        assert abs(run_circuit(model, [other], Circuit.empty(spec), ablation=ablation) - empty[:4]).max() < 1e-12
        assert abs(empty).max() < 1e-12  # the logits of nothing
    else:
        assert abs(empty - plain(model, "corrupted")).max() > 1e-3


def test_node_ablation_is_the_ablation_of_all_its_edges() -> None:
    model = float64_model()
    spec = open_model(model).spec()
    for kind in ("corrupt", "mean", "zero"):
        for components in (["a1.h2"], ["m0"], ["a0.h0", "a0.h3", "m1"]):
            leaving = np.zeros_like(spec.edge_mask)
            for name in components:
                leaving[spec.writer_index(name)] = spec.edge_mask[spec.writer_index(name)]
            circuit = Circuit(spec=spec, edges=leaving)
            expected = ablate_edges(model, PAIRS, circuit, ablation=kind)
            assert abs(ablate(model, PAIRS, components, kind=kind) - expected).max() < 1e-12
            assert abs(expected).max() > 1e-6
    with pytest.raises(UsageError, match="starts from"):
        ablate(model, PAIRS, ["input"])
    with pytest.raises(UsageError, match="no writer"):
        ablate(model, PAIRS, ["a9.h0"])


def test_curve() -> None:
    model = float64_model()
    scores = attribute(model, PAIRS)
    found = curve(model, scores, PAIRS, resamples=200)
    assert found.fractions == FRACTIONS
    assert found.sizes == tuple(round(f * scores.spec.n_edges) for f in FRACTIONS)
    assert found.faithfulness[-1] == pytest.approx(1.0, abs=1e-12)
    mean = found.values.mean(1)
    clean, empty = found.ends.clean.mean(), found.ends.empty.mean()
    assert found.faithfulness == pytest.approx((mean - empty) / (clean - empty))
    steps = np.diff(FRACTIONS)
    heights = found.faithfulness
    assert found.cpr == pytest.approx(float((steps * (heights[1:] + heights[:-1]) / 2).sum()))
    gaps = abs(1 - heights)
    assert found.cmd == pytest.approx(float((steps * (gaps[1:] + gaps[:-1]) / 2).sum()))
    assert found.intervals.shape == (2, len(FRACTIONS))
    assert (found.intervals[0] <= found.intervals[1]).all()
    again = curve(model, scores, PAIRS, resamples=200, batch_size=2)
    assert again.intervals == pytest.approx(found.intervals)
    assert found.record()["prompts"] == 7
    with pytest.raises(UsageError, match="ascending"):
        curve(model, scores, PAIRS, fractions=(0.5, 0.1))


def test_intervals_narrow_with_more_prompts_and_hold_the_value() -> None:
    """Prompts whose metric in the circuit is half the clean one, with noise: f = 1/2."""
    generator = np.random.default_rng(0)
    widths = []
    for n in (20, 320):
        clean = 4 + generator.normal(size=n)
        values = 0.5 * clean + generator.normal(size=n)
        counts = resample_documents(n, 400, 0).double().numpy()
        drawn = faithfulness(values, Ends(clean=clean, empty=np.zeros(n)), counts)
        low, high = np.quantile(drawn, [0.025, 0.975])
        assert low < 0.5 < high
        widths.append(high - low)
    assert widths[1] < 0.5 * widths[0]


def test_lines_of_one_prompt_count_as_one() -> None:
    """States of one prompt at several denoising steps share an id: they are averaged before prompts are resampled."""
    model = float64_model()
    scores = attribute(model, PAIRS[:1])
    once = curve(model, scores, PAIRS[:1], (0.1, 0.5), resamples=50)
    twice = curve(model, scores, [PAIRS[0], PAIRS[0]], (0.1, 0.5), resamples=50)
    assert twice.values.shape == once.values.shape
    assert twice.intervals == pytest.approx(once.intervals)


def test_transfer_runs_anothers_circuit() -> None:
    """Curves of one model's scores in another are those of the same circuits run there; other graphs are refused."""
    first, second = float64_model(seed=0), float64_model(seed=1)
    scores = attribute(first, PAIRS)
    moved = curve(second, scores, PAIRS, (0.2, 0.6))
    own = run_circuits(second, PAIRS, [scores.top(fraction=f) for f in (0.2, 0.6)])
    assert moved.values == pytest.approx(own)
    assert abs(moved.faithfulness - curve(first, scores, PAIRS, (0.2, 0.6)).faithfulness).max() > 1e-3
    with pytest.raises(UsageError, match="different graphs"):
        curve(float64_model(layers=4), scores, PAIRS)


def test_a_known_circuit_is_faithful_alone_and_its_ablation_is_fatal() -> None:
    model = induction_model(40.0).adapter()
    pairs = induction_pair()
    scores = exact_scores(model, pairs)
    circuit = scores.top(3)
    clean, empty = (float(getattr(ends(model, pairs, model.spec()), end)[0]) for end in ("clean", "empty"))
    assert run_circuit(model, pairs, circuit)[0] == pytest.approx(clean)
    for edge in circuit.names:
        without = Circuit.named(model.spec(), [name for name in circuit.names if name != edge])
        assert run_circuit(model, pairs, without)[0] == pytest.approx(empty, abs=1e-9)
        assert ablate_edges(model, pairs, Circuit.named(model.spec(), [edge]))[0] == pytest.approx(clean - empty)
    controls = random_circuit(model.spec(), like=circuit, seed=1)
    assert controls.size == 3
    assert abs(ablate(model, pairs, ["a0.h1", "a1.h1"])).max() < 1e-9
    assert ablate(model, pairs, ["a0.h0"])[0] == pytest.approx(clean - empty)


def test_exact_scores_of_chosen_edges() -> None:
    model = float64_model(layers=2)
    spec = open_model(model).spec()
    chosen = random_circuit(spec, 5, seed=2)
    some, every = exact_scores(model, PAIRS, chosen), exact_scores(model, PAIRS)
    assert (some.scores != 0).sum() == 5
    assert some.scores[chosen.edges] == pytest.approx(every.scores[chosen.edges])
    # An estimate: it ignores interactions, which a random model is full of.
    scores = attribute(model, PAIRS, steps=20)
    assert np.corrcoef(scores.scores[spec.edge_mask], every.scores[spec.edge_mask])[0, 1] > 0.6


def test_random_circuits_match_size_and_layers() -> None:
    spec = open_model(tiny_model(num_blocks=3)).spec()
    like = random_circuit(spec, 40, seed=0)
    same = random_circuit(spec, like=like, seed=1)
    assert same.size == like.size == 40
    assert (same.edges != like.edges).any()
    cell = (spec.layer_of_writer[:, None] + 1) * 10 + spec.layer_of_reader[None, :]
    assert (np.sort(cell[same.edges]) == np.sort(cell[like.edges])).all()
    assert (random_circuit(spec, 40, seed=0).edges == like.edges).all()
    hits = sum(random_circuit(spec, 95, seed=seed).edges[spec.edge_mask].astype(int) for seed in range(200))
    assert abs(hits.mean() - 100) < 1e-9
    assert hits.min() > 50  # every edge has its chance
    for bad in ({}, {"k": 5, "like": like}, {"k": 10_000}):
        with pytest.raises(UsageError):
            random_circuit(spec, **bad)


def test_matched_components() -> None:
    spec = open_model(tiny_model(num_blocks=6)).spec()
    given = ["a0.h1", "a3.h2", "m2"]
    for depth in DEPTHS:
        found = matched_components(spec, given, seed=4, depth=depth)
        assert sorted(name[0] for name in found) == ["a", "a", "m"]
        assert not set(found) & set(given)
        layers = [int(name[1:].split(".")[0]) for name in found]
        if depth == "late":
            assert min(layers) >= 4
        if depth == "middle":
            assert set(layers) <= {2, 3}
    with pytest.raises(UsageError, match="were asked for"):
        matched_components(spec, [f"m{i}" for i in range(4)], depth="late")


def test_no_circuit_and_no_pairs() -> None:
    with pytest.raises(UsageError, match="no circuit"):
        run_circuits(tiny_model(), PAIRS, [])
    with pytest.raises(UsageError, match="no pairs"):
        run_circuit(tiny_model(), [], Circuit.full(open_model(tiny_model()).spec()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_circuits_side_by_side_are_those_one_by_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = float64_model(family)
    spec = open_model(model).spec()
    circuits = [random_circuit(spec, k, seed=k) for k in (0, 3, 20, 90, spec.n_edges)]
    calls = []
    monkeypatch.setitem(evaluate._AT_ONCE, False, 1)
    alone = run_circuits(model, PAIRS, circuits, progress=calls.append)
    assert calls == [1] * len(circuits) * 2
    for room, groups in ((1 << 40, [5, 5]), (2 * 4 * 9 * spec.n_writers * 32 * 8, None)):
        calls.clear()
        monkeypatch.setitem(evaluate._AT_ONCE, False, room)
        assert abs(run_circuits(model, PAIRS, circuits, progress=calls.append) - alone).max() < 1e-12
        assert sum(calls) == 2 * len(circuits)
        assert groups is None or calls == groups


def test_sets_ablated_together_are_those_ablated_alone() -> None:
    model = float64_model()
    sets = [["a0.h0"], ["m1", "a2.h3"]]
    for kind, drops in ablate_sets(model, PAIRS, sets, batch_size=3).items():
        for components, drop in zip(sets, drops, strict=True):
            assert abs(ablate(model, PAIRS, components, kind=kind) - drop).max() < 1e-12
