"""The Fisher metric against the exact Fisher information of a small model."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.functional import jacobian

from dihal.config.method import ObjectiveConfig
from dihal.data.batch import Batch
from dihal.errors import UsageError
from dihal.spaces.hidden import HiddenSpace
from dihal.spaces.metric import ChannelMetric, FisherMetric, build_metric
from tests.kit import tiny_backbone

LENGTH = 6


def batch_of(ids: torch.Tensor, first: int = 0) -> Batch:
    real = torch.ones_like(ids, dtype=torch.bool)
    return Batch(
        input_ids=ids,
        attention_mask=real,
        document_ids=torch.zeros_like(ids),
        loss_mask=real,
        sample_ids=torch.arange(first, first + len(ids)),
        full=True,
    )


def space_of(dim: int) -> HiddenSpace:
    space = HiddenSpace(1, dim)
    space.std.copy_(torch.linspace(2.0, 8.0, dim))  # no token counts as an outlier
    return space


def exact(backbone, space: HiddenSpace, ids: torch.Tensor) -> torch.Tensor:
    """Sum over positions j of J_j^T (diag p_j - p_j p_j^T) J_j, summed over the states' positions but the first."""
    positions = torch.arange(ids.shape[1])[None]
    z = space.normalise(backbone.prefix(ids, space.split), positions)

    def log_probabilities(state: torch.Tensor) -> torch.Tensor:
        return backbone.suffix(space.denormalise(state, positions), space.split)[0].log_softmax(-1)

    slopes = jacobian(log_probabilities, z)[:, :, 0].double()  # (output position, vocab, state position, dim)
    p = log_probabilities(z).exp().detach().double()
    total = torch.zeros(z.shape[-1], z.shape[-1], dtype=torch.float64)
    for state in range(1, ids.shape[1]):
        for output in range(ids.shape[1]):
            g = slopes[output, :, state]
            total += g.T @ (p[output, :, None] * g)
    return total


def test_estimate_is_the_exact_fisher_information() -> None:
    backbone = tiny_backbone("llama")
    space = space_of(backbone.hidden_size)
    ids = torch.randint(3, backbone.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    wanted = exact(backbone, space, ids)
    wanted *= backbone.hidden_size / wanted.trace()
    draws = 8_192
    metric = FisherMetric(backbone.hidden_size, 0.0, draws * LENGTH)
    found = metric.fit(backbone, space, (batch_of(ids.expand(1024, -1), 1024 * i) for i in range(8)), seed=0, chunk=999)
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error < 0.05  # about 1 / sqrt(draws) times a small constant
    torch.testing.assert_close(metric.root @ metric.root, found, rtol=1e-3, atol=1e-3)


def test_floor_mixes_the_identity_and_the_metric_stays_out_of_checkpoints() -> None:
    backbone = tiny_backbone("llama")
    dim = backbone.hidden_size
    ids = torch.randint(3, backbone.vocab_size, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    metric = build_metric(ObjectiveConfig(metric="fisher", metric_floor=1.0), dim)
    assert isinstance(metric, FisherMetric)
    metric.fit(backbone, space_of(dim), [batch_of(ids)], seed=0, chunk=64)
    torch.testing.assert_close(metric.root, torch.eye(dim), rtol=1e-5, atol=1e-5)
    assert not metric.state_dict()
    error = torch.randn(2, 3, dim)
    assert build_metric(ObjectiveConfig(), dim)(error) is error
    assert isinstance(build_metric(ObjectiveConfig(), dim), ChannelMetric)


def test_a_suffix_that_never_reacts_is_refused() -> None:
    backbone = tiny_backbone("llama")
    space = space_of(backbone.hidden_size)
    space.std.zero_()  # the state no longer depends on z
    ids = torch.randint(3, backbone.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with pytest.raises(UsageError, match="Fisher"):
        FisherMetric(backbone.hidden_size, 0.1, 64).fit(backbone, space, [batch_of(ids)], seed=0, chunk=64)
