"""Scores against finite differences, and the invariants they satisfy."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from dihal.circuits.adapters import open_model
from dihal.circuits.attribute import attribute, path_points
from dihal.circuits.capture import Capture
from dihal.circuits.metrics import logit_difference
from dihal.circuits.patching import CircuitRun, Replacement, Runner
from dihal.circuits.types import EdgeScores, PairBatch
from dihal.errors import UsageError
from tests.kit import tiny_model
from tests.unit.circuits.models import float64_model, random_pairs

FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "mistral", "phi3")
PAIRS = [random_pairs(3, 7), random_pairs(2, 9, targets=2, seed=1, first_id=3)]


def worst(first: EdgeScores, second: EdgeScores) -> float:
    """Largest difference relative to the largest score."""
    return float(abs(first.scores - second.scores).max() / abs(first.scores).max())


_STENCIL = {1: 8 / 12, -1: -8 / 12, 2: -1 / 12, -2: 1 / 12}


def repeated(batch: PairBatch) -> PairBatch:
    """Every prompt once per side of the stencil."""
    times = len(_STENCIL)
    tensors = {
        name: torch.cat([value] * times) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)
    }
    return dataclasses.replace(batch, **tensors)


def finite_differences(model: Any, batch: PairBatch, points: list[tuple[float, float]]) -> np.ndarray:
    """Every edge's score by moving what its reader reads, at every point of the path; forward runs only."""
    adapter = open_model(model)
    runner = Runner(adapter, adapter.spec())
    out = np.zeros(runner.spec.edge_mask.shape)
    step, n = 3e-4, len(batch)
    batch = repeated(batch)
    sides = torch.tensor(list(_STENCIL), dtype=torch.float64).repeat_interleave(n)[:, None, None] * step
    factors = torch.tensor(list(_STENCIL.values()), dtype=torch.float64).repeat_interleave(n) / (step * n)
    ends = [runner.state(batch, "corrupted"), runner.state(batch, "clean")]
    (corrupted, _), (clean, _) = (runner.written(state, batch) for state in ends)
    for point, weight in points:
        state = ends[0] + point * (ends[1] - ends[0])
        here, _ = runner.written(state, batch)
        moved = Replacement(
            here.state + sides * (corrupted.state - clean.state),
            {i: here.heads[i] + sides * (corrupted.heads[i] - clean.heads[i]) for i in here.heads},
            {i: here.mlps[i] + sides * (corrupted.mlps[i] - clean.mlps[i]) for i in here.mlps},
        )
        for writer, reader in np.argwhere(runner.spec.edge_mask):
            edges = runner.spec.edge_mask.copy()
            edges[writer, reader] = False
            with CircuitRun(runner, edges, moved, state):
                values = logit_difference(runner.logits(state, batch), batch)
            out[writer, reader] += weight * float(values @ factors)
    return out


@pytest.mark.parametrize(
    ("family", "method", "steps"),
    [
        ("llama", "eap", 1),
        ("llama", "eap-ig", 2),
        ("qwen2", "eap-ig", 1),
        ("qwen3", "eap-ig", 1),
        ("gpt2", "eap-ig", 1),
    ],
)
def test_every_edge_is_a_finite_difference(family: str, method: str, steps: int) -> None:
    model, batch = float64_model(family), random_pairs(2, 6)
    scores = attribute(model, [batch], method=method, steps=steps)
    expected = finite_differences(model, batch, path_points(method, steps, "midpoint"))
    assert scores.spec.n_edges == (262 if family == "gpt2" else 190)
    assert abs(scores.scores - expected).max() <= 1e-9 * abs(expected).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_factored_is_generic(family: str) -> None:
    model = float64_model(family)
    for method in ("eap", "eap-ig", "clean-corrupted"):
        factored, generic = (attribute(model, PAIRS, method=method, contraction=c) for c in ("factored", "generic"))
        assert worst(generic, factored) < 1e-13
        assert factored.residuals["reader_sums"] < 1e-13
        assert factored.residuals["full_circuit"] < 1e-13
        assert factored.residuals["empty_circuit"] < 1e-13
    model = tiny_model(family, num_blocks=3)
    assert worst(attribute(model, PAIRS, contraction="generic"), attribute(model, PAIRS)) < 3e-5


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_grouped_is_the_sum_of_ungrouped(family: str) -> None:
    model = float64_model(family)
    grouped, ungrouped = attribute(model, PAIRS), attribute(model, PAIRS, kv="query")
    assert ungrouped.residuals["empty_circuit"] < 1e-13
    assert worst(grouped, ungrouped.group()) < 1e-13
    assert abs(ungrouped.scores).max() > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("seam", [0, 1, 2])
