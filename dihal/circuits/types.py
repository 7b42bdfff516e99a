"""What the parts of this package hand to each other: prompts, scores, circuits.

Signs. A score estimates by how much the metric changes when the edge carries the corrupted value, so
an edge that serves the task has a *negative* score. Ranking "by signed value" therefore starts at
the most negative score; ranking by magnitude ignores the sign.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dihal.circuits.graph import GraphSpec
from dihal.errors import UsageError
from dihal.io import atomic_path, ensure_dir, read_json, sha256_file, write_json

__all__ = ["Attention", "Circuit", "EdgeScores", "Metric", "PairBatch", "Rank", "Task"]

Attention = Literal["causal", "full"]
"""What a position sees: positions up to its own, or all."""

Rank = Literal["magnitude", "signed"]
"""Order in which edges enter a circuit (see the module on signs)."""

SCHEMA = 1
"""Version of ``run.json`` and ``scores.npz``."""


@dataclass(frozen=True)
class PairBatch:
    """Pairs of a clean and a corrupted prompt, all of one length: no padding, so that positions agree."""

    clean: Int[Tensor, "batch time"]
    """Token ids of the prompt that is solved."""
    corrupted: Int[Tensor, "batch other_time"]
    """Token ids of its counterpart, which asks for another answer; as many."""
    positions: Int[Tensor, "batch targets"]
    """Positions whose logits are read; a next-token shift is applied already."""
    answers: Int[Tensor, "batch targets answers"]
    """Right tokens of the clean prompt; -1 pads."""
    foils: Int[Tensor, "batch targets foils"]
    """Wrong tokens, e.g. the answer of the corrupted prompt; -1 pads."""
    weights: Float[Tensor, "batch targets"]
    """Weight of each target in its prompt's metric; a prompt's weights sum to 1."""
    attention: Attention
    """What a position sees."""
    ids: Int[Tensor, " batch"]
    """Sample ids: the key of random numbers, of split halves and of resampling."""
    meta: tuple[dict[str, Any], ...] = ()
    """Per prompt what the task knows about it (template, names, ...)."""

    def __post_init__(self) -> None:
        if self.clean.shape != self.corrupted.shape:
            raise UsageError(
                f"clean and corrupted prompts have {self.clean.shape[-1]} and {self.corrupted.shape[-1]} tokens: a pair "
                "must have equal lengths, or positions do not mean the same. Choose another corruption."
            )
        if self.positions.numel() and not 0 <= int(self.positions.min()) <= int(self.positions.max()) < self.time:
            raise UsageError(f"target positions must lie in 0 to {self.time - 1}.")
        if self.attention not in ("causal", "full"):
            raise UsageError(f"attention {self.attention!r} is unknown. Valid: causal, full.")
        # A mean or a sum over no id would be a silent zero.
        if any(ids.numel() and not bool((ids >= 0).any(-1).all()) for ids in (self.answers, self.foils)):
            raise UsageError("a target has no answer or no foil. Give every target at least one id of each.")

    def __len__(self) -> int:
        return self.clean.shape[0]

    @property
    def time(self) -> int:
        """Tokens of every prompt."""
        return self.clean.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def map(self, change: Callable[[Tensor], Tensor], meta: tuple[dict[str, Any], ...] = ()) -> PairBatch:
        """With every tensor changed: moved, copied, or the same prompts of it chosen."""
        # Not checked again: on a GPU that is waiting for it, four times a batch.
        out = copy.copy(self)
        for name, value in self.tensors().items():
            object.__setattr__(out, name, change(value))
        object.__setattr__(out, "meta", meta)
        return out

    def repeated(self, times: int) -> PairBatch:
        """All prompts, and all of them again."""
        return self.map(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1)), self.meta * times)

    def copy_(self, other: PairBatch) -> None:
        """Write the values of a batch of the same shape over one's own."""
        for name, value in self.tensors().items():
            value.copy_(getattr(other, name))

    def to(self, device: torch.device | str) -> PairBatch:
        """The batch on a device."""
        return self.map(lambda tensor: tensor.to(device), self.meta)

    def rows(self, first: int, last: int) -> PairBatch:
        """Prompts ``first`` .. ``last - 1``."""
        return self.map(lambda tensor: tensor[first:last], self.meta[first:last])

    def select(self, keep: Bool[Tensor, " batch"]) -> PairBatch:
        """The prompts where ``keep`` is true."""
        meta = tuple(item for item, kept in zip(self.meta, keep.tolist()) if kept)
        return self.map(lambda tensor: tensor[keep.to(tensor.device)], meta)


Metric = Callable[[Float[Tensor, "batch targets vocab"], PairBatch], Float[Tensor, " batch"]]
"""Logits at the targets, and the batch, to one number per prompt; larger is better; differentiable."""


