"""Controls with known answers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dihal.config import DenoiserConfig, LoraConfig, MethodConfig, ObjectiveConfig
from dihal.controls import Identity, Oracle, RandomSuffix, Shuffled
from dihal.methods import Method, build_method
from tests.kit import FAMILIES, tiny_backbone
from tests.unit.test_methods import make_batch, randomise

CONFIG = MethodConfig(split=2, denoiser=DenoiserConfig(width=32, depth=1, heads=4))


def method_of(backbone, **changes) -> Method:
    method = randomise(build_method(dataclasses.replace(CONFIG, **changes), backbone))
    method.fit_normalisation(backbone, [make_batch(8, 32, seed=9)])
    return method.eval()


def error(estimate: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return (estimate.double() - truth.double()).square().sum(-1)


# -- oracle ----------------------------------------------------------------------------------------------------------


def test_an_oracle_of_a_method_without_error_is_the_backbone() -> None:
    backbone = tiny_backbone()
    method, identity, batch = method_of(backbone), Identity(2), make_batch()
    method.states = lambda backbone, ids, *, seed, sample_ids, **keywords: identity.states(backbone, ids, **keywords)
    states = Oracle(method).states(backbone, batch.input_ids)
    assert torch.equal(backbone.suffix(states, 2), backbone.forward(batch.input_ids))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pad", [0, 5])
def test_the_oracles_error_is_the_methods_at_every_token(dtype: str, pad: int) -> None:
    backbone = tiny_backbone(dtype=dtype)
    method, batch = method_of(backbone), make_batch(pad=pad)
    given = {"attention_mask": batch.attention_mask, "seed": 3, "sample_ids": batch.sample_ids, "steps": 2}
    truth = backbone.prefix(batch.input_ids, 2, attention_mask=batch.attention_mask)
    wanted = error(method.states(backbone, batch.input_ids, **given), truth)
    states = Oracle(method).states(backbone, batch.input_ids, **given)
    assert states.dtype == backbone.dtype
    found = error(states, truth)
    real = batch.attention_mask
    assert wanted[real].min() > 0
    # In bfloat16 the noisy state is rounded; over tokens that averages out.
    torch.testing.assert_close(found[real].sum(), wanted[real].sum(), rtol=1e-5 if dtype == "float32" else 1e-2, atol=0)
    if dtype == "float32":
        torch.testing.assert_close(found[real], wanted[real], rtol=1e-3, atol=0)


def test_the_oracles_noise_points_anywhere_and_is_its_own_key() -> None:
    """Isotropic in normalised coordinates, unlike the error that it is as large as."""
    backbone = tiny_backbone()
    method = method_of(backbone)
    ids = make_batch(64, 32, seed=1).input_ids
    given = {"sample_ids": torch.arange(64), "seed": 0}
    space, positions = method.space, torch.arange(32).expand(64, 32)
    truth = backbone.prefix(ids, 2)
    states = Oracle(method).states(backbone, ids, **given)

    def spectrum(states: torch.Tensor) -> torch.Tensor:
        z = (space.normalise(states, positions) - space.normalise(truth, positions))[:, 1:].flatten(0, 1).double()
        z = z / z.norm(dim=-1, keepdim=True)  # directions only
        return torch.linalg.eigvalsh(z.T @ z / len(z)) * z.shape[-1]

    assert spectrum(states)[-1] < 1.4, "2,048 directions in 32 dimensions: every eigenvalue is near 1"
    assert spectrum(states)[0] > 0.7
    assert spectrum(method.states(backbone, ids, **given))[-1] > 2
    # Neither the batch nor the place in it matters; seed and sample do.
    alone = Oracle(method).states(backbone, ids[5:6], sample_ids=torch.tensor([5]), seed=0)
    torch.testing.assert_close(alone[0], states[5], rtol=1e-4, atol=1e-4)
    for other in ({"sample_ids": torch.tensor([6]), "seed": 0}, {"sample_ids": torch.tensor([5]), "seed": 1}):
        assert not torch.allclose(Oracle(method).states(backbone, ids[5:6], **other), alone, atol=1e-2)


# -- shuffled --------------------------------------------------------------------------------------------------------


def test_a_shuffled_method_sees_the_other_tokens_and_nothing_else() -> None:
    backbone = tiny_backbone()
    method = method_of(backbone)
    batch, tokens = make_batch(2, 12, pad=3), make_batch(10, 16, seed=5).input_ids
    keys = torch.tensor([7, 2])
    given = {"attention_mask": batch.attention_mask, "seed": 1, "steps": 2, "sample_ids": keys}
    control = Shuffled(method, tokens)
    found = control.states(backbone, batch.input_ids, **given)
    assert torch.equal(found, method.states(backbone, tokens[keys, :12], **given))
    assert torch.equal(found, control.states(backbone, make_batch(2, 12, seed=8).input_ids, **given))
    assert not torch.allclose(found, method.states(backbone, batch.input_ids, **given))


def test_a_shuffled_method_is_read_by_its_own_adapters() -> None:
    backbone = tiny_backbone()
    method = method_of(backbone, lora=LoraConfig(rank=2), objective=ObjectiveConfig(kl=1.0))
    method.attach(backbone)
    randomise(method)
    ids = make_batch().input_ids
    states = backbone.prefix(ids, 2)
    with Shuffled(method, ids).reading():
        adapted = backbone.suffix(states, 2)
    with Oracle(method).reading():
        plain = backbone.suffix(states, 2)
    assert torch.equal(plain, backbone.suffix(states, 2))
    assert not torch.equal(adapted, plain)


# -- random suffix ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_suffix_reads_true_states_and_leaves_the_backbone_as_it_was(family: str) -> None:
    backbone = tiny_backbone(family)
    ids, before = make_batch().input_ids, backbone.fingerprint()
    own = backbone.forward(ids)
    control = RandomSuffix(backbone, 2, seed=0)
    states = control.states(backbone, ids)
    assert torch.equal(states, backbone.prefix(ids, 2))
    upper, read = backbone.fingerprint(2, embedding=False, head=False), backbone.head(states)
    with control.reading():
        logits = backbone.suffix(states, 2)
        assert torch.equal(backbone.prefix(ids, 2), states), "the blocks below are not touched"
        assert backbone.fingerprint(2, embedding=False, head=False) != upper
        assert torch.equal(backbone.head(states), read), "the head neither"
    assert bool(torch.isfinite(logits).all())
    # The residual stream passes untrained blocks, too: of these small families some tokens stay the most likely ones.
    assert (logits.argmax(-1) == own.argmax(-1)).float().mean() < 0.7
    assert backbone.fingerprint() == before
    assert torch.equal(backbone.suffix(states, 2), own)
    with pytest.raises(RuntimeError, match="inside"), control.reading():
        raise RuntimeError("inside")
    assert backbone.fingerprint() == before


def test_random_weights_have_the_mean_and_deviation_of_the_trained_ones_and_their_seed() -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        backbone = tiny_backbone(hidden_size=64)
        trained = {name: p.clone() for name, p in backbone.model.named_parameters()}
        with RandomSuffix(backbone, 2, seed=seed).reading():
            drawn = {name: p.clone() for name, p in backbone.model.named_parameters()}
        changed = {name for name in drawn if not torch.equal(drawn[name], trained[name])}
        assert changed == {name for name in drawn if ".layers.2." in name or ".layers.3." in name}
        for name in changed:
            if drawn[name].numel() > 4000:
                assert drawn[name].std() == pytest.approx(float(trained[name].std()), rel=0.05)
            assert abs(torch.corrcoef(torch.stack([drawn[name].flatten(), trained[name].flatten()]))[0, 1]) < 0.5
        return {name: drawn[name] for name in changed}

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert not torch.equal(first["model.layers.2.mlp.up_proj.weight"], first["model.layers.3.mlp.up_proj.weight"])


def test_adapters_do_not_change_the_random_weights() -> None:
    ids = make_batch().input_ids

    def logits(rank: int) -> torch.Tensor:
        backbone = tiny_backbone()
        if rank:
            method = build_method(
                dataclasses.replace(CONFIG, lora=LoraConfig(rank=rank), objective=ObjectiveConfig(kl=1.0)), backbone
            )
            method.attach(backbone)
            randomise(method)
        control = RandomSuffix(backbone, 2, seed=0)
        with control.reading():
            return backbone.suffix(control.states(backbone, ids), 2)

    assert torch.equal(logits(0), logits(2))
