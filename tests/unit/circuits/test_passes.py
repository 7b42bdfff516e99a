"""Captured passes: what a graph replays gives the scores of the passes it was captured from.

A CPU captures no CUDA graph; the tape of the writer's tests stands in for it, and fails where a number is asked of the device.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dihal.circuits import passes
from dihal.circuits.adapters import open_model
from dihal.circuits.attribute import attribute
from dihal.circuits.contraction import Delta
from dihal.circuits.metrics import logit_difference, probability_difference
from dihal.circuits.passes import Memory, Room
from dihal.circuits.seam import perturbed
from dihal.circuits.toy import induction_model, induction_pair
from dihal.circuits.types import EdgeScores, PairBatch
from dihal.errors import UsageError
from tests.kit import tiny_model
from tests.unit.circuits.models import float64_model, random_pairs
from tests.unit.test_writer_graphs import Tracer

POINTS = 3


@pytest.fixture
def tracer(monkeypatch: pytest.MonkeyPatch) -> Tracer:
    """Runs what it captures, as a recorder may: nothing of that must be left in any sum."""
    made = Tracer()
    made.host = ()  # nothing here computes on the host's side
    monkeypatch.setattr(passes, "recorder", lambda device: made)
    return made


def batches(attention: Any = "causal", *, times: tuple[int, ...] = (7, 7, 7)) -> list[PairBatch]:
    return [
        random_pairs(2, time, seed=seed, attention=attention, first_id=2 * seed, targets=2)
        for seed, time in enumerate(times)
    ]


def same(first: EdgeScores, other: EdgeScores) -> None:
    largest = abs(first.scores).max()
    assert largest > 0
    for name in ("scores", "parts"):
        assert abs(getattr(first, name) - getattr(other, name)).max() <= 1e-12 * largest, name
    assert abs(first.squares - other.squares).max() <= 1e-12 * largest**2
    assert other.clean == pytest.approx(first.clean, rel=1e-12)
    assert other.corrupted == pytest.approx(first.corrupted, rel=1e-12)
    assert other.accuracy == first.accuracy
    assert other.passes == first.passes


@pytest.mark.parametrize("attention", ["causal", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "qwen2", "phi3"])
def test_replays_score_the_same(family: str, attention: str, tracer: Tracer) -> None:
    """Two batches after the first are replayed: two ends, the points between them, the contraction, which is captured first."""
    # Five tokens: no more than the sliding windows of these tiny models.
    model, pairs = float64_model(family, layers=2), batches(attention, times=(5, 5, 5))
    plain = attribute(model, pairs, steps=POINTS, graphs=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured = attribute(model, pairs, steps=POINTS)
    same(plain, captured)
    assert tracer.replays == 2 * (2 + POINTS + 1) + 1


@pytest.mark.parametrize(
    "options",
    [
        {"method": "eap"},
        {"method": "clean-corrupted"},
        {"rule": "left", "steps": POINTS},
        {"metric": probability_difference, "steps": 2, "kv": "query"},
        {"seam": 1, "path": "seam", "steps": 2},
        {"chunk_bytes": 1, "steps": 2},
    ],
    ids=["eap", "clean-corrupted", "left", "probability", "seam", "chunks"],
)
def test_every_way_of_scoring_replays(options: dict[str, Any], tracer: Tracer) -> None:
    model, pairs = float64_model(layers=2), batches()
    same(attribute(model, pairs, graphs=False, **options), attribute(model, pairs, **options))
    assert tracer.replays > 0


def test_a_state_that_is_drawn_replays_with_every_seed(tracer: Tracer) -> None:
    adapter = perturbed(float64_model(layers=3), 1, 0.3)
    room = Room(adapter)
    for seed in (0, 1):
        options = {"path": "seam", "steps": 2, "noise_seed": seed}
        same(
            attribute(adapter, batches(), graphs=False, **options), attribute(adapter, batches(), room=room, **options)
        )
    # The second seed begins with the graphs of the first.
    assert tracer.replays == (2 + 3) * (2 + 2 + 1) + 1


def test_models_without_norms_replay(tracer: Tracer) -> None:
    model, pairs = induction_model(3.0).adapter(), induction_pair() * 3
    same(attribute(model, pairs, graphs=False), attribute(model, pairs))
    assert tracer.replays > 0


def test_shapes_share_one_arena(tracer: Tracer) -> None:
    """Shapes that alternate write over each other's tensors, and a larger one that comes later replaces all."""
    model = open_model(float64_model(layers=2))
    room = Room(model)
    for times in ((6, 8, 6, 8, 6, 8), (9, 6, 9, 6, 9, 6)):
        pairs = batches(times=times)
        same(attribute(model, pairs, steps=2, graphs=False), attribute(model, pairs, steps=2, room=room))
    assert tracer.replays == 2 * 2 * (2 * (2 + 2 + 1) + 1)
    with pytest.raises(UsageError, match="another model"):
        attribute(open_model(tiny_model()), batches(), room=room)


