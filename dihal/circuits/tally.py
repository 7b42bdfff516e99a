"""Sums over prompts from which mean scores, their spread and split halves come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dihal.circuits.graph import GraphSpec
from dihal.circuits.types import EdgeScores

__all__ = ["BatchScores", "Tally"]


@dataclass
class BatchScores:
    """Scores and metrics of one batch."""

    scores: Float[Tensor, "batch writers readers"]
    clean: Float[Tensor, " batch"]
    corrupted: Float[Tensor, " batch"]
    solved: Bool[Tensor, " batch"]
    """Whether the clean run gives the answer."""
    passes: dict[str, int]
    sums: float
    """Largest relative error of the reader sums."""


class Tally:
    """Running sums in float64, on the model's device."""

    def __init__(self, spec: GraphSpec, parts: int, device: torch.device) -> None:
        self.spec = spec
        shape = (spec.n_writers, spec.n_readers)
        self.squares = torch.zeros(shape, dtype=torch.float64, device=device)
        # Without parts everything is one part.
        self.parts = torch.zeros((max(parts, 1), *shape), dtype=torch.float64, device=device)
        self.keep_parts = parts > 0
        self.counts = [0] * max(parts, 1)
        self.dtype = torch.float32
        self.metrics = {"clean": 0.0, "corrupted": 0.0, "accuracy": 0.0}
        self.passes: dict[str, int] = {}
        self.residuals: dict[str, float] = {}

    def add(self, found: BatchScores, ids: Int[Tensor, " batch"]) -> None:
        """Add a batch."""
        self.dtype = found.clean.dtype
        part = ids % len(self.parts)
        self.parts.index_add_(0, part, found.scores.double())
        self.squares += found.scores.square().sum(0, dtype=torch.float64)
        for index in part.tolist():
            self.counts[index] += 1
        sums = torch.stack([value.sum(dtype=torch.float64) for value in (found.clean, found.corrupted, found.solved)])
        for name, value in zip(self.metrics, sums.tolist(), strict=True):
            self.metrics[name] += value
        for name, count in found.passes.items():
            self.passes[name] = self.passes.get(name, 0) + count
        self.residuals["reader_sums"] = max(self.residuals.get("reader_sums", 0.0), found.sums)

    def scores(self) -> EdgeScores:
        """Means over all prompts."""
        n = sum(self.counts)

        def array(tensor: Tensor) -> Any:
            return tensor.to(self.dtype).cpu().numpy()

        counts = torch.tensor(self.counts, device=self.parts.device).clamp_min(1)
        return EdgeScores(
            spec=self.spec,
            scores=array(self.parts.sum(0) / n),
            n=n,
            squares=array(self.squares / n),
            parts=array(self.parts / counts[:, None, None]) if self.keep_parts else None,
            part_counts=tuple(self.counts) if self.keep_parts else (),
            passes=self.passes,
            residuals=self.residuals,
            **{name: float(np.float64(total) / n) for name, total in self.metrics.items()},
        )
