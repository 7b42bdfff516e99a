"""Logit lens: what the vocabulary says of the residual stream by layer, and of what single components write.

A state is read as the model reads its last one: final norm, then the output matrix (nostalgebraist 2020). A component's
output is read the same way, on its own: normed, so that its size does not count. A distribution on few
tokens is *specialised*: 1 - entropy / log V is 1 for one token and 0 for the uniform one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dihal.circuits.adapters import Adapter, open_model
from dihal.circuits.capture import Capture, Record
from dihal.circuits.graph import GraphSpec
from dihal.circuits.metrics import answer_rank
from dihal.circuits.types import PairBatch
from dihal.errors import UsageError

__all__ = ["Lens", "logit_lens", "project"]


@dataclass(frozen=True, kw_only=True)
class Lens:
    """What the lens shows, over the targets of clean prompts."""

    layers: tuple[int, ...]
    """The state entering each block, then L: the last state."""
    rank: Float[np.ndarray, " layers"]
    """Median number of tokens more likely than the best answer."""
    probability: Float[np.ndarray, " layers"]
    """Mean probability of the answers together."""
    entropy: Float[np.ndarray, " layers"]
    """Mean entropy, in nats."""
    components: tuple[str, ...]
    component_entropy: Float[np.ndarray, " components"]
    """Median entropy of the projected output, in nats."""
    component_top: Float[np.ndarray, " components"]
    """Median probability of its most likely token."""
    vocabulary: int

    @property
    def specialisation(self) -> Float[np.ndarray, " components"]:
        """1 - entropy / log V per component."""
        return 1.0 - self.component_entropy / math.log(self.vocabulary)

    def record(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "layers": list(self.layers),
            "rank": self.rank.tolist(),
            "probability": self.probability.tolist(),
            "entropy": self.entropy.tolist(),
            "components": list(self.components),
            "component_entropy": self.component_entropy.tolist(),
            "component_top": self.component_top.tolist(),
            "specialisation": self.specialisation.tolist(),
            "median_specialisation": float(np.median(self.specialisation)) if self.components else None,
            "vocabulary": self.vocabulary,
        }


@torch.no_grad()
def project(adapter: Adapter, states: Float[Tensor, "*n dim"]) -> Float[Tensor, "*n vocab"]:
    """Final norm and output matrix, in the working type."""
    # The module's forward alone: hooks of a capture belong to the model's own call.
    normed = adapter.norm.forward(states.to(adapter.dtype))
    return adapter.head(normed).to(adapter.work_dtype)


def _entropy(logits: Float[Tensor, "*n vocab"]) -> Float[Tensor, "*n"]:
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def _at_targets(values: Float[Tensor, "batch time dim"], batch: PairBatch) -> Float[Tensor, "batch targets dim"]:
    rows = torch.arange(len(batch), device=values.device)[:, None]
    return values[rows, batch.positions]


def _written(
    adapter: Adapter, spec: GraphSpec, record: Record, state: Tensor, name: str, batch: PairBatch
) -> Float[Tensor, "batch targets dim"]:
    """What a component writes at the targets."""
    writer = spec.writer_index(name)
    if writer == 0:
        return _at_targets(state, batch)
    layer = int(spec.layer_of_writer[writer])
    head = writer - spec.writer_at(layer)
    if head == spec.heads:
        return _at_targets(record.mlps[layer], batch)
    narrow = _at_targets(record.heads[layer], batch).unflatten(-1, (spec.heads, -1))[..., head, :]
    return narrow.to(adapter.work_dtype) @ adapter.output_weight(layer)[head].to(adapter.work_dtype)


def logit_lens(
    model: Any,
    pairs: Sequence[PairBatch],
    components: Sequence[str] = (),
    *,
    spec: GraphSpec | None = None,
    noise_seed: int = 0,
) -> Lens:
    """Look at clean runs through the output matrix.

    Args:
        model: anything `open_model` takes.
        pairs: the prompts; read at their targets of weight above 0.
        components: names of writers whose output is projected.
        spec: the graph they belong to; None: the model's own.
        noise_seed: key of a hybrid's noise.

    Raises:
        UsageError: no pairs, or a component that is not in the graph.
    """
    adapter = open_model(model)
    spec = adapter.spec() if spec is None else spec
    if not pairs:
        raise UsageError("no pairs of prompts to look at. Ask the task for more.")
    layers = tuple(range(spec.seam, spec.layers + 1))
    by_layer: dict[str, list[Tensor]] = {"rank": [], "probability": [], "entropy": []}
    entropies, tops = [], []
    vocabulary = 0
    with adapter.session():
        for batch in (whole.to(adapter.device) for whole in pairs):
            used = batch.weights > 0
            keys = {"sample_ids": batch.ids, "noise_seed": noise_seed}
            state = adapter.states(batch.clean, spec.seam, attention=batch.attention, **keys)
            with Capture(adapter, spec.seam) as capture, torch.no_grad():
                record = capture.start(writers=True, readers=False)
                adapter.logits(state, spec.seam, batch.positions, attention=batch.attention)
            stream = {**record.attention_inputs, spec.layers: record.inputs[spec.layers]}
            rows: dict[str, list[Tensor]] = {name: [] for name in by_layer}
            for layer in layers:
                logits = project(adapter, _at_targets(stream[layer], batch))
                vocabulary = logits.shape[-1]
                chance = logits.softmax(-1).gather(-1, batch.answers.clamp_min(0)) * (batch.answers >= 0)
                rows["rank"].append(answer_rank(logits, batch)[used].double())
                rows["probability"].append(chance.sum(-1)[used].double())
                rows["entropy"].append(_entropy(logits)[used].double())
            for name, values in rows.items():
                by_layer[name].append(torch.stack(values).cpu())
            if components:
                found = [project(adapter, _written(adapter, spec, record, state, n, batch))[used] for n in components]
                entropies.append(torch.stack([_entropy(logits) for logits in found]).double().cpu())
                tops.append(torch.stack([logits.softmax(-1).amax(-1) for logits in found]).double().cpu())
    joined = {name: torch.cat(values, 1) for name, values in by_layer.items()}
    none = np.zeros(0)
    return Lens(
        layers=layers,
        rank=joined["rank"].quantile(0.5, 1).numpy(),
        probability=joined["probability"].mean(1).numpy(),
        entropy=joined["entropy"].mean(1).numpy(),
        components=tuple(components),
        component_entropy=torch.cat(entropies, 1).quantile(0.5, 1).numpy() if components else none,
        component_top=torch.cat(tops, 1).quantile(0.5, 1).numpy() if components else none,
        vocabulary=vocabulary,
    )
