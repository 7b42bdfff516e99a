"""The computational graph of a decoder: who writes into the residual stream, who reads from it.

Writers are the stream's first state, every attention head and every MLP. Readers are the query, key
and value input of every head, the input of every MLP, and the logits. An edge is a writer that a
reader can see. Blocks are sequential unless ``parallel``: the MLP of a block reads its heads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from dihal.errors import UsageError

__all__ = ["GraphSpec", "align"]

_READER = re.compile(r"a(\d+)\.([hg])(\d+)<([qkv])>|m(\d+)|(logits)")


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """Block structure of a graph. Two models with equal structure have the same nodes and edges.

    Writers are ordered: the lower one, then per layer the heads and the MLP. Readers are ordered: per
    layer the queries, the keys, the values and the MLP; logits last. What a reader sees is a prefix
    of the writers.
    """

    layers: int
    """Blocks of the model, those below the seam included."""
    heads: int
    """Query heads of a block."""
    kv_heads: int
    """Key and value heads of a block."""
    kv: Literal["grouped", "query"] = "grouped"
    """Readers of keys and values: one per key-value head, or one per query head."""
    parallel: bool = False
    """Heads and MLP of a block read the same state."""
    mlps: bool = True
    """Blocks have an MLP; off: attention only."""
    seam: int = 0
    """First block of the graph; what is below it is one writer."""
    lower: str = "input"
    """Name of that writer: `input` at seam 0, else e.g. `lower` or `bridge`."""

    def __post_init__(self) -> None:
        if not 0 <= self.seam < self.layers:
            raise UsageError(f"seam {self.seam} is out of range: this graph has layers 0 to {self.layers - 1}.")
        if self.heads % self.kv_heads:
            raise UsageError(f"{self.heads} heads cannot share {self.kv_heads} key-value heads evenly.")
        if self.kv not in ("grouped", "query"):
            raise UsageError(f"kv {self.kv!r} is unknown. Valid: grouped, query.")

    @property
    def kv_readers(self) -> int:
        """Readers of keys (and as many of values) in a block."""
        return self.kv_heads if self.kv == "grouped" else self.heads

    @property
    def depth(self) -> int:
        """Blocks at and above the seam."""
        return self.layers - self.seam

    @property
    def readers_per_layer(self) -> int:
        """Queries, keys, values, MLP."""
        return self.heads + 2 * self.kv_readers + self.mlps

    @property
    def writers_per_layer(self) -> int:
        """Heads, MLP."""
        return self.heads + self.mlps

    @property
    def n_writers(self) -> int:
        """U."""
        return 1 + self.depth * self.writers_per_layer

    @property
    def n_readers(self) -> int:
        """V."""
        return self.depth * self.readers_per_layer + 1

    @cached_property
    def n_edges(self) -> int:
        """Edges of the graph: the sum of what every reader sees."""
        return int(self.prev.sum())

    @cached_property
    def writers(self) -> list[str]:
        """Names of the writers: ``input``, ``a3.h5``, ``m7``."""
        names = [self.lower]
        for layer in range(self.seam, self.layers):
            names += [f"a{layer}.h{head}" for head in range(self.heads)] + [f"m{layer}"] * self.mlps
        return names

    @cached_property
    def readers(self) -> list[str]:
        """Names of the readers: ``a3.h5<q>``, ``a3.g1<k>`` (a key-value head), ``m7``, ``logits``."""
        kind = "h" if self.kv_readers == self.heads else "g"
        names = []
        for layer in range(self.seam, self.layers):
            names += [f"a{layer}.h{head}<q>" for head in range(self.heads)]
            names += [f"a{layer}.{kind}{head}<{slot}>" for slot in "kv" for head in range(self.kv_readers)]
            names += [f"m{layer}"] * self.mlps
        return [*names, "logits"]

    @cached_property
    def layer_of_writer(self) -> Int[np.ndarray, " writers"]:
        """Block of each writer; seam - 1 for the lower one."""
        layers = np.repeat(np.arange(self.seam, self.layers), self.writers_per_layer)
        return np.concatenate([[self.seam - 1], layers]).astype(np.int64)

    @cached_property
    def layer_of_reader(self) -> Int[np.ndarray, " readers"]:
        """Block of each reader; the number of layers for the logits."""
        layers = np.repeat(np.arange(self.seam, self.layers), self.readers_per_layer)
        return np.concatenate([layers, [self.layers]]).astype(np.int64)

    @cached_property
    def prev(self) -> Int[np.ndarray, " readers"]:
        """Number of writers that each reader sees: a prefix of the writers."""
        below = 1 + (self.layer_of_reader - self.seam) * self.writers_per_layer
        own_heads = np.zeros(self.n_readers, dtype=np.int64)
        if self.mlps and not self.parallel:
            own_heads[self.readers_per_layer - 1 : -1 : self.readers_per_layer] = self.heads
        return below + own_heads

    @cached_property
    def edge_mask(self) -> Bool[np.ndarray, "writers readers"]:
        """True where an edge exists."""
        return np.arange(self.n_writers)[:, None] < self.prev[None, :]

    def writer_at(self, layer: int) -> int:
        """Index of the first head of a block."""
        return 1 + (layer - self.seam) * self.writers_per_layer

    def reader_at(self, layer: int) -> int:
        """Index of the first query of a block; of the logits for ``layer`` = L."""
        return (layer - self.seam) * self.readers_per_layer

    def edge_name(self, writer: int | np.integer, reader: int | np.integer) -> str:
        """``m0->a1.h1<v>``."""
        return f"{self.writers[writer]}->{self.readers[reader]}"

    def edge_index(self, name: str) -> tuple[int, int]:
        """Writer and reader of a named edge.

        Raises:
            UsageError: no such writer, reader or edge.
        """
        writer, _, reader = name.partition("->")
        if writer not in self._writer_index or reader not in self._reader_index:
            raise UsageError(
                f"no edge {name!r} in this graph. Names look like {self.edge_name(0, 0)!r} or {self.edge_name(0, -1)!r}."
            )
        pair = self._writer_index[writer], self._reader_index[reader]
        if not self.edge_mask[pair]:
            raise UsageError(f"{name!r} is no edge: {reader} does not see {writer}.")
        return pair

    def writer_index(self, name: str) -> int:
        """Index of a named writer.

        Raises:
            UsageError: no such writer.
        """
        if name not in self._writer_index:
            raise UsageError(f"no writer {name!r} in this graph. Writers are {self.lower}, a<layer>.h<head>, m<layer>.")
        return self._writer_index[name]

    @cached_property
    def _writer_index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.writers)}

    @cached_property
    def _reader_index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.readers)}

    @cached_property
    def reader_node(self) -> Int[np.ndarray, "readers heads"]:
        """Writers that a reader feeds, padded with -1: its head, every head of its group, its MLP; none for the logits."""
        out = np.full((self.n_readers, self.heads), -1, dtype=np.int64)
        group = self.heads // self.kv_readers
        for index, name in enumerate(self.readers[:-1]):
            layer = int(self.layer_of_reader[index])
            found = _READER.fullmatch(name)
            assert found is not None
            if found[5] is not None:
                out[index, 0] = self.writer_at(layer) + self.heads
            else:
                size = 1 if found[4] == "q" else group
                first = self.writer_at(layer) + int(found[3]) * size
                out[index, :size] = np.arange(first, first + size)
        return out

    def contract(
        self, scores: Float[np.ndarray, "writers readers"], seam: int, lower: str = "lower"
    ) -> tuple[GraphSpec, Float[np.ndarray, "upper_writers upper_readers"]]:
        """Graph and scores in which everything below ``seam`` is one writer.

        Exact: whatever is below acts on the upper graph through the state at the seam only, and a score
        is linear in what is written.

        Raises:
            UsageError: a seam below the graph's own, or above its last layer.
        """
        if seam < self.seam:
            raise UsageError(f"this graph starts at layer {self.seam}; it cannot be contracted at {seam}.")
        spec = replace(self, seam=seam, lower=self.lower if seam == self.seam else lower)
        below = self.layer_of_writer < seam
        columns = scores[:, self.reader_at(seam) :]
        return spec, np.concatenate([columns[below].sum(0, keepdims=True), columns[~below]])

    def group(
        self, scores: Float[np.ndarray, "writers readers"]
    ) -> tuple[GraphSpec, Float[np.ndarray, "writers grouped"]]:
        """Graph and scores with one reader per key-value head: the sum over the query heads that share it.

        Raises:
            UsageError: the readers are grouped already.
        """
        if self.kv == "grouped":
            raise UsageError("these scores have one reader per key-value head already.")
        spec = replace(self, kv="grouped")
        per_layer = scores[:, :-1].reshape(len(scores), self.depth, self.readers_per_layer)
        queries, mlp = per_layer[..., : self.heads], per_layer[..., 3 * self.heads :]
        shape = (len(scores), self.depth, 2 * self.kv_heads, self.heads // self.kv_heads)
        shared = per_layer[..., self.heads : 3 * self.heads].reshape(shape).sum(-1)
        grouped = np.concatenate([queries, shared, mlp], -1).reshape(len(scores), -1)
        return spec, np.concatenate([grouped, scores[:, -1:]], 1)

    def reorder(self, values: Shaped[np.ndarray, "writers readers"], layer: int, order: Sequence[int]) -> np.ndarray:
        """Scores or edges with the heads of a block renamed: head ``i`` of the result is head ``order[i]``.

        Raises:
            UsageError: no permutation, or one that tears apart query heads of one key-value head.
        """
        group = self.heads // self.kv_readers
        groups = [head // group for head in order[::group]]
        whole = [head // group for head in order] == [g for g in groups for _ in range(group)]
        if sorted(order) != list(range(self.heads)) or not whole:
            raise UsageError(f"{list(order)} does not permute {self.heads} heads in groups of {group}.")
        rows, columns = np.arange(self.n_writers), np.arange(self.n_readers)
        rows[self.writer_at(layer) :][: self.heads] = self.writer_at(layer) + np.asarray(order)
        first = self.reader_at(layer)
        columns[first:][: self.heads] = first + np.asarray(order)
        for slot in range(2):
            start = first + self.heads + slot * self.kv_readers
            columns[start:][: self.kv_readers] = start + np.asarray(groups)
        return values[rows][:, columns]

    def record(self) -> dict[str, Any]:
        """The fields, for a JSON file; ``GraphSpec(**record)`` restores them."""
        return asdict(self)


def align(first: GraphSpec, second: GraphSpec) -> None:
    """Refuse two graphs of which an edge means different things; the name of the lower writer does not matter.

    Raises:
        UsageError: another number of layers, heads or key-value readers, another seam, other block order.
    """
    fields = ("layers", "heads", "kv_readers", "parallel", "mlps", "seam")
    different = [
        f"{name} {getattr(first, name)} and {getattr(second, name)}"
        for name in fields
        if getattr(first, name) != getattr(second, name)
    ]
    if different:
        raise UsageError(
            f"these models have different graphs ({'; '.join(different)}), their edges cannot be compared. "
            "Compare models of one block structure, with the same kv readers and the same seam."
        )
