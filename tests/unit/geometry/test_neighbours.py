"""Neighbours and local curvature against brute force, and on data with known answers."""

from __future__ import annotations

import math

import pytest
import torch

from dihal.geometry import neighbours
from dihal.geometry.neighbours import FLOOR, _smallest, candidates, curvature, local_spread


def brute_force(points: torch.Tensor, anchors: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = points.double()
    distance = torch.cdist(x[anchors], x, compute_mode="donot_use_mm_for_euclid_dist")
    distance[torch.arange(len(anchors)), anchors] = torch.inf
    near = distance.topk(k, largest=False)
    variance = x[near.indices].var(1, correction=1).sum(-1) / x.shape[1]
    return variance, near.values.square() / x.shape[1]


def cloud(n: int, d: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, d, generator=generator) * 3
    return centres[torch.randint(20, (n,), generator=generator)] + torch.randn(n, d, generator=generator) * 0.3


@pytest.mark.parametrize(("n", "d", "k"), [(2000, 24, 32), (60, 8, 32), (40, 5, 38)])
def test_local_spread_equals_brute_force_in_fp64(n: int, d: int, k: int) -> None:
    points = cloud(n, d)
    points = points - points.mean(0)
    anchors = torch.randperm(n, generator=torch.Generator().manual_seed(1))[:50]
    found = local_spread(points, anchors, k)
    variance, distance = brute_force(points, anchors, k)
    torch.testing.assert_close(found.variance, variance, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.nearest, distance[:, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.farthest, distance[:, -1], rtol=1e-5, atol=0)


def test_an_anchor_far_from_a_tight_cluster_keeps_its_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(33, 16, generator=generator) * 1e-3
    points[0] += 10
    found = local_spread(points, torch.tensor([0]), 32)
    variance, _ = brute_force(points, torch.tensor([0]), 32)
    torch.testing.assert_close(found.variance, variance, rtol=1e-5, atol=0)


@pytest.mark.parametrize("columns", [50, 1283, 4096])
def test_grouped_search_equals_topk(columns: int) -> None:
    scores = torch.randn(30, columns, generator=torch.Generator().manual_seed(columns))
    expected = scores.topk(40, largest=False).indices.sort(1).values
    assert torch.equal(_smallest(scores, 40).sort(1).values, expected)


def test_the_anchor_is_not_its_own_neighbour() -> None:
    points = cloud(100, 4)
    anchors = torch.arange(100)
    assert not (candidates(points, anchors, 40) == anchors[:, None]).any()


def test_clusters_show_their_own_variance_not_the_mixture() -> None:
    # 40 clusters of k + 1 members: an anchor's neighbours are its own cluster without itself.
    k, d, sigma, clusters = 32, 10, 0.02, 40
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(clusters, d, generator=generator)
    points = (centres[:, None] + sigma * torch.randn(clusters, k + 1, d, generator=generator)).flatten(0, 1)
    found = local_spread(points - points.mean(0), torch.arange(0, len(points), 5), k)
    kappa = float(curvature(found.variance, 1.0).median())
    assert kappa == pytest.approx(-math.log(sigma**2), abs=0.02)


def test_isotropic_neighbourhood_of_all_points_is_the_global_variance() -> None:
    # with k = n - 1 the neighbourhood is everything: kappa = -log(variance)
    points = 0.5 * torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
    found = local_spread(points, torch.arange(8), 3999)
    torch.testing.assert_close(found.variance, torch.full((8,), 0.25, dtype=torch.float64), rtol=0.02, atol=0)


def test_duplicates_hit_the_floor_and_stay_finite() -> None:
    points = torch.cat([torch.ones(40, 3), torch.randn(100, 3, generator=torch.Generator().manual_seed(0)) * 5])
    found = local_spread(points, torch.arange(0, 60), 32)
    assert (found.variance[:40] == 0).all()
    assert (found.nearest[:40] == 0).all()
    bend = curvature(found.variance, 2.0)
    assert bend.isfinite().all()
    assert float(bend[0]) == pytest.approx(-math.log(2.0 * FLOOR))


@pytest.mark.parametrize("scale", [8.0, 2.0**-7])
def test_scale_moves_the_curvature_exactly(scale: float) -> None:
    points = cloud(500, 12)
    points[:40] = points[0]  # floored anchors move too
    anchors = torch.arange(0, 500, 9)
    before = curvature(local_spread(points, anchors, 32).variance, 1.7)
    after = curvature(local_spread(scale * points, anchors, 32).variance, 1.7 * scale**2)
    torch.testing.assert_close(after - before, torch.full_like(before, -2 * math.log(scale)), rtol=1e-12, atol=1e-12)


def test_rotation_and_token_order_leave_the_curvature() -> None:
    points = cloud(800, 16)
    anchors = torch.arange(0, 800, 11)
    before = local_spread(points, anchors, 32).variance
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2)))[0]
    torch.testing.assert_close(local_spread(points @ rotation, anchors, 32).variance, before, rtol=1e-5, atol=0)
    order = torch.randperm(800, generator=torch.Generator().manual_seed(3))
    where = order.argsort()
    torch.testing.assert_close(local_spread(points[order], where[anchors], 32).variance, before, rtol=1e-6, atol=0)


