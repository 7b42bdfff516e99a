"""Sixty-four sequences learned by heart, and written again from their beginnings."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from dihal.backbone import Backbone, load_backbone
from dihal.config import KnownConfig, MaskedConfig, WritingConfig
from dihal.masked import MaskedLM
from dihal.methods import build_method
from tests.kit import tiny_config, tiny_tokenizer
from tests.unit.masked.kit import VOCAB, config
from tests.unit.test_methods import make_batch

SEQUENCES, TIME, PREFIX = 64, 32, 16
STEPS, PEAK = 350, 3e-3


def fresh() -> tuple[Backbone, MaskedLM]:
    """With the library's own initial weights: those of ``tiny_backbone`` are too large to learn from in seconds."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(num_blocks=2, hidden_size=64))
    backbone = load_backbone(model, device="cpu", tokenizer=tiny_tokenizer(VOCAB))
    masked = MaskedConfig(weight="uniform", conditional=0.5)
    known = KnownConfig(prefix_min=PREFIX, prefix_max=PREFIX / TIME, infill=0.0)
    return backbone, build_method(config(masked=masked, known=known), backbone)


@pytest.fixture(scope="module")
def learned():
    """The model before and after, and the text."""
    backbone, method = fresh()
    batch = make_batch(SEQUENCES, TIME)
    optimiser = torch.optim.AdamW(method.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = PEAK * min(1.0, (step + 1) / 20, 2 * (STEPS - step) / STEPS)
        out = method.loss(
            backbone,
            dataclasses.replace(batch, sample_ids=batch.sample_ids + step * SEQUENCES),  # other masks at every step
            seed=0,
            step=step,
            batch_index=torch.arange(SEQUENCES),
            global_batch=SEQUENCES,
            progress=step / STEPS,
        )
        optimiser.zero_grad()
        out.total.backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        optimiser.step()
    return backbone, method, batch.input_ids


def recalled(backbone: Backbone, method: MaskedLM, ids: torch.Tensor, writing: WritingConfig) -> float:
    """Share of the texts that come back whole from their first 16 tokens."""
    known = (torch.arange(TIME) < PREFIX).expand(SEQUENCES, -1)
    out = method.write(
        backbone, torch.where(known, ids, 0), known, writing=writing, sample_ids=torch.arange(SEQUENCES), end=False
    )
    return float((out.tokens == ids).all(-1).float().mean())


@pytest.mark.parametrize("order", ["confidence", "entropy", "random"])
def test_what_was_learned_by_heart_is_written_again(learned, order: str) -> None:
    backbone, method, ids = learned
    assert recalled(backbone, method, ids, WritingConfig(steps=8, order=order)) >= 0.9
    assert recalled(*fresh(), ids, WritingConfig(steps=8, order=order)) == 0.0


@pytest.mark.parametrize("block", [4, 16])
def test_in_blocks_and_with_a_temperature(learned, block: int) -> None:
    backbone, method, ids = learned
    writing = WritingConfig(steps=4, block=block, temperature=0.7, top_p=0.9)
    assert recalled(backbone, method, ids, writing) >= 0.8


def test_a_gap_is_filled_with_what_was_there(learned) -> None:
    backbone, method, ids = learned
    columns = torch.arange(TIME).expand(SEQUENCES, -1)
    known, given = columns < 12, columns >= 20
    out = method.write(
        backbone, torch.where(known | given, ids, 0), known, given=given, writing=WritingConfig(steps=8), end=False
    )
    # Trained on prefixes for half of the time, it fills gaps less surely than it continues; chance is 0.01.
    assert float((out.tokens == ids).float()[:, 12:20].mean()) >= 0.65
