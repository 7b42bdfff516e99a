"""The ledger of a run: what is counted, what it stops, what survives a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dihal.checkpoint import load_checkpoint
from dihal.config import BudgetConfig, MethodConfig, ObjectiveConfig
from dihal.errors import UsageError
from dihal.meter import PARTS
from dihal.methods import build_method
from dihal.training.budget import Spent, plan_steps
from dihal.training.ledger import preparation, unique_tokens
from dihal.training.logs import read_records
from dihal.training.run import train
from tests.kit import tiny_backbone
from tests.unit.test_meter import DENOISER, SHAPE, counted
from tests.unit.test_methods import make_batch
from tests.unit.training.conftest import BATCH, LENGTH, Make

MANY = 1_000_000
KL = {"method.objective.kl": 1.0}


def records(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(folder / "metrics.jsonl") if record["kind"] == "train"]


def test_the_record_and_the_checkpoint_carry_the_ledger(make: Make) -> None:
    folder = train(make(steps=5, **KL, **{"budget.trials": 3}))
    state, last = load_checkpoint(folder).state, records(folder)[-1]
    assert set(state["flops"]) == {
        "preparation", "teacher_prefix", "teacher_suffix", "denoiser_forward", "denoiser_backward", "suffix_forward",
        "suffix_backward", "head",
    }  # fmt: skip
    assert set(state["flops"]) <= set(PARTS)
    assert last["flops"] == pytest.approx(sum(state["flops"].values()))
    assert {name.removeprefix("flops/"): value for name, value in last.items() if name.startswith("flops/")} == (
        state["flops"]
    )
    steps = [b["flops"] - a["flops"] for a, b in zip(records(folder), records(folder)[1:])]
    assert steps == [pytest.approx(state["step_flops"])] * 4
    budget = state["budget"]
    assert budget["trials"] == 3
    assert budget["flops"] == last["flops"]
    assert budget["peak_memory"] == state["peak_memory"] >= last["peak_memory"] > 0
    assert budget["unique_tokens"] == last["unique_tokens"] == 5 * BATCH * (LENGTH - 1), "start tokens are no text"
    assert "hardware" in budget


def test_a_budget_of_flops_ends_a_run(make: Make, tmp_path: Path) -> None:
    whole = load_checkpoint(train(make(steps=12, out=tmp_path / "tokens"))).state
    total, step = sum(whole["flops"].values()), whole["step_flops"]
    for extra, steps in ((0.0, 12), (0.5, 12), (-0.5, 11), (-1.0, 11)):
        budget = {"budget.flops": (total + extra * step) * (1 + 1e-9)}
        state = load_checkpoint(train(make(steps=MANY, out=tmp_path / f"flops{extra}", **budget))).state
        assert state["step"] == steps
        assert sum(state["flops"].values()) <= budget["budget.flops"]
        assert state["budget"]["spent"] is True


def test_unlike_methods_spend_one_budget_of_flops_alike(make: Make, tmp_path: Path) -> None:
    """A cheap method takes more steps; both spend the budget to 1 %."""
    budget = 100 * load_checkpoint(train(make(steps=2, out=tmp_path / "plan", **KL))).state["step_flops"]
    spent, steps = [], []
    for name, changes in (("state", {}), ("kl", KL)):
        config = make(steps=MANY, out=tmp_path / name, **changes, **{"budget.flops": budget, "log.every": 1000})
        state = load_checkpoint(train(config)).state
        spent.append(sum(state["flops"].values()))
        steps.append(state["step"])
    assert 0.99 * budget <= min(spent) <= max(spent) <= budget
    assert steps[0] > 1.2 * steps[1]


@pytest.mark.parametrize(("batch_size", "accumulate", "world_size"), [(1, 1, 1), (7, 1, 1), (3, 5, 2), (4, 8, 2)])
def test_budgets_of_tokens_are_spent_alike(batch_size: int, accumulate: int, world_size: int) -> None:
    budget = BudgetConfig(tokens=104_857)
    plan = plan_steps(budget, sequence_length=16, batch_size=batch_size, accumulate=accumulate, world_size=world_size)
    assert 0.99 * budget.tokens <= plan.tokens <= budget.tokens


def test_the_learning_rate_follows_the_flops(make: Make, tmp_path: Path) -> None:
    whole = load_checkpoint(train(make(steps=20, out=tmp_path / "plan"))).state
    budget = sum(whole["flops"].values()) + 0.5 * whole["step_flops"]
    folder = train(make(steps=MANY, out=tmp_path / "run", **{"budget.flops": budget}))
    rates = [record["lr"] for record in records(folder)]
    assert len(rates) == 20
    assert rates[-1] < 0.3 * max(rates)


def test_a_resumed_run_goes_on_with_the_ledger(make: Make, tmp_path: Path) -> None:
    once = load_checkpoint(train(make(steps=6, out=tmp_path / "once", **KL))).state
    train(make(steps=3, out=tmp_path / "twice", **KL))
    config = replace(make(steps=6, out=tmp_path / "twice", **KL), resume=True)
    again = load_checkpoint(train(config)).state
    assert again["flops"] == pytest.approx(once["flops"]), "the normalisation is loaded, not measured again"
    assert again["budget"]["unique_tokens"] == once["budget"]["unique_tokens"]


def test_accumulation_costs_the_same(make: Make, tmp_path: Path) -> None:
    whole = load_checkpoint(train(make(steps=4, out=tmp_path / "whole", **KL))).state
    changes = {"data.batch_size": 1, "trainer.accumulate": 4}
    parts = load_checkpoint(train(make(steps=4, out=tmp_path / "parts", **KL, **changes))).state
    assert parts["flops"] == pytest.approx(whole["flops"])
    assert parts["step_flops"] == pytest.approx(whole["step_flops"])


def test_a_checkpoint_without_a_ledger_is_not_resumed() -> None:
    old = {"step": 3, "tokens": 192, "samples_seen": 12, "seconds": 1.0}
    with pytest.raises(UsageError, match="lacks the counters flops, step_flops, peak_memory") as caught:
        Spent.from_state(old, "run/checkpoints/step-3")
    assert "run/checkpoints/step-3" in str(caught.value)


def test_the_counters_survive_json() -> None:
    spent = Spent(step=2, tokens=7, samples_seen=3, seconds=0.25, flops={"head": 1.5}, step_flops=0.5, peak_memory=9)
    state = json.loads(json.dumps({**spent.state(), "validation": {}}))
    assert Spent.from_state(state, "here") == spent


@pytest.mark.parametrize("metric", ["channel", "fisher"])
def test_the_preparation_costs_what_torch_counts(metric: str) -> None:
    backbone = tiny_backbone(**SHAPE)
    batches = [make_batch(4, 48, seed=seed) for seed in range(3)]
    config = MethodConfig(
        split=2, denoiser=DENOISER, objective=ObjectiveConfig(metric=metric, metric_tokens=3 * 4 * 48)
    )
    method = build_method(config, backbone)

    def run() -> None:
        method.fit_normalisation(backbone, batches)
        method.fit_metric(backbone, batches, seed=0)

    found, _ = counted(run)
    metered = preparation(config, backbone, length=48, normalisation=12, metric=12, processes=1)
    assert metered["preparation"] == pytest.approx(found, rel=0.02)
    double = preparation(config, backbone, length=48, normalisation=12, metric=12, processes=2)
    assert double["preparation"] == 2 * metered["preparation"]


def test_unique_tokens_by_counting() -> None:
    from dihal.data.order import sample_order
    from dihal.data.packing import PackedStream
    from dihal.data.tokens import Tokenised

    lengths = [50, 31, 22]
    documents = Tokenised(
        tokens=np.arange(sum(lengths), dtype=np.uint32),
        ends=np.cumsum(lengths),
        token_bytes=np.ones(sum(lengths), dtype=np.uint32),
    )
    stream = PackedStream(documents, sequence_length=10, start_token_id=0, end_token_id=1, seed=0)
    for samples in (1, 4, stream.windows, 5 * stream.windows):
        places = stream.positions(*sample_order(np.arange(samples), stream.windows, 0))
        assert abs(unique_tokens(stream, samples) - len(np.unique(places))) < stream.body
    assert unique_tokens(stream, 1) == 9
    assert unique_tokens(stream, 10_000) == len(stream)


def test_validation_is_not_metered(make: Make, tmp_path: Path) -> None:
    without = load_checkpoint(train(make(steps=4, out=tmp_path / "a", **{"trainer.validate_batches": 0}))).state
    often = load_checkpoint(train(make(steps=4, out=tmp_path / "b", **{"trainer.validate_every": 1}))).state
    assert often["flops"] == without["flops"]
    assert torch.tensor(list(often["flops"].values())).gt(0).all()


SPACES = {"hidden": 1, "embedding": 0, "latent": 1, "simplex": 1}


@pytest.mark.parametrize("space", SPACES)
def test_a_writer_s_run_carries_its_ledger(make: Make, space: str) -> None:
    changes = {
        "method.regime": "generate",
        "method.space": space,
        "method.split": SPACES[space],
        "method.denoiser.mask": "mixed",
        "method.objective.own": 0.5,
        "method.objective.own_time": "uniform",
        "method.latent.dim": 8,
        "method.latent.hidden": 16,
        "method.latent.stage": 0.5,
        "budget.trials": 2,
    }
    folder = train(make(steps=6, **changes))
    state = load_checkpoint(folder).state
    flops = state["flops"]
    assert {"denoiser_forward", "denoiser_backward", "own_head"} <= set(flops) <= set(PARTS)
    assert ("autoencoder" in flops) == (space == "latent"), "its first stage is spent from the same budget"
    assert state["budget"]["flops"] == pytest.approx(sum(flops.values()))
    assert state["budget"]["trials"] == 2
    assert state["step_flops"] > 0
