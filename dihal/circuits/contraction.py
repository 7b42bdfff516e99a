"""From captured tensors to edge scores.

Let x be the residual stream before a norm, xhat = C x r its normalised form (C centres for a LayerNorm, is
the identity for an RMSNorm), r = 1 / sqrt(mean((C x)^2) + eps), gamma the norm's weight, W the
matrix of the projection and g the gradient of the metric at the projection's output. The gradient a reader v
has at a private copy of the stream is

    G_v = C gamma W_v^T (r g_v) - (r / d) (g_v . q_v) xhat,

q_v the projection's output without its bias (and without the share of the norm's bias). The score of edge (u, v)
is the sum over positions of delta_u . G_v, averaged over the points of the path. Only r g_v (as wide as a head),
g_v . q_v (a number) and xhat differ from point to point: the sum over points is taken of those, and the product
with the writers, whose number is large, is done once per batch (factored). The generic form
pulls every reader's gradient through the norm itself with ``torch.func.vjp``; it is the reference.

Layouts: writers (batch, writers, time, dim), so that position and width contract in one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dihal.backbone.layout import Layout
from dihal.circuits.adapters import Adapter
from dihal.circuits.capture import Record
from dihal.circuits.graph import GraphSpec

__all__ = ["Contracted", "Contraction", "Delta", "Gathered", "Norm"]

Contraction = Literal["factored", "generic"]


@dataclass(frozen=True)
class Norm:
    """A norm as numbers: gain, bias, whether it centres, and eps; ``gain`` None: no norm."""

    gain: Tensor | None
    bias: Tensor | None
    centred: bool
    eps: float

    @classmethod
    def of(cls, module: nn.Module, layout: Layout, dtype: torch.dtype) -> Norm:
        """Read a norm module."""
        if layout.norm_kind == "none":
            return cls(None, None, False, 0.0)
        gain: Tensor = module.weight.detach().to(dtype)  # type: ignore[union-attr,operator]
        bias = getattr(module, "bias", None)
        eps = float(getattr(module, layout.norm_eps))
        return cls(gain, None if bias is None else bias.detach().to(dtype), layout.norm_kind == "layer", eps)

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """xhat and r (with a last axis of 1)."""
        if self.gain is None:
            return torch.zeros_like(x), torch.ones_like(x[..., :1])
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * scale, scale

    def pull(self, gradient: Tensor) -> Tensor:
        """C (gamma gradient): the linear part of the pullback, along the last axis, without r."""
        if self.gain is None:
            return gradient
        out = gradient * self.gain
        return out - out.mean(-1, keepdim=True) if self.centred else out


@dataclass
class Delta:
    """Corrupted minus clean: what each component writes (heads before the output projection), and what each site reads."""

    state: Tensor
    heads: dict[int, Tensor]
    mlps: dict[int, Tensor]
    attention_inputs: dict[int, Tensor]
    inputs: dict[int, Tensor]

    @classmethod
    def between(cls, corrupted: Record, clean: Record, state: Tensor, dtype: torch.dtype) -> Delta:
        """Differences of two records, in the working type."""

        def subtract(name: str) -> dict[int, Tensor]:
            ours, theirs = getattr(corrupted, name), getattr(clean, name)
            return {layer: ours[layer].to(dtype) - theirs[layer].to(dtype) for layer in ours}

        names = ("heads", "mlps", "attention_inputs", "inputs")
        return cls(state.to(dtype), *(subtract(name) for name in names))

    def writers(
        self, adapter: Adapter, spec: GraphSpec, first: int, last: int
    ) -> Float[Tensor, "batch writers time dim"]:
        """What the blocks ``first`` .. ``last - 1`` write, preceded by the state if ``first`` is the seam."""
        batch, time, dim = self.state.shape
        count = (last - first) * spec.writers_per_layer + (first == spec.seam)
        out = self.state.new_empty(batch, count, time, dim)
        index = 0
        if first == spec.seam:
            out[:, 0] = self.state
            index = 1
        for layer in range(first, last):
            heads = self.heads[layer].unflatten(-1, (spec.heads, -1)).permute(2, 0, 1, 3).flatten(1, 2)
            written = torch.bmm(heads, adapter.output_weight(layer).to(out.dtype))
            out[:, index : index + spec.heads] = written.view(spec.heads, batch, time, dim).transpose(0, 1)
            if spec.mlps:
                out[:, index + spec.heads] = self.mlps[layer]
            index += spec.writers_per_layer
        return out


class Gathered:
    """Reader gradients summed over the points of a path.

    Args:
        adapter: the model.
        spec: the graph.
        contraction: factored, or generic.
    """

    def __init__(self, adapter: Adapter, spec: GraphSpec, contraction: Contraction) -> None:
        self.adapter = adapter
        self.spec = spec
        self.generic = contraction == "generic"
        self.dtype = adapter.work_dtype
        self.layers = range(spec.seam, spec.layers)
        layout = adapter.layout
        self.norms = {i: Norm.of(adapter.part(i, layout.attention_norm), layout, self.dtype) for i in self.layers}
        self.offsets = {layer: self._offset(layer) for layer in self.layers}
        # Filled by `add`: per layer, gradients in head space; per point, xhat and g . q; per MLP and logits, G itself.
        self.heads: dict[int, Tensor] = {}
        self.hats: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        self.shrink: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        self.wide: dict[int, Tensor] = {}
        self.points = 0

    def _weight(self, layer: int) -> Float[Tensor, "readers head_dim dim"]:
        """Per reader of an attention, its rows of the projections."""
        weight = self.adapter.projections(layer, self.spec.kv).weight
        return weight.to(self.dtype).unflatten(0, (-1, self.adapter.head_dim))

    def _offset(self, layer: int) -> Float[Tensor, "readers head_dim"]:
        """What the projections give for xhat = 0: their bias, plus their matrix times the norm's bias."""
        weight, bias = self.adapter.projections(layer, self.spec.kv)
        offset = weight.new_zeros(len(weight), dtype=self.dtype) if bias is None else bias.to(self.dtype)
        if self.norms[layer].bias is not None:
            offset = offset + weight.to(self.dtype) @ self.norms[layer].bias
        return offset.unflatten(0, (-1, self.adapter.head_dim))

    def _norm_at(self, layer: int) -> nn.Module:
        name = self.adapter.layout.mlp_norm
        return self.adapter.norm if layer == self.spec.layers else self.adapter.part(layer, name)

    def add(self, record: Record, gradients: Record, weight: float) -> None:
        """Add one point of the path."""
        for layer in self.layers:
            self._add_attention(layer, record, gradients, weight)
        for layer, gradient in gradients.normed.items():
            pulled = self._pull(self._norm_at(layer), record.inputs[layer], gradient.to(self.dtype)) * weight
            self.wide[layer] = pulled if layer not in self.wide else self.wide[layer].add_(pulled)
        self.points += 1

    def _pull(self, module: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
        """Gradient at a norm's input from the one at its output."""
        if self.generic:
            return _vjp(module, x, gradient)
        norm = Norm.of(module, self.adapter.layout, self.dtype)
        hat, scale = norm.normalise(x.to(self.dtype))
        inner = norm.pull(gradient)
        return scale * (inner - hat * (inner * hat).mean(-1, keepdim=True))

    def _add_attention(self, layer: int, record: Record, gradients: Record, weight: float) -> None:
        size = self.adapter.head_dim
        gradient = torch.cat(gradients.projected[layer], -1).to(self.dtype).unflatten(-1, (-1, size)) * weight
        x = record.attention_inputs[layer]
        if self.generic:
            back = torch.einsum("btvh,vhd->vbtd", gradient, self._weight(layer))
            pulled = _vjp(self.adapter.part(layer, self.adapter.layout.attention_norm), x, back)
            self.heads[layer] = pulled if layer not in self.heads else self.heads[layer].add_(pulled)
            return
        hat, scale = self.norms[layer].normalise(x.to(self.dtype))
        output = torch.cat(record.projected[layer], -1).detach().to(self.dtype).unflatten(-1, (-1, size))
        scaled = gradient * scale[..., None]
        self.heads[layer] = scaled if layer not in self.heads else self.heads[layer].add_(scaled)
        if self.norms[layer].gain is not None:
            self.hats[layer].append(hat.to(self.adapter.dtype))
            self.shrink[layer].append(((output - self.offsets[layer]) * scaled).sum(-1) / x.shape[-1])

    def attention(self, layer: int) -> Float[Tensor, "batch readers time dim"]:
        """Reader gradients of an attention; factored: the part that is linear in the gradient only."""
        if self.generic:
            return self.heads[layer].transpose(0, 1)
        batch, time, readers, size = self.heads[layer].shape
        narrow = self.heads[layer].permute(2, 0, 1, 3).reshape(readers, batch * time, size)
        wide = torch.bmm(narrow, self.norms[layer].pull(self._weight(layer)))
        return wide.view(readers, batch, time, -1).transpose(0, 1).contiguous()


def _vjp(module: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
    """Pull gradients, with any leading axes, through a norm; its forward alone, without hooks."""
    _, pullback = torch.func.vjp(module.forward, x)
    pull = lambda item: pullback(item.to(x.dtype))[0]  # noqa: E731
    return (pull(gradient) if gradient.ndim == x.ndim else torch.func.vmap(pull)(gradient)).to(gradient.dtype)


class Contracted(NamedTuple):
    """Scores of every edge per prompt, and per reader the score of all its writers together, found independently."""

    scores: Float[Tensor, "batch writers readers"]
    totals: Float[Tensor, "batch readers"]


def contract(delta: Delta, gathered: Gathered, chunk_bytes: int) -> Contracted:
    """Scores of a batch.

    Args:
        delta: what is written.
        gathered: what is read.
        chunk_bytes: size up to which writers are held at once (one block's at least).
    """
    spec = gathered.spec
    batch = delta.state.shape[0]
    scores = delta.state.new_zeros(batch, spec.n_writers, spec.n_readers)
    hats = {layer: torch.stack(points, 2) for layer, points in gathered.hats.items() if points}
    shrink = {layer: torch.stack(points, 2) for layer, points in gathered.shrink.items() if points}
    wide = torch.stack([gathered.wide[layer] for layer in sorted(gathered.wide)], 1)
    totals = scores.new_zeros(batch, spec.n_readers)
    columns = [spec.reader_at(layer + 1) - 1 for layer in sorted(gathered.wide) if layer < spec.layers]
    columns.append(spec.n_readers - 1)
    changes = torch.stack([delta.inputs[layer] for layer in sorted(gathered.wide)], 1)
    totals[:, columns] = (changes * wide).sum((2, 3))
    del changes
    for first, last in _chunks(spec, delta, chunk_bytes):
        writers = delta.writers(gathered.adapter, spec, first, last)
        start = 0 if first == spec.seam else spec.writer_at(first)
        rows = scores[:, start : start + writers.shape[1]]
        rows[:, :, columns] = torch.bmm(writers.flatten(2), wide.flatten(2).mT)
        along = _along(writers, {layer: hats[layer] for layer in hats if layer >= first})
        for layer in range(first, spec.layers):
            # Writers of this chunk that the block sees: all of earlier blocks.
            seen = min(spec.writer_at(layer) - start, writers.shape[1])
            whole = first == spec.seam
            if seen <= 0 and not whole:
                continue
            place = slice(spec.reader_at(layer), spec.reader_at(layer) + spec.heads + 2 * spec.kv_readers)
            read = gathered.attention(layer).flatten(2)
            rows[:, :seen, place] = torch.bmm(writers[:, :seen].flatten(2), read.mT)
            if layer in along:
                rows[:, :seen, place] -= torch.bmm(along[layer][:, :seen], shrink[layer].flatten(1, 2))
            if whole:
                # The first chunk comes by every layer: the same reader gradient serves the check.
                totals[:, place] = _total(delta.attention_inputs[layer], read, hats.get(layer), shrink.get(layer))
    scores *= torch.from_numpy(spec.edge_mask).to(scores)
    return Contracted(scores, totals)


def _chunks(spec: GraphSpec, delta: Delta, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    per_layer = spec.writers_per_layer * delta.state.nbytes
    count = max(1, chunk_bytes // per_layer)
    for first in range(spec.seam, spec.layers, count):
        yield first, min(first + count, spec.layers)


def _along(writers: Tensor, hats: dict[int, Tensor]) -> dict[int, Tensor]:
    """delta_u . xhat at every point of the path, per layer (batch, writers, time * points): one product per position."""
    if not hats:
        return {}
    points = next(iter(hats.values())).shape[2]
    batch, count, time, _ = writers.shape
    out = writers.new_empty(len(hats), batch, count, time, points)
    for position in range(time):
        read = torch.cat([hat[:, position] for hat in hats.values()], 1).to(writers.dtype)
        product = torch.bmm(writers[:, :, position], read.mT)
        out[:, :, :, position] = product.unflatten(-1, (len(hats), points)).permute(2, 0, 1, 3)
    return {layer: out[index].flatten(2) for index, layer in enumerate(hats)}


def _total(change: Tensor, read: Tensor, hats: Tensor | None, shrink: Tensor | None) -> Float[Tensor, "batch readers"]:
    """Score of everything that an attention reads, from the change of its input."""
    total = torch.bmm(read, change.flatten(1)[..., None])[..., 0]
    if hats is None or shrink is None:
        return total
    along = torch.einsum("btd,btkd->btk", change, hats.to(change.dtype))
    return total - torch.einsum("btk,btkv->bv", along, shrink)
