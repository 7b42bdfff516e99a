"""A tiny model folder, a little text, and a configuration that trains in a second."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dihal.config import (
    BackboneConfig,
    BudgetConfig,
    DataConfig,
    DenoiserConfig,
    LogConfig,
    MethodConfig,
    OptimConfig,
    TrainConfig,
    TrainerConfig,
)
from dihal.config.convert import from_dict, to_dict
from tests.kit import tiny_model, tiny_tokenizer

BATCH, LENGTH = 4, 16


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(num_blocks=3, hidden_size=32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rng = random.Random(0)
    words = ["the", "a", "state", "bridge", "layer", "noise", "split", "token", "suffix", "prefix", "model"]
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=60))}) for _ in range(40)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("DIHAL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")


Make = Callable[..., TrainConfig]


@pytest.fixture
def make(model_folder: Path, text_file: Path, tmp_path: Path) -> Make:
    """make(steps=..., **{"optim.lr": 1e-2}) -> a configuration of that many steps."""

    def build(*, steps: int = 6, out: Path | str | None = None, **changes: Any) -> TrainConfig:
        config = TrainConfig(
            backbone=BackboneConfig(id=str(model_folder), device="cpu"),
            data=DataConfig(source=str(text_file), sequence_length=LENGTH, batch_size=BATCH, validation_fraction=0.2),
            method=MethodConfig(split=1, denoiser=DenoiserConfig(width=16, depth=1, heads=2), normalisation_tokens=256),
            budget=BudgetConfig(tokens=steps * BATCH * LENGTH),
            optim=OptimConfig(ema=0.9, lr=3e-3),
            trainer=TrainerConfig(accelerator="cpu", validate_batches=2),
            log=LogConfig(every=1, progress=False),
            out=str(out or tmp_path / "run"),
        )
        plain = to_dict(config)
        for name, value in changes.items():
            *path, last = name.split(".")
            part = plain
            for key in path:
                part = part[key]
            part[last] = value
        return from_dict(TrainConfig, plain)

    return build


def resumed(config: TrainConfig, **changes: Any) -> TrainConfig:
    return replace(config, resume=True, **changes)
