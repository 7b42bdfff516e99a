"""`dihal sweep` on a tiny backbone: every split trained once, resumed, compared with every predictor."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dihal.backbone import Backbone, load_backbone
from dihal.config import (
    BackboneConfig,
    BudgetConfig,
    DataConfig,
    DenoiserConfig,
    LogConfig,
    LoraConfig,
    MethodConfig,
    ObjectiveConfig,
    OptimConfig,
    ScoreConfig,
    TrainConfig,
    TrainerConfig,
)
from dihal.config.convert import from_dict, to_dict
from dihal.config.sweep import PredictorConfig, SweepConfig, TextTruthConfig
from dihal.errors import UsageError
from dihal.sweep import SweepReport, sweep
from dihal.sweep import truth as truth_module
from dihal.sweep.predictors import DIRECTIONS
from tests.integration.conftest import BATCH, LENGTH, STEP, save_backbone

BLOCKS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("sweep") / "backbone", num_blocks=BLOCKS)


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load_backbone(str(folder), device="cpu")


@pytest.fixture(scope="module")
def template(root: Path, folder: Path) -> SweepConfig:
    return SweepConfig(
        train=TrainConfig(
            backbone=BackboneConfig(id=str(folder), device="cpu"),
            data=DataConfig(
                source=str(root / "text.jsonl"), sequence_length=LENGTH, batch_size=BATCH, validation_fraction=0.25
            ),
            method=MethodConfig(denoiser=DenoiserConfig(width=32, depth=1, heads=2), normalisation_tokens=512),
            budget=BudgetConfig(tokens=6 * STEP),
            optim=OptimConfig(lr=1e-2, ema=0.9),
            trainer=TrainerConfig(accelerator="cpu", validate_batches=1),
            log=LogConfig(progress=False),
        ),
        score=ScoreConfig(tokens=900, sequence_length=48, anchors=48, neighbours=8, pool=600),
        predictors=PredictorConfig(fisher_tokens=200),
        tokens=500,
        bootstrap=30,
    )


@pytest.fixture(scope="module")
def done(template: SweepConfig, backbone: Backbone, session_cache: Path, tmp_path_factory) -> tuple[SweepReport, Path]:
    out = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIHAL_CACHE", str(session_cache))
        report = sweep(replace(template, out=str(out)), backbone=backbone, console=Console(quiet=True))
    assert report is not None
    return report, out


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, bool]]:
    """(split, resumed) of every training that is started."""
    seen: list[tuple[int | None, bool]] = []
    real = truth_module.train

    def spy(config: TrainConfig, **more: Any) -> Path:
        seen.append((config.method.split, config.resume))
        return real(config, **more)

    monkeypatch.setattr(truth_module, "train", spy)
    return seen


def test_the_report(done: tuple[SweepReport, Path]) -> None:
    report, out = done
    assert report.splits == list(range(BLOCKS))
    assert report.candidates == list(range(1, BLOCKS))
    assert set(report.truths) == {"kl", "nll", "state_error"}
    assert set(DIRECTIONS) <= set(report.predictors)
    for name, item in report.truths.items():
        assert len(item["values"]) == BLOCKS, name
        assert all(value > 0 for value in item["values"]), name
        assert all(found["low"] < found["value"] < found["high"] for found in item["intervals"])
        for relation in report.relations[name].values():
            assert relation.spearman.value is not None
            assert -1 <= relation.spearman.value <= 1
            assert relation.regret.value is not None
            assert relation.regret.value >= 0
            assert relation.choice in report.candidates
    assert SweepReport.load(out).to_dict() == json.loads((out / "sweep.json").read_text())
    assert report.budget["spent"]["2/0"]["tokens"] == 6 * STEP
    assert not list(out.glob("*/checkpoints")), "only numbers stay"


def test_a_truth_is_what_dihal_evaluate_measures(
    template: SweepConfig, backbone: Backbone, done: tuple[SweepReport, Path], tmp_path: Path
) -> None:
    from dihal.config import EvalConfig
    from dihal.evaluation.result import read_result
    from dihal.evaluation.run import evaluate
    from dihal.training.run import train

    run = replace(template.train, method=replace(template.train.method, split=2), out=str(tmp_path / "run"))
    train(run, backbone=backbone)
    evaluate(
        EvalConfig(
            checkpoints=(str(tmp_path / "run"),), tokens=500, steps=(1,), samples=0, bootstrap=5, out=str(tmp_path / "results"),
        ),
        console=Console(quiet=True),
    )  # fmt: skip
    found = read_result(tmp_path / "results" / "run.json").metrics["1"]
    for name, item in done[0].truths.items():
        assert item["values"][2] == pytest.approx(found[name].value, rel=1e-5), name


def test_the_same_command_trains_nothing_again(
    template: SweepConfig, backbone: Backbone, done: tuple[SweepReport, Path], trained: list
) -> None:
    report, out = done
    console = Console(width=150, file=io.StringIO())
    again = sweep(replace(template, out=str(out)), backbone=backbone, console=console)
    shown = console.file.getvalue()
    assert "linear probe of h^0" in shown
    assert "split 3, seed 0: already measured, kept" in shown
    assert again is not None
    assert trained == []
    for part in ("truths", "predictors", "relations"):
        assert getattr(again, part) == getattr(report, part)


def test_how_text_would_be_written_is_no_other_sweep_where_none_is(
    template: SweepConfig, backbone: Backbone, done: tuple[SweepReport, Path], trained: list
) -> None:
    method = replace(template.train.method, writing=replace(template.train.method.writing, steps=7))
    other = replace(template, train=replace(template.train, method=method), out=str(done[1]), report=False)
    assert sweep(other, backbone=backbone, console=Console(quiet=True)) is None
    assert trained == []


def test_other_options_are_not_mixed_in(template: SweepConfig, backbone: Backbone, done, trained: list) -> None:
    other = replace(template, out=str(done[1]), tokens=400)
    with pytest.raises(UsageError, match="measured with other options"):
        sweep(other, backbone=backbone, console=Console(quiet=True))
    assert trained == []


def test_an_interrupted_sweep_goes_on(
    template: SweepConfig,
    backbone: Backbone,
    done: tuple[SweepReport, Path],
    trained: list,
    tmp_path: Path,
    monkeypatch,
) -> None:
    config = replace(template, out=str(tmp_path), splits=(1, 2, 3), keep_checkpoints=True)
    real, calls = truth_module._replaced, []

    def fails(*arguments: Any) -> dict[str, Any]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(truth_module, "_replaced", fails)
    with pytest.raises(KeyboardInterrupt):
        sweep(config, backbone=backbone, console=Console(quiet=True))
    assert trained == [(1, False), (2, False)]
    report = sweep(config, backbone=backbone, console=Console(quiet=True))
    assert trained[2:] == [(2, True), (3, False)], "split 1 was done; split 2 was trained, not measured"
    assert report is not None
    for name, item in report.truths.items():
        np.testing.assert_allclose(item["values"], done[0].truths[name]["values"][1:4], rtol=1e-6)
    assert len(list(tmp_path.glob("*/checkpoints"))) == 3
    trained.clear()
    other = sweep(replace(config, tokens=300), backbone=backbone, console=Console(quiet=True))
    assert other is not None
    assert trained == [], "kept checkpoints are measured again"
    assert other.truths["kl"]["values"] != report.truths["kl"]["values"]


def test_processes_may_share_the_splits(
    template: SweepConfig, backbone: Backbone, done: tuple[SweepReport, Path], trained: list, tmp_path: Path
) -> None:
    config = replace(template, out=str(tmp_path), splits=(1, 2, 3))
    for share in ((1, 3), (2,)):
        part = replace(config, splits=share, report=False)
        assert sweep(part, backbone=backbone, console=Console(quiet=True)) is None
    assert not (tmp_path / "sweep.json").exists()
    trained.clear()
    report = sweep(config, backbone=backbone, console=Console(quiet=True))
    assert trained == []
    assert report is not None
    for name, item in report.truths.items():
        np.testing.assert_allclose(item["values"], done[0].truths[name]["values"][1:4], rtol=1e-6)


def test_seeds_regression_and_other_sweeps(
    template: SweepConfig, backbone: Backbone, done: tuple[SweepReport, Path], tmp_path: Path, root: Path
) -> None:
    method = replace(template.train.method, name="regression")
    other = save_backbone(tmp_path / "other", num_blocks=4, family="qwen2")
    config = replace(
        template,
        train=replace(template.train, method=method, backbone=BackboneConfig(id=str(other), device="cpu")),
        splits=(3, 1, 2),
        seeds=(0, 1),
        truth="nll",
        fitted_on=(str(done[1]),),
        beside=(str(done[1] / "sweep.json"),),
        out=str(tmp_path / "sweep"),
    )
    report = sweep(config, console=Console(quiet=True))
    assert report is not None
    assert report.truth == "nll"
    assert report.splits == [1, 2, 3]
    per_seed = np.array(report.truths["nll"]["per_seed"])
    assert per_seed.shape == (2, 3)
    assert (per_seed[0] != per_seed[1]).all()
    np.testing.assert_allclose(per_seed.mean(0), report.truths["nll"]["values"])
    assert {"signs/rms", "ridge/raw", "ridge/all"} <= set(report.predictors)
    assert report.transfer is not None
    assert report.transfer["truth"] == "nll"
    text = (tmp_path / "sweep" / "predictors.md").read_text()
    assert str(other) in text
    assert done[0].backbone["id"] in text


def generating(template: SweepConfig, out: Path, **text: Any) -> SweepConfig:
    method = MethodConfig(
        regime="generate",
        denoiser=DenoiserConfig(width=32, depth=1, heads=2, mask="mixed"),
        objective=ObjectiveConfig(own=1.0, read=0.5),
        normalisation_tokens=512,
    )
    options = {
        "samples": 12,
        "prompt_tokens": 6,
        "new_tokens": 12,
        "temperatures": (0.0, 0.05, 3.0),
        "steps": 2,
        **text,
    }
    return replace(
        template, train=replace(template.train, method=method), text=TextTruthConfig(**options), splits=(0, 1, 2, 3), out=str(out)
    )  # fmt: skip


def test_the_regime_generate(template: SweepConfig, backbone: Backbone, done, trained: list, tmp_path: Path) -> None:
    config = replace(generating(template, tmp_path), beside=(str(done[1]),))
    report = sweep(config, backbone=backbone, console=Console(quiet=True))
    assert report is not None
    assert report.regime == "generate"
    assert report.truth == "text_nll"
    about = report.truths["text_nll"]
    assert len(about["values"]) == 4
    assert all(0 < value < 20 for value in about["values"])
    records = [json.loads((tmp_path / f"split-{split:02d}-seed-0.json").read_text()) for split in report.splits]
    curves = []
    for record in records:
        assert [point["temperature"] for point in record["points"]] == [0.0, 0.05, 3.0]
        entropies = [sum(point["sums"]["entropy"]) / sum(point["sums"]["samples"]) for point in record["points"]]
        assert entropies == sorted(entropies), "hotter is more varied"
        curves.append(entropies)
        assert sum(record["points"][0]["sums"]["scored"]) == 12 * 12
        assert record["self_graded"]
    assert {path.name for path in tmp_path.glob("sweep*")} == {
        "sweep.json", "sweep.md", "sweep-generate.png", "sweep-generate.svg",
    }  # fmt: skip
    assert "replace: KL" in (tmp_path / "predictors.md").read_text()
    # Predictors do not know of the regime.
    for name, item in report.predictors.items():
        assert item == done[0].predictors[name]
    trained.clear()
    middle = (max(curve[0] for curve in curves) + min(curve[-1] for curve in curves)) / 2
    at = sweep(generating(template, tmp_path, entropy=middle), backbone=backbone, console=Console(quiet=True))
    assert at is not None
    assert trained == [], "another entropy is read off the same texts"
    assert f"{middle:.2f}" in at.truths["text_nll"]["label"]


def test_too_little_text_for_the_prompts_stops_before_training(
    template: SweepConfig, backbone: Backbone, trained: list, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="windows of held-out text"):
        sweep(generating(template, tmp_path, new_tokens=200), backbone=backbone, console=Console(quiet=True))
    assert trained == []


def test_the_configuration_survives_its_file(template: SweepConfig) -> None:
    assert from_dict(SweepConfig, to_dict(template)) == template


def method(**changes: Any) -> Callable[[SweepConfig], SweepConfig]:
    return lambda c: replace(c, train=replace(c.train, method=replace(c.train.method, **changes)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (method(split=2), "train.method.split is 2"),
        (method(split_from="scores.json"), "train.method.split_from"),
        (method(space="embedding"), "no split to sweep"),
        (method(lora=LoraConfig(rank=2)), "lora"),
        (lambda c: replace(c, train=replace(c.train, trainer=replace(c.train.trainer, devices=2))), "one process"),
        (lambda c: replace(c, train=replace(c.train, resume=True)), "train.resume"),
        (method(denoiser=DenoiserConfig(mask="mixed")), "needs method.denoiser.mask 'causal'"),
        (lambda c: replace(c, splits=(1, 2, 9)), "names 9; this backbone has splits 0 to 4"),
        (lambda c: replace(c, splits=(1, 2, 2, 3)), "one twice"),
        (lambda c: replace(c, splits=(0, 1, 2)), "2 splits above 0"),
        (lambda c: replace(c, seeds=()), "at least one training seed"),
        (lambda c: replace(c, seeds=(1, 1)), "each once"),
        (lambda c: replace(c, bootstrap=0), "bootstrap must be at least 1"),
        (lambda c: replace(c, steps=0), "steps must be at least 1"),
        (lambda c: replace(c, confidence=1.0), "confidence"),
        (lambda c: replace(c, truth="text_nll"), "not measured under the regime 'replace'"),
        (lambda c: replace(c, text=TextTruthConfig(temperatures=())), "text.temperatures"),
        (lambda c: replace(c, text=TextTruthConfig(samples=0)), "text.samples"),
        (lambda c: replace(c, text=TextTruthConfig(writing="nonsense=1")), "nonsense"),
        (lambda c: replace(c, predictors=PredictorConfig(probe_folds=1)), "predictors.probe_folds"),
        (lambda c: replace(c, score=replace(c.score, neighbours=1)), "neighbours"),
        (lambda c: replace(c, fitted_on=("nowhere.json",)), "no file 'nowhere.json'"),
    ],
)
def test_bad_options_stop_before_training(
    template: SweepConfig, backbone: Backbone, change: Callable, message: str, trained: list, tmp_path: Path
) -> None:
    config = change(replace(template, out=str(tmp_path)))
    with pytest.raises(UsageError, match=message):
        sweep(config, backbone=backbone, console=Console(quiet=True))
    assert trained == []
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_the_plan(template: SweepConfig, backbone: Backbone, tmp_path: Path, capsys) -> None:
    config = replace(template, out=str(tmp_path / "x"), train=replace(template.train, dry_run=True))
    assert sweep(config, backbone=backbone) is None
    assert "5 splits x 1 seeds" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()
