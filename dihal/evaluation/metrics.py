"""Numbers per position, from log-probabilities and from states. Nothing here runs a model.

Logits are made and read in chunks of positions, so that no (T, V) tensor of a whole sequence exists.
Log-softmax in fp32, sums over positions in fp64. Equal logits give a KL of exactly 0 and an agreement of exactly 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dihal.errors import UsageError
from dihal.evaluation.sums import Contributions, DocumentSums, contributions

__all__ = [
    "SINK_FACTOR",
    "Distribution",
    "StateError",
    "StateMoments",
    "Teacher",
    "chunk_positions",
    "compare_distribution",
    "compare_states",
    "sink_threshold",
    "teacher_chunk",
]

SINK_FACTOR = 10.0
"""Position 0, and tokens whose norm exceeds this multiple of the median over the evaluated tokens, are sinks."""

_CHUNK_ELEMENTS = 1 << 25
_CHUNK_MAX = 1_024


def chunk_positions(vocab_size: int) -> int:
    """Return how many positions' logits may exist at once (memory, not results): at most 1,024."""
    return max(16, min(_CHUNK_MAX, _CHUNK_ELEMENTS // vocab_size))


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The backbone's next-token distribution at some positions."""

    log_p: Float[Tensor, "positions vocab"]
    p: Float[Tensor, "positions vocab"]
    top: Int[Tensor, " positions"]
    """Most likely token."""


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Per position: KL(backbone || row) and NLL in nats, agreement in {0, 1}, margin in nats (see `definitions`)."""

    kl: Float[Tensor, " positions"]
    nll: Float[Tensor, " positions"]
    agreement: Float[Tensor, " positions"]
    margin: Float[Tensor, " positions"]


def teacher_chunk(logits: Float[Tensor, "positions vocab"]) -> Teacher:
    """Normalise the backbone's logits once for all rows."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    return Teacher(log_p=log_p, p=log_p.exp(), top=log_p.max(dim=-1).indices)


def compare_distribution(
    teacher: Teacher,
    logits: Float[Tensor, "positions vocab"],
    targets: Int[Tensor, " positions"],
) -> Distribution:
    """Compare a row's logits with the backbone's distribution.

    KL = sum over w of p(w) (log p(w) - log q(w)). Raises UsageError where a logit is NaN.
    """
    log_q = torch.log_softmax(logits.float(), dim=-1)
    best, first = log_q.max(dim=-1)
    if not bool(torch.isfinite(best).all()):
        raise UsageError("logits are NaN or infinite. Load the backbone in float32 or bfloat16; check the checkpoint.")
    agrees = first == teacher.top
    wanted = log_q.gather(-1, teacher.top.unsqueeze(-1)).squeeze(-1)
    nll = -log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    # The runner-up where the row agrees: hide the winner, look again, put it back.
    place = first.unsqueeze(-1)
    second = log_q.scatter_(-1, place, float("-inf")).amax(-1)
    log_q.scatter_(-1, place, best.unsqueeze(-1))
    margin = torch.where(agrees, best - second, wanted - best)
    difference = log_q.neg_().add_(teacher.log_p)
    kl = torch.linalg.vecdot(teacher.p, difference).double()
    odd = ~torch.isfinite(kl)
    if bool(odd.any()):
        # A token of probability 0 under both contributes nothing: 0 * inf must not become NaN.
        p = teacher.p[odd]
        kl[odd] = torch.where(p > 0, p * difference[odd], 0.0).sum(-1, dtype=torch.float64)
    return Distribution(kl=kl, nll=nll.double(), agreement=agrees.double(), margin=margin.double())


@dataclass(frozen=True, kw_only=True)
class StateError:
    """Per position, fp64: |h_hat - h|^2, cosine(h_hat, h), |h|^2."""

    squared_error: Float[Tensor, " positions"]
    cosine: Float[Tensor, " positions"]
    energy: Float[Tensor, " positions"]


def compare_states(estimate: Float[Tensor, "positions dim"], state: Float[Tensor, "positions dim"]) -> StateError:
    """Compare estimated with true states; equal states give error 0 and cosine 1 exactly.

    Raises:
        UsageError: an estimate that is not finite.
    """
    if not bool(torch.isfinite(estimate).all()):
        bad = int((~torch.isfinite(estimate).all(-1)).sum())
        raise UsageError(f"{bad} estimated states are NaN or infinite: the checkpoint diverged or is damaged.")
    left, right = estimate.double(), state.double()
    energy = right.square().sum(-1)
    scale = (left.square().sum(-1) * energy).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return StateError(
        squared_error=(left - right).square().sum(-1),
        cosine=(left * right).sum(-1) / scale,
        energy=energy,
    )


def sink_threshold(norms: Float[Tensor, " positions"]) -> float:
    """Return the largest norm of an ordinary token: SINK_FACTOR times the median norm beyond position 0.

    Raises:
        UsageError: no token beyond position 0, or norms that are not finite.
    """
    if norms.numel() == 0:
        raise UsageError("no token beyond the first of each window: raise `tokens` or data.sequence_length.")
    if not bool(torch.isfinite(norms).all()):
        bad = int((~torch.isfinite(norms)).sum())
        raise UsageError(f"{bad} states of the backbone are NaN or infinite: load it in float32 or bfloat16.")
    return SINK_FACTOR * float(norms.double().median())


class StateMoments:
    """Sum of |h - mean|^2 per document over ordinary tokens, with ``mean`` that of all ordinary tokens.

    Sums are taken around ``shift`` (any point near the mean) in fp64 and moved to the mean at the end, which
    loses no digits and needs the states only once.
    """

    def __init__(self, documents: int, shift: Float[Tensor, " dim"]) -> None:
        self._shift = shift.double()
        self._sums = DocumentSums(documents, {"count": (), "sum": (shift.shape[0],), "square": ()})

    def part(
        self,
        state: Float[Tensor, "positions dim"],
        documents: Int[Tensor, " positions"],
        ordinary: Bool[Tensor, " positions"],
        *,
        begun: int,
    ) -> Contributions:
        """Return what the ordinary positions of a batch contribute, whichever process adds it.

        Args:
            state: states.
            documents, begun: see :func:`dihal.evaluation.sums.contributions`.
            ordinary: which positions are.
        """
        delta = state[ordinary].double() - self._shift
        values = {"count": torch.ones_like(delta[:, 0]), "sum": delta, "square": delta.square().sum(-1)}
        return contributions(documents[ordinary], values, begun=begun)

    def add(self, part: Contributions) -> None:
        """Add what a batch contributes; batches come in order."""
        self._sums.add(part)

    def count(self) -> Float[Tensor, " documents"]:
        """Ordinary tokens per document."""
        return self._sums["count"]

    def variance(self) -> Float[Tensor, " documents"]:
        """Sum over each document's ordinary tokens of |h - mean|^2."""
        count, total, square = (self._sums[name] for name in ("count", "sum", "square"))
        drift = total.sum(0) / count.sum().clamp_min(1)
        moved = square - 2 * total @ drift + count * drift.square().sum()
        return moved.clamp_min(0)
