"""Counter-based random numbers: known answers, distribution, independence of batch composition."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from dihal.random import normal, philox4x32, random_words, uniform

FULL = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(counter, key, answer):
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(w.item() for w in words) == answer


def test_multiplication_matches_python_integers_on_edge_words():
    edges = torch.tensor([0, 1, 2, 0x7FFFFFFF, 0x80000000, 0x80000001, FULL - 1, FULL])
    zero = torch.zeros_like(edges)

    def one_by_one(c):
        c, k = [c, 0, c, 0], [0, 0]
        for _ in range(10):
            p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(q >> 32) ^ c[1] ^ k[0], q & FULL, (p >> 32) ^ c[3] ^ k[1], p & FULL]
            k = [(k[0] + 0x9E3779B9) & FULL, (k[1] + 0xBB67AE85) & FULL]
        return c

    words = torch.stack(philox4x32((edges, zero, edges, zero), (0, 0)), -1)
    assert words.tolist() == [one_by_one(c) for c in edges.tolist()]


@pytest.mark.parametrize("draw", [uniform, normal])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_value_does_not_depend_on_the_batch(draw, dtype):
    ids = torch.arange(10_000, 10_037)
    whole = draw(3, ids, "noise", (5, 7), dtype=dtype)
    assert whole.shape == (37, 5, 7)
    assert whole.dtype == dtype
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(3, ids[order], "noise", (5, 7), dtype=dtype), whole[order])
    for i in (0, 1, 17, 36):
        assert torch.equal(draw(3, ids[i : i + 1], "noise", (5, 7), dtype=dtype)[0], whole[i])
        assert torch.equal(draw(3, ids[i], "noise", (5, 7), dtype=dtype), whole[i])
    assert torch.equal(draw(3, ids.view(37, 1), "noise", (35,), dtype=dtype).view(37, 5, 7), whole)


def test_a_longer_sequence_begins_with_the_shorter_ones_values():
    ids = torch.arange(3)
    assert torch.equal(normal(0, ids, "noise", (9, 6))[:, :4], normal(0, ids, "noise", (4, 6)))


def test_large_and_chunked_draws_agree_with_small_ones():
    whole = random_words(1, torch.arange(3000), "a", (33,))
    assert torch.equal(whole[2990:], random_words(1, torch.arange(2990, 3000), "a", (33,)))
    assert whole.min() >= 0
    assert whole.max() <= FULL
    assert whole.unique().numel() > 0.9999 * whole.numel()


def test_ids_beyond_32_bits_and_negative_ids_are_different_streams():
    ids = torch.tensor([5, 5 + 2**32, 5 + 2**40, -5, 2**63 - 1])
    assert random_words(0, ids, "a", (4,)).unique().numel() == 20


def test_seed_and_purpose_select_the_stream():
    ids = torch.arange(64)
    draws = [uniform(s, ids, p) for s in (0, 1, -1, 2**80) for p in ("time", "noise", "")]
    assert torch.stack(draws).unique(dim=0).shape[0] == 12
    # "1" + "2x" and "12" + "x" must not meet in one key
    assert not torch.equal(uniform(1, ids, "2x"), uniform(12, ids, "x"))


def test_empty_draws():
    assert normal(0, torch.arange(0), "a", (3,)).shape == (0, 3)
    assert normal(0, torch.arange(3), "a", (0,)).shape == (3, 0)
    assert uniform(0, torch.arange(3), "a").shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_distribution(dtype):
    u = uniform(0, torch.arange(4000), "u", (101,), dtype=dtype).flatten().double()
    assert u.min() > 0
    assert u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    counts = torch.histc(u, 64, 0, 1)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("word", [0, FULL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_unit_interval_is_open_at_both_ends(monkeypatch, word, dtype):
    import dihal.random as module

    extreme = torch.full((1,), word, dtype=torch.int64)
    assert 0 < module._unit(extreme, dtype).item() < 1
    monkeypatch.setattr(module, "_blocks", lambda *a: (extreme,) * 4)
    assert normal(0, torch.arange(1), "a", (4,), dtype=dtype).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_distribution(dtype):
    x = normal(0, torch.arange(4000), "x", (101,), dtype=dtype).flatten().double()
    n = x.numel()
    assert stats.kstest(x.numpy(), "norm").pvalue > 1e-3
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean().item() - expected) < 4 * math.sqrt(variance / n)
    assert abs((x.abs() > 3).double().mean().item() - 0.0027) < 4 * math.sqrt(0.0027 / n)


def test_neighbours_are_independent():
    x = normal(0, torch.arange(512), "x", (128,)).double()
    for first, second in ((x[:-1], x[1:]), (x[:, :-1], x[:, 1:]), (x[::2], normal(1, torch.arange(256), "x", (128,)))):
        a, b = first.flatten(), second.flatten()
        scale = 4 / math.sqrt(a.numel())
        assert abs((a * b).mean().item()) < scale
        assert abs(((a**2 - 1) * (b**2 - 1)).mean().item()) < 2 * scale
    # the two normals of a Box-Muller pair share a radius and must still be independent
    pairs = x.view(-1, 2)
    assert abs((pairs[:, 0] ** 2 * pairs[:, 1] ** 2).mean().item() - 1) < 4 * math.sqrt(8 / len(pairs))
    spectrum = torch.linalg.eigvalsh(x.T @ x / 512)
    assert spectrum.max() < 2.5  # Marchenko-Pastur edges at ratio 1/4: 0.25 and 2.25
    assert spectrum.min() > 0.2


def test_fp32_and_fp64_draw_the_same_numbers():
    ids = torch.arange(100)
    single, double = normal(0, ids, "x", (100,)), normal(0, ids, "x", (100,), dtype=torch.float64)
    assert (single.double() - double).abs().max() < 1e-5
    assert normal(0, ids, "x", (100,), dtype=torch.bfloat16).equal(single.bfloat16())


def test_uniform_refuses_a_dtype_that_could_round_to_one():
    with pytest.raises(ValueError, match="float32 or float64"):
        uniform(0, torch.arange(3), "a", dtype=torch.bfloat16)
