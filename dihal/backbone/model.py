"""The frozen causal LM, split."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dihal.backbone import weights
from dihal.backbone.checks import (
    default_positions,
    require_block_range,
    require_cache,
    require_held,
    require_kept,
    require_length,
    require_mask,
    require_split,
    require_state,
    require_token_ids,
)
from dihal.backbone.layout import Layout
from dihal.backbone.reference import BackboneReference
from dihal.backbone.tokens import fingerprint_tokenizer, special_id
from dihal.backbone.views import prefix_view, suffix_view
from dihal.errors import UsageError
from dihal.types import Logits, State, TokenIds

if TYPE_CHECKING:
    from dihal.backbone.cache import BlockCache

__all__ = ["Backbone"]

Positions = Int[Tensor, "#batch time"]
"""Positions of the new tokens; one row serves a whole batch."""

Padding = Shaped[Tensor, "batch total"]
"""1 or True where a token is real; with a cache, cached and new tokens."""


class Backbone:
    """A frozen causal LM that runs in parts. Made by `load_backbone`.

    Not an ``nn.Module``: held by one, it enters no registry (checkpoint, optimiser, average, broadcast).
    Its weights need no gradient; gradients flow through states. Dropout is off. The parts are run by the model's own forward (`dihal.backbone.views`): the suffix of a
    prefix gives the model's own logits, bit for bit.

    Padding may lie left or right. Where ``position_ids`` are not given, real tokens are counted
    from 0. What is computed at padded positions is finite but means nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        family: str,
        layout: Layout,
        reference: BackboneReference,
        tokenizer: Any | None,
        *,
        held: int | None = None,
    ):
        self.model = model
        self.family = family
        self.layout = layout
        self.reference = reference
        self._tokenizer = tokenizer
        self.held = held
        """Blocks that have weights, beside the embedding; None: the whole model, with norm and head."""

    def __repr__(self) -> str:
        return (
            f"Backbone({self.reference.id!r}, family={self.family!r}, num_blocks={self.num_blocks}, "
            f"hidden_size={self.hidden_size}, dtype={self.dtype}, device={str(self.device)!r})"
        )

    @property
    def config(self) -> Any:
        """The Hugging Face config."""
        return self.model.config

    @property
    def decoder(self) -> nn.Module:
        """Embedding, blocks and final norm."""
        return self.model.get_submodule(self.layout.decoder)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, lowest first."""
        return list(self.decoder.get_submodule(self.layout.blocks))

    @property
    def num_blocks(self) -> int:
        """L."""
        return self.reference.num_blocks

    @property
    def hidden_size(self) -> int:
        """d, the width of a state."""
        return self.reference.hidden_size

    @property
    def vocab_size(self) -> int:
        """V, the rows of the embedding."""
        return self.reference.vocab_size

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and states."""
        return self.input_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.input_embedding.weight.device

    @property
    def attention(self) -> str:
        """Attention implementation in use: ``sdpa`` or ``eager``."""
        return self.config._attn_implementation

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that learned positions allow (GPT-2); None where positions are rotary."""
        return self.config.max_position_embeddings if len(self.layout.embeddings) > 1 else None

    @property
    def input_embedding(self) -> nn.Module:
        """The token embedding."""
        return self.model.get_input_embeddings()

    @property
    def output_embedding(self) -> nn.Module:
        """The linear LM head, before any soft-cap."""
        return self.model.get_output_embeddings()

    @property
    def tied(self) -> bool:
        """Whether the head's matrix is the embedding's."""
        return self.output_embedding.weight is self.input_embedding.weight

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer; a `UsageError` where the backbone came without one."""
        if self._tokenizer is None:
            raise UsageError(
                f"the backbone {self.reference.id!r} came without a tokenizer. "
                "Give one: load_backbone(..., tokenizer=AutoTokenizer.from_pretrained(...))."
            )
        return self._tokenizer

    @property
    def tokenizer_fingerprint(self) -> str:
        """Hex digest of everything by which the tokenizer turns text into ids."""
        return fingerprint_tokenizer(self.tokenizer)

    @property
    def start_token_id(self) -> int | None:
        """The token put first in a window: the beginning-of-sequence token, else the end token, else None."""
        start = special_id("bos_token_id", self._tokenizer, self.config)
        return self.end_token_id if start is None else start

    @property
    def end_token_id(self) -> int | None:
        """The token between documents; None where the model has none."""
        return special_id("eos_token_id", self._tokenizer, self.config)

    def _run(
        self,
        view: nn.Module,
        new: tuple[int, int],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: BlockCache | None,
        **inputs: Tensor,
    ) -> Tensor:
        batch, time = new
        total = time + (cache.length if cache is not None else 0)
        require_mask(attention_mask, batch, total)
        require_length(total, self.max_positions)
        if position_ids is None:
            position_ids = default_positions(attention_mask, time)
        output = view(
            **inputs,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        if cache is not None:
            cache.note_tokens(time)
        return output[0]

    def _prefix(
        self,
        input_ids: Tensor,
        split: int,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: BlockCache | None = None,
        taps: Any = None,
    ) -> Tensor:
        require_token_ids(input_ids, self.vocab_size)
        require_held(self.held, split)
        view = prefix_view(self.decoder, self.layout, split, taps)
        shape = (input_ids.shape[0], input_ids.shape[1])
        return self._run(view, shape, attention_mask, position_ids, cache, input_ids=input_ids)

    def embed(self, input_ids: TokenIds, *, position_ids: Positions | None = None) -> State:
        """h^0: token embeddings exactly as they enter block 0 (scaled, learned positions added)."""
        require_token_ids(input_ids, self.vocab_size)
        view = prefix_view(self.decoder, self.layout, 0)
        # No block reads a mask: a ready-made one spares the library making one, and waiting for the device to do so.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        return view(input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False)[0]

    def prefix(
        self,
        input_ids: TokenIds,
        split: int,
        *,
        attention_mask: Padding | None = None,
        position_ids: Positions | None = None,
        cache: BlockCache | None = None,
    ) -> State:
        """h^split of the given tokens; with a cache, of those it has not seen.

        Args:
            input_ids, split: the tokens, and how many blocks to run, 0 .. L-1.
            attention_mask: padding, over cached and new tokens.
            position_ids: positions of the new tokens; None: counted (see the class).
            cache: from ``new_cache(0, split)``; grows by the new tokens.

        Raises:
            UsageError: split out of range; ids, mask or cache that do not fit.
        """
        require_split(split, self.num_blocks)
        require_cache(cache, 0, split)
        return self._prefix(input_ids, split, attention_mask, position_ids, cache)

    def suffix_features(
        self,
        state: State,
        split: int,
        *,
        attention_mask: Padding | None = None,
        position_ids: Positions | None = None,
        cache: BlockCache | None = None,
    ) -> State:
        """Run blocks ``split`` .. L-1 and the final norm on a state h^split, cast to the backbone's dtype; `head` makes logits."""
        require_split(split, self.num_blocks)
        require_held(self.held, None)
        require_state(state, self.hidden_size)
        require_cache(cache, split, self.num_blocks)
        state = state.to(self.dtype)
        view = suffix_view(self.decoder, self.layout, split, state)
        shape = (state.shape[0], state.shape[1])
        return self._run(view, shape, attention_mask, position_ids, cache, inputs_embeds=state.detach())

    def head(self, features: State) -> Logits:
        """Logits of states after the final norm, soft-capped where the family does; one position at a time or all."""
        logits = self.output_embedding(features)
        cap = getattr(self.config, self.layout.softcap) if self.layout.softcap else None
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def suffix(
        self,
        state: State,
        split: int,
        *,
        attention_mask: Padding | None = None,
        position_ids: Positions | None = None,
        cache: BlockCache | None = None,
        logits_to_keep: int = 0,
    ) -> Float[Tensor, "batch kept vocab"]:
        """Next-token logits from a state h^split: `suffix_features`, then `head` on the last ``logits_to_keep`` positions (0: all)."""
        require_kept(logits_to_keep, state.shape[1])
        features = self.suffix_features(
            state, split, attention_mask=attention_mask, position_ids=position_ids, cache=cache
        )
        return self.head(features[:, -logits_to_keep:])

    def forward(
        self,
        input_ids: TokenIds,
        *,
        attention_mask: Padding | None = None,
        position_ids: Positions | None = None,
    ) -> Logits:
        """The model's own forward, unsplit: what prefix and suffix are compared with."""
        require_token_ids(input_ids, self.vocab_size)
        require_held(self.held, None)
        require_mask(attention_mask, *input_ids.shape)
        if position_ids is None:
            position_ids = default_positions(attention_mask, input_ids.shape[1])
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
        return output.logits

    def visit(
        self,
        input_ids: TokenIds,
        splits: Iterable[int],
        show: Callable[[int, Tensor], None],
        *,
        attention_mask: Padding | None = None,
        position_ids: Positions | None = None,
    ) -> None:
        """Call ``show(l, h^l)`` for every l in ``splits`` as it appears, in one pass that ends at the deepest and keeps none.

        Raises:
            UsageError: no split, or one out of range.
        """
        wanted = sorted({require_split(split, self.num_blocks) for split in splits})
        if not wanted:
            raise UsageError("no split given; name at least one in 0 .. num_blocks - 1.")
        taps = {split: (lambda hidden, split=split: show(split, hidden)) for split in wanted[:-1]}
        show(wanted[-1], self._prefix(input_ids, wanted[-1], attention_mask, position_ids, taps=taps))

    def states(
        self,
        input_ids: TokenIds,
        splits: Iterable[int],
        *,
        attention_mask: Padding | None = None,
        position_ids: Positions | None = None,
    ) -> dict[int, State]:
        """h^l for every l in ``splits``: what :meth:`visit` shows, all kept."""
        captured: dict[int, Tensor] = {}
        self.visit(input_ids, splits, captured.__setitem__, attention_mask=attention_mask, position_ids=position_ids)
        return captured

    def new_cache(self, first_block: int, last_block: int) -> BlockCache:
        """An empty cache for a range of blocks: ``(0, split)`` for a prefix, ``(split, L)`` for a suffix.

        It has ``length``, ``truncate(length)`` and ``reorder(rows)``."""
        from dihal.backbone.cache import BlockCache

        require_block_range(first_block, last_block, self.num_blocks)
        return BlockCache(self.config, first_block, last_block)

    def linear_names(self, first_block: int = 0) -> list[str]:
        """Full names of every linear layer of attention and MLP in blocks ``first_block`` .. L-1."""
        require_block_range(first_block, self.num_blocks, self.num_blocks)
        return weights.linear_names(self, first_block)

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Last names of the linear layers of attention and MLP: peft's ``target_modules``."""
        return self.layout.linears

    @property
    def layers_pattern(self) -> str:
        """Name of the list of blocks: peft's ``layers_pattern``."""
        return self.layout.blocks

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights that are held, tied ones once."""
        return sum(weight.nbytes for weight in self.model.parameters() if not weight.is_meta)

    def parameter_count(self, first_block: int = 0, *, embedding: bool = True, head: bool = True) -> int:
        """Weights in blocks ``first_block`` .. L-1, with the embedding and with final norm and head if asked; tied ones once."""
        return weights.count(self, first_block, embedding=embedding, head=head)

    def fingerprint(
        self, first_block: int = 0, *, embedding: bool = True, head: bool = True, dtype: str | None = None
    ) -> str:
        """Hex sha256 over names, types, shapes and bytes of the weights of embedding, blocks ``first_block`` .. L-1, norm and head.

        A tied head counts as head. Adapters of peft are left out and the names they change restored.

        Args:
            first_block, embedding, head: what counts: blocks from it on, embedding, final norm and head.
            dtype: name of the type whose fingerprint is asked for, at most as wide as the one held: that of
                weights cast down from these.

        Raises:
            UsageError: the weights are held in fewer bits than ``dtype``, in another type of that size, or not at all.
        """
        require_block_range(first_block, self.num_blocks, self.num_blocks)
        return weights.fingerprint_of(self, first_block, embedding=embedding, head=head, dtype=dtype)

    def flops_per_token(self, first_block: int, last_block: int, context: int | float) -> float:
        """Forward FLOPs of one token through blocks ``first_block`` .. ``last_block - 1``: matrix products only.

        Two per weight of every linear layer, four per attended position and attention channel. ``context``
        is the mean number of positions attended to, (T + 1) / 2 for a causal sequence of T; windows shorten it.
        """
        require_block_range(first_block, last_block, self.num_blocks)
        return weights.block_flops(self, range(first_block, last_block), context)

    def head_flops_per_token(self) -> float:
        """Forward FLOPs of the LM head for one position."""
        return 2.0 * self.output_embedding.weight.numel()
