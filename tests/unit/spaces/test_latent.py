"""The latent space: starts as principal components, learns under noise, is fixed afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from dihal.config.method import MethodConfig, ProcessConfig
from dihal.config.spaces import LatentConfig
from dihal.data.batch import Batch
from dihal.diffusion.process import build_process
from dihal.diffusion.samplers import time_grid
from dihal.errors import UsageError
from dihal.spaces.base import Estimate
from dihal.spaces.build import build_space
from dihal.spaces.latent import LatentSpace
from tests.kit import tiny_backbone
from tests.unit.spaces.kit import batches, built, ids_of, key, positions

BACKBONE = tiny_backbone()
DATA = batches()


def space_of(dim: int = 8, split: int = 2, **options: Any) -> LatentSpace:
    torch.manual_seed(0)
    config = LatentConfig(dim=dim, hidden=64, **options)
    made = built(MethodConfig(split=split, space="latent", latent=config), BACKBONE)
    assert isinstance(made, LatentSpace)
    return made


def states(space: LatentSpace) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised states of the data and which are ordinary."""
    found = list(space._ordinary(BACKBONE, DATA))
    return torch.cat([z for z, _ in found]), torch.cat([ordinary for _, ordinary in found])


def test_all_channels_are_an_exact_inverse() -> None:
    space = space_of(32)
    ids = ids_of()
    z = space.encode(BACKBONE, ids)
    state = BACKBONE.prefix(ids, 2)
    torch.testing.assert_close(space.encode(BACKBONE, ids, state=state), z)
    back = space.hidden(BACKBONE, Estimate(features=z, x0=z), positions(ids))
    torch.testing.assert_close(back, state, rtol=1e-3, atol=1e-3)


def test_it_starts_as_principal_component_analysis() -> None:
    space = space_of(8)
    z, ordinary = states(space)
    latent = space._encode(z, frozen=True)[ordinary]
    torch.testing.assert_close(latent.T @ latent / len(latent), torch.eye(8), rtol=0, atol=1e-3)
    centred = z[ordinary].double() - z[ordinary].double().mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred / len(centred))
    error = (space.decode(space._encode(z, frozen=True)) - z)[ordinary].square().sum(-1).mean()
    assert error.item() == pytest.approx(values[:-8].sum().item(), rel=1e-3)  # no rank-8 map does better


def train(space: LatentSpace, steps: int) -> dict[str, float]:
    optimizer = torch.optim.Adam(space.parameters(), lr=3e-3)
    terms: dict[str, torch.Tensor] = {}
    for step in range(steps):
        batch = DATA[step % len(DATA)]
        moved = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
        moved["sample_ids"] = batch.sample_ids + 1000 * step
        total, terms = space.auxiliary_loss(
            BACKBONE, Batch(**moved), torch.zeros(()), None, seed=0, progress=step / steps
        )
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return {name: value.item() for name, value in terms.items()}


def test_training_beats_principal_components() -> None:
    space = space_of(8, cross_entropy=0.0, noise=0.0)
    before = train(copy.deepcopy(space), 1)
    after = train(space, 150)
    assert after["autoencoder/state"] < 0.9 * before["autoencoder/state"]
    assert after["autoencoder/explained"] > before["autoencoder/explained"]


