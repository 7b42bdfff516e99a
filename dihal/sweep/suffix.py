"""How the suffix feels an error of the state: gradients of sampled log-probabilities in every h^l, in one backward pass.

The Fisher information of the suffix in h^l_i is the second moment of g = d/dh sum_j log p(y_j), y_j drawn from the
suffix itself at every position j: scores have mean zero, so products of different positions cancel
(:mod:`dihal.spaces.metric` has the argument). One backward pass gives g in all layers at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dihal.errors import UsageError
from dihal.geometry.intervals import document_sums
from dihal.geometry.moments import spectrum_and_basis
from dihal.geometry.proxies import effective_rank
from dihal.geometry.windows import Chunk, Draw, plan_chunks
from dihal.random import uniform
from dihal.sweep.states import Counts, Documents, Found, ratio_of_sums

if TYPE_CHECKING:
    from dihal.backbone import Backbone

__all__ = ["Sensitivity", "fisher_indicators", "state_gradients"]


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Gradients of one layer at the tokens read."""

    gradient: Float[Tensor, "tokens dim"]
    norms: Float[Tensor, " tokens"]
    """Norms of the states there."""
    first: Bool[Tensor, " tokens"]
    document: Documents


def _shortened(draw: Draw, tokens: int) -> tuple[Draw, Int[Tensor, " windows"]]:
    """Whole windows with at least ``tokens`` tokens, or all: of every document the first, then the second, and so on.

    Documents are what intervals resample, so as many as possible are read. Also returns the number of each window.
    """
    seen: dict[int, int] = {}
    turn = []
    for document in draw.document.tolist():
        seen[document] = seen.get(document, 0) + 1
        turn.append(seen[document])
    order = sorted(range(len(turn)), key=lambda window: (turn[window], window))
    lengths = torch.tensor([len(draw.windows[window]) for window in order])
    count = min(int((lengths.cumsum(0) < tokens).sum()) + 1, len(order))
    chosen = torch.tensor(order[:count])
    short = replace(
        draw,
        windows=tuple(draw.windows[window] for window in order[:count]),
        document=draw.document[chosen],
        tokens=int(lengths[:count].sum()),
    )
    return short, chosen


@contextlib.contextmanager
def _embedding_with_gradient(backbone: Backbone) -> Iterator[None]:
    # No weight needs a gradient, so nothing would be recorded: the embedding's output becomes the root of the graph.
    hook = backbone.input_embedding.register_forward_hook(lambda module, given, out: out.requires_grad_(True))
    try:
        yield
    finally:
        hook.remove()


def _slopes(
    backbone: Backbone, features: Float[Tensor, "tokens dim"], u: Float[Tensor, " tokens"], chunk: int
) -> Float[Tensor, "tokens dim"]:
    """Gradient of log p(y) in the features, y drawn from p in fp64 by ``u``."""
    slope = torch.empty_like(features)
    for start in range(0, len(features), chunk):
        part = slice(start, start + chunk)
        with torch.enable_grad():
            inner = features[part].detach().requires_grad_(True)
            log_p = backbone.head(inner.unsqueeze(0)).squeeze(0).float().log_softmax(-1)
        cumulative = log_p.detach().double().exp().cumsum(-1)
        drawn = torch.searchsorted(cumulative, u[part, None] * cumulative[:, -1:]).clamp_max(log_p.shape[-1] - 1)
        (slope[part],) = torch.autograd.grad(log_p.gather(-1, drawn).sum(), inner)
    return slope


