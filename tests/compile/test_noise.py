"""The compiled generator of normals draws the numbers of the plain one."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from dihal.random import _normals, _round_keys, normal

pytestmark = pytest.mark.skipif(
    os.environ.get("DIHAL_NO_JAXTYPING") != "1" or shutil.which("g++") is None,
    reason="needs DIHAL_NO_JAXTYPING=1 (make test sets it) and a C++ compiler",
)

IDS = torch.tensor([5, 2**40 + 3, -7])


def drawn(function, seed: int, purpose: str, ids: torch.Tensor, count: int) -> torch.Tensor:
    keys = _round_keys(seed, purpose, torch.device("cpu"))
    return function(ids, keys, torch.arange(-(-count // 4))).view(len(ids), -1)[:, :count]


def test_in_one_piece_it_is_the_same_arithmetic() -> None:
    assert torch.equal(drawn(_normals, 3, "noise", IDS, 42), normal(3, IDS, "noise", (42,)))


def test_compiled_it_draws_the_same_numbers() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fused = torch.compile(_normals, dynamic=True)
    for seed, purpose, ids, count in ((3, "noise", IDS, 42), (4, "x", torch.arange(9), 50), (3, "noise", IDS, 30)):
        found, expected = drawn(fused, seed, purpose, ids, count), normal(seed, ids, purpose, (count,))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
