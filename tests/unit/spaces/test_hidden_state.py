"""The hidden space under `generate`: exact ends, its readout, its walk."""

from __future__ import annotations

import pytest
import torch

from dihal.config.method import MethodConfig, ProcessConfig
from dihal.diffusion.process import build_process
from dihal.diffusion.samplers import time_grid
from dihal.errors import UsageError
from dihal.random import normal
from dihal.spaces.base import Estimate
from dihal.spaces.build import build_space
from dihal.spaces.hidden_state import HiddenStateSpace
from dihal.spaces.readout import OwnReadout
from tests.kit import tiny_backbone
from tests.unit.spaces.kit import built, ids_of, key, positions

BACKBONE = tiny_backbone()
SPACE = built(MethodConfig(split=2), BACKBONE)
assert isinstance(SPACE, HiddenStateSpace)


def test_encode_and_hidden_are_inverse() -> None:
    ids = ids_of()
    z = SPACE.encode(BACKBONE, ids)
    state = BACKBONE.prefix(ids, 2)
    torch.testing.assert_close(SPACE.encode(BACKBONE, ids, state=state), z)
    back = SPACE.hidden(BACKBONE, Estimate(features=z, x0=z), positions(ids))
    torch.testing.assert_close(back, state, rtol=1e-4, atol=1e-4)
    logits = BACKBONE.suffix(back, 2)
    torch.testing.assert_close(logits, BACKBONE.forward(ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("parametrisation", ["x0", "eps", "v", "flow"])
def test_the_network_output_stands_for_the_clean_state(parametrisation: str) -> None:
    process = build_process(ProcessConfig(schedule="log_linear", parametrisation=parametrisation))
    ids = ids_of()
    z = SPACE.encode(BACKBONE, ids)
    t = torch.linspace(0.1, 0.9, ids.numel()).view(ids.shape)
    noise_key = key(ids)
    z_t = SPACE.noised(process, z, t, noise_key)
    eps = normal(noise_key.seed, noise_key.ids, noise_key.purpose, (z.shape[-1],))
    alpha, sigma = process.schedule.alpha(t)[..., None], process.schedule.sigma(t)[..., None]
    torch.testing.assert_close(z_t, alpha * z + sigma * eps)
    estimate = SPACE.interpret(process, process.target(z, eps, t), z_t, t, positions(ids))
    torch.testing.assert_close(estimate.x0, z, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(estimate.features, SPACE.readout(z), rtol=1e-3, atol=1e-3)


def test_noise_depends_on_its_key_only() -> None:
    process = build_process(ProcessConfig())
    ids = ids_of()
    z = SPACE.encode(BACKBONE, ids)
    whole = SPACE.noised(process, z, torch.full((4,), 0.5), key(ids))
    ids_key = key(ids)
    part = SPACE.noised(
        process,
        z[2:3, 5:],
        torch.full((1,), 0.5),
        type(ids_key)(seed=ids_key.seed, purpose=ids_key.purpose, ids=ids_key.ids[2:3, 5:]),
    )
    assert torch.equal(whole[2:3, 5:], part)
    assert not torch.allclose(whole, SPACE.noised(process, z, torch.full((4,), 0.5), key(ids, purpose="other")))


def test_the_readout_starts_at_log_v_and_learns_the_tokens_of_clean_states() -> None:
    backbone = tiny_backbone(tied=True, vocab=40)
    space = built(MethodConfig(split=0), backbone)
    ids = ids_of(32, 12, vocab=40)
    z = space.encode(backbone, ids)
    logits = space.logits(backbone, space.clean_features(z, positions(ids)))
    assert logits.shape == (32, 12, 40)
    assert torch.equal(logits, torch.zeros_like(logits))
    optimizer = torch.optim.Adam(space.readout.parameters(), lr=0.02)
    for _ in range(300):
        logits = space.logits(backbone, space.clean_features(z, positions(ids)))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    other = ids_of(16, 12, vocab=40, seed=9)
    found = space.logits(backbone, space.clean_features(space.encode(backbone, other), positions(other))).argmax(-1)
    assert (found == other)[:, 1:].float().mean() > 0.9


def test_the_readout_shortens_but_never_lengthens() -> None:
    readout = OwnReadout(8)
    torch.nn.init.eye_(readout.linear.weight)
    z = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    z = z / z.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(readout(0.3 * z), 0.3 * z)
    torch.testing.assert_close(readout(50.0 * z), z)


def exact(target: torch.Tensor):
    """A network that knows the answer."""
    return lambda noised, t: Estimate(features=target, x0=target)


@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim", "ancestral", "dpmpp_2m"])
def test_a_walk_with_the_true_state_ends_there(sampler: str) -> None:
    ids = ids_of()
    z = SPACE.encode(BACKBONE, ids)
    seen: list[float] = []
    last = SPACE.walk(
        build_process(ProcessConfig()),
        exact(z),
        lambda estimate, t: seen.append(t),
        key(ids),
        (4, 12),
        backbone=BACKBONE,
        times=time_grid(4),
        sampler=sampler,
        weight=0.0,
        temperature=lambda t: 0.0,
    )
    assert torch.equal(last.x0, z)
    assert seen[0] == 1.0
    assert len(seen) == (7 if sampler == "heun" else 4)


def test_projection_moves_the_walk_to_the_projected_tokens() -> None:
    ids, other = ids_of(), ids_of(seed=5)
    z, goal = SPACE.encode(BACKBONE, ids), SPACE.encode(BACKBONE, other)
    process = build_process(ProcessConfig(schedule="linear"))
    inputs: list[torch.Tensor] = []

    def estimate(noised: torch.Tensor, t: torch.Tensor) -> Estimate:
        inputs.append(noised)
        return Estimate(features=z, x0=z)

    encoded: list[torch.Tensor] = []
    for encode in (None, lambda tokens: encoded.append(tokens) or SPACE.encode(BACKBONE, tokens)):
        inputs.clear()
        SPACE.walk(
            process,
            estimate,
            lambda estimate, t: other if t > 0.5 else None,
            key(ids),
            (4, 12),
            backbone=BACKBONE,
            times=[1.0, 0.5, 0.0],
            sampler="ddim",
            weight=0.25,
            temperature=lambda t: 0.0,
            encode=encode,
        )
        noise = normal(0, key(ids).ids, "noise", (32,))
        torch.testing.assert_close(inputs[1], 0.5 * noise + 0.5 * (0.75 * z + 0.25 * goal))
    assert len(encoded) == 1


def test_outliers_are_shortened_for_the_network_and_kept_in_the_state() -> None:
    z = torch.randn(2, 3, 32)
    z[0, 1] *= 100
    assert SPACE.known_input(z).square().mean(-1).sqrt().max() < 4.001
    assert SPACE.feedback(BACKBONE, Estimate(features=z, x0=z)).square().mean(-1).sqrt().max() < 4.001
    torch.testing.assert_close(SPACE.known_input(z)[1], z[1])


def test_unknown_names_and_missing_splits_are_refused() -> None:
    misspelt = MethodConfig(split=1)
    object.__setattr__(misspelt, "space", "hiden")  # its type is checked under pytest
    with pytest.raises(UsageError, match="Did you mean 'hidden'"):
        build_space(misspelt, dim=32, vocab=97)
    with pytest.raises(UsageError, match=r"method\.split"):
        build_space(MethodConfig(), dim=32, vocab=97)
    with pytest.raises(UsageError, match="Did you mean 'euler'"):
        SPACE.walk(
            build_process(ProcessConfig()),
            exact(torch.zeros(1, 2, 32)),
            lambda estimate, t: None,
            key(ids_of(1, 2)),
            (1, 2),
            backbone=BACKBONE,
            times=[1.0, 0.0],
            sampler="eule",
            weight=0.0,
            temperature=lambda t: 0.0,
        )