ADVERSE = ("plain", "far cluster", "far anchor", "one channel", "copies", "scattered sizes")


def adverse(kind: str) -> torch.Tensor:
    """Centred points on which rounding could tell."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 96, generator=generator) * torch.logspace(0, -2, 96)
    if kind == "far cluster":
        x[:100] = x[:100] * 0.3 + 3  # fp32 scores still tell its members apart
    if kind == "far anchor":
        x[::40] += 100
    if kind == "one channel":
        x[:, 3] += 20 * torch.randn(1500, generator=generator)
    if kind == "copies":
        x[200:260] = x[200]
    if kind == "scattered sizes":
        x *= torch.logspace(-1, 2, 1500)[torch.randperm(1500, generator=generator)][:, None]
    return x - x.mean(0)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_splits", lambda points: True)
    monkeypatch.setattr(neighbours, "half_product", lambda a, b: a.float() @ b.float())
    monkeypatch.setattr(neighbours, "_measured_on_cpu", neighbours._measured_on_gpu)


@pytest.mark.parametrize("kind", ADVERSE)
def test_neighbours_as_on_a_gpu_are_exact(kind: str, as_on_a_gpu: None) -> None:
    points, k = adverse(kind), 32
    anchors = torch.arange(0, 1500, 20)
    found = local_spread(points, anchors, k)
    variance, distance = brute_force(points, anchors, k)
    size = float(points.double().square().sum(1).mean()) / points.shape[1]
    torch.testing.assert_close(found.nearest, distance[:, 0], rtol=1e-5, atol=1e-13 * size)
    torch.testing.assert_close(found.farthest, distance[:, -1], rtol=1e-5, atol=1e-13 * size)
    torch.testing.assert_close(found.variance, variance, rtol=1e-5, atol=1e-13 * size)
    if kind == "copies":
        assert (found.variance[anchors.ge(200) & anchors.lt(260)] < 1e-12 * size).all()  # far below the floor
        assert (found.nearest[anchors.ge(200) & anchors.lt(260)] == 0).all()


@pytest.mark.parametrize("kind", ADVERSE)
def test_a_product_of_halves_is_within_its_bound(kind: str, as_on_a_gpu: None) -> None:
    points, block = adverse(kind), torch.arange(0, 1500, 7)
    found = neighbours._split_product(neighbours._halves(points), block).double()
    exact = points[block].double() @ points.double().mT
    bound = points[block].double().abs() @ points.double().abs().mT
    assert bool(((found - exact).abs() <= 2.0**-15 * bound).all())
