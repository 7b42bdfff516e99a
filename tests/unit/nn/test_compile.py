"""Blocks compile in place without a graph break (in a process without run-time shape checks)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import torch
from tests.unit.nn.kit import inputs, tiny

for norm in ("adaptive", "rms"):
    plain, compiled = tiny(norm=norm), tiny(norm=norm)
    for block in compiled.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    z, t, c = inputs()
    for mask in (None, torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])):
        expected, found = plain(z, t, c, attention_mask=mask), compiled(z, t, c, attention_mask=mask)
        assert torch.allclose(expected, found, atol=1e-5), (norm, (expected - found).abs().max())
        found.square().mean().backward()
print("compiled")
"""


def test_blocks_compile_without_graph_breaks():
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root), "DIHAL_NO_JAXTYPING": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=root, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]
