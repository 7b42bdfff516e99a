"""Backbone against hybrid: identity bridge, noise at the seam, planted rewiring, common random numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dihal.backbone import Backbone, load_backbone
from dihal.circuits.adapters import open_model
from dihal.circuits.attribute import attribute
from dihal.circuits.evaluate import curve
from dihal.circuits.seam import attribute_over_seeds, average, perturbed, remembered, seam_error, states_at_seam
from dihal.circuits.types import Circuit, EdgeScores
from dihal.config import DenoiserConfig, LoraConfig, MethodConfig, ObjectiveConfig
from dihal.controls import Identity
from dihal.errors import UsageError
from dihal.hybrid import HybridForCausalLM
from dihal.methods import build_method
from tests.kit import tiny_backbone
from tests.unit.circuits.models import float64_model, random_pairs
from tests.unit.test_methods import make_batch, randomise

SEAM = 2
LORA = {"lora": LoraConfig(rank=2), "objective": ObjectiveConfig(kl=1.0)}
PAIRS = [random_pairs(4, 7), random_pairs(3, 9, seed=1, first_id=4)]


def jaccard(first: EdgeScores, second: EdgeScores, k: int) -> float:
    a, b = (scores.top(k).edges for scores in (first, second))
    return float((a & b).sum() / (a | b).sum())


def hybrid(**changes) -> HybridForCausalLM:
    backbone = tiny_backbone()
    config = MethodConfig(split=SEAM, denoiser=DenoiserConfig(width=32, depth=2, heads=4))
    method = randomise(build_method(dataclasses.replace(config, **changes), backbone))
    method.fit_normalisation(backbone, [make_batch()])
    return HybridForCausalLM.from_method(method, backbone)


def test_an_identity_bridge_has_the_contracted_circuit() -> None:
    backbone = load_backbone(float64_model(layers=4), dtype="float64", device="cpu")
    bridged = HybridForCausalLM.from_method(Identity(SEAM), backbone)
    own = attribute(backbone, PAIRS, seam=SEAM, path="seam")
    other = attribute(bridged, PAIRS, path="seam")
    assert (other.scores == own.scores).all()
    assert (own.spec.lower, other.spec.lower) == ("lower", "bridge")
    plain = attribute(backbone, PAIRS, method="eap").contract(SEAM)
    assert abs(attribute(bridged, PAIRS, method="eap", path="seam").scores - plain.scores).max() < 1e-12
    assert jaccard(own, other, 30) == 1.0
    budgets = (0.1, 0.4)
    assert (curve(bridged, own, PAIRS, budgets).values == curve(backbone, own, PAIRS, budgets).values).all()
    assert float(seam_error(bridged, backbone, PAIRS).max()) == 0.0


def test_overlap_falls_with_noise_at_the_seam() -> None:
    model = float64_model(layers=4)
    own = attribute(model, PAIRS, seam=SEAM, path="seam")
    for shared in (True, False):
        found = [
            jaccard(own, attribute(perturbed(model, SEAM, size, shared=shared), PAIRS, path="seam"), 40)
            for size in (0.0, 0.03, 0.3, 3.0)
        ]
        assert found[0] == 1.0
        assert found == sorted(found, reverse=True)
        assert found[-1] < 0.8


def test_noise_has_the_size_asked_for_and_common_random_numbers() -> None:
    model = float64_model(layers=4)
    batch = random_pairs(64, 7)
    sizes = torch.tensor([0.1, 0.2, 0.5])
    noisy = perturbed(model, SEAM, sizes)
    measured = seam_error(noisy, model, [batch], noise_seeds=(0, 1))
    assert measured.tolist() == pytest.approx([0.1, 0.2, 0.5, 0.5, 0.5, 0.5, 0.5], rel=0.06)
    base = states_at_seam(model, batch.clean, SEAM, sample_ids=batch.ids)
    first = states_at_seam(noisy, batch.clean, SEAM, sample_ids=batch.ids, noise_seed=3)
    assert torch.equal(first, states_at_seam(noisy, batch.clean, SEAM, sample_ids=batch.ids, noise_seed=3))
    part = states_at_seam(noisy, batch.clean[5:9], SEAM, sample_ids=batch.ids[5:9], noise_seed=3)
    assert torch.allclose(part, first[5:9], atol=1e-12)
    assert (states_at_seam(noisy, batch.clean, SEAM, sample_ids=batch.ids, noise_seed=4) - first).abs().max() > 0.01
    keys = {"sample_ids": batch.ids, "noise_seed": 3}
    own = open_model(model)
    changed = own.states(batch.corrupted, SEAM, **keys)
    for shared in (True, False):
        source = perturbed(model, SEAM, 0.3, shared=shared)
        clean = source.states(batch.clean, SEAM, role="clean", **keys) - base
        corrupted = source.states(batch.corrupted, SEAM, role="corrupted", **keys) - changed
        # Before the corrupted position the states agree, and so does shared noise.
        assert (clean[:, :2] - corrupted[:, :2]).abs().max() < 1e-12 if shared else not torch.allclose(clean, corrupted)


@pytest.mark.parametrize("changes", [{}, LORA])
def test_a_trained_bridge_is_attributed_with_its_own_noise(changes) -> None:
    bridged = hybrid(**changes)
    mean, runs = attribute_over_seeds(bridged, PAIRS, (0, 1, 2), path="seam")
    assert len(runs) == 3
    assert (
        abs(mean.scores - np.mean([run.scores for run in runs], axis=0)).max() < 1e-6 * abs(mean.scores).max() + 1e-12
    )
    assert (runs[0].scores != runs[1].scores).any()
    assert (attribute(bridged, PAIRS, path="seam", noise_seed=0, batch_size=2).n, runs[0].n) == (7, 7)
    small = attribute(bridged, PAIRS, path="seam", noise_seed=0, batch_size=2)
    assert abs(small.scores - runs[0].scores).max() < 1e-4 * abs(runs[0].scores).max()
    assert max(mean.residuals.values()) < 1e-3
    assert mean.details["noise_seed"] == [0, 1, 2]
    assert mean.passes == {"forward": 3 * 2 * 7, "backward": 3 * 2 * 5}
    # What the circuits run on is what the hybrid itself computes.
    batch = PAIRS[0]
    full = curve(bridged, mean, PAIRS[:1], (0.5, 1.0)).values[1]
    ids = torch.zeros(len(batch), dtype=torch.int64)
    same = dataclasses.replace(batch, ids=ids)
    logits = bridged(batch.clean, sampler_seed=0).logits[:, -1]
    expected = (logits.gather(1, batch.answers[:, 0]) - logits.gather(1, batch.foils[:, 0]))[:, 0]
    found = attribute(bridged, [same], path="seam").clean
    assert found == pytest.approx(float(expected.mean()), rel=1e-4, abs=1e-5)
    assert full.shape == (4,)


def test_adapters_of_a_hybrid_do_not_leak_into_its_backbone() -> None:
    bridged = hybrid(**LORA)
    for parameter in bridged.bridge.adapters.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    own = attribute(bridged.backbone, PAIRS, seam=SEAM, path="seam")
    fresh = attribute(tiny_backbone(), PAIRS, seam=SEAM, path="seam")
    assert np.allclose(own.scores, fresh.scores, atol=1e-6 * abs(fresh.scores).max())
    bridged_scores = attribute(bridged, PAIRS, path="seam")
    assert max(bridged_scores.residuals.values()) < 1e-3


def permute_heads(backbone: Backbone, layer: int, order: list[int]) -> None:
    """Rename the heads of a block: the same function, other names."""
    attention = backbone.model.model.layers[layer].self_attn
    size = attention.head_dim
    groups = [head // 2 for head in order[::2]]

    def rows(chosen: list[int]) -> torch.Tensor:
        return torch.cat([torch.arange(i * size, (i + 1) * size) for i in chosen])

    with torch.no_grad():
        for name, chosen in (("q_proj", order), ("k_proj", groups), ("v_proj", groups)):
            linear = getattr(attention, name)
            linear.weight.copy_(linear.weight[rows(chosen)])
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, rows(order)])


def test_permuted_heads_are_seen_and_realigning_restores_them() -> None:
    first, second = (load_backbone(float64_model(layers=4), dtype="float64", device="cpu") for _ in range(2))
    order = [2, 3, 0, 1]
    permute_heads(second, 2, order)
    a, b = (attribute(model, PAIRS, seam=SEAM, path="seam") for model in (first, second))
    assert a.clean == pytest.approx(b.clean)
    assert jaccard(a, b, 25) < 0.8
    own = curve(second, b, PAIRS, (0.3, 0.6))
    moved = curve(second, a, PAIRS, (0.3, 0.6))
    assert abs(moved.faithfulness - own.faithfulness).max() > 0.02
    realigned = dataclasses.replace(a, scores=a.spec.reorder(a.scores, 2, order))
    assert jaccard(realigned, b, 25) == 1.0
    assert abs(realigned.scores - b.scores).max() < 1e-10
    restored = curve(second, realigned, PAIRS, (0.3, 0.6))
    assert restored.faithfulness == pytest.approx(own.faithfulness)
    circuit = a.top(25)
    renamed = Circuit(spec=a.spec, edges=a.spec.reorder(circuit.edges, 2, order))
    assert renamed.size == 25


def test_refusals() -> None:
    bridged = HybridForCausalLM.from_method(Identity(SEAM), tiny_backbone())
    with pytest.raises(UsageError, match="perturb the backbone"):
        perturbed(bridged, SEAM, 0.1)
    with pytest.raises(UsageError, match="out of range"):
        perturbed(tiny_backbone(), 4, 0.1)
    with pytest.raises(UsageError, match="0 or more"):
        perturbed(tiny_backbone(), SEAM, -0.1)
    with pytest.raises(UsageError, match="same graph"):
        average([])


def test_states_are_drawn_once() -> None:
    drawn = []
    adapter = perturbed(float64_model(), SEAM, 0.3)
    draw = adapter.source

    def counted(ids, samples, seed, role):
        drawn.append((seed, role))
        return draw(ids, samples, seed, role)

    adapter.source = counted
    kept = remembered(adapter)
    expected = attribute(adapter, PAIRS, path="seam", noise_seed=1).scores
    drawn.clear()
    for _ in range(2):
        assert (attribute(kept, PAIRS, path="seam", noise_seed=1).scores == expected).all()
    # The ends of both batches, and of the first prompts that the identities are checked on.
    assert len(drawn) == 2 * (len(PAIRS) + 1)
    attribute(kept, PAIRS, path="seam", noise_seed=2)
    assert len(drawn) == 4 * (len(PAIRS) + 1)
    small = remembered(adapter, most=1)
    drawn.clear()
    for _ in range(2):
        attribute(small, PAIRS, path="seam", noise_seed=1)
    assert len(drawn) == 4 * (len(PAIRS) + 1)
