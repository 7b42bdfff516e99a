"""What a method is made with: its checks, its loss record, its cache, its corrupted tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dihal.config.method import MethodConfig
from dihal.errors import UsageError
from dihal.nn.cache import DenoiserCache
from dihal.random import uniform
from dihal.types import Padding, TokenIds

__all__ = ["LossOutput", "SamplingCache", "check_method", "corrupt", "positions_of"]


def positions_of(attention_mask: Padding) -> Int[Tensor, "batch total"]:
    """Position ids under left or right padding: the first real token of each row is 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """Outcome of one micro-batch.

    Attributes:
        total: scalar to differentiate; weighted mean over counted positions.
        terms: detached scalars by name (``state``, ``explained``, ``cross_entropy``, ``kl``).
        tokens: positions denoised, the unit of the budget.
    """

    total: Float[Tensor, ""]
    terms: dict[str, Tensor]
    tokens: int


class SamplingCache:
    """One denoiser cache per function evaluation of the sampler.

    Position i's evaluation number k attends to what earlier positions looked like in *their*
    evaluation number k. With one cache per evaluation, writing a text token by token repeats the
    arithmetic of denoising the whole text at once: same noise, same time, same keys and values.
    """

    def __init__(self) -> None:
        self.caches: list[DenoiserCache] = []

    def at(self, index: int) -> DenoiserCache:
        """Return the cache of evaluation ``index``, made on first use."""
        while len(self.caches) <= index:
            self.caches.append(DenoiserCache())
        return self.caches[index]

    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Select batch rows, as beam search does."""
        for cache in self.caches:
            cache.reorder(rows)

    @property
    def length(self) -> int:
        """Positions held."""
        return self.caches[0].length if self.caches else 0


def check_method(config: MethodConfig) -> None:
    """Refuse options that contradict each other.

    Raises:
        UsageError: naming the options and what to set.
    """
    if config.split is None:
        raise UsageError("method.split is not set. Give method.split, or method.split_from a scores.json.")
    if config.regime == "replace" and config.denoiser.mask != "causal":
        raise UsageError(
            f"regime 'replace' needs method.denoiser.mask 'causal', not {config.denoiser.mask!r}: "
            "a bridge that sees later tokens leaks the answer."
        )
    if config.sampler.guidance != 1.0 and config.objective.condition_dropout == 0.0:
        raise UsageError(
            "method.sampler.guidance needs method.objective.condition_dropout > 0: "
            "without it the unconditional estimate is never trained."
        )
    weights = (config.objective.state, config.objective.cross_entropy, config.objective.kl)
    if min(weights) < 0 or max(weights) == 0:
        raise UsageError(
            "the weights method.objective.state, .cross_entropy and .kl must not be negative, "
            f"and one must be positive; got {weights}."
        )
    if config.lora.rank > 0 and config.objective.cross_entropy == config.objective.kl == 0.0:
        raise UsageError(
            "method.lora needs a loss read by the suffix: set method.objective.kl or .cross_entropy above 0, "
            "or method.lora.rank to 0."
        )
    if not 0.0 <= config.objective.corruption <= 0.5:
        raise UsageError(f"method.objective.corruption is {config.objective.corruption}; it must be in [0, 0.5].")
    if config.objective.corruption > 0 and config.objective.cross_entropy > 0:
        raise UsageError(
            "method.objective.corruption makes the next token random: it cannot be trained with cross_entropy. "
            "Set one of them to 0."
        )


def corrupt(ids: TokenIds, sample_ids: Int[Tensor, " batch"], mean: float, seed: int, vocab: int) -> TokenIds:
    """Replace a share of the tokens, uniform in [0, 2 ``mean``] per sequence, by random ones; never the first."""
    rate = 2 * mean * uniform(seed, sample_ids, "corruption/rate").unsqueeze(-1)
    chosen = uniform(seed, sample_ids, "corruption/place", (ids.shape[1],)) < rate
    chosen[:, 0] = False
    random = (vocab * uniform(seed, sample_ids, "corruption/token", (ids.shape[1],), dtype=torch.float64)).long()
    return torch.where(chosen, random, ids)
