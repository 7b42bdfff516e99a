"""Every shipped YAML parses against its class, and is a delta."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from dihal.config import (
    BackboneConfig,
    BudgetConfig,
    DataConfig,
    EvalConfig,
    FrontierConfig,
    MethodConfig,
    ScoreRunConfig,
    SweepConfig,
    TrainConfig,
)
from dihal.config.cli import parse, to_dict
from dihal.diffusion.schedule import build_schedule
from dihal.methods import METHODS

ROOT = Path(__file__).parents[3] / "configs"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.yaml"))


def _class(name):
    folder = name.split("/")[0]
    if folder == "run":
        kinds = {"score": ScoreRunConfig, "evaluate": EvalConfig, "sweep": SweepConfig, "frontier": FrontierConfig}
        return next((kind for word, kind in kinds.items() if word in name), TrainConfig)
    return {"backbone": BackboneConfig, "budget": BudgetConfig, "data": DataConfig, "method": MethodConfig}[folder]


def test_there_are_files_of_every_kind():
    assert {name.split("/")[0] for name in FILES} == {"backbone", "budget", "data", "method", "run"}


@pytest.mark.parametrize("name", FILES)
def test_shipped_file_parses(name):
    config = parse(_class(name), ["--config", str(ROOT / name)], prog="x")
    method = getattr(config, "method", config if isinstance(config, MethodConfig) else None)
    assert method is None or method.name in METHODS


@pytest.mark.parametrize("name", FILES)
def test_shipped_file_is_a_delta(name):
    """A key that repeats its default would silently keep the old value when the default changes."""
    kind = _class(name)
    defaults = to_dict(kind())

    def repeated(given, default, prefix=""):
        for key, value in given.items():
            at = default
            for part in str(key).split("."):
                at = at.get(part) if isinstance(at, dict) else None
            if isinstance(value, dict):
                yield from repeated(value, at or {}, f"{prefix}{key}.")
            elif value == at:
                yield f"{prefix}{key}"

    # what names the file stays, default or not
    naming = {"id", "name"}
    assert set(repeated(yaml.safe_load((ROOT / name).read_text()), defaults)) <= naming


@pytest.mark.parametrize("name", [name for name in FILES if _class(name) is TrainConfig])
def test_runs_name_the_split_once_and_a_budget(name):
    config = parse(TrainConfig, ["--config", str(ROOT / name)], prog="x")
    named = (config.method.split is not None) + (config.method.split_from is not None)
    # A run for many methods takes its split with the method, and its first line says so.
    several = "--method configs/method/" in (ROOT / name).read_text().splitlines()[0]
    assert named == (0 if several else 1)
    assert config.budget.name != BudgetConfig().name
    assert config.out.startswith("runs/")


def test_spaces_are_read_alike_once_a_row_says_how():
    """A row of `dihal frontier` names readout, projection and temperature; nothing else may differ between its spaces.

    But for the noise levels of the steps: like the schedule they belong to the space. When projection sets in is part of
    naming it.
    """
    ways = {}
    for name in FILES:
        method = parse(MethodConfig, ["--config", str(ROOT / name)], prog="x") if "method/" in name else None
        if method is not None and method.regime == "generate":
            ways[name] = replace(
                method.writing, readout="fused", project=0.5, project_below=1.0, temperature=1.0, log_snr_center=None
            )
    assert len(ways) >= 4
    assert len(set(ways.values())) == 1, ways


@pytest.mark.parametrize("space", ["hidden", "latent"])
def test_hidden_states_and_latents_are_walked_at_the_levels_they_are_trained_at(space):
    method = parse(MethodConfig, ["--config", str(ROOT / f"method/write-{space}.yaml")], prog="x")
    assert method.time.law == "logit_normal"
    median = torch.tensor(method.time.mean).sigmoid()
    level = build_schedule(method.process).log_snr(median)
    assert level.item() == pytest.approx(method.writing.log_snr_center, abs=0.1)


@pytest.mark.parametrize("path", sorted((ROOT / "run").glob("h200-*frontier.yaml")), ids=lambda path: path.stem)
def test_a_row_that_projects_says_from_when(path):
    """Spaces are shipped with their own `project_below`: a row of that name compares them only if it names one."""
    for variant in yaml.safe_load(path.read_text()).get("variants", []):
        words = dict(word.split("=") for word in variant.partition(": ")[2].split())
        assert "project" in words, variant
        assert float(words["project"]) == 0 or "project_below" in words, variant
