"""One block of positions, denoised together.

With projection (``project`` > 0) every evaluation of the denoiser is followed by

1. reading: tokens y of all positions, drawn from own head and suffix as ``readout`` says;
2. encoding: the states h^l(y) of those tokens, by the frozen blocks below the split, after what is written;
3. mixing: (1 - project) x0 + project normalise(h^l(y)) is the clean estimate that the solver goes on with.

From the second evaluation on, the suffix reads not the estimate but h^l(y) of the evaluation before. With readout
`suffix` the tokens then follow y_i <- argmax_w [log p(w | y_<i) / temperature + g_iw], p the frozen model's own
next-token distribution: one step of the Jacobi iteration for its ancestral sampling (Song et al. 2021, "Accelerating
feedforward computation via parallel nonlinear equation solving"; Santilli et al. 2023). With common noise g its only
fixed point is the very text that the frozen model would write token by token with that noise, and it is reached after
at most as many steps as there are positions, since position i settles once all before it have. The denoiser's part is
to start the iteration close to where it ends and, with `fused`, to pull it towards what it has planned: there the
fixed point of the reading is the ancestral sample of the product of the two distributions, for an own head that has
settled. With fresh noise at each step nothing settles, and the last tokens are drawn anew from the last reading. Nor do
they where the temperature changes from step to step (`temperature_start`): each change flips a few tokens, and what
comes after a flipped one begins anew.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dihal.config.spaces import WritingConfig
from dihal.diffusion.process import Process
from dihal.diffusion.samplers import evaluation_times, level_grid, nfe, time_grid
from dihal.spaces.base import Estimate, NoiseKey, Space
from dihal.spaces.hidden_state import VectorSpace
from dihal.types import Mask, PerPosition, State, Time, TokenIds
from dihal.writing.context import Context
from dihal.writing.draw import TokenNoise
from dihal.writing.known import settled
from dihal.writing.reader import Reader

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.writer import Writer

__all__ = ["Block", "BlockText", "branches_of", "estimates", "readout_weight", "walk_times", "walked_process"]


def readout_weight(writing: WritingConfig) -> float:
    """Weight of the suffix in log p."""
    return {"own": 0.0, "suffix": 1.0, "fused": writing.suffix_weight}[writing.readout]


def branches_of(guidance: float) -> tuple[str, ...]:
    """Passes of the denoiser that one guided estimate takes."""
    if guidance == 1.0:
        return ("conditional",)
    return ("unconditional",) if guidance == 0.0 else ("conditional", "unconditional")


def estimates(writing: WritingConfig, space: str) -> int:
    """Estimates that a walk asks for. `simplex` takes one a step: it renoises tokens and has no solver."""
    return writing.steps if space == "simplex" else nfe(writing.sampler, writing.steps)


def walk_times(writing: WritingConfig, process: Process) -> list[float]:
    """Times of a walk from noise to text, the ends included."""
    if writing.log_snr_center is None:
        return time_grid(writing.steps)
    return level_grid(process.schedule, writing.steps, center=writing.log_snr_center, scale=writing.log_snr_scale)


def walked_process(writer: Writer) -> Process:
    """The process as the solver of this writer's space walks it.

    Solvers take coefficients as numbers of the host: a learned schedule goes there once per text, and no step waits.
    """
    if writer.schedule is None or not isinstance(writer.space, VectorSpace):
        return writer.process
    return replace(writer.process, schedule=copy.deepcopy(writer.schedule).cpu())


def _network_input(
    space: Space, noised: Tensor, t: Time, known: Mask, given: Mask, clean: Tensor | None, blind: bool
) -> tuple[Tensor, Mask]:
    """What the denoiser reads, and where it reads no token; ``blind``: nothing of what is known."""
    inputs = space.network_input(noised, t)
    if blind:
        return inputs.masked_fill(known[..., None], 0.0), torch.ones_like(known)
    if clean is not None:
        inputs = torch.where(known[..., None], space.known_input(clean), inputs)
    return inputs, ~(known | given)


@dataclass(frozen=True, kw_only=True)
class BlockText:
    """What a block came to.

    Attributes:
        tokens: of its columns.
        own, suffix: those that each readout alone would have written; None: not compared.
        finite: whether the logits that decided were numbers; on the device, nobody has waited for it.
    """

    tokens: TokenIds
    own: TokenIds | None
    suffix: TokenIds | None
    finite: Bool[Tensor, ""]


class Block:
    """The columns that follow a context, while they are denoised.

    Args:
        writer: the method.
        backbone: the frozen model.
        context: what is written before.
        writing: how to write.
        tokens: of known and given positions; anything elsewhere.
        known: state known. given: token known only. Tokens that continue the known ones without a gap become known.
        begins: the state of some column is known from the start.
        process: see :func:`walked_process`.
        keys: key of each position's random numbers.
        noise_bytes: noise of tokens that may be kept from step to step.
        banned: a token that is never written.
        compare: also read by each readout alone, at the end.
    """

    def __init__(
        self,
        writer: Writer,
        backbone: Backbone,
        context: Context,
        writing: WritingConfig,
        *,
        tokens: TokenIds,
        known: Mask,
        given: Mask,
        begins: bool,
        process: Process,
        keys: Int[Tensor, "batch time"],
        noise_bytes: int,
        banned: int | None,
        compare: bool,
    ) -> None:
        self.writer, self.backbone, self.context, self.writing = writer, backbone, context, writing
        self.space = writer.space
        self.process = process
        self.keys = keys
        self.compare = compare
        self.positions = context.positions(tokens.shape[1])
        self.free = ~(known | given)
        """Positions whose token is to be written; fixed, whatever is committed on the way."""
        self.tokens = torch.where(self.free, 0, tokens)
        self.committed = torch.zeros_like(known)
        self.weight = readout_weight(writing)
        self.commits = writing.commit == "confidence"
        self.estimates = estimates(writing, writer.config.space)
        self.step = 0
        self.times = walk_times(writing, process)
        self.read_own = self._read_own()
        """Evaluations whose estimate the own head reads."""
        self.previous: Tensor | None = None
        self.encoded: State | None = None
        """h^split of the tokens read last; None before the first projection."""
        self.clean: Tensor | None = None
        """Their clean states in the space."""
        drawn = max(self.temperature(0.0), self.temperature(1.0)) > 0
        vocab, common = backbone.vocab_size, writing.common_noise
        noise = TokenNoise(writing.seed, keys, vocab, common=common, most_bytes=noise_bytes) if drawn else None
        self.meter = context.costs.meter
        self.size = {"batch": tokens.shape[0], "new": tokens.shape[1]}
        self.reader = Reader(self.space, backbone, noise=noise, banned=banned, meter=self.meter)
        self._true: State | None = None
        self._set_known(known, given)
        if begins:
            self._true = context.states(self.tokens)
            self.clean = self._encode(self._true)

    def _set_known(self, known: Mask, given: Mask) -> None:
        self.known = settled(known | given)
        self.given = (known | given) & ~self.known
        self.condition = self.writer.condition(self.backbone, self.tokens, self.positions)

    def _encode(self, state: State | None) -> Tensor:
        self.meter.space(self.space, "encode", **self.size)
        return self.space.encode(self.backbone, self.tokens, position_ids=self.positions, state=state)

    def temperature(self, t: float) -> float:
        """Of tokens read at time t: linear between the ends."""
        end, start = self.writing.temperature, self.writing.temperature_start
        return end if start is None else end + (start - end) * t

    # -- what the solver calls

    def estimate(self, noised: Tensor, t: Time) -> Estimate:
        """Run the denoiser on the block."""
        known = self.known[..., None]
        level = torch.where(self.known, 0.0, t.float()[:, None])
        previous = None if self.previous is None else self.previous.masked_fill(known, 0.0)
        # The other spaces look tables up, or draw, on the way to what the network reads.
        read = self.context.compiled(_network_input) if self.space.predicts_state else _network_input
        outputs = {}
        for branch in self.context.branches:
            blind = branch == "unconditional"
            inputs, drop = read(self.space, noised, t, self.known, self.given, self.clean, blind)
            outputs[branch] = self.context.denoise(branch, inputs, level, self.condition, drop, self.known, previous)
        if len(outputs) == 1:
            (out,) = outputs.values()
        else:
            # Guidance on the network's output: linear in it, so the same as on x0 (or on logits) at this z_t.
            out = outputs["unconditional"].lerp(outputs["conditional"], self.writing.guidance)
        found = self._interpret(out, noised, t)
        if self.writer.denoiser.self_conditioned:
            self.previous = self.space.feedback(self.backbone, found)
        return found

    def _read_own(self) -> frozenset[int]:
        writing, last = self.writing, self.estimates - 1
        if not self.space.predicts_state:  # a network that gives no state gives features
            return frozenset(range(self.estimates))
        times = evaluation_times(writing.sampler, self.times)
        active = [writing.project > 0 and t <= writing.project_below for t in times]
        alone = self.weight < 1.0 or self.context.length == 0
        read = {step for step in range(last) if alone and (self.commits or active[step])}
        return frozenset(read | {last})

    def _interpret(self, out: Tensor, noised: Tensor, t: Time) -> Estimate:
        """The estimate; where the own head does not read it, without its features, a product in fp32 of its own."""
        conditioned = self.writer.denoiser.self_conditioned
        if self.step in self.read_own:
            self.meter.evaluation(self.space, **self.size, self_conditioned=conditioned)
            return self.space.interpret(self.writer.process, out, noised, t, self.positions)
        if conditioned:
            self.meter.space(self.space, "feedback", **self.size)
        self.meter.space(self.space, "solver", **self.size)
        x0 = self.writer.process.to_x0(out, noised, t)
        return Estimate(features=x0[..., :0], x0=x0)

    def project(self, estimate: Estimate, t: float) -> TokenIds | None:
        """Read tokens, encode them, commit some of them; return them where the solver is to be led to them."""
        writing = self.writing
        self.step += 1
        active = writing.project > 0 and t <= writing.project_below
        if self.step < writing.steps and not (active and writing.project == 1.0):
            self.meter.space(self.space, "draw", **self.size)
        if not (active or self.commits):
            return None
        (tokens,), confidence = self._read(estimate, [self.weight], self.temperature(t), self.step - 1)
        self.tokens = tokens
        if self.commits:
            assert confidence is not None
            self._commit(confidence)
        self.encoded = self.context.states(self.tokens)
        self.clean = self._encode(self.encoded)
        if self.writer.config.known.reencoded > 0:
            self.previous = self.space.known_input(self.clean)
        return self.tokens if active else None

    def encode(self, tokens: TokenIds) -> Tensor:
        """Clean states of the tokens that :meth:`project` returned."""
        assert tokens is self.tokens, "a walk encodes what it was told to project on"
        assert self.clean is not None
        return self.clean

    # -- reading

    def _read(
        self, estimate: Estimate, weights: list[float], temperature: float, step: int
    ) -> tuple[list[TokenIds], PerPosition | None]:
        suffix = None
        if any(weight > 0 for weight in weights):
            suffix = self.context.features(self._states(estimate))
        found, confidence = self.reader.read(
            estimate.features,
            suffix,
            weights,
            first=self.context.length == 0,
            temperature=temperature,
            step=step,
            sure=self.commits,
        )
        open_ = self.free & ~self.committed
        return [torch.where(open_, tokens, self.tokens) for tokens in found], confidence

    def _states(self, estimate: Estimate) -> State:
        if self.encoded is not None:
            return self.encoded
        states = self.space.hidden(self.backbone, estimate, self.positions)
        self.meter.space(self.space, "hidden", **self.size)
        return states if self._true is None else torch.where(self.known[..., None], self._true, states)

    def _commit(self, confidence: PerPosition) -> None:
        """Fix the surest tokens, so many that after the last evaluation all are.

        The state of a fixed token is not known, because tokens before it may still change. So it is treated as text
        after a gap: its embedding conditions the denoiser, its state goes on being denoised. Once all tokens before
        it are fixed, too, its state is known, and it enters at t = 0 as any known position.
        """
        wanted = self.free.sum(-1) * self.step // self.estimates
        sure = confidence.masked_fill(~self.free, -torch.inf).masked_fill(self.committed, torch.inf)
        rank = sure.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        self.committed = self.free & (rank < wanted[:, None])
        fixed = ~self.free | self.committed
        self._set_known(torch.zeros_like(fixed), fixed)

    # -- the whole

    def run(self) -> BlockText:
        """Denoise the block and read it. Nothing waits for the device."""
        writing = self.writing
        last = self.space.walk(
            self.process,
            self.estimate,
            self.project,
            NoiseKey(seed=writing.seed, purpose="write", ids=self.keys),
            (self.tokens.shape[0], self.tokens.shape[1]),
            backbone=self.backbone,
            times=self.times,
            sampler=writing.sampler,
            weight=writing.project,
            temperature=self.temperature,
            encode=self.encode,
        )
        weights = [self.weight, *([0.0, 1.0] if self.compare else [])]
        # What each readout alone would have written is asked of every free position, committed or not.
        fixed, self.committed = self.committed, torch.zeros_like(self.committed)
        (tokens, *alone), _ = self._read(last, weights, writing.temperature, self.estimates)
        tokens = torch.where(fixed, self.tokens, tokens)
        own, suffix = alone if self.compare else (None, None)
        return BlockText(tokens=tokens, own=own, suffix=suffix, finite=self.reader.finite)
