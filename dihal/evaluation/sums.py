"""Sums per document, the same to the last bit whichever process computed what they are made of.

Floating-point sums depend on the order of their terms. So a process adds nothing up across batches: it hands over
what each batch contributes, and contributions are added batch after batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Contributions", "DocumentSums", "contributions"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Contributions:
    """Rows to be added to sums per document, one after another."""

    documents: Int[np.ndarray, " rows"]
    """Whose sums."""
    values: dict[str, Float[np.ndarray, "rows ..."]]
    """By name of the sum, fp64."""


def contributions(
    documents: Int[Tensor, " positions"], values: Mapping[str, Float[Tensor, "positions ..."]], *, begun: int
) -> Contributions:
    """Sum the positions of a batch by document.

    Args:
        documents: each position's document; documents follow each other from batch to batch.
        values: fp64 numbers or vectors of the positions.
        begun: documents that earlier batches may hold a part of. On a CPU their positions stay rows of their own, and
            the sums are those of adding position after position, however the text is cut into batches.
    """
    # A GPU's memory and the way from it are too narrow for rows of single positions: it sums every batch by itself.
    kept = documents < (0 if documents.is_cuda else begun)
    summed, row = documents[~kept].unique(return_inverse=True)
    found = {
        name: torch.cat([value[kept], _added(value[~kept], row, len(summed))]).cpu().numpy()
        for name, value in values.items()
    }
    return Contributions(documents=torch.cat([documents[kept], summed]).cpu().numpy(), values=found)


def _added(
    values: Float[Tensor, "positions ..."], row: Int[Tensor, " positions"], rows: int
) -> Float[Tensor, "rows ..."]:
    table = values.new_zeros(rows, *values.shape[1:])
    if values.is_cuda:
        # `index_add_` adds in the order of arrival there; this sorts the positions first.
        return table.index_put_((row,), values, accumulate=True)
    return table.index_add_(0, row, values)


class DocumentSums:
    """Sums per document in fp64, on the CPU.

    Args:
        documents: how many.
        shapes: shape of one document's sum, by name; () for a number.
    """

    def __init__(self, documents: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._table = {name: torch.zeros(documents, *shape, dtype=torch.float64) for name, shape in shapes.items()}

    def __getitem__(self, name: str) -> Float[Tensor, "documents ..."]:
        return self._table[name]

    def add(self, found: Contributions) -> None:
        """Add what a batch contributes."""
        index = torch.from_numpy(found.documents)
        for name, value in found.values.items():
            self._table[name].index_add_(0, index, torch.from_numpy(value))

    def set(self, name: str, value: Float[Tensor, "documents ..."]) -> None:
        """Overwrite a sum."""
        self._table[name].copy_(value)

    def numpy(self) -> dict[str, Float[np.ndarray, "documents ..."]]:
        """All sums by name."""
        return {name: value.numpy() for name, value in self._table.items()}
