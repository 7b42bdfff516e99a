"""From the statistics of one layer to its proxies, in each of the coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dihal.config import ScoreConfig
from dihal.errors import UsageError
from dihal.geometry.intervals import resampled_curvature, resampled_spectrum
from dihal.geometry.krylov import largest_eigenvalues, spectra_with_sinks
from dihal.geometry.moments import spectrum, spectrum_and_basis
from dihal.geometry.neighbours import FLOOR, curvature, local_spread
from dihal.geometry.proxies import (
    effective_rank,
    global_stiffness,
    mean_pairwise_cosine,
)
from dihal.geometry.statistics import LayerStatistics
from dihal.geometry.views import COORDINATES, WIDE, Frame, View
from dihal.geometry.wide import extremes, log_rank, rank_with_sinks

__all__ = ["LayerNumbers", "Proxies", "Sampling", "assess_layer", "needs_spectrum"]


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
    """e_1, in squared units of the states; to 1e-4 of itself where no spectrum is asked for and channels are many."""
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


def is_lean(dim: int, counts: Tensor | None, config: ScoreConfig) -> bool:
    """Whether spectra are too wide to be solved for, and the definitions chosen are had without."""
    return dim >= WIDE and counts is None and config.stiffness == "smallest_precision"


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
    if covariances[0].shape[0] < WIDE:
        return [_summary(spectrum(covariance.float()).double(), config) for covariance in covariances]
    values = [item.values for item in known if item.values is not None]
    return [_summary(e, config) for e in spectra_with_sinks(values, covariances)]


_ENOUGH = (5e-5, 5e-4)
"""Relative error of a wide layer's e_1, so its stiffness' error in nats, where no spectrum is asked for: without sinks, and with
them, which is for comparison. The entropy's poles follow from e_1 and the largest values: there it is 1e-6."""


def _stiffness(largest: float, mean: float, config: ScoreConfig) -> Tensor:
    return -torch.log(torch.tensor(largest + config.rho * mean, dtype=torch.float64))


def _wide(views: list[View], config: ScoreConfig) -> tuple[list[_Spectral], list[tuple[Tensor, Tensor]]]:
    """Of each view, what its covariance says, and stiffness and rank with sinks; nothing is solved for."""
    dim = views[0].covariance.shape[0]
    enough, compared = _ENOUGH if config.rank == "participation" else (None, None)
    known = extremes([view.covariance for view in views], error=enough)
    spectral = [
        _Spectral(
            stiffness=_stiffness(known.largest[i], known.traces[i] / dim, config),
            rank=log_rank(view.covariance, known, i, config),
            largest=known.largest[i],
            mean=known.traces[i] / dim,
        )
        for i, view in enumerate(views)
    ]
    covariances = [view.with_sinks for view in views if view.with_sinks is not None]
    if not covariances:
        return spectral, [(item.stiffness, item.rank) for item in spectral]
    # Something was dropped in all coordinates or in none: the views of both lists correspond.
    both = extremes(covariances, known.found, error=compared)
    sinks = [
        (
            _stiffness(both.largest[i], both.traces[i] / dim, config),
            rank_with_sinks(spectral[i].rank, known, both, i, covariance, config),
        )
        for i, covariance in enumerate(covariances)
    ]
    return spectral, sinks


def _check_variation(views: dict[str, View], split: int) -> None:
    # Before any eigenvalue is asked for: none of a matrix of zeros is anything.
    traces = torch.stack([view.covariance.diagonal().sum() for view in views.values()]).tolist()
    for name, trace in zip(views, traces):
        if not trace > 0:
            raise UsageError(
                f"the kept states of split {split} do not vary ({name} coordinates), so they have no geometry. "
                "Score more varied text, or check the backbone's weights."
            )


def _spectral(
    views: dict[str, View], counts: Tensor | None, config: ScoreConfig
) -> tuple[list[_Spectral], list[tuple[Tensor, Tensor]]]:
    """Of each view, what its covariance says, and stiffness and rank of kept and dropped tokens together."""
    if is_lean(views[next(iter(views))].covariance.shape[0], counts, config):
        return _wide(list(views.values()), config)
    covariances = [view.covariance for view in views.values()]
    if needs_spectrum(config, counts):
        spectral = [_solved(covariance, config, basis=counts is not None) for covariance in covariances]
    else:
        spectral = _closed(covariances, config)
    both = [view.with_sinks for view in views.values() if view.with_sinks is not None]
    return spectral, _with_sinks(spectral, both, config) if both else [(s.stiffness, s.rank) for s in spectral]


def _fetched(numbers: dict[str, Tensor]) -> dict[str, float]:
    """Numbers on the host, those of a GPU in one transfer: each is a wait for everything before it."""
    there = {name: value.double() for name, value in numbers.items() if value.device.type != "cpu"}
    found = dict(zip(there, torch.stack(list(there.values())).tolist())) if there else {}
    return {name: found[name] if name in found else float(value) for name, value in numbers.items()}


