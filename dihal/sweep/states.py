"""Numbers of the states of one layer that the score does not use: each could predict as well as it does.

Resamples draw documents with replacement, like those of the score: a token counts as often as its document was
drawn. Neighbours, probe weights and eigenvectors stay those of all documents (first order; see
:mod:`dihal.geometry.intervals` for what that leaves out).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dihal.errors import UsageError
from dihal.geometry.intervals import document_sums, resampled_spectrum
from dihal.geometry.moments import spectrum, spectrum_and_basis
from dihal.geometry.neighbours import FLOOR, local_spread
from dihal.geometry.proxies import weighted_median

__all__ = [
    "Found",
    "Probe",
    "fit_probe",
    "intrinsic_dimension",
    "mean_cosine",
    "median_norm",
    "ratio_of_sums",
    "total_variance",
    "velocity_variance",
    "velocity_variance_of",
]

Points = Float[Tensor, "tokens dim"]
Documents = Int[Tensor, " tokens"]
Counts = Int[Tensor, "resamples documents"]
Found = tuple[float, Tensor | None]
"""A value and its resamples."""


def _weights(counts: Counts, device: torch.device) -> Float[Tensor, "resamples documents"]:
    return counts.to(device, torch.float64)


def ratio_of_sums(
    top: Float[Tensor, " tokens"], bottom: Float[Tensor, " tokens"], document: Documents, counts: Counts | None
) -> Found:
    """sum(top) / sum(bottom) over tokens, and that of each resample (NaN where it draws no such token)."""
    value = float(top.double().sum() / bottom.double().sum())
    if counts is None:
        return value, None
    sums = document_sums(torch.stack([top, bottom], 1).double(), document, counts.shape[1])
    drawn = _weights(counts, top.device) @ sums
    return value, torch.where(drawn[:, 1] != 0, drawn[:, 0] / drawn[:, 1], torch.nan)


def _about(value: float, pool: float, resampled: Tensor | None) -> Found:
    # The value is that of all tokens, resamples are those of the pool: their spread is put around the value.
    return value, None if resampled is None else resampled + (value - pool)


def median_norm(norms: Float[Tensor, " tokens"], document: Documents, counts: Counts | None) -> Found:
    """Median norm (mean of the two middle ones where even), with resamples."""
    value = float(weighted_median(norms.double(), torch.ones_like(document)))
    return value, None if counts is None else weighted_median(norms.double(), counts.to(norms.device)[:, document])


def mean_cosine(points: Points, document: Documents, counts: Counts | None, value: float) -> Found:
    """Mean cosine between two different tokens, with resamples.

    Args:
        points: states as they are (not centred).
        document: of each.
        counts: document multiplicities.
        value: the number reported (of all tokens; ``points`` are a pool of them).
    """
    if counts is None:
        return value, None
    unit = points.double() / points.double().norm(dim=1, keepdim=True).clamp_min(1e-300)
    sums = document_sums(unit, document, counts.shape[1])
    tokens = torch.bincount(document, minlength=counts.shape[1]).double()

    def pairs(weight: Tensor) -> Tensor:
        # Copies of one token are no pair: of c copies, c^2 cosines of 1 are taken out.
        same = weight.square() @ tokens
        return ((weight @ sums).square().sum(1) - same) / ((weight @ tokens).square() - same)

    whole = pairs(torch.ones(1, counts.shape[1], dtype=torch.float64, device=points.device))
    return _about(value, float(whole), pairs(_weights(counts, points.device)))


def total_variance(points: Points, document: Documents, counts: Counts | None, value: float) -> Found:
    """log tr(S), with resamples; arguments as for :func:`mean_cosine`, points centred."""
    if counts is None:
        return value, None
    square = points.double().square().sum(1, keepdim=True)
    columns = torch.cat([points.double(), square, torch.ones_like(square)], 1)
    sums = document_sums(columns, document, counts.shape[1])

    def log_trace(weight: Tensor) -> Tensor:
        total = weight @ sums
        mean = total[:, :-1] / total[:, -1:]
        return (mean[:, -1] - mean[:, :-1].square().sum(1)).log()

    whole = log_trace(torch.ones(1, counts.shape[1], dtype=torch.float64, device=points.device))
    return _about(value, float(whole), log_trace(_weights(counts, points.device)))


def intrinsic_dimension(
    points: Points, anchors: Int[Tensor, " anchors"], document: Documents, counts: Counts | None, *, discard: float
) -> Found:
    """Log of the TwoNN dimension: the ratio of the distances to the second and first neighbour is Pareto of that exponent.

    Facco et al. 2017 fit a line after leaving out the largest ratios; here the exponent is the maximum-likelihood one
    with those ratios censored at the largest that is kept. Anchors whose nearest neighbour is a copy are left out.

    Args:
        points: centred, (P, d).
        anchors: indices into them.
        document: of each point.
        counts: document multiplicities: an anchor counts as often as its document.
        discard: share censored, in [0, 1).
    """
    near = local_spread(points, anchors, 2)
    scale = float(points.double().square().mean())
    usable = near.nearest > FLOOR * scale
    if int(usable.sum()) < 2:
        return math.nan, None if counts is None else torch.full((len(counts),), torch.nan, dtype=torch.float64)
    log_ratio = 0.5 * (near.farthest[usable] / near.nearest[usable]).log()
    kept = max(1, math.ceil((1 - discard) * len(log_ratio)))
    censored = log_ratio.clamp_max(log_ratio.sort().values[kept - 1])
    observed = torch.zeros_like(censored).index_fill(0, log_ratio.argsort(stable=True)[:kept], 1.0)
    value, rows = ratio_of_sums(observed, censored, document[anchors[usable]], counts)
    return math.log(value), None if rows is None else rows.log()


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The linear probe from h^0 to the states of a layer."""

    residual: Points
    """What it leaves of each token, on documents it was not fitted on."""
    explained: Found
    """Share of the variance that it explains."""


