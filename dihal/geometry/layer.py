"""From the statistics of one layer to its proxies, in each of the coordinates."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dihal.config import ScoreConfig
from dihal.errors import UsageError
from dihal.geometry.intervals import resampled_curvature, resampled_spectrum
from dihal.geometry.moments import correlation, spectrum, spectrum_and_basis
from dihal.geometry.neighbours import FLOOR, curvature, local_spread
from dihal.geometry.proxies import (
    effective_rank,
    global_stiffness,
    mean_pairwise_cosine,
    weighted_median,
)
from dihal.geometry.streaming import LayerStatistics, rms_scale

__all__ = ["COORDINATES", "LayerNumbers", "Proxies", "Sampling", "assess_layer"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What was drawn before the pass."""

    pool_document: Int[Tensor, "pool"]
    """Document of each pool token."""
    anchor_preference: Int[Tensor, "pool"]
    """Pool tokens in the order in which they are taken as anchors."""
    counts: Int[Tensor, "resamples documents"] | None
    """Document multiplicities of the bootstrap; None: no intervals."""


@dataclass(frozen=True, kw_only=True)
class Proxies:
    """One layer in one kind of coordinates. Units: nats, except where said."""

    curvature: float
    stiffness: float
    rank: float
    stiffness_with_sinks: float
    rank_with_sinks: float
    largest_eigenvalue: float
    """e_1, in squared units of the states."""
    mean_eigenvalue: float
    """mu = tr(S) / d, in squared units of the states."""
    anchors: int
    """Anchors used."""
    floored: float
    """Share of anchors whose neighbourhood has no more variance than the floor."""
    duplicates: float
    """Share of anchors whose nearest neighbour is a copy (squared distance below the floor)."""
    resampled: tuple[Float[Tensor, "resamples"], ...] | None
    """Curvature, stiffness and rank of each resample."""


@dataclass(frozen=True, kw_only=True)
class LayerNumbers:
    """One layer: counts, rival predictors, proxies by coordinates."""

    kept: int
    dropped_first: int
    dropped_norm: int
    norm_threshold: float
    pilot_median_norm: float
    median_norm: float
    """Median norm of the kept pool tokens."""
    mean_cosine: float
    """Mean cosine between two different kept tokens."""
    log_trace: float
    """log tr(S) of the kept tokens, raw coordinates."""
    proxies: dict[str, Proxies]


@dataclass(frozen=True, kw_only=True)
class _View:
    """A layer in one kind of coordinates."""

    covariance: Tensor
    with_sinks: Tensor | None
    """Covariance of kept and dropped tokens together; None: nothing was dropped."""
    points: Tensor
    """Centred kept pool tokens."""


class _Frame:
    """What the coordinates of one layer have in common, made once."""

    def __init__(self, layer: LayerStatistics) -> None:
        self.layer = layer
        self.kept = layer.pool_kept
        whole = bool(self.kept.all())
        self.norms = layer.pool_norms if whole else layer.pool_norms[self.kept]
        self.states = (layer.pool if whole else layer.pool[self.kept]).to(self.norms.dtype)
        self.covariance = layer.kept["raw"].covariance

    @functools.cached_property
    def centred(self) -> Tensor:
        return self.states - self.layer.kept["raw"].mean.to(self.states.dtype)

    @functools.cached_property
    def raw_with_sinks(self) -> Tensor | None:
        return self.with_sinks("raw")

    def with_sinks(self, coordinates: str) -> Tensor | None:
        kept, dropped = self.layer.kept[coordinates], self.layer.dropped[coordinates]
        return kept.merged(dropped).covariance if dropped.count else None


def _raw(frame: _Frame) -> _View:
    return _View(covariance=frame.covariance, with_sinks=frame.raw_with_sinks, points=frame.centred)


def _rms(frame: _Frame) -> _View:
    moments = frame.layer.kept["rms"]
    scale = rms_scale(frame.norms, frame.states.shape[1])
    return _View(
        covariance=moments.covariance,
        with_sinks=frame.with_sinks("rms"),
        points=torch.addcmul(-moments.mean.to(scale.dtype), frame.states, scale[:, None]),
    )


