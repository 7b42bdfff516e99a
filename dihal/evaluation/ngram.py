"""n-gram models of the training text: what counting neighbours alone predicts and writes.

Interpolated Kneser-Ney smoothing with one absolute discount per order (Kneser and Ney 1995; Chen and Goodman
1999, section 2.7). For a context h of k - 1 tokens, its last k - 2 tokens h' and a token w::

    p_k(w | h) = max(c(h w) - D_k, 0) / c(h) + D_k N(h) / c(h) * p_{k-1}(w | h')

c counts occurrences at the highest order; below it, c(h w) is the number of different left neighbours that h w was
seen with (the beginning of a document counts as one). c(h) is the sum of c(h w) over w, N(h) the number of different
w seen after h, D_k = n_1 / (n_1 + 2 n_2) with n_j the number of k-grams counted j times. p_0 is uniform over the
vocabulary. A context that was never seen gives its shorter one. No k-gram crosses the end of a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from dihal.errors import UsageError
from dihal.evaluation.sampling import draw_tokens, uniform53
from dihal.types import TokenIds

__all__ = ["NgramModel"]

_UNSEEN = -1
"""A token or context that the training text does not hold."""

_ELEMENTS_AT_ONCE = 1 << 22
"""Probabilities held while sampling (memory, not results)."""

_DISCOUNT_WITHOUT_SINGLETONS = 0.5
"""D_k of an order none of whose k-grams was counted once, where the formula's 0 would leave unseen tokens impossible."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Grams:
    """All k-grams of one k >= 2, sorted by context and then token."""

    keys: Int[Tensor, " grams"]
    """Number of the context (its place among the (k-1)-grams) times V, plus the token."""
    counts: Int[Tensor, " grams"]
    left: Int[Tensor, " grams"]
    """Number of different left neighbours."""
    contexts: int
    """Number of (k-1)-grams."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Order:
    """p_k as it is looked up."""

    keys: Int[Tensor, " grams"]
    tokens: Int[Tensor, " grams"]
    share: Float[Tensor, " grams"]
    """max(c(h w) - D, 0) / c(h)."""
    begins: Int[Tensor, " contexts_and_end"]
    """Where each context's k-grams begin."""
    kept: Float[Tensor, " contexts"]
    """D N(h) / c(h): weight of the shorter context."""


def _discount(counts: Int[Tensor, " grams"]) -> float:
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once else _DISCOUNT_WITHOUT_SINGLETONS


def _order(grams: _Grams, counts: Int[Tensor, " grams"], vocab: int) -> _Order:
    context = grams.keys // vocab
    seen = torch.bincount(context, minlength=grams.contexts)
    total = torch.zeros(grams.contexts, dtype=torch.float64).index_add_(0, context, counts.double())
    discount = _discount(counts)
    begins = torch.zeros(grams.contexts + 1, dtype=torch.int64)
    begins[1:] = seen.cumsum(0)
    return _Order(
        keys=grams.keys,
        tokens=grams.keys % vocab,
        share=(counts.double() - discount).clamp_min(0) / total[context],
        begins=begins,
        kept=discount * seen.double() / total.clamp_min(1),
    )