class Task(Protocol):
    """Makes pairs of prompts."""

    name: str
    attention: Attention

    def pairs(self, n: int, *, seed: int, split: Literal["discovery", "test"] = "discovery") -> list[PairBatch]:
        """``n`` pairs, batched by equal length; sample ids are unique within a split."""
        ...

    def provenance(self) -> dict[str, Any]:
        """Template hash, corruption and whatever else decides what the pairs are."""
        ...


@dataclass(frozen=True, kw_only=True)
class Circuit:
    """A set of edges."""

    spec: GraphSpec
    edges: Bool[np.ndarray, "writers readers"]
    """True inside the circuit."""
    rule: str = "given"
    """How it was chosen."""
    k: int = 0
    """Number of edges asked for; pruning may leave fewer."""

    def __post_init__(self) -> None:
        if self.edges.shape != self.spec.edge_mask.shape:
            raise UsageError(
                f"a circuit of shape {self.edges.shape} does not fit a graph of {self.spec.edge_mask.shape} (writers, readers)."
            )
        if (self.edges & ~self.spec.edge_mask).any():
            raise UsageError("this circuit has edges that the graph does not have.")

    @property
    def size(self) -> int:
        """Number of edges."""
        return int(self.edges.sum())

    @property
    def names(self) -> list[str]:
        """Names of the edges."""
        return [self.spec.edge_name(int(u), int(v)) for u, v in np.argwhere(self.edges)]

    @classmethod
    def full(cls, spec: GraphSpec) -> Circuit:
        """Every edge."""
        return cls(spec=spec, edges=spec.edge_mask.copy(), rule="full", k=spec.n_edges)

    @classmethod
    def empty(cls, spec: GraphSpec) -> Circuit:
        """No edge."""
        return cls(spec=spec, edges=np.zeros_like(spec.edge_mask), rule="empty")

    @classmethod
    def named(cls, spec: GraphSpec, names: list[str]) -> Circuit:
        """The named edges."""
        edges = np.zeros_like(spec.edge_mask)
        for name in names:
            edges[spec.edge_index(name)] = True
        return cls(spec=spec, edges=edges, k=len(names))

    def pruned(self) -> Circuit:
        """Without dead ends: every edge lies on a path from the lower writer to the logits."""
        spec, edges = self.spec, self.edges.copy()
        node = spec.reader_node
        fed = np.zeros((spec.n_readers, spec.n_writers), dtype=bool)
        reader, column = np.nonzero(node >= 0)
        fed[reader, node[reader, column]] = True
        while True:
            reached = fed[edges.any(0)].any(0)  # writers of which some reader has an input
            reached[0] = True
            read = edges.any(1)
            useful = (fed & read[None, :]).any(1)  # readers that feed a writer which is read
            useful[-1] = True
            kept = edges & reached[:, None] & useful[None, :]
            if (kept == edges).all():
                return replace(self, edges=edges)
            edges = kept


