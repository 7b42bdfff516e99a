"""Distances between sets of texts in a model's feature space: Frechet and MAUVE."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from dihal.errors import UsageError

__all__ = ["MAUVE_FEWEST", "MAUVE_MISSING", "frechet", "mauve_score"]

MAUVE_MISSING = "mauve-text is not installed: pip install 'dihal[mauve]'"
MAUVE_FEWEST = 100
"""Texts a side below which the library's clusters, a tenth of them, say nothing."""


def _moments(x: Float[np.ndarray, "samples channels"]) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0), np.cov(x, rowvar=False, ddof=1).reshape(x.shape[1], x.shape[1])


def frechet(
    found: Float[np.ndarray, "samples channels"], real: Float[np.ndarray, "others channels"], *, channels: int
) -> float:
    """Return the relative Frechet distance of two sets of features.

    |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) of the Gaussians fitted to both (Dowson & Landau 1982), in the leading
    principal directions of the real features, divided by tr S' there: 0 where the Gaussians agree, 1 for a set that
    shrinks to the real mean. With n samples it is biased upwards by about channels / n: compare equal n only.

    Args:
        found: features of the generated texts.
        real: features of the real texts.
        channels: directions at most; fewer where there are fewer real texts or features.

    Raises:
        UsageError: fewer than two texts on a side.
    """
    if min(len(found), len(real)) < 2:
        raise UsageError(f"a Frechet distance needs two texts a side, got {len(found)} and {len(real)}.")
    centre = real.mean(0)
    _, _, directions = np.linalg.svd(real - centre, full_matrices=False)
    kept = directions[: min(channels, len(real) - 1, real.shape[1])].T
    (mean, spread), (other, target) = _moments((found - centre) @ kept), _moments((real - centre) @ kept)
    values, vectors = np.linalg.eigh(target)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ spread @ root), 0, None)).sum()
    distance = ((mean - other) ** 2).sum() + np.trace(spread) + np.trace(target) - 2 * cross
    return float(max(distance, 0.0) / np.trace(target))


def mauve_score(
    found: Float[np.ndarray, "samples channels"], real: Float[np.ndarray, "others channels"], *, seed: int
) -> float | None:
    """Return MAUVE (Pillutla et al. 2021) of two sets of features, in (0, 1]; None where the library is missing.

    The library's own defaults: clusters for a tenth of the texts (k-means after PCA), scaling 5, 25 divergences.
    """
    try:
        import mauve
    except ImportError:
        return None
    result = mauve.compute_mauve(
        p_features=np.ascontiguousarray(real, dtype=np.float32),
        q_features=np.ascontiguousarray(found, dtype=np.float32),
        seed=seed,
        verbose=False,
    )
    return float(result.mauve)
