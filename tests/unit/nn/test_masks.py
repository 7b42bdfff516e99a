"""Masks, entry by entry against their definitions."""

from __future__ import annotations

import itertools

import pytest
import torch

from dihal.errors import UsageError
from dihal.nn.masks import visibility

CPU = torch.device("cpu")


def sees(kind, i, j, known, padding):
    """Definition, one query and one key at a time."""
    if i == j:
        return True
    if padding is not None and not padding[j]:
        return False
    if kind == "causal":
        return j < i
    if kind == "mixed" and known[i]:
        return bool(known[j]) and j < i
    return True


@pytest.mark.parametrize(
    ("kind", "past"), [("causal", 0), ("causal", 2), ("bidirectional", 0), ("mixed", 0), ("mixed", 2)]
)
@pytest.mark.parametrize("padding", [None, [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]])
@pytest.mark.parametrize("known", [[[1, 1, 0, 0, 0], [1, 0, 1, 0, 1]]])
def test_every_entry(kind, past, padding, known):
    padding = None if padding is None else torch.tensor(padding).bool()
    known = torch.tensor(known).bool() if kind == "mixed" else None
    if known is not None:
        known[:, :past] = True  # what a cache holds
    new = None if known is None else known[:, past:]
    mask, is_causal = visibility(kind, 5 - past, 5, CPU, padding=padding, known=new)
    if mask is None:
        mask = torch.ones(1, 1, 5, 5).bool().tril() if is_causal else torch.ones(1, 1, 5, 5).bool()
        assert padding is None
    mask = mask.expand(2, 1, 5 - past, 5)
    for b, i, j in itertools.product(range(2), range(past, 5), range(5)):
        row = None if padding is None else padding[b]
        assert mask[b, 0, i - past, j].item() == sees(kind, i, j, None if known is None else known[b], row)
    assert mask.any(-1).all()


def test_fast_paths_need_no_mask():
    assert visibility("causal", 5, 5, CPU) == (None, True)
    assert visibility("causal", 1, 5, CPU) == (None, False)
    assert visibility("bidirectional", 5, 5, CPU) == (None, False)


def test_errors():
    with pytest.raises(UsageError, match="Did you mean 'causal'"):
        visibility("casual", 3, 3, CPU)
    with pytest.raises(UsageError, match="needs known="):
        visibility("mixed", 3, 3, CPU)
    with pytest.raises(UsageError, match="no meaning"):
        visibility("causal", 3, 3, CPU, known=torch.ones(1, 3).bool())
