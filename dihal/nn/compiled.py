"""Parts of a pass compiled for the shapes they are called with, to be captured in a CUDA graph.

A capture may neither compile nor load a kernel. With dynamic shapes the same call may be served by another variant
than the one that was run before: the newest that fits. So every shape has a variant of its own, there is one that fits,
and it must be whole: what breaks a graph, or does not compile, raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["for_its_shapes"]

_VARIANTS = 128
"""Of a function: one for every batch, number of columns and positions within reach, and for every kind of block."""


_MADE: dict[Callable[..., Any], Callable[..., Any]] = {}


def for_its_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled in one piece for every combination of shapes, types and numbers that it is called with.

    Args:
        function: of a module's top level; equal blocks given to it share what is compiled.

    Raises:
        RuntimeError: when called: it cannot be compiled in one piece, or has too many variants.
    """
    if function not in _MADE:
        compiled = torch.compile(function, fullgraph=True, dynamic=False)

        def call(*args: Any, **kwargs: Any) -> Any:
            with torch._dynamo.config.patch(recompile_limit=_VARIANTS):
                return compiled(*args, **kwargs)

        _MADE[function] = call
    return _MADE[function]
