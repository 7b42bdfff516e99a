"""FlexAttention under the mask `mixed`: the same output as with SDPA."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from dihal.nn.masks import block_visibility, visibility
from tests.unit.nn.kit import inputs, tiny

KNOWN = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 1, 0]]).bool()
PADDING = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]]).bool()


@pytest.mark.parametrize("padding", [None, PADDING])
def test_every_entry_is_that_of_the_other_mask(padding: torch.Tensor | None) -> None:
    expected, _ = visibility("mixed", 7, 7, torch.device("cpu"), padding=padding, known=KNOWN)
    mask = block_visibility(KNOWN, padding)
    place = torch.arange(7)
    rows = torch.arange(2)
    found = mask.mask_mod(rows[:, None, None], None, place[None, :, None], place[None, None, :])
    assert torch.equal(found, expected[:, 0])


@pytest.mark.parametrize("padding", [None, PADDING])
def test_the_denoiser_computes_the_same(padding: torch.Tensor | None) -> None:
    model = tiny(mask="mixed", width=128, heads=2)
    z, t, c = inputs()
    given = {"known": KNOWN, "attention_mask": padding}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(z, t, c, **given)
        model.config = dataclasses.replace(model.config, attention="flex")
        found = model(z, t, c, **given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_which_kernel_is_chosen() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for kind in ("causal", "mixed"):
        model = tiny(mask=kind)
        assert not model._flexible(cuda, 512)
        model.compiled = True
        assert model._flexible(cuda, 512) == (kind == "mixed")
        assert not model._flexible(cpu, 512)
        assert not model._flexible(cuda, 128), "one block of 128 has nothing to skip"
        model.config = dataclasses.replace(model.config, attention="sdpa")
        assert not model._flexible(cuda, 512)
        model.config = dataclasses.replace(model.config, attention="flex")
        assert model._flexible(cpu, 16) == (kind == "mixed")