def _unigram(counts: Int[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
    discount = _discount(counts)
    found, total = counts.double(), counts.sum().double()
    uniform = discount * (counts > 0).sum() / total / len(counts)
    return ((found - discount).clamp_min(0) / total + uniform).log()


@dataclass(frozen=True, kw_only=True, eq=False)
class NgramModel:
    """An n-gram model; made by :meth:`fit`."""

    order: int
    """n: the model sees n - 1 tokens of context."""
    vocab: int
    """V."""
    tokens: int
    """Tokens counted."""
    _grams: tuple[_Grams, ...]
    _counts: tuple[Int[Tensor, " vocab"], Int[Tensor, " vocab"]]
    """Of single tokens: occurrences, and different left neighbours."""
    _base: Float[Tensor, " vocab"]
    """log p_1."""
    _orders: tuple[_Order, ...]
    """p_2 .. p_n."""

    @classmethod
    def fit(
        cls,
        tokens: Integer[np.ndarray, " tokens"],
        *,
        order: int,
        vocab: int,
        ends: Sequence[int] | Int[np.ndarray, " documents"] | None = None,
    ) -> NgramModel:
        """Count the k-grams of a text for every k up to ``order``.

        Args:
            tokens: token ids of all documents, one after the other, without special tokens.
            order: n, at least 1.
            vocab: V.
            ends: exclusive end of each document in ``tokens`` (`Tokenised.ends`); None: one document.

        Raises:
            UsageError: no tokens, an id outside the vocabulary, or an order below 1.
        """
        if order < 1:
            raise UsageError(f"the order of an n-gram model is at least 1, got {order}.")
        ids = np.asarray(tokens).astype(np.int64)
        if len(ids) == 0:
            raise UsageError("an n-gram model needs training tokens, and there are none. Give more text.")
        if ids.min() < 0 or ids.max() >= vocab:
            raise UsageError(f"token ids run from {ids.min()} to {ids.max()}, the vocabulary has {vocab} entries.")
        ends = np.array([len(ids)] if ends is None else ends, dtype=np.int64)
        begins = np.concatenate([[0], ends[:-1]])
        place = np.arange(len(ids)) - np.repeat(begins, ends - begins)

        numbers = ids  # number of the k-gram that ends at each position; meaningful where place >= k - 1
        occurrences = np.bincount(ids, minlength=vocab)
        found: list[tuple[np.ndarray, np.ndarray, int]] = []
        lefts: list[np.ndarray] = []
        size = vocab
        for k in range(2, order + 1):
            at = np.flatnonzero(place >= k - 1)
            keys, first, inverse, counts = np.unique(
                numbers[at - 1] * vocab + ids[at], return_index=True, return_inverse=True, return_counts=True
            )
            # Each different k-gram is one left neighbour of the (k-1)-gram it ends with; so is a document's beginning.
            begun = np.unique(numbers[place == k - 2])
            left = np.bincount(numbers[at[first]], minlength=size)
            left[begun] += 1
            lefts.append(left)
            found.append((keys, counts, size))
            numbers = np.zeros_like(ids)
            numbers[at] = inverse
            size = len(keys)
        lefts.append(np.zeros(size, dtype=np.int64))  # of the highest order: never asked for
        grams = tuple(
            _Grams(
                keys=torch.from_numpy(keys),
                counts=torch.from_numpy(counts),
                left=torch.from_numpy(left),
                contexts=contexts,
            )
            for (keys, counts, contexts), left in zip(found, lefts[1:], strict=True)
        )
        single = (torch.from_numpy(occurrences), torch.from_numpy(lefts[0]))
        return cls._made(order, vocab, len(ids), grams, single)

    @classmethod
    def _made(
        cls,
        order: int,
        vocab: int,
        tokens: int,
        grams: tuple[_Grams, ...],
        single: tuple[Int[Tensor, " vocab"], Int[Tensor, " vocab"]],
    ) -> NgramModel:
        orders = [_order(item, item.counts if k == order else item.left, vocab) for k, item in enumerate(grams, 2)]
        return cls(
            order=order,
            vocab=vocab,
            tokens=tokens,
            _grams=grams,
            _counts=single,
            _base=_unigram(single[0] if order == 1 else single[1]),
            _orders=tuple(orders),
        )

    def of_order(self, order: int) -> NgramModel:
        """Return the model of a lower order from the same counts, on the CPU.

        Raises:
            UsageError: an order that was not counted.
        """
        if not 1 <= order <= self.order:
            raise UsageError(f"k-grams were counted up to {self.order}; an order of {order} cannot be made of them.")
        return self._made(order, self.vocab, self.tokens, self._grams[: order - 1], self._counts)

    def to(self, device: torch.device | str) -> NgramModel:
        """Move what is looked up to a device; the counts stay where they are."""
        moved = tuple(_Order(**{name: value.to(device) for name, value in vars(item).items()}) for item in self._orders)
        return replace(self, _base=self._base.to(device), _orders=moved)

    def contexts(self, ids: TokenIds) -> Int[Tensor, "batch time context"]:
        """Return the n - 1 tokens up to and including each position, -1 before the row's beginning.

        A special token that the training text does not hold acts as a beginning, too: no context with it was seen.
        """
        width = self.order - 1
        padded = torch.nn.functional.pad(ids, (width - 1, 0), value=_UNSEEN) if width else ids
        return padded.unfold(1, width, 1) if width else ids.new_zeros(*ids.shape, 0)

    def _numbers(self, context: Int[Tensor, "positions context"]) -> Int[Tensor, " positions"]:
        # Number of each context among the grams of its length; _UNSEEN where it was never seen.
        number = context[:, 0]
        number = torch.where((number >= 0) & (number < self.vocab), number, _UNSEEN)
        for column in range(1, context.shape[1]):
            keys, token = self._orders[column - 1].keys, context[:, column]
            if len(keys) == 0:
                return torch.full_like(number, _UNSEEN)
            wanted = number * self.vocab + token
            place = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
            known = (number != _UNSEEN) & (token >= 0) & (token < self.vocab) & (keys[place] == wanted)
            number = torch.where(known, place, _UNSEEN)
        return number

    def log_probabilities(
        self, context: Int[Tensor, "positions context"], *, dtype: torch.dtype = torch.float64
    ) -> Float[Tensor, "positions vocab"]:
        """Return log p_n of every token after each context, in nats.

        Args:
            context: the tokens before, oldest first, at least n - 1 columns (older ones are not looked at); -1: none.
            dtype: of the result; the arithmetic is fp64 wherever a k-gram was seen.
        """
        width = context.shape[1]
        assert width >= self.order - 1, f"an order of {self.order} needs {self.order - 1} tokens of context"
        device = self._base.device
        context = context.to(device)
        out = self._base.to(dtype).repeat(len(context), 1)
        # log p = out + offset. Most tokens were not seen after a context: for them p_k is a multiple of p_{k-1}, so
        # that a whole row moves by one number and only the tokens that were seen are computed one by one.
        offset = torch.zeros(len(context), dtype=torch.float64, device=device)
        for k, table in enumerate(self._orders, 2):
            number = self._numbers(context[:, width - (k - 1) :])
            rows = (number != _UNSEEN).nonzero().squeeze(-1)
            followed = table.begins[number[rows] + 1] > table.begins[number[rows]]  # not only seen at an end
            rows = rows[followed]
            number = number[rows]
            begin, lengths = table.begins[number], table.begins[number + 1] - table.begins[number]
            owner = torch.repeat_interleave(torch.arange(len(rows), device=device), lengths)
            entry = torch.arange(len(owner), device=device) - (lengths.cumsum(0) - lengths - begin)[owner]
            place = (rows[owner], table.tokens[entry])
            kept = table.kept[number]
            shorter = (out[place].double() + offset[place[0]]).exp()
            offset[rows] += kept.log()
            out[place] = ((table.share[entry] + kept[owner] * shorter).log() - offset[place[0]]).to(dtype)
        return out.add_(offset.to(dtype).unsqueeze(-1))

    def sample(
        self,
        prompts: TokenIds,
        *,
        new_tokens: int,
        temperature: float,
        seed: int,
        sample_ids: Int[Tensor, " batch"],
        banned: int | None = None,
    ) -> Int[Tensor, "batch new"]:
        """Continue every prompt by exactly ``new_tokens`` tokens, drawn in fp64.

        Args:
            prompts: tokens before; only the last n - 1 matter.
            new_tokens: how many to write.
            temperature: divides the log-probabilities; 0: the most likely token.
            seed, sample_ids: key of the draws, which depend on neither batch nor order (see `sampling.draw_tokens`).
            banned: a token that is never drawn.
        """
        device = self._base.device
        text = torch.cat(
            [prompts.to(device), torch.zeros(len(prompts), new_tokens, dtype=torch.int64, device=device)], 1
        )
        length = prompts.shape[1]
        for rows in torch.arange(len(prompts)).split(max(1, _ELEMENTS_AT_ONCE // self.vocab)):
            part, keys = text[rows], sample_ids[rows.to(sample_ids.device)].cpu()
            for step in range(new_tokens):
                known = part[:, max(0, length + step - (self.order - 1)) : length + step]
                context = torch.nn.functional.pad(known, (self.order - 1 - known.shape[1], 0), value=_UNSEEN)
                part[:, length + step] = draw_tokens(
                    self.log_probabilities(context),
                    uniform53(seed, keys, f"token {step}"),
                    temperature=temperature,
                    banned=banned,
                )
            text[rows] = part
        return text[:, length:].cpu()
