"""Attribution in pieces that are kept: a stopped run goes on where it was, and ends in the same bits.

Pieces have fixed borders, are scored on their own and merged in order; so it makes no difference whether a piece was
scored now or read from its file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dihal.circuits.attribute import attribute
from dihal.circuits.types import EdgeScores, PairBatch
from dihal.io import ensure_dir, hash_json, read_json, write_json

__all__ = ["attribute_in_pieces", "discard", "merge"]


def merge(pieces: Iterable[EdgeScores]) -> EdgeScores:
    """Scores of all prompts from those of disjoint groups of them; sums in float64, in the given order."""
    total: dict[str, np.ndarray] = {}
    counts: np.ndarray | None = None
    numbers = {"clean": 0.0, "corrupted": 0.0, "accuracy": 0.0}
    first: EdgeScores | None = None
    n, seconds, peak = 0, 0.0, None
    passes: dict[str, int] = {}
    residuals: dict[str, float] = {}
    for piece in pieces:
        first = piece if first is None else first
        own = np.array(piece.part_counts)
        counts = own if counts is None else counts + own
        weighted: dict[str, np.ndarray | None] = {
            "scores": piece.scores.astype(np.float64) * piece.n,
            "squares": None if piece.squares is None else piece.squares.astype(np.float64) * piece.n,
            "parts": None if piece.parts is None else piece.parts.astype(np.float64) * own[:, None, None],
        }
        for name, value in weighted.items():
            if value is not None:
                total[name] = total[name] + value if name in total else value
        for name in numbers:
            numbers[name] += getattr(piece, name) * piece.n
        passes = {name: passes.get(name, 0) + count for name, count in piece.passes.items()}
        residuals = {name: max(residuals.get(name, 0.0), value) for name, value in piece.residuals.items()}
        n, seconds = n + piece.n, seconds + piece.seconds
        peak = piece.peak_bytes if peak is None else max(peak, piece.peak_bytes or 0)
    assert first is not None
    assert counts is not None
    dtype = first.scores.dtype
    parts = total.get("parts")
    return replace(
        first,
        scores=(total["scores"] / n).astype(dtype),
        squares=(total["squares"] / n).astype(dtype) if "squares" in total else None,
        parts=None if parts is None else (parts / np.maximum(counts, 1)[:, None, None]).astype(dtype),
        part_counts=tuple(int(count) for count in counts),
        n=n,
        **{name: value / n for name, value in numbers.items()},
        passes=passes,
        residuals=residuals,
        seconds=seconds,
        peak_bytes=peak,
    )


def attribute_in_pieces(
    model: Any,
    pairs: Sequence[PairBatch],
    folder: Path,
    *,
    identity: dict[str, Any],
    every: int,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> EdgeScores:
    """`attribute`, with the scores of every `every` batches kept in a folder until all are there.

    Args:
        model: as in `attribute`.
        pairs: as there.
        folder: for the pieces; removed by `discard` when the run's own files are written.
        identity: everything else that decides the scores: pieces of another run are not used.
        every: batches per piece.
        progress: called with the number of pairs after every batch, and at once for pieces that were there.
        options: of `attribute`.
    """
    ensure_dir(folder)
    groups = [list(pairs[start : start + every]) for start in range(0, len(pairs), every)]
    mark = {"identity": hash_json({**identity, "every": every}), "pieces": len(groups)}
    if not (folder / "identity.json").is_file() or read_json(folder / "identity.json") != mark:
        discard(folder)
        write_json(ensure_dir(folder) / "identity.json", mark)

    def piece(index: int) -> EdgeScores:
        place = folder / f"piece-{index:04d}"
        # run.json is written last: a piece without it was never finished.
        if (place / "run.json").is_file():
            if progress is not None:
                progress(sum(len(batch) for batch in groups[index]))
            return EdgeScores.load(place)
        attribute(model, groups[index], progress=progress, **options).save(place)
        # Read back, so that a fresh piece and a kept one are the same.
        return EdgeScores.load(place)

    return merge(piece(index) for index in range(len(groups)))


def discard(folder: Path) -> None:
    """Remove the pieces."""
    shutil.rmtree(folder, ignore_errors=True)