def test_training_reads_tokens_and_refit_normalises() -> None:
    space = space_of(16, cross_entropy=0.5)
    before = train(copy.deepcopy(space), 1)
    after = train(space, 150)
    assert before["autoencoder/cross_entropy"] == pytest.approx(torch.tensor(97.0).log().item(), abs=1e-3)
    assert after["autoencoder/cross_entropy"] < 0.5 * before["autoencoder/cross_entropy"]
    # The soft bound holds latents within reach of the noise.
    z, ordinary = states(space)
    assert space._encode(z, frozen=False)[ordinary].square().mean() < 3
    space.refit(BACKBONE, DATA)
    latent = space._encode(z, frozen=True)[ordinary]
    torch.testing.assert_close(latent.mean(0), torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(latent.std(0, unbiased=False), torch.ones(16), rtol=1e-3, atol=1e-3)
    # Normalising once more changes the latents' units and nothing that is decoded from them.
    ids = DATA[0].input_ids
    read = space.logits(BACKBONE, space.clean_features(space.encode(BACKBONE, ids), positions(ids))).argmax(-1)
    assert (read == ids)[:, 1:].float().mean() > 0.5


def test_without_the_bound_latents_grow_out_of_the_noise() -> None:
    free, bound = space_of(4, scale=0.0, noise=0.4), space_of(4, noise=0.4)
    for space in (free, bound):
        train(space, 120)
    z, ordinary = states(free)
    sizes = [space._encode(z, frozen=False)[ordinary].square().mean().item() for space in (free, bound)]
    assert sizes[0] > 1.5 * sizes[1]


def test_the_decoder_is_trained_on_noised_latents() -> None:
    """With all channels, clean latents decode exactly at first; noised ones miss by what the noise makes of them."""
    clean, noised = space_of(32, noise=0.0), space_of(32, noise=0.3)
    losses = [
        space.auxiliary_loss(BACKBONE, DATA[0], torch.zeros(()), None, seed=0, progress=0.0)[1]["autoencoder/state"]
        for space in (clean, noised)
    ]
    assert losses[0] < 1e-6
    assert losses[1] > 1e-3


def test_the_loss_of_a_sample_depends_on_its_key_only() -> None:
    space = space_of(8)
    batch = DATA[0]

    def loss(rows: slice) -> torch.Tensor:
        part = Batch(**{n: v[rows] if isinstance(v := getattr(batch, n), torch.Tensor) else v for n in vars(batch)})
        return space.auxiliary_loss(BACKBONE, part, torch.zeros(()), None, seed=0, progress=0.0)[0]

    halves = (loss(slice(0, 4)) + loss(slice(4, 8))) / 2
    torch.testing.assert_close(loss(slice(0, 8)), halves)


def test_diffusion_does_not_train_the_autoencoder() -> None:
    space = space_of(8)
    torch.nn.init.normal_(space.readout.linear.weight)
    process = build_process(ProcessConfig(parametrisation="v"))
    ids = ids_of()
    z = space.encode(BACKBONE, ids)
    assert not z.requires_grad
    out = torch.randn(4, 12, 8, requires_grad=True)
    t = torch.full((4,), 0.5)
    estimate = space.interpret(process, out, space.noised(process, z, t, key(ids)), t, positions(ids))
    (space.logits(BACKBONE, estimate.features).square().sum() + estimate.x0.sum()).backward(retain_graph=True)
    space.hidden(BACKBONE, estimate, positions(ids)).square().sum().backward()
    space.clean_features(z, positions(ids)).sum().backward()
    assert out.grad.abs().sum() > 0
    assert space.readout.linear.weight.grad.abs().sum() > 0
    # A gradient there is, for a distributed run, but of zero; and the weights in use are a copy.
    assert all(not p.grad.any() for part in (space.encoder, space.decoder) for p in part.parameters())
    for part in (space.encoder, space.decoder):
        for parameter in part.parameters():
            parameter.data.add_(1.0)
    assert torch.equal(space.encode(BACKBONE, ids), z)
    again = space.interpret(process, out, space.noised(process, z, t, key(ids)), t, positions(ids))
    assert torch.equal(again.features, estimate.features)
    total, _ = space.auxiliary_loss(BACKBONE, DATA[0], z, None, seed=0, progress=0.0)
    total.backward()
    assert all(p.grad.any() for part in (space.encoder, space.decoder) for p in part.parameters() if p.ndim > 1)
    space.refit(BACKBONE, DATA)
    assert not torch.allclose(space.encode(BACKBONE, ids), z, atol=0.1)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_a_walk_with_the_true_latent_ends_there(sampler: str) -> None:
    space = space_of(8)
    ids = ids_of()
    z = space.encode(BACKBONE, ids)
    last = space.walk(
        build_process(ProcessConfig(schedule="tan", shift=3.0)),
        lambda noised, t: Estimate(features=z, x0=z),
        lambda estimate, t: ids,
        key(ids),
        (4, 12),
        backbone=BACKBONE,
        times=time_grid(3),
        sampler=sampler,
        weight=0.5,
        temperature=lambda t: 0.0,
    )
    assert torch.equal(last.x0, z)


def test_a_checkpoint_restores_it() -> None:
    one = space_of(8)
    train(one, 3)
    one.refit(BACKBONE, DATA)
    other = build_space(MethodConfig(split=2, space="latent", latent=LatentConfig(dim=8, hidden=64)), dim=32, vocab=97)
    other.load_state_dict(one.state_dict())
    ids = ids_of()
    assert torch.equal(one.encode(BACKBONE, ids), other.encode(BACKBONE, ids))
    assert other.stage_share() == 0.15


@pytest.mark.parametrize(
    ("options", "process", "match"),
    [
        ({"dim": 64}, ProcessConfig(), "hidden size"),
        ({"dim": 8, "stage": 1.0}, ProcessConfig(), "stage"),
        ({"dim": 8, "noise": 0.9}, ProcessConfig(), "more noise than signal"),
        ({"dim": 8}, ProcessConfig(schedule="gumbel"), "more noise than signal"),
        ({"dim": 8, "state": 0.0, "cross_entropy": 0.0}, ProcessConfig(), "must be positive"),
        ({"dim": 8, "hidden": 0}, ProcessConfig(), "hidden"),
    ],
)
def test_refusals(options: dict[str, Any], process: ProcessConfig, match: str) -> None:
    config = MethodConfig(split=2, space="latent", latent=LatentConfig(**options), process=process)
    with pytest.raises(UsageError, match=match):
        build_space(config, dim=32, vocab=97)
