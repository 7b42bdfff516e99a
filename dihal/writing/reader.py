"""Tokens of a block, read by the own head, by the frozen stack, or by both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from dihal.errors import UsageError
from dihal.meter import Meter
from dihal.types import PerPosition, State, TokenIds
from dihal.writing.draw import TokenNoise

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.spaces.base import Space

__all__ = ["Reader"]

_NUMBERS = 1 << 25
"""Logits that exist at once, per readout."""


class Reader:
    """Draws tokens from log p = (1 - w) log own + w log suffix, normalised (a log-linear mix, a product of experts).

    The normalising constants of the three distributions cancel in the Gumbel-max rule, so the mix is one of logits.

    Args:
        space: gives the own head.
        backbone: gives the head of the suffix.
        noise: of the tokens; None where every temperature is 0.
        banned: a token that is never written, or None.
        meter: told what is run.
    """

    def __init__(
        self, space: Space, backbone: Backbone, *, noise: TokenNoise | None, banned: int | None, meter: Meter
    ) -> None:
        self.space = space
        self.backbone = backbone
        self.noise = noise
        self.banned = banned
        self.meter = meter
        self._finite: Tensor | None = None

    def _logits(
        self, own: Tensor | None, suffix: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        # Copies without the banned token.
        found: list[Tensor | None] = [None, None]
        if own is not None:
            found[0] = self.space.logits(self.backbone, own).to(dtype, copy=True)
            self.meter.space(self.space, "logits", batch=1, new=len(own))
        if suffix is not None:
            found[1] = self.backbone.head(suffix[None])[0].to(dtype, copy=True)
            self.meter.head(len(suffix))
        if self.banned is not None:
            for logits in found:
                if logits is not None:
                    logits[:, self.banned] = float("-inf")
        return found[0], found[1]

    def read(
        self,
        own: Float[Tensor, "batch time k"],
        suffix: State | None,
        weights: Sequence[float],
        *,
        first: bool,
        temperature: float,
        step: int,
        sure: bool,
    ) -> tuple[list[TokenIds], PerPosition | None]:
        """Draw every position's token, once per weight.

        Args:
            own: features of the own head.
            suffix: features, before the backbone's head, that predict these positions; None where no weight needs them.
            weights: w of each reading asked for. All use the same noise.
            first: column 0 is the first of the text, which the suffix cannot predict: the own head reads it.
            temperature: divides log p; 0: the most likely token.
            step: keys the noise where it is fresh at each step.
            sure: also return how likely the tokens are.

        Returns:
            Tokens per weight; if ``sure``, log p, in nats at temperature 1, of the tokens of the first weight.
        """
        batch, time = own.shape[:2]
        alone = first or any(weight < 1.0 for weight in weights)
        flat_own = own.flatten(0, 1)
        flat_suffix = None if suffix is None else suffix.flatten(0, 1)
        vocab = self.backbone.vocab_size
        chunk = max(1, _NUMBERS // vocab)
        drawn: list[list[Tensor]] = [[] for _ in weights]
        confidence: list[Tensor] = []
        # Draws take fp64: in fp32 the tail of a distribution is lost. The largest of some numbers does not.
        dtype = torch.float64 if temperature > 0 else torch.float32
        blind = torch.zeros(batch, time, dtype=torch.bool, device=own.device)
        blind[:, 0] = first
        blind = blind.flatten()
        for start in range(0, batch * time, chunk):
            part = slice(start, min(start + chunk, batch * time))
            logits_own, logits_suffix = self._logits(
                flat_own[part] if alone else None, None if flat_suffix is None else flat_suffix[part], dtype
            )
            noise = self.noise.rows(part.start, part.stop, step) if self.noise is not None and temperature > 0 else None
            for index, weight in enumerate(weights):
                if weight in (0.0, 1.0):
                    scores = logits_suffix if weight else logits_own
                else:
                    # Not lerp: a banned token is -inf in both, and its difference is no number.
                    scores = ((1 - weight) * logits_own).add_(logits_suffix, alpha=weight)
                if first and weight > 0:
                    scores = torch.where(blind[part, None], logits_own, scores)
                tokens = (scores if noise is None else torch.add(noise, scores, alpha=1 / temperature)).argmax(-1)
                drawn[index].append(tokens)
                finite = torch.isfinite(scores.amax(-1)).all()
                self._finite = finite if self._finite is None else self._finite & finite
                if sure and index == 0:
                    confidence.append(scores.gather(-1, tokens[:, None]).squeeze(-1) - scores.logsumexp(-1))
        shape = (batch, time)
        likely = torch.cat(confidence).view(shape).float() if sure else None
        return [torch.cat(parts).view(shape) for parts in drawn], likely

    def check(self) -> None:
        """Refuse tokens drawn from logits that were not numbers; asked once, at the end, to keep a GPU busy.

        Raises:
            UsageError: logits NaN or infinite.
        """
        if self._finite is not None and not bool(self._finite):
            raise UsageError("the logits to write from are NaN or infinite: the checkpoint diverged or is damaged.")
