"""The space `simplex`: +k at the token and -k elsewhere (SSD-LM, arXiv 2210.17432; TESS; TESS-2, arXiv 2502.13917).

z_t = alpha k (+-1) + sigma k eps lives in R^V; the network reads W softmax(z_t), W the input embedding normalised per
channel, and writes an estimate of normalised h^split, which the own head and the frozen stack read. Nothing of z_t is
kept: mixtures W softmax(z_t) are made chunk by chunk, and a solver never needs z_t itself, because every step of this
family renoises the tokens that it has just drawn.

V normals per position are far too many for the counter-based generator of ``dihal.random``, which would take longer
than the training step. They come from torch's own, seeded for every run of positions by a hash of the first one's
key. They do not depend on the batch, nor on what follows in the sequence, but on where the sequence given
begins; and they differ between CPU and GPU.

Differences from the publications: the time enters the network as it does for every space; self-conditioning goes in
beside the mixture, not averaged into it; given positions read their token's own row (as published), although
W softmax(+-k) spreads over the vocabulary when V exceeds e^(2k).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dihal.config.spaces import SimplexConfig
from dihal.diffusion.process import Process
from dihal.errors import UsageError
from dihal.random import uniform
from dihal.spaces.base import Estimate, NoiseKey, Space
from dihal.spaces.hidden import HiddenSpace
from dihal.spaces.hidden_state import split_states
from dihal.spaces.readout import OwnReadout, TableCache, expected_rows, head_logits, token_shares
from dihal.types import Padding, State, Time, TokenIds

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.data.batch import Batch

__all__ = ["NOISE_RUN", "SimplexSpace", "draw_nucleus"]

PositionIds = Int[Tensor, "batch time"]

NOISE_RUN = 16
"""Positions whose noise is drawn at once, from one seed."""


def _inverse(shares: Float[Tensor, "positions vocab"], u: Float[Tensor, " positions"]) -> Int[Tensor, " positions"]:
    """Tokens at which the running sum of shares passes u of the whole."""
    cumulative = shares.cumsum(-1)
    found = torch.searchsorted(cumulative, (u.double() * cumulative[:, -1])[:, None], right=True)
    return found.squeeze(-1).clamp_max(shares.shape[-1] - 1)  # shares that are not numbers: told later, by the caller


def draw_nucleus(
    logits: Float[Tensor, "positions vocab"],
    uniforms: Float[Tensor, "positions 2"],
    *,
    temperature: float,
    top_p: float,
) -> Int[Tensor, " positions"]:
    """Draw one token per position from the most likely ones that together have at least probability ``top_p``.

    A token is among them if those that are likelier have less than ``top_p``. In fp64, by the inverse of the
    distribution function. Drawn from all tokens first, which needs no order; only positions where that gave one outside
    the nucleus (1 - top_p of them, about) sort theirs and draw again, from the nucleus. Either way its tokens come in
    proportion to their probabilities.

    Args:
        logits: of any float type.
        uniforms: fp64 in (0, 1), for the first and the second draw.
        temperature: divides the logits; 0: the most likely token.
        top_p: nucleus; 1: all tokens, 0: the most likely.
    """
    if temperature == 0.0 or top_p == 0.0:
        return logits.argmax(-1)
    p = (logits.double() / temperature).softmax(-1)
    first, second = uniforms.unbind(-1)
    drawn = _inverse(p, first)
    if top_p == 1.0:
        return drawn
    likelier = p.masked_fill(p <= p.gather(-1, drawn[:, None]), 0.0).sum(-1)
    (again,) = torch.where(likelier >= top_p)
    if len(again):
        p = p[again]
        falling = p.sort(-1, descending=True).values
        kept = (falling.cumsum(-1) - falling < top_p).sum(-1, keepdim=True)
        nucleus = p.masked_fill(p < falling.gather(-1, kept - 1), 0.0)
        drawn[again] = _inverse(nucleus, second[again])
    return drawn


def _runs(values: Shaped[Tensor, "batch time"]) -> Shaped[Tensor, "runs positions"]:
    """Cut every sequence into runs, the last one padded with zeros."""
    return F.pad(values, (0, -values.shape[1] % NOISE_RUN)).reshape(-1, NOISE_RUN)


class SimplexSpace(Space):
    """Tokens as vertices of a simplex.

    Features are the readout's d channels, then the d of the state they were read from.

    Args:
        config: height of a vertex, nucleus.
        split: blocks whose output the network stands for.
        dim: hidden size d.
        vocab: vocabulary size V.
        chunk: positions whose V-wide tensors exist at once.

    Raises:
        UsageError: a height that is not positive, or a nucleus outside [0, 1].
    """

    predicts_state = False
    token_mean: Tensor
    token_std: Tensor

    def __init__(self, config: SimplexConfig, split: int, dim: int, vocab: int, *, chunk: int) -> None:
        super().__init__()
        if not config.k > 0:
            raise UsageError(f"method.simplex.k is {config.k}; the height of a vertex must be positive, e.g. 5.")
        if not 0 <= config.top_p <= 1:
            raise UsageError(f"method.simplex.top_p is {config.top_p}; it must be in [0, 1].")
        self.split = split
        self.input_dim = self.output_dim = dim
        self.config = config
        self.vocab = vocab
        self.chunk = chunk
        self.normaliser = HiddenSpace(split, dim)
        self.readout = OwnReadout(dim)
        # The denoiser's head starts at zero; with a zero readout on top of it and no state error, no gradient would
        # ever reach either. The first loss is log V all the same.
        nn.init.normal_(self.readout.linear.weight, std=dim**-0.5)
        self.register_buffer("token_mean", torch.zeros(dim))
        self.register_buffer("token_std", torch.ones(dim))
        self._cached = TableCache()
        self._table: Tensor | None = None  # of the backbone seen last: noised() and known_input() are given none

    def table(self, backbone: Backbone) -> Float[Tensor, "vocab dim"]:
        """W: input embeddings, of unit variance per channel over the training text."""
        self._table = self._cached(
            backbone,
            "table",
            (self.token_mean, self.token_std),
            lambda weight: (weight - self.token_mean) / self.token_std,
        )
        return self._table

    def _held(self) -> Tensor:
        assert self._table is not None, "clean states come from encode(), which sees the backbone"
        return self._table

    @torch.no_grad()
    def fit(self, backbone: Backbone, batches: Iterable[Batch]) -> int:
        """Measure mean and deviation of the embeddings over training tokens, and of h^split; return the tokens used."""
        held = list(batches)
        share, _ = token_shares(backbone, held)
        weight = backbone.input_embedding.weight.detach().double()
        mean = (share * weight).sum(0)
        std = (share * (weight - mean) ** 2).sum(0).sqrt()
        self.token_mean.copy_(mean)
        self.token_std.copy_(std.clamp_min(1e-3 * std.mean().clamp_min(1e-12)))
        return self.normaliser.fit(split_states(backbone, held, self.split))

    def encode(
        self,
        backbone: Backbone,
        input_ids: TokenIds,
        *,
        attention_mask: Padding | None = None,
        position_ids: PositionIds | None = None,
        state: State | None = None,
    ) -> TokenIds:
        """The tokens themselves."""
        self.table(backbone)
        return input_ids

    def needs_state(self) -> bool:
        """No block is run to encode."""
        return False

    def noised(self, process: Process, clean: TokenIds, t: Time, key: NoiseKey) -> State:
        """W softmax(z_t), fp32."""
        time = t if t.ndim == 2 else t[:, None].expand(clean.shape)
        return self._mixture([(clean, process.schedule.alpha(time))], process.schedule.sigma(time), key)

    @torch.no_grad()
    def _mixture(self, vertices: list[tuple[TokenIds, Tensor]], sigma: Tensor, key: NoiseKey) -> State:
        # Softmax does not see the -alpha k common to all coordinates: a vertex is 2 alpha k at its token.
        table, height = self._held(), self.config.k
        batch, time = key.ids.shape
        # In runs; a run is drawn whole even where the sequence ends within it: noise must not depend on what follows.
        scale = _runs(height * sigma.float())
        marked = [(_runs(tokens), _runs(2 * height * alpha.float())) for tokens, alpha in vertices]
        firsts = key.ids[:, ::NOISE_RUN].flatten().tolist()
        generator = torch.Generator(device=table.device)
        out = torch.empty(len(firsts), NOISE_RUN, table.shape[1], device=table.device)
        several = max(1, self.chunk // NOISE_RUN)
        buffer = torch.empty(min(several, len(firsts)), NOISE_RUN, len(table), device=table.device)
        for first in range(0, len(firsts), several):
            part = slice(first, min(first + several, len(firsts)))
            logits = buffer[: part.stop - first]
            for index in range(first, part.stop):
                name = f"{key.seed}\0{key.purpose}\0{firsts[index]}"
                generator.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1)
                logits[index - first].normal_(generator=generator)
            logits *= scale[part][..., None]
            for tokens, value in marked:
                logits.scatter_add_(-1, tokens[part][..., None], value[part][..., None])
            with torch.autocast(table.device.type, enabled=False):
                out[part] = (logits.softmax(-1).to(table.dtype) @ table).float()
        return out.view(batch, -1, table.shape[1])[:, :time]

    def network_input(self, noised: State, t: Time) -> State:
        """The mixture."""
        return noised

    def known_input(self, clean: TokenIds) -> State:
        """The token's own row of W."""
        return self._held()[clean].float()

    def interpret(self, process: Process, out: State, noised: State, t: Time, position_ids: PositionIds) -> Estimate:
        """The output is normalised h^split, whatever the parametrisation."""
        out = out.float()
        return Estimate(features=torch.cat([self.readout(out).float(), out], -1), x0=None)

    def logits(self, backbone: Backbone, features: Float[Tensor, "*shape k"]) -> Float[Tensor, "*shape vocab"]:
        """The backbone's head on the readout's features."""
        return head_logits(backbone, features[..., : self.input_dim])

    def clean_features(self, clean: TokenIds, position_ids: PositionIds) -> None:
        """None: the head is trained through the network, whose output is not a clean state's."""
        return None

    @torch.no_grad()
    def feedback(self, backbone: Backbone, estimate: Estimate) -> State:
        """W softmax(logits)."""
        return expected_rows(
            lambda part: self.logits(backbone, part), estimate.features, self.table(backbone), self.chunk
        )

    def hidden(self, backbone: Backbone, estimate: Estimate, position_ids: PositionIds) -> State:
        """The network's state in the residual stream's own units."""
        return self.normaliser.denormalise(estimate.features[..., self.input_dim :], position_ids).to(backbone.dtype)

    @torch.no_grad()
    def _draw(self, backbone: Backbone, estimate: Estimate, key: NoiseKey, temperature: float) -> TokenIds:
        u = uniform(key.seed, key.ids, f"{key.purpose} token", (2,), dtype=torch.float64)
        size = max(1, self.chunk // 4)  # fp64, and several of it
        parts = zip(estimate.features.flatten(0, 1).split(size), u.flatten(0, 1).split(size))
        drawn = [
            draw_nucleus(self.logits(backbone, part), some, temperature=temperature, top_p=self.config.top_p)
            for part, some in parts
        ]
        return torch.cat(drawn).view(key.ids.shape)

    def walk(
        self,
        process: Process,
        estimate: Callable[[Tensor, Time], Estimate],
        project: Callable[[Estimate, float], Tensor | None],
        start: NoiseKey,
        shape: tuple[int, int],
        *,
        backbone: Backbone,
        times: Sequence[float],
        sampler: str,
        weight: float,
        temperature: Callable[[float], float],
        encode: Callable[[TokenIds], Tensor] | None = None,
    ) -> Estimate:
        """Draw tokens from the own head at every step and renoise them; ``sampler`` has no say.

        Tokens of ``project`` share the vertex: z_s = alpha ((1 - weight) own + weight projected) + sigma k eps.
        """
        self.table(backbone)
        ids = start.ids
        ones = torch.ones(ids.shape, device=ids.device)
        noised = self._mixture([], ones, start)
        last: Estimate | None = None
        for step, (t, s) in enumerate(pairwise(times)):
            last = estimate(noised, torch.full((ids.shape[0],), t, device=ids.device))
            given = project(last, t)
            if s == 0:
                break
            key = NoiseKey(seed=start.seed, purpose=f"{start.purpose} {step}", ids=ids)
            signal = process.schedule.alpha(s * ones)
            share = 0.0 if given is None else weight
            vertices = [] if share == 1.0 else [(self._draw(backbone, last, key, temperature(t)), (1 - share) * signal)]
            if share > 0.0:
                clean = given if encode is None else encode(given)
                vertices.append((clean, share * signal))
            noised = self._mixture(vertices, process.schedule.sigma(s * ones), key)
        assert last is not None, "a grid of times has at least one step"
        return last