def _chunk_gradients(
    backbone: Backbone, chunk: Chunk, keys: Int[Tensor, " tokens"], splits: list[int], seed: int, at_once: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """Split -> (gradient, norm of the state) at the chunk's real tokens."""
    ids, real = chunk.input_ids.to(backbone.device), chunk.real.to(backbone.device)
    mask = None if bool(chunk.real.all()) else real
    with torch.enable_grad(), _embedding_with_gradient(backbone):
        states = backbone.states(ids, splits, attention_mask=mask)
        features = backbone.suffix_features(states[splits[-1]], splits[-1], attention_mask=mask)
    where = real.flatten().nonzero().squeeze(1)
    flat = features.detach().flatten(0, 1)
    u = uniform(seed, keys, "sweep-fisher", dtype=torch.float64).to(backbone.device)
    slope = torch.zeros_like(flat)
    slope[where] = _slopes(backbone, flat[where], u, at_once)
    gradients = torch.autograd.grad(features, [states[split] for split in splits], slope.view_as(features))
    return {
        split: (gradient.flatten(0, 1)[where].float(), states[split].detach().flatten(0, 1)[where].float().norm(dim=-1))
        for split, gradient in zip(splits, gradients)
    }


def state_gradients(
    backbone: Backbone,
    draw: Draw,
    *,
    tokens: int,
    batch_tokens: int,
    chunk: int,
    seed: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Sensitivity]:
    """Gradients in h^0 .. h^(L-1) on windows of as many documents as possible.

    Args:
        backbone: the frozen LM.
        draw: the scored tokens.
        tokens: at least so many are read (whole windows), if there are.
        batch_tokens: tokens per pass.
        chunk: positions whose logits exist at once.
        seed: of the tokens drawn from the suffix; keyed by token, so that batches do not matter.
        advance: called with the tokens of each pass done.

    Raises:
        UsageError: gradients that are not finite.
    """
    short, chosen = _shortened(draw, tokens)
    splits = list(range(backbone.num_blocks))
    found: dict[int, list[tuple[Tensor, Tensor]]] = {split: [] for split in splits}
    plan = plan_chunks(short, batch_tokens)
    windows = []
    for item in plan:
        window = torch.searchsorted(short.offsets, item.index, right=True) - 1
        # Index of the token among all that are scored: its draw does not depend on how many are read here.
        keys = draw.offsets[chosen[window]] + item.index - short.offsets[window]
        for split, pair in _chunk_gradients(backbone, item, keys, splits, seed, chunk).items():
            found[split].append(pair)
        windows.append(window)
        advance(len(item.index))
    first = torch.cat([item.first for item in plan]).to(backbone.device)
    document = short.document[torch.cat(windows)].to(backbone.device)
    out = []
    for split in splits:
        gradient, norms = (torch.cat(column) for column in zip(*found.pop(split)))
        if not bool(gradient.isfinite().all()):
            raise UsageError(
                f"the suffix's gradients in the states of split {split} are not finite. Hold the backbone in float32 "
                "or bfloat16, or set predictors.fisher_tokens to 0."
            )
        out.append(Sensitivity(gradient=gradient, norms=norms, first=first, document=document))
    return out


def fisher_indicators(
    found: Sensitivity,
    std: Float[Tensor, " dim"],
    threshold: float,
    residual: Float[Tensor, "tokens dim"],
    residual_document: Documents,
    counts: Counts | None,
    *,
    drop_first: bool,
) -> dict[str, Found]:
    """Log trace, log effective rank and log(tr(F R) / 2) of one layer, with resamples.

    Args:
        found: gradients of the layer.
        std: deviation of each channel; F and R are taken in units of it.
        threshold: norm above which a token is a sink and left out.
        residual: what the probe leaves of the pool's tokens, standardized.
        residual_document: documents of those tokens.
        counts: document multiplicities.
        drop_first: leave out position 0.

    The resamples of the last one are to first order in both F and R.
    """
    kept = (found.norms <= threshold) & ~(found.first & drop_first)
    # A channel without variance has deviation infinity: no error is made there.
    unit = torch.where(std.isfinite(), std, 0.0)
    g = found.gradient[kept].double() * unit.double()
    document = found.document[kept]
    one = torch.ones(len(g), dtype=torch.float64, device=g.device)
    trace, trace_rows = ratio_of_sums(g.square().sum(1), one, document, counts)
    fisher = g.mT @ g / len(g)
    values, basis = spectrum_and_basis(fisher)
    rank_rows = None
    if counts is not None:
        # The common factor 1 / tokens does not change a rank, and a resample without any of these tokens has none.
        along = document_sums((g @ basis).square(), document, counts.shape[1])
        rank_rows = effective_rank(counts.to(g.device, torch.float64) @ along)
    left = residual.double()
    covariance = left.mT @ left / len(left)
    value, by_fisher = ratio_of_sums(0.5 * ((g @ covariance) * g).sum(1), one, document, counts)
    _, by_residual = ratio_of_sums(
        0.5 * ((left @ fisher) * left).sum(1), torch.ones_like(left[:, 0]), residual_document, counts
    )
    kl_rows = None
    if by_fisher is not None and by_residual is not None:
        kl_rows = (by_fisher + by_residual - value).log()  # NaN, and left out, where first order is too little
    log = torch.tensor([trace, value], dtype=torch.float64).log()
    return {
        "fisher_trace": (float(log[0]), None if trace_rows is None else trace_rows.log()),
        "fisher_rank": (float(effective_rank(values)), rank_rows),
        "fisher_kl": (float(log[1]), kl_rows),
    }
