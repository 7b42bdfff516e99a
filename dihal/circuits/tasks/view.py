"""How a model looks at a pair: causal with the answer to come, or in full with the answer's positions masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from dihal.circuits.tasks.text import Encoded
from dihal.circuits.types import Attention, PairBatch
from dihal.errors import UsageError

__all__ = ["View", "look", "require_aligned", "reveal_counts", "stack"]


@dataclass(frozen=True, kw_only=True)
class View:
    """What one model is shown of a pair, and where its prediction is read."""

    attention: Literal["causal", "full"] = "causal"
    """`causal`: the text before a target, read one position earlier. `full`: the whole text, targets masked."""
    mask_id: int | None = None
    """Id of the mask token; needed under `full`."""
    shift: bool = True
    """Under `full`: the prediction for position i is read at i-1, as in models made from causal ones (LLaDA: False)."""
    steps: int = 1
    """Under `full`: states of the reveal trajectory that are looked at, evenly spaced from all masked on."""

    def __post_init__(self) -> None:
        if self.attention == "full" and self.mask_id is None:
            raise UsageError("a masked diffusion model needs the id of its mask token: set mask_id.")
        if self.steps < 1:
            raise UsageError(f"steps must be at least 1, got {self.steps}.")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a batch: what a model reads in the clean and in the corrupted run."""

    id: int
    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    positions: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    foils: tuple[tuple[int, ...], ...]
    meta: dict


def reveal_counts(read: Sequence[bool], order: Sequence[int], steps: int) -> list[int]:
    """How many tokens are revealed at each looked-at state, evenly spaced while something that is read is still masked.

    Args:
        read: whether each token of the slot is read.
        order: slot indices in the order in which they are revealed.
        steps: states wanted; fewer come back where the trajectory is shorter.
    """
    last = max(place for place, index in enumerate(order) if read[index])
    wanted = min(steps, last + 1)
    return [round(k * last / max(1, wanted - 1)) for k in range(wanted)]


def look(pair: Encoded, sample: int, view: View, order: Sequence[int] | None = None) -> list[Row]:
    """Lines of one pair: one under `causal`, one per looked-at state of the trajectory under `full`.

    Args:
        pair: the pair.
        sample: its id.
        view: how to look.
        order: reveal order of the slot (indices); None: left to right. Clean and corrupted run share it.

    Raises:
        UsageError: no position to read at, or text after the answer that a causal model would not see.
    """
    read = [bool(foil) for foil in pair.foils]
    if pair.slot[0] == 0 and (view.attention == "causal" or view.shift):
        raise UsageError("the answer is the first token: no position before it can be read. Put text before it.")
    if view.attention == "causal":
        if pair.slot[-1] != len(pair.clean) - 1:
            raise UsageError(
                "this prompt has text after its answer, which a causal model does not see before it answers. "
                "Use attention 'full', or the task's form that ends with the answer."
            )
        chosen = [i for i, wanted in enumerate(read) if wanted]
        end = pair.slot[chosen[-1]]
        return [_row(pair, sample, pair.clean[:end], pair.corrupted[:end], chosen, 1, {"step": 0})]
    assert view.mask_id is not None
    if view.mask_id in pair.clean or view.mask_id in pair.corrupted:
        raise UsageError(f"the mask token {view.mask_id} stands in a prompt; equal mask patterns need it kept out.")
    order = range(len(pair.slot)) if order is None else order
    rows = []
    for step, revealed in enumerate(reveal_counts(read, order, view.steps)):
        hidden = [i for i in range(len(pair.slot)) if i not in set(order[:revealed])]
        masked = {pair.slot[i] for i in hidden}
        clean, corrupted = (
            tuple(view.mask_id if at in masked else token for at, token in enumerate(ids))
            for ids in (pair.clean, pair.corrupted)
        )
        chosen = [i for i in hidden if read[i]]
        rows.append(_row(pair, sample, clean, corrupted, chosen, int(view.shift), {"step": step, "revealed": revealed}))
    return rows


def _row(
    pair: Encoded,
    sample: int,
    clean: tuple[int, ...],
    corrupted: tuple[int, ...],
    chosen: Sequence[int],
    shift: int,
    more: dict,
) -> Row:
    return Row(
        id=sample,
        clean=clean,
        corrupted=corrupted,
        positions=tuple(pair.slot[i] - shift for i in chosen),
        answers=tuple(pair.answers[i] for i in chosen),
        foils=tuple(pair.foils[i] for i in chosen),
        meta={**pair.meta, **more, "slot": list(pair.slot)},
    )


def _padded(rows: Sequence[Row], name: str) -> Int[Tensor, "batch targets choices"]:
    targets = max(len(row.positions) for row in rows)
    choices = max(len(ids) for row in rows for ids in getattr(row, name))
    out = torch.full((len(rows), targets, choices), -1, dtype=torch.int64)
    for i, row in enumerate(rows):
        for j in range(targets):
            # A target of weight 0 repeats the first one: every listed id is then a valid one.
            ids = getattr(row, name)[j if j < len(row.positions) else 0]
            out[i, j, : len(ids)] = torch.tensor(ids)
    return out


def stack(rows: Sequence[Row], attention: Attention) -> PairBatch:
    """One batch of lines of equal length."""
    targets = max(len(row.positions) for row in rows)
    positions = [(*row.positions, *[row.positions[0]] * (targets - len(row.positions))) for row in rows]
    weights = [[float(j < len(row.positions)) / len(row.positions) for j in range(targets)] for row in rows]
    return PairBatch(
        clean=torch.tensor([row.clean for row in rows]),
        corrupted=torch.tensor([row.corrupted for row in rows]),
        positions=torch.tensor(positions),
        answers=_padded(rows, "answers"),
        foils=_padded(rows, "foils"),
        weights=torch.tensor(weights),
        attention=attention,
        ids=torch.tensor([row.id for row in rows]),
        meta=tuple(row.meta for row in rows),
    )


def require_aligned(batch: PairBatch, mask_id: int | None = None) -> None:
    """Refuse a batch whose clean and corrupted runs cannot be compared position by position.

    Raises:
        UsageError: equal prompts, or different mask patterns (unequal lengths never make a batch).
    """
    same = (batch.clean == batch.corrupted).all(1)
    if bool(same.any()):
        raise UsageError(f"prompts {batch.ids[same].tolist()} are the same in the clean and in the corrupted run.")
    if mask_id is not None and not torch.equal(batch.clean == mask_id, batch.corrupted == mask_id):
        raise UsageError("clean and corrupted prompts are masked at different positions. Mask the same ones.")
