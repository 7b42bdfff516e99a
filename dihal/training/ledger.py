"""What a run spends beside its steps, and what its counters mean in text."""

from __future__ import annotations

from dihal.backbone import Backbone
from dihal.config.method import MethodConfig
from dihal.data.packing import PackedStream
from dihal.meter import Meter

__all__ = ["preparation", "unique_tokens"]


def unique_tokens(stream: PackedStream, samples: int) -> int:
    """Distinct tokens of the training text among the first ``samples`` sequences of a run.

    Exact to one window: an epoch takes every token once but for less than a window. Start tokens are no text.
    An upper bound where sequences are spliced from random places, which may meet a token twice within an epoch, and
    where the backbone's own text stands in for some (``data.own``).
    """
    return min(samples * stream.body, len(stream))


def preparation(
    config: MethodConfig, backbone: Backbone, *, length: int, normalisation: int, metric: int, processes: int
) -> dict[str, float]:
    """FLOPs of what is measured before training, by part.

    Args:
        config: the method; its split and metric.
        backbone: the backbone.
        length: tokens per sequence.
        normalisation: sequences from which the normalisation was measured; 0: it was loaded.
        metric: sequences from which the metric of the state error is measured, if it is.
        processes: every process measures by itself.
    """
    split, dim = config.split or 0, backbone.hidden_size
    meter = Meter(backbone)
    meter.prefix(split, batch=normalisation, new=length)
    if config.objective.metric == "fisher":
        meter.prefix(split, batch=metric, new=length)
        meter.suffix(split, batch=metric, new=length, backward=True)
        meter.head(metric * length, backward=True)
        meter.product(dim, dim, metric * length, part="metric")
    return {"preparation": processes * meter.total}
