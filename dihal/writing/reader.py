"""Tokens of a block, read by the own head, by the frozen stack, or by both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dihal.meter import Meter
from dihal.types import PerPosition, State, TokenIds
from dihal.writing.draw import TokenNoise

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.spaces.base import Space

__all__ = ["Reader"]

_NUMBERS = {"cpu": 1 << 25, "cuda": 1 << 27}
"""Logits that exist at once, per readout: few where caches are small, many where starting a kernel costs most."""


def _draw(
    own: Tensor | None,
    suffix: Tensor | None,
    noise: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    blind: Tensor,
    banned: Tensor,
    sure: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, whether every score that counts is a number, and log p of the tokens if ``sure``.

    One pass over the logits where compiled: written out, it is ten, and they are what writing spends its time on.
    """
    # Draws take fp64: in fp32 the tail of a distribution is lost. The largest of some numbers does not.
    dtype = torch.float32 if noise is None else torch.float64
    if own is None or suffix is None:
        scores = suffix if own is None else own
        assert scores is not None
        scores = scores.to(dtype)
    else:
        # Not lerp: a column the suffix cannot predict counts by the own head alone, whatever the other holds.
        mixed = own.to(dtype) * (1 - weight).to(dtype) + suffix.to(dtype) * weight.to(dtype)
        scores = torch.where(blind[:, None], own.to(dtype), mixed)
    scores = scores.masked_fill(banned, float("-inf"))
    tokens = (scores if noise is None else noise + scores * scale).argmax(-1)
    likely = scores.gather(-1, tokens[:, None]).squeeze(-1) - scores.logsumexp(-1) if sure else None
    return tokens, torch.isfinite(scores.amax(-1)).all(), likely


@cache
def _drawer(device: str) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    return torch.compile(_draw, dynamic=True) if device == "cuda" else _draw


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

    def _logits(self, own: Tensor | None, suffix: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        found: list[Tensor | None] = [None, None]
        if own is not None:
            found[0] = self.space.logits(self.backbone, own)
            self.meter.space(self.space, "logits", batch=1, new=len(own))
        if suffix is not None:
            found[1] = self.backbone.head(suffix[None])[0]
            self.meter.head(len(suffix))
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
        device = own.device
        alone = first or any(weight < 1.0 for weight in weights)
        flat_own = own.flatten(0, 1)
        flat_suffix = None if suffix is None else suffix.flatten(0, 1)
        vocab = self.backbone.vocab_size
        chunk = max(1, _NUMBERS[device.type] // vocab)
        drawn: list[list[Tensor]] = [[] for _ in weights]
        confidence: list[Tensor] = []
        blind = torch.zeros(batch, time, dtype=torch.bool, device=device)
        blind[:, 0] = first
        blind = blind.flatten()
        banned = torch.zeros(vocab, dtype=torch.bool, device=device)
        if self.banned is not None:
            banned[self.banned].fill_(True)  # assigned, a number of the host is copied: no graph could hold that
        draw = _drawer(device.type)
        # Numbers that change from step to step are tensors: a compiled draw would be compiled again for each.
        scale = torch.full((), 1 / temperature if temperature > 0 else 1.0, dtype=torch.float64, device=device)
        for start in range(0, batch * time, chunk):
            part = slice(start, min(start + chunk, batch * time))
            logits = self._logits(flat_own[part] if alone else None, None if flat_suffix is None else flat_suffix[part])
            noise = self.noise.rows(part.start, part.stop, step) if self.noise is not None and temperature > 0 else None
            for index, weight in enumerate(weights):
                read_by = (logits[0] if weight < 1.0 or first else None, logits[1] if weight > 0.0 else None)
                share = torch.full((), weight, dtype=torch.float64, device=device)
                tokens, finite, likely = draw(*read_by, noise, share, scale, blind[part], banned, sure and index == 0)
                drawn[index].append(tokens)
                self._finite = finite if self._finite is None else self._finite & finite
                if likely is not None:
                    confidence.append(likely)
        shape = (batch, time)
        likely = torch.cat(confidence).view(shape).float() if sure else None
        return [torch.cat(parts).view(shape) for parts in drawn], likely

    @property
    def finite(self) -> Bool[Tensor, ""]:
        """Whether all logits that decided so far were numbers; to look at it waits for the device."""
        return torch.ones((), dtype=torch.bool, device=self.backbone.device) if self._finite is None else self._finite
