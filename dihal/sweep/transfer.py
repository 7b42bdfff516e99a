"""Signs and weights of predictors fitted on other models' sweeps, then used on this one.

Numbers of different models live on different scales, ranks do not: every predictor and the truth are turned into ranks
over the model's candidate splits, spread evenly over [-1/2, 1/2]. A model with more layers has more rows but no wider
ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from dihal.errors import UsageError
from dihal.sweep.predictors import PROXIES, Predictor
from dihal.sweep.report import SweepReport

__all__ = ["fitted_predictors", "ranks", "ridge", "signs"]

Rows = Float[np.ndarray, "rows splits"]


def ranks(values: Rows) -> Rows:
    """Average ranks of each row, spread over [-1/2, 1/2]; NaN where a row is incomplete."""
    with np.errstate(invalid="ignore"):
        order = np.sign(values[:, :, None] - values[:, None, :]).sum(2)
    return order / (2 * max(1, values.shape[1] - 1))


def ridge(
    x: Float[np.ndarray, "splits features"], y: Float[np.ndarray, " splits"], penalty: float
) -> Float[np.ndarray, " features"]:
    """Weights that minimise |y - x w|^2 + penalty n |w|^2 (Hoerl & Kennard 1970); ranks are centred: no intercept."""
    return np.linalg.solve(x.T @ x + penalty * len(x) * np.eye(x.shape[1]), x.T @ y)


def signs(x: Float[np.ndarray, "splits features"], y: Float[np.ndarray, " splits"]) -> Float[np.ndarray, " features"]:
    """Sign of each feature's rank correlation with y; 0 where there is none."""
    return np.sign(np.where(np.abs(x.T @ y) < 1e-12, 0.0, x.T @ y))


def _training(
    sources: list[SweepReport], names: list[str], truth: str
) -> tuple[Float[np.ndarray, "splits features"], Float[np.ndarray, " splits"]]:
    """Ranked predictors (in their declared directions) and ranked negative losses of the other models."""
    x, y = [], []
    for source in sources:
        places = [source.splits.index(split) for split in source.candidates]
        rows = np.array(
            [
                source.predictors[name]["sign"] * np.array(source.predictors[name]["values"], float)[source.candidates]
                for name in names
            ]
        )
        x.append(ranks(rows).T)
        y.append(ranks(-np.array(source.truths[truth]["values"], float)[None, places])[0])
    return np.concatenate(x), np.concatenate(y)


def _check(sources: list[SweepReport], regime: str, truth: str, fingerprint: str) -> None:
    for source in sources:
        if source.regime != regime:
            raise UsageError(
                f"fitted_on: {source.backbone['id']} was swept under the regime {source.regime!r}, this is {regime!r}. "
                "Give a sweep of the same regime."
            )
        if truth not in source.truths:
            raise UsageError(
                f"fitted_on: the sweep of {source.backbone['id']} has no truth {truth!r} ({', '.join(source.truths)}). "
                "Set `truth` to one that both have."
            )
        if source.backbone_fingerprint == fingerprint:
            raise UsageError(
                f"fitted_on: the sweep of {source.backbone['id']} is of this very model. Weights fitted on the splits they "
                "are judged on predict anything; give another model's sweep."
            )


def fitted_predictors(
    predictors: list[Predictor],
    splits: list[int],
    sources: list[SweepReport],
    *,
    regime: str,
    truth: str,
    fingerprint: str,
    penalty: float,
) -> tuple[list[Predictor], dict[str, Any]]:
    """Predictors whose signs or weights come from other models.

    Args:
        predictors: of this model.
        splits: its candidate splits; ranks are taken over them.
        sources: sweeps of other models.
        regime: of this sweep.
        truth: loss that the weights were fitted to.
        fingerprint: of this model's weights.
        penalty: of the ridge.

    Returns:
        Per kind of coordinates the signs alone and the ridge on the three proxies, and the ridge on every predictor
        that all models have; and the weights, as plain data.

    Raises:
        UsageError: another regime, a truth the other sweep lacks, or the same model.
    """
    _check(sources, regime, truth, fingerprint)
    by_name = {item.name: item for item in predictors}
    shared = [
        name
        for name in by_name
        if all(
            name in source.predictors and _whole(source.predictors[name]["values"], source.candidates)
            for source in sources
        )
        and np.isfinite(by_name[name].values[splits]).all()
    ]
    coordinates = sorted({name.split("/")[1] for name in shared if name.startswith("score/")})
    plans: list[tuple[str, str, list[str], bool]] = []
    for kind in coordinates:
        proxies = [f"{name}/{kind}" for name in PROXIES]
        plans.append((f"signs/{kind}", f"fitted signs ({kind})", proxies, True))
        plans.append((f"ridge/{kind}", f"fitted weights ({kind})", proxies, False))
    # Scores are sums of the proxies: they would only share their weights.
    alone = [name for name in shared if by_name[name].group not in ("score", "without")]
    plans.append(("ridge/all", "fitted weights (all)", alone, False))
    found, weights = [], {}
    models = ", ".join(str(source.backbone["id"]) for source in sources)
    for name, label, names, only_signs in plans:
        x, y = _training(sources, names, truth)
        fitted = signs(x, y) if only_signs else ridge(x, y, penalty)
        weights[name] = dict(zip(names, fitted.tolist(), strict=True))
        found.append(
            _combined(
                name,
                label,
                [by_name[part] for part in names],
                fitted,
                splits,
                f"{'signs' if only_signs else f'ridge weights (penalty {penalty:g} n)'} on ranks over the candidate "
                f"splits, fitted to {truth} on {models}",
            )
        )
    return found, {"models": [source.backbone["id"] for source in sources], "truth": truth, "weights": weights}


def _whole(values: list[float | None], candidates: list[int]) -> bool:
    return all(values[split] is not None for split in candidates)


def _combined(
    name: str, label: str, parts: list[Predictor], weights: np.ndarray, splits: list[int], definition: str
) -> Predictor:
    layers = len(parts[0].values)
    resamples = {len(part.resampled) for part in parts if part.resampled is not None}
    count = resamples.pop() if len(resamples) == 1 else None

    def total(rows: list[np.ndarray]) -> np.ndarray:
        mixed = sum(weight * ranks(row) for weight, row in zip(weights, rows, strict=True))
        out = np.full((len(rows[0]), layers), np.nan)
        out[:, splits] = mixed
        return out

    drawn = None
    if count is not None:
        # What does not depend on the text is the same in every resample.
        drawn = total(
            [
                part.at(splits)[1] if part.resampled is not None else np.tile(part.at(splits)[0], (count, 1))
                for part in parts
            ]
        )
    return Predictor(
        name=name,
        group="transfer",
        label=label,
        sign=1.0,
        definition=definition,
        values=total([part.at(splits)[0][None] for part in parts])[0],
        resampled=drawn,
    )
