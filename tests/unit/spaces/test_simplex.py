"""The simplex space: mixtures against the dense formula, noise by key, the nucleus, renoising walks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dihal.config.method import MethodConfig, ProcessConfig
from dihal.config.spaces import SimplexConfig
from dihal.diffusion.process import build_process
from dihal.diffusion.samplers import time_grid
from dihal.errors import UsageError
from dihal.spaces.base import Estimate, NoiseKey
from dihal.spaces.build import build_space
from dihal.spaces.simplex import SimplexSpace, draw_nucleus
from tests.kit import tiny_backbone
from tests.unit.spaces.kit import batches, built, ids_of, key, positions

BACKBONE = tiny_backbone()
PROCESS = build_process(ProcessConfig())


def space_of(split: int = 2, **options: Any) -> SimplexSpace:
    made = built(MethodConfig(split=split, space="simplex", simplex=SimplexConfig(**options)), BACKBONE)
    assert isinstance(made, SimplexSpace)
    return made


SPACE = space_of()


def test_the_table_has_unit_variance_over_the_text() -> None:
    rows = torch.cat([SPACE.table(BACKBONE)[b.input_ids].flatten(0, 1) for b in batches()])
    torch.testing.assert_close(rows.mean(0), torch.zeros(32), rtol=0, atol=1e-5)
    torch.testing.assert_close(rows.std(0, unbiased=False), torch.ones(32), rtol=1e-4, atol=1e-4)


def test_without_noise_it_is_the_vertex_and_without_signal_pure_noise() -> None:
    ids = ids_of(4, 21)
    clean = SPACE.encode(BACKBONE, ids)
    assert clean is ids
    assert not SPACE.needs_state()
    table = SPACE.table(BACKBONE)
    z = torch.full((4, 21, 97), -5.0).scatter_(-1, ids[..., None], 5.0)
    exact = SPACE.noised(PROCESS, clean, torch.zeros(4), key(ids))
    torch.testing.assert_close(exact, z.softmax(-1) @ table)
    torch.testing.assert_close(SPACE.known_input(clean), table[ids])
    noise = SPACE.noised(PROCESS, clean, torch.ones(4), key(ids))
    torch.testing.assert_close(noise, SPACE.noised(PROCESS, ids_of(4, 21, seed=7), torch.ones(4), key(ids)))
    # k eps with k = 5, from its moments: E softmax is flat by symmetry.
    many = SPACE.noised(PROCESS, ids_of(64, 64), torch.ones(64), key(ids_of(64, 64)))
    torch.testing.assert_close(many.mean((0, 1)), table.mean(0), rtol=0, atol=0.06)


def test_every_time_mixes_as_the_dense_formula() -> None:
    """Recover the noise from the mixtures at t = 1 with an invertible table, and predict those at other times."""
    backbone = tiny_backbone(vocab=33)
    space = build_space(MethodConfig(split=2, space="simplex"), dim=32, vocab=33)
    assert isinstance(space, SimplexSpace)
    ids = ids_of(3, 20, vocab=33)
    space.encode(backbone, ids)
    space._table = torch.eye(33)  # mixtures are the probabilities themselves
    pure = space.noised(PROCESS, ids, torch.ones(3), key(ids)).log()
    t = torch.linspace(0.1, 0.9, 60).view(3, 20)
    alpha, sigma = PROCESS.schedule.alpha(t)[..., None], PROCESS.schedule.sigma(t)[..., None]
    vertex = torch.full((3, 20, 33), -5.0).scatter_(-1, ids[..., None], 5.0)
    expected = (alpha * vertex + sigma * pure).softmax(-1)
    torch.testing.assert_close(space.noised(PROCESS, ids, t, key(ids)), expected, rtol=1e-3, atol=1e-5)
    # The scale of the noise: log-probabilities differ by k times the difference of two normals.
    many = ids_of(64, 32, vocab=33)
    pure = space.noised(PROCESS, many, torch.ones(64), key(many)).log()
    assert pure.std(-1).square().mean().sqrt().item() == pytest.approx(5.0, rel=0.02)


def test_noise_depends_neither_on_the_batch_nor_on_what_follows_nor_on_the_chunk() -> None:
    ids = ids_of(4, 40)
    clean = SPACE.encode(BACKBONE, ids)
    t = torch.tensor([0.4, 0.6, 0.8, 1.0])
    whole = SPACE.noised(PROCESS, clean, t, key(ids))
    held = key(ids)
    for time in (7, 16, 23):
        cut = NoiseKey(seed=held.seed, purpose=held.purpose, ids=held.ids[1:3, :time])
        torch.testing.assert_close(SPACE.noised(PROCESS, clean[1:3, :time], t[1:3], cut), whole[1:3, :time])
    small = space_of()
    small.chunk = 17
    torch.testing.assert_close(small.noised(PROCESS, small.encode(BACKBONE, ids), t, held), whole)
    assert not torch.allclose(SPACE.noised(PROCESS, clean, t, key(ids, purpose="x")), whole, atol=0.1)
    assert not torch.allclose(whole[3, :16], whole[3, 16:32], atol=0.1)
    assert not torch.allclose(SPACE.noised(PROCESS, clean, t, key(ids, seed=1)), whole, atol=0.1)


def test_the_nucleus() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[torch.tensor([2, 0, 3, 1])]
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    u = torch.stack([grid, (grid * 10_000 * 0.6180339887498949) % 1], -1)  # even in each column, and together
    many = logits.expand(10_000, 4)

    def shares(**options: float) -> list[float]:
        drawn = draw_nucleus(many, u, **options)
        return (torch.bincount(drawn, minlength=4) / 10_000).tolist()

    assert shares(temperature=1.0, top_p=1.0) == pytest.approx([0.15, 0.5, 0.05, 0.3], abs=1e-3)
    assert shares(temperature=1.0, top_p=0.8) == pytest.approx([0.0, 0.625, 0.0, 0.375], abs=1e-3)
    assert shares(temperature=1.0, top_p=0.81) == pytest.approx([3 / 19, 10 / 19, 0, 6 / 19], abs=1e-3)
    assert shares(temperature=1.0, top_p=0.3) == [0, 1, 0, 0]
    # Equally likely tokens are in it together or not at all.
    assert draw_nucleus(torch.zeros(500, 4), u[::20], temperature=1.0, top_p=0.3).bincount().tolist() == [125] * 4
    assert shares(temperature=0.0, top_p=1.0) == [0, 1, 0, 0]
    assert shares(temperature=1.0, top_p=0.0) == [0, 1, 0, 0]
    squared = torch.tensor([0.15, 0.5, 0.05, 0.3]) ** 2
    assert shares(temperature=0.5, top_p=1.0) == pytest.approx((squared / squared.sum()).tolist(), abs=1e-3)


def test_the_output_is_a_normalised_state() -> None:
    ids = ids_of()
    state = BACKBONE.prefix(ids, 2)
    z = SPACE.normaliser.normalise(state, positions(ids))
    estimate = SPACE.interpret(PROCESS, z, z, torch.full((4,), 0.5), positions(ids))
    torch.testing.assert_close(SPACE.hidden(BACKBONE, estimate, positions(ids)), state, rtol=1e-4, atol=1e-4)
    assert SPACE.logits(BACKBONE, estimate.features).shape == (4, 12, 97)
    assert SPACE.feedback(BACKBONE, estimate).shape == (4, 12, 32)


def speaking(space: SimplexSpace, tokens: torch.Tensor, sure: float = 200.0) -> Estimate:
    """An estimate whose own logits are largest at the given tokens."""
    head = BACKBONE.output_embedding.weight
    return Estimate(features=torch.cat([sure * head[tokens], head[tokens]], -1), x0=None)


def test_a_walk_renoises_what_it_reads() -> None:
    ids, other = ids_of(), ids_of(seed=8)
    head = BACKBONE.output_embedding.weight
    said = (head[ids] @ head.T).argmax(-1)  # the token of largest logit is not always the row itself
    seen: list[torch.Tensor] = []

    def estimate(noised: torch.Tensor, t: torch.Tensor) -> Estimate:
        seen.append(noised)
        return speaking(SPACE, ids)

    def walk(project: Any, weight: float) -> Estimate:
        seen.clear()
        return SPACE.walk(
            PROCESS,
            estimate,
            project,
            key(ids),
            (4, 12),
            backbone=BACKBONE,
            times=time_grid(3),
            sampler="ddim",
            weight=weight,
            temperature=lambda t: 0.0,
        )

    last = walk(lambda estimate, t: None, 0.0)
    assert torch.equal(SPACE.logits(BACKBONE, last.features).argmax(-1), said)
    assert len(seen) == 3
    torch.testing.assert_close(seen[0], SPACE.noised(PROCESS, said, torch.ones(4), key(ids)))
    for step, s in enumerate((2 / 3, 1 / 3)):
        again = SPACE.noised(PROCESS, said, torch.full((4,), s), key(ids, purpose=f"noise {step}"))
        torch.testing.assert_close(seen[step + 1], again)
    walk(lambda estimate, t: other, 1.0)
    again = SPACE.noised(PROCESS, other, torch.full((4,), 1 / 3), key(ids, purpose="noise 1"))
    torch.testing.assert_close(seen[2], again)
    walk(lambda estimate, t: said, 0.5)  # two halves of one vertex
    again = SPACE.noised(PROCESS, said, torch.full((4,), 1 / 3), key(ids, purpose="noise 1"))
    torch.testing.assert_close(seen[2], again)


def test_drawn_tokens_follow_the_own_head_and_their_key() -> None:
    space = space_of(top_p=1.0)
    ids = ids_of(64, 32)
    features = torch.zeros(64, 32, 64)
    features[..., :32] = 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    estimate = Estimate(features=features, x0=None)
    p = space.logits(BACKBONE, features[0, 0]).softmax(-1)
    drawn = space._draw(BACKBONE, estimate, key(ids), 1.0)
    found = torch.bincount(drawn.flatten(), minlength=97) / drawn.numel()
    assert (found - p).abs().max() < 5 * (p.max() / drawn.numel()) ** 0.5
    one = NoiseKey(seed=0, purpose="noise", ids=key(ids).ids[5:6, 3:9])
    part = Estimate(features=features[5:6, 3:9], x0=None)
    assert torch.equal(space._draw(BACKBONE, part, one, 1.0), drawn[5:6, 3:9])


def test_gradients_reach_network_and_readout() -> None:
    space = space_of()
    out = torch.randn(2, 5, 32, requires_grad=True)
    where = torch.arange(5).expand(2, 5)
    estimate = space.interpret(PROCESS, out, out, torch.full((2,), 0.5), where)
    space.hidden(BACKBONE, estimate, where).sum().backward(retain_graph=True)
    assert out.grad.abs().sum() > 0
    (space.logits(BACKBONE, estimate.features) ** 2 + space.logits(BACKBONE, estimate.features)).sum().backward()
    assert space.readout.linear.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("options", "match"), [({"k": 0.0}, "positive"), ({"top_p": 1.5}, "top_p")])
def test_refusals(options: dict[str, float], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        build_space(MethodConfig(split=1, space="simplex", simplex=SimplexConfig(**options)), dim=32, vocab=97)
