"""Whole runs of a tiny bridge: exact budgets, exact resume, stops, refusals."""

from __future__ import annotations

import csv
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dihal.checkpoint import list_checkpoints, load_checkpoint
from dihal.config import BudgetConfig
from dihal.errors import UsageError
from dihal.methods import Method
from dihal.training.guard import TrainingDiverged
from dihal.training.logs import read_records
from dihal.training.module import BridgeModule
from dihal.training.run import train
from dihal.writer import Writer
from tests.unit.training.conftest import BATCH, LENGTH, Make, resumed

STABLE = ("step", "tokens", "samples_seen", "loss", "state", "explained", "grad_norm", "lr")


def stream(folder: Path | str) -> list[tuple]:
    records = [r for r in read_records(Path(folder) / "metrics.jsonl") if r["kind"] == "train"]
    return [tuple(record.get(name) for name in STABLE) for record in records]


def same_tensors(left: Path | str, right: Path | str) -> bool:
    one, two = load_checkpoint(left), load_checkpoint(right)
    assert one.names == two.names
    for name in one.names:
        a, b = one.tensors(name), two.tensors(name)
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            return False
    return True


def test_a_run_leaves_what_it_promises(make: Make) -> None:
    config = make(steps=6)
    folder = train(config)
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoints", "config.json", "config.yaml", "metrics.csv", "metrics.jsonl",
    ]  # fmt: skip
    checkpoint = load_checkpoint(folder)
    assert checkpoint.state["step"] == 6
    assert checkpoint.state["tokens"] == 6 * BATCH * LENGTH == config.budget.tokens
    assert checkpoint.state["samples_seen"] == 6 * BATCH
    assert checkpoint.state["budget"]["spent"] is True
    assert checkpoint.state["seconds"] > 0
    assert checkpoint.names == ("ema", "model", "optimizer")
    assert not [key for key in checkpoint.tensors("model") if "backbone" in key]
    assert set(checkpoint.tensors("ema")) <= set(checkpoint.tensors("model"))
    assert checkpoint.config.trainer.precision == "32-true"
    assert checkpoint.manifest["backbone"]["num_blocks"] == 3
    assert len(checkpoint.manifest["backbone_fingerprint"]) == 64
    assert set(checkpoint.manifest["data_fingerprint"]) == {"train", "validation"}
    records = read_records(folder / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    (validation,) = [r for r in records if r["kind"] == "validation"]
    assert validation["step"] == 6
    assert validation["ema_loss"] != validation["loss"]
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["loss"] for row in rows] == [str(r["loss"]) for r in records]
    assert json.loads((folder / "config.json").read_text())["config"]["method"]["split"] == 1


def test_it_learns(make: Make) -> None:
    folder = train(make(steps=40, **{"optim.lr": 1e-2, "optim.ema": 0.8}))
    losses = [record["loss"] for record in read_records(folder / "metrics.jsonl") if record["kind"] == "train"]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize(("extra", "steps"), [(0, 3), (1, 3), (BATCH * LENGTH - 1, 3), (BATCH * LENGTH, 4)])
def test_the_budget_is_never_exceeded(make: Make, extra: int, steps: int) -> None:
    config = make(steps=3)
    folder = train(replace(config, budget=BudgetConfig(tokens=config.budget.tokens + extra)))
    assert load_checkpoint(folder).state["tokens"] == steps * BATCH * LENGTH


def test_seconds_end_a_run(make: Make) -> None:
    folder = train(make(steps=1_000_000, **{"budget.seconds": 0.5}))
    state = load_checkpoint(folder).state
    assert 0.5 <= state["seconds"] < 5
    assert stream(folder)[-1][0] == state["step"]


def test_accumulation_equals_the_larger_batch(make: Make, tmp_path: Path) -> None:
    """Same samples, times and noise: the same steps up to the order of sums."""
    whole = train(make(steps=4, out=tmp_path / "whole"))
    parts = train(make(steps=4, out=tmp_path / "parts", **{"data.batch_size": 1, "trainer.accumulate": 4}))
    for left, right in zip(stream(whole), stream(parts), strict=True):
        assert left[:3] == right[:3]
        assert left[3] == pytest.approx(right[3], rel=1e-5)
        assert left[6] == pytest.approx(right[6], rel=1e-4)


