"""Losses read off by the frozen suffix, without ever holding the logits of a whole batch.

The head of a 128k-token vocabulary makes (positions, V) the largest tensor of a training step by far.
Both terms are functions of the features before the head and their gradient with respect to the
logits is known in closed form given one chunk: so value and gradient are computed together, chunk
by chunk, in the forward pass, and only the gradient of the features (positions, d) is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["SuffixLoss", "suffix_loss"]

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class SuffixLoss:
    """Outcome of :func:`suffix_loss`.

    Attributes:
        total: weighted sum over positions; differentiable in the features.
        cross_entropy: per position, nats, detached (zeros where not asked for).
        kl: per position, nats, detached (zeros where not asked for).
    """

    total: Float[Tensor, ""]
    cross_entropy: Float[Tensor, " positions"]
    kl: Float[Tensor, " positions"]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        teacher: Tensor | None,
        targets: Tensor,
        weight_ce: Tensor,
        weight_kl: Tensor,
        head: Head,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_grad = features.requires_grad
        count = features.shape[0]
        gradient = torch.empty_like(features) if wants_grad else None
        cross_entropy = torch.zeros(count, dtype=torch.float32, device=features.device)
        kl = torch.zeros_like(cross_entropy)
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            with torch.set_grad_enabled(wants_grad):
                leaf = features[part].detach().requires_grad_(wants_grad)
                log_q = F.log_softmax(head(leaf.unsqueeze(0)).squeeze(0).float(), dim=-1)
                ce = F.nll_loss(log_q, targets[part], reduction="none")
                loss = (ce * weight_ce[part]).sum()
                if teacher is not None:
                    with torch.no_grad():
                        log_p = F.log_softmax(head(teacher[part].unsqueeze(0)).squeeze(0).float(), dim=-1)
                    # sum p (log p - log q); p log p = 0 where p = 0
                    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
                    loss = loss + (divergence * weight_kl[part]).sum()
                    kl[part] = divergence.detach()
                cross_entropy[part] = ce.detach()
            if gradient is not None:
                (gradient[part],) = torch.autograd.grad(loss, leaf)
        ctx.gradient = gradient
        total = (cross_entropy * weight_ce).sum() + (kl * weight_kl).sum()
        ctx.mark_non_differentiable(cross_entropy, kl)
        return total, cross_entropy, kl

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradient = ctx.gradient
        scaled = None if gradient is None else gradient * grad_total.to(gradient.dtype)
        return scaled, None, None, None, None, None, None


def suffix_loss(
    features: Float[Tensor, "positions dim"],
    targets: Int[Tensor, " positions"],
    head: Head,
    *,
    weight_ce: Float[Tensor, " positions"],
    weight_kl: Float[Tensor, " positions"],
    teacher: Float[Tensor, "positions dim"] | None = None,
    chunk: int = 1024,
) -> SuffixLoss:
    """Cross-entropy of ``targets`` and KL(teacher || student), through a frozen head.

    Args:
        features: student features after the final norm, before the head.
        targets: next tokens; any valid id where ``weight_ce`` is 0.
        head: maps (1, n, d) features to (1, n, V) logits; not trained here.
        weight_ce: weight of each position's cross-entropy in the total.
        weight_kl: weight of each position's KL in the total.
        teacher: the backbone's own features; None skips the KL.
        chunk: positions whose logits exist at once.

    Logits are made in the features' dtype and normalised in fp32.
    """
    total, cross_entropy, kl = _ChunkedLoss.apply(features, teacher, targets, weight_ce, weight_kl, head, chunk)
    return SuffixLoss(total=total, cross_entropy=cross_entropy, kl=kl)
