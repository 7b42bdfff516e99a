"""Where continuations come from. The only module of the frontier that knows how each kind of row writes."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dihal.backbone import Backbone
from dihal.config.spaces import WritingConfig
from dihal.evaluation.checkpoints import Trained
from dihal.evaluation.frontier.variants import Variant
from dihal.evaluation.generation import Prompts, generate_row
from dihal.evaluation.ngram import NgramModel
from dihal.evaluation.rows import Row

__all__ = [
    "BackboneSource",
    "BridgeSource",
    "Made",
    "NgramSource",
    "Source",
    "WriterSource",
    "WritingCost",
    "writing_cost",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """A set of continuations and what writing one took."""

    tokens: Int[Tensor, "samples new"]
    seconds: float
    agreement: Float[Tensor, " samples"] | None = None
    """Share of new positions where own head and frozen stack agree; None where there is one readout."""
    nfe: int | None = None
    """Calls of the denoiser per text, guidance included, however many positions each had; None: there is no network."""
    encodes: int | None = None
    """Passes of tokens through the blocks below the split, per text."""
    reads: int | None = None
    """Passes of states through the blocks above, per text."""
    flops: float | None = None
    """Of the whole set, as metered while it was written; None: not metered."""


@runtime_checkable
class Source(Protocol):
    """Continues every prompt by the same number of tokens."""

    def write(
        self, prompts: Prompts, *, new_tokens: int, steps: int, temperature: float, seed: int, compare: bool = True
    ) -> Made:
        """Write; the draws of a sample depend on (seed, its place among the prompts) only.

        ``compare`` asks a row with two readouts whether they agree, which takes one more pass of the frozen stack.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class BackboneSource:
    """The backbone itself, token by token."""

    backbone: Backbone
    batch_size: int

    def write(
        self, prompts: Prompts, *, new_tokens: int, steps: int, temperature: float, seed: int, compare: bool = True
    ) -> Made:
        """See :class:`Source`; ``steps`` has no meaning here."""
        tokens, seconds = generate_row(
            Row(name="backbone", method="backbone", kind="bound"),
            steps,
            self.backbone,
            prompts,
            new_tokens=new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=self.batch_size,
            sampler=None,
        )
        return Made(tokens=tokens, seconds=seconds, nfe=0, encodes=new_tokens, reads=new_tokens)


@dataclass(frozen=True, kw_only=True, eq=False)
class BridgeSource:
    """A checkpoint of the regime `replace`: a causal LM, token by token."""

    backbone: Backbone
    trained: Trained
    batch_size: int

    def write(
        self, prompts: Prompts, *, new_tokens: int, steps: int, temperature: float, seed: int, compare: bool = True
    ) -> Made:
        """See :class:`Source`; ``steps`` per token."""
        tokens, seconds = generate_row(
            Row(name=self.trained.name, method="bridge", kind="checkpoint", trained=self.trained),
            steps,
            self.backbone,
            prompts,
            new_tokens=new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=self.batch_size,
            sampler=None,
        )
        passes = self.trained.method.evaluations(steps) * new_tokens
        return Made(tokens=tokens, seconds=seconds, nfe=passes, encodes=0, reads=new_tokens)


