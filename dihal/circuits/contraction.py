"""From captured tensors to edge scores.

Let x be the residual stream before a norm, xhat = C x r its normalised form (C centres for a LayerNorm, is
the identity for an RMSNorm), r = 1 / sqrt(mean((C x)^2) + eps), gamma the norm's weight, W the
matrix of the projection and g the gradient of the metric at the projection's output. The gradient a reader v
has at a private copy of the stream is

    G_v = C gamma W_v^T (r g_v) - (r / d) (g_v . q_v) xhat,

q_v the projection's output without its bias (and without the share of the norm's bias). The score of edge (u, v)
is the sum over positions of delta_u . G_v, averaged over the points of the path. Only r g_v (as wide as a head),
g_v . q_v (a number) and xhat differ from point to point: the sum over points is taken of those, G_v is made of the
sums once per batch, and multiplied with the writers, whose number is large (factored). The generic form
pulls every reader's gradient through the norm itself with ``torch.func.vjp``; it is the reference.

Layouts: writers (batch, writers, time, dim), so that position and width contract in one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dihal.circuits.adapters import Adapter
from dihal.circuits.capture import Record
from dihal.circuits.graph import GraphSpec
from dihal.circuits.norms import Norm

__all__ = ["Contracted", "Contraction", "Delta", "Gathered", "Readers", "contract", "fast_products", "product_type"]

Contraction = Literal["factored", "generic"]


@contextmanager
def fast_products(dtype: torch.dtype) -> Iterator[None]:
    """Context in which fp32 products on a GPU are made in TF32, if the weights are in bf16 or fp16.

    The captured activations and gradients of such a model carry 8 or 11 significant bits; TF32 reads its factors with
    11 and sums in fp32, so that it adds less than the runs themselves have lost, at many times the speed of fp32.
    Models in fp32 and fp64 are contracted exactly. The setting is torch's own and global: it is put back in any case.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "tf32"
    try:
        yield
    finally:
        setting.fp32_precision = before


def product_type(adapter: Adapter) -> torch.dtype:
    """Type in which writers and readers are multiplied and summed over positions and width.

    The sum of an edge has thousands of terms that cancel. Some GPUs multiply in fp64 as fast as in fp32, so that for a
    model in fp32 the sum costs no more when it is exact; elsewhere, and for rougher models, the working type.
    """
    device = adapter.device
    exact = device.type == "cuda" and torch.cuda.get_device_capability(device) in _FULL_RATE
    return torch.float64 if exact and adapter.dtype == torch.float32 else adapter.work_dtype


_FULL_RATE = ((8, 0), (9, 0))
"""Compute capabilities with matrix units for fp64 of the speed of fp32: A100, H100 and H200."""


