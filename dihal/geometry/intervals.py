"""Document bootstrap of the proxies without computing them again: first-order perturbation.

A resample draws the documents with replacement; a token of a document drawn c times counts c times.

*Spectrum.* With S = U diag(e) U^T the covariance of all tokens, and S_b that of a resample, the
eigenvalues of S_b are u_i^T S_b u_i to first order in S_b - S. Those numbers need only each
document's means of (u_i^T x)^2 and u_i^T x, so that all resamples are one matrix product over
documents. They are used as a ratio to the same quantity of the pool as a whole, times e_i: so the
interval is centred on the reported value when the pool is a sample of the tokens. In standardized
coordinates the resample's own standard deviations enter to first order as well: with delta the
relative change of the channel variances, e_i is divided by 1 + sum_c U_ci^2 delta_c.

*Curvature.* Anchors are weighted by their document's multiplicity (the resampled statistic is a
weighted median), and each anchor's log variance moves with the multiplicities of its neighbours'
documents, to first order (:func:`dihal.geometry.neighbours._influence`). Tokens of the anchor's own
document are left out of that shift: drawing a document twice must not make its tokens their own
near neighbours. With the neighbour graph simply held fixed, intervals come out at about 2/3 of the
true width where documents differ.

Limits. First order ignores rotations of the eigenvectors: the resampled largest eigenvalue is a
little low and the resampled effective rank a little high against a full re-computation, whose own
downward bias (fewer distinct documents, fewer directions) is thereby left out of the interval;
widths agree (tests: within 25 %). The standardisation inside the neighbourhoods and the sink
threshold are not resampled. With few documents (below about 20) a percentile interval is too
narrow, as any bootstrap is. Where the pool is smaller than the text, documents are represented by
their pool tokens, which widens intervals slightly.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dihal.geometry.neighbours import LocalSpread
from dihal.geometry.proxies import weighted_median
from dihal.random import uniform

__all__ = [
    "document_sums",
    "percentile_interval",
    "resample_documents",
    "resampled_curvature",
    "resampled_spectrum",
]


def resample_documents(documents: int, resamples: int, seed: int) -> Int[Tensor, "resamples documents"]:
    """How often each resample draws each document; every row sums to ``documents``."""
    draws = uniform(seed, torch.arange(resamples), "geometry-bootstrap", (documents,), dtype=torch.float64)
    chosen = (draws * documents).long().clamp_max(documents - 1)
    counts = torch.zeros(resamples, documents, dtype=torch.int64)
    return counts.scatter_add_(1, chosen, torch.ones_like(chosen))


def document_sums(
    x: Float[Tensor, "tokens dim"], document: Int[Tensor, "tokens"], documents: int
) -> Float[Tensor, "documents dim"]:
    """Sum of the token vectors of each document, in the precision of ``x``."""
    return x.new_zeros(documents, x.shape[1]).index_add_(0, document, x)


def _variances(weights: Tensor, tokens: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel variance of each resample, and of all documents together, from sums per document."""
    first, second = first.double(), second.double()
    count = weights @ tokens
    # A resample without a single pool token has no variance: NaN, excluded later.
    mean = (weights @ first) / count[:, None]
    resampled = (weights @ second) / count[:, None] - mean.square()
    total = tokens.sum()
    whole = second.sum(0) / total - (first.sum(0) / total).square()
    return resampled, whole


def resampled_spectrum(
    points: Float[Tensor, "tokens dim"],
    document: Int[Tensor, "tokens"],
    counts: Int[Tensor, "resamples documents"],
    eigenvalues: Float[Tensor, "dim"],
    basis: Float[Tensor, "dim dim"],
    *,
    standardized: bool = False,
) -> Float[Tensor, "resamples dim"]:
    """Eigenvalues of the covariance of each resample, to first order (see the module).

    Args:
        points: pool states in the coordinates of the covariance, centred on its mean.
        document: document of each.
        counts: from :func:`resample_documents`.
        eigenvalues: of the covariance of all tokens.
        basis: its eigenvectors, in columns.
        standardized: coordinates are standardized by the sample's own deviations.
    """
    documents = counts.shape[1]
    weights = counts.to(points.device, torch.float64)
    tokens = torch.bincount(document, minlength=documents).to(points.device, torch.float64)
    along = points @ basis.to(points.dtype)
    sums = (document_sums(along, document, documents), document_sums(along.square_(), document, documents))
    resampled, whole = _variances(weights, tokens, *sums)
    spectrum = eigenvalues * (resampled / whole.clamp_min(torch.finfo(points.dtype).tiny))
    if standardized:
        sums = (document_sums(points, document, documents), document_sums(points.square(), document, documents))
        resampled, whole = _variances(weights, tokens, *sums)
        change = torch.where(whole > 0, resampled / whole - 1, 0.0)
        spectrum = spectrum / (1 + change @ basis.square())
    return spectrum.clamp_min(0)


def resampled_curvature(
    bend: Float[Tensor, "anchors"],
    local: LocalSpread,
    anchors: Int[Tensor, "anchors"],
    document: Int[Tensor, "tokens"],
    counts: Int[Tensor, "resamples documents"],
) -> Float[Tensor, "resamples"]:
    """Median curvature of each resample, to first order (see the module).

    Args:
        bend: curvature at each anchor.
        local: the neighbourhoods.
        anchors: pool index of each anchor.
        document: document of each pool token.
        counts: from :func:`resample_documents`.
    """
    counts = counts.to(bend.device)
    own = document[anchors]
    other = document[local.neighbours]
    influence = local.influence * (other != own[:, None])
    by_document = influence.new_zeros(len(anchors), counts.shape[1]).scatter_add_(1, other, influence).float()
    shift = (counts - 1).float() @ by_document.mT
    return weighted_median(bend.float() - shift, counts[:, own])


def percentile_interval(samples: Float[Tensor, "resamples *rest"], confidence: float) -> Float[Tensor, "2 *rest"]:
    """Percentile interval over the resamples; NaN resamples are left out."""
    tail = (1 - confidence) / 2
    levels = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    return torch.nanquantile(samples.double(), levels, dim=0)
