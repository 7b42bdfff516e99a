"""The regime `generate`: text is written by denoising many positions at once, in any state space."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dihal.config.method import MethodConfig
from dihal.config.spaces import WritingConfig
from dihal.diffusion.process import Process, build_process
from dihal.diffusion.timesteps import sample_times
from dihal.meter import Meter
from dihal.method_parts import LossOutput, ReadBySuffix, own_dtype, positions_of
from dihal.nn.transformer import DenoiserTransformer
from dihal.random import uniform
from dihal.spaces.base import Estimate, NoiseKey, Space
from dihal.spaces.build import build_space
from dihal.spaces.embedding import EmbeddingSpace
from dihal.spaces.hidden import HiddenSpace
from dihal.types import Mask, Padding, State, Time, TokenIds
from dihal.writing.checks import check_generate, check_writing
from dihal.writing.known import draw_known, position_keys
from dihal.writing.losses import bound_loss, reencoded, state_terms, suffix_terms, token_terms
from dihal.writing.sampling import Written, evaluations, write
from dihal.writing.stages import Stages, untouched
from dihal.writing.warm_start import warm_start

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.data import Batch

__all__ = ["Writer"]


class Writer(ReadBySuffix):
    """A denoiser that writes what follows (or lies between) known text. Holds no backbone: every call is given one.

    The end token is a token as any other: a model learns to write it, and no length is known beforehand.

    Args:
        config: the parts; ``config.split`` must be set.
        dim: hidden size of the backbone.
        vocab: its vocabulary size.
    """

    noise_scale = 1.0
    """There is no regression control in this regime."""

    def __init__(self, config: MethodConfig, *, dim: int, vocab: int) -> None:
        super().__init__()
        self.config = config
        self.dim = dim
        self.space: Space = build_space(config, dim=dim, vocab=vocab)
        check_generate(config, self.space)
        self.condition_space = HiddenSpace(0, dim)
        self.process: Process = build_process(config.process)
        schedule = self.process.schedule
        self.schedule = schedule if isinstance(schedule, nn.Module) else None
        """The noise schedule, where it is learned."""
        self.denoiser = DenoiserTransformer(
            config.denoiser, self.space.input_dim, condition_dim=dim, output_dim=self.space.output_dim
        )
        self.stages = Stages()
        objective = config.objective
        if self.space.predicts_state and objective.own == objective.read == 0.0 and self.space.stage_share() == 0.0:
            # No loss term reaches the own head: DDP would wait for its gradient, and a resumed optimiser for its state.
            self.space.requires_grad_(False)

    @property
    def split(self) -> int:
        """Number of blocks whose output the states stand for."""
        return self.space.split

    # -- before training, and between its stages

    @torch.no_grad()
    def fit_normalisation(self, backbone: Backbone, batches: Iterable[Batch]) -> int:
        """Measure what condition and space are normalised by; return the tokens used. Called once, before training."""
        held = list(batches)

        def embedded() -> Iterator[tuple[State, Tensor, Mask]]:
            for item in held:
                batch = item.to(backbone.device)
                yield backbone.embed(batch.input_ids), positions_of(batch.attention_mask), batch.attention_mask

        self.condition_space.fit(embedded())
        used = self.space.fit(backbone, held)
        self.stages.hold(self.space, held)
        if self.space.stage_share() == 0.0:
            self._warm_start(backbone, held)
        return used

    def _warm_start(self, backbone: Backbone, batches: Iterable[Batch]) -> None:
        """Start the denoiser from the backbone's blocks, where it is to: once what it reads is settled."""
        if self.config.denoiser.init != "backbone":
            return

        def inputs(batch: Batch) -> tuple[Tensor, Tensor]:
            position_ids = positions_of(batch.attention_mask)
            mask = None if batch.full else batch.attention_mask
            clean = self.space.encode(backbone, batch.input_ids, attention_mask=mask, position_ids=position_ids)
            return self.space.known_input(clean), self.condition(backbone, batch.input_ids, position_ids)

        warm_start(self.denoiser, backbone, self.split, batches, inputs)

    def fit_metric(self, backbone: Backbone, batches: Iterable[Batch], *, seed: int) -> None:
        """Nothing to measure: the state error is per channel. A space with two stages keeps the batches for the second."""
        self.stages.hold(self.space, batches)

    # -- one evaluation

    def condition(self, backbone: Backbone, input_ids: TokenIds, position_ids: Int[Tensor, "batch time"]) -> State:
        """Normalised token embeddings. The first token is scaled as any other: it may be any token."""
        embedded = backbone.embed(input_ids, position_ids=position_ids)
        return self.condition_space.normalise(embedded, torch.ones_like(position_ids))

    def estimate(
        self,
        noised: Tensor,
        t: Time,
        known_input: Float[Tensor, "batch time input_dim"],
        condition: Float[Tensor, "batch time condition_dim"],
        drop: Bool[Tensor, "batch time"],
        known: Mask,
        position_ids: Int[Tensor, "batch time"],
        attention_mask: Padding | None,
        previous: Float[Tensor, "batch time input_dim"] | None,
    ) -> tuple[Float[Tensor, "batch time output_dim"], Estimate]:
        """Raw network output, and what it stands for."""
        out = self.denoiser(
            torch.where(known[..., None], known_input, self.space.network_input(noised, t)),
            torch.where(known, 0.0, t[:, None]),
            condition,
            position_ids=position_ids,
            attention_mask=attention_mask,
            known=known,
            drop_condition=drop,
            self_condition=previous,
        ).float()
        return out, self.space.interpret(self.process, out, noised, t, position_ids)

    # -- training

    def loss(
        self,
        backbone: Backbone,
        batch: Batch,
        *,
        seed: int,
        step: int,
        batch_index: Int[Tensor, " batch"],
        global_batch: int,
        progress: float = 1.0,
    ) -> LossOutput:
        """Training loss of one micro-batch.

        Of each sequence a prefix is known, its state and its tokens (``config.known``). The rest is noised at one time
        per sequence and denoised jointly. Known positions enter at t = 0.

        ``total`` divides every sum by the number of real tokens, known ones included, so that it does not depend on how
        a global batch is cut into micro-batches; ``terms`` are means over the positions that a term counts. The tokens
        returned are all real tokens: all of them pass through the denoiser.

        Args:
            backbone: the frozen backbone; its prefix gives the states, its suffix reads them.
            batch: windows of tokens.
            seed: seed of times, noise, known positions and dropped conditions.
            step: optimiser step, which keys the low-discrepancy shift of the times.
            batch_index: place of each sequence in the global batch.
            global_batch: sequences in the global batch.
            progress: share of the budget spent, in [0, 1]; decides the stage of a space with two, and starts the suffix terms.
        """
        objective, space, meter = self.config.objective, self.space, Meter(backbone)
        ids, mask, keys = batch.input_ids, batch.attention_mask, batch.sample_ids
        position_ids = positions_of(mask)
        full = bool(batch.full)
        attention_mask = None if full else mask
        size = {"batch": ids.shape[0], "new": ids.shape[1]}
        tokens = int(ids.numel()) if full else int(mask.sum())
        begin = partial(self._warm_start, backbone)
        first_stage = self.stages.first(space, backbone, progress, training=self.training, begin=begin)
        reads = not first_stage and objective.cross_entropy + objective.kl > 0 and progress >= objective.suffix_start
        with torch.no_grad(), own_dtype(backbone):
            state = None
            if space.needs_state() or reads:
                state = backbone.prefix(ids, self.split, attention_mask=attention_mask, position_ids=position_ids)
                meter.prefix(self.split, **size)
            clean = space.encode(backbone, ids, attention_mask=attention_mask, position_ids=position_ids, state=state)
            meter.space(space, "encode", **size)
        if first_stage:
            found = space.auxiliary_loss(backbone, batch, clean, state, seed=seed, progress=progress)
            assert found is not None, "a space with a first stage has a loss for it"
            total, terms = found
            meter.space(space, "auxiliary_loss", **size, backward=torch.is_grad_enabled())
            return LossOutput(total=total + untouched(self, space), terms=terms, tokens=tokens, flops=meter.flops)

        with torch.no_grad(), own_dtype(backbone):
            condition = self.condition(backbone, ids, position_ids)
            known, given = draw_known(self.config.known, mask, position_ids, keys, seed=seed)
            hidden = ~(known | given)
            free = hidden & mask
            t = sample_times(
                self.config.time,
                seed=seed,
                step=step,
                sample_ids=keys,
                batch_index=batch_index,
                batch_size=global_batch,
            )
            noise_key = NoiseKey(seed=seed, purpose="noise", ids=position_keys(keys, position_ids))
            noised = space.noised(self.process, clean, t, noise_key)
            meter.space(space, "noised", **size)
            known_input, drop = space.known_input(clean), hidden
            if objective.condition_dropout > 0:
                blind = uniform(seed, keys, "condition", device=ids.device) < objective.condition_dropout
                known_input = known_input.masked_fill(blind[:, None, None], 0.0)
                drop = drop | blind[:, None]
        inputs = (noised, t, known_input, condition, drop, known, position_ids, attention_mask)

        def denoise(noised: Tensor, t: Time) -> tuple[State, Estimate]:
            given_inputs = (noised, t, *inputs[2:])
            previous = self._earlier(backbone, batch, given_inputs, free, seed=seed, meter=meter)
            trained = torch.is_grad_enabled()
            meter.denoiser(self.denoiser, **size, times=ids.numel(), backward=trained, null=True)
            meter.space(space, "interpret", **size, backward=trained and objective.own > 0)
            return self.estimate(*given_inputs, previous)

        common = {"kernel": self.kernel, "meter": meter}
        if isinstance(space, EmbeddingSpace) and space.config.bound:
            total, terms, per_sequence = bound_loss(
                backbone,
                space,
                self.process,
                objective,
                lambda z, s: denoise(z, s)[1],
                ids,
                t,
                noise_key,
                mask,
                free,
                meter,
            )
            return LossOutput(
                total=total + self._schedule_loss(t, per_sequence, terms), terms=terms, tokens=tokens, flops=meter.flops
            )
        out, estimate = denoise(noised, t)
        total, terms, per_sequence = out.new_zeros(()), {}, None
        if space.predicts_state:
            total, terms, per_sequence = state_terms(
                self.process, objective, out, estimate, noised, clean, t, mask, mask & ~known, position_ids
            )
        loss, found, nats = token_terms(
            backbone, space, self.process, objective, estimate, clean, t, ids, mask, free, position_ids, **common
        )
        total, terms = total + loss, terms | found
        if per_sequence is None or objective.own > 0:
            # Tokens are what is to be decided; squared error goes on falling where all of them have long been.
            per_sequence = nats
        if reads:
            assert state is not None
            how = {"every": objective.suffix_every if self.training else 1, "adapters": tuple(self.lora)}
            how["reading"] = self.reading()
            extra, found = suffix_terms(
                backbone, space, objective, batch, state, estimate, known, free, position_ids, **common, **how
            )
            total = total + extra
            terms |= found
        total = total + self._schedule_loss(t, per_sequence, terms)
        return LossOutput(total=total, terms=terms, tokens=tokens, flops=meter.flops)

    def _schedule_loss(self, t: Time, per_sequence: Tensor, terms: dict[str, Tensor]) -> Tensor:
        """What a learned schedule is fitted by: the loss of each sequence at its time, one that rises with noise."""
        if self.schedule is None or not self.training:
            return t.new_zeros(())
        fit = self.schedule.fit_loss(t, per_sequence)
        terms["schedule"] = fit.detach()
        return fit

    @torch.no_grad()
    def _earlier(
        self,
        backbone: Backbone,
        batch: Batch,
        inputs: tuple[Any, ...],
        free: Mask,
        *,
        seed: int,
        meter: Meter,
    ) -> Float[Tensor, "batch time input_dim"] | None:
        """What the denoiser reads of its own earlier estimate (self-conditioning); None where it never does."""
        config, space, keys, ids = self.config, self.space, batch.sample_ids, batch.input_ids
        if config.denoiser.self_conditioning == 0:
            return None
        *_, known, position_ids, _ = inputs
        _, estimate = self.estimate(*inputs, None)
        size = {"batch": ids.shape[0], "new": ids.shape[1]}
        meter.denoiser(self.denoiser, **size, times=ids.numel(), part="self_conditioning")
        previous = space.feedback(backbone, estimate)
        meter.space(space, "interpret", **size)
        meter.space(space, "feedback", **size)
        if config.known.reencoded > 0:
            clean = reencoded(backbone, space, config.objective, estimate, batch, free, position_ids, meter)
            share = uniform(seed, keys, "re-encoded", device=ids.device)
            chosen = (share < config.known.reencoded)[:, None, None]
            previous = torch.where(chosen, space.known_input(clean), previous)
        share = uniform(seed, keys, "self-condition", device=ids.device)
        absent = known | (share >= config.denoiser.self_conditioning)[:, None]
        return previous.masked_fill(absent[..., None], 0.0)

    # -- writing

    def evaluations(self, writing: WritingConfig | None = None) -> int:
        """Number of function evaluations (NFE) of one block of :meth:`write`."""
        return evaluations(self.config.writing if writing is None else writing, self.config.space)

    def write(
        self,
        backbone: Backbone,
        input_ids: TokenIds,
        known: Bool[Tensor, "batch time"],
        *,
        given: Bool[Tensor, "batch time"] | None = None,
        writing: WritingConfig | None = None,
        sample_ids: Int[Tensor, " batch"] | None = None,
        end: bool = True,
        cached: bool = True,
        compare: bool = True,
    ) -> Written:
        """Write the tokens that are not known.

        All rows start at column 0; their prefixes may differ in length. A token depends on (seed, sample id, position)
        and on what is known, not on the batch; but where prefixes differ in length, blocks (and the noise of `simplex`)
        begin where the shortest one ends. What ``input_ids`` holds at unknown positions is never looked at, and
        the length of the rows is room to write in: where a text ends, the model decides by its end token.

        Args:
            backbone: the frozen model.
            input_ids: (batch, time) tokens.
            known: True for a prefix of each row: token and state are known.
            given: True where the token is known but not its state: text after a gap, to be infilled.
            writing: default: ``config.writing``.
            sample_ids: key of each row's random numbers; default 0 for all rows.
            end: the end token may be written; False: it never is, and every text has the length of its row.
            cached: keep keys and values of what is written; off: the same texts up to rounding, slower.
            compare: also read the last states by each readout alone, to see whether they agree (one more pass of the suffix).

        Raises:
            UsageError: options that contradict each other, nothing to write, or a state or logit that is not a number.
        """
        writing = self.config.writing if writing is None else writing
        objective = self.config.objective
        check_writing(
            writing,
            condition_dropout=objective.condition_dropout,
            own=not self.space.predicts_state or max(objective.own, objective.read) > 0,
        )
        training = self.training
        self.eval()
        try:
            return write(
                self,
                backbone,
                input_ids,
                known,
                given=given,
                writing=writing,
                sample_ids=sample_ids,
                end=end,
                cached=cached,
                compare=compare,
            )
        finally:
            self.train(training)
