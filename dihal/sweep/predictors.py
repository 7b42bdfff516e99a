"""A predictor: one number per split, the direction declared beforehand, and its resamples.

Directions are fixed here, not fitted: a predictor whose direction is wrong in a regime gets a negative correlation
there, and that is a finding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dihal.geometry.proxies import z_scores

if TYPE_CHECKING:
    from dihal.geometry.layer import LayerNumbers

__all__ = ["DIRECTIONS", "GROUPS", "PROXIES", "Predictor", "depth", "geometry_predictors", "stacked"]

PROXIES = {"curvature": (1.0, "κ"), "stiffness": (1.0, "s"), "rank": (-1.0, "r")}
"""Proxy -> (its sign in the score, symbol)."""

GROUPS = {
    "score": "geometry score",
    "without": "score without one proxy",
    "proxy": "one proxy alone",
    "transfer": "fitted on another model",
    "trivial": "trivial",
    "states": "other numbers of the states",
    "suffix": "Fisher geometry",
}
"""Group of predictors -> words."""

DIRECTIONS = {
    "depth": (-1.0, "trivial", "depth", "l: the fewer blocks are replaced, the easier"),
    "norm": (-1.0, "trivial", "median norm", "median |h| of kept tokens; large states are expected to be hard"),
    "dispersion": (-1.0, "trivial", "dispersion", "log tr(S), raw coordinates; spread states are expected to be hard"),
    "cosine": (1.0, "trivial", "mean cosine", "mean cosine of two kept tokens; aligned states are expected to be easy"),
    "intrinsic_dimension": (
        -1.0,
        "states",
        "intrinsic dimension",
        "TwoNN (Facco et al. 2017): log of the maximum-likelihood exponent of the ratio of the second to the first "
        "neighbour's distance at the score's anchors, standardized coordinates, the largest ratios taken as censored; "
        "copies left out",
    ),
    "probe": (
        1.0,
        "states",
        "linear probe of h^0",
        "share of the variance of h^l (standardized coordinates, pool tokens) that a ridge regression on the token's own "
        "h^0 explains on documents it was not fitted on, with the best of a few ridges",
    ),
    "viv": (
        -1.0,
        "states",
        "VIV",
        "velocity irreducible variance (the name is that of arXiv 2606.03578; computed here: its best linear estimate, "
        "an upper bound). Flow z_t = (1 - t) z + t eps, velocity eps - z; mean over channels and uniform t of the "
        "velocity's variance given z_t is E Var(z | z_t) / t^2; with linear regression that is (pi / 2) mean of "
        "sqrt(e), e the eigenvalues of the covariance in standardized coordinates",
    ),
    "viv_given": (
        -1.0,
        "states",
        "VIV given h^0",
        "the same with e the eigenvalues of the covariance of what the linear probe leaves: the velocity is predicted "
        "from z_t and the token's own h^0",
    ),
    "fisher_trace": (
        -1.0,
        "suffix",
        "Fisher trace",
        "log tr(F): F the Fisher information of the suffix's next-token distributions (at this and all later positions) "
        "in the state, standardized coordinates, mean over kept tokens: how far a small error of any direction is felt. "
        "An indicator in the spirit of arXiv 2604.02751, defined here",
    ),
    "fisher_rank": (
        -1.0,
        "suffix",
        "Fisher rank",
        "entropy of the normalised eigenvalues of that F, nats: in how many directions an error is felt",
    ),
    "fisher_kl": (
        -1.0,
        "suffix",
        "Fisher x probe",
        "log of tr(F R) / 2, R the covariance of what the linear probe leaves: the suffix-KL of the linear probe as a "
        "bridge, to second order and with errors independent between positions, in nats",
    ),
}
"""Name -> (sign, group, label, definition) of the predictors that are not built from the score's proxies."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictor:
    """One number per split 0 .. L-1."""

    name: str
    group: str
    """A key of :data:`GROUPS`."""
    label: str
    """For tables and figures."""
    sign: float
    """1: large values are expected where the loss is small; -1: small ones."""
    definition: str
    values: Float[np.ndarray, " layers"]
    resampled: Float[np.ndarray, "resamples layers"] | None = None
    """Its values in each resample of the documents; None: it does not depend on the text, or is not resampled."""

    @property
    def friendliness(self) -> Float[np.ndarray, " layers"]:
        """The values, turned so that larger means better."""
        return self.sign * self.values

    def at(self, splits: list[int]) -> tuple[np.ndarray, np.ndarray | None]:
        """Friendliness of the given splits, and its resamples."""
        rows = None if self.resampled is None else self.sign * self.resampled[:, splits]
        return self.friendliness[splits], rows


