"""The embedding space: the algebra of its posterior, score interpolation, and the bound against exact likelihoods."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dihal.backbone import Backbone
from dihal.config.method import MethodConfig, ProcessConfig, TimeConfig
from dihal.config.spaces import EmbeddingConfig
from dihal.diffusion.process import Process, build_process
from dihal.diffusion.samplers import time_grid
from dihal.diffusion.schedule import LogLinear
from dihal.errors import UsageError
from dihal.spaces.base import Estimate, NoiseKey
from dihal.spaces.build import build_space
from dihal.spaces.embedding import EmbeddingSpace
from tests.kit import tiny_backbone
from tests.unit.spaces.kit import built, ids_of, key, positions

BACKBONE = tiny_backbone()


def space_of(backbone: Backbone = BACKBONE, **options: Any) -> EmbeddingSpace:
    made = built(MethodConfig(split=0, space="embedding", embedding=EmbeddingConfig(**options)), backbone)
    assert isinstance(made, EmbeddingSpace)
    return made


@pytest.mark.parametrize("dim", [None, 8])
def test_rows_have_one_length_and_encode_looks_them_up(dim: int | None) -> None:
    space = space_of(dim=dim)
    rows = space.rows(BACKBONE)
    width = dim or 32
    assert rows.shape == (97, width)
    torch.testing.assert_close(rows.norm(dim=-1), torch.full((97,), width**0.5))
    ids = ids_of()
    assert torch.equal(space.encode(BACKBONE, ids), rows[ids])
    assert not space.needs_state()
    assert space.input_dim == space.output_dim == width


def test_projection_keeps_the_leading_directions() -> None:
    """Rows in a known 5-dimensional plane: 5 channels keep every angle."""
    backbone = tiny_backbone(tied=True)
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(32, 5, generator=generator))[0]
    backbone.input_embedding.weight.data = torch.randn(97, 5, generator=generator) @ plane.T
    full, projected = space_of(backbone), space_of(backbone, dim=5)
    angles = full.rows(backbone) @ full.rows(backbone).T / 32
    torch.testing.assert_close(projected.rows(backbone) @ projected.rows(backbone).T / 5, angles, rtol=1e-3, atol=1e-4)


def test_the_output_prior_is_the_exact_posterior_of_a_token_given_its_noised_state() -> None:
    """With a network that says nothing, softmax(logits) = p(w | z_t) under a uniform prior, by Bayes' rule."""
    space = space_of()
    process = build_process(ProcessConfig(schedule="log_linear", log_snr_max=4.0))
    ids = ids_of()
    clean = space.encode(BACKBONE, ids)
    t = torch.tensor([0.3, 0.5, 0.7, 1.0])
    z_t = space.noised(process, clean, t, key(ids))
    estimate = space.interpret(process, torch.zeros_like(z_t), z_t, t, positions(ids))
    found = space.logits(BACKBONE, estimate.features).log_softmax(-1)
    alpha, sigma = process.schedule.alpha(t).view(4, 1, 1), process.schedule.sigma(t).view(4, 1, 1)
    distance = torch.stack([(z_t - alpha * row).square().sum(-1) for row in space.rows(BACKBONE)], -1)
    torch.testing.assert_close(found, (-distance / (2 * sigma**2)).log_softmax(-1), rtol=1e-4, atol=1e-3)
    plain = space_of(output_prior=False)
    nothing = plain.interpret(process, torch.zeros_like(z_t), z_t, t, positions(ids))
    assert torch.equal(plain.logits(BACKBONE, nothing.features), torch.zeros(4, 12, 97))