def _standardized(frame: _Frame) -> _View:
    corr, std = correlation(frame.covariance)
    both = frame.raw_with_sinks
    return _View(
        covariance=corr,
        with_sinks=None if both is None else correlation(both)[0],
        points=frame.centred / std.to(frame.centred.dtype),
    )


COORDINATES = {
    "raw": (_raw, "h as it is"),
    "rms": (_rms, "each token divided by its root mean square: h sqrt(d) / |h|, what the next block sees up to gains"),
    "standardized": (_standardized, "each channel centred and divided by its standard deviation over kept tokens"),
}
"""Name -> (view of a layer, definition)."""


def _proxies(
    view: _View,
    split: int,
    coordinates: str,
    document: Tensor,
    anchors: Tensor,
    counts: Tensor | None,
    config: ScoreConfig,
) -> Proxies:
    if counts is None:
        values, basis = spectrum(view.covariance), None
    else:
        values, basis = spectrum_and_basis(view.covariance)
    mean_eigenvalue = float(values.mean())
    if not mean_eigenvalue > 0:
        raise UsageError(
            f"the kept states of split {split} do not vary ({coordinates} coordinates), so they have no geometry. "
            "Score more varied text, or check the backbone's weights."
        )
    points = view.points
    local = local_spread(points, anchors, config.neighbours)
    bend = curvature(local.variance, mean_eigenvalue)

    def summary(e: Tensor) -> tuple[Tensor, Tensor]:
        return global_stiffness(e, rho=config.rho, kind=config.stiffness), effective_rank(e, kind=config.rank)

    stiffness, rank = summary(values)
    # For comparison only, so fp32 will do (eigenvalues good to 1e-6 of the largest): a third cheaper.
    sinks = (stiffness, rank) if view.with_sinks is None else summary(spectrum(view.with_sinks.float()).double())
    resampled = None
    if counts is not None and basis is not None:
        spectra = resampled_spectrum(
            points, document, counts, values, basis, standardized=coordinates == "standardized"
        )
        bends = resampled_curvature(bend, local, anchors, document, counts)
        resampled = tuple(v.cpu() for v in (bends, *summary(spectra)))
    return Proxies(
        curvature=float(weighted_median(bend, torch.ones_like(anchors))),
        stiffness=float(stiffness),
        rank=float(rank),
        stiffness_with_sinks=float(sinks[0]),
        rank_with_sinks=float(sinks[1]),
        largest_eigenvalue=float(values[0]),
        mean_eigenvalue=mean_eigenvalue,
        anchors=len(anchors),
        floored=float((local.variance <= FLOOR * mean_eigenvalue).double().mean()),
        duplicates=float((local.nearest <= FLOOR * mean_eigenvalue).double().mean()),
        resampled=resampled,
    )


def assess_layer(layer: LayerStatistics, sampling: Sampling, config: ScoreConfig) -> LayerNumbers:
    """Compute every number of one layer.

    Raises:
        UsageError: too few kept tokens for the neighbours; states that do not vary.
    """
    kept = layer.pool_kept
    if int(kept.sum()) <= config.neighbours:
        raise UsageError(
            f"split {layer.split} keeps {int(kept.sum())} pool tokens, {config.neighbours} neighbours need at least "
            f"{config.neighbours + 1}. Score more text, lower `neighbours`, or raise `norm_factor`."
        )
    place = kept.cumsum(0) - 1
    preferred = sampling.anchor_preference.to(kept.device)
    anchors = place[preferred[kept[preferred]][: config.anchors]]
    document = sampling.pool_document.to(kept.device)[kept]
    frame = _Frame(layer)
    moments = layer.kept["rms"]
    unit = moments.mean * moments.count / moments.mean.shape[0] ** 0.5
    return LayerNumbers(
        kept=layer.kept["raw"].count,
        dropped_first=layer.dropped_first,
        dropped_norm=layer.dropped_norm,
        norm_threshold=layer.threshold,
        pilot_median_norm=layer.pilot_median,
        median_norm=float(layer.pool_norms[kept].median()),
        mean_cosine=mean_pairwise_cosine(float(unit.square().sum()), moments.count),
        log_trace=float(frame.covariance.trace().clamp_min(1e-300).log()),
        proxies={
            name: _proxies(COORDINATES[name][0](frame), layer.split, name, document, anchors, sampling.counts, config)
            for name in config.coordinates
        },
    )
