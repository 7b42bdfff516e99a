"""The formulas in words, with the options in force: stored in every report."""

from __future__ import annotations

from dihal.config import ScoreConfig
from dihal.geometry.neighbours import FLOOR
from dihal.geometry.proxies import RANKS, STIFFNESSES
from dihal.geometry.views import COORDINATES, WIDE
from dihal.geometry.windows import PILOT_TOKENS

__all__ = ["definitions"]


def definitions(config: ScoreConfig) -> dict[str, str]:
    """Text of each definition."""
    return {
        "state": "h^l: residual stream entering block l; S: covariance (divisor N) of its kept tokens; e: eigenvalues of S, descending; mu = tr(S) / d",
        "curvature": (
            f"kappa = median over {config.anchors} anchors of -log(tr(Cov of the {config.neighbours} nearest neighbours) / d), "
            f"divisor k - 1, neighbours exact within a uniform pool of at most {config.pool} tokens, the anchor excluded; "
            f"the local variance is floored at {FLOOR:g} mu, so copies of one state give a finite value that still moves with scale"
        ),
        "stiffness": f"s = {STIFFNESSES[config.stiffness][1]}; rho = {config.rho:g}",
        "rank": f"r = {RANKS[config.rank][1]}"
        + (
            ""
            if config.rank == "participation"
            else f"; from {WIDE:,} channels on, where no intervals are asked for, to within 1.2e-3 nats from log-determinants"
        ),
        "score": "z(kappa) + z(s) - z(r); z over the candidate splits 1 .. L-1, divisor n; split 0 is shown on the same scale and never selected",
        "sinks": (
            f"dropped: {'position 0 of each window and ' if config.drop_first else ''}tokens with norm above "
            f"{config.norm_factor:g} x the layer's median norm over the first {PILOT_TOKENS} tokens drawn (whole windows); "
            "'with sinks' numbers use every token"
        ),
        "documents": "documents in the order of sha256(seed, document), drawn whole until `tokens` are reached, windows within one document, start token included and counted",
        "intervals": (
            f"{config.bootstrap} resamples of documents, percentile interval at {config.confidence:g}; spectra and curvature to first order in the documents' weights, "
            "z-scores and argmax taken anew in each resample"
            if config.bootstrap
            else "none"
        ),
        "rivals": "Spearman correlation over the candidate splits of the score with depth l, median norm, mean pairwise cosine, log tr(S) in raw coordinates",
        **{f"coordinates {name}": COORDINATES[name][1] for name in config.coordinates},
    }
