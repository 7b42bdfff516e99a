"""Tokens from logits, in fp64, by the Gumbel-max rule with keyed noise.

argmax_w (log p(w) / temperature + g_w), with independent Gumbel g_w, is a draw from softmax(log p / temperature)
(Gumbel 1954; Maddison et al. 2014). With the *same* g for two distributions the draws differ as seldom as
independent noise per token allows: they stay as long as the winner's lead does. The inverse of the cumulative
distribution at a common uniform number has no such stability: a little mass moved from the first to the last
token of a vocabulary shifts every boundary in between. That is why a text that is read again and again while it
is denoised uses Gumbel noise.

A position needs V numbers, so the generator must be cheap. SplitMix64 (Steele, Lea, Flood 2014) mixes a counter
with a dozen integer operations, a tenth of Philox; the stream's key comes from ``dihal.random``. So the noise
depends on (seed, purpose, id, token), and not on batch, block or device.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dihal.random import random_words

__all__ = ["TokenNoise", "gumbel", "kept_bytes", "splitmix64"]

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
_CPU_BYTES = 1 << 29
"""Noise that a CPU keeps between steps; a GPU keeps up to a quarter of what is free."""


def _shifted(word: Tensor, shift: int) -> Tensor:
    # A logical shift: torch's own carries the sign along.
    return (word >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def splitmix64(key: Int[Tensor, " rows"], count: int) -> Int[Tensor, "rows count"]:
    """Return the first ``count`` outputs of SplitMix64 seeded with each key; 64 bits, as signed integers."""
    counter = torch.arange(1, count + 1, device=key.device) * _GOLDEN  # wraps, as the algorithm does
    word = key[:, None] + counter
    for shift, multiplier in _ROUNDS:
        word.bitwise_xor_(_shifted(word, shift)).mul_(multiplier)
    return word.bitwise_xor_(_shifted(word, 31))


def gumbel(seed: int, ids: Int[Tensor, " rows"], purpose: str, vocab: int) -> Float[Tensor, "rows vocab"]:
    """Return standard Gumbel numbers in fp64 from 52-bit uniforms, keyed by (seed, purpose, id, index)."""
    words = random_words(seed, ids, purpose, (2,))
    bits = _shifted(splitmix64((words[:, 0] << 32) | words[:, 1], vocab), 12)
    # In the open interval, both ends out of reach: (2^52 - 1/2) / 2^52 is exact.
    return bits.double().add_(0.5).mul_(2.0**-52).log_().neg_().log_().neg_()


def kept_bytes(device: torch.device) -> int:
    """How much noise a device may keep between steps."""
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else _CPU_BYTES


class TokenNoise:
    """Gumbel noise of a block's positions.

    Args:
        seed: of the draws.
        keys: key of each position (see :func:`~dihal.writing.known.position_keys`).
        vocab: V.
        common: the same noise at every step; off: fresh noise at each.
        most_bytes: see :func:`kept_bytes`.

    Common noise is kept between steps where memory allows; kept or made again, it is the same to the bit.
    """

    def __init__(
        self, seed: int, keys: Int[Tensor, "batch time"], vocab: int, *, common: bool, most_bytes: int
    ) -> None:
        self.seed = seed
        self.keys = keys.flatten()
        self.vocab = vocab
        self.common = common
        self._kept: Tensor | None = None
        self._made: set[int] = set()
        self._keeps = common and 8 * self.keys.numel() * vocab <= most_bytes

    def rows(self, start: int, stop: int, step: int) -> Float[Tensor, "rows vocab"]:
        """Noise of flat positions start .. stop - 1 at a step. Ask for the same chunks at every step."""
        purpose = "token" if self.common else f"token {step}"
        if not self._keeps:
            return gumbel(self.seed, self.keys[start:stop], purpose, self.vocab)
        if self._kept is None:
            self._kept = torch.empty(self.keys.numel(), self.vocab, dtype=torch.float64, device=self.keys.device)
        if start not in self._made:
            self._kept[start:stop] = gumbel(self.seed, self.keys[start:stop], purpose, self.vocab)
            self._made.add(start)
        return self._kept[start:stop]
