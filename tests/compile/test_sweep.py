"""A sweep on compiled blocks: later splits compile nothing again, and nothing is compiled to measure them."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dihal.backbone import load_backbone
from dihal.config import (
    BackboneConfig,
    BudgetConfig,
    DataConfig,
    DenoiserConfig,
    LogConfig,
    MethodConfig,
    TrainConfig,
    TrainerConfig,
)
from dihal.config.sweep import SweepConfig
from dihal.sweep import sweep
from dihal.sweep import truth as truth_module
from tests.integration.conftest import BATCH, LENGTH, STEP, save_backbone, write_documents

pytestmark = pytest.mark.skipif(
    os.environ.get("DIHAL_NO_JAXTYPING") != "1" or shutil.which("g++") is None,
    reason="needs DIHAL_NO_JAXTYPING=1 (make test sets it) and a C++ compiler",
)


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_blocks_are_compiled_once_and_not_to_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIHAL_CACHE", str(tmp_path / "cache"))
    folder = save_backbone(tmp_path / "backbone")
    config = SweepConfig(
        train=TrainConfig(
            backbone=BackboneConfig(id=str(folder), device="cpu"),
            data=DataConfig(
                source=str(write_documents(tmp_path / "text.jsonl")),
                sequence_length=LENGTH,
                batch_size=BATCH,
                validation_fraction=0.25,
            ),
            # Neither the normalisation nor the evaluation has batches of the size that training has.
            method=MethodConfig(denoiser=DenoiserConfig(width=32, depth=1, heads=2), normalisation_tokens=512),
            budget=BudgetConfig(tokens=2 * STEP),
            trainer=TrainerConfig(accelerator="cpu", compile=True, validate_batches=1),
            log=LogConfig(progress=False),
        ),
        splits=(2, 3),
        tokens=500,
        batch_size=2 * BATCH + 1,
        report=False,
        out=str(tmp_path / "swept"),
    )
    seen: list[tuple[int, int]] = []
    real = truth_module._replaced

    def watched(*given, **named):
        before = graphs()
        found = real(*given, **named)
        seen.append((before, graphs()))
        return found

    monkeypatch.setattr(truth_module, "_replaced", watched)
    sweep(config, backbone=load_backbone(str(folder), device="cpu"), console=Console(file=io.StringIO()))
    (trained, measured), (again, measured_again) = seen
    assert trained > 0
    assert measured == trained
    assert again == measured
    assert measured_again == again
