"""How concentrated a task is on MLP neurons: localised or distributed, without judging what a neuron means.

A neuron's attribution is the difference of its activation between corrupted and clean run times the gradient of
the metric there, summed over positions (attribution patching at the clean run), averaged over prompts. What is
reported of a layer depends only on the sizes of these numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dihal.circuits.adapters import Adapter, open_model
from dihal.circuits.metrics import logit_difference
from dihal.circuits.types import Metric, PairBatch
from dihal.errors import UsageError

__all__ = ["Concentration", "concentration", "gini", "neuron_attribution", "participation_ratio", "share_count"]

Magnitudes = Float[np.ndarray, " neurons"]


@dataclass(frozen=True, kw_only=True)
class Concentration:
    """How few neurons carry a layer's attribution."""

    neurons: int
    gini: float
    """0: all equal; towards 1: one neuron."""
    participation: float
    """Participation ratio: (sum |a|)^2 / sum a^2, the number of neurons if they were equal."""
    share_80: int
    """Neurons, largest first, that hold 80 % of the mass."""
    mass: float
    """Sum of |a|, in units of the metric."""

    def record(self) -> dict[str, Any]:
        """Plain JSON data."""
        return dict(vars(self))


def gini(values: Magnitudes) -> float:
    """Gini coefficient of magnitudes; NaN where all are zero."""
    ordered = np.sort(np.abs(values.astype(np.float64)))
    if ordered.sum() == 0:
        return float("nan")
    n = len(ordered)
    return float(2 * (np.arange(1, n + 1) @ ordered) / (n * ordered.sum()) - (n + 1) / n)


def participation_ratio(values: Magnitudes) -> float:
    """(sum |a|)^2 / sum a^2: 1 for one neuron, n for n equal ones; NaN where all are zero."""
    sizes = np.abs(values.astype(np.float64))
    return float(sizes.sum() ** 2 / (sizes**2).sum()) if sizes.any() else float("nan")


def share_count(values: Magnitudes, share: float = 0.8) -> int:
    """How many of the largest hold that share of the mass (0 where there is none)."""
    ordered = np.sort(np.abs(values.astype(np.float64)))[::-1]
    if ordered.sum() == 0:
        return 0
    # A hair below: cumulative sums of equal numbers round either way.
    return int(np.searchsorted(np.cumsum(ordered), share * ordered.sum() * (1 - 1e-12)) + 1)


def concentration(values: Magnitudes) -> Concentration:
    """All of the above for one layer."""
    return Concentration(
        neurons=len(values),
        gini=gini(values),
        participation=participation_ratio(values),
        share_80=share_count(values),
        mass=float(np.abs(values.astype(np.float64)).sum()),
    )


def _hidden_layer(adapter: Adapter, layer: int) -> nn.Module:
    """The linear layer of an MLP that reads its hidden neurons: the last of its linear layers."""
    mlp = adapter.part(layer, adapter.layout.mlp) if adapter.layout.mlp is not None else None
    found = [] if mlp is None else [child for name, child in mlp.named_children() if name in adapter.layout.linears]
    if len(found) < 2:
        raise UsageError(f"{adapter.name} has no MLP with hidden neurons in block {layer}; leave out its neurons.")
    return found[-1]


def neuron_attribution(
    model: Any,
    pairs: Sequence[PairBatch],
    layers: Sequence[int] = (),
    *,
    metric: Metric = logit_difference,
    noise_seed: int = 0,
) -> dict[int, Magnitudes]:
    """Mean attribution of every MLP neuron, by layer; in units of the metric.

    Args:
        model: anything `open_model` takes.
        pairs: the prompts.
        layers: blocks; empty: all from the model's seam on.
        metric: of a run.
        noise_seed: key of a hybrid's noise.

    Raises:
        UsageError: no pairs, a layer out of range, or MLPs without hidden neurons.
    """
    adapter = open_model(model)
    chosen = list(layers) or list(range(adapter.seam, adapter.layers))
    if not pairs:
        raise UsageError("no pairs of prompts to attribute. Ask the task for more.")
    for layer in chosen:
        if not adapter.seam <= layer < adapter.layers:
            raise UsageError(f"layer {layer} is out of range: blocks {adapter.seam} to {adapter.layers - 1} are there.")
    sums: dict[int, Tensor] = {}
    count = 0
    with adapter.session():
        for batch in (whole.to(adapter.device) for whole in pairs):
            corrupted, _ = _hidden(adapter, batch, chosen, "corrupted", noise_seed)
            clean, logits = _hidden(adapter, batch, chosen, "clean", noise_seed)
            value = metric(logits.to(adapter.work_dtype), batch).sum()
            grads = torch.autograd.grad(value, [clean[layer] for layer in chosen])
            for layer, grad in zip(chosen, grads, strict=True):
                change = (corrupted[layer] - clean[layer]).detach().to(adapter.work_dtype)
                found = (change * grad.to(adapter.work_dtype)).sum((0, 1)).double()
                sums[layer] = sums.get(layer, torch.zeros_like(found)) + found
            count += len(batch)
    return {layer: (total / count).cpu().numpy() for layer, total in sums.items()}


def _hidden(
    adapter: Adapter, batch: PairBatch, layers: Sequence[int], role: str, noise_seed: int
) -> tuple[dict[int, Tensor], Tensor]:
    """Hidden activations of one run of a pair, part of its graph under `clean`, and its logits."""
    found: dict[int, Tensor] = {}
    handles = []

    def keep(layer: int) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found[layer] = arguments[0]

        return hook

    ids = batch.clean if role == "clean" else batch.corrupted
    state = adapter.states(
        ids, adapter.seam, sample_ids=batch.ids, noise_seed=noise_seed, attention=batch.attention, role=role
    )
    try:
        for layer in layers:
            handles.append(_hidden_layer(adapter, layer).register_forward_pre_hook(keep(layer)))
        with torch.set_grad_enabled(role == "clean"):
            # The state carries the graph: parameters are frozen.
            state = state.detach().requires_grad_(role == "clean")
            logits = adapter.logits(state, adapter.seam, batch.positions, attention=batch.attention)
    finally:
        for handle in handles:
            handle.remove()
    return found, logits
