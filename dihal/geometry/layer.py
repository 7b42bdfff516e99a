"""From the statistics of one layer to its proxies, in each of the coordinates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dihal.config import ScoreConfig
from dihal.errors import UsageError
from dihal.geometry.intervals import resampled_curvature, resampled_spectrum
from dihal.geometry.krylov import largest_eigenvalues, spectra_with_sinks
from dihal.geometry.moments import correlation, spectrum, spectrum_and_basis
from dihal.geometry.neighbours import FLOOR, curvature, local_spread
from dihal.geometry.proxies import (
    effective_rank,
    global_stiffness,
    mean_pairwise_cosine,
    weighted_median,
)
from dihal.geometry.streaming import LayerStatistics, rms_scale

_WIDE = 2_048
"""Channels from which the comparison with sinks is approximate: each exact spectrum takes 0.1 s there on a GPU."""

__all__ = ["COORDINATES", "LayerNumbers", "Proxies", "Sampling", "assess_layer", "needs_spectrum"]


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
    make_points: Callable[[], Tensor]

    @property
    def points(self) -> Tensor:
        """Centred kept pool tokens, made when asked for: three kinds of coordinates would hold them three times."""
        return self.make_points()


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
        if not dropped.count:
            return None
        both = kept.merged(dropped).covariance
        return both.float() if both.shape[0] >= _WIDE else both


def _raw(frame: _Frame) -> _View:
    return _View(covariance=frame.covariance, with_sinks=frame.raw_with_sinks, make_points=lambda: frame.centred)


def _rms(frame: _Frame) -> _View:
    moments = frame.layer.kept["rms"]
    scale = rms_scale(frame.norms, frame.states.shape[1])
    return _View(
        covariance=moments.covariance,
        with_sinks=frame.with_sinks("rms"),
        make_points=lambda: torch.addcmul(-moments.mean.to(scale.dtype), frame.states, scale[:, None]),
    )


def _standardized(frame: _Frame) -> _View:
    corr, std = correlation(frame.covariance)
    both = frame.raw_with_sinks
    return _View(
        covariance=corr,
        with_sinks=None if both is None else correlation(both)[0],
        make_points=lambda: frame.centred / std.to(frame.centred.dtype),
    )


COORDINATES = {
    "raw": (_raw, "h as it is"),
    "rms": (_rms, "each token divided by its root mean square: h sqrt(d) / |h|, what the next block sees up to gains"),
    "standardized": (_standardized, "each channel centred and divided by its standard deviation over kept tokens"),
}
"""Name -> (view of a layer, definition)."""


@dataclass(frozen=True, kw_only=True)
class _Spectral:
    """What a covariance's eigenvalues say. ``values`` and ``basis`` where they were solved for."""

    stiffness: Tensor
    rank: Tensor
    largest: float
    mean: float
    values: Tensor | None = None
    basis: Tensor | None = None


def _summary(e: Tensor, config: ScoreConfig) -> tuple[Tensor, Tensor]:
    return global_stiffness(e, rho=config.rho, kind=config.stiffness), effective_rank(e, kind=config.rank)


def _solved(covariance: Tensor, config: ScoreConfig, *, basis: bool) -> _Spectral:
    values, vectors = spectrum_and_basis(covariance) if basis else (spectrum(covariance), None)
    stiffness, rank = _summary(values, config)
    return _Spectral(
        stiffness=stiffness,
        rank=rank,
        largest=float(values[0]),
        mean=float(values.mean()),
        values=values,
        basis=vectors,
    )


def needs_spectrum(config: ScoreConfig, counts: Tensor | None) -> bool:
    """Whether the definitions chosen need every eigenvalue. Trace, Frobenius norm and e_1 are had without."""
    return counts is not None or config.stiffness != "smallest_precision" or config.rank != "participation"


