"""Options that cannot work are refused before anything is loaded; a dry run only prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dihal.backbone import backbone_from_config
from dihal.checkpoint import load_checkpoint
from dihal.config import BudgetConfig
from dihal.errors import UsageError
from dihal.methods import Method, build_method
from dihal.training.budget import Clock, Spent, plan_steps
from dihal.training.plan import estimate_memory, flops_per_token
from dihal.training.run import train
from dihal.training.setup import resolve
from tests.kit import tiny_backbone
from tests.unit.training.conftest import Make

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method.split_from": "scores.json"}, "both given"),
        ({"method.split": None}, "method.split is not set"),
        ({"method.split": None, "method.split_from": "/nowhere/scores.json"}, "no file"),
        ({"method.split": 3}, "out of range"),
        ({"method.name": "brige"}, "bridge"),
        ({"trainer.accumulate": 0}, "trainer.accumulate"),
        ({"trainer.devices": 0}, "trainer.devices"),
        ({"trainer.keep": 0}, "trainer.keep"),
        ({"optim.lr": -1.0}, "optim.lr"),
        ({"log.every": 0}, "log.every"),
        ({"budget.tokens": 10}, "one optimiser step takes 64"),
        ({"budget.seconds": 0.0}, "budget.seconds"),
        ({"budget.flops": 0.0}, "budget.flops"),
        ({"budget.flops": 1.0}, "one optimiser step takes"),
        ({"budget.trials": 0}, "budget.trials"),
        ({"backbone.dtype": "bfloat16", "trainer.precision": "32-true"}, "bf16-mixed"),
        ({"backbone.dtype": "float16"}, "float16"),
        ({"backbone.device": "cuda"}, "contradict"),
        ({"data.source": "/nowhere/text.txt"}, "nowhere"),
        ({"backbone.id": "/nowhere/model"}, "nowhere"),
    ],
)
def test_bad_options(make: Make, changes: dict, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        train(make(**changes))


def test_a_sequence_longer_than_learned_positions(make: Make) -> None:
    from dihal.training.run import _check_length

    _check_length(make(**{"data.sequence_length": 1024}), tiny_backbone("gpt2", num_blocks=1))
    with pytest.raises(UsageError, match="1024 positions"):
        _check_length(make(**{"data.sequence_length": 1025}), tiny_backbone("gpt2", num_blocks=1))
    _check_length(make(**{"data.sequence_length": 1025}), tiny_backbone(num_blocks=1))


@NO_GPU
@pytest.mark.parametrize(
    "changes",
    [
        {"trainer.accelerator": "gpu", "backbone.device": "auto"},
        {"trainer.accelerator": "auto", "backbone.device": "cuda"},
    ],
)
def test_a_gpu_where_there_is_none(make: Make, changes: dict) -> None:
    with pytest.raises(UsageError, match="PyTorch sees none"):
        train(make(**changes))


def test_an_output_folder_that_is_a_file(make: Make, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match="cannot write to the output folder"):
        train(make(out=tmp_path / "taken"))


def test_world_size_is_checked(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UsageError, match="WORLD_SIZE is 2"):
        resolve(make())
    assert resolve(make(**{"trainer.devices": 2})).trainer.devices == 2


def test_the_tasks_of_srun_are_checked(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(UsageError, match=r"SLURM_STEP_NUM_TASKS is 4.*is 1.*srun"):
        resolve(make())
    assert resolve(make(**{"trainer.devices": 2, "trainer.nodes": 2})).trainer.nodes == 2
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    resolve(make())
    with pytest.raises(UsageError, match=r"Start the command with srun.*train\.sbatch"):
        resolve(make(**{"trainer.devices": 2}))
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    resolve(make(**{"trainer.devices": 2}))


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (143, True), (2, False), (3, False)])
def test_the_slurm_template(tmp_path: Path, status: int, requeued: bool) -> None:
    """With an srun and an scontrol that only say what they were told."""
    import os
    import subprocess

    template = Path(__file__).parents[3] / "configs" / "slurm" / "train.sbatch"
    calls = tmp_path / "calls"
    for name, code in (("srun", status), ("scontrol", 0)):
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\necho "{name} $*" >> "{calls}"\nexit {code}\n')
        script.chmod(0o755)
    folder = tmp_path / "run" / "checkpoints"
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "RUN": str(tmp_path / "run"),
        "CONFIG": "run.yaml",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS_PER_NODE": "4",
    }
    for resume in ("false", "true"):
        command = ["bash", str(template), "optim.lr=1e-4"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == (0 if requeued else status), done.stderr
        first, *rest = calls.read_text().splitlines()
        assert "--kill-on-bad-exit=1 python train.py --config run.yaml trainer.nodes=2 trainer.devices=4" in first
        assert f"resume={resume} log.progress=false optim.lr=1e-4" in first
        assert rest == (["scontrol requeue 77"] if requeued else [])
        calls.unlink()
        (folder / "step-00000004").mkdir(parents=True, exist_ok=True)
    environment.pop("RUN")
    assert subprocess.run(["bash", str(template)], env=environment, capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize(
    "changes",
    [{"trainer.max_nonfinite": 0}, {"trainer.skip_spike": 0.5}, {"trainer.skip_spike": -1.0}],
    ids=str,
)
def test_bounds_of_the_guard(make: Make, changes: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(changes))):
        resolve(make(**changes))


def test_what_was_left_to_choose_is_filled_in(make: Make) -> None:
    config = resolve(make(**{"trainer.devices": "auto"}))
    assert (config.trainer.accelerator, config.trainer.devices, config.trainer.precision) == ("cpu", 1, "32-true")
    assert resolve(make(**{"backbone.dtype": "bfloat16"})).trainer.precision == "bf16-mixed"


def test_split_from_a_score(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dihal.training.setup.read_split", lambda path: 2 if path == "scores.json" else -1)
    config = resolve(make(**{"method.split": None, "method.split_from": "scores.json"}))
    assert (config.method.split, config.method.split_from) == (2, None)


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make(steps=7, dry_run=True))
    assert not (tmp_path / "run").exists()
    text = capsys.readouterr().out
    for expected in ("sequence_length: 16", "trainable parameters", "optimiser steps", "7", "FLOPs", "GiB"):
        assert expected in text


def test_deterministic_kernels_end_with_the_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    loss = Method.loss

    def asked(self: Method, *args: Any, **rest: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return loss(self, *args, **rest)

    monkeypatch.setattr(Method, "loss", asked)
    train(make(steps=2, **{"trainer.deterministic": True, "trainer.validate_batches": 0}))
    assert seen == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_budget_in_steps() -> None:
    plan = plan_steps(BudgetConfig(tokens=1000), sequence_length=16, batch_size=2, accumulate=2, world_size=2)
    assert (plan.sequences_per_step, plan.tokens_per_step, plan.steps, plan.tokens) == (8, 128, 7, 896)
    assert not plan.is_spent(Spent(tokens=768))
    assert plan.is_spent(Spent(tokens=896))
    assert plan.share(Spent(tokens=448)) == 0.5
    timed = plan_steps(
        BudgetConfig(tokens=1000, seconds=10.0), sequence_length=16, batch_size=8, accumulate=1, world_size=1
    )
    assert timed.share(Spent(tokens=128, seconds=7.0)) == 0.7
    assert timed.is_spent(Spent(tokens=128, seconds=10.0))


def test_budget_in_flops() -> None:
    plan = plan_steps(
        BudgetConfig(tokens=1000, flops=100.0), sequence_length=16, batch_size=8, accumulate=1, world_size=1
    )
    spent = Spent(tokens=128, flops={"denoiser_forward": 40.0, "preparation": 10.0}, step_flops=40.0)
    assert plan.share(spent) == 0.5
    assert not plan.is_spent(spent), "90 of 100 after one more step"
    spent.add_flops({"denoiser_forward": 40.0})
    assert plan.is_spent(spent), "130 of 100 after one more step"
    assert plan.share(spent) == 0.9


def test_the_clock_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("dihal.training.budget.time.perf_counter", lambda: now)
    clock = Clock(5.0)
    clock.start()
    now = 103.0
    assert clock.seconds == 8.0
    clock.pause()
    now = 150.0
    assert clock.seconds == 8.0
    clock.start()
    now = 151.0
    assert clock.seconds == 9.0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method.objective.cross_entropy": 1.0},
        {"method.objective.kl": 1.0, "method.objective.suffix_every": 2},
        {"method.objective.metric": "fisher", "method.denoiser.self_conditioning": 0.5},
        {"method.objective.kl": 1.0, "method.lora.rank": 2, "method.objective.condition_dropout": 0.1},
    ],
    ids=lambda changes: "+".join(name.rsplit(".", 1)[-1] for name in changes) or "state",
)
def test_the_planned_flops_are_those_of_training(make: Make, changes: dict[str, Any]) -> None:
    config = make(steps=3, **changes)
    folder = train(config)
    backbone = backbone_from_config(config.backbone)
    method = build_method(config.method, backbone)
    method.attach(backbone)
    planned = flops_per_token(config, backbone, method)
    spent = load_checkpoint(folder).state["flops"]
    spent.pop("preparation")
    assert spent == {part: pytest.approx(value * config.budget.tokens) for part, value in planned.items()}


def test_memory_counts_state_exactly(make: Make) -> None:
    from dihal.methods import build_method
    from dihal.nn import count_parameters

    backbone = tiny_backbone(num_blocks=3)
    config = resolve(make())
    method = build_method(config.method, backbone)
    memory = estimate_memory(config, backbone, method)
    count = count_parameters(method)
    assert (memory.weights, memory.gradients, memory.optimizer, memory.average) == (
        4 * count, 4 * count, 8 * count, 4 * count,
    )  # fmt: skip
    assert memory.backbone == backbone.weight_bytes
    assert estimate_memory(resolve(make(**{"optim.ema": 0.0})), backbone, method).average == 0
    more = estimate_memory(resolve(make(**{"method.objective.kl": 1.0})), backbone, method)
    assert more.activations > memory.activations


def test_activations_are_what_autograd_keeps(make: Make) -> None:
    """The estimate against the tensors that the backward pass of one micro-batch holds, within a third."""
    import numpy as np

    from dihal.data.module import TextDataModule
    from dihal.methods import build_method

    config = resolve(
        make(
            **{
                "method.denoiser.width": 64,
                "method.denoiser.depth": 4,
                "method.denoiser.heads": 4,
                "data.sequence_length": 64,
            }
        )
    )
    backbone = tiny_backbone(num_blocks=3)
    method = build_method(config.method, backbone)
    data = TextDataModule(
        config.data,
        tokenizer=backbone.tokenizer,
        tokenizer_fingerprint=backbone.tokenizer_fingerprint,
        start_token_id=backbone.start_token_id,
        end_token_id=backbone.end_token_id,
    )
    batch = data.stream.batch(np.arange(config.data.batch_size))
    weights = {p.untyped_storage().data_ptr() for p in method.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = method.loss(backbone, batch, seed=0, step=0, batch_index=batch.sample_ids, global_batch=4)
    measured = sum(kept.values())
    assert out.total.requires_grad
    assert estimate_memory(config, backbone, method).activations == pytest.approx(measured, rel=0.33)
