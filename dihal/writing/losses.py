"""Loss terms of the regime `generate`. Each is a sum over its positions, divided by a number the caller names."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dihal.diffusion.process import Process
from dihal.errors import UsageError
from dihal.method_parts import own_dtype
from dihal.spaces.base import Estimate, NoiseKey
from dihal.spaces.recovery import Kernel, suffix_loss
from dihal.types import Mask, PerPosition, State, Time, TokenIds

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.config.method import ObjectiveConfig
    from dihal.data.batch import Batch
    from dihal.meter import Meter
    from dihal.spaces.base import Space
    from dihal.spaces.embedding import EmbeddingSpace

__all__ = ["bound_loss", "own_loss", "reencoded", "state_terms", "suffix_terms", "token_terms"]


def state_terms(
    process: Process,
    objective: ObjectiveConfig,
    out: State,
    estimate: Estimate,
    noised: State,
    clean: State,
    t: Time,
    mask: Mask,
    unknown: Mask,
    position_ids: Int[Tensor, "batch time"],
) -> tuple[Float[Tensor, ""], dict[str, Tensor], Float[Tensor, " batch"]]:
    """Squared error of the network's output over unknown positions.

    Args:
        process: says what the output should be.
        objective: weight of the term, and where an outlier begins.
        out: network output.
        estimate: what it stands for.
        noised, clean, t: states and time.
        mask: real tokens; the sum is divided by their number.
        unknown: those of them whose state is denoised.
        position_ids: the first position, a sink, is left out of ``explained``.

    Returns:
        The weighted term; ``state`` (mean over unknown positions) and ``explained`` (share of the clean state's power, without
        outliers); squared error of the clean-state estimate per sequence, which rises with noise in any parametrisation.
    """
    count = unknown.sum().clamp_min(1)
    # min(1, (clip / rms)^2), as in the regime `replace`: far outliers count by their relative error.
    weight = (objective.norm_clip**2 / clean.square().mean(-1).clamp_min(1e-12)).clamp_max(1.0) * unknown
    total, terms = out.new_zeros(()), {}
    if objective.state > 0:
        error = ((out - process.from_x0(clean, noised, t)).square().mean(-1) * weight).sum()
        total = objective.state * error / mask.sum().clamp_min(1)
        terms["state"] = error.detach() / count
    with torch.no_grad():
        residual = (estimate.x0 - clean).square().mean(-1) * weight
        ordinary = unknown * (weight == unknown) * (position_ids > 0)
        power = (clean.square().mean(-1) * ordinary).sum().clamp_min(1e-12)
        terms["explained"] = 1 - (residual * ordinary).sum() / power
        per_sequence = residual.sum(-1) / unknown.sum(-1).clamp_min(1)
    return total, terms, per_sequence


def _selected(chosen: Mask, chunk: int) -> tuple[Int[Tensor, " positions"], Float[Tensor, " positions"], int]:
    # Flat indices of chosen positions, padded to whole chunks (a compiled kernel sees one shape), and 1 where real.
    index = chosen.flatten().nonzero().squeeze(-1)
    size = min(chunk, chosen.numel())
    padding = -len(index) % size
    real = torch.ones(len(index) + padding, device=index.device)
    if padding:
        real[-padding:] = 0.0
        index = torch.cat([index, index.new_zeros(padding)])
    return index, real, size


def own_loss(
    backbone: Backbone,
    space: Space,
    features: Float[Tensor, "batch time k"],
    targets: TokenIds,
    chosen: Mask,
    weight: Float[Tensor, " batch"],
    *,
    chunk: int,
    kernel: Kernel,
    meter: Meter,
) -> tuple[Float[Tensor, ""], PerPosition]:
    """Cross-entropy of x_i by the own head, over the chosen positions; logits exist for a chunk of them at once.

    Args:
        backbone, space: give the head, ``space.logits``.
        features: what it reads; the gradient goes through them.
        targets: tokens.
        chosen: positions that count.
        weight: of each sequence's positions.
        chunk: positions per chunk.
        kernel: see :func:`~dihal.spaces.recovery.suffix_loss`.
        meter: told what is run.

    Returns:
        Weighted sum, differentiable; cross-entropy per position in nats, detached, 0 where not chosen.
    """
    index, real, size = _selected(chosen, chunk)
    flat = features.flatten(0, 1)[index]
    each = weight[:, None].expand(chosen.shape).flatten()[index] * real
    loss = suffix_loss(
        flat,
        targets.flatten()[index],
        lambda part: space.logits(backbone, part),
        weight_ce=each,
        weight_kl=torch.zeros_like(each),
        chunk=size,
        kernel=kernel,
    )
    meter.space(space, "logits", batch=1, new=len(flat), backward=flat.requires_grad)
    nats = torch.zeros(chosen.numel(), device=flat.device)
    nats.index_add_(0, index, loss.cross_entropy * real)
    return loss.total, nats.view(chosen.shape)


def token_terms(
    backbone: Backbone,
    space: Space,
    process: Process,
    objective: ObjectiveConfig,
    estimate: Estimate,
    clean: Tensor,
    t: Time,
    ids: TokenIds,
    mask: Mask,
    free: Mask,
    position_ids: Int[Tensor, "batch time"],
    *,
    kernel: Kernel,
    meter: Meter,
) -> tuple[Float[Tensor, ""], dict[str, Tensor], Float[Tensor, " batch"]]:
    """Cross-entropies by the own head: of unknown tokens from denoised states, and of all tokens from clean ones.

    The former trains the denoiser, the latter the head alone: clean states have no gradient.

    Args:
        backbone, space, process: where logits, features and noise come from.
        objective: weights ``own`` (over time: ``own_time``) and ``read``.
        estimate: of the denoiser.
        clean: clean states.
        t: times.
        ids: tokens. mask: real ones; sums are divided by their number. free: those that are unknown.
        position_ids: of the tokens.
        kernel, meter: see :func:`own_loss`.

    Returns:
        Weighted terms; ``own`` and ``read`` in nats per counted position; ``own`` per sequence.
    """
    count = mask.sum().clamp_min(1)
    total, terms, per_sequence = estimate.features.new_zeros(()), {}, clean.new_zeros(len(ids), dtype=torch.float32)
    keywords = {"chunk": objective.logit_chunk, "kernel": kernel, "meter": meter}
    if objective.own > 0:
        share = (objective.own / count).expand(len(ids))
        if objective.own_time == "signal":
            alpha, sigma = (f(t).detach().square() for f in (process.schedule.alpha, process.schedule.sigma))
            share = share * alpha / (alpha + sigma)
        total, nats = own_loss(backbone, space, estimate.features, ids, free, share, **keywords)
        terms["own"] = nats.sum() / free.sum().clamp_min(1)
        per_sequence = nats.sum(-1) / free.sum(-1).clamp_min(1)
    features = space.clean_features(clean, position_ids) if objective.read > 0 else None
    if features is not None:
        meter.space(space, "clean_features", batch=len(ids), new=ids.shape[1], backward=torch.is_grad_enabled())
        share = (objective.read / count).expand(len(ids))
        loss, nats = own_loss(backbone, space, features, ids, mask, share, **keywords)
        total = total + loss
        terms["read"] = nats.sum() / count
    return total, terms, per_sequence


def bound_loss(
    backbone: Backbone,
    space: EmbeddingSpace,
    process: Process,
    objective: ObjectiveConfig,
    estimate: Callable[[Tensor, Time], Estimate],
    ids: TokenIds,
    t: Float[Tensor, " batch"],
    key: NoiseKey,
    mask: Mask,
    free: Mask,
    meter: Meter,
) -> tuple[Float[Tensor, ""], dict[str, Tensor], Float[Tensor, " batch"]]:
    """Plaid's variational bound of the unknown tokens given the known ones, in place of the cross-entropy at every time.

    Args:
        backbone, space, process: see :meth:`~dihal.spaces.embedding.EmbeddingSpace.bound_terms`.
        objective: ``own`` is the weight of the bound.
        estimate: runs the denoiser; here at t and at 0.
        ids, t, key: tokens, times, noise.
        mask: real tokens; the sum is divided by their number. free: those that are unknown.
        meter: told what is run, but for the calls of the denoiser.

    Returns:
        The weighted bound; ``bound`` and its parts in nats per unknown token; squared error of the clean-state
        estimate per sequence, which rises with noise.
    """
    found = space.bound_terms(backbone, process, estimate, ids, t, key, free)
    size, trained = {"batch": len(ids), "new": ids.shape[1]}, torch.is_grad_enabled()
    meter.space(space, "hidden", **size, backward=trained)  # a mean of rows under the softmax, as this is
    meter.space(space, "logits", **size, backward=trained)
    count = free.sum().clamp_min(1)
    parts = {"reconstruction": found.reconstruction, "diffusion": found.diffusion, "prior": found.prior}
    terms = {f"bound/{name}": (value.detach() * free).sum() / count for name, value in parts.items()}
    terms["bound"] = found.total.detach()
    time = t.double()
    alpha, sigma = process.schedule.alpha(time), process.schedule.sigma(time)
    slope = process.schedule.sigma_dot(time) / sigma - process.schedule.alpha_dot(time) / alpha
    error = (found.diffusion.double() / ((alpha / sigma) ** 2 * slope)[:, None] * free).sum(-1)
    per_sequence = (error / free.sum(-1).clamp_min(1)).float().detach()
    return objective.own * found.total * count / mask.sum().clamp_min(1), terms, per_sequence


@torch.no_grad()
def reencoded(
    backbone: Backbone,
    space: Space,
    objective: ObjectiveConfig,
    estimate: Estimate,
    batch: Batch,
    chosen: Mask,
    position_ids: Int[Tensor, "batch time"],
    meter: Meter,
) -> Tensor:
    """Clean states of the text in which the chosen tokens are the own head's most likely ones: what projection feeds back."""
    index, real, size = _selected(chosen, objective.logit_chunk)
    flat = estimate.features.flatten(0, 1)[index]
    tokens = batch.input_ids.flatten().clone()
    for start in range(0, len(flat), size):
        part = slice(start, start + size)
        read = space.logits(backbone, flat[part]).argmax(-1)
        # Padding repeats index 0; adding 0 to it is harmless where writing to it would not be.
        tokens.index_add_(0, index[part], (read - tokens[index[part]]) * real[part].long())
    meter.space(space, "logits", batch=1, new=len(flat))
    meter.space(space, "encode", batch=len(batch), new=chosen.shape[1])
    if space.needs_state():
        meter.prefix(space.split, batch=len(batch), new=chosen.shape[1])
    with own_dtype(backbone):
        return space.encode(
            backbone,
            tokens.view(chosen.shape),
            attention_mask=None if batch.full else batch.attention_mask,
            position_ids=position_ids,
        )