def test_contracting_is_attributing_above_the_seam(family: str, seam: int) -> None:
    """With the path taken through the embeddings; EAP takes no path at all, so the seam run alone must agree."""
    model = float64_model(family)
    whole = attribute(model, PAIRS).contract(seam)
    assert worst(whole, attribute(model, PAIRS, seam=seam)) < 1e-13
    plain = attribute(model, PAIRS, method="eap").contract(seam)
    above = attribute(model, PAIRS, method="eap", seam=seam, path="seam")
    assert above.spec == plain.spec
    assert worst(plain, above) < 1e-13
    assert (worst(whole, attribute(model, PAIRS, seam=seam, path="seam")) > 1e-6) == (seam > 0)


def increments(model: Any, batch: PairBatch, steps: int) -> tuple[float, float]:
    """Sum of scores into the logits, with increments along the path and with the difference of its ends; summed over prompts."""
    adapter = open_model(model)
    runner = Runner(adapter, adapter.spec())
    ends = [runner.state(batch, "corrupted"), runner.state(batch, "clean")]

    def final_state(point: float) -> torch.Tensor:
        with Capture(adapter, 0) as capture:
            record = capture.start(writers=False, readers=False)
            runner.logits(torch.lerp(*ends, point), batch)
        return record.inputs[adapter.layers]

    def gradient(point: float) -> torch.Tensor:
        x = final_state(point).requires_grad_()
        logits = adapter.head(adapter.norm(x)[:, batch.positions[0]])
        return torch.autograd.grad(logit_difference(logits, batch).sum(), x)[0]

    states = [final_state(step / steps) for step in range(steps + 1)]
    gradients = [gradient((step + 0.5) / steps) for step in range(steps)]
    moves = [states[step] - states[step + 1] for step in range(steps)]
    total = sum(float((move * there).sum()) for move, there in zip(moves, gradients))
    return total, float(((states[0] - states[-1]) * sum(gradients)).sum()) / steps


