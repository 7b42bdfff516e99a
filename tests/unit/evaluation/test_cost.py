"""What a row cost: the ledger of training in its result, and FLOPs per predicted token against torch's counter."""

from __future__ import annotations

import pytest
import torch

from dihal.checkpoint import load_checkpoint
from dihal.config import EvalConfig, LoraConfig, MethodConfig, ObjectiveConfig, SamplerConfig
from dihal.controls import Embedding, Identity, MeanState
from dihal.evaluation.cost import sampling_flops
from dihal.evaluation.result import read_result
from dihal.evaluation.rows import Row
from dihal.evaluation.run import evaluate
from dihal.methods import build_method
from tests.kit import tiny_backbone
from tests.unit.evaluation.kit import LENGTH, make_run
from tests.unit.test_meter import DENOISER, SHAPE, counted
from tests.unit.test_methods import make_batch

TIME = 48


def trained(**changes):
    backbone = tiny_backbone(**SHAPE)
    method = build_method(MethodConfig(split=2, denoiser=DENOISER, **changes), backbone)
    method.fit_normalisation(backbone, [make_batch(4, 32)])
    method.attach(backbone)
    return backbone, method.eval()


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 1), ("ddim", 4), ("heun", 3)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": LoraConfig(rank=2), "objective": ObjectiveConfig(kl=1.0)},
        {"sampler": SamplerConfig(guidance=2.0), "objective": ObjectiveConfig(condition_dropout=0.1)},
    ],
    ids=["plain", "lora", "guidance"],
)
def test_a_bridge_s_tokens_cost_what_torch_counts(sampler, steps, changes) -> None:
    backbone, method = trained(**changes)
    ids = make_batch(1, TIME).input_ids

    def run():
        with torch.no_grad(), method.reading():
            return backbone.suffix(method.states(backbone, ids, steps=steps, sampler=sampler), 2)

    found, _ = counted(run)
    row = Row(
        name="bridge", method="bridge", kind="checkpoint", split=2, steps=(steps,), source=method,
        nfe={str(steps): method.evaluations(steps, sampler)},
    )  # fmt: skip
    metered = sampling_flops(backbone, row, length=TIME)
    assert metered == {str(steps): pytest.approx(found / TIME, rel=0.01)}


def test_the_rows_that_are_always_there() -> None:
    backbone, method = trained()
    ids = make_batch(1, TIME).input_ids
    whole, _ = counted(lambda: backbone.forward(ids))
    state = backbone.prefix(ids, 2)
    suffix, _ = counted(lambda: backbone.suffix(state, 2))

    def metered(**fields):
        return sampling_flops(backbone, Row(name="row", method="row", kind="control", **fields), length=TIME)

    assert metered() == {"0": pytest.approx(whole / TIME, rel=0.01)}
    assert metered(source=Identity(2)) == {"0": pytest.approx(whole / TIME, rel=0.01)}
    for source in (Embedding(2), MeanState(method.space)):
        assert metered(source=source) == {"0": pytest.approx(suffix / TIME, rel=0.01)}
    assert metered(logits=torch.zeros(97)) == {}


def test_a_result_carries_the_ledger_of_its_checkpoint(tmp_path) -> None:
    folder = make_run(tmp_path, steps=3)
    out = tmp_path / "results"
    evaluate(EvalConfig(checkpoints=(str(folder),), tokens=200, steps=(1, 2), samples=0, out=str(out), controls=()))
    state = load_checkpoint(folder).state
    result, backbone = read_result(out / "run.json"), read_result(out / "backbone.json")
    cost = result.cost
    assert cost.train_flops == state["flops"]
    assert {"teacher_prefix", "denoiser_forward", "denoiser_backward"} == set(state["flops"])
    assert (cost.diffused_tokens, cost.unique_tokens) == (state["tokens"], state["budget"]["unique_tokens"])
    assert cost.train_peak_memory == state["peak_memory"]
    assert cost.sampling_flops["1"] < cost.sampling_flops["2"]
    assert result.comparable.budget.tokens == 4096
    assert result.comparable.budget.hardware is None, "a budget of tokens is the same on any hardware"
    assert result.comparable.training.sequence_length == LENGTH
    assert result.comparable.training.data_fingerprint == load_checkpoint(folder).manifest["data_fingerprint"]["train"]
    assert backbone.cost.train_flops is backbone.comparable.budget is backbone.comparable.training is None
    assert set(backbone.cost.sampling_flops) == {"0"}
