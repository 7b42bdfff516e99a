"""One face for every model whose circuits are looked at: run it from a state, name its parts.

A run always starts from a state h^s, the embeddings h^0 being the case s = 0, so that a backbone,
its hybrid and a perturbed backbone differ in one thing only: where that state comes from. Where the
parts of a family are is data (``dihal.backbone.layout``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dihal.backbone import Backbone
from dihal.backbone.layout import Layout, find_layout
from dihal.backbone.views import prefix_view, suffix_view
from dihal.circuits.graph import GraphSpec
from dihal.circuits.linear import LinearParts, effective_linear
from dihal.circuits.types import Attention
from dihal.errors import UsageError
from dihal.types import State, TokenIds

__all__ = ["Adapter", "SeamSource", "open_model"]

KeyValue = Literal["grouped", "query"]

SeamSource = Callable[[TokenIds, Int[Tensor, " batch"], int, Literal["clean", "corrupted"]], State]
"""Token ids, sample ids, noise seed and which run of a pair it is, to the state at the seam."""


class Adapter:
    """A causal LM as a graph. Made by `open_model`.

    Args:
        model: the language model; never copied.
        layout: where its parts are.
        name: for messages and files.
        seam: first block, where ``source`` gives the state that enters it.
        lower: name of what stands for everything below the seam.
        source: what gives the state at the seam; None: the model's own embeddings and blocks.
        scope: context in which the blocks are to run and their weights to be read (adapters of peft).

    Raises:
        UsageError: a model whose residual stream has another shape than the graph says.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        *,
        name: str = "model",
        seam: int = 0,
        lower: str = "input",
        source: SeamSource | None = None,
        scope: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.model = model
        self.layout = layout
        self.name = name
        self.seam = seam
        self.lower = lower
        self.source = source
        self._scope = scope
        config: Any = model.config
        require_supported(name, layout, config)
        self.decoder = model.get_submodule(layout.decoder)
        self.blocks = list(self.decoder.get_submodule(layout.blocks))
        self.norm = self.decoder.get_submodule(layout.norm)
        self.head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or self.heads)
        output = effective_linear(self.part(0, layout.attention_output), layout.transposed, name)
        self.width, inner = output.weight.shape
        self.head_dim = inner // self.heads

    @property
    def layers(self) -> int:
        """L."""
        return len(self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.head.weight.dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device  # type: ignore[return-value]

    @property
    def work_dtype(self) -> torch.dtype:
        """Type in which scores are contracted: float64 for a float64 model, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def part(self, layer: int, name: str) -> nn.Module:
        """A part of a block by its dotted name."""
        return self.blocks[layer].get_submodule(name)

    def spec(self, *, kv: KeyValue = "grouped", seam: int | None = None) -> GraphSpec:
        """The graph above a seam (default: the lowest one).

        Raises:
            UsageError: a seam that this model does not have, or per-query readers where they cannot be made.
        """
        seam = self.seam if seam is None else seam
        self.require_seam(seam)
        if kv == "query" and self.heads != self.kv_heads and len(self.layout.projections) == 1:
            raise UsageError(
                f"{self.name} computes queries, keys and values in one layer: key and value readers exist once per "
                "key-value head only. Use kv=grouped."
            )
        lower = self.lower if seam == self.seam else "lower"
        shape = {"layers": self.layers, "heads": self.heads, "kv_heads": self.kv_heads}
        return GraphSpec(**shape, kv=kv, mlps=self.layout.mlp is not None, seam=seam, lower=lower)

    def require_seam(self, seam: int) -> None:
        """Refuse a seam that cannot be run.

        Raises:
            UsageError: out of range, or another one than where a given source enters.
        """
        if self.source is not None and seam != self.seam:
            raise UsageError(f"{self.name} is entered at layer {self.seam}; the seam cannot be {seam}.")
        if not 0 <= seam < self.layers:
            raise UsageError(f"seam {seam} is out of range: {self.name} has layers 0 to {self.layers - 1}.")

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Scope of every run: the model's own reading scope, parameters frozen and restored afterwards.

        Raises:
            UsageError: the model is in training mode.
        """
        if self.model.training:
            raise UsageError(f"{self.name} is in training mode, its dropout would be on. Call model.eval() first.")
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            with self._scope():
                yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    @contextlib.contextmanager
    def readers(self, kv: KeyValue) -> Iterator[None]:
        """Scope in which keys and values exist once per query head, if asked for: each head then reads a copy of its own."""
        repeat = self.heads // self.kv_heads
        if kv == "grouped" or repeat == 1:
            yield
            return
        handles, changed = [], []

        def expand(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            split = output.unflatten(-1, (self.kv_heads, self.head_dim))
            return split.repeat_interleave(repeat, -2).flatten(-2)

        try:
            for layer in range(self.layers):
                attention = self.part(layer, self.layout.attention_output.rpartition(".")[0])
                # The library repeats keys and values by this number; they are repeated already.
                changed.append((attention, attention.num_key_value_groups))
                attention.num_key_value_groups = 1  # type: ignore[assignment]
                for name in self.layout.projections[1:]:
                    handles.append(self.part(layer, name).register_forward_hook(expand))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for attention, groups in changed:
                attention.num_key_value_groups = groups

    def _mask(self, attention: Attention, batch: int, time: int) -> Tensor | None:
        # Without a mask the library is causal. An additive mask of its own shape is passed through as it is.
        if attention == "causal":
            return None
        return torch.zeros(batch, 1, time, time, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def states(
        self,
        input_ids: TokenIds,
        seam: int,
        *,
        sample_ids: Int[Tensor, " batch"],
        noise_seed: int = 0,
        attention: Attention = "causal",
        role: Literal["clean", "corrupted"] = "clean",
    ) -> State:
        """h^seam of the tokens; random only where the source is, keyed by (noise seed, sample id).

        Raises:
            UsageError: a seam that this model does not have, or full attention with a given source.
        """
        self.require_seam(seam)
        if self.source is not None:
            if attention != "causal":
                raise UsageError(f"{self.name} is causal; a task with full attention needs a masked diffusion model.")
            return self.source(input_ids, sample_ids, noise_seed, role)
        view = prefix_view(self.decoder, self.layout, seam)
        mask = self._mask(attention, *input_ids.shape)
        return view(input_ids=input_ids, attention_mask=mask, use_cache=False)[0]

    def features(
        self, state: State, seam: int, *, attention: Attention = "causal", mask: Tensor | None = None
    ) -> State:
        """Blocks from the seam on, and the final norm; ``mask`` (additive, batch x 1 x time x time) goes before ``attention``."""
        view = suffix_view(self.decoder, self.layout, seam, state)
        mask = self._mask(attention, state.shape[0], state.shape[1]) if mask is None else mask
        return view(inputs_embeds=state.detach(), attention_mask=mask, use_cache=False)[0]

    def logits(
        self,
        state: State,
        seam: int,
        positions: Int[Tensor, "batch targets"],
        *,
        attention: Attention = "causal",
        mask: Tensor | None = None,
    ) -> Float[Tensor, "batch targets vocab"]:
        """Logits at the given positions, and only there; ``mask`` as in `features`."""
        features = self.features(state, seam, attention=attention, mask=mask)
        rows = torch.arange(len(features), device=features.device)[:, None]
        return self.head(features[rows, positions])

    def projections(self, layer: int, kv: KeyValue) -> LinearParts:
        """Matrix and bias of queries, keys and values, one after the other; rows repeated for per-query readers."""
        parts = [
            effective_linear(self.part(layer, n), self.layout.transposed, self.name) for n in self.layout.projections
        ]
        weight = torch.cat([part.weight for part in parts])
        bias = None
        if any(part.bias is not None for part in parts):
            bias = torch.cat(
                [part.bias if part.bias is not None else part.weight.new_zeros(len(part.weight)) for part in parts]
            )
        expected = (self.heads + 2 * self.kv_heads) * self.head_dim
        if weight.shape[0] != expected:
            raise UsageError(
                f"{self.name}: queries, keys and values have {weight.shape[0]} channels, {expected} were expected from "
                "its numbers of heads (a gate among the queries?). This attention is not supported."
            )
        repeat = self.heads // self.kv_heads
        if kv == "query" and repeat > 1:
            rows = torch.arange(expected, device=weight.device).view(-1, self.head_dim)
            index = torch.cat([rows[: self.heads], rows[self.heads :].repeat_interleave(repeat, 0)]).flatten()
            weight, bias = weight[index], None if bias is None else bias[index]
        return LinearParts(weight, bias)

    def output_weight(self, layer: int) -> Float[Tensor, "heads head_dim dim"]:
        """Per head the map from its attention output to the residual stream."""
        weight = effective_linear(
            self.part(layer, self.layout.attention_output), self.layout.transposed, self.name
        ).weight
        return weight.T.unflatten(0, (self.heads, self.head_dim))


def require_supported(name: str, layout: Layout, config: Any) -> None:
    """Refuse blocks whose heads and MLPs do not simply add to one stream, with the reason.

    Raises:
        UsageError: post-norm or parallel blocks, mixed projections, quantised weights.
    """
    family = getattr(config, "model_type", "this model")
    reason = None
    if layout.post_norm:
        reason = (
            "it normalises outputs of attention and MLP before adding them (post-norm), so that heads do not add up"
        )
    elif layout.parallel is not None and getattr(config, layout.parallel, False):
        reason = f"attention and MLP of a block run in parallel ({layout.parallel})"
    elif layout.interleaved:
        reason = "one layer mixes queries, keys and values head by head, and no splitter for it exists"
    elif getattr(config, "quantization_config", None) is not None:
        reason = "its weights are quantised and cannot be read as matrices; load it in bfloat16 or float32"
    if reason is not None:
        raise UsageError(
            f"circuits of {name} ({family}) are not supported: {reason}. "
            "Supported: Llama, Mistral, Qwen2, Qwen3, Phi-3, GPT-2 and models of their block structure."
        )


def open_model(model: Any, *, name: str | None = None, steps: int | None = None) -> Adapter:
    """The adapter of a live Hugging Face causal LM, a `Backbone`, a hybrid, or an adapter itself.

    A live model is not moved or changed. Of a hybrid, the lower writer is the bridge.

    Args:
        model: what to open.
        name: for messages and files; default: the model's own.
        steps: sampling steps of a hybrid's bridge; None: its own.

    Raises:
        UsageError: a family or block structure that is not supported.
    """
    if isinstance(model, Adapter):
        return model
    if isinstance(model, Backbone):
        return Adapter(model.model, model.layout, name=name or model.reference.id)
    if hasattr(model, "bridge") and hasattr(model, "backbone"):
        return _open_hybrid(model, name, steps)
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise UsageError(f"{type(model).__name__} is not a Hugging Face causal LM, a backbone or a hybrid.")
    _, layout = find_layout(config)
    return Adapter(model, layout, name=name or getattr(config, "_name_or_path", "") or config.model_type)


def _open_hybrid(hybrid: Any, name: str | None, steps: int | None) -> Adapter:
    backbone, bridge = hybrid.backbone, hybrid.bridge

    def source(input_ids: Tensor, sample_ids: Tensor, noise_seed: int, _: str) -> Tensor:
        # The same key for both runs of a pair: common random numbers.
        return bridge.states(backbone, input_ids, steps=steps, seed=noise_seed, sample_ids=sample_ids)

    return Adapter(
        backbone.model,
        backbone.layout,
        name=name or f"hybrid of {backbone.reference.id} at split {hybrid.split}",
        seam=hybrid.split,
        lower="bridge",
        source=source,
        scope=bridge.reading,
    )
