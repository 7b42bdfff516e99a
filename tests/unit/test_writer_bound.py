"""The likelihood bound of writers: exact where the denoiser is, and a bound where it is not."""

from __future__ import annotations

import math

import pytest
import torch

from dihal.config import ProcessConfig
from dihal.diffusion.process import Process, build_process
from dihal.errors import UsageError
from dihal.spaces.base import Estimate
from dihal.writing.bound import PathBound, cut_levels, nll_bound, path_bound, state_errors
from tests.kit import tiny_backbone
from tests.unit.test_methods import make_batch
from tests.unit.test_writer import build, prefixes

CODES = torch.tensor([[1.5, 0.0], [-0.5, 1.0], [-0.5, -1.2], [0.3, 0.4]], dtype=torch.float64)
"""Clean states of four tokens."""
PRIOR = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
"""Law of the toy model, whose likelihood is exactly this."""
DRAWS = 20_000


def toy_bound(process: Process, token: int, *, wrong: float = 0.0, cuts: int = 9) -> PathBound:
    """One position, one token, ``DRAWS`` independent draws. The denoiser is Bayes' rule; ``wrong`` blunts its estimate."""
    clean = CODES[token].expand(DRAWS, 1, 2)
    generator = torch.Generator().manual_seed(token)

    def estimate(noised: torch.Tensor, t: torch.Tensor) -> Estimate:
        alpha, sigma = process.schedule.alpha(t.double()), process.schedule.sigma(t.double())
        distance = (noised.double() - alpha[:, None, None] * CODES).square().sum(-1)
        log_posterior = (PRIOR.log() - distance / (2 * sigma**2)[:, None]).log_softmax(-1)
        x0 = (log_posterior.exp() @ CODES)[:, None]
        return Estimate(features=log_posterior[:, None].float(), x0=((1 - wrong) * x0).float())

    return path_bound(
        process,
        clean.float(),
        torch.ones(DRAWS, 1, dtype=torch.bool),
        estimate,
        lambda found: found.x0,
        lambda found: {"own": -found.features[:, 0, token]},
        lambda purpose: torch.randn(clean.shape, generator=generator),
        lambda purpose: torch.rand(DRAWS, generator=generator, dtype=torch.float64),
        cuts=cuts,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "cosine"},
        {"schedule": "tan", "shift": 5.0},
        {"schedule": "linear"},
        {"schedule": "log_linear", "log_snr_max": 5.0},
        {"schedule": "gumbel"},
    ],
    ids=lambda options: options["schedule"],
)
def test_the_bound_of_an_exact_denoiser_is_the_likelihood_at_every_cut(options) -> None:
    process = build_process(ProcessConfig(**options))
    worst = 0.0
    for token in range(len(CODES)):
        found = toy_bound(process, token)
        total = found.total("own")
        error = total.std(0) / math.sqrt(DRAWS)
        exact = -PRIOR[token].log()
        # At the first cut nothing is read and all is told by the prior, at the last nearly all by the path.
        assert ((total.mean(0) - exact).abs() < 5 * error + 3e-3).all()
        worst = max(worst, float(error.max()))
    assert worst < 0.05, "the estimate is too noisy to tell anything"


def test_path_and_reading_trade_places_along_the_cuts() -> None:
    found = toy_bound(build_process(ProcessConfig(schedule="cosine")), 1)
    assert found.reading["own"].mean(0)[0] == pytest.approx(-float(PRIOR[1].log()), abs=0.01)
    assert found.reading["own"].mean(0)[-1] < 0.05
    assert found.path.mean(0)[0] < 0.01
    assert (found.path.diff(dim=1) >= 0).all()


def test_a_worse_denoiser_has_a_looser_bound() -> None:
    process = build_process(ProcessConfig(schedule="cosine"))
    exact = toy_bound(process, 0).total("own").mean(0)
    blunt = toy_bound(process, 0, wrong=0.3).total("own").mean(0)
    assert (blunt[4:] > exact[4:] + 0.005).all()
    assert blunt[-1] > exact[-1] + 1


def test_cuts_stay_within_the_schedule_and_the_range() -> None:
    wide = cut_levels(build_process(ProcessConfig(schedule="cosine")), 5)
    assert wide.tolist() == pytest.approx([-12, -7.5, -3, 1.5, 6])
    narrow = cut_levels(build_process(ProcessConfig(schedule="log_linear", log_snr_max=4.0)), 3)
    assert narrow.tolist() == pytest.approx([-4, 0, 4])


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


@pytest.mark.parametrize("space", ["hidden", "latent", "embedding"])
def test_a_row_has_the_same_bound_in_any_batch(backbone, space) -> None:
    writer = build(backbone, space)
    ids, known = make_batch(3, 16).input_ids, prefixes(1, 4, 9)
    options = {"cuts": 4, "seed": 3}
    together = nll_bound(writer, backbone, ids, known, sample_ids=torch.arange(3), **options)
    assert set(together.reading) == {"own", "suffix", "fused"}
    assert together.tokens.tolist() == [15, 12, 7]
    for row in range(3):
        part = slice(row, row + 1)
        alone = nll_bound(writer, backbone, ids[part], known[part], sample_ids=torch.tensor([row]), **options)
        for name in together.reading:
            torch.testing.assert_close(alone.total(name)[0], together.total(name)[row], rtol=1e-4, atol=1e-4)
    other = nll_bound(writer, backbone, ids, known, sample_ids=torch.arange(3), cuts=4, seed=4)
    assert not torch.equal(other.path, together.path)