def _reading(prompts: Prompts, writing: WritingConfig, new_tokens: int, readout: str) -> Hashable:
    """Names the texts that a readout gives of one walk over states; None where the walk depends on what is read."""
    joint = writing.block is None or writing.block >= new_tokens
    if not joint or writing.project > 0 or writing.commit != "none":
        return None
    weight = writing.suffix_weight if readout == "fused" else None
    return readout, weight, prompts, new_tokens, replace(writing, readout="own", suffix_weight=0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class WriterSource:
    """A checkpoint of the regime `generate` or `mask`: all new tokens of a block at once.

    Where nothing is read before the last step, readouts differ in the reading of the same states, and comparing them
    gives the texts of own head and frozen stack besides those asked for. They are kept until a source that shares
    ``read`` asks for them, bit for bit what it would write; their seconds are those of the walk they come from. So of
    such rows list `fused` first.
    """

    backbone: Backbone
    writer: Any
    """A `dihal.writer.Writer` or `dihal.masked.MaskedLM`: its ``write`` and ``config.writing`` are used."""
    variant: Variant
    batch_size: int
    read: dict[Hashable, Made] = field(default_factory=dict)
    """Texts that were read beside those asked for; one dict for all sources of a writer."""

    def write(
        self, prompts: Prompts, *, new_tokens: int, steps: int, temperature: float, seed: int, compare: bool = True
    ) -> Made:
        """See :class:`Source`; ``steps`` per block. The length is fixed: the writer is not asked where to end."""
        writing = self.variant.writing(self.writer.config.writing, steps=steps, temperature=temperature, seed=seed)
        if compare and (there := self.read.pop(_reading(prompts, writing, new_tokens, writing.readout), None)):
            return there
        count, given = prompts.prompts.shape
        device = self.backbone.device
        ids = torch.zeros(count, given + new_tokens, dtype=torch.int64)
        ids[:, :given] = prompts.prompts
        known = (torch.arange(ids.shape[1]) < given).expand(count, -1)
        began = time.perf_counter()
        parts = [
            self.writer.write(
                self.backbone,
                ids[rows].to(device),
                known[rows].to(device),
                given=None,
                writing=writing,
                sample_ids=prompts.sample_ids[rows].to(device),
                end=False,
                compare=compare,
            )
            for rows in torch.arange(count).split(self.batch_size)
        ]
        tokens = torch.cat([part.tokens[:, given:].cpu() for part in parts])
        seconds = time.perf_counter() - began
        agreements = [part.agreement for part in parts if part.agreement is not None]
        made = Made(
            tokens=tokens,
            seconds=seconds,
            agreement=torch.cat([part.cpu().float() for part in agreements]) if agreements else None,
            nfe=parts[0].nfe,
            encodes=parts[0].encodes,
            reads=parts[0].reads,
            flops=sum(sum(part.flops.values()) for part in parts),
        )
        for readout in {"own", "suffix"} - {writing.readout} if agreements else ():
            name = _reading(prompts, writing, new_tokens, readout)
            if name is not None:
                alone = [part.own_tokens if readout == "own" else part.suffix_tokens for part in parts]
                self.read[name] = replace(made, tokens=torch.cat([tokens[:, given:].cpu() for tokens in alone]))
        return made


@dataclass(frozen=True, kw_only=True, eq=False)
class NgramSource:
    """An n-gram model of the training tokens: what a naive sampler reaches."""

    model: NgramModel
    banned: int | None

    def write(
        self, prompts: Prompts, *, new_tokens: int, steps: int, temperature: float, seed: int, compare: bool = True
    ) -> Made:
        """See :class:`Source`; ``steps`` has no meaning here."""
        began = time.perf_counter()
        tokens = self.model.sample(
            prompts.prompts,
            new_tokens=new_tokens,
            temperature=temperature,
            seed=seed,
            sample_ids=prompts.sample_ids,
            banned=self.banned,
        )
        return Made(tokens=tokens, seconds=time.perf_counter() - began)


@dataclass(frozen=True, kw_only=True)
class WritingCost:
    """What one continuation takes, without comparing readouts."""

    nfe: int | None
    encodes: int | None
    reads: int | None
    flops_per_token: float | None
    """FLOPs per new token, prompt included; None where there is no network."""


def writing_cost(source: Source, prompts: Prompts, *, new_tokens: int, steps: int, temperature: float) -> WritingCost:
    """Continue the first prompt; FLOPs are metered where the source meters them, else torch's own counter's.

    Both know matrix products and attention (dense: masked pairs count) and nothing else, and agree within 2 %; but
    under torch's counter a walk of many steps takes several times as long.
    """
    one = Prompts(prompts=prompts.prompts[:1], real=prompts.real[:1])
    options = {"new_tokens": new_tokens, "steps": steps, "temperature": temperature, "seed": 0, "compare": False}
    if isinstance(source, WriterSource):
        made = source.write(one, **options)
        flops = made.flops
    else:
        made, flops = _counted(source, one, options)
    per_token = None if made.nfe is None or flops is None else flops / new_tokens
    return WritingCost(nfe=made.nfe, encodes=made.encodes, reads=made.reads, flops_per_token=per_token)


def _counted(source: Source, prompts: Prompts, options: dict[str, Any]) -> tuple[Made, float]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter does not know the fused attention of a CPU; as plain products it is counted alike everywhere.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        made = source.write(prompts, **options)
    return made, float(counter.get_total_flops())
