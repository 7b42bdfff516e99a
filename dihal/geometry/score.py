"""Score the hidden layers of a backbone by geometry: method.md section 2, end to end."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dihal.config import ScoreConfig
from dihal.config.score import Coordinates
from dihal.errors import UsageError, unknown_name
from dihal.geometry.definitions import definitions
from dihal.geometry.intervals import percentile_interval, resample_documents
from dihal.geometry.layer import LayerNumbers, Sampling, assess_layer
from dihal.geometry.parallel import layer_queue
from dihal.geometry.proxies import RANKS, STIFFNESSES, score, spearman, z_scores
from dihal.geometry.ranks import Ranks
from dihal.geometry.report import CoordinateReport, LayerReport, ScoreReport, SplitReport
from dihal.geometry.statistics import LayerStatistics
from dihal.geometry.streaming import stream_statistics
from dihal.geometry.windows import Draw, draw_documents, sample_pool
from dihal.io import hash_json
from dihal.provenance import provenance

if TYPE_CHECKING:
    from dihal.backbone import Backbone

__all__ = ["score_layers"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def check_score_config(config: ScoreConfig) -> None:
    known = get_args(Coordinates)
    for name in (*config.coordinates, config.select_by):
        if name not in known:
            raise unknown_name("coordinates", name, known)
    if config.stiffness not in STIFFNESSES:
        raise unknown_name("stiffness", config.stiffness, STIFFNESSES)
    if config.rank not in RANKS:
        raise unknown_name("rank", config.rank, RANKS)
    _require(len(set(config.coordinates)) == len(config.coordinates), "`coordinates` names one kind twice.")
    _require(
        config.select_by in config.coordinates,
        f"select_by={config.select_by!r} is not among coordinates={list(config.coordinates)}. Add it, or select by another.",
    )
    _require(config.tokens >= 2, f"tokens={config.tokens}: score at least 2 tokens.")
    _require(config.sequence_length >= 2, f"sequence_length={config.sequence_length}: a window needs 2 tokens.")
    _require(config.batch_tokens >= 1, f"batch_tokens={config.batch_tokens} must be positive.")
    _require(config.neighbours >= 2, f"neighbours={config.neighbours}: a covariance needs at least 2 neighbours.")
    _require(config.anchors >= 1, f"anchors={config.anchors} must be positive.")
    _require(
        config.neighbours < config.pool,
        f"neighbours={config.neighbours} must be fewer than pool={config.pool}: raise `pool` or lower `neighbours`.",
    )
    _require(
        math.isfinite(config.rho) and config.rho >= 0, f"rho={config.rho} must be a finite number that is not negative."
    )
    _require(config.norm_factor > 1, f"norm_factor={config.norm_factor} must exceed 1 (inf keeps every token).")
    _require(config.bootstrap >= 0, f"bootstrap={config.bootstrap} must not be negative; 0 means no intervals.")
    _require(0 < config.confidence < 1, f"confidence={config.confidence} must lie between 0 and 1.")


def check_draw(draw: Draw, pool: int, config: ScoreConfig) -> None:
    _require(
        pool > config.neighbours,
        f"{pool} tokens are left to score, {config.neighbours} neighbours need at least {config.neighbours + 1}. "
        "Score more text or lower `neighbours`.",
    )
    _require(
        config.bootstrap == 0 or draw.documents >= 2,
        f"intervals resample documents, and {draw.documents} was drawn. "
        "Give more documents, raise `tokens`, or set bootstrap=0.",
    )


@contextlib.contextmanager
def _progress(show: bool, tokens: int, layers: int) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    if not show:
        yield (lambda count: None), (lambda count: None)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        forward = bar.add_task("tokens through the backbone", total=tokens)
        layer = bar.add_task("layers scored", total=layers)
        yield (lambda count: bar.advance(forward, count)), (lambda count: bar.advance(layer, count))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _column(numbers: list[LayerNumbers], coordinates: str, name: str) -> Float[Tensor, "layers"]:
    return torch.tensor([getattr(layer.proxies[coordinates], name) for layer in numbers], dtype=torch.float64)


def _resamples(
    numbers: list[LayerNumbers], coordinates: str, candidates: Tensor
) -> tuple[dict[str, Tensor], Tensor] | None:
    """Proxies and score of each usable resample, (resamples, layers), and the argmax split of each."""
    parts = [layer.proxies[coordinates].resampled for layer in numbers]
    if any(part is None for part in parts):
        return None
    stacked = [torch.stack([part[i].double() for part in parts if part is not None], dim=1) for i in range(3)]
    usable = torch.stack([part.isfinite().all(1) for part in stacked]).all(0)
    curvature, stiffness, rank = (part[usable] for part in stacked)
    total = score(curvature, stiffness, rank, candidates)
    best = total.masked_fill(~candidates, -torch.inf).argmax(1)
    return {"curvature": curvature, "stiffness": stiffness, "rank": rank, "score": total}, best


def _coordinate_report(
    numbers: list[LayerNumbers], coordinates: str, candidates: Bool[Tensor, "layers"], config: ScoreConfig
) -> CoordinateReport:
    curvature, stiffness, rank = (_column(numbers, coordinates, name) for name in ("curvature", "stiffness", "rank"))
    total = score(curvature, stiffness, rank, candidates)
    z = {
        name: z_scores(v, candidates)
        for name, v in (("curvature", curvature), ("stiffness", stiffness), ("rank", rank))
    }
    drawn = _resamples(numbers, coordinates, candidates)
    bounds: dict[str, Tensor] = {}
    share = argmax_interval = None
    used = 0
    if drawn is not None and len(drawn[1]) > 0:
        samples, best = drawn
        used = len(best)
        bounds = {name: percentile_interval(v, config.confidence) for name, v in samples.items()}
        share = torch.bincount(best, minlength=len(numbers)).double() / used
        low, high = percentile_interval(best[:, None].double(), config.confidence)[:, 0].tolist()
        argmax_interval = (low, high)

    def interval(name: str, split: int) -> tuple[float, float] | None:
        return (float(bounds[name][0, split]), float(bounds[name][1, split])) if bounds else None

    splits = []
    for split, layer in enumerate(numbers):
        item = layer.proxies[coordinates]
        candidate = bool(candidates[split])
        splits.append(
            SplitReport(
                split=split,
                candidate=candidate,
                curvature=item.curvature,
                stiffness=item.stiffness,
                rank=item.rank,
                z_curvature=float(z["curvature"][split]),
                z_stiffness=float(z["stiffness"][split]),
                z_rank=float(z["rank"][split]),
                score=float(total[split]),
                curvature_interval=interval("curvature", split),
                stiffness_interval=interval("stiffness", split),
                rank_interval=interval("rank", split),
                score_interval=interval("score", split),
                argmax_probability=float(share[split]) if share is not None and candidate else None,
                stiffness_with_sinks=item.stiffness_with_sinks,
                rank_with_sinks=item.rank_with_sinks,
                largest_eigenvalue=item.largest_eigenvalue,
                mean_eigenvalue=item.mean_eigenvalue,
                anchors=item.anchors,
                floored=item.floored,
                duplicates=item.duplicates,
            )
        )
    rivals = {
        "depth": torch.arange(len(numbers)).double(),
        "median_norm": torch.tensor([layer.median_norm for layer in numbers]).double(),
        "mean_cosine": torch.tensor([layer.mean_cosine for layer in numbers]).double(),
        "log_trace": torch.tensor([layer.log_trace for layer in numbers]).double(),
    }
    return CoordinateReport(
        splits=tuple(splits),
        argmax=int(total.masked_fill(~candidates, -torch.inf).argmax()),
        argmax_interval=argmax_interval,
        resamples_used=used,
        rivals={name: _finite(spearman(total[candidates], v[candidates])) for name, v in rivals.items()},
    )


def _layer_report(split: int, layer: LayerNumbers) -> LayerReport:
    values = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer) if field.name != "proxies"}
    values["norm_threshold"] = _finite(layer.norm_threshold)
    return LayerReport(split=split, **values)


def _data_record(draw: Draw, config: ScoreConfig) -> dict[str, Any]:
    return {
        "documents_given": draw.documents_given,
        "documents": draw.documents,
        "windows": len(draw.windows),
        "tokens": draw.tokens,
        "tokens_asked": config.tokens,
        "start_token": draw.start_token,
        "fingerprint": draw.fingerprint,
        "scored_fingerprint": draw.scored_fingerprint,
    }


def score_layers(
    backbone: Backbone,
    texts_or_ids: Iterable[Any],
    config: ScoreConfig | None = None,
    *,
    progress: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
) -> ScoreReport:
    """Score every split of a backbone; select one.

    The text runs once through blocks 0 .. L-2 (h^(L-1) enters the last block), never through the
    head. Memory does not grow with the number of tokens, except for their ids (about 20 bytes per
    token while the pool is drawn): per layer, two triangles of d x d (two more where many tokens are dropped) and
    ``config.pool`` states. On a GPU the first layers are assessed while the last ones are run. On a CPU as many layers are computed at a time as torch has threads, each with the working set
    of a few more of both; the assessment does not depend on that number.

    Args:
        backbone: any loaded backbone with at least 3 blocks.
        texts_or_ids: documents: strings, or flat sequences of token ids of this backbone.
        config: options; None: the defaults.
        progress: show progress bars.
        ranks: processes that share the work, each with the same backbone, text and options; all of them get the report.

    Returns:
        The report: numbers, intervals, definitions, provenance.

    Raises:
        UsageError: a bad option, no or too little text, ids out of range, fewer than two documents
            where intervals are asked for, fewer than three blocks, NaN or infinity in the states.
    """
    config = ScoreConfig() if config is None else config
    started = time.perf_counter()
    check_score_config(config)
    layers = backbone.num_blocks
    _require(
        layers >= 3,
        f"the backbone has {layers} blocks; the score compares at least 2 candidate splits, which need 3 blocks.",
    )
    longest = backbone.max_positions
    _require(
        longest is None or config.sequence_length <= longest,
        f"sequence_length={config.sequence_length} exceeds the backbone's {longest} positions. Lower it.",
    )
    draw = draw_documents(backbone, texts_or_ids, config)
    pool, preference = sample_pool(draw, config, backbone.device)
    check_draw(draw, len(pool), config)
    window_of = torch.searchsorted(draw.offsets, pool, right=True) - 1
    counts = resample_documents(draw.documents, config.bootstrap, config.seed) if config.bootstrap else None
    sampling = Sampling(pool_document=draw.document[window_of], anchor_preference=preference, counts=counts)
    assessed: dict[int, LayerNumbers] = {}
    with _progress(progress, draw.tokens, layers) as (forward, scored), layer_queue(backbone.device) as submit:
        waiting: dict[int, Future[LayerNumbers]] = {}

        def begin(layer: LayerStatistics) -> None:
            # Nothing else holds the layer: it is forgotten once it is scored, and its pool is the largest thing held.
            waiting[layer.split] = submit(assess_layer, layer, sampling, config)

        stream_statistics(backbone, draw, pool, config, forward, ranks, begin)
        for split in sorted(waiting):
            assessed[split] = waiting.pop(split).result()
            scored(ranks.size)
    numbers = ranks.gather(assessed, layers)
    candidates = torch.arange(layers) > 0
    by_coordinates = {name: _coordinate_report(numbers, name, candidates, config) for name in config.coordinates}
    resolved = {**dataclasses.asdict(config), "coordinates": list(config.coordinates)}
    return ScoreReport(
        selected_split=by_coordinates[config.select_by].argmax,
        select_by=config.select_by,
        candidates=tuple(range(1, layers)),
        coordinates=by_coordinates,
        layers=tuple(_layer_report(split, layer) for split, layer in enumerate(numbers)),
        definitions=definitions(config),
        data=_data_record(draw, config),
        config={**resolved, "hash": hash_json(resolved)},
        backbone=backbone.reference.to_dict(),
        provenance={**provenance(), "seconds": time.perf_counter() - started},
    )