def stacked(name: str, found: list[tuple[float, Tensor | None]]) -> Predictor:
    """A predictor of :data:`DIRECTIONS` from one (value, resamples) per layer."""
    sign, group, label, definition = DIRECTIONS[name]
    parts = [part for _, part in found if part is not None]
    return Predictor(
        name=name,
        group=group,
        label=label,
        sign=sign,
        definition=definition,
        values=np.array([value for value, _ in found], dtype=np.float64),
        resampled=torch.stack([part.double().cpu() for part in parts], 1).numpy() if len(parts) == len(found) else None,
    )


def depth(layers: int) -> Predictor:
    """The split's own index."""
    return stacked("depth", [(float(split), None) for split in range(layers)])


def _proxy_rows(numbers: list[LayerNumbers], coordinates: str) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Proxy -> values (1, layers) and resamples (resamples, layers)."""
    items = [layer.proxies[coordinates] for layer in numbers]
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for index, name in enumerate(PROXIES):
        values = torch.tensor([[getattr(item, name) for item in items]], dtype=torch.float64)
        parts = [item.resampled[index].double() for item in items if item.resampled is not None]
        found[name] = values, torch.stack(parts, 1) if len(parts) == len(items) else None
    return found


def geometry_predictors(
    numbers: list[LayerNumbers], coordinates: str, candidates: Bool[Tensor, " layers"]
) -> list[Predictor]:
    """The score, each proxy alone, and the score without each of them, in one kind of coordinates.

    z-scores are taken over ``candidates`` as ``dihal score`` does, anew in each resample.
    """
    rows = _proxy_rows(numbers, coordinates)
    zed = {
        name: tuple(None if part is None else sign * z_scores(part, candidates) for part in rows[name])
        for name, (sign, _) in PROXIES.items()
    }

    def predictor(group: str, name: str, label: str, used: list[str], definition: str) -> Predictor:
        values = sum(zed[used_name][0] for used_name in used)
        parts = [zed[used_name][1] for used_name in used]
        resampled = None if any(part is None for part in parts) else sum(parts)
        assert isinstance(values, Tensor)
        return Predictor(
            name=f"{name}/{coordinates}",
            group=group,
            label=f"{label} ({coordinates})",
            sign=1.0,
            definition=f"{definition}; {coordinates} coordinates, as `dihal score` computes it",
            values=values[0].numpy(),
            resampled=resampled.numpy() if isinstance(resampled, Tensor) else None,
        )

    def formula(names: list[str]) -> str:
        signed = [("+" if PROXIES[name][0] > 0 else "-", f"z({PROXIES[name][1]})") for name in names]
        return " ".join(f"{sign} {term}" for sign, term in signed).removeprefix("+ ")

    everything = list(PROXIES)
    found = [predictor("score", "score", "score", everything, formula(everything))]
    for left_out, (_, symbol) in PROXIES.items():
        rest = [name for name in everything if name != left_out]
        found.append(predictor("without", f"without-{left_out}", f"score without {symbol}", rest, formula(rest)))
    for name, (sign, symbol) in PROXIES.items():
        label = symbol if sign > 0 else f"−{symbol}"
        found.append(predictor("proxy", name, label, [name], formula([name])))
    return found
