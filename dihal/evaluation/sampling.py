"""Categorical sampling in fp64, the same for every row.

Sampling from fp32 probabilities (or Gumbel noise) loses the tail of the distribution and flatters
perplexity (arXiv 2409.02908). Here the inverse of the cumulative distribution is taken in fp64 at a 53-bit
uniform keyed by (seed, sample, token index), so that rows see common random numbers and a sample does not
depend on its batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dihal.errors import UsageError
from dihal.random import random_words

__all__ = ["FixedDraws", "draw_tokens", "uniform53"]


def uniform53(seed: int, ids: Int[Tensor, " batch"], purpose: str) -> Float[Tensor, " batch"]:
    """Return fp64 uniforms in the open interval (0, 1) with 52 random bits, keyed by (seed, id, purpose)."""
    words = random_words(seed, ids, purpose, (2,))
    bits = (words[..., 0] << 20) | (words[..., 1] >> 12)
    return (bits.double() + 0.5) * 2.0**-52


def draw_tokens(
    logits: Float[Tensor, "batch vocab"],
    uniforms: Float[Tensor, " batch"],
    *,
    temperature: float,
    banned: int | None = None,
) -> Int[Tensor, " batch"]:
    """Draw one token per row.

    Args:
        logits: next-token logits of any float type.
        uniforms: fp64, in (0, 1); unused at temperature 0.
        temperature: divides the logits; 0: the most likely token.
        banned: a token that is never drawn (the end token, for texts of fixed length).

    Raises:
        UsageError: a negative temperature, or logits without a finite maximum.
    """
    if temperature < 0:
        raise UsageError(f"the temperature must not be negative, got {temperature}. 0 is greedy.")
    scores = logits.double()
    if banned is not None:
        scores = scores.clone()
        scores[:, banned] = float("-inf")
    best = scores.max(dim=-1)
    if not bool(torch.isfinite(best.values).all()):
        raise UsageError("the logits to sample from are NaN or infinite: the checkpoint diverged or is damaged.")
    if temperature == 0:
        return best.indices
    weights = ((scores - best.values.unsqueeze(-1)) / temperature).exp()
    cumulative = weights.cumsum(-1)
    # Scaled by the sum that was actually reached: a uniform just below 1 still lands inside.
    place = uniforms.to(cumulative.device).unsqueeze(-1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, place, right=True).squeeze(-1)
    last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(drawn, last)


class FixedDraws:
    """A logits processor for ``generate(do_sample=False)``: all but the drawn token get -inf.

    Args:
        prompt_length: tokens of the prompt; the draw of token k is keyed by k - prompt_length.
        sample_ids: key of each row's draws.
        seed: seed of the draws.
        temperature, banned: see :func:`draw_tokens`.
    """

    def __init__(
        self,
        *,
        prompt_length: int,
        sample_ids: Int[Tensor, " batch"],
        seed: int,
        temperature: float,
        banned: int | None,
    ) -> None:
        self.prompt_length = prompt_length
        self.sample_ids = sample_ids
        self.seed = seed
        self.temperature = temperature
        self.banned = banned

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Replace the scores by the outcome of the draw."""
        step = input_ids.shape[1] - self.prompt_length
        uniforms = uniform53(self.seed, self.sample_ids, f"token {step}")
        drawn = draw_tokens(scores, uniforms, temperature=self.temperature, banned=self.banned)
        return torch.full_like(scores, float("-inf")).scatter_(-1, drawn.unsqueeze(-1).to(scores.device), 0.0)
