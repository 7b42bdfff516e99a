"""What models say about a set of continuations: likelihood, the backbone's own choices, features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dihal.evaluation.text import unigram_entropy

if TYPE_CHECKING:
    from dihal.backbone import Backbone

__all__ = ["Graded", "Grader", "retokenise"]

_POSITIONS_AT_ONCE = 2_048
"""Positions whose logits exist at once (memory, not results)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Graded:
    """One entry per continuation."""

    nll: Float[np.ndarray, " samples"]
    """Summed NLL of the new tokens given the prompt under the scorer, nats."""
    scored: Int[np.ndarray, " samples"]
    """How many of its own tokens the scorer read there; 0 where the continuation has no text."""
    entropy: Float[np.ndarray, " samples"]
    """Unigram entropy over those tokens, nats."""
    agreement: Int[np.ndarray, " samples"]
    """New tokens that are the backbone's most likely token given the text before them."""
    mean: Float[np.ndarray, "samples channels"]
    """Scorer's state after the final norm, mean over the new tokens."""
    last: Float[np.ndarray, "samples channels"]
    """The same at the last token."""


def retokenise(writer: Backbone, scorer: Backbone, prompt: list[int], new: list[int]) -> tuple[list[int], int]:
    """Return the scorer's ids of a prompt and its continuation, and the index of the first one that counts.

    Both are decoded together; a token of the scorer that straddles the border belongs to the continuation. An index
    equal to the number of ids means that the continuation has no text.
    """
    decode = writer.tokenizer.decode
    before = decode(prompt, skip_special_tokens=True)
    whole = decode([*prompt, *new], skip_special_tokens=True)
    encoded = scorer.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    start = [] if scorer.start_token_id is None else [scorer.start_token_id]
    ids = [*start, *encoded["input_ids"]]
    inside = [index for index, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(before)]
    # The first token of all has no context to be scored in.
    return ids, min(len(ids), max(1, len(start) + (inside[0] if inside else len(encoded["input_ids"]))))


class Grader:
    """A causal LM that scores continuations, beside the backbone whose choices they are compared with.

    Args:
        scorer: the LM that scores; it may be the backbone itself.
        backbone: the frozen LM whose tokens the continuations are.
        batch_size: continuations per forward pass (memory, not results).
    """

    def __init__(self, scorer: Backbone, backbone: Backbone, *, batch_size: int) -> None:
        self._scorer = scorer
        self._backbone = backbone
        self._batch = batch_size
        self._same_tokens = scorer is backbone or scorer.tokenizer_fingerprint == backbone.tokenizer_fingerprint

    @property
    def id(self) -> str:
        """Name shown beside every likelihood."""
        return self._scorer.reference.id

    @property
    def vocab(self) -> int:
        """Entries of the scorer's vocabulary."""
        return self._scorer.vocab_size

    @property
    def self_graded(self) -> bool:
        """Whether the scorer is the backbone, or of its family or vocabulary: such a scorer favours its kin."""
        return self._scorer.reference.family == self._backbone.reference.family or self._same_tokens

    def fingerprint(self) -> str:
        """Hex sha256 of the scorer's weights."""
        return self._scorer.fingerprint()

    @torch.no_grad()
    def grade(self, prompts: Int[Tensor, "samples prompt"], new: Int[Tensor, "samples new"]) -> Graded:
        """Score continuations given their prompts."""
        texts = [
            ([*prompt, *continuation], len(prompt))
            if self._same_tokens
            else retokenise(self._backbone, self._scorer, prompt, continuation)
            for prompt, continuation in zip(prompts.tolist(), new.tolist(), strict=True)
        ]
        parts = [self._pass(self._scorer, texts[i : i + self._batch]) for i in range(0, len(texts), self._batch)]
        nll, agreement, mean, last = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
        if self._scorer is not self._backbone:
            own = [([*p, *c], len(p)) for p, c in zip(prompts.tolist(), new.tolist(), strict=True)]
            chosen = [self._pass(self._backbone, own[i : i + self._batch])[1] for i in range(0, len(own), self._batch)]
            agreement = torch.cat(chosen).cpu().numpy()
        return Graded(
            nll=nll,
            scored=np.array([len(ids) - first for ids, first in texts]),
            entropy=np.array([unigram_entropy(ids[first:]) if first < len(ids) else 0.0 for ids, first in texts]),
            agreement=agreement,
            mean=mean,
            last=last,
        )

    @staticmethod
    def _pass(model: Backbone, texts: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """NLL and argmax hits over the counted tokens, and the two features, of texts with their first counted index."""
        device = model.device
        longest = max(len(ids) for ids, _ in texts)
        # Padding lies right of the text: no causal state of a real token sees it.
        ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in texts], device=device)
        ends = torch.tensor([len(ids) for ids, _ in texts], device=device)
        begins = torch.tensor([first for _, first in texts], device=device)
        place = torch.arange(longest, device=device)
        real = place < ends[:, None]
        mask = None if bool(real.all()) else real
        states = model.suffix_features(model.embed(ids), 0, attention_mask=mask)
        counted = real & (place >= begins[:, None])
        rows, columns = counted.nonzero(as_tuple=True)
        nll = torch.zeros(len(texts), dtype=torch.float64, device=device)
        hits = torch.zeros(len(texts), dtype=torch.int64, device=device)
        for row, column in zip(rows.split(_POSITIONS_AT_ONCE), columns.split(_POSITIONS_AT_ONCE), strict=True):
            logits = model.head(states[row, column - 1].unsqueeze(0)).squeeze(0)
            target = ids[row, column]
            log_q = torch.log_softmax(logits.float(), dim=-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
            nll.index_add_(0, row, -log_q.double())
            hits.index_add_(0, row, (logits.argmax(-1) == target).long())
        index = torch.arange(len(texts), device=device)
        last = states[index, ends - 1].float()
        weight = counted.float()
        summed = torch.einsum("bt,btd->bd", weight, states.float())
        # A continuation without text has the state of its prompt.
        empty = (weight.sum(-1) == 0).unsqueeze(-1)
        mean = torch.where(empty, last, summed / weight.sum(-1).clamp_min(1).unsqueeze(-1))
        return nll, hits, mean, last
