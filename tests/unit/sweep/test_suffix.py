from __future__ import annotations

import pytest
import torch

from dihal.backbone import Backbone
from dihal.config import ScoreConfig
from dihal.geometry.windows import Draw, draw_documents
from dihal.sweep.states import ratio_of_sums
from dihal.sweep.suffix import Sensitivity, _shortened, fisher_indicators, state_gradients
from tests.kit import tiny_backbone
from tests.unit.geometry.test_windows import documents

CONFIG = ScoreConfig(tokens=2000, sequence_length=24)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


@pytest.fixture(scope="module")
def draw(backbone: Backbone) -> Draw:
    return draw_documents(backbone, documents(40), CONFIG)


def gradients(backbone: Backbone, draw: Draw, *, tokens: int = 300, batch_tokens: int = 100, seed: int = 0):
    return state_gradients(backbone, draw, tokens=tokens, batch_tokens=batch_tokens, chunk=7, seed=seed)


def ordered(found: Sensitivity) -> torch.Tensor:
    """Gradients in an order that does not depend on how windows were grouped."""
    return found.gradient[found.norms.argsort()]


def test_as_many_documents_as_possible_are_read(draw: Draw) -> None:
    short, chosen = _shortened(draw, 200)
    assert 200 <= short.tokens < 224
    assert len(set(short.document.tolist())) == len(short.windows), "one window of a document before its second"
    assert all(torch.equal(draw.windows[i], window) for i, window in zip(chosen.tolist(), short.windows))
    everything, _ = _shortened(draw, 10**6)
    assert everything.tokens == draw.tokens


def test_neither_batches_nor_chunks_nor_other_tokens_matter(backbone: Backbone, draw: Draw) -> None:
    one, other = gradients(backbone, draw), gradients(backbone, draw, batch_tokens=1000)
    for a, b in zip(one, other):
        torch.testing.assert_close(ordered(a), ordered(b), atol=1e-4, rtol=1e-3)
    another = gradients(backbone, draw, seed=1)
    assert not torch.allclose(ordered(one[1]), ordered(another[1]), atol=0.1)
    few, more = gradients(backbone, draw, tokens=100)[2], one[2]
    # Tokens are told apart by their states' norms; first tokens are all alike.
    norms, gradient = more.norms[~more.first], more.gradient[~more.first]
    same = (norms - few.norms[~few.first][:, None]).abs().argmin(1)
    torch.testing.assert_close(norms[same], few.norms[~few.first])
    torch.testing.assert_close(gradient[same], few.gradient[~few.first], atol=1e-4, rtol=1e-3)


def test_the_backbone_is_left_alone(backbone: Backbone, draw: Draw) -> None:
    gradients(backbone, draw, tokens=50)
    assert not backbone.input_embedding._forward_hooks
    assert all(weight.grad is None and not weight.requires_grad for weight in backbone.model.parameters())


def test_half_a_product_with_fisher_is_the_kl_of_small_errors(backbone: Backbone, draw: Draw) -> None:
    """The reason for taking tr(F R) / 2: measured against the KL that Gaussian errors of covariance R really cause."""
    split, scale = 2, 0.02
    found = gradients(backbone, draw, tokens=2000, batch_tokens=480)[split]
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(32, 32, generator=generator) / 32**0.5
    one = torch.ones(len(found.gradient))
    quadratic = (found.gradient @ mixing).square().sum(1)
    predicted, _ = ratio_of_sums(0.5 * scale**2 * quadratic, one, found.document, None)
    total, count = 0.0, 0
    for window in draw.windows:
        ids = window[None].long()
        clean = backbone.prefix(ids, split)
        error = scale * torch.randn(clean.shape, generator=generator) @ mixing.T
        p = backbone.suffix(clean, split).double().log_softmax(-1)
        q = backbone.suffix(clean + error, split).double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
        count += ids.numel()
    assert total / count == pytest.approx(predicted, rel=0.15)


def test_indicators_of_known_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    document = torch.arange(6000) % 5
    std = torch.tensor([2.0, 1.0, 0.5, torch.inf])
    true = torch.tensor([1.0, 1.0, 2.0, 50.0])  # deviations; times std: 2, 1, 1, and a channel that never moves
    found = Sensitivity(
        gradient=torch.randn(6000, 4, generator=generator) * true,
        norms=torch.cat([torch.ones(5900), torch.full((100,), 99.0)]),
        first=torch.arange(6000) < 500,
        document=document,
    )
    found.gradient[-100:] *= 1e3  # sinks
    found.gradient[:500] *= 1e3
    residual = torch.randn(4000, 4, generator=generator) * torch.tensor([1.0, 3.0, 0.0, 0.0])
    counts = torch.ones(2, 5, dtype=torch.int64)
    counts[1] = torch.tensor([2, 2, 1, 0, 0])
    values = fisher_indicators(found, std, 10.0, residual, torch.arange(4000) % 5, counts, drop_first=True)
    e = torch.tensor([4.0, 1.0, 1.0])
    share = e / e.sum()
    expected = {
        "fisher_trace": float(e.sum().log()),
        "fisher_rank": float(-(share * share.log()).sum()),
        "fisher_kl": float(torch.tensor(0.5 * (4 * 1 + 1 * 9)).log()),
    }
    for name, (value, rows) in values.items():
        assert value == pytest.approx(expected[name], abs=0.06), name
        assert rows is not None
        assert float(rows[0]) == pytest.approx(value, abs=1e-6), name
        assert 0 < abs(float(rows[1]) - value) < 0.1, name
    kept = fisher_indicators(found, std, torch.inf, residual, torch.arange(4000) % 5, None, drop_first=False)
    assert kept["fisher_trace"][0] > values["fisher_trace"][0] + 5
    assert kept["fisher_trace"][1] is None