def _fold(
    x: Float[Tensor, "tokens features"],
    y: Points,
    inside: Bool[Tensor, " tokens"],
    ridges: tuple[float, ...],
    variance: Float[Tensor, ""],
) -> list[Float[Tensor, "inside dim"]]:
    """What ridge regressions on the other tokens leave of those ``inside``, one per ridge."""
    mean_x, mean_y = x[~inside].mean(0), y[~inside].mean(0)
    fit_x, fit_y = x[~inside] - mean_x, y[~inside] - mean_y
    values, basis = torch.linalg.eigh(fit_x.mT @ fit_x / len(fit_x))
    moment = basis.mT @ (fit_x.mT @ fit_y) / len(fit_x)
    along = (x[inside] - mean_x) @ basis
    left = y[inside] - mean_y
    # Directions without variance have no weight, whatever the ridge.
    floor = 1e-12 * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    inverses = [torch.where(values > floor, 1 / (values + ridge * variance), 0.0) for ridge in ridges]
    return [left - along @ (inverse[:, None] * moment) for inverse in inverses]


def fit_probe(
    condition: Float[Tensor, "tokens features"],
    points: Points,
    document: Documents,
    counts: Counts | None,
    *,
    folds: int,
    ridges: tuple[float, ...],
) -> Probe:
    """Ridge regression with an intercept, cross-fitted by document.

    Args:
        condition: h^0 of the tokens.
        points: their states, centred.
        document: of each token; document d belongs to fold d mod ``folds`` (documents are in a random order).
        counts: document multiplicities.
        folds: parts; lowered to the number of documents.
        ridges: in units of the mean variance of a channel of the condition; the one that explains most counts (one
            number chosen for tokens x channels errors, so that held-out errors stay what they are called).

    Raises:
        UsageError: one document only, so nothing is held out.
    """
    documents = int(document.max()) + 1
    parts = min(folds, documents)
    if parts < 2:
        raise UsageError(
            "the linear probe is measured on documents it was not fitted on, and there is one document or "
            "predictors.probe_folds is below 2. Score more documents, or raise it."
        )
    x, y = condition.double(), points.double()
    variance = (x - x.mean(0)).square().mean()
    fold = document % parts
    residuals = [torch.empty_like(y) for _ in ridges]
    for part in range(parts):
        inside = fold == part
        if bool(inside.any()):
            for residual, left in zip(residuals, _fold(x, y, inside, ridges, variance), strict=True):
                residual[inside] = left
    residual = min(residuals, key=lambda left: float(left.square().sum()))
    left, rows = ratio_of_sums(residual.square().sum(1), y.square().sum(1), document, counts)
    return Probe(residual=residual.to(points.dtype), explained=(1 - left, None if rows is None else 1 - rows))


def velocity_variance_of(eigenvalues: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
    """(pi / 2) mean of sqrt(e): see ``viv`` in :data:`dihal.sweep.predictors.DIRECTIONS`.

    Per direction of variance e, Var(z | z_t) / t^2 = e / ((1 - t)^2 e + t^2); its integral over t in [0, 1] is
    pi sqrt(e) / 2 (put u = t / (1 - t)).
    """
    return (math.pi / 2) * eigenvalues.clamp_min(0).sqrt().mean(-1)


def velocity_variance(
    points: Points,
    document: Documents,
    counts: Counts | None,
    *,
    covariance: Float[Tensor, "dim dim"] | None = None,
    standardized: bool = False,
) -> Found:
    """Linear estimate of the velocity's irreducible variance, with resamples.

    Args:
        points: standardized states, centred; or what a probe leaves of them.
        document: of each.
        counts: document multiplicities.
        covariance: of all tokens, where the points are a pool of them; None: that of the points about zero.
        standardized: the points were divided by the deviations of the sample itself.
    """
    if covariance is None:
        wide = points.double()
        covariance = wide.mT @ wide / len(wide)
    if counts is None:
        return float(velocity_variance_of(spectrum(covariance))), None
    values, basis = spectrum_and_basis(covariance)
    rows = resampled_spectrum(points, document, counts, values, basis, standardized=standardized)
    return float(velocity_variance_of(values)), velocity_variance_of(rows)