def dies_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Fail before this step (counted from 0) counts."""
    finish = BridgeModule._finish_step

    def dies(self: BridgeModule) -> object:
        if self.spent.step == step:
            raise RuntimeError("killed")
        return finish(self)

    monkeypatch.setattr(BridgeModule, "_finish_step", dies)


@pytest.mark.parametrize("changes", [{}, {"method.denoiser.dropout": 0.1, "trainer.accumulate": 2}])
def test_resume_is_bit_identical(make: Make, tmp_path: Path, changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulate = changes.get("trainer.accumulate", 1)
    whole = make(
        steps=8 * accumulate, out=tmp_path / "whole", **changes, **{"trainer.save_every": 3, "trainer.keep": 9}
    )
    train(whole)
    assert [p.name for p in list_checkpoints(whole.out)] == ["step-00000003", "step-00000006", "step-00000008"]

    # Cut at step 5: two steps after the last checkpoint, as kill -9 would.
    cut = replace(whole, out=str(tmp_path / "cut"))
    dies_at(monkeypatch, 5)
    with pytest.raises(RuntimeError, match="killed"):
        train(cut)
    monkeypatch.undo()
    assert [r[0] for r in stream(cut.out)] == [1, 2, 3, 4, 5]
    assert load_checkpoint(cut.out).state["step"] == 3
    torch.manual_seed(123)  # whatever the new process drew before
    train(resumed(cut))
    assert stream(cut.out) == stream(whole.out)
    assert same_tensors(cut.out, whole.out)


def test_a_spent_run_resumes_to_nothing(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = make(steps=2)
    train(config)
    before = load_checkpoint(config.out).path
    assert train(resumed(config)) == Path(config.out)
    assert load_checkpoint(config.out).path == before
    assert "raise budget.tokens" in capsys.readouterr().err


def test_a_larger_budget_goes_on(make: Make) -> None:
    config = make(steps=2)
    train(config)
    train(resumed(make(steps=4)))
    assert [r[0] for r in stream(config.out)] == [1, 2, 3, 4]


def test_a_fresh_run_refuses_a_used_folder_and_resume_an_empty_one(make: Make, tmp_path: Path) -> None:
    config = make(steps=1)
    train(config)
    with pytest.raises(UsageError, match="resume=true"):
        train(config)
    with pytest.raises(UsageError, match="does not exist"):
        train(resumed(make(out=tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"method.split": 2}, "method.split was 1, is 2"),
        ({"method.denoiser.width": 32}, "method.denoiser.width"),
        ({"data.batch_size": 2}, "sequences per optimiser step were 4, are 2"),
        ({"data.validation_fraction": 0.5}, "data_fingerprint"),
    ],
)
def test_resume_refuses_another_run(make: Make, changes: dict, named: str) -> None:
    train(make(steps=1))
    with pytest.raises(UsageError, match=named):
        train(resumed(make(steps=2, **changes)))


def test_resume_refuses_an_edited_backbone(make: Make, model_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    train(make(steps=1))
    other = tmp_path / "edited"
    other.mkdir()
    for file in model_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(other / "model.safetensors")
    name = next(key for key in weights if "layers.0" in key)
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="backbone_full_fingerprint"):
        train(resumed(make(steps=2, **{"backbone.id": str(other)})))


def test_a_damaged_newest_checkpoint_costs_one_interval(make: Make, tmp_path: Path) -> None:
    whole = make(steps=4, out=tmp_path / "whole", **{"trainer.save_every": 2})
    train(whole)
    newest = list_checkpoints(whole.out)[-1]
    (newest / "optimizer.safetensors").write_bytes(b"")
    reference = stream(whole.out)
    with pytest.warns(UserWarning, match="Falling back to step-00000002"):
        train(resumed(whole))
    assert stream(whole.out) == reference
    assert load_checkpoint(whole.out).state["step"] == 4


def test_keep(make: Make) -> None:
    config = make(steps=5, **{"trainer.save_every": 1, "trainer.keep": 2})
    train(config)
    assert [p.name for p in list_checkpoints(config.out)] == ["step-00000004", "step-00000005"]


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], factor: float = float("nan"), kind: type = Method) -> None:
    """Multiply the loss in these steps (counted from 0)."""
    loss = kind.loss

    def poisoned(self: Method | Writer, backbone: object, batch: object, *, step: int, **rest: object) -> object:
        out = loss(self, backbone, batch, step=step, **rest)
        return replace(out, total=out.total * factor) if step in steps else out

    monkeypatch.setattr(kind, "loss", poisoned)


def test_a_step_that_is_not_finite_is_skipped_and_told(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(steps=6, **{"trainer.save_every": 1, "trainer.keep": 9})
    poison(monkeypatch, {3})
    train(config)
    assert "skipped: step 4 is not finite" in capsys.readouterr().err
    (skipped,) = [r for r in read_records(Path(config.out) / "metrics.jsonl") if r["kind"] == "skipped"]
    assert (skipped["step"], skipped["reason"], skipped["sample_ids"]) == (4, "nonfinite", [12, 13, 14, 15])
    assert (skipped["loss"], skipped["skipped"], skipped["samples_seen"]) == (None, 1, 16)
    assert [row[0] for row in stream(config.out)] == [1, 2, 3, 5, 6]
    before, after, next_one = list_checkpoints(config.out)[2:5]
    assert same_tensors(before, after), "weights, average and optimiser are bit-unchanged"
    assert not same_tensors(after, next_one)
    state = load_checkpoint(config.out).state
    assert (state["step"], state["samples_seen"], state["skipped"], state["ema_updates"]) == (6, 24, 1, 5)


def test_too_many_in_a_row_end_the_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(steps=9, **{"trainer.save_every": 2, "trainer.keep": 1, "trainer.max_nonfinite": 2})
    poison(monkeypatch, {1, 3, 4, 6})  # 1 alone, then 3 and 4
    with pytest.raises(TrainingDiverged, match=r"2 steps in a row.*step 5 .*samples 16, 17, 18, 19.*step-00000005"):
        train(config)
    assert TrainingDiverged.exit_status == 3
    # The checkpoint of step 4 would have been pruned by an ordinary save.
    assert [path.name for path in list_checkpoints(config.out)] == ["step-00000004", "step-00000005"]
    assert same_tensors(*list_checkpoints(config.out))
    train(resumed(config))
    assert [row[0] for row in stream(config.out)] == [1, 3, 6, 8, 9]
    assert load_checkpoint(config.out).state["skipped"] == 4


def test_what_was_skipped_survives_a_resume(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spikes are judged by what came before: a resumed run judges as the uninterrupted one."""
    changes = {"trainer.skip_spike": 3.0, "trainer.save_every": 1, "trainer.keep": 99}
    poison(monkeypatch, {20, 23}, factor=50.0)
    whole = make(steps=25, out=tmp_path / "whole", **changes)
    train(whole)
    skipped = [r for r in read_records(Path(whole.out) / "metrics.jsonl") if r["kind"] == "skipped"]
    assert {(r["step"], r["reason"]) for r in skipped} >= {(21, "spike"), (24, "spike")}
    paths = list_checkpoints(whole.out)
    assert same_tensors(paths[19], paths[20])
    cut = replace(whole, out=str(tmp_path / "cut"))
    with pytest.MonkeyPatch.context() as patch:
        dies_at(patch, 19)
        with pytest.raises(RuntimeError, match="killed"):
            train(cut)
    assert len(load_checkpoint(cut.out).state["gradient_norms"]) == 19
    train(resumed(cut))
    assert stream(cut.out) == stream(whole.out)
    assert same_tensors(cut.out, whole.out)