def test_completeness_needs_increments_and_we_ship_ends() -> None:
    """Increments along the path sum to the metric's change; the difference of the ends, which is shipped as the published one, does not."""
    model, batch = float64_model(), random_pairs(2, 6)
    scores = attribute(model, [batch])
    change = (scores.corrupted - scores.clean) * len(batch)
    errors = [abs(increments(model, batch, steps)[0] - change) for steps in (4, 16, 64)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.01 * abs(change)
    shipped = float(scores.scores[:, -1].sum()) * len(batch)
    assert shipped == pytest.approx(increments(model, batch, 5)[1], rel=1e-10)
    assert abs(shipped - change) > 10 * errors[2]


@pytest.mark.parametrize(
    ("method", "steps", "rule", "forward", "backward"),
    [
        ("eap-ig", 5, "midpoint", 7, 5),
        ("eap-ig", 3, "midpoint", 5, 3),
        ("eap-ig", 5, "left", 6, 5),  # the corrupted end is on the grid
        ("eap", 5, "midpoint", 2, 1),
        ("clean-corrupted", 5, "midpoint", 2, 2),
    ],
)
def test_passes_do_not_depend_on_edges(method, steps, rule, forward, backward) -> None:
    """Counted by the model itself."""
    for layers in (2, 4):
        model = tiny_model(num_blocks=layers)
        calls = collections.Counter()
        handle = model.model.norm.register_forward_hook(lambda *_, calls=calls: calls.update(["forward"]))
        other = model.lm_head.register_full_backward_hook(lambda *_, calls=calls: calls.update(["backward"]))
        scores = attribute(model, PAIRS, method=method, steps=steps, rule=rule, batch_size=3)
        handle.remove()
        other.remove()
        batches = 2
        checks = 4  # two plain runs and two circuits, once
        assert scores.passes == {"forward": batches * forward, "backward": batches * backward}
        assert calls == {"forward": batches * forward + checks, "backward": batches * backward}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_batches_and_chunks_do_not_matter(family: str) -> None:
    model = tiny_model(family)
    many = [random_pairs(12, 8, seed=5)]
    whole = attribute(model, many)
    for changes in ({"batch_size": 1}, {"batch_size": 5}, {"chunk_bytes": 1}, {"batch_size": 7, "chunk_bytes": 60_000}):
        other = attribute(model, many, **changes)
        assert worst(whole, other) < 1e-5
        assert abs(whole.squares - other.squares).max() < 1e-5 * whole.squares.max()
        assert (whole.part_counts, whole.n) == (other.part_counts, other.n)
        assert other.clean == pytest.approx(whole.clean, rel=1e-5)
    assert (attribute(model, many).scores == whole.scores).all()


def test_means_parts_and_squares_are_those_of_prompts() -> None:
    model, batch = float64_model(), random_pairs(5, 7)
    alone = [attribute(model, [batch.rows(i, i + 1)]) for i in range(5)]
    scores = attribute(model, [batch], parts=2)
    stack = np.stack([one.scores for one in alone])
    assert abs(scores.scores - stack.mean(0)).max() < 1e-12
    assert abs(scores.squares - np.square(stack).mean(0)).max() < 1e-12
    even, odd = scores.halves
    assert abs(even - stack[::2].mean(0)).max() < 1e-12
    assert abs(odd - stack[1::2].mean(0)).max() < 1e-12
    assert scores.part_counts == (3, 2)
    assert scores.clean == pytest.approx(np.mean([one.clean for one in alone]))
    assert scores.corrupted == pytest.approx(np.mean([one.corrupted for one in alone]))
    assert attribute(model, [batch], parts=0).parts is None


def test_equal_prompts_score_zero() -> None:
    batch = random_pairs()
    same = dataclasses.replace(batch, corrupted=batch.clean)
    assert abs(attribute(float64_model(), [same]).scores).max() == 0.0


def test_full_attention_sees_what_comes_later() -> None:
    """Read at a position before the change: nothing under causal attention, much under full attention."""
    model = float64_model()
    early = dataclasses.replace(random_pairs(), positions=torch.ones(3, 1, dtype=torch.int64))
    assert abs(attribute(model, [early]).scores).max() < 1e-12
    seen = attribute(model, [dataclasses.replace(early, attention="full")])
    assert abs(seen.scores).max() > 1e-3
    assert max(seen.residuals.values()) < 1e-13


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_both_attention_implementations(attention: str) -> None:
    """The library's eager softmax is in float32."""
    model, pairs = float64_model(), [random_pairs(attention=attention)]
    expected = attribute(model, pairs)
    model.set_attn_implementation("eager")
    assert worst(expected, attribute(model, pairs)) < 1e-5


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model().requires_grad_(True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    attribute(model, PAIRS, kv="query")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    for part in model.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
    assert model.model.layers[0].self_attn.num_key_value_groups == 2


def test_hooks_go_when_a_metric_fails() -> None:
    model = tiny_model()

    def broken(*_: Any) -> Any:
        raise KeyError("the metric")

    with pytest.raises(KeyError, match="the metric"):
        attribute(model, PAIRS, metric=broken)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_model_that_is_not_its_graph_is_found_out() -> None:
    """A path around the graph: the second block adds something that no writer writes."""
    model = tiny_model()
    model.model.layers[1].register_forward_hook(lambda _, __, output: output + output.roll(1, -1))
    with pytest.raises(RuntimeError, match="identity"):
        attribute(model, PAIRS)


def test_bfloat16_keeps_the_top_edges() -> None:
    model = tiny_model(num_blocks=3)
    exact = attribute(model, PAIRS)
    rough = attribute(model.bfloat16(), PAIRS)
    assert rough.scores.dtype == np.float32
    first, second = (scores.top(40).edges for scores in (exact, rough))
    assert (first & second).sum() / (first | second).sum() > 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seam": 4}, "out of range"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(UsageError, match=message):
        attribute(tiny_model(), PAIRS, **options)
    with pytest.raises(UsageError, match="no pairs"):
        attribute(tiny_model(), [])


def test_bad_points_of_the_path() -> None:
    for method, rule in (("eap-gi", "midpoint"), ("eap-ig", "right")):
        with pytest.raises(UsageError, match="Valid: "):
            path_points(method, 5, rule)
