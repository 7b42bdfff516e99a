"""Writing: from what is known to tokens, a block at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dihal.config.spaces import WritingConfig
from dihal.diffusion.guidance import evaluations_per_estimate
from dihal.errors import UsageError
from dihal.meter import Meter
from dihal.types import TokenIds
from dihal.writing.block import Block, branches_of, estimates, walked_process
from dihal.writing.context import Context, Costs
from dihal.writing.draw import kept_bytes
from dihal.writing.known import position_keys, settled
from dihal.writing.static import StaticContext

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.writer import Writer

__all__ = ["Written", "evaluations", "write"]


@dataclass(frozen=True, kw_only=True)
class Written:
    """Texts and what they cost.

    Attributes:
        tokens: (batch, time); known and given tokens are those that were given.
        lengths: tokens before the first end token that is not part of the known prefix; the whole row where there is none.
        own_tokens: what the own head alone reads from the last states, with the same noise and temperature; None: not compared.
        suffix_tokens: the same of the frozen stack alone.
        agreement: share of the written positions at which these two are the same token; None: not compared.
        nfe: calls of the denoiser on unknown positions, guidance included, summed over blocks.
        encodes: passes of read tokens through the blocks below the split.
        reads: passes of states through the blocks from the split on, the comparison included.
        blocks: blocks written.
        flops: by part of ``dihal.meter.PARTS``, passes over known text included.
    """

    tokens: TokenIds
    lengths: Int[Tensor, " batch"]
    own_tokens: TokenIds | None
    suffix_tokens: TokenIds | None
    agreement: Float[Tensor, " batch"] | None
    nfe: int
    encodes: int
    reads: int
    blocks: int
    flops: dict[str, float]


def evaluations(writing: WritingConfig, space: str) -> int:
    """Number of function evaluations (NFE) of one block in a space."""
    return evaluations_per_estimate(writing.guidance) * estimates(writing, space)


def _check(known: Tensor, given: Tensor, writing: WritingConfig, ids: Tensor) -> None:
    if ids.shape[1] == 0 or bool(known.all()):
        raise UsageError("nothing is left to write: every position is known. Give more positions or fewer known ones.")
    if not torch.equal(settled(known), known):
        raise UsageError(
            "known= must be a prefix of each row: the state of a token after a gap is not known. "
            "Mark tokens after a gap in given=."
        )
    if writing.block is not None and bool((given & ~known).any()):
        raise UsageError(
            "text after a gap is denoised together with the gap: leave writing.block out where given= is used."
        )


def _check_finite(finite: list[Tensor]) -> None:
    """Refuse texts drawn from logits that were not numbers; asked at the end, to keep a GPU busy."""
    if finite and not bool(torch.stack(finite).all()):
        raise UsageError("the logits to write from are NaN or infinite: the checkpoint diverged or is damaged.")


def _denoised(
    tokens: Tensor, known: Tensor, given: Tensor, keys: Tensor, *, context: Context, **options: Any
) -> tuple[Tensor, ...]:
    """A block's tokens, whether they are drawn from numbers, and the readouts' own tokens if they are compared."""
    text = Block(
        context.writer, context.backbone, context, tokens=tokens, known=known, given=given, keys=keys, **options
    ).run()
    alone = () if text.own is None or text.suffix is None else (text.own, text.suffix)
    return (text.tokens, text.finite, *alone)


@torch.no_grad()
def write(
    writer: Writer,
    backbone: Backbone,
    input_ids: TokenIds,
    known: Bool[Tensor, "batch time"],
    *,
    given: Bool[Tensor, "batch time"] | None,
    writing: WritingConfig,
    sample_ids: Int[Tensor, " batch"] | None,
    end: bool,
    cached: bool = True,
    compare: bool = True,
) -> Written:
    """Write the unknown tokens; see :meth:`dihal.writer.Writer.write`."""
    device = backbone.device
    known = known.to(device)
    given = (torch.zeros_like(known) if given is None else given.to(device)) & ~known
    _check(known, given, writing, input_ids)
    # Whatever stands at unknown positions is gone before anything is run.
    ids = torch.where(known | given, input_ids.to(device), 0)
    batch, time = ids.shape
    stop_id = backbone.end_token_id
    if end and stop_id is None:
        raise UsageError(f"the backbone {backbone.reference.id!r} has no end token: give end=False.")
    rows = torch.zeros(batch, dtype=torch.int64, device=device) if sample_ids is None else sample_ids.to(device)
    keys = position_keys(rows, torch.arange(time, device=device).expand(batch, time))
    free = ~(known | given)
    costs = Costs(meter=Meter(backbone))
    options = {
        "batch": batch,
        "branches": branches_of(writing.guidance),
        "reads_suffix": compare or writing.readout != "own",
        "precision": writing.precision,
        "costs": costs,
    }
    if writing.static and not cached:
        raise UsageError("writing.static keeps keys and values: it goes with cached=True only.")
    if writing.static:
        context: Context = StaticContext(writer, backbone, room=time, compiled=writing.compile, **options)
    else:
        context = Context(writer, backbone, cached=cached, **options)
    tokens, own, suffix = ids.clone(), ids.clone(), ids.clone()
    # A state is known from a block's start where its first column is.
    begins: list[bool] = (known | given).any(0).tolist()
    banned = None if end else stop_id
    how = {"writing": writing, "banned": banned, "compare": compare}
    how |= {"context": context, "process": walked_process(writer), "noise_bytes": kept_bytes(device)}
    finite: list[Tensor] = []
    with torch.autocast(device.type, enabled=False):
        start = int(known.all(0).long().cumprod(0).sum())
        context.extend(ids[:, :start])
        size = time - start if writing.block is None else writing.block
        while start < time:
            part = slice(start, min(start + size, time))
            denoised = partial(_denoised, begins=begins[start], **how)
            depends = (writing, banned, compare, begins[start])
            given_columns = (ids[:, part], known[:, part], given[:, part], keys[:, part])
            text, numbers, *alone = context.block(denoised, depends, *given_columns)
            costs.blocks += 1
            finite.append(numbers)
            tokens[:, part] = text
            if compare:
                own[:, part], suffix[:, part] = alone
            start = part.stop
            if start < time:
                if end and bool(((tokens == stop_id) & free)[:, :start].any(-1).all()):
                    tokens[:, start:] = torch.where(free, stop_id, tokens)[:, start:]
                    free = free & (torch.arange(time, device=device) < start)
                    break
                context.extend(text)
        _check_finite(finite)
    context.close()
    agreement = None
    if compare:
        agreement = ((own == suffix) & free).sum(-1) / free.sum(-1).clamp_min(1)
    lengths = torch.full((batch,), time, device=device)
    if end:
        ended = (tokens == stop_id) & ~known
        lengths = torch.where(ended.any(-1), ended.long().argmax(-1), lengths)
    return Written(
        tokens=tokens,
        lengths=lengths,
        own_tokens=own if compare else None,
        suffix_tokens=suffix if compare else None,
        agreement=agreement,
        nfe=costs.nfe,
        encodes=costs.encodes,
        reads=costs.reads,
        blocks=costs.blocks,
        flops=costs.meter.flops,
    )
