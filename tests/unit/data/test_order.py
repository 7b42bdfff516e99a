from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from dihal.data.order import draw, micro_batches, permute, sample_order


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1024, 1025, 4096, 65_537])
def test_permute_is_a_bijection(size):
    done = permute(np.arange(size), size, "order", 0, 0)
    assert np.array_equal(np.sort(done), np.arange(size))


def test_permute_is_stateless_per_index():
    whole = permute(np.arange(500), 500, 3, 1)
    some = np.array([499, 0, 17, 17])
    assert np.array_equal(permute(some, 500, 3, 1), whole[some])


def test_permute_depends_on_every_part_of_the_key():
    orders = [tuple(permute(np.arange(50), 50, *key)) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert len(set(orders)) == 4


def test_permute_reaches_all_orders_evenly():
    trials = 4_800
    seen = Counter(tuple(permute(np.arange(4), 4, "t", trial)) for trial in range(trials))
    assert len(seen) == 24
    # chi-squared with 23 degrees of freedom: 99.99 % quantile is 55
    expected = trials / 24
    assert sum((n - expected) ** 2 / expected for n in seen.values()) < 55


def test_permute_moves_a_large_range_far():
    size = 10_000
    done = permute(np.arange(size), size, 0)
    # the rank correlation of a random permutation has standard deviation 1/sqrt(size)
    assert abs(np.corrcoef(np.arange(size), done)[0, 1]) < 5 / np.sqrt(size)


def test_permute_handles_sizes_beyond_32_bits():
    size = (1 << 40) + 7
    some = permute(np.array([0, 1, size - 1]), size, 0)
    assert len(set(some.tolist())) == 3
    assert some.min() >= 0
    assert some.max() < size


def test_draw_is_a_fixed_function():
    # pinned: a change here silently changes every run
    assert [draw(1_000, "offset", 0, epoch) for epoch in range(4)] == PINNED_DRAWS
    assert [permute(np.arange(6), size, "order", 0, 0).tolist() for size in (6, 1 << 20)] == PINNED_ORDERS


PINNED_DRAWS = [40, 179, 750, 970]
PINNED_ORDERS = [[5, 1, 0, 4, 2, 3], [89197, 449277, 967018, 624621, 63672, 506031]]


def test_sample_order_covers_each_epoch_and_reshuffles():
    epochs, windows = sample_order(np.arange(30), 10, seed=5)
    assert epochs.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    parts = windows.reshape(3, 10)
    assert all(sorted(part) == list(range(10)) for part in parts.tolist())
    assert len({tuple(part) for part in parts.tolist()}) == 3


def _first(n, **plan):
    return [batch.tolist() for batch in itertools.islice(micro_batches(**plan), n)]


def test_ranks_together_consume_the_run_in_order():
    for world in (1, 2, 4):
        size = 8 // world
        ranks = [_first(5, start=16, batch_size=size, rank=r, world_size=world) for r in range(world)]
        for step in range(5):
            together = [k for r in range(world) for k in ranks[r][step]]
            assert together == list(range(16 + 8 * step, 24 + 8 * step))


def test_workers_take_turns():
    plan = {"start": 3, "batch_size": 2, "rank": 1, "world_size": 2}
    workers = [_first(4, **plan, first=w, stride=3) for w in range(3)]
    assert [workers[i % 3][i // 3] for i in range(12)] == _first(12, **plan)
