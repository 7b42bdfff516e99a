"""A tiny backbone in a folder, a little text, configurations that train in a second, and one trained run."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dihal.cli import run_command
from tests.kit import tiny_model, tiny_tokenizer

BLOCKS, VOCAB = 4, 270
BATCH, LENGTH = 4, 32
STEP = BATCH * LENGTH
WORDS = ["the", "a", "state", "bridge", "layer", "noise", "split", "token", "suffix", "prefix", "model", "score"]


def save_backbone(folder: Path, *, family: str = "llama", num_blocks: int = BLOCKS) -> Path:
    tiny_model(family, num_blocks=num_blocks, vocab=VOCAB).save_pretrained(folder)
    tiny_tokenizer(VOCAB).save_pretrained(folder)
    return folder


def write_documents(path: Path, documents: int = 60, *, seed: int = 0) -> Path:
    generator = random.Random(seed)
    rows = [
        {"text": f"{seed}-{i} " + " ".join(generator.choices(WORDS, k=30)), "source": f"s{i % 3}"}
        for i in range(documents)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_yaml(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with backbone/, text.jsonl, score.yaml, train.yaml, evaluate.yaml; made once, written by nobody."""
    root = tmp_path_factory.mktemp("integration")
    backbone = {"id": str(save_backbone(root / "backbone")), "device": "cpu"}
    data = {"source": str(write_documents(root / "text.jsonl"))}
    data |= {"sequence_length": LENGTH, "batch_size": BATCH, "validation_fraction": 0.25}
    score = {"tokens": 700, "sequence_length": 64, "anchors": 16, "neighbours": 8, "pool": 256, "bootstrap": 20}
    write_yaml(root / "score.yaml", {"backbone": backbone, "data": data, "score": score})
    train = {
        "backbone": backbone,
        "data": data,
        "method": {
            "denoiser": {"width": 32, "depth": 1, "heads": 2},
            "objective": {"kl": 1.0},
            "normalisation_tokens": 512,
        },
        "budget": {"tokens": 6 * STEP},
        "optim": {"lr": 1e-2, "ema": 0.9},
        "trainer": {"accelerator": "cpu", "validate_batches": 1},
        "log": {"every": 1, "progress": False},
    }
    write_yaml(root / "train.yaml", train)
    evaluate = {"tokens": 400, "batch_size": 4, "steps": [1, 2], "samples": 0, "bootstrap": 50}
    write_yaml(root / "evaluate.yaml", evaluate)
    return root


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, session_cache: Path) -> None:
    monkeypatch.setenv("DIHAL_CACHE", str(session_cache))
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK", "DIHAL_EMBEDDED_WHEEL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def run(root: Path, session_cache: Path) -> Path:
    """A trained run of six steps at split 2; read only."""
    before = os.environ.get("DIHAL_CACHE")
    os.environ["DIHAL_CACHE"] = str(session_cache)
    try:
        words = ["--config", str(root / "train.yaml"), "--method.split", "2", "--out", str(root / "run")]
        assert run_command("train", words) == 0
    finally:
        os.environ.pop("DIHAL_CACHE") if before is None else os.environ.update(DIHAL_CACHE=before)
    return root / "run"


Dihal = Callable[..., int]


@pytest.fixture
def dihal(root: Path) -> Dihal:
    """dihal("train", "--method.split", 1, ...) with the tiny configuration of that command underneath."""

    def call(command: str, *words: Any) -> int:
        own = root / f"{command}.yaml"
        given = ["--config", str(own)] if own.exists() else []
        return run_command(command, [*given, *map(str, words)])

    return call
