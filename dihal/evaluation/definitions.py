"""The metrics, said once: name, label, unit, direction, and the per-document sums they are ratios of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from dihal.errors import unknown_name

__all__ = ["METRICS", "METRIC_VERSION", "SUMS", "TEXT_METRICS", "Metric", "direction", "ratio"]

METRIC_VERSION = "1"
"""Raised whenever a definition below, the sink policy or the windows change: unlike versions are never ranked together."""

SUMS = (
    "tokens",
    "bytes",
    "kl",
    "nll",
    "agreement",
    "margin",
    "state_tokens",
    "state_squared_error",
    "state_variance",
    "state_cosine",
    "sink_tokens",
    "sink_squared_error",
    "sink_energy",
)
"""Sums kept for every document. ``tokens`` counts predicted tokens, ``bytes`` the UTF-8 bytes of their text."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A ratio of sums: ``offset + scale * sum(numerator) / sum(denominator)`` over documents."""

    label: str
    unit: str
    lower_is_better: bool
    definition: str
    numerator: str
    denominator: str
    scale: float = 1.0
    offset: float = 0.0


METRICS: dict[str, Metric] = {
    "kl": Metric(
        label="KL",
        unit="nats",
        lower_is_better=True,
        definition="KL(backbone || row) of the next-token distribution, mean over predicted tokens.",
        numerator="kl",
        denominator="tokens",
    ),
    "nll": Metric(
        label="NLL",
        unit="nats/token",
        lower_is_better=True,
        definition="Negative log-likelihood of the next token, mean over predicted tokens.",
        numerator="nll",
        denominator="tokens",
    ),
    "bits_per_byte": Metric(
        label="bits/byte",
        unit="bits",
        lower_is_better=True,
        definition="Negative log-likelihood in bits over the UTF-8 bytes of the predicted text.",
        numerator="nll",
        denominator="bytes",
        scale=1.0 / math.log(2.0),
    ),
    "agreement": Metric(
        label="top-1",
        unit="share",
        lower_is_better=False,
        definition="Share of predicted tokens where the row's most likely token is the backbone's.",
        numerator="agreement",
        denominator="tokens",
    ),
    "margin": Metric(
        label="margin",
        unit="nats",
        lower_is_better=False,
        definition="log q(a) - max over w != a of log q(w), with a the backbone's most likely token and q the row; "
        "negative where the row prefers another token.",
        numerator="margin",
        denominator="tokens",
    ),
    "state_error": Metric(
        label="state error",
        unit="share",
        lower_is_better=True,
        definition="Sum of |h_hat - h|^2 over sum of |h - mean|^2 at the split, over tokens that are not sinks; "
        "mean is that of the same tokens.",
        numerator="state_squared_error",
        denominator="state_variance",
    ),
    "explained_variance": Metric(
        label="expl. var.",
        unit="share",
        lower_is_better=False,
        definition="1 - state error.",
        numerator="state_squared_error",
        denominator="state_variance",
        scale=-1.0,
        offset=1.0,
    ),
    "cosine": Metric(
        label="cosine",
        unit="",
        lower_is_better=False,
        definition="Cosine between h_hat and h, mean over tokens that are not sinks.",
        numerator="state_cosine",
        denominator="state_tokens",
    ),
    "sink_error": Metric(
        label="sink error",
        unit="share",
        lower_is_better=True,
        definition="Sum of |h_hat - h|^2 over sum of |h|^2, over sink tokens (position 0 and norm outliers).",
        numerator="sink_squared_error",
        denominator="sink_energy",
    ),
}
"""Teacher-forced metrics; a row without a state has null for the last four."""

TEXT_METRICS: dict[str, bool] = {
    "generative_nll": True,
    "generative_perplexity": True,
    "entropy": False,
    "degenerate_rate": True,
    "tokens_per_second": False,
}
"""Metrics of generated text that may sort a leaderboard -> whether lower is better. None of them means anything
alone: low perplexity at low entropy is repetition."""


def direction(name: str) -> bool:
    """Return True where lower values of the metric are better.

    Raises:
        UsageError: no metric of that name.
    """
    if name in METRICS:
        return METRICS[name].lower_is_better
    if name in TEXT_METRICS:
        return TEXT_METRICS[name]
    raise unknown_name("metric", name, [*METRICS, *TEXT_METRICS], hint="Set `sort_by` to one of these.")


def ratio(
    metric: Metric,
    sums: Mapping[str, Float[np.ndarray, " documents"]],
    weights: Float[np.ndarray, "resamples documents"] | None = None,
) -> Float[np.ndarray, " resamples"]:
    """Return the metric as a ratio of (weighted) sums over documents: one number per resample, NaN where undefined.

    Args:
        metric: which.
        sums: per-document sums by name (see :data:`SUMS`).
        weights: how often each resample drew each document; None: once each (one number).
    """
    top, bottom = sums[metric.numerator], sums[metric.denominator]
    rows = np.ones((1, len(top))) if weights is None else weights
    total = rows @ bottom
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total > 0, metric.offset + metric.scale * (rows @ top) / total, np.nan)
