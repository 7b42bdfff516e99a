"""How long a step waits for the checkpoint that the step before it began."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dihal.checkpoint import load_checkpoint
from dihal.training.saving import Saver, patience


@pytest.mark.parametrize("took", [0.001, 0.05, 3.0])
def test_a_large_checkpoint_never_stalls_by_more_than_half_a_step(took: float) -> None:
    assert patience(200 << 20, took) == took / 2


def test_a_small_checkpoint_is_waited_for() -> None:
    # Fast steps of a small run: many would be lost to a kill while a few kilobytes are synced.
    assert patience(1 << 20, 0.001) > 100 * 0.001
    assert patience(1 << 20, 4.0) == 2.0


def test_reserving_on_a_cpu_changes_nothing(tmp_path: Path) -> None:
    saver = Saver(tmp_path, manifest={}, keep=1)
    weight = torch.arange(6.0).reshape(2, 3)
    tensors = {"model": {"weight": weight, "tied": weight}}
    saver.reserve(tensors)
    saver.start(tensors, {"step": 1}, {})
    weight.zero_()
    assert saver.finish() is None
    found = load_checkpoint(tmp_path).tensors("model")
    assert torch.equal(found["weight"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(found["tied"], found["weight"])
