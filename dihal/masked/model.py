"""The masked diffusion LM: its network, its loss. A method as any other for the training loop."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dihal.config.method import MethodConfig
from dihal.config.spaces import WritingConfig
from dihal.diffusion.timesteps import sample_times
from dihal.errors import UsageError
from dihal.masked.attention import Visible, annealed, openness
from dihal.masked.checks import check_masked, check_masked_writing, resolve_mask_token
from dihal.masked.noise import mask_rate, predictable
from dihal.masked.sampling import MaskedText, write
from dihal.meter import Meter
from dihal.method_parts import LossOutput, ReadBySuffix, own_dtype, positions_of
from dihal.random import uniform
from dihal.types import State, TokenIds
from dihal.writing.known import draw_known

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.data import Batch

__all__ = ["MaskedLM"]


class MaskedLM(ReadBySuffix):
    """A backbone that predicts masked tokens from both sides.

    With ``lora.rank`` 0 it holds a trainable fp32 copy of the backbone's decoder and head and the backbone is not run;
    else it holds adapters that act in the backbone's own blocks while this method reads, and only then. Either way the
    backbone stays as it was. The dropout that a backbone's configuration may name is off.

    The embedding of the mask token is a parameter of its own, first the mean of all embeddings. The mask token's logit
    is minus infinity: it is never drawn and takes no probability.

    Args:
        config: the method; ``lora``, ``masked``, ``time``, ``known``, ``writing`` and ``objective.logit_chunk`` count.
        backbone: what is converted.
        mask_token_id: default: what ``config.masked.mask_token`` names.
        shared: the backbone *is* the converted model (opened by ``load_masked``): nothing is copied or trained.

    Raises:
        UsageError: options that contradict each other, or a backbone that has adapters of another method.
    """

    noise_scale = 1.0
    """There is no regression control in this regime."""

    split = 0
    """The whole stack is converted."""

    def __init__(
        self, config: MethodConfig, backbone: Backbone, *, mask_token_id: int | None = None, shared: bool = False
    ) -> None:
        super().__init__()
        check_masked(config)
        self.config = config
        self.dim = backbone.hidden_size
        self.vocab = backbone.vocab_size
        self.mask_token_id = (
            resolve_mask_token(config.masked.mask_token, backbone) if mask_token_id is None else mask_token_id
        )
        """Id of the mask token; the vocabulary's size where it is a new one."""
        layout = backbone.layout
        self._table, self._blocks = layout.embeddings[0], layout.blocks
        self._window = getattr(backbone.config, layout.windows, None) if layout.windows else None
        self._cap = getattr(backbone.config, layout.softcap) if layout.softcap else None
        self._eager = backbone.attention == "eager"
        # No entry of the state: the masked diffusion LM is told its mask token by its configuration.
        banned = [self.mask_token_id] if self.mask_token_id < self.vocab else []
        self.register_buffer("_banned", torch.tensor(banned, dtype=torch.int64), persistent=False)
        table = backbone.input_embedding.weight.detach()
        mean = table[self.mask_token_id] if shared else table.float().mean(0)
        self.mask_embedding = nn.Parameter(mean.float().cpu().clone())
        """(dim,) what a masked position holds in place of its token's embedding."""
        self.decoder: nn.Module | None = None
        """Embedding, blocks and final norm, where all weights are trained."""
        self.output: nn.Module | None = None
        """The LM head, where it is not the embedding's matrix."""
        if shared:
            self.decoder, self.output = backbone.decoder, None if backbone.tied else backbone.output_embedding
        elif config.lora.rank == 0:
            if any("lora_" in name for name, _ in backbone.model.named_parameters()):
                raise UsageError("this backbone has LoRA adapters of another method. Load it anew for this one.")
            self.decoder, self.output = _trainable_copy(backbone)

    def compile_parts(self) -> None:
        """Compile the copied blocks in place; adapters run in the backbone's, which the caller compiles."""
        if self.decoder is not None:
            for block in self.decoder.get_submodule(self._blocks):
                block.compile()

    def train(self, mode: bool = True) -> MaskedLM:
        """As ``nn.Module.train``, but the copied decoder stays in evaluation mode: dropout is off."""
        super().train(mode)
        for part in (self.decoder, self.output):
            if part is not None:
                part.eval()
        return self

    def fit_normalisation(self, backbone: Backbone, batches: Iterable[Batch]) -> int:
        """Nothing to measure: tokens are discrete. Returns 0, the tokens used."""
        return 0

    def fit_metric(self, backbone: Backbone, batches: Iterable[Batch], *, seed: int) -> None:
        """Nothing to measure."""

    # -- the network

    def features(self, backbone: Backbone, input_ids: TokenIds, visible: Visible | None) -> State:
        """States after the final norm; those at position i - 1 predict token i.

        Args:
            backbone: what was converted; its blocks run where this method has adapters.
            input_ids: tokens, and ``mask_token_id`` where one is masked.
            visible: who sees whom (``dihal.masked.attention``); None: causal, as the backbone.

        Raises:
            UsageError: a sequence longer than the backbone's sliding window or its learned positions.
        """
        time = input_ids.shape[1]
        if self._window is not None and time > self._window:
            raise UsageError(
                f"the backbone attends within windows of {self._window} tokens; a sequence of {time} would be opened "
                "beyond them. Use shorter sequences."
            )
        if backbone.max_positions is not None and time > backbone.max_positions:
            raise UsageError(f"{time} tokens, but this backbone has learned positions for {backbone.max_positions}.")
        decoder = backbone.decoder if self.decoder is None else self.decoder
        table = decoder.get_submodule(self._table)
        embedded = table(input_ids.clamp_max(table.weight.shape[0] - 1))
        # Gemma 3 scales inside its embedding; a mask token has an embedding as any other.
        own = self.mask_embedding * getattr(table, "embed_scale", 1.0)
        masked = (input_ids == self.mask_token_id)[..., None]
        embedded = torch.where(masked, own.to(embedded.dtype), embedded)
        if visible is not None and self._eager:
            visible = torch.zeros_like(visible, dtype=embedded.dtype).masked_fill(~visible, float("-inf"))
        if self.decoder is not None:
            return decoder(inputs_embeds=embedded, attention_mask=visible, use_cache=False)[0]
        with own_dtype(backbone), self.reading():
            return decoder(inputs_embeds=embedded, attention_mask=visible, use_cache=False)[0]

    def head(self, backbone: Backbone, features: Float[Tensor, "... dim"]) -> Float[Tensor, "... vocab"]:
        """Logits of the token that follows each position; minus infinity for the mask token."""
        if self.decoder is None:
            with own_dtype(backbone):
                logits = backbone.head(features)
        else:
            if self.output is None:
                logits = F.linear(features, self.decoder.get_submodule(self._table).weight)
            else:
                logits = self.output(features)
            if self._cap is not None:
                logits = torch.tanh(logits / self._cap) * self._cap
        return logits.index_fill(-1, self._banned, float("-inf"))

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
        """Cross-entropy of the masked tokens, weighted by time, per token that could be masked.

        A token of the text that happens to be the mask token is read as masked and predicted by nobody. Terms: ``bound``
        (the negative log-likelihood's bound, as far as attention is open), ``cross_entropy`` and ``accuracy`` of the
        masked tokens, ``open`` (share of pairs above the diagonal that are visible).

        Args:
            backbone: what is converted.
            batch: windows of tokens.
            seed: seed of times, masks and pairs.
            step: optimiser step, which keys the low-discrepancy shift of the times.
            batch_index: place of each sequence in the global batch.
            global_batch: sequences in the global batch.
            progress: share of the budget spent, in [0, 1]; decides how far attention is open.
        """
        own, ids, keys = self.config.masked, batch.input_ids, batch.sample_ids
        mask, meter = batch.attention_mask, Meter(backbone)
        with torch.no_grad():
            t = sample_times(
                self.config.time,
                seed=seed,
                step=step,
                sample_ids=keys,
                batch_index=batch_index,
                batch_size=global_batch,
            )
            t = own.smallest + (1.0 - own.smallest) * t
            positions = positions_of(mask)
            countable = predictable(mask, positions)
            free = countable & ~self._given(batch, positions, seed=seed) & (ids != self.mask_token_id)
            hidden = mask_rate(free, t, seed=seed, sample_ids=keys)
            share = openness(progress, own.anneal)
            visible = annealed(mask, share, seed=seed, sample_ids=keys)
            noised = ids.masked_fill(hidden, self.mask_token_id)
        features = self.features(backbone, noised, visible)
        nats, correct = self._read(backbone, features, ids, hidden)

        per_token = (1.0 / t)[:, None].expand_as(ids)[:, 1:][hidden[:, 1:]]
        weight = per_token if own.weight == "bound" else torch.ones_like(per_token)
        total = (nats * weight).sum() / countable.sum().clamp_min(1)
        with torch.no_grad():
            terms = {
                "bound": (nats * per_token).sum() / free.sum().clamp_min(1),
                "cross_entropy": nats.sum() / hidden.sum().clamp_min(1),
                "accuracy": correct.float().sum() / hidden.sum().clamp_min(1),
                "open": torch.tensor(share, device=nats.device),
            }
        self._count(meter, batch=ids.shape[0], new=ids.shape[1], read=len(nats), training=torch.is_grad_enabled())
        tokens = int(ids.numel()) if batch.full else int(mask.sum())
        return LossOutput(total=total, terms=terms, tokens=tokens, flops=meter.flops)

    def _given(self, batch: Batch, positions: Int[Tensor, "batch time"], *, seed: int) -> Bool[Tensor, "batch time"]:
        """Tokens that a conditional sequence is given; in evaluation none is, so that ``bound`` is one of whole texts."""
        share, keys = self.config.masked.conditional if self.training else 0.0, batch.sample_ids
        if share == 0.0:
            return torch.zeros_like(batch.attention_mask)
        known, given = draw_known(self.config.known, batch.attention_mask, positions, keys, seed=seed)
        chosen = uniform(seed, keys, "masked/conditional", device=known.device) < share
        return (known | given) & chosen[:, None]

    def _read(
        self, backbone: Backbone, features: State, ids: TokenIds, hidden: Bool[Tensor, "batch time"]
    ) -> tuple[Float[Tensor, " masked"], Bool[Tensor, " masked"]]:
        """Nats of each masked token, and whether it was the most probable one.

        Logits exist for ``objective.logit_chunk`` positions at once, and are made a second time in the backward pass.
        """
        read, targets = features[:, :-1][hidden[:, 1:]], ids[:, 1:][hidden[:, 1:]]

        def chunk(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.head(backbone, states[None])[0].float()
            return F.cross_entropy(logits, wanted, reduction="none"), logits.detach().argmax(-1) == wanted

        size = self.config.objective.logit_chunk
        # One chunk even where nothing is masked: every weight then has a gradient, which DDP waits for.
        parts = [
            checkpoint(chunk, states, wanted, use_reentrant=False, preserve_rng_state=False)
            for states, wanted in zip(read.split(size), targets.split(size), strict=True)
        ]
        return torch.cat([nats for nats, _ in parts]), torch.cat([correct for _, correct in parts])

    def _count(self, meter: Meter, *, batch: int, new: int, read: int, training: bool) -> None:
        whole = self.decoder is not None
        meter.stack(batch=batch, new=new, backward=training, weights=whole, adapters=tuple(self.lora))
        meter.head(read, backward=training, weights=whole, recomputed=training)

    def flops_per_token(self, backbone: Backbone, *, batch: int, length: int) -> dict[str, float]:
        """FLOPs of one token in training by part of ``dihal.meter.PARTS``, with as many tokens masked as are on average."""
        meter = Meter(backbone)
        self._count(meter, batch=batch, new=length, read=batch * (length - 1) // 2, training=True)
        return {part: value / (batch * length) for part, value in meter.flops.items()}

    # -- writing

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
        compare: bool = True,
    ) -> MaskedText:
        """Write the tokens that are not known; see :func:`dihal.masked.sampling.write`.

        ``compare`` is there for what calls writers of either regime: one readout has nothing to compare.
        """
        writing = self.config.writing if writing is None else writing
        check_masked_writing(writing)
        return write(self, backbone, input_ids, known, given=given, writing=writing, sample_ids=sample_ids, end=end)


def _trainable_copy(backbone: Backbone) -> tuple[nn.Module, nn.Module | None]:
    """The backbone's decoder, and its head where that is not the embedding: copies, in fp32, on the CPU, trainable."""
    parts = nn.ModuleList([backbone.decoder, *([] if backbone.tied else [backbone.output_embedding])])
    parts = copy.deepcopy(parts).cpu()
    for parameter in parts.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return parts[0], None if backbone.tied else parts[1]
