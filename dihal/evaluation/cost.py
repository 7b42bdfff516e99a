"""What predicting a token costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dihal.controls import Embedding, Identity, MeanState
from dihal.evaluation.rows import NO_SAMPLING, Row
from dihal.meter import Meter
from dihal.methods import Method

if TYPE_CHECKING:
    from dihal.backbone import Backbone

__all__ = ["sampling_flops"]


def sampling_flops(backbone: Backbone, row: Row, *, length: int) -> dict[str, float]:
    """FLOPs per predicted token of one whole window, by number of steps, in the convention of ``dihal.meter``.

    Denoiser (every evaluation), replaced or true blocks, suffix with its adapters, and head. Empty for rows without
    these parts, and for controls that stand on another row's network: they are no method.

    Args:
        backbone: the backbone.
        row: the row.
        length: tokens of a window.
    """
    source = row.source
    if row.kind == "text" or row.logits is not None or row.ngram is not None:
        return {}
    if not (source is None or isinstance(source, (Method, Identity, Embedding, MeanState))):
        return {}
    found = {}
    for steps in row.steps if isinstance(source, Method) else (NO_SAMPLING,):
        meter = Meter(backbone)
        split = 0 if source is None else source.split
        if isinstance(source, Identity):
            meter.prefix(split, batch=1, new=length)
        if isinstance(source, Method):
            for _ in range(row.nfe[str(steps)]):
                meter.denoiser(source.denoiser, batch=1, new=length)
        meter.suffix(split, batch=1, new=length, adapters=source.lora if isinstance(source, Method) else ())
        meter.head(length)
        found[str(steps)] = meter.total / length
    return found
