"""Training beside the embedding and the lower blocks alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dihal.checkpoint import load_checkpoint
from dihal.errors import UsageError
from dihal.restore import restore_backbone
from dihal.training.run import train
from tests.kit import tiny_model
from tests.unit.training.conftest import Make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder).tensors("model")


def test_the_same_bridge_from_part_of_the_backbone(make: Make, tmp_path: Path) -> None:
    whole, part = (
        train(make(out=tmp_path / str(flag), **{"trainer.partial_backbone": flag})) for flag in (False, True)
    )
    expected = tensors(whole)
    assert all(torch.equal(value, expected[name]) for name, value in tensors(part).items())
    assert load_checkpoint(part).manifest["backbone_fingerprint"] is None
    assert restore_backbone(load_checkpoint(part)).held is None  # read whole, where a suffix is needed


def test_it_goes_on_with_the_whole_backbone(make: Make, tmp_path: Path) -> None:
    train(make(steps=4, out=tmp_path / "run", **{"trainer.partial_backbone": True}))
    train(make(steps=8, out=tmp_path / "run", resume=True))
    assert load_checkpoint(tmp_path / "run").state["step"] == 8


def test_an_edited_lower_block_is_refused(make: Make, model_folder: Path, tmp_path: Path) -> None:
    part = train(make(**{"trainer.partial_backbone": True}))
    model = tiny_model(num_blocks=3, hidden_size=32)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "edited")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "edited" / name).write_bytes((model_folder / name).read_bytes())
    with pytest.raises(UsageError, match="backbone_lower_fingerprint"):
        train(make(steps=9, resume=True, **{"backbone.id": str(tmp_path / "edited")}))
    config = json.loads((part / "config.json").read_text())
    assert config["config"]["trainer"]["partial_backbone"] is True


@pytest.mark.parametrize(
    "changes",
    [
        {"method.objective.kl": 0.1},
        {"method.objective.cross_entropy": 0.1},
        {"method.lora.rank": 2},
        {"data.own": 0.5},
        {"method.objective.metric": "fisher"},
    ],
)
def test_what_reads_the_suffix_needs_it(make: Make, changes: dict) -> None:
    with pytest.raises(UsageError, match="partial_backbone"):
        train(make(**{"trainer.partial_backbone": True, **changes}))