def _median(values: Tensor) -> Tensor:
    """The mean of the two middle ones where their number is even: `weighted_median` of equal weights, without cumulative sums."""
    ascending, last = values.sort().values, len(values) - 1
    return (ascending[last // 2] + ascending[(last + 1) // 2]) / 2


@dataclass(frozen=True, kw_only=True)
class _Local:
    """The neighbourhoods of one view: numbers still on the device."""

    curvature: Tensor
    floored: Tensor
    duplicates: Tensor
    resampled: tuple[Tensor, ...] | None


def _local(
    view: View,
    spectral: _Spectral,
    coordinates: str,
    anchors: Tensor,
    sampling: Sampling,
    rows: Tensor | None,
    config: ScoreConfig,
) -> _Local:
    points = view.points
    local = local_spread(points, anchors, config.neighbours)
    bend = curvature(local.variance, spectral.mean)
    resampled = None
    counts = sampling.counts
    if counts is not None and spectral.values is not None and spectral.basis is not None:
        document = sampling.pool_document.to(points.device)
        document = document if rows is None else document[rows]
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
    floor = FLOOR * spectral.mean
    return _Local(
        curvature=_median(bend),
        floored=(local.variance <= floor).double().mean(),
        duplicates=(local.nearest <= floor).double().mean(),
        resampled=resampled,
    )


def _anchors(kept: Tensor, rows: Tensor | None, sampling: Sampling, config: ScoreConfig) -> Tensor:
    """Places of the anchors among the kept pool tokens."""
    preferred = sampling.anchor_preference.to(kept.device)
    if rows is None:
        return preferred[: config.anchors]
    return (kept.cumsum(0) - 1)[preferred[kept[preferred]][: config.anchors]]


def assess_layer(layer: LayerStatistics, sampling: Sampling, config: ScoreConfig) -> LayerNumbers:
    """Compute every number of one layer.

    Raises:
        UsageError: too few kept tokens for the neighbours; states that do not vary.
    """
    kept = layer.pool_kept
    count = int(kept.sum())
    if count <= config.neighbours:
        raise UsageError(
            f"split {layer.split} keeps {count} pool tokens, {config.neighbours} neighbours need at least "
            f"{config.neighbours + 1}. Score more text, lower `neighbours`, or raise `norm_factor`."
        )
    rows = None if count == len(kept) else kept.nonzero().squeeze(1)
    anchors = _anchors(kept, rows, sampling, config)
    dim = layer.pool.shape[1]
    frame = Frame(layer, rows, lean=is_lean(dim, sampling.counts, config))
    views = {name: COORDINATES[name][0](frame) for name in config.coordinates}
    _check_variation(views, layer.split)
    moments = layer.kept["rms"]
    unit = moments.mean * moments.count / dim**0.5
    numbers = {
        "norm": frame.norms.median(),
        "unit": unit.square().sum(),
        "log trace": frame.variance.sum().clamp_min(1e-300).log(),
    }
    known, sinks = _spectral(views, sampling.counts, config)
    spectral, local = dict(zip(views, known)), {}
    for (name, item), pair in zip(spectral.items(), sinks):
        local[name] = _local(views[name], item, name, anchors, sampling, rows, config)
        found = {"curvature": local[name].curvature, "stiffness": item.stiffness, "rank": item.rank}
        found |= {"floored": local[name].floored, "duplicates": local[name].duplicates}
        found |= {"stiffness with sinks": pair[0], "rank with sinks": pair[1]}
        numbers |= {f"{name} {key}": value for key, value in found.items()}
    value = _fetched(numbers)
    _solve_failed(value, views, config)
    return LayerNumbers(
        kept=layer.kept["raw"].count,
        dropped_first=layer.dropped_first,
        dropped_norm=layer.dropped_norm,
        norm_threshold=layer.threshold,
        pilot_median_norm=layer.pilot_median,
        median_norm=value["norm"],
        mean_cosine=mean_pairwise_cosine(value["unit"], moments.count),
        log_trace=value["log trace"],
        proxies={
            name: Proxies(
                curvature=value[f"{name} curvature"],
                stiffness=value[f"{name} stiffness"],
                rank=value[f"{name} rank"],
                stiffness_with_sinks=value[f"{name} stiffness with sinks"],
                rank_with_sinks=value[f"{name} rank with sinks"],
                largest_eigenvalue=item.largest,
                mean_eigenvalue=item.mean,
                anchors=len(anchors),
                floored=value[f"{name} floored"],
                duplicates=value[f"{name} duplicates"],
                resampled=local[name].resampled,
            )
            for name, item in spectral.items()
        },
    )


def _solve_failed(value: dict[str, float], views: dict[str, View], config: ScoreConfig) -> None:
    """Ranks for which a factorisation failed (a covariance that rounding made indefinite) are solved for."""
    for name, view in views.items():
        for rank, covariance in ((f"{name} rank", view.covariance), (f"{name} rank with sinks", view.with_sinks)):
            if math.isnan(value[rank]):
                e = spectrum((view.covariance if covariance is None else covariance).double())
                value[rank] = float(effective_rank(e, kind=config.rank))