def test_a_learned_schedule_forgets_a_skipped_step(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"method.regime": "generate", "method.space": "embedding", "method.denoiser.mask": "mixed"}
    changes |= {"method.process.schedule": "gumbel", "method.split": 0, "method.objective.own": 1.0}
    changes |= {"method.objective.own_time": "uniform"}
    config = make(steps=4, **changes, **{"trainer.save_every": 1, "trainer.keep": 9})
    poison(monkeypatch, {2}, kind=Writer)
    train(config)
    second, third, fourth = list_checkpoints(config.out)[1:]
    assert same_tensors(second, third)
    moments = [load_checkpoint(path).tensors("model")["schedule.moments"] for path in (third, fourth)]
    assert not torch.equal(*moments), "a step that counts moves them"


def test_a_full_disk_while_training(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    config = make(steps=4, **{"trainer.save_every": 1})
    usage = shutil.disk_usage
    calls = 0

    def shrinking(path: object) -> object:
        nonlocal calls
        calls += 1
        return usage(path) if calls < 3 else usage(path)._replace(free=10)

    monkeypatch.setattr(shutil, "disk_usage", shrinking)
    with pytest.raises(UsageError, match=r"step 3 .*MiB free.*step-00000002 is intact"):
        train(config)
    monkeypatch.undo()
    assert load_checkpoint(config.out).state["step"] == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_says_so(
    make: Make, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    config = make(steps=8, **{"trainer.accumulate": 2, "data.batch_size": 2, "log.every": 2})
    before = signal.getsignal(number)
    loss = Method.loss

    def signalled(self: Method, backbone: object, batch: object, *, step: int, **rest: object) -> object:
        again = int(batch.sample_ids[0]) % BATCH != 0  # the second micro-batch of step 5: a second SIGINT means now
        if step == 4 and not (again and number == signal.SIGINT):
            os.kill(os.getpid(), number)
        return loss(self, backbone, batch, step=step, **rest)

    monkeypatch.setattr(Method, "loss", signalled)
    with pytest.raises(SystemExit) as stopped:
        train(config)
    monkeypatch.undo()
    assert stopped.value.code == code
    assert signal.getsignal(number) == before
    assert load_checkpoint(config.out).state["step"] == 5
    assert [row[0] for row in stream(config.out)] == [2, 4]
    assert not [r for r in read_records(Path(config.out) / "metrics.jsonl") if r["kind"] == "validation"]
    train(resumed(config))
    assert [row[0] for row in stream(config.out)] == [2, 4, 6, 8]


def test_a_second_interrupt_means_now(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(steps=8, **{"trainer.save_every": 2})
    loss = Method.loss

    def twice(self: Method, backbone: object, batch: object, *, step: int, **rest: object) -> object:
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, backbone, batch, step=step, **rest)

    monkeypatch.setattr(Method, "loss", twice)
    # A shell starts its background jobs with SIGINT ignored: what was there before is what must be back.
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        train(config)
    assert stopped.value.code == 130
    assert load_checkpoint(config.out).state["step"] == 4
    assert signal.getsignal(signal.SIGINT) is before


def test_validation_interval(make: Make) -> None:
    config = make(steps=5, **{"trainer.validate_every": 2})
    folder = train(config)
    assert [r["step"] for r in read_records(folder / "metrics.jsonl") if r["kind"] == "validation"] == [2, 4, 5]


def test_without_average(make: Make) -> None:
    folder = train(make(steps=2, **{"optim.ema": 0.0}))
    assert load_checkpoint(folder).names == ("model", "optimizer")
    (validation,) = [r for r in read_records(folder / "metrics.jsonl") if r["kind"] == "validation"]
    assert "ema_loss" not in validation


def test_suffix_terms_and_bf16_mixed(make: Make) -> None:
    config = make(
        steps=2,
        **{
            "method.objective.kl": 1.0,
            "method.objective.cross_entropy": 0.5,
            "trainer.precision": "bf16-mixed",
            "backbone.dtype": "bfloat16",
        },
    )
    folder = train(config)
    record = read_records(folder / "metrics.jsonl")[0]
    assert {"state", "kl", "cross_entropy"} <= set(record)
    assert all(t.dtype == torch.float32 for k, t in load_checkpoint(folder).tensors("ema").items())


def test_adapters_train_and_resume(make: Make) -> None:
    changes = {"method.lora.rank": 2, "method.objective.kl": 1.0}
    config = make(steps=2, **changes)
    train(config)
    before = load_checkpoint(config.out).tensors("model")
    assert [key for key in before if key.startswith("lora")]
    train(resumed(make(steps=4, **changes)))
    after = load_checkpoint(config.out).tensors("model")
    assert any(not torch.equal(before[key], after[key]) for key in before if key.startswith("lora"))