def test_the_stack_reads_true_states_where_there_is_next_to_no_noise(backbone) -> None:
    """At the last cut an exact estimate gives the backbone's own likelihood of every token."""
    writer = build(backbone, "hidden")
    ids, known = make_batch(2, 16).input_ids, prefixes(4, 4)
    state = writer.space.encode(backbone, ids)
    original = writer.estimate
    writer.estimate = lambda *inputs: (original(*inputs)[0], Estimate(features=state, x0=state))
    found = nll_bound(writer, backbone, ids, known, cuts=2, seed=0, sample_ids=torch.arange(2))
    logits = backbone.suffix(backbone.prefix(ids, 0), 0)[:, 3:-1]
    exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 4:].flatten(), reduction="none")
    torch.testing.assert_close(found.reading["suffix"][:, -1], exact.view(2, -1).sum(-1).double(), rtol=1e-3, atol=1e-2)
    assert (found.path == 0).all(), "an exact estimate walks for free"


@pytest.mark.parametrize("space", ["hidden", "latent", "embedding"])
def test_state_errors_are_those_of_the_estimates_and_of_no_batch(backbone, space, monkeypatch) -> None:
    writer = build(backbone, space)
    ids, known = make_batch(3, 16).input_ids, prefixes(1, 4, 9)
    options = {"times": [0.1, 0.9], "seed": 3}
    found = state_errors(writer, backbone, ids, known, sample_ids=torch.arange(3), **options)
    assert found.tokens.tolist() == [15, 12, 7]
    clean = writer.space.encode(backbone, ids, state=backbone.prefix(ids, writer.split)).double()
    torch.testing.assert_close(found.variance, (clean.square().sum(-1) * ~known).sum(-1))
    for row in range(3):
        part = slice(row, row + 1)
        alone = state_errors(writer, backbone, ids[part], known[part], sample_ids=torch.tensor([row]), **options)
        for name in ("squared_error", "cosine"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(found, name)[row], rtol=1e-4, atol=1e-4)

    # Estimates that are known: a share of the state itself.
    for share, cosine in ((1.0, 1.0), (0.5, 1.0), (-1.0, -1.0)):
        monkeypatch.setattr(writer.space, "clean_estimate", lambda *_, share=share: (share * clean).float())
        found = state_errors(writer, backbone, ids, known, sample_ids=torch.arange(3), **options)
        wanted = (1 - share) ** 2 * found.variance[:, None].expand(-1, 2)
        torch.testing.assert_close(found.squared_error, wanted, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(
            found.cosine, cosine * found.tokens[:, None].double().expand(-1, 2), rtol=1e-5, atol=0
        )


def test_less_noise_leaves_more_of_a_state(backbone) -> None:
    """An untrained network that gives back what it reads, which is noise at one end and the state at the other."""
    writer = build(backbone, "hidden")
    ids, known = make_batch(2, 16).input_ids, prefixes(4, 4)
    original, process = writer.estimate, writer.process

    def echo(noised: torch.Tensor, t: torch.Tensor, *rest: object) -> tuple[torch.Tensor, Estimate]:
        scale = process.schedule.alpha(t) / (process.schedule.alpha(t) ** 2 + process.schedule.sigma(t) ** 2)
        return original(noised, t, *rest)[0], Estimate(features=noised, x0=scale[:, None, None] * noised)

    writer.estimate = echo
    times = [0.05, 0.35, 0.65, 0.95]
    found = state_errors(writer, backbone, ids, known, times=times, seed=0, sample_ids=torch.arange(2))
    left = found.squared_error.sum(0) / found.variance.sum()
    snr = process.schedule.log_snr(torch.tensor(times, dtype=torch.float64)).exp()
    # Of a state of unit variance per channel, the best linear estimate leaves 1 / (1 + SNR).
    assert left.tolist() == pytest.approx((1 / (1 + snr)).tolist(), rel=0.15)


def test_what_has_no_bound_is_refused(backbone) -> None:
    ids, rows = make_batch(2, 16).input_ids, torch.arange(2)
    with pytest.raises(UsageError, match="'simplex' has no such bound"):
        nll_bound(build(backbone, "simplex"), backbone, ids, prefixes(4, 4), cuts=2, seed=0, sample_ids=rows)
    writer = build(backbone, "hidden")
    with pytest.raises(UsageError, match="at least 1"):
        nll_bound(writer, backbone, ids, prefixes(4, 4), cuts=0, seed=0, sample_ids=rows)
    for wrong in (prefixes(0, 4), prefixes(16, 4), ~prefixes(4, 4)):
        with pytest.raises(UsageError, match="must be a prefix"):
            nll_bound(writer, backbone, ids, wrong, cuts=2, seed=0, sample_ids=rows)
