"""Token ids to sequences: packed windows of the training stream, document windows for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, Int64, UInt32
from torch import Tensor

from dihal.data.batch import Batch
from dihal.data.order import draw, sample_order
from dihal.data.text import Document
from dihal.data.tokens import Tokenised
from dihal.errors import UsageError
from dihal.types import Mask, TokenIds

__all__ = ["EvaluatedDocument", "EvaluationWindows", "PackedStream", "evaluation_windows"]


def _check_length(sequence_length: int) -> None:
    if sequence_length < 2:
        raise UsageError(f"data.sequence_length must be at least 2 (a token and its successor), not {sequence_length}.")


class PackedStream:
    """Training windows cut from the ring of all documents, each followed by the end token.

    An epoch cuts the ring into `windows` adjacent windows from an offset of its own, so each token appears at most
    once per epoch, fewer than one window's worth is left out, and both the cuts and the part left out differ
    from epoch to epoch. A window is one start token (if the backbone has one) and then adjacent tokens.
    """

    def __init__(
        self,
        documents: Tokenised,
        *,
        sequence_length: int,
        start_token_id: int | None,
        end_token_id: int | None,
        seed: int,
        splice: float = 0.0,
        splice_length: int = 32,
        own: float = 0.0,
    ) -> None:
        """Join the documents.

        Args:
            documents: the training documents.
            sequence_length: tokens per window, start token included.
            start_token_id: first token of every window; None: windows hold text only.
            end_token_id: put after every document and counted as part of it; None: documents are joined directly.
            seed: key of the order of windows, of the offsets and of spliced places.
            splice: share of windows whose tokens, but for a first span, come from random places of the stream.
            splice_length: mean tokens of a span (geometric lengths).
            own: share of windows made of the spans in `own_spans` (to be set before the first batch).

        Raises:
            UsageError: the text is shorter than one window, or options out of range.
        """
        if not 0.0 <= splice <= 1.0 or splice_length < 1:
            raise UsageError(
                f"data.splice is a share in [0, 1] and data.splice_length at least 1; got {splice} and {splice_length}."
            )
        if not 0.0 <= own <= 1.0:
            raise UsageError(f"data.own is a share in [0, 1], not {own}.")
        self.splice, self.splice_length, self.own = splice, splice_length, own
        self.own_spans: UInt32[np.ndarray, "spans length"] | None = None
        """The backbone's own text, one span a row."""
        _check_length(sequence_length)
        tokens, ends = documents.tokens, documents.ends
        if end_token_id is not None:
            tokens = np.insert(tokens, ends, end_token_id)
            ends = ends + np.arange(1, len(ends) + 1)
        self.sequence_length = sequence_length
        self.seed = seed
        self.body = sequence_length - (start_token_id is not None)
        """Stream tokens per window."""
        self.windows = len(tokens) // self.body
        """Windows per epoch."""
        if self.windows == 0:
            raise UsageError(
                f"the training text has {len(tokens)} tokens, one sequence needs {self.body}. "
                "Lower data.sequence_length or give more text."
            )
        self._tokens, self._ends, self._start = tokens, ends, start_token_id

    def __len__(self) -> int:
        """Tokens in the stream, end tokens included."""
        return len(self._tokens)

    def offset(self, epoch: int) -> int:
        """Place in the stream where an epoch's first window begins."""
        return draw(len(self._tokens), "offset", self.seed, epoch)

    def positions(self, epochs: Int64[np.ndarray, "n"], windows: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n body"]:
        """Places in the stream of the tokens of the given windows."""
        offsets = np.array([self.offset(int(epoch)) for epoch in epochs], dtype=np.int64)
        begins = offsets + windows * self.body
        return (begins[:, None] + np.arange(self.body)) % len(self._tokens)

    def _spliced(
        self, places: Int64[np.ndarray, "n body"], sample_ids: Int64[np.ndarray, "n"]
    ) -> Int64[np.ndarray, "n body"]:
        """Move all spans but the first of some sequences to places of their own, keyed by sample."""
        places = places.copy()
        for row, sample in enumerate(sample_ids.tolist()):
            generator = np.random.Generator(np.random.Philox(key=[draw(1 << 64, "splice", self.seed, sample), 0]))
            if generator.random() >= self.splice:
                continue
            span = np.cumsum(generator.random(self.body) < 1 / self.splice_length)
            shifts = generator.integers(0, len(self._tokens), span[-1] + 1)
            shifts[0] = 0
            places[row] = (places[row] + shifts[span]) % len(self._tokens)
        return places

    def _replace_by_own(
        self, ids: np.ndarray, owners: np.ndarray, follows: np.ndarray, sample_ids: Int64[np.ndarray, "batch"]
    ) -> None:
        """Overwrite some sequences by spans of the backbone's own text, keyed by sample."""
        assert self.own_spans is not None, "data.own is set, but nobody gave the stream its own_spans"
        spans, length = self.own_spans.shape
        count = -(-self.body // length)
        inside = np.arange(1, self.body + 1) % length != 0
        inside[-1] = False
        for row, sample in enumerate(sample_ids.tolist()):
            generator = np.random.Generator(np.random.Philox(key=[draw(1 << 64, "own", self.seed, sample), 0]))
            if generator.random() >= self.own:
                continue
            chosen = generator.integers(0, spans, count)
            ids[row] = self.own_spans[chosen].reshape(-1)[: self.body]
            owners[row] = len(self._ends) + np.repeat(chosen, length)[: self.body]
            follows[row] = inside

    def batch(self, sample_ids: Int64[np.ndarray, "batch"]) -> Batch:
        """Return the sequences of the given samples of the run."""
        places = self.positions(*sample_order(sample_ids, self.windows, self.seed))
        if self.splice > 0:
            places = self._spliced(places, sample_ids)
        ids = self._tokens[places].astype(np.int64)
        owners = np.searchsorted(self._ends, places, side="right")
        # The last token of a document has no successor in it. Asking the place, not the neighbour's owner, is also
        # right where the ring closes on the only document there is.
        follows = places + 1 != self._ends[owners]
        follows[:, :-1] &= places[:, 1:] == (places[:, :-1] + 1) % len(self._tokens)
        follows[:, -1] = False
        if self.own > 0:
            self._replace_by_own(ids, owners, follows, sample_ids)
        if self._start is not None:
            ids = np.insert(ids, 0, self._start, axis=1)
            owners = np.insert(owners, 0, owners[:, 0], axis=1)
            follows = np.insert(follows, 0, True, axis=1)
        return Batch(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.ones(ids.shape, dtype=torch.bool),
            document_ids=torch.from_numpy(owners.astype(np.int64)),
            loss_mask=torch.from_numpy(follows),
            sample_ids=torch.from_numpy(sample_ids.copy()),
            full=True,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluatedDocument:
    """A document as far as it is measured."""

    key: str
    """Identity of its text."""
    index: int
    """Its index in the split, as in `document_ids`."""
    tokens: int
    """Predicted tokens."""
    bytes: int
    """UTF-8 bytes of text that the predicted tokens stand for: the denominator of bits per byte."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationWindows:
    """Windows of whole documents: one document per window, start token first, the last one right-padded.

    With a start token every token of a document is predicted exactly once; without one the first token of each
    window is context only.
    """

    input_ids: TokenIds
    attention_mask: Mask
    document_ids: TokenIds
    loss_mask: Mask
    predicted_bytes: TokenIds
    """Bytes of text of the token predicted from each position; 0 where `loss_mask` is False."""
    documents: tuple[EvaluatedDocument, ...]
    """The documents measured, in the order of their windows."""

    def __len__(self) -> int:
        """Number of windows."""
        return self.input_ids.shape[0]

    def select(self, rows: Int[Tensor, "rows"]) -> Batch:
        """Return some windows; their `sample_ids` are the window indices."""
        return Batch(
            input_ids=self.input_ids[rows],
            attention_mask=self.attention_mask[rows],
            document_ids=self.document_ids[rows],
            loss_mask=self.loss_mask[rows],
            sample_ids=rows,
            full=bool(self.attention_mask[rows].all()),
        )

    def batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Iterate the windows in order; the last batch may be smaller.

        Rank r takes windows r, r + world_size, ...; with several ranks the last `len % world_size` windows are left
        out, so that all ranks have equally many.
        """
        rows = torch.arange(rank, len(self) - len(self) % world_size, world_size)
        for some in rows.split(batch_size):
            if len(some):
                yield self.select(some)


def evaluation_windows(
    documents: Sequence[Document],
    tokenised: Tokenised,
    *,
    sequence_length: int,
    start_token_id: int | None,
    end_token_id: int | None,
    tokens: int | None = None,
    windows_per_document: int | None = None,
    seed: int = 0,
) -> EvaluationWindows:
    """Cut documents into windows, drawing one document after another until enough tokens are predicted.

    Documents come in the order of a hash of (seed, key): the draw depends on no order of the source, and a larger
    `tokens` only appends documents.

    Args:
        documents: documents of one split.
        tokenised: their tokens.
        sequence_length: tokens per window, start token included.
        start_token_id: first token of every window; None: windows hold text only.
        end_token_id: fills the padding (masked everywhere).
        tokens: predicted tokens at least, unless the documents hold fewer; None: all documents.
        windows_per_document: take only so many windows of a document, its first; None: all. Fewer windows of
            more documents make narrower intervals where documents are resampled.
        seed: key of the draw.

    Raises:
        UsageError: nothing can be predicted from these documents.
    """
    _check_length(sequence_length)
    if tokens is not None and tokens < 1:
        raise UsageError(f"the number of evaluation tokens must be at least 1, not {tokens}.")
    if windows_per_document is not None and windows_per_document < 1:
        raise UsageError(f"windows_per_document must be at least 1, not {windows_per_document}; null takes all.")
    start = [] if start_token_id is None else [start_token_id]
    body = sequence_length - len(start)
    fill = end_token_id if end_token_id is not None else (start_token_id or 0)
    spans: list[tuple[int, int, int]] = []  # document, first text token of the window, end
    chosen: list[EvaluatedDocument] = []
    predicted = 0
    for index in sorted(range(len(documents)), key=lambda i: (draw(1 << 64, "draw", seed, documents[i].key), i)):
        if tokens is not None and predicted >= tokens:
            break
        place = tokenised.span(index)
        cuts = [(begin, min(begin + body, place.stop)) for begin in range(place.start, place.stop, body)]
        # Without a start token a window of one token predicts nothing.
        cuts = [(begin, end) for begin, end in cuts if end - begin + len(start) >= 2]
        cuts = cuts[:windows_per_document]
        if not cuts:
            continue
        first = 1 - len(start)
        count = sum(end - begin - first for begin, end in cuts)
        covered = sum(int(tokenised.token_bytes[begin + first : end].sum()) for begin, end in cuts)
        chosen.append(EvaluatedDocument(key=documents[index].key, index=index, tokens=count, bytes=covered))
        spans.extend((index, begin, end) for begin, end in cuts)
        predicted += count
    if not spans:
        raise UsageError("the evaluation documents hold nothing to predict. Give longer documents.")
    shape = (len(spans), sequence_length)
    ids = np.full(shape, fill, dtype=np.int64)
    owners = np.full(shape, -1, dtype=np.int64)
    counted = np.zeros(shape, dtype=np.int64)
    loss = np.zeros(shape, dtype=bool)
    for row, (index, begin, end) in enumerate(spans):
        length = len(start) + end - begin
        ids[row, :length] = [*start, *tokenised.tokens[begin:end].tolist()]
        owners[row, :length] = index
        loss[row, : length - 1] = True
        counted[row, : length - 1] = tokenised.token_bytes[begin + 1 - len(start) : end]
    return EvaluationWindows(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(owners >= 0),
        document_ids=torch.from_numpy(owners),
        loss_mask=torch.from_numpy(loss),
        predicted_bytes=torch.from_numpy(counted),
        documents=tuple(chosen),
    )
