"""The rows of a table: trained methods beside the rows that are always there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dihal.config import LoraConfig
from dihal.controls import Embedding, Identity, MeanState
from dihal.evaluation.checkpoints import Trained
from dihal.methods import Method, build_method

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from dihal.backbone import Backbone

__all__ = ["NO_SAMPLING", "Row", "Source", "build_rows", "unigram_log_probabilities"]

NO_SAMPLING = 0
"""Number of steps of a row that does not sample."""


@runtime_checkable
class Source(Protocol):
    """Where a row's h^l comes from: a method or a control."""

    split: int

    def states(self, backbone: Backbone, input_ids: Tensor, **keywords: Any) -> Tensor:
        """h^l of every position."""

    def reading(self) -> AbstractContextManager[None]:
        """Scope in which the suffix reads these states."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One row of a table."""

    name: str
    method: str
    """Entry of the method registry, or the control's own name."""
    kind: str
    """See `result.KINDS`."""
    split: int | None = None
    steps: tuple[int, ...] = (NO_SAMPLING,)
    source: Source | None = None
    """Gives states; None: `logits`, or the backbone itself."""
    logits: Float[Tensor, " vocab"] | None = None
    """The same next-token distribution everywhere."""
    trained: Trained | None = None
    basis: Trained | None = None
    """A checkpoint that a control takes its statistics or its configuration from."""
    frozen_parameters: int | None = None
    trainable_parameters: int | None = None
    nfe: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def unigram_log_probabilities(counts: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
    """Return log((count + 1) / (total + V)): token frequencies with add-one smoothing, in fp32."""
    smoothed = counts.double() + 1.0
    return (smoothed / smoothed.sum()).log().float()


def _parameters(method: Method) -> int:
    return sum(parameter.numel() for parameter in method.parameters())


def _untrained(trained: Trained, backbone: Backbone) -> Method:
    # Fresh weights, but the normalisation that training measures before its first step. Fresh adapters change nothing
    # (their second factor starts at zero), and a backbone holds one set of adapters: left out.
    config = replace(trained.config.method, split=trained.method.split, lora=LoraConfig())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trained.config.seed)
        method = build_method(config, backbone)
    method.space.load_state_dict(trained.method.space.state_dict())
    return method.to(backbone.device).eval().requires_grad_(False)


def _nfe(method: Method, steps: tuple[int, ...], sampler: str | None) -> dict[str, int]:
    return {str(count): method.evaluations(count, sampler) for count in steps}


def build_rows(
    backbone: Backbone,
    trained: list[Trained],
    *,
    steps: tuple[int, ...],
    sampler: str | None,
    unigram: Float[Tensor, " vocab"],
) -> list[Row]:
    """Return every row, bounds first, then controls per split, then checkpoints.

    The untrained bridge has the checkpoint's normalisation and is measured at the fewest steps only: its
    network's output is constant, more steps cannot change what it shows.

    Args:
        backbone: the backbone.
        trained: the checkpoints; each distinct split gets its own controls, named ``control@split``.
        steps: numbers of sampling steps; a regression has one.
        sampler: solver, or None for each checkpoint's own.
        unigram: log-probabilities of the unigram row.
    """
    whole = backbone.parameter_count()
    rows = [Row(name="backbone", method="backbone", kind="bound", frozen_parameters=whole)]
    controls: list[Row] = []
    first = {item.method.split: item for item in reversed(trained)}
    for split in sorted(first):
        suffix = backbone.parameter_count(split, embedding=False)
        read = backbone.parameter_count(split)
        space = first[split].method.space
        rows.append(
            Row(
                name=f"identity@{split}",
                method="identity",
                kind="bound",
                split=split,
                source=Identity(split),
                frozen_parameters=whole,
            )
        )
        controls += [
            Row(
                name=f"embedding@{split}",
                method="embedding",
                kind="control",
                split=split,
                source=Embedding(split),
                frozen_parameters=read,
            ),
            Row(
                name=f"mean-state@{split}",
                method="mean-state",
                kind="control",
                split=split,
                source=MeanState(space),
                basis=first[split],
                frozen_parameters=suffix,
                notes=(f"mean of the training states as measured by {first[split].name}",),
            ),
        ]
    controls += _untrained_rows(backbone, trained, fewest=min(steps), sampler=sampler)
    rows += controls
    rows.append(Row(name="unigram", method="unigram", kind="control", logits=unigram, frozen_parameters=0))
    for item in trained:
        one_step = item.method.noise_scale == 0.0
        counts = (1,) if one_step else tuple(sorted(set(steps)))
        rows.append(
            Row(
                name=item.name,
                method=item.config.method.name,
                kind="checkpoint",
                split=item.method.split,
                steps=counts,
                source=item.method,
                trained=item,
                frozen_parameters=backbone.parameter_count(item.method.split),
                trainable_parameters=_parameters(item.method),
                nfe=_nfe(item.method, counts, sampler),
                notes=("a regression: one pass without noise",) if one_step else (),
            )
        )
    return rows


def _untrained_rows(backbone: Backbone, trained: list[Trained], *, fewest: int, sampler: str | None) -> list[Row]:
    rows: list[Row] = []
    seen: dict[int, list[Any]] = {}
    for item in trained:
        split, config = item.method.split, item.config.method
        if config in seen.setdefault(split, []):
            continue
        name = f"untrained@{split}" if not seen[split] else f"untrained@{split} ({item.name})"
        seen[split].append(config)
        method = _untrained(item, backbone)
        counts = (1,) if method.noise_scale == 0.0 else (fewest,)
        rows.append(
            Row(
                name=name,
                method=config.name,
                kind="control",
                split=split,
                steps=counts,
                source=method,
                basis=item,
                frozen_parameters=backbone.parameter_count(split),
                trainable_parameters=_parameters(method),
                nfe=_nfe(method, counts, sampler),
                notes=(f"fresh weights of {item.name}, with its normalisation",),
            )
        )
    return rows