def test_a_row_as_output_is_its_token_and_noise_free_states_are_certain() -> None:
    space = space_of()
    process = build_process(ProcessConfig())
    ids = ids_of()
    clean = space.encode(BACKBONE, ids)
    zero = torch.zeros(4)
    estimate = space.interpret(process, torch.zeros_like(clean), clean, zero, positions(ids))
    assert torch.equal(space.logits(BACKBONE, estimate.features).argmax(-1), ids)
    torch.testing.assert_close(space.feedback(BACKBONE, estimate), clean)
    pure = space_of(output_prior=False)
    estimate = pure.interpret(process, 3 * clean, clean, zero, positions(ids))
    assert torch.equal(pure.logits(BACKBONE, estimate.features).argmax(-1), ids)


def test_the_mean_row_is_the_dense_one_in_chunks_with_its_gradient() -> None:
    space = space_of(output_prior=False)
    space.chunk = 7
    features = torch.randn(4, 12, 32, generator=torch.Generator().manual_seed(1))
    one, other = features.clone().requires_grad_(), features.clone().requires_grad_()
    rows = space.rows(BACKBONE)
    found, dense = space.expected(BACKBONE, one), (other @ rows.T).softmax(-1) @ rows
    torch.testing.assert_close(found, dense)
    weight = torch.randn_like(dense)
    (found * weight).sum().backward()
    (dense * weight).sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_hidden_is_the_expected_embedding_as_it_enters_block_0(family: str) -> None:
    backbone = tiny_backbone(family)
    space = space_of(backbone)
    ids = ids_of()
    certain = Estimate(features=40 * space.encode(backbone, ids), x0=None)
    state = space.hidden(backbone, certain, positions(ids))
    torch.testing.assert_close(state, backbone.embed(ids), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(backbone.suffix(state, 0), backbone.forward(ids), rtol=1e-3, atol=1e-3)
    # Uncertain between two tokens: the mean of their embeddings.
    rows = space.rows(backbone)
    pair = 40 * (rows[5] + rows[9])
    between = Estimate(features=pair.expand(1, 3, -1), x0=None)
    share = space.logits(backbone, between.features).softmax(-1)[0, 0]
    where = torch.arange(3)[None]
    expected = sum(share[w] * backbone.embed(torch.full((1, 3), w), position_ids=where) for w in range(97))
    torch.testing.assert_close(space.hidden(backbone, between, where), expected, rtol=1e-3, atol=1e-3)


def test_gradients_reach_the_network_through_hidden() -> None:
    space = space_of()
    features = torch.randn(2, 5, 32, requires_grad=True)
    where = torch.arange(5).expand(2, 5)
    space.hidden(BACKBONE, Estimate(features=features, x0=None), where).square().sum().backward()
    assert features.grad is not None
    assert features.grad.abs().sum() > 0


def test_the_table_is_made_again_when_its_sources_change() -> None:
    space = build_space(MethodConfig(split=0, space="embedding"), dim=32, vocab=97)
    before = space.rows(BACKBONE)
    assert space.rows(BACKBONE) is before
    space.load_state_dict(space_of().state_dict())
    assert torch.equal(space.rows(BACKBONE), space_of().rows(BACKBONE))
    assert not torch.equal(space.rows(BACKBONE), before)
    other = tiny_backbone(seed=3)
    assert not torch.equal(space.rows(other), space.rows(BACKBONE))
    assert sum(b.numel() for b in space.buffers()) == 32 + 32 * 32  # no table in a checkpoint
    assert not list(space.parameters())


def test_a_walk_with_the_exact_posterior_of_one_token_language_ends_in_tokens_of_it() -> None:
    """Denoiser exact for the prior pi: the walk must draw tokens with frequencies pi."""
    space = space_of(dim=8)
    process = build_process(ProcessConfig(schedule="log_linear", log_snr_max=6.0))
    allowed, share = torch.tensor([5, 9, 11]), torch.tensor([0.6, 0.3, 0.1])
    rows = space.rows(BACKBONE)
    table = rows[allowed]

    def estimate(noised: torch.Tensor, t: torch.Tensor) -> Estimate:
        alpha, sigma = process.schedule.alpha(t)[0], process.schedule.sigma(t)[0]
        posterior = ((alpha / sigma**2) * noised @ table.T + share.log()).softmax(-1)
        return Estimate(features=posterior, x0=None)

    # Score interpolation over these three tokens.
    space.feedback = lambda backbone, last: last.features @ table  # type: ignore[method-assign]
    ids = ids_of(256, 4)
    last = space.walk(
        process,
        estimate,
        lambda estimate, t: None,
        key(ids),
        (256, 4),
        backbone=BACKBONE,
        times=time_grid(300),
        sampler="ancestral",
        weight=0.0,
        temperature=lambda t: 0.0,
    )
    drawn = last.features.argmax(-1).flatten()
    found = torch.bincount(drawn, minlength=3) / drawn.numel()
    torch.testing.assert_close(found, share, rtol=0, atol=0.05)  # about three standard errors
    assert last.features.amax(-1).mean() > 0.99


def toy(rows: torch.Tensor) -> tuple[EmbeddingSpace, Any]:
    """A space over given rows, of which only lengths of one are asked for, and the little of a backbone it needs."""
    vocab, dim = rows.shape
    backbone = SimpleNamespace(
        input_embedding=SimpleNamespace(weight=rows), dtype=torch.float32, device=torch.device("cpu")
    )
    return EmbeddingSpace(EmbeddingConfig(output_prior=False), dim, vocab, chunk=4096), backbone


def bound_of(space: EmbeddingSpace, backbone: Any, process: Process, logits: Any, token: int) -> tuple[float, float]:
    """The bound on one token's -log p by many samples on an even grid of times, and its standard error."""
    batch, time = 8192, 8
    ids = torch.full((batch, time), token)
    t = (torch.arange(batch) + 0.5) / batch
    noise_key = NoiseKey(seed=1, purpose="bound", ids=torch.arange(batch * time).view(batch, time))
    rows = space.rows(backbone)
    inverse = torch.linalg.pinv(torch.cat([rows, torch.ones(len(rows), 1)], 1))

    def estimate(noised: torch.Tensor, t: torch.Tensor) -> Estimate:
        # features with features . e_w = logits up to a constant: solved, as rows span what is needed.
        wanted = logits(noised, t.view(-1, 1, 1))
        return Estimate(features=(wanted @ inverse.T)[..., :-1], x0=None)

    terms = space.bound_terms(backbone, process, estimate, ids, t, noise_key, torch.ones_like(ids, dtype=torch.bool))
    each = terms.reconstruction + terms.diffusion + terms.prior
    torch.testing.assert_close(terms.total, each.mean(), rtol=1e-4, atol=1e-4)
    return each.mean().item(), each.std().item() / each.numel() ** 0.5


def test_the_bound_is_the_exact_likelihood_for_an_exact_denoiser() -> None:
    """A denoiser exact for a prior pi defines p(x) = pi(x), and the bound is tight: -log pi(x) for every x."""
    generator = torch.Generator().manual_seed(0)
    space, backbone = toy(torch.randn(5, 6, generator=generator))
    prior = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    process = Process(LogLinear(8.0))
    rows = space.rows(backbone)

    def logits(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return prior.log() + process.schedule.alpha(t) / process.schedule.sigma(t) ** 2 * (z @ rows.T)

    for token in range(5):
        bound, error = bound_of(space, backbone, process, logits, token)
        assert error < 0.04
        assert bound == pytest.approx(-prior[token].log().item(), abs=4 * error)


def exact_nll(process: Process, mean_of: Any, read: Any, steps: int = 200) -> torch.Tensor:
    """-log p(x) of a two-token model on the line, by quadrature over every step of its chain from noise."""
    schedule = process.schedule
    grid = torch.linspace(-6, 6, 501, dtype=torch.float64)
    width = grid[1] - grid[0]
    density = torch.exp(-(grid**2) / 2) / (2 * torch.pi) ** 0.5
    at = lambda f, u: f(torch.tensor(u, dtype=torch.float64)).item()  # noqa: E731
    for step in range(steps, 0, -1):
        t, s = step / steps, (step - 1) / steps
        a_t, s_t, a_s, s_s = (at(f, u) for u in (t, s) for f in (schedule.alpha, schedule.sigma))
        added = s_t**2 - (a_t / a_s * s_s) ** 2
        mean = a_t / a_s * s_s**2 / s_t**2 * grid + a_s * added / s_t**2 * mean_of(grid, t)
        variance = added * s_s**2 / s_t**2
        kernel = torch.exp(-((grid[:, None] - mean) ** 2) / (2 * variance)) / (2 * torch.pi * variance) ** 0.5
        density = kernel @ density * width
    assert (density.sum() * width).item() == pytest.approx(1.0, abs=1e-3)
    return -((read(grid)[:, None, :] * density[:, None, None]).sum(0).squeeze(0) * width).log()


@pytest.mark.parametrize(("gain", "lean"), [(1.0, 0.0), (0.5, 0.4), (1.6, -0.3)])
def test_the_bound_holds_for_wrong_denoisers_too(gain: float, lean: float) -> None:
    """Two tokens at +1 and -1: p(x) by quadrature. The bound is never below; for the exact denoiser it is equal."""
    space, backbone = toy(torch.tensor([[1.0], [-1.0]]))
    process = Process(LogLinear(4.0))

    def margin(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return gain * process.schedule.alpha(t) / process.schedule.sigma(t) ** 2 * z + lean

    def logits(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.cat([margin(z, t), -margin(z, t)], -1)

    exact = exact_nll(
        process,
        lambda z, t: torch.tanh(margin(z, torch.tensor(t, dtype=torch.float64))),
        lambda z: logits(z[:, None], torch.zeros(1, 1, dtype=torch.float64)).softmax(-1),
    )
    assert torch.exp(-exact).sum().item() == pytest.approx(1.0, abs=1e-3)
    gaps = []
    for token in (0, 1):
        bound, error = bound_of(space, backbone, process, logits, token)
        assert error < 0.02
        gaps.append(bound - exact[token].item())
        assert gaps[-1] > -4 * error
        if gain == 1.0:
            assert gaps[-1] < 4 * error
    if gain != 1.0:
        assert sum(gaps) / 2 > 0.02


def test_the_bound_trains_the_network() -> None:
    space = space_of()
    process = build_process(ProcessConfig(schedule="gumbel"))
    ids = ids_of()
    out = torch.zeros(4, 12, 32, requires_grad=True)

    def estimate(noised: torch.Tensor, t: torch.Tensor) -> Estimate:
        return space.interpret(process, out, noised, t, positions(ids))

    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, :6] = False
    terms = space.bound_terms(BACKBONE, process, estimate, ids, torch.full((4,), 0.6), key(ids), counted)
    terms.total.backward()
    assert torch.equal(out.grad.abs().sum(-1) > 0, counted)


def test_refusals() -> None:
    with pytest.raises(UsageError, match=r"method\.split to 0"):
        build_space(MethodConfig(split=3, space="embedding"), dim=32, vocab=97)
    with pytest.raises(UsageError, match="hidden size"):
        build_space(MethodConfig(split=0, space="embedding", embedding=EmbeddingConfig(dim=64)), dim=32, vocab=97)
    bound = EmbeddingConfig(bound=True)
    with pytest.raises(UsageError, match="gumbel or log_linear"):
        build_space(MethodConfig(split=0, space="embedding", embedding=bound), dim=32, vocab=97)
    gumbel = ProcessConfig(schedule="gumbel")
    with pytest.raises(UsageError, match="terminal_fraction"):
        build_space(MethodConfig(split=0, space="embedding", embedding=bound, process=gumbel), dim=32, vocab=97)
    uniform = TimeConfig(terminal_fraction=0.0)
    build_space(
        MethodConfig(split=0, space="embedding", embedding=bound, process=gumbel, time=uniform), dim=32, vocab=97
    )
