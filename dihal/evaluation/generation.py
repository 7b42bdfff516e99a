"""Generated continuations: how they are drawn, and how an outside causal LM scores them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from dihal.errors import UsageError
from dihal.evaluation.result import TextResult
from dihal.evaluation.sampling import FixedDraws, draw_tokens, uniform53
from dihal.evaluation.sharing import in_turn, on_first
from dihal.evaluation.text import text_metrics
from dihal.geometry.ranks import Ranks

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.controls import Identity
    from dihal.data.packing import EvaluationWindows
    from dihal.evaluation.rows import Row
    from dihal.methods import Method

__all__ = ["Prompts", "Scorer", "generate_row", "pick_prompts", "text_result"]

TEXTS_KEPT = 3
"""Samples whose text is stored."""

SEPARATOR = " ||| "

_SCORED_AT_ONCE = 8
"""Samples per forward pass of the scorer (memory, not results)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompts:
    """Beginnings of held-out documents and how they really go on."""

    prompts: Int[Tensor, "samples prompt"]
    real: Int[Tensor, "samples new"]

    @property
    def sample_ids(self) -> Int[Tensor, " samples"]:
        """Key of each sample's draws."""
        return torch.arange(len(self.prompts))


def pick_prompts(windows: EvaluationWindows, *, samples: int, prompt_tokens: int, new_tokens: int) -> Prompts:
    """Return one prompt per document first, then further windows of the same documents.

    Only windows with ``prompt_tokens + new_tokens`` real tokens serve, so that every prompt has a real
    continuation of the same length.

    Raises:
        UsageError: too few such windows.
    """
    if prompt_tokens < 1 or new_tokens < 1:
        raise UsageError(f"prompt_tokens and new_tokens must be at least 1, got {prompt_tokens} and {new_tokens}.")
    length = prompt_tokens + new_tokens
    long_enough = (windows.attention_mask.sum(-1) >= length).nonzero().squeeze(-1).tolist()
    visits: dict[int, int] = {}
    order = []
    for row in long_enough:
        document = int(windows.document_ids[row, 0])
        visits[document] = visits.get(document, 0) + 1
        order.append((visits[document], row))
    chosen = [row for _, row in sorted(order)[:samples]]
    if len(chosen) < samples:
        raise UsageError(
            f"{len(chosen)} evaluation windows have {prompt_tokens} + {new_tokens} tokens, {samples} samples were asked "
            "for. Lower samples, prompt_tokens or new_tokens, or raise tokens."
        )
    ids = windows.input_ids[chosen, :length]
    return Prompts(prompts=ids[:, :prompt_tokens].contiguous(), real=ids[:, prompt_tokens:].contiguous())


def _continuations(
    backbone: Backbone,
    source: Method | Identity,
    prompts: Prompts,
    *,
    new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    steps: int | None,
    sampler: str | None,
) -> list[Callable[[], Tensor]]:
    """What writes each batch of samples."""
    from transformers import GenerationConfig, LogitsProcessorList

    from dihal.hybrid import HybridForCausalLM

    hybrid = HybridForCausalLM.from_method(source, backbone)
    length = prompts.prompts.shape[1]
    options = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,  # the draw happens in FixedDraws
        use_cache=True,
        pad_token_id=backbone.end_token_id or 0,
        eos_token_id=backbone.end_token_id,
    )
    sampling: dict[str, Any] = {} if steps is None else {"steps": steps, "sampler": sampler, "sampler_seed": seed}

    def write(ids: Tensor, keys: Tensor) -> Tensor:
        draws = FixedDraws(
            prompt_length=length, sample_ids=keys, seed=seed, temperature=temperature, banned=backbone.end_token_id
        )
        ids = ids.to(backbone.device)
        made = hybrid.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=options,
            logits_processor=LogitsProcessorList([draws]),
            **sampling,
        )
        return made[:, length:].cpu()

    batches = zip(prompts.prompts.split(batch_size), prompts.sample_ids.split(batch_size), strict=True)
    return [partial(write, ids, keys) for ids, keys in batches]


def _unigram(
    row: Row, backbone: Backbone, prompts: Prompts, *, new_tokens: int, temperature: float, seed: int
) -> Tensor:
    logits = row.logits.cpu().expand(len(prompts.prompts), -1)
    drawn = [
        draw_tokens(
            logits,
            uniform53(seed, prompts.sample_ids, f"token {step}"),
            temperature=temperature,
            banned=backbone.end_token_id,
        )
        for step in range(new_tokens)
    ]
    return torch.stack(drawn, dim=-1)


def generate_row(
    row: Row,
    steps: int,
    backbone: Backbone,
    prompts: Prompts,
    *,
    new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    sampler: str | None,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
) -> tuple[Int[Tensor, "samples new"], float]:
    """Continue every prompt by exactly ``new_tokens`` tokens; the end token is never drawn.

    The backbone goes through the same ``generate`` as a trained method (as the identity hybrid), so that
    tokens per second compare.

    Args:
        row: the row.
        steps: of its sampling, where it samples states.
        backbone: the backbone.
        prompts: the prompts.
        new_tokens: tokens per continuation.
        temperature: of the draws; 0: greedy.
        seed: of the draws.
        batch_size: prompts at a time.
        sampler: solver; None: the method's own.
        ranks: the processes that share the batches (one of them writes all samples of an n-gram model).

    Returns:
        The new tokens, and wall seconds of all batches together.

    Raises:
        UsageError: logits that cannot be drawn from (on the first process; the others exit).
    """
    from dihal.controls import Identity

    drawing: dict[str, Any] = {"new_tokens": new_tokens, "temperature": temperature, "seed": seed}
    pieces: list[Callable[[], Tensor]]
    if row.logits is not None:
        pieces = [partial(_unigram, row, backbone, prompts, **drawing)]
    elif row.ngram is not None:
        keys: dict[str, Any] = {"sample_ids": prompts.sample_ids, "banned": backbone.end_token_id}
        pieces = [partial(row.ngram.sample, prompts.prompts, **drawing, **keys)]
    else:
        source = row.trained.method if row.trained is not None else Identity(min(1, backbone.num_blocks - 1))
        sampling = {"steps": steps if row.trained is not None else None, "sampler": sampler}
        pieces = _continuations(backbone, source, prompts, batch_size=batch_size, **drawing, **sampling)

    def write(number: int) -> tuple[np.ndarray, float]:
        began = time.perf_counter()
        return pieces[number]().numpy(), time.perf_counter() - began

    made, seconds = zip(*in_turn(ranks, len(pieces), write), strict=True)
    return torch.from_numpy(np.concatenate(made)), sum(seconds)