@dataclass(kw_only=True)
class EdgeScores:
    """Scores of every edge on a task, and how they were made."""

    spec: GraphSpec
    scores: Float[np.ndarray, "writers readers"]
    """Mean over prompts of the estimated change of the metric when the edge is corrupted; 0 where there is no edge."""
    n: int
    """Prompts."""
    squares: Float[np.ndarray, "writers readers"] | None = None
    """Mean over prompts of the squared score, for standard errors."""
    parts: Float[np.ndarray, "parts writers readers"] | None = None
    """Mean score of the prompts of each part; a prompt belongs to part (sample id modulo parts). For split halves and resampling."""
    part_counts: tuple[int, ...] = ()
    """Prompts in each part."""
    clean: float = float("nan")
    """Mean metric of the clean prompts."""
    corrupted: float = float("nan")
    """Mean metric of the corrupted prompts."""
    accuracy: float = float("nan")
    """Share of clean prompts with a positive metric."""
    method: str = ""
    steps: int = 0
    rule: str = ""
    path: str = ""
    passes: dict[str, int] = field(default_factory=dict)
    """Forward and backward passes over all batches, without the four forwards of the checks."""
    seconds: float = 0.0
    peak_bytes: int | None = None
    """Peak device memory on CUDA; None elsewhere."""
    residuals: dict[str, float] = field(default_factory=dict)
    """Largest relative error of each identity asserted while running."""
    details: dict[str, Any] = field(default_factory=dict)
    """Whatever else belongs into run.json: model, task, seeds."""

    @property
    def halves(self) -> tuple[Float[np.ndarray, "writers readers"], Float[np.ndarray, "writers readers"]]:
        """Scores of the prompts with even and with odd sample ids.

        Raises:
            UsageError: made without parts, or one half has no prompt.
        """
        if self.parts is None:
            raise UsageError("these scores were kept without parts; run the attribution with parts=2 or more.")
        return self._of_parts(range(0, len(self.parts), 2)), self._of_parts(range(1, len(self.parts), 2))

    def _of_parts(self, chosen: range) -> np.ndarray:
        assert self.parts is not None
        weights = np.array([self.part_counts[part] for part in chosen], dtype=np.float64)
        if weights.sum() == 0:
            raise UsageError("one half of the sample ids has no prompt; give more prompts.")
        mean = np.tensordot(weights / weights.sum(), self.parts[list(chosen)].astype(np.float64), 1)
        return mean.astype(self.scores.dtype)

    @property
    def ranking(self) -> dict[str, Float[np.ndarray, "writers readers"]]:
        """Per rank the key by which edges enter, largest first."""
        return {"magnitude": np.abs(self.scores), "signed": -self.scores}

    def top(
        self,
        k: int | None = None,
        *,
        fraction: float | None = None,
        by: Rank = "magnitude",
        connected: bool = False,
    ) -> Circuit:
        """The ``k`` highest-ranked edges, or a fraction of all edges; ties go to the lower index.

        Args:
            k: number of edges, 0 .. E.
            fraction: instead of ``k``, share of all edges in [0, 1].
            by: magnitude, or signed value.
            connected: drop edges that lie on no path from the lower writer to the logits.

        Raises:
            UsageError: both or neither of ``k`` and ``fraction``, or out of range.
        """
        total = self.spec.n_edges
        if (k is None) == (fraction is None):
            raise UsageError("give either a number of edges k or a fraction.")
        if by not in self.ranking:
            raise UsageError(f"edges are ranked by magnitude or signed value, not by {by!r}.")
        if k is None:
            assert fraction is not None
            k = round(fraction * total)
        if not 0 <= k <= total:
            raise UsageError(f"{k} edges were asked for; this graph has {total}.")
        inside = np.flatnonzero(self.spec.edge_mask)
        order = np.argsort(-self.ranking[by].ravel()[inside], kind="stable")
        edges = np.zeros(self.spec.edge_mask.size, dtype=bool)
        edges[inside[order[:k]]] = True
        circuit = Circuit(spec=self.spec, edges=edges.reshape(self.spec.edge_mask.shape), rule=f"top {by}", k=k)
        return circuit.pruned() if connected else circuit

    def contract(self, seam: int, lower: str = "lower") -> EdgeScores:
        """The scores with everything below a layer as one writer; squares are not linear and are dropped."""
        spec, scores = self.spec.contract(self.scores, seam, lower)
        parts = self.parts
        if parts is not None:
            parts = np.stack([self.spec.contract(part, seam, lower)[1] for part in parts])
        return replace(self, spec=spec, scores=scores, parts=parts, squares=None)

    def group(self) -> EdgeScores:
        """The scores with one reader per key-value head; squares are not linear and are dropped."""
        spec, scores = self.spec.group(self.scores)
        parts = self.parts
        if parts is not None:
            parts = np.stack([self.spec.group(part)[1] for part in parts])
        return replace(self, spec=spec, scores=scores, parts=parts, squares=None)

    def record(self) -> dict[str, Any]:
        """Everything but the arrays, for ``run.json``."""
        arrays = ("spec", "scores", "squares", "parts")
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in arrays}
        return {"schema": SCHEMA, "spec": self.spec.record(), **numbers}

    def save(self, folder: str | Path) -> None:
        """Write ``scores.npz`` and ``run.json``, which holds its sha256."""
        target = ensure_dir(folder)
        arrays = {name: getattr(self, name) for name in ("scores", "squares", "parts")}
        with atomic_path(target / "scores.npz") as staged, open(staged, "wb") as file:
            np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
        write_json(target / "run.json", {**self.record(), "sha256": sha256_file(target / "scores.npz")})

    @classmethod
    def load(cls, folder: str | Path) -> EdgeScores:
        """Read what :meth:`save` wrote.

        Raises:
            UsageError: files missing, of another schema, or not belonging together.
        """
        record = read_json(Path(folder) / "run.json")
        path = Path(folder) / "scores.npz"
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise UsageError(f"{str(folder)!r} was not written by this version of `dihal circuits run`. Run it again.")
        if not path.is_file() or sha256_file(path) != record.get("sha256"):
            raise UsageError(f"{str(path)!r} is missing or is not the file run.json was written with. Run it again.")
        with np.load(path, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
        known = {f.name for f in fields(cls)} - {"spec", "scores", "squares", "parts"}
        numbers = {name: value for name, value in record.items() if name in known}
        numbers["part_counts"] = tuple(numbers["part_counts"])
        for name in ("clean", "corrupted", "accuracy"):
            numbers[name] = float("nan") if numbers[name] is None else numbers[name]
        return cls(spec=GraphSpec(**record["spec"]), **arrays, **numbers)
