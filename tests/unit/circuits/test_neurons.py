"""Concentration by hand, and attribution against what a neuron really does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dihal.circuits.neurons import concentration, gini, neuron_attribution, participation_ratio, share_count
from dihal.errors import UsageError
from tests.kit import tiny_backbone
from tests.unit.circuits.test_lens import _pairs


def test_one_neuron_and_equal_neurons() -> None:
    one, equal = np.zeros(50), -np.ones(50)
    one[7] = -3.0
    assert gini(one) == pytest.approx(1 - 1 / 50)
    assert gini(equal) == pytest.approx(0.0)
    assert participation_ratio(one) == pytest.approx(1.0)
    assert participation_ratio(equal) == pytest.approx(50.0)
    assert (share_count(one), share_count(equal)) == (1, 40)
    assert concentration(np.array([6.0, -3.0, 1.0, 0.0])).share_80 == 2
    assert concentration(np.array([6.0, -3.0, 1.0, 0.0])).mass == 10.0
    assert np.isnan(gini(np.zeros(3)))
    assert np.isnan(participation_ratio(np.zeros(3)))
    assert share_count(np.zeros(3)) == 0


def test_gini_is_the_mean_absolute_difference() -> None:
    values = np.random.default_rng(0).normal(size=40)
    sizes = np.abs(values)
    expected = np.abs(sizes[:, None] - sizes[None]).mean() / (2 * sizes.mean())
    assert gini(values) == pytest.approx(expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_attribution_is_the_first_order_effect(family: str) -> None:
    """Moving one neuron a small way from its clean to its corrupted value changes the metric as attributed."""
    backbone = tiny_backbone(family, dtype="float64")
    batch = _pairs(batches=1)[0]
    batch = type(batch)(**{**vars(batch), "weights": batch.weights.double()})
    found = neuron_attribution(backbone, [batch], [1, 3])
    name = {"gpt2": "c_proj"}.get(family, "down_proj")
    down = getattr(backbone.blocks[1].mlp, name)
    held: dict[str, torch.Tensor] = {}

    def run(ids: torch.Tensor, change: torch.Tensor | None = None) -> float:
        def hook(_, arguments):
            held["x"] = arguments[0]
            return None if change is None else (arguments[0] + change,)

        handle = down.register_forward_pre_hook(hook)
        with torch.no_grad():
            logits = backbone.model(ids).logits[torch.arange(3)[:, None], batch.positions]
        handle.remove()
        picked = logits.gather(-1, batch.answers) - logits.gather(-1, batch.foils)
        return float((picked[..., 0] * batch.weights).sum(1).mean())

    run(batch.corrupted)
    corrupted = held["x"]
    run(batch.clean)
    clean = held["x"]
    # Not smaller: the library's RMSNorm rounds to float32 on the way.
    size, scale = 0.01, np.abs(found[1]).max()
    for neuron in (0, 5, 17, int(np.abs(found[1]).argmax())):
        step = torch.zeros_like(clean)
        step[..., neuron] = size * (corrupted - clean)[..., neuron]
        effect = (run(batch.clean, step) - run(batch.clean, -step)) / (2 * size)
        assert effect == pytest.approx(found[1][neuron], abs=5e-3 * scale)


def test_nothing_is_left_behind_and_parameters_get_no_gradient() -> None:
    backbone = tiny_backbone()
    neuron_attribution(backbone, _pairs())
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
    assert not [m for m in backbone.model.modules() if m._forward_pre_hooks]


def test_refusals() -> None:
    from dihal.circuits.toy import induction_model, induction_pair, linear_net, linear_pairs

    with pytest.raises(UsageError, match="out of range"):
        neuron_attribution(tiny_backbone(), _pairs(), [9])
    with pytest.raises(UsageError, match="no pairs"):
        neuron_attribution(tiny_backbone(), [])
    for adapter, pairs in (
        (linear_net().adapter(), linear_pairs()),
        (induction_model(3.0).adapter(), induction_pair()),
    ):
        with pytest.raises(UsageError, match="no MLP with hidden neurons"):
            neuron_attribution(adapter, pairs)
