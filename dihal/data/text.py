"""Documents and their split into training and validation."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dihal.config.parts import DataConfig
from dihal.data.pydoc import pydoc_records
from dihal.data.sources import Record, hub_records, path_records
from dihal.errors import UsageError, unknown_name

__all__ = [
    "MIN_CHARACTERS",
    "Corpus",
    "Document",
    "document_key",
    "read_corpus",
    "read_documents",
    "split_documents",
    "texts_fingerprint",
]

MIN_CHARACTERS = 8
"""A document with fewer characters (white space at the ends not counted) is skipped."""


@dataclass(frozen=True)
class Document:
    """One document; documents of equal text have equal keys, wherever they stand in a source."""

    text: str
    group: str | None
    key: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The distinct documents of a source, in its order, and what was left out."""

    documents: list[Document]
    duplicates: int
    """Later copies of a document with exactly the same text, dropped."""
    skipped: int
    """Documents below MIN_CHARACTERS, dropped."""


def document_key(text: str) -> str:
    """First 16 hex digits of the sha256 of the UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def texts_fingerprint(documents: Sequence[Document]) -> str:
    """Hex sha256 over the texts in order; any change of a text, the order or the number changes it."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.text.encode()
        # The length first, so that moving a boundary between two documents changes the result.
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def read_documents(config: DataConfig) -> list[Document]:
    """Return the distinct documents of `config.source`; see `read_corpus`."""
    return read_corpus(config).documents


def read_corpus(config: DataConfig) -> Corpus:
    """Read `config.source`, skip near-empty documents and later copies, count both.

    A copy inside a holdout group wins over copies elsewhere, so that no validation text is trained on.

    Raises:
        UsageError: options out of range, or anything wrong with the source (missing, empty, binary, damaged,
            a field that is not there, no text left).
    """
    _check(config)
    chosen: dict[str, Document] = {}
    holdout = frozenset(config.holdout_groups)
    read = skipped = duplicates = 0
    for record in _records(config):
        document = _document(record, config)
        if document is None:
            skipped += 1
            continue
        earlier = chosen.setdefault(document.key, document)
        if earlier is not document:
            duplicates += 1
            if document.group in holdout and earlier.group not in holdout:
                chosen[document.key] = document
        read += 1
        if read == config.max_documents:
            break
    if not chosen:
        raise UsageError(
            f"{config.source!r} holds no text ({skipped} documents shorter than {MIN_CHARACTERS} characters "
            "were skipped). Check the file and data.text_field."
        )
    return Corpus(documents=list(chosen.values()), duplicates=duplicates, skipped=skipped)


def _check(config: DataConfig) -> None:
    if config.holdout_groups and config.group_field is None:
        raise UsageError(
            f"data.holdout_groups {list(config.holdout_groups)} needs data.group_field: the field that names a "
            "record's group."
        )
    if not 0 < config.validation_fraction < 1:
        raise UsageError(f"data.validation_fraction must lie between 0 and 1, not {config.validation_fraction}.")
    if config.max_documents is not None and config.max_documents < 1:
        raise UsageError(f"data.max_documents must be at least 1 (or null for all), not {config.max_documents}.")


def _records(config: DataConfig) -> Iterator[Record]:
    if not config.source:
        raise UsageError("data.source is empty. Give `pydoc`, a file, a folder, or hf:NAME[:CONFIG][:SPLIT].")
    if config.source == "pydoc":
        return pydoc_records()
    if config.source.startswith("hf:"):
        return hub_records(config.source, streaming=config.max_documents is not None)
    columns = [config.text_field, *([config.group_field] if config.group_field else [])]
    return path_records(Path(config.source).expanduser(), list(dict.fromkeys(columns)))


def _document(record: Record, config: DataConfig) -> Document | None:
    fields = record.fields
    if config.text_field not in fields:
        raise unknown_name(f"field (data.text_field) of {record.where}:", config.text_field, fields)
    text = fields[config.text_field]
    if text is None:
        return None
    if not isinstance(text, str):
        raise UsageError(
            f"field {config.text_field!r} of {record.where} holds a {type(text).__name__}, text was expected. "
            "Choose another data.text_field."
        )
    if len(text.strip()) < MIN_CHARACTERS:
        return None
    group = None
    if config.group_field is not None:
        if config.group_field not in fields:
            raise unknown_name(f"field (data.group_field) of {record.where}:", config.group_field, fields)
        if fields[config.group_field] is None:
            raise UsageError(f"field {config.group_field!r} of {record.where} is null: every record needs a group.")
        group = str(fields[config.group_field])
    try:
        key = document_key(text)
    except UnicodeEncodeError as error:
        raise UsageError(f"the text of {record.where} holds half a surrogate pair: it is not valid Unicode.") from error
    return Document(text, group, key)


def split_documents(documents: Sequence[Document], config: DataConfig) -> tuple[list[Document], list[Document]]:
    """Return (training, validation) documents, each in the order of the source.

    With `holdout_groups` those groups are the validation split. Otherwise a document is held out when its key,
    read as a number in [0, 1), lies below `validation_fraction`: the choice depends on its text alone, so
    reordering or growing a corpus moves no document from one split to the other.

    Raises:
        UsageError: unknown holdout group, or one of the splits is empty.
    """
    _check(config)
    if config.holdout_groups:
        groups = {document.group for document in documents if document.group is not None}
        for name in config.holdout_groups:
            if name not in groups:
                raise _unknown_group(name, groups)
        held = [document.group in config.holdout_groups for document in documents]
        fix = "Hold out fewer groups."
    else:
        places = [int(document.key, 16) / 16**16 for document in documents]
        held = [place < config.validation_fraction for place in places]
        fix = _fraction_hint(places, none_held=not any(held))
    train = [document for document, out in zip(documents, held) if not out]
    validation = [document for document, out in zip(documents, held) if out]
    if not train or not validation:
        empty = "training" if not train else "validation"
        raise UsageError(f"the {empty} split is empty: all {len(documents)} documents are in the other one. {fix}")
    return train, validation


def _fraction_hint(places: list[float], *, none_held: bool) -> str:
    if len(places) == 1:
        return "Give the text as several documents: a folder of .txt files, or one record each in a .jsonl file."
    # Rounded outwards, so that the printed number works when it is typed in.
    bound = math.ceil(min(places) * 1000) / 1000 if none_held else math.floor(max(places) * 1000) / 1000
    side = "above" if none_held else "below"
    return f"Add documents, name data.holdout_groups, or set data.validation_fraction {side} {bound}."


def _unknown_group(name: str, groups: set[str]) -> UsageError:
    if len(groups) <= 40:
        return unknown_name("holdout group", name, groups, hint="They are the values of data.group_field.")
    shown = difflib.get_close_matches(name, groups, n=5) or sorted(groups)[:20]
    hint = f"These are {len(shown)} of {len(groups)} values of data.group_field."
    return unknown_name("holdout group", name, shown, hint=hint)