class Scorer:
    """A causal LM that scores continuations given their prompts.

    Args:
        scorer: the LM.
        writer: the backbone whose tokens the samples are.
    """

    def __init__(self, scorer: Backbone, writer: Backbone) -> None:
        self._scorer = scorer
        self._writer = writer
        self._same_tokens = scorer is writer or scorer.tokenizer_fingerprint == writer.tokenizer_fingerprint

    @property
    def id(self) -> str:
        """Name shown beside every perplexity."""
        return self._scorer.reference.id

    @property
    def self_graded(self) -> bool:
        """Whether it is the writer, or of its family or vocabulary: such a scorer favours its kin."""
        return self._scorer.reference.family == self._writer.reference.family or self._same_tokens

    @torch.no_grad()
    def nll(
        self,
        prompts: Int[Tensor, "samples prompt"],
        new: Int[Tensor, "samples new"],
        *,
        ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    ) -> tuple[float, int]:
        """Return the summed NLL of the new tokens given their prompts in nats, and how many of its own tokens it scored.

        Args:
            prompts: tokens before.
            new: tokens scored.
            ranks: the processes that share the forward passes, each with the same arguments; all get the result.

        Raises:
            UsageError: a continuation that is empty in the scorer's tokens (on the first process; the others exit).
        """
        pieces = on_first(ranks, lambda: self._pieces(prompts, new))

        def score(number: int) -> float:
            first, samples = pieces[number]
            ids = torch.tensor(samples, device=self._scorer.device)
            features = self._scorer.suffix_features(self._scorer.embed(ids), 0)[:, first - 1 : -1]
            log_q = torch.log_softmax(self._scorer.head(features).float(), dim=-1)
            return float(log_q.gather(-1, ids[:, first:].unsqueeze(-1)).double().sum())

        total = 0.0
        for found in in_turn(ranks, len(pieces), score):
            total -= found
        return total, sum(len(samples) * (len(samples[0]) - first) for first, samples in pieces)

    def _pieces(self, prompts: Tensor, new: Tensor) -> list[tuple[int, list[list[int]]]]:
        """Samples of one length that are scored at once, and the index of the first token that counts."""
        alike: dict[tuple[int, int], list[list[int]]] = {}
        for prompt, continuation in zip(prompts.tolist(), new.tolist(), strict=True):
            ids, first = self._retokenise(prompt, continuation)
            alike.setdefault((len(ids), first), []).append(ids)
        size = _SCORED_AT_ONCE
        return [(first, group[i : i + size]) for (_, first), group in alike.items() for i in range(0, len(group), size)]

    def _retokenise(self, prompt: list[int], new: list[int]) -> tuple[list[int], int]:
        """Ids for the scorer, and the index of the first one that counts."""
        if self._same_tokens:
            return [*prompt, *new], len(prompt)
        decode: Callable[..., str] = self._writer.tokenizer.decode
        before = decode(prompt, skip_special_tokens=True)
        whole = decode([*prompt, *new], skip_special_tokens=True)
        encoded = self._scorer.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        start = [] if self._scorer.start_token_id is None else [self._scorer.start_token_id]
        ids = [*start, *encoded["input_ids"]]
        # A token that straddles the border belongs to the continuation.
        inside = [index for index, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(before)]
        first = max(1, len(start) + (inside[0] if inside else len(encoded["input_ids"])))
        if first >= len(ids):
            raise UsageError("a continuation is empty in the scorer's tokens; raise new_tokens or change the scorer.")
        return ids, first


def text_result(
    made: Int[Tensor, "samples new"],
    prompts: Prompts,
    scorer: Scorer,
    backbone: Backbone,
    *,
    temperature: float,
    seconds: float | None,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
) -> TextResult:
    """Score (by all processes together) and describe a set of continuations."""
    nll, scored = scorer.nll(prompts.prompts, made, ranks=ranks)
    mean = nll / scored
    decode = backbone.tokenizer.decode
    texts = [
        decode(prompt, skip_special_tokens=True) + SEPARATOR + decode(new, skip_special_tokens=False)
        for prompt, new in zip(prompts.prompts[:TEXTS_KEPT].tolist(), made[:TEXTS_KEPT].tolist(), strict=True)
    ]
    return TextResult(
        samples=made.shape[0],
        prompt_tokens=prompts.prompts.shape[1],
        new_tokens=made.shape[1],
        temperature=temperature,
        scorer=scorer.id,
        self_graded=scorer.self_graded,
        scored_tokens=scored,
        generative_nll=mean,
        generative_perplexity=float(torch.tensor(mean, dtype=torch.float64).exp()),
        tokens_per_second=None if seconds is None else made.numel() / max(seconds, 1e-9),
        texts=texts,
        **text_metrics(made.tolist()),
    )
