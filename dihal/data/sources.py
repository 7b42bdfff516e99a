"""Records out of files, folders and Hugging Face `datasets`: one iterator, errors that name the place.

A record is a dict. Text files give the fields `text`, `file` and `folder`, so that `group_field: folder`
groups a folder of text files; the other formats give the fields they hold.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dihal.errors import UsageError, unknown_name

__all__ = ["SUFFIXES", "Record", "file_records", "hub_records", "path_records"]

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class Record:
    """One record and where it came from (for error messages)."""

    where: str
    fields: dict[str, Any]


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def path_records(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    """Iterate the records of a file, or of every readable file below a folder in sorted order.

    Args:
        path: file or folder.
        columns: fields that will be read (Parquet reads no others).

    Raises:
        UsageError: nothing there, nothing readable, or any error of a file.
    """
    if path.is_dir():
        files = sorted(
            (found for found in path.rglob("*") if found.is_file() and _suffix(found)),
            key=lambda found: found.relative_to(path).parts,
        )
        files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts)]
        if not files:
            raise UsageError(f"the folder {str(path)!r} holds no text. Readable: {', '.join(SUFFIXES)} files.")
        for found in files:
            yield from file_records(found, columns, root=path)
        return
    if not path.exists():
        near = " Did you mean 'pydoc'?" if str(path).lower().startswith("py") and path.suffix == "" else ""
        raise UsageError(
            f"no file or folder {str(path)!r}.{near} Give `pydoc`, a {', '.join(SUFFIXES)} file, a folder of them, "
            "or hf:NAME[:CONFIG][:SPLIT]."
        )
    if path.stat().st_size == 0:
        raise UsageError(f"{str(path)!r} is empty. Give a file with text.")
    yield from file_records(path, columns, root=path.parent)


def file_records(path: Path, columns: Sequence[str], *, root: Path) -> Iterator[Record]:
    """Iterate the records of one file; `root` is the folder that `file` and `folder` are relative to.

    Raises:
        UsageError: unknown format, binary, damaged or truncated content.
    """
    suffix = _suffix(path)
    try:
        if suffix == ".txt":
            yield _text_record(path, root)
        elif suffix in (".jsonl", ".jsonl.gz"):
            yield from _json_records(path, compressed=suffix.endswith(".gz"))
        elif suffix == ".parquet":
            yield from _parquet_records(path, columns)
        else:
            raise UsageError(f"cannot read {str(path)!r} as text: its name ends in none of {', '.join(SUFFIXES)}.")
    except OSError as error:
        raise UsageError(f"cannot read {str(path)!r}: {error.strerror or error}. Check its permissions.") from error


def _decode(data: bytes, where: str, *, start: bool) -> str:
    advice = "Convert it to UTF-8 text, or leave it out of the folder."
    if b"\0" in data:
        raise UsageError(f"{where} is binary (it holds NUL bytes), not text. {advice}")
    try:
        # utf-8-sig also accepts a byte-order mark, which only the start of a file may carry.
        return data.decode("utf-8-sig" if start else "utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 text ({error.reason} at byte {error.start}). {advice}") from error


def _text_record(path: Path, root: Path) -> Record:
    relative = path.relative_to(root)
    text = _decode(path.read_bytes(), repr(str(path)), start=True)
    fields = {"text": text, "file": relative.as_posix(), "folder": relative.parent.as_posix()}
    return Record(repr(str(path)), fields)


def _lines(path: Path, *, compressed: bool) -> Iterator[tuple[int, bytes]]:
    number = 0
    with gzip.open(path, "rb") if compressed else open(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                yield number, line
        except EOFError as error:
            raise UsageError(
                f"{str(path)!r} is truncated: the gzip stream ends after line {number}. Copy or download it again."
            ) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise UsageError(f"{str(path)!r} is not a valid gzip file ({error}). Copy or download it again.") from error


def _json_records(path: Path, *, compressed: bool) -> Iterator[Record]:
    for number, line in _lines(path, compressed=compressed):
        where = f"line {number} of {str(path)!r}"
        text = _decode(line, where, start=number == 1)
        if not text.strip():
            continue
        try:
            fields = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UsageError(f"{where} is not valid JSON ({error}). Every line must hold one JSON object.") from error
        if not isinstance(fields, dict):
            raise UsageError(f"{where} is a JSON {type(fields).__name__}, an object with a text field was expected.")
        yield Record(where, fields)


def _parquet_records(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(f'reading {str(path)!r} needs pyarrow: pip install "dihal[parquet]"') from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        known = file.schema_arrow.names
        for column in columns:
            if column not in known:
                raise unknown_name(f"field of {str(path)!r}", column, known)
        number = 0
        for chunk in file.iter_batches(columns=list(columns)):
            for fields in chunk.to_pylist():
                number += 1
                yield Record(f"record {number} of {str(path)!r}", fields)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{str(path)!r} is not a readable Parquet file ({reason}). Write it again.") from error


def hub_records(source: str, *, streaming: bool) -> Iterator[Record]:
    """Iterate a data set named `hf:NAME[:CONFIG][:SPLIT]`; an empty CONFIG is the default, SPLIT is `train`.

    Args:
        source: the name with its prefix.
        streaming: read only what is needed (for `max_documents`) instead of downloading everything.

    Raises:
        UsageError: malformed name, `datasets` not installed, no such data set, or no network.
    """
    parts = source.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 3:
        raise UsageError(f"cannot read the data set name {source!r}: the form is hf:NAME[:CONFIG][:SPLIT].")
    name, config, split = (*parts, "", "")[:3]
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f'reading {source!r} needs the datasets library: pip install "dihal[datasets]"') from error
    where = f"data set {source!r}"
    try:
        records = datasets.load_dataset(name, config or None, split=split or "train", streaming=streaming)
        for number, fields in enumerate(records, start=1):
            yield Record(f"record {number} of {where}", dict(fields))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"cannot read the {where}: {reason} Check its name, configuration and split, and the network; "
            "without a network give local files or `pydoc`."
        ) from error
