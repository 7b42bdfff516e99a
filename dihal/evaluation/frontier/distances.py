"""Distances between sets of texts in a model's feature space: Frechet and MAUVE."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from jaxtyping import Float

from dihal.errors import UsageError

__all__ = ["MAUVE_FEWEST", "MAUVE_MISSING", "RealFeatures", "mauve_score"]

MAUVE_MISSING = "mauve-text is not installed: pip install 'dihal[mauve]'"
MAUVE_FEWEST = 100
"""Texts a side below which the library's clusters, a tenth of them, say nothing."""


def _moments(x: Float[np.ndarray, "samples channels"]) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0), np.cov(x, rowvar=False, ddof=1).reshape(x.shape[1], x.shape[1])


def _directions(x: Float[np.ndarray, "samples channels"], count: int) -> Float[np.ndarray, "channels count"]:
    # From the smaller of the two matrices of products: a full SVD takes seconds, and every point of a frontier asks.
    samples, channels = x.shape
    size = min(samples, channels)
    _, found = scipy.linalg.eigh(x.T @ x if size == channels else x @ x.T, subset_by_index=(size - count, size - 1))
    return found if size == channels else np.linalg.qr(x.T @ found)[0]


class RealFeatures:
    """Features of the real texts as a Frechet distance needs them, worked out once for all sets that are compared.

    Args:
        real: one row per text.
        channels: directions at most; fewer where there are fewer texts or features.

    Raises:
        UsageError: fewer than two texts.
    """

    def __init__(self, real: Float[np.ndarray, "samples channels"], *, channels: int) -> None:
        if len(real) < 2:
            raise UsageError(f"a Frechet distance needs two texts a side, got {len(real)} real ones.")
        real = real.astype(np.float64)
        self._centre = real.mean(0)
        self._kept = _directions(real - self._centre, min(channels, len(real) - 1, real.shape[1]))
        self._mean, self._spread = _moments((real - self._centre) @ self._kept)
        values, vectors = np.linalg.eigh(self._spread)
        self._root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T

    def distance(self, found: Float[np.ndarray, "others channels"]) -> float:
        """Return the relative Frechet distance of generated texts' features.

        |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) of the Gaussians fitted to both (Dowson & Landau 1982), in the leading
        principal directions of the real features, divided by tr S' there: 0 where the Gaussians agree, 1 for a set that
        shrinks to the real mean. With n samples it is biased upwards by about channels / n: compare equal n only.

        Raises:
            UsageError: fewer than two texts.
        """
        if len(found) < 2:
            raise UsageError(f"a Frechet distance needs two texts a side, got {len(found)} generated ones.")
        mean, spread = _moments((found.astype(np.float64) - self._centre) @ self._kept)
        cross = np.sqrt(np.clip(np.linalg.eigvalsh(self._root @ spread @ self._root), 0, None)).sum()
        distance = ((mean - self._mean) ** 2).sum() + np.trace(spread) + np.trace(self._spread) - 2 * cross
        return float(max(distance, 0.0) / np.trace(self._spread))


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
