"""Notation, said once. Every module uses these symbols and none redefines them.

=============  ==========================================================================
symbol         meaning
=============  ==========================================================================
x_1..x_T       token ids of one sequence
L, d, V        number of transformer blocks, hidden size, vocabulary size
split l        number of blocks replaced, 0 <= l < L
h^l_i          residual stream **entering** block l at position i; h^0 = embedding output
prefix(l)      embedding + blocks 0..l-1
suffix(l)      blocks l..L-1 + final norm + LM head
t              diffusion time in [0, 1]: **0 = clean, 1 = noise**
z, z_t         normalised clean state; noised state alpha(t) z + sigma(t) eps
c              condition: the frozen token embeddings h^0, one vector per position
=============  ==========================================================================

Shapes are jaxtyping annotations. They are checked at run time under pytest only (see
``tests/conftest.py``); outside the test suite they cost nothing.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Logits", "Mask", "Padding", "PerPosition", "State", "Time", "TokenIds"]

TokenIds = Int[Tensor, "batch time"]
"""Token ids."""

State = Float[Tensor, "batch time dim"]
"""A residual-stream state h^l, or its normalised form z."""

Logits = Float[Tensor, "batch time vocab"]
"""Next-token logits."""

Mask = Bool[Tensor, "batch time"]
"""True where a position holds a real token (or, for loss masks, where it counts)."""

Padding = Bool[Tensor, "batch total"]
"""True where a token is real; with a cache it covers cached and new positions."""

PerPosition = Float[Tensor, "batch time"]
"""One number per position: a loss, a weight, a time."""

Time = Float[Tensor, "batch"] | Float[Tensor, "batch time"]
"""Diffusion time in [0, 1]; one per sequence, or one per position."""
