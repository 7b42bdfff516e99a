"""Every predictor from one pass over the text: the statistics of the score, and what else the same states tell."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dihal.config import ScoreConfig
from dihal.config.sweep import PredictorConfig
from dihal.errors import UsageError
from dihal.geometry.intervals import resample_documents
from dihal.geometry.layer import LayerNumbers, Sampling, assess_layer
from dihal.geometry.moments import correlation
from dihal.geometry.parallel import layer_workers
from dihal.geometry.score import check_draw, check_score_config
from dihal.geometry.streaming import LayerStatistics, stream_statistics
from dihal.geometry.windows import Draw, draw_documents, sample_pool
from dihal.sweep import states
from dihal.sweep.predictors import DIRECTIONS, Predictor, depth, geometry_predictors, stacked
from dihal.sweep.states import Found
from dihal.sweep.suffix import Sensitivity, fisher_indicators, state_gradients

if TYPE_CHECKING:
    from dihal.backbone import Backbone

__all__ = ["Assessment", "assess", "check_predictors"]


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """Predictors and the text behind them."""

    predictors: tuple[Predictor, ...]
    data: dict[str, Any]
    """Documents, tokens and fingerprints of the scored text."""


@dataclass(frozen=True, kw_only=True)
class _Layer:
    numbers: LayerNumbers
    others: dict[str, Found]


def check_predictors(score: ScoreConfig, config: PredictorConfig) -> None:
    """Refuse options out of range before anything is trained.

    Raises:
        UsageError: naming the option.
    """
    check_score_config(score)
    for name, value, good, say in (
        ("probe_folds", config.probe_folds, config.probe_folds >= 2, "at least 2"),
        (
            "probe_ridges",
            config.probe_ridges,
            min(config.probe_ridges, default=-1.0) >= 0,
            "numbers that are not negative",
        ),
        ("intrinsic_discard", config.intrinsic_discard, 0 <= config.intrinsic_discard < 1, "in [0, 1)"),
        ("fisher_tokens", config.fisher_tokens, config.fisher_tokens >= 0, "not negative"),
        ("fisher_chunk", config.fisher_chunk, config.fisher_chunk >= 1, "at least 1"),
        ("transfer_ridge", config.transfer_ridge, config.transfer_ridge > 0, "positive"),
    ):
        if not good:
            raise UsageError(f"predictors.{name} is {value}; it must be {say}.")


def _others(
    layer: LayerStatistics,
    numbers: LayerNumbers,
    condition: Tensor,
    gradients: Sensitivity | None,
    sampling: Sampling,
    score: ScoreConfig,
    config: PredictorConfig,
) -> dict[str, Found]:
    """The predictors that the score does not use, of one layer."""
    kept, counts = layer.pool_kept, sampling.counts
    norms = layer.pool_norms[kept]
    raw = layer.pool[kept].to(norms.dtype)
    document = sampling.pool_document.to(kept.device)[kept]
    preferred = sampling.anchor_preference.to(kept.device)
    anchors = (kept.cumsum(0) - 1)[preferred[kept[preferred]][: score.anchors]]
    moments = layer.kept["raw"]
    corr, std = correlation(moments.covariance)
    centred = raw - moments.mean.to(raw.dtype)
    points = centred / std.to(raw.dtype)
    probe = states.fit_probe(
        condition[kept].to(raw.dtype), points, document, counts, folds=config.probe_folds, ridges=config.probe_ridges
    )
    found: dict[str, Found] = {
        "norm": states.median_norm(norms, document, counts),
        "dispersion": states.total_variance(centred, document, counts, numbers.log_trace),
        "cosine": states.mean_cosine(raw, document, counts, numbers.mean_cosine),
        "intrinsic_dimension": states.intrinsic_dimension(
            points, anchors, document, counts, discard=config.intrinsic_discard
        ),
        "probe": probe.explained,
        "viv": states.velocity_variance(points, document, counts, covariance=corr, standardized=True),
        "viv_given": states.velocity_variance(probe.residual, document, counts),
    }
    if gradients is not None:
        found |= fisher_indicators(
            gradients, std, layer.threshold, probe.residual, document, counts, drop_first=score.drop_first
        )
    return found


@contextlib.contextmanager
def _progress(show: bool, totals: dict[str, int]) -> Iterator[dict[str, Callable[[int], None]]]:
    if not show:
        yield dict.fromkeys(totals, lambda count: None)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        tasks = {name: bar.add_task(name, total=total) for name, total in totals.items()}
        yield {name: lambda count, task=task: bar.advance(task, count) for name, task in tasks.items()}


def _record(draw: Draw) -> dict[str, Any]:
    return {
        "documents": draw.documents,
        "windows": len(draw.windows),
        "tokens": draw.tokens,
        "fingerprint": draw.fingerprint,
        "scored_fingerprint": draw.scored_fingerprint,
    }


def assess(
    backbone: Backbone,
    texts_or_ids: Iterable[Any],
    score: ScoreConfig,
    config: PredictorConfig,
    *,
    progress: bool = False,
) -> Assessment:
    """Measure every predictor of every split 0 .. L-1.

    The geometry score, its proxies and their resamples are those of :func:`dihal.geometry.score_layers` with the same
    options: the same pass, tokens, anchors and document resamples.

    Args:
        backbone: the frozen LM, at least 3 blocks.
        texts_or_ids: training documents.
        score: the score's options; ``score.bootstrap`` resamples (0: none).
        config: options of the others.
        progress: show progress bars.

    Raises:
        UsageError: as :func:`~dihal.geometry.score_layers`, and one document only.
    """
    check_predictors(score, config)
    layers = backbone.num_blocks
    if layers < 3:
        raise UsageError(f"the backbone has {layers} blocks; a sweep compares at least 2 candidate splits: 3 blocks.")
    draw = draw_documents(backbone, texts_or_ids, score)
    pool, preference = sample_pool(draw, score)
    check_draw(draw, len(pool), score)
    window_of = torch.searchsorted(draw.offsets, pool, right=True) - 1
    sampling = Sampling(
        pool_document=draw.document[window_of],
        anchor_preference=preference,
        counts=resample_documents(draw.documents, score.bootstrap, score.seed) if score.bootstrap else None,
    )
    names = ("tokens through the backbone", "tokens through the suffix, backward", "layers assessed")
    totals = (draw.tokens, min(config.fisher_tokens, draw.tokens), layers)
    with _progress(progress, dict(zip(names, totals))) as advance:
        held = {layer.split: layer for layer in stream_statistics(backbone, draw, pool, score, advance[names[0]])}
        gradients: dict[int, Sensitivity] = {}
        if config.fisher_tokens:
            gradients = dict(
                enumerate(
                    state_gradients(
                        backbone,
                        draw,
                        tokens=config.fisher_tokens,
                        batch_tokens=score.batch_tokens,
                        chunk=config.fisher_chunk,
                        seed=score.seed,
                        advance=advance[names[1]],
                    )
                )
            )
        condition = held[0].pool

        def one(split: int) -> _Layer:
            layer = held.pop(split)
            numbers = assess_layer(layer, sampling, score)
            others = _others(layer, numbers, condition, gradients.pop(split, None), sampling, score, config)
            advance[names[2]](1)
            return _Layer(numbers=numbers, others=others)

        with torch.no_grad(), layer_workers(backbone.device) as over:
            found = list(over(one, range(layers)))
    candidates = torch.arange(layers) > 0
    numbers = [layer.numbers for layer in found]
    predictors = [p for name in score.coordinates for p in geometry_predictors(numbers, name, candidates)]
    predictors.append(depth(layers))
    # The order of the declarations is that of the tables.
    measured = [name for name in DIRECTIONS if name in found[0].others]
    predictors += [stacked(name, [layer.others[name] for layer in found]) for name in measured]
    return Assessment(predictors=tuple(predictors), data=_record(draw))