@dataclass
class Delta:
    """Corrupted minus clean in the working type: what each component writes, and what each site reads."""

    state: Float[Tensor, "batch time dim"]
    heads: Float[Tensor, "layers batch time inner"]
    """Before the output projection."""
    mlps: Float[Tensor, "layers batch time dim"] | None
    attention_inputs: Float[Tensor, "layers batch time dim"]
    inputs: Float[Tensor, "sites batch time dim"]

    @classmethod
    def empty(cls, adapter: Adapter, spec: GraphSpec, rows: int, time: int, take: Callable[..., Tensor]) -> Delta:
        """Room for a batch; ``take`` gives tensors by shape and type."""
        dtype, dim = adapter.work_dtype, adapter.width

        def room(sites: int, width: int) -> Tensor:
            return take(sites, rows, time, width, dtype=dtype)

        return cls(
            take(rows, time, dim, dtype=dtype),
            room(spec.depth, spec.heads * adapter.head_dim),
            room(spec.depth, dim) if spec.mlps else None,
            room(spec.depth, dim),
            room(spec.depth * spec.mlps + 1, dim),
        )

    def add(self, record: Record, live: Float[Tensor, " 1"], *, first: bool) -> None:
        """Take in the corrupted run (first) or subtract the clean one, ``live`` (1 or 0) times; the record is emptied."""
        for name in ("heads", "mlps", "attention_inputs", "inputs"):
            found, own = getattr(record, name), getattr(self, name)
            if own is not None:
                if first:
                    own.copy_(_stack(found))
                else:
                    own.addcmul_(_stack(found).to(own.dtype), live, value=-1)
                found.clear()

    def writers(
        self, adapter: Adapter, spec: GraphSpec, first: int, last: int, dtype: torch.dtype
    ) -> Float[Tensor, "batch writers time dim"]:
        """What the blocks ``first`` .. ``last - 1`` write, preceded by the state if ``first`` is the seam."""
        batch, time, dim = self.state.shape
        start, blocks = int(first == spec.seam), slice(first - spec.seam, last - spec.seam)
        out = self.state.new_empty(batch, start + (last - first) * spec.writers_per_layer, time, dim, dtype=dtype)
        if start:
            out[:, 0] = self.state
        if self.mlps is not None:
            out[:, start + spec.heads :: spec.writers_per_layer] = self.mlps[blocks].transpose(0, 1)
        heads = self.heads[blocks].unflatten(-1, (spec.heads, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        for index, narrow in enumerate(heads):
            written = torch.bmm(narrow, adapter.output_weight(first + index).to(narrow.dtype))
            place = start + index * spec.writers_per_layer
            out[:, place : place + spec.heads] = written.view(spec.heads, batch, time, dim).transpose(0, 1)
        return out


class Readers:
    """What the model's weights say about its readers: read once, used by every batch.

    Args:
        adapter: the model, in the scope in which it is run.
        spec: the graph.
    """

    def __init__(self, adapter: Adapter, spec: GraphSpec) -> None:
        self.adapter = adapter
        self.spec = spec
        self.dtype = adapter.work_dtype
        layers, layout = range(spec.seam, spec.layers), adapter.layout
        self.attention_norms = [adapter.part(layer, layout.attention_norm) for layer in layers]
        self.norms = [adapter.part(layer, layout.mlp_norm) for layer in layers if spec.mlps] + [adapter.norm]
        self.attention = Norm.of(self.attention_norms, layout, self.dtype)
        self.wide = Norm.of(self.norms, layout, self.dtype)
        self.offsets = self._offsets(layers)
        self.mask: Bool[Tensor, "writers readers"] = torch.from_numpy(spec.edge_mask).to(adapter.device)

    def weight(self, layer: int) -> Float[Tensor, "readers head_dim dim"]:
        """Per reader of an attention, its rows of the projections."""
        weight = self.adapter.projections(layer, self.spec.kv).weight
        return weight.to(self.dtype).unflatten(0, (-1, self.adapter.head_dim))

    def pulled(self, layer: int) -> Float[Tensor, "readers head_dim dim"]:
        """The same with the linear part of the norm's pullback."""
        return self.attention.at(layer - self.spec.seam).pull(self.weight(layer))

    def _offsets(self, layers: Sequence[int]) -> Float[Tensor, "layers 1 1 channels"] | None:
        # What the projections give for xhat = 0: their bias, plus their matrix times the norm's bias.
        found = []
        for site, layer in enumerate(layers):
            weight, bias = self.adapter.projections(layer, self.spec.kv)
            shift = self.attention.at(site).bias
            if bias is None and shift is None:
                return None
            offset = weight.new_zeros(len(weight), dtype=self.dtype) if bias is None else bias.to(self.dtype)
            found.append(offset if shift is None else offset + weight.to(self.dtype) @ shift)
        return torch.stack(found)[:, None, None]


class Gathered:
    """Reader gradients summed over the points of a path, in the factored form.

    Layers are stacked before anything is computed: many small tensors cost a GPU more to start on than to compute.

    Args:
        readers: of the graph.
        points: number of points to come.
        rows, time: shape of the batch.
        take: gives tensors by shape and type.
    """

    def __init__(self, readers: Readers, points: int, rows: int, time: int, take: Callable[..., Tensor]) -> None:
        self.readers = readers
        adapter, spec, dtype = readers.adapter, readers.spec, readers.dtype
        count, dim = spec.heads + 2 * spec.kv_readers, adapter.width
        self.heads = take(spec.depth, rows, time, count * adapter.head_dim, dtype=dtype)
        """Sum of weight r g, (layers, batch, time, readers * head_dim)."""
        self.wide = take(len(readers.norms), rows, time, dim, dtype=dtype)
        """Gradients of MLPs and logits themselves, (sites, batch, time, dim)."""
        self.hats: Tensor | None = None
        """xhat of every point in the model's type, (layers, batch, time, points, dim)."""
        self.shrink: Tensor | None = None
        """weight (r / d) (g . q) of every point, (layers, batch, time, readers, points)."""
        if readers.attention.gain is not None:
            self.hats = take(spec.depth, rows, time, points, dim, dtype=adapter.dtype)
            self.shrink = take(spec.depth, rows, time, count, points, dtype=dtype)

    def clear(self) -> None:
        """Begin with another batch."""
        self.heads.zero_()
        self.wide.zero_()

    def add(
        self, record: Record, gradients: Record, weight: float, step: Int[Tensor, " 1"], live: Float[Tensor, " 1"]
    ) -> None:
        """Add one point of the path, the ``step``-th, ``live`` (1 or 0) times; both records are emptied."""
        self._add_wide(record, gradients, weight, live)
        self._add_attention(record, gradients, weight, step, live)

    @torch.no_grad()
    def _add_wide(self, record: Record, gradients: Record, weight: float, live: Tensor) -> None:
        norm, dtype = self.readers.wide, self.readers.dtype
        hat, scale = norm.normalise(_stack(record.inputs).to(dtype))
        pulled = norm.pull_back(_stack(gradients.normed).to(dtype), hat, scale * weight)
        gradients.normed.clear()
        self.wide.addcmul_(pulled, live)

    @torch.no_grad()
    def _add_attention(self, record: Record, gradients: Record, weight: float, step: Tensor, live: Tensor) -> None:
        readers, size = self.readers, self.readers.adapter.head_dim
        hat, scale = readers.attention.normalise(_stack(record.attention_inputs).to(readers.dtype))
        scaled = _join(gradients.projected).to(readers.dtype).mul_(scale * weight)
        gradients.projected.clear()
        if self.hats is not None and self.shrink is not None:
            output = _join(record.projected)
            record.projected.clear()
            output = output if readers.offsets is None else output.to(readers.dtype) - readers.offsets
            along = (scaled * output).unflatten(-1, (-1, size)).sum(-1).div_(hat.shape[-1])
            del output
            # By an index on the device: a number of the host would be the same in every replay of a graph.
            self.hats.index_copy_(3, step, hat.to(self.hats.dtype).unsqueeze(3))
            self.shrink.index_copy_(4, step, along.unsqueeze(4))
        self.heads.addcmul_(scaled, live)

    def attention(self, layer: int) -> Float[Tensor, "batch readers time dim"]:
        """Reader gradients of an attention."""
        site, adapter = layer - self.readers.spec.seam, self.readers.adapter
        narrow = self.heads[site].unflatten(-1, (-1, adapter.head_dim))
        batch, time, count, _ = narrow.shape
        wide = torch.bmm(narrow.permute(2, 0, 1, 3).flatten(1, 2), self.readers.pulled(layer))
        wide = wide.view(count, batch, time, -1).transpose(0, 1)
        if self.hats is None or self.shrink is None:
            return wide.contiguous()
        hats = self.hats[site].flatten(0, 1).to(wide.dtype)
        along = torch.bmm(self.shrink[site].flatten(0, 1), hats).view(batch, time, count, -1)
        out = wide.new_empty(wide.shape)
        return torch.sub(wide, along.transpose(1, 2), out=out)


class Generic(Gathered):
    """The same with every reader's gradient pulled through the norm itself; memory grows with readers. The reference."""

    def __init__(self, readers: Readers, points: int, rows: int, time: int, take: Callable[..., Tensor]) -> None:
        super().__init__(readers, points, rows, time, take)
        self.full: dict[int, Tensor] = {}

    def clear(self) -> None:
        """Begin with another batch."""
        super().clear()
        self.full.clear()

    @torch.no_grad()
    def _add_wide(self, record: Record, gradients: Record, weight: float, live: Tensor) -> None:
        places = zip(self.readers.norms, record.inputs.values(), gradients.normed.values(), strict=True)
        self.wide.add_(weight * torch.stack([_vjp(module, x, g.to(self.readers.dtype)) for module, x, g in places]))

    @torch.no_grad()
    def _add_attention(self, record: Record, gradients: Record, weight: float, step: Tensor, live: Tensor) -> None:
        readers, size = self.readers, self.readers.adapter.head_dim
        for module, (layer, x) in zip(readers.attention_norms, record.attention_inputs.items(), strict=True):
            gradient = torch.cat(gradients.projected[layer], -1).to(readers.dtype).unflatten(-1, (-1, size)) * weight
            pulled = _vjp(module, x, torch.einsum("btvh,vhd->vbtd", gradient, readers.weight(layer)))
            self.full[layer] = pulled if layer not in self.full else self.full[layer] + pulled

    def attention(self, layer: int) -> Float[Tensor, "batch readers time dim"]:
        """Reader gradients of an attention."""
        return self.full[layer].transpose(0, 1)


@torch.no_grad()
def _stack(by_layer: dict[int, Tensor]) -> Tensor:
    # Blocks run, and so are recorded, in their order.
    return torch.stack(list(by_layer.values()))


@torch.no_grad()
def _join(projected: dict[int, tuple[Tensor, ...]]) -> Tensor:
    """(layers, batch, time, channels): queries, keys and values side by side."""
    slots = [torch.stack(slot) for slot in zip(*projected.values(), strict=True)]
    return slots[0] if len(slots) == 1 else torch.cat(slots, -1)


def _vjp(module: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
    """Pull gradients, with any leading axes, through a norm; its forward alone, without hooks."""
    _, pullback = torch.func.vjp(module.forward, x)
    pull = lambda item: pullback(item.to(x.dtype))[0]  # noqa: E731
    return (pull(gradient) if gradient.ndim == x.ndim else torch.func.vmap(pull)(gradient)).to(gradient.dtype)


class Contracted(NamedTuple):
    """Scores of every edge per prompt, and per reader the score of all its writers together, found independently."""

    scores: Float[Tensor, "batch writers readers"]
    totals: Float[Tensor, "batch readers"]


def contract(delta: Delta, gathered: Gathered, chunk_bytes: int, dtype: torch.dtype | None = None) -> Contracted:
    """Scores of a batch.

    Args:
        delta: what is written.
        gathered: what is read.
        chunk_bytes: size up to which writers are held at once, in ``dtype`` (one block's at least).
        dtype: of products and scores; None: the working type.
    """
    readers, spec = gathered.readers, gathered.readers.spec
    dtype = delta.state.dtype if dtype is None else dtype
    scores = delta.state.new_zeros(len(delta.state), spec.n_writers, spec.n_readers, dtype=dtype)
    totals = scores.new_empty(len(scores), spec.n_readers)
    # Filled in place: transposed and then converted, it would be there twice.
    gradients = gathered.wide.transpose(0, 1)
    wide = scores.new_empty(gradients.shape).copy_(gradients).flatten(2)
    _place(totals, torch.stack([(x.flatten(1) * g).sum(-1) for x, g in zip(delta.inputs, wide.unbind(1))], -1), spec)
    for first, last in _chunks(spec, delta, chunk_bytes, dtype):
        writers = delta.writers(readers.adapter, spec, first, last, dtype).flatten(2)
        start = 0 if first == spec.seam else spec.writer_at(first)
        rows = scores[:, start : start + writers.shape[1]]
        _place(rows, torch.bmm(writers, wide.mT), spec)
        for layer in range(first, spec.layers):
            # Writers of this chunk that the block sees: all of earlier blocks.
            seen = min(spec.writer_at(layer) - start, writers.shape[1])
            whole = first == spec.seam
            if seen <= 0 and not whole:
                continue
            place = slice(spec.reader_at(layer), spec.reader_at(layer) + spec.heads + 2 * spec.kv_readers)
            read = gathered.attention(layer).flatten(2).to(dtype)
            rows[:, :seen, place] = torch.bmm(writers[:, :seen], read.mT)
            if whole:
                # The first chunk comes by every layer: the same reader gradient serves the check.
                change = delta.attention_inputs[layer - spec.seam].flatten(1)[..., None].to(dtype)
                totals[:, place] = torch.bmm(read, change)[..., 0]
            del read
        # The next chunk is not to be made beside this one.
        del writers
    return Contracted(scores.mul_(readers.mask), totals)


def _place(table: Tensor, values: Tensor, spec: GraphSpec) -> None:
    """Columns of the MLPs and the logits."""
    if spec.mlps:
        table[..., spec.readers_per_layer - 1 : -1 : spec.readers_per_layer] = values[..., :-1]
    table[..., -1] = values[..., -1]


def _chunks(spec: GraphSpec, delta: Delta, chunk_bytes: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    per_layer = spec.writers_per_layer * delta.state.numel() * dtype.itemsize
    count = max(1, chunk_bytes // per_layer)
    for first in range(spec.seam, spec.layers, count):
        yield first, min(first + count, spec.layers)
