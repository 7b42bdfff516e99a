"""Which tokens are scored: documents in a seeded order, cut into windows, grouped into chunks.

Everything random is decided here, before the first forward pass, from the documents and the seed:
the order of documents, the pool, the anchors. Chunk size therefore cannot change what is sampled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dihal.config import ScoreConfig
from dihal.errors import UsageError
from dihal.random import uniform

if TYPE_CHECKING:
    from dihal.backbone import Backbone

__all__ = ["PILOT_TOKENS", "Chunk", "Draw", "draw_documents", "plan_chunks", "sample_pool"]

PILOT_TOKENS = 2_048
"""Tokens of the pilot: its windows fix each layer's median norm and shift before anything is accumulated."""

_HASH_AT_ONCE = 65_536


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The scored tokens: windows in drawing order, each of one document."""

    windows: tuple[Int[Tensor, "_"], ...]
    """Token ids (int32) of each window, the start token included."""
    document: Int[Tensor, "windows"]
    """Document of each window, 0 .. documents - 1 in drawing order."""
    documents: int
    """Documents drawn."""
    documents_given: int
    """Documents there were to draw from."""
    tokens: int
    """Tokens of all windows, start tokens included."""
    start_token: bool
    """Whether each window begins with the backbone's start token."""
    fingerprint: str
    """sha256 over the sha256 of every document given, sorted: the text, whatever its order."""
    scored_fingerprint: str
    """sha256 over the ids of the windows in drawing order: exactly what was run."""

    @property
    def offsets(self) -> Int[Tensor, "windows"]:
        """Index of each window's first token among all scored tokens."""
        lengths = torch.tensor([len(window) for window in self.windows])
        return lengths.cumsum(0) - lengths


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Windows of one forward pass, padded right."""

    input_ids: Int[Tensor, "batch time"]
    real: Bool[Tensor, "batch time"]
    """False at padding."""
    index: Int[Tensor, "tokens"]
    """Index of each real token among all scored tokens, in row order."""
    first: Bool[Tensor, "tokens"]
    """True at position 0 of a window."""
    pilot: bool
    """Belongs to the pilot."""


def _ids(document: Any, backbone: Backbone, number: int) -> Tensor:
    if isinstance(document, str):
        ids = backbone.tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        return torch.tensor(ids, dtype=torch.int32)
    try:
        ids = torch.as_tensor(document)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"document {number} is neither a string nor a sequence of token ids ({type(document).__name__})."
        ) from error
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise UsageError(
            f"document {number} is not a flat sequence of integer token ids (shape {tuple(ids.shape)}, {ids.dtype})."
        )
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= backbone.vocab_size):
        raise UsageError(
            f"document {number} holds token ids outside 0 .. {backbone.vocab_size - 1}. "
            "Were they made with another tokenizer? Give text, or ids of this backbone."
        )
    return ids.to("cpu", torch.int32)


def _digest(document: Any) -> bytes:
    if isinstance(document, str):
        return hashlib.sha256(b"text\0" + document.encode("utf-8", "surrogatepass")).digest()
    ids = document.tolist() if isinstance(document, Tensor) else list(document)
    return hashlib.sha256(b"ids\0" + repr(ids).encode()).digest()


def _listed(texts_or_ids: Any) -> list[Any]:
    if isinstance(texts_or_ids, (str, bytes)):
        raise UsageError("score_layers wants a sequence of documents, one string was given. Put it in a list.")
    documents = list(texts_or_ids)
    if documents and isinstance(documents[0], int):
        raise UsageError("score_layers wants a sequence of documents, one list of ids was given. Put it in a list.")
    return [item for item in documents if len(item.strip() if isinstance(item, str) else item) > 0]


def draw_documents(backbone: Backbone, texts_or_ids: Iterable[Any], config: ScoreConfig) -> Draw:
    """Draw whole documents in seeded order until ``config.tokens`` are reached; cut the last one short.

    The order is that of sha256(seed, document), so it does not depend on the order given.

    Raises:
        UsageError: no text; something that is no document; ids out of range.
    """
    given = _listed(texts_or_ids)
    if not given:
        raise UsageError("there is no text to score: every document is empty. Check the source and its text field.")
    digests = [_digest(item) for item in given]
    seed = str(config.seed).encode()
    keys = [hashlib.sha256(seed + b"\0" + digest).digest() for digest in digests]
    start = backbone.start_token_id
    lead = [] if start is None else [start]
    body = config.sequence_length - len(lead)
    windows: list[Tensor] = []
    owner: list[int] = []
    left, documents = config.tokens, 0
    scored = hashlib.sha256()
    for number in sorted(range(len(given)), key=lambda i: (keys[i], i)):
        if left < 2:
            break
        pieces = 0
        for piece in _ids(given[number], backbone, number).split(body):
            window = torch.cat([torch.tensor(lead, dtype=torch.int32), piece])[:left]
            if len(window) < 2:  # nothing but a position that is dropped
                continue
            windows.append(window)
            owner.append(documents)
            scored.update(len(window).to_bytes(4, "little") + window.numpy().tobytes())
            left -= len(window)
            pieces += 1
        documents += pieces > 0
    if not windows:
        raise UsageError("there is no text to score: no document is longer than one token.")
    return Draw(
        windows=tuple(windows),
        document=torch.tensor(owner),
        documents=documents,
        documents_given=len(given),
        tokens=config.tokens - left,
        start_token=start is not None,
        fingerprint=hashlib.sha256(b"".join(sorted(digests))).hexdigest(),
        scored_fingerprint=scored.hexdigest(),
    )


def sample_pool(
    draw: Draw, config: ScoreConfig, device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "pool"], Int[Tensor, "pool"]]:
    """Draw at most ``config.pool`` tokens uniformly, position 0 excluded if it is dropped.

    Args:
        draw: the scored tokens.
        config: seed, size of the pool, sink policy.
        device: where the numbers are drawn and sorted. Integers and their order are the same everywhere; on a GPU they
            take a fiftieth of the time.

    Returns:
        Their indices among all scored tokens, ascending (so sorted by document), and their order of
        preference as anchors: positions in the first result, a uniform permutation.
    """
    eligible = torch.ones(draw.tokens, dtype=torch.bool)
    if config.drop_first:
        eligible[draw.offsets] = False
    index = eligible.nonzero().squeeze(1)
    priority = torch.cat(
        [
            uniform(config.seed, part, "geometry-pool", dtype=torch.float64, device=device)
            for part in index.split(_HASH_AT_ONCE)
        ]
    )
    best = priority.argsort(stable=True)[: config.pool].cpu()
    ascending = best.sort()
    return index[ascending.values], ascending.indices.argsort()


def _chunk(draw: Draw, chosen: list[int], offsets: Tensor, pilot: bool) -> Chunk:
    longest = max(len(draw.windows[i]) for i in chosen)
    ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
    real = torch.zeros(len(chosen), longest, dtype=torch.bool)
    for row, i in enumerate(chosen):
        window = draw.windows[i]
        ids[row, : len(window)] = window
        real[row, : len(window)] = True
    position = torch.arange(longest).expand(len(chosen), -1)
    return Chunk(
        input_ids=ids,
        real=real,
        index=(position + offsets[torch.tensor(chosen)][:, None])[real],
        first=(position == 0)[real],
        pilot=pilot,
    )


def plan_chunks(draw: Draw, batch_tokens: int) -> list[Chunk]:
    """Group windows into forward passes of at most ``batch_tokens`` (padding included; at least one window).

    The pilot comes first: the first windows drawn that hold ``PILOT_TOKENS`` tokens, or all. It is
    the same whatever ``batch_tokens`` is. Within pilot and rest, windows are sorted by length, so
    that little is padded.
    """
    offsets = draw.offsets
    lengths = [len(window) for window in draw.windows]
    reached = int((offsets < PILOT_TOKENS).sum())
    plan: list[Chunk] = []
    for pilot, numbers in ((True, range(reached)), (False, range(reached, len(lengths)))):
        group: list[int] = []
        for i in sorted(numbers, key=lambda i: (-lengths[i], i)):
            if group and lengths[group[0]] * (len(group) + 1) > batch_tokens:
                plan.append(_chunk(draw, group, offsets, pilot))
                group = []
            group.append(i)
        if group:
            plan.append(_chunk(draw, group, offsets, pilot))
    return plan
