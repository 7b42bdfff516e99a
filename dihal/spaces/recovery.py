"""Losses read off by the frozen suffix, without ever holding the logits of a whole batch.

The head of a 128k-token vocabulary makes (positions, V) the largest tensor of a training step by far.
Both terms are functions of the features before the head and their gradient with respect to the
logits is known in closed form given one chunk: so value and gradient are computed together, chunk
by chunk, in the forward pass, and only the gradient of the features (positions, d) is kept.
(``torch.nn.functional.linear_cross_entropy`` has neither weights per position, nor a KL, nor heads that cap their logits.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Kernel", "SuffixLoss", "divergence", "plain_rows", "suffix_loss"]

Head = Callable[[Tensor], Tensor]
Kernel = Callable[..., tuple[Tensor, Tensor, Tensor]]

_PLAIN = 1 << 22
"""Logits of one call of the uncompiled kernel: its temporaries are half a dozen tensors of that size in fp32."""


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


def divergence(
    logits: Float[Tensor, "positions vocab"],
    teacher: Float[Tensor, "positions vocab"] | None,
    targets: Int[Tensor, " positions"],
    weight_ce: Float[Tensor, " positions"],
    weight_kl: Float[Tensor, " positions"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return cross-entropy and KL per position and the gradient of their weighted sum with respect to the logits.

    With q = softmax(logits) and p = softmax(teacher): d CE = q - onehot(target), d KL(p || q) = q - p. Normalised
    in fp32; the gradient has the logits' dtype. Plain tensor code, so that ``torch.compile`` makes one kernel of
    it: uncompiled, a dozen (positions, vocab) tensors in fp32 pass through memory.
    """
    log_q = F.log_softmax(logits.float(), dim=-1)
    cross_entropy = -log_q.gather(-1, targets[:, None]).squeeze(-1)
    q = log_q.exp()
    gradient = (weight_ce + weight_kl)[:, None] * q
    # Written as a comparison rather than a scatter: it fuses.
    onehot = torch.arange(logits.shape[-1], device=logits.device)[None] == targets[:, None]
    gradient = gradient - weight_ce[:, None] * onehot
    if teacher is None:
        return cross_entropy, torch.zeros_like(cross_entropy), gradient.to(logits.dtype)
    log_p = F.log_softmax(teacher.float(), dim=-1)
    p = log_p.exp()
    # p log p = 0 where p = 0: a masked logit is -inf in both.
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    return cross_entropy, kl, (gradient - weight_kl[:, None] * p).to(logits.dtype)


def plain_rows(vocab: int) -> int:
    """Positions of one call of the uncompiled :func:`divergence`."""
    return max(1, _PLAIN // vocab)


def _in_rows(
    logits: Tensor, teacher: Tensor | None, targets: Tensor, weight_ce: Tensor, weight_kl: Tensor, kernel: Kernel
) -> tuple[Tensor, Tensor, Tensor]:
    # A compiled kernel has no temporaries, and one shape. The plain one takes some rows at a time.
    rows = plain_rows(logits.shape[-1])
    if kernel is not divergence or len(logits) <= rows:
        return kernel(logits, teacher, targets, weight_ce, weight_kl)
    cross_entropy, kl = weight_ce.new_empty(len(logits)), weight_ce.new_empty(len(logits))
    gradient = torch.empty_like(logits)
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        other = None if teacher is None else teacher[part]
        cross_entropy[part], kl[part], gradient[part] = kernel(
            logits[part], other, targets[part], weight_ce[part], weight_kl[part]
        )
    return cross_entropy, kl, gradient


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
        kernel: Kernel,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_grad = features.requires_grad
        count = features.shape[0]
        gradient = torch.empty_like(features) if wants_grad else None
        cross_entropy = torch.zeros(count, dtype=torch.float32, device=features.device)
        kl = torch.zeros_like(cross_entropy)
        if teacher is None:
            weight_kl = torch.zeros_like(weight_kl)
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            with torch.set_grad_enabled(wants_grad):
                leaf = features[part].detach().requires_grad_(wants_grad)
                logits = head(leaf.unsqueeze(0)).squeeze(0)
            with torch.no_grad():
                other = None if teacher is None else head(teacher[part].unsqueeze(0)).squeeze(0)
                cross_entropy[part], kl[part], slope = _in_rows(
                    logits.detach(), other, targets[part], weight_ce[part], weight_kl[part], kernel
                )
            if gradient is not None:
                # Through the head, whatever it is: some families cap their logits.
                (gradient[part],) = torch.autograd.grad(logits, leaf, slope)
        ctx.gradient = gradient
        total = (cross_entropy * weight_ce).sum() + (kl * weight_kl).sum()
        ctx.mark_non_differentiable(cross_entropy, kl)
        return total, cross_entropy, kl

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradient = ctx.gradient
        scaled = None if gradient is None else gradient * grad_total.to(gradient.dtype)
        return scaled, None, None, None, None, None, None, None


def suffix_loss(
    features: Float[Tensor, "positions dim"],
    targets: Int[Tensor, " positions"],
    head: Head,
    *,
    weight_ce: Float[Tensor, " positions"],
    weight_kl: Float[Tensor, " positions"],
    teacher: Float[Tensor, "positions dim"] | None = None,
    chunk: int = 1024,
    kernel: Kernel = divergence,
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
        kernel: :func:`divergence`, or a compiled one.

    Logits are made in the features' dtype and normalised in fp32.
    """
    total, cross_entropy, kl = _ChunkedLoss.apply(features, teacher, targets, weight_ce, weight_kl, head, chunk, kernel)
    return SuffixLoss(total=total, cross_entropy=cross_entropy, kl=kl)