def suffix_terms(
    backbone: Backbone,
    space: Space,
    objective: ObjectiveConfig,
    batch: Batch,
    state: State,
    estimate: Estimate,
    known: Mask,
    free: Mask,
    position_ids: Int[Tensor, "batch time"],
    *,
    every: int,
    kernel: Kernel,
    meter: Meter,
    reading: AbstractContextManager[None],
    adapters: tuple[Tensor, ...],
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Cross-entropy and KL of the next token, read by the frozen suffix from known true and unknown estimated states.

    Only positions whose next token is to be written count. Averaged over those of the sequences read.

    Args:
        backbone: its blocks from the split on.
        space: turns the estimate into h^split.
        objective: weights of the terms.
        batch: the tokens.
        state: true h^split of all positions.
        estimate: of the denoiser.
        known: positions whose true state is read.
        free: positions whose token is unknown.
        position_ids: of the tokens.
        every: only every so many-th sequence is read.
        kernel: see :func:`~dihal.spaces.recovery.suffix_loss`.
        meter: told what is run.
        reading: scope in which the suffix reads the estimate, with its adapters; the teacher is the frozen suffix.
        adapters: weights of the adapters that are active in it.

    Raises:
        UsageError: ``every`` does not divide the sequences.
    """
    if batch.input_ids.shape[0] % every:
        raise UsageError(
            f"method.objective.suffix_every is {every}, which does not divide the micro-batch of "
            f"{batch.input_ids.shape[0]} sequences. Change one of them."
        )
    rows = slice(None, None, every)
    state, known, positions = state[rows], known[rows], position_ids[rows]
    estimate = Estimate(features=estimate.features[rows], x0=None if estimate.x0 is None else estimate.x0[rows])
    keywords = {"attention_mask": None if batch.full else batch.attention_mask[rows], "position_ids": positions}
    counted = free[rows].roll(-1, dims=1) & batch.loss_mask[rows]
    index, real, size = _selected(counted, objective.logit_chunk)
    share = real / real.sum().clamp_min(1)
    with own_dtype(backbone):
        teacher = None
        if objective.kl > 0:
            with torch.no_grad():
                teacher = backbone.suffix_features(state, space.split, **keywords).flatten(0, 1)[index]
        hidden = torch.where(known[..., None], state, space.hidden(backbone, estimate, positions).to(state.dtype))
        with reading:
            features = backbone.suffix_features(hidden, space.split, **keywords).flatten(0, 1)[index]
        loss = suffix_loss(
            features,
            batch.input_ids[rows].roll(-1, dims=1).flatten()[index],
            backbone.head,
            weight_ce=objective.cross_entropy * share,
            weight_kl=objective.kl * share,
            teacher=teacher,
            chunk=size,
            kernel=kernel,
        )
    sizes = {"batch": hidden.shape[0], "new": hidden.shape[1]}
    backward = features.requires_grad
    meter.space(space, "hidden", batch=hidden.shape[0], new=hidden.shape[1], backward=backward)
    meter.suffix(space.split, **sizes, adapters=adapters, backward=backward)
    meter.head(len(features), backward=backward)
    if teacher is not None:
        meter.suffix(space.split, **sizes, part="teacher_suffix")
        meter.head(len(features))
    terms = {}
    if objective.cross_entropy > 0:
        terms["cross_entropy"] = (loss.cross_entropy * share).sum()
    if objective.kl > 0:
        terms["kl"] = (loss.kl * share).sum()
    return loss.total, terms
