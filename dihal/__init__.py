"""DiHAL: where should continuous diffusion enter a pretrained language model?"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dihal.backbone import Backbone, load_backbone
    from dihal.geometry import ScoreReport, score_layers
    from dihal.hybrid import load_hybrid

__all__ = ["Backbone", "ScoreReport", "__version__", "load_backbone", "load_hybrid", "score_layers"]

__version__ = "0.1.0"

_HOME = {
    "Backbone": "dihal.backbone",
    "load_backbone": "dihal.backbone",
    "ScoreReport": "dihal.geometry",
    "score_layers": "dihal.geometry",
    "load_hybrid": "dihal.hybrid",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `import dihal` does not pay for transformers.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dihal' has no attribute {name!r}")