def _closed(covariances: list[Tensor], config: ScoreConfig) -> list[_Spectral]:
    """Stiffness from e_1 and the trace, participation ratio tr(S)^2 / |S|_F^2: no eigenproblem."""
    found = []
    for covariance, largest in zip(covariances, largest_eigenvalues(covariances)):
        trace = covariance.diagonal().sum().double().cpu()
        mean = trace / covariance.shape[0]
        square = torch.linalg.vector_norm(covariance).double().cpu().square()
        found.append(
            _Spectral(
                stiffness=-torch.log(largest + config.rho * mean),
                rank=2 * torch.log(trace) - torch.log(square),
                largest=float(largest),
                mean=float(mean),
            )
        )
    return found


def _with_sinks(known: list[_Spectral], covariances: list[Tensor], config: ScoreConfig) -> list[tuple[Tensor, Tensor]]:
    """Stiffness and rank of kept and dropped tokens together; for comparison only, so fp32 will do."""
    if known[0].values is None:
        return [(item.stiffness, item.rank) for item in _closed(covariances, config)]
    if covariances[0].shape[0] < _WIDE:
        return [_summary(spectrum(covariance.float()).double(), config) for covariance in covariances]
    values = [item.values for item in known if item.values is not None]
    return [_summary(e, config) for e in spectra_with_sinks(values, covariances)]


def _spectral(views: dict[str, _View], split: int, counts: Tensor | None, config: ScoreConfig) -> dict[str, _Spectral]:
    for name, view in views.items():
        # Before any eigenvalue is asked for: none of a matrix of zeros is anything.
        if not float(view.covariance.diagonal().sum()) > 0:
            raise UsageError(
                f"the kept states of split {split} do not vary ({name} coordinates), so they have no geometry. "
                "Score more varied text, or check the backbone's weights."
            )
    covariances = [view.covariance for view in views.values()]
    if needs_spectrum(config, counts):
        return {name: _solved(c, config, basis=counts is not None) for name, c in zip(views, covariances)}
    return dict(zip(views, _closed(covariances, config)))


def _proxies(
    view: _View,
    spectral: _Spectral,
    sinks: tuple[Tensor, Tensor],
    coordinates: str,
    document: Tensor,
    anchors: Tensor,
    counts: Tensor | None,
    config: ScoreConfig,
) -> Proxies:
    points = view.points
    local = local_spread(points, anchors, config.neighbours)
    bend = curvature(local.variance, spectral.mean)
    resampled = None
    if counts is not None and spectral.values is not None and spectral.basis is not None:
        spectra = resampled_spectrum(
            points,
            document,
            counts,
            spectral.values,
            spectral.basis,
            standardized=coordinates == "standardized",
        )
        bends = resampled_curvature(bend, local, anchors, document, counts)
        resampled = tuple(v.cpu() for v in (bends, *_summary(spectra, config)))
    return Proxies(
        curvature=float(weighted_median(bend, torch.ones_like(anchors))),
        stiffness=float(spectral.stiffness),
        rank=float(spectral.rank),
        stiffness_with_sinks=float(sinks[0]),
        rank_with_sinks=float(sinks[1]),
        largest_eigenvalue=spectral.largest,
        mean_eigenvalue=spectral.mean,
        anchors=len(anchors),
        floored=float((local.variance <= FLOOR * spectral.mean).double().mean()),
        duplicates=float((local.nearest <= FLOOR * spectral.mean).double().mean()),
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
    views = {name: COORDINATES[name][0](frame) for name in config.coordinates}
    spectral = _spectral(views, layer.split, sampling.counts, config)
    sinks = {name: (item.stiffness, item.rank) for name, item in spectral.items()}
    both = {name: view.with_sinks for name, view in views.items() if view.with_sinks is not None}
    if both:
        sinks |= zip(both, _with_sinks([spectral[name] for name in both], list(both.values()), config))
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
            name: _proxies(view, spectral[name], sinks[name], name, document, anchors, sampling.counts, config)
            for name, view in views.items()
        },
    )
