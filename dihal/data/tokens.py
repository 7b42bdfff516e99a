"""Tokenise documents once; keep the ids in the cache."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors
from jaxtyping import Int64, UInt32
from safetensors.numpy import save_file

from dihal.data.text import Document, texts_fingerprint
from dihal.errors import UsageError
from dihal.io import atomic_path, cache_dir, hash_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Tokenised", "token_bytes", "tokenise"]

_log = logging.getLogger(__name__)

# Raise when the content of the cache files changes.
_SCHEMA = 1
# Characters handed to the tokenizer at once: enough to use its threads, little enough to show progress.
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, eq=False)
class Tokenised:
    """Token ids of a list of documents, one after the other, without special tokens."""

    tokens: UInt32[np.ndarray, "tokens"]
    ends: Int64[np.ndarray, "documents"]
    """Exclusive end of each document in `tokens`."""
    token_bytes: UInt32[np.ndarray, "tokens"]
    """UTF-8 bytes of the text that each token stands for; they add up to the document's bytes exactly."""

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.ends)

    def span(self, document: int) -> slice:
        """Place of a document in `tokens`."""
        return slice(int(self.ends[document - 1]) if document else 0, int(self.ends[document]))


def token_bytes(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Share the UTF-8 bytes of a text out among its tokens.

    A token gets the bytes from the end of the text covered so far to its own end, and the last one gets what
    remains. So white space that a tokenizer leaves out of its offsets counts for the token after it, and a
    character that is spread over several tokens, all of which name its whole span, counts once (for the first).

    Args:
        text: the text.
        offsets: (start, end) of each token in characters, as fast tokenizers return them.
    """
    # Bytes before each character position: 1 to 4 per character by its code point (RFC 3629).
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    before = np.concatenate([[0], np.cumsum(widths)])
    if not len(offsets):
        return []
    covered = before[np.maximum.accumulate(np.array([end for _, end in offsets]))]
    covered[-1] = before[-1]
    return np.diff(covered, prepend=0).tolist()


def tokenise(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_fingerprint: str,
    *,
    progress: bool = False,
) -> Tokenised:
    """Tokenise documents without special tokens, through the cache.

    Args:
        documents: what to tokenise.
        tokenizer: a fast tokenizer (offsets are needed).
        tokenizer_fingerprint: names the tokenizer in the cache: another one, another file.
        progress: show a progress bar on standard error.

    Raises:
        UsageError: the tokenizer is not a fast one, or the cache folder cannot be written.
    """
    key = hash_json([_SCHEMA, tokenizer_fingerprint, texts_fingerprint(documents)])
    target = cache_dir() / "tokens" / f"{key}.safetensors"
    if target.exists() and (found := _load(target)) is not None:
        return found
    made = _tokenise(documents, tokenizer, progress=progress)
    arrays = {"tokens": made.tokens, "ends": made.ends, "token_bytes": made.token_bytes}
    with atomic_path(target) as staged:
        save_file(arrays, staged, metadata={"sha256": _digest(arrays)})
    return made


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data)
    return digest.hexdigest()


def _load(target: Path) -> Tokenised | None:
    # safetensors loads a file with a flipped bit without complaint, so the content is checked. A cache can be
    # made again: a damaged one is reported and replaced.
    try:
        with safetensors.safe_open(target, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            expected = (file.metadata() or {}).get("sha256")
        if _digest(arrays) == expected:
            return Tokenised(**arrays)
    except (safetensors.SafetensorError, OSError, TypeError):
        pass
    _log.warning("the token cache %s is damaged and is made again", target)
    return None


def _batches(documents: Sequence[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document.text)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenise(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, progress: bool) -> Tokenised:
    if not tokenizer.is_fast:
        raise UsageError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which cannot say which bytes a token covers. "
            "Use the backbone's fast tokenizer (a folder with tokenizer.json)."
        )
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("tokenising"), BarColumn(), TextColumn("{task.percentage:3.0f}%"), TimeRemainingColumn())
    ids: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task("tokenising", total=sum(len(document.text) for document in documents))
        for texts in _batches(documents):
            # verbose=False: documents longer than the backbone's context are expected, they are cut into windows.
            done = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            for text, found, offsets in zip(texts, done["input_ids"], done["offset_mapping"]):
                ids.append(np.array(found, dtype=np.uint32))
                counts.append(np.array(token_bytes(text, offsets), dtype=np.uint32))
            bar.advance(task, sum(map(len, texts)))
    return Tokenised(
        tokens=np.concatenate(ids),
        ends=np.cumsum([len(found) for found in ids], dtype=np.int64),
        token_bytes=np.concatenate(counts),
    )
