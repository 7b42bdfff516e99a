"""Writing with a masked diffusion LM: from all masked to none, a block at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dihal.config.spaces import WritingConfig
from dihal.errors import UsageError
from dihal.masked.attention import full
from dihal.masked.reveal import Drawn, chosen, draw, planned
from dihal.meter import Meter
from dihal.random import uniform
from dihal.types import Mask, TokenIds
from dihal.writing.draw import gumbel
from dihal.writing.known import position_keys

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.masked.model import MaskedLM

__all__ = ["MaskedText", "write"]

_ROWS = 256
"""Positions whose fp64 logits exist at once (memory, not results)."""


@dataclass(frozen=True, kw_only=True)
class MaskedText:
    """Texts and what they cost; the names are those of ``dihal.writing.sampling.Written``.

    Attributes:
        tokens: (batch, time); known and given tokens are those that were given.
        lengths: tokens before the first end token that is not part of the known text; the whole row where there is none.
        revealed: pass of the network (from 0) that revealed each position; -1 where it was known or given, and in
            blocks that were left out because every text had ended.
        agreement: None: there is one readout.
        nfe: passes of the network, over all blocks. A step that has nothing to reveal in any row is not run.
        encodes: 0; there is no state to encode.
        reads: 0; there is no frozen stack.
        blocks: blocks written.
        flops: by part of ``dihal.meter.PARTS``.
    """

    tokens: TokenIds
    lengths: Int[Tensor, " batch"]
    revealed: Int[Tensor, "batch time"]
    agreement: None
    nfe: int
    encodes: int
    reads: int
    blocks: int
    flops: dict[str, float]


def _check(visible: Mask, ids: Tensor) -> None:
    if ids.shape[1] == 0 or bool(visible.all()):
        raise UsageError("nothing is left to write: every position is known. Give more positions or fewer known ones.")
    if not bool(visible[:, 0].all()):
        raise UsageError(
            "the first token of every row must be known: token i is predicted at position i - 1. Begin with the start token."
        )


class _Text:
    """Rows being written."""

    def __init__(
        self,
        model: MaskedLM,
        backbone: Backbone,
        writing: WritingConfig,
        ids: TokenIds,
        keys: Tensor,
        banned: int | None,
    ) -> None:
        self.model, self.backbone, self.writing = model, backbone, writing
        self.ids, self.keys, self.banned = ids, keys, banned
        self.revealed = torch.full_like(ids, -1)
        self.visible = full(torch.ones_like(ids, dtype=torch.bool))
        self.meter = Meter(backbone)
        self.nfe = 0

    def write(self, block: Mask) -> None:
        """Reveal the masked positions of ``block``, ``writing.steps`` times a part of them."""
        counts = planned(block.sum(-1), self.writing.steps)
        for step, count in enumerate(counts.unbind(-1)):
            if bool(count.any()):
                self._reveal(block & (self.revealed < 0), count, step)

    def _reveal(self, hidden: Mask, count: Int[Tensor, " batch"], step: int) -> None:
        tokens, log_p, entropy = self._draw(hidden, step)
        score = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
        match self.writing.order:
            case "confidence":
                score[hidden] = log_p
            case "entropy":
                score[hidden] = -entropy
            case "random":
                score = uniform(self.writing.seed, self.keys, "masked/order", dtype=torch.float64)
        now = chosen(score, hidden, count)
        drawn = self.ids.clone()
        drawn[hidden] = tokens
        self.ids = torch.where(now, drawn, self.ids)
        self.revealed = torch.where(now, self.nfe, self.revealed)
        self.nfe += 1

    def _draw(self, hidden: Mask, step: int) -> Drawn:
        """A token for every masked position of the block, in the order of ``hidden.nonzero()``."""
        writing, model = self.writing, self.model
        half = writing.precision == "bfloat16"
        with torch.autocast(self.ids.device.type, dtype=torch.bfloat16, enabled=half):
            states = model.features(self.backbone, self.ids, self.visible)
            states = states[:, :-1][hidden[:, 1:]]  # token i is read at position i - 1; the first is never masked
            self.meter.stack(batch=self.ids.shape[0], new=self.ids.shape[1], adapters=tuple(model.lora))
            self.meter.head(len(states))
            purpose = "masked/token" if writing.common_noise else f"masked/token {step}"
            parts = []
            for rows, keys in zip(states.split(_ROWS), self.keys[hidden].split(_ROWS), strict=True):
                logits = model.head(self.backbone, rows[None])[0]
                if bool(logits.isnan().any()):
                    raise UsageError(
                        "a logit is not a number: the weights are broken, or too large for this precision."
                    )
                if self.banned is not None:
                    logits[:, self.banned] = float("-inf")
                noise = gumbel(writing.seed, keys, purpose, logits.shape[-1]) if writing.temperature > 0 else None
                parts.append(draw(logits, noise, temperature=writing.temperature, top_p=writing.top_p))
        tokens, log_p, entropy = zip(*parts, strict=True)
        return torch.cat(tokens), torch.cat(log_p), torch.cat(entropy)


@torch.no_grad()
def write(
    model: MaskedLM,
    backbone: Backbone,
    input_ids: TokenIds,
    known: Bool[Tensor, "batch time"],
    *,
    given: Bool[Tensor, "batch time"] | None,
    writing: WritingConfig,
    sample_ids: Int[Tensor, " batch"] | None,
    end: bool,
) -> MaskedText:
    """Write the tokens that are not known.

    All rows start at column 0 and are complete in what is given; anything else is masked. A block of positions is
    revealed in ``writing.steps`` parts that are as equal as whole numbers allow; at each step every masked position of
    the block gets a token drawn, and those that ``writing.order`` puts first keep theirs (LLaDA's and Dream's remasking of
    low confidence). Positions of later blocks stay masked and visible meanwhile. What ``input_ids`` holds at unknown
    positions is never looked at, and the length of the rows is room to write in: where a text ends, the model decides by
    its end token.

    A token depends on (seed, sample id, position) and on what is known, not on the batch; but where prefixes differ in
    length, blocks begin where the shortest one ends.

    Args:
        model: the converted backbone.
        backbone: what it was converted from.
        input_ids: (batch, time) tokens.
        known: True where the token is known: a prefix, or any other part that holds the first token.
        given: further known tokens, e.g. text after a gap.
        writing: how.
        sample_ids: key of each row's random numbers; default 0 for all rows.
        end: the end token may be written; False: it never is.

    Raises:
        UsageError: nothing to write, a first token that is not known, or a logit that is not a number.
    """
    device = backbone.device
    visible = known.to(device) if given is None else (known | given).to(device)
    _check(visible, input_ids)
    stop_id = backbone.end_token_id
    if end and stop_id is None:
        raise UsageError(f"the backbone {backbone.reference.id!r} has no end token: give end=False.")
    # Whatever stands at unknown positions is gone before anything is run.
    ids = torch.where(visible, input_ids.to(device), model.mask_token_id)
    batch, time = ids.shape
    rows = torch.zeros(batch, dtype=torch.int64, device=device) if sample_ids is None else sample_ids.to(device)
    columns = torch.arange(time, device=device)
    keys = position_keys(rows, columns.expand(batch, time))
    text = _Text(model, backbone, writing, ids, keys, None if end else stop_id)
    training = model.training
    model.eval()
    try:
        start, blocks = int(visible.all(0).long().cumprod(0).sum()), 0
        size = time - start if writing.block is None else writing.block
        while start < time:
            text.write(~visible & (columns >= start) & (columns < start + size))
            start, blocks = start + size, blocks + 1
            written = ~visible & (columns < start)
            if end and start < time and bool((written & (text.ids == stop_id)).any(-1).all()):
                text.ids = torch.where(~visible & (columns >= start), stop_id, text.ids)
                break
    finally:
        model.train(training)
    lengths = torch.full((batch,), time, device=device)
    if end:
        ended = ~visible & (text.ids == stop_id)
        lengths = torch.where(ended.any(-1), ended.long().argmax(-1), lengths)
    return MaskedText(
        tokens=text.ids,
        lengths=lengths,
        revealed=text.revealed,
        agreement=None,
        nfe=text.nfe,
        encodes=0,
        reads=0,
        blocks=blocks,
        flops=text.meter.flops,
    )