def test_what_comes_once_is_not_captured(tracer: Tracer) -> None:
    attribute(float64_model(layers=2), batches(times=(5, 6, 7)), steps=2)
    assert tracer.replays == 0


def test_a_metric_that_asks_the_device_runs_as_it_is(tracer: Tracer) -> None:
    def asking(logits, batch):
        return logit_difference(logits, batch) * (1.0 if bool(logits.isfinite().all()) else 0.0)

    model, pairs = float64_model(layers=2), batches()
    plain = attribute(model, pairs, steps=2, graphs=False)
    with pytest.warns(UserWarning, match="cannot be a CUDA graph") as said:
        found = attribute(model, pairs, steps=2, metric=asking)
    same(plain, found)
    assert len(said) == 1


@pytest.mark.parametrize("why", ["hooks", "window", "rotary", "generic"])
def test_what_cannot_be_captured_is_not_tried(why: str, tracer: Tracer) -> None:
    model = float64_model("mistral" if why == "window" else "llama", layers=2)
    calls = []
    if why == "hooks":
        model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    if why == "window":
        assert model.config.sliding_window < 7
    if why == "rotary":
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "dynamic"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = attribute(model, batches(), steps=2, contraction="generic" if why == "generic" else "factored")
    assert tracer.replays == 0
    assert np.isfinite(found.scores).all()
    if why == "hooks":
        assert len(calls) == found.passes["forward"] + 4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_exact_products_of_a_rough_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in fp64 of what fp32 runs gave: the same scores but for the rounding of sums, in fp32 as before."""
    model, pairs = tiny_model(family), batches()
    usual = attribute(model, pairs)
    monkeypatch.setattr(passes, "product_type", lambda adapter: torch.float64)
    exact = attribute(model, pairs)
    assert exact.scores.dtype == usual.scores.dtype == np.float32
    assert 0 < abs(exact.scores - usual.scores).max() < 1e-5 * abs(usual.scores).max()
    assert exact.residuals["reader_sums"] < 1e-4


def test_the_contraction_is_captured_before_the_passes(tracer: Tracer) -> None:
    model = open_model(float64_model(layers=2))
    room = Room(model)
    attribute(model, batches(), steps=2, room=room)
    assert room.graphs is not None
    assert [name[0] for _, name in room.graphs.captured] == ["contract", "pass", "pass", "pass"]


def test_one_chunk_of_writers_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = float64_model(layers=3), batches(times=(5,))
    whole = attribute(model, pairs, steps=2)
    made: list[StorageWeakRef] = []
    write = Delta.writers

    def writers(*arguments: Any) -> torch.Tensor:
        assert all(one.expired() for one in made)
        found = write(*arguments)
        made.append(StorageWeakRef(found.untyped_storage()))
        return found

    monkeypatch.setattr(Delta, "writers", writers)
    same(whole, attribute(model, pairs, steps=2, chunk_bytes=1))
    assert len(made) == 3


def test_memory_of_a_pool_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's own counters, as a capture moves them: a pool of 300, of which 10 stay allocated, and 100 of weights."""
    sizes = {"memory_allocated": 100, "memory_reserved": 120, "max_memory_allocated": 0}
    for name in sizes:
        monkeypatch.setattr(torch.cuda, name, lambda _, name=name: sizes[name])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda _: sizes.update(max_memory_allocated=sizes["memory_allocated"])
    )
    memory = Memory(torch.device("cuda"))
    memory.begin()
    sizes["max_memory_allocated"] = 250
    memory.note()
    assert memory.peak == 250
    with memory.capturing():
        sizes.update(memory_allocated=110, memory_reserved=420, max_memory_allocated=390)
    assert memory.idle == 290
    assert memory.peak == 110 + 290
    with memory.capturing():
        sizes.update(memory_allocated=115, max_memory_allocated=200)
    assert memory.idle == 285, "what lies in the pool that is there already is not new"
    assert memory.peak == 400
    sizes["max_memory_allocated"] = 130
    memory.note()
    assert memory.peak == 130 + 285
    on_cpu = Memory(torch.device("cpu"))
    on_cpu.begin()
    with on_cpu.capturing():
        pass
    on_cpu.note()
    assert on_cpu.peak is None
