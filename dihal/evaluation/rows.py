"""The rows of a table: trained methods beside the rows that are always there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dihal.config import LoraConfig
from dihal.controls import Embedding, Identity, MeanState, Oracle, RandomSuffix, Shuffled
from dihal.evaluation.checkpoints import Trained
from dihal.evaluation.ngram import NgramModel
from dihal.methods import Method, build_method
from dihal.types import TokenIds

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from dihal.backbone import Backbone
    from dihal.data.packing import EvaluationWindows

__all__ = ["NGRAMS", "NO_SAMPLING", "Row", "Source", "build_rows", "other_documents", "unigram_log_probabilities"]

NGRAMS = {"bigram": 2, "trigram": 3}
"""Rows of smoothed n-gram models -> their order."""

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
    """Gives states; None: `logits`, `ngram`, or the backbone itself."""
    logits: Float[Tensor, " vocab"] | None = None
    """The same next-token distribution everywhere."""
    ngram: NgramModel | None = None
    """Next-token distributions from the tokens before alone."""
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


def other_documents(windows: EvaluationWindows) -> TokenIds | None:
    """Return for each window the tokens of a window of another document, position by position.

    That is the window half of all windows further on (cyclically), or the next after it that is of another document
    and at least as long. Where no other document is long enough, the text of its longest window is repeated after its
    first token. None: there is only one document.
    """
    lengths, owners = windows.attention_mask.sum(-1), windows.document_ids[:, 0]
    if bool((owners == owners[0]).all()):
        return None
    out = windows.input_ids.clone()
    for row, (length, owner) in enumerate(zip(lengths.tolist(), owners.tolist(), strict=True)):
        others = (owners != owner).nonzero().squeeze(-1)
        enough = others[lengths[others] >= length]
        if len(enough):
            ahead = (enough - row - len(owners) // 2) % len(owners)
            chosen = int(enough[ahead.argmin()])
        else:
            chosen = int(others[lengths[others].argmax()])
        size = int(lengths[chosen])
        place = torch.arange(length)
        if size < length:
            place = torch.where(place < size, place, 1 + (place - 1) % max(1, size - 1))
        out[row, :length] = windows.input_ids[chosen, place]
    return out


def build_rows(
    backbone: Backbone,
    trained: list[Trained],
    *,
    steps: tuple[int, ...],
    sampler: str | None,
    unigram: Float[Tensor, " vocab"],
    ngrams: dict[str, NgramModel],
    other: TokenIds | None,
    controls: tuple[str, ...],
    seed: int,
) -> list[Row]:
    """Return every row, bounds first, then controls per split, then checkpoints.

    Controls that run a checkpoint's network are measured at the fewest steps only.

    Args:
        backbone: the backbone.
        trained: the checkpoints; each distinct split gets its own controls, named ``control@split``.
        steps: numbers of sampling steps; a regression has one.
        sampler: solver, or None for each checkpoint's own.
        unigram: log-probabilities of the unigram row.
        ngrams: models by row name.
        other: tokens of the shuffled rows (see `other_documents`); None: there are no such rows.
        controls: which controls (`EvalConfig.controls`).
        seed: seed of the random suffix.
    """
    whole = backbone.parameter_count()
    rows = [Row(name="backbone", method="backbone", kind="bound", frozen_parameters=whole)]
    first = {item.method.split: item for item in reversed(trained)}
    for split in sorted(first):
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
    found = [row for split in sorted(first) for row in _split_rows(backbone, first[split], seed=seed)]
    found += _checkpoint_rows(
        backbone, trained, fewest=min(steps), sampler=sampler, other=other, fresh="untrained" in controls
    )
    found.append(Row(name="unigram", method="unigram", kind="control", logits=unigram, frozen_parameters=0))
    for name, model in ngrams.items():
        note = f"interpolated Kneser-Ney of order {model.order}, counted on {model.tokens:,} training tokens"
        found.append(Row(name=name, method=name, kind="control", ngram=model, frozen_parameters=0, notes=(note,)))
    rows += [row for row in found if row.name.split("@")[0] in controls]
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


def _split_rows(backbone: Backbone, basis: Trained, *, seed: int) -> list[Row]:
    """Controls that a split has once, whatever was trained there."""
    split, space = basis.method.split, basis.method.space
    return [
        Row(
            name=f"embedding@{split}",
            method="embedding",
            kind="control",
            split=split,
            source=Embedding(split),
            frozen_parameters=backbone.parameter_count(split),
        ),
        Row(
            name=f"mean-state@{split}",
            method="mean-state",
            kind="control",
            split=split,
            source=MeanState(space),
            basis=basis,
            frozen_parameters=backbone.parameter_count(split, embedding=False),
            notes=(f"mean of the training states as measured by {basis.name}",),
        ),
        Row(
            name=f"random-suffix@{split}",
            method="random-suffix",
            kind="control",
            split=split,
            source=RandomSuffix(backbone, split, seed=seed),
            frozen_parameters=backbone.parameter_count(),
            notes=(
                f"true states read by blocks {split} to {backbone.num_blocks - 1} with random weights "
                "(mean and deviation of the trained ones); final norm and head as trained",
            ),
        ),
    ]


def _checkpoint_rows(
    backbone: Backbone,
    trained: list[Trained],
    *,
    fewest: int,
    sampler: str | None,
    other: TokenIds | None,
    fresh: bool,
) -> list[Row]:
    """Controls that run a checkpoint's network, trained or (if asked for) fresh."""
    rows: list[Row] = []
    configs: dict[int, list[Any]] = {}
    for item in trained:
        split, config = item.method.split, item.config.method
        seen = configs.setdefault(split, [])
        suffix = f" ({item.name})" if seen else ""
        counts = (1,) if item.method.noise_scale == 0.0 else (fewest,)
        shared: dict[str, Any] = {
            "kind": "control",
            "split": split,
            "steps": counts,
            "basis": item,
            "nfe": _nfe(item.method, counts, sampler),
        }
        if fresh and config not in seen:
            method = _untrained(item, backbone)
            rows.append(
                Row(
                    name=f"untrained@{split}{suffix}",
                    method=config.name,
                    source=method,
                    frozen_parameters=backbone.parameter_count(split),
                    trainable_parameters=_parameters(method),
                    notes=(f"fresh weights of {item.name}, with its normalisation",),
                    **shared,
                )
            )
        seen.append(config)
        rows.append(
            Row(
                name=f"oracle@{split}{suffix}",
                method="oracle",
                source=Oracle(item.method),
                frozen_parameters=backbone.parameter_count(),
                notes=(f"true state plus Gaussian noise with the squared error of {item.name} at every token",),
                **shared,
            )
        )
        if other is not None:
            rows.append(
                Row(
                    name=f"shuffled@{split}{suffix}",
                    method="shuffled",
                    source=Shuffled(item.method, other),
                    frozen_parameters=backbone.parameter_count(split),
                    trainable_parameters=_parameters(item.method),
                    notes=(f"{item.name} given the tokens of another document",),
                    **shared,
                )
            )
    return rows
