"""The pass over the backbone against all states held at once, in fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dihal.backbone.layout import LAYOUTS
from dihal.config import ScoreConfig
from dihal.errors import UsageError
from dihal.geometry.layer import Sampling, assess_layer
from dihal.geometry.moments import correlation, spectrum
from dihal.geometry.proxies import effective_rank, global_stiffness
from dihal.geometry.statistics import LayerStatistics
from dihal.geometry.streaming import stream_statistics
from dihal.geometry.windows import draw_documents, sample_pool
from tests.kit import tiny_backbone
from tests.unit.geometry.test_neighbours import brute_force
from tests.unit.geometry.test_windows import documents

CONFIG = ScoreConfig(
    tokens=4000, sequence_length=32, batch_tokens=256, pool=1000, anchors=100, neighbours=16, bootstrap=0
)
SINK = 7  # token id with a huge embedding


def planted(vocab: int = 97):
    backbone = tiny_backbone(seed=3)
    with torch.no_grad():
        backbone.input_embedding.weight[SINK] *= 400
    return backbone


def direct_states(backbone, draw) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every state of every layer, window by window, without padding, in fp64; and who is first."""
    rows: list[list[torch.Tensor]] = [[] for _ in range(backbone.num_blocks)]
    for window in draw.windows:
        with torch.no_grad():
            states = backbone.states(window[None].long(), range(backbone.num_blocks))
        for split, state in states.items():
            rows[split].append(state[0].double())
    first = torch.zeros(draw.tokens, dtype=torch.bool)
    first[draw.offsets] = True
    return [torch.cat(part) for part in rows], first


@pytest.fixture(scope="module")
def scored():
    backbone = planted()
    draw = draw_documents(backbone, documents(120), CONFIG)
    pool, preference = sample_pool(draw, CONFIG)
    return backbone, draw, pool, preference, stream_statistics(backbone, draw, pool, CONFIG)


def coordinates(x: torch.Tensor, name: str) -> torch.Tensor:
    if name == "rms":
        return x / x.square().mean(1, keepdim=True).sqrt()
    return (x - x.mean(0)) / x.std(0, correction=0) if name == "standardized" else x


def test_moments_spectra_neighbours_and_proxies_equal_direct_fp64(scored) -> None:
    backbone, draw, pool, preference, layers = scored
    states, first = direct_states(backbone, draw)
    sampling = Sampling(
        pool_document=torch.zeros(len(pool), dtype=torch.int64), anchor_preference=preference, counts=None
    )
    for layer, x in zip(layers, states):
        norms = x.norm(dim=1)
        kept = ~first & (norms <= layer.threshold)
        in_pool = torch.zeros(len(x), dtype=torch.bool)
        in_pool[pool] = True
        numbers = assess_layer(layer, sampling, CONFIG)
        for name in CONFIG.coordinates:
            y = coordinates(x[kept], name)
            cov = torch.cov(y.T, correction=0)
            mine = layer.kept["rms" if name == "rms" else "raw"].covariance
            mine = correlation(mine)[0] if name == "standardized" else mine
            assert float((mine - cov).norm() / cov.norm()) < 1e-5
            e = spectrum(cov)
            assert float((spectrum(mine) - e).abs().max() / e[0]) < 1e-5
            found = numbers.proxies[name]
            assert found.stiffness == pytest.approx(float(global_stiffness(e, rho=CONFIG.rho)), abs=1e-5)
            assert found.rank == pytest.approx(float(effective_rank(e)), abs=1e-5)
            assert found.largest_eigenvalue == pytest.approx(float(e[0]), rel=1e-5)
            # neighbours: among kept pool tokens, anchors by preference
            where = kept.cumsum(0) - 1
            points = y[where[kept & in_pool]]
            place = (kept & in_pool).cumsum(0) - 1
            anchors = [int(place[i]) for i in pool[preference] if kept[i]][: CONFIG.anchors]
            variance, _ = brute_force(points, torch.tensor(anchors), CONFIG.neighbours)
            floor = 1e-8 * float(e.mean())
            kappa = float(torch.quantile(-torch.log(variance.clamp_min(floor)), 0.5))
            if layer.split > 0:  # at split 0 copies differ from zero by fp64 rounding only
                assert found.curvature == pytest.approx(kappa, abs=1e-5)


def test_planted_sinks_are_found_counted_and_their_effect_kept(scored) -> None:
    backbone, draw, _, _, layers = scored
    ids = torch.cat(draw.windows)
    first = torch.zeros(draw.tokens, dtype=torch.bool)
    first[draw.offsets] = True
    embedding = layers[0]
    assert embedding.dropped_first == len(draw.windows)
    assert embedding.dropped_norm == int(((ids == SINK) & ~first).sum()) > 10
    assert embedding.kept["raw"].count + embedding.dropped["raw"].count == draw.tokens == embedding.tokens
    states, _ = direct_states(backbone, draw)
    both = embedding.kept["raw"].merged(embedding.dropped["raw"]).covariance
    everything = torch.cov(states[0].T, correction=0)
    assert float((both - everything).norm() / everything.norm()) < 1e-5
    assert float(spectrum(both)[0]) > 100 * float(spectrum(embedding.kept["raw"].covariance)[0])


def test_without_sink_policy_nothing_is_dropped() -> None:
    backbone = planted()
    config = dataclasses.replace(CONFIG, drop_first=False, norm_factor=float("inf"))
    draw = draw_documents(backbone, documents(120), config)
    pool, _ = sample_pool(draw, config)
    for layer in stream_statistics(backbone, draw, pool, config):
        assert layer.dropped_first == layer.dropped_norm == layer.dropped["raw"].count == 0
        assert layer.kept["rms"].count == draw.tokens
        assert layer.pool_kept.all()


@pytest.mark.parametrize("batch_tokens", [32, 2048, 10**6])
def test_chunk_size_changes_no_count_and_no_moment(scored, batch_tokens: int) -> None:
    backbone, draw, pool, _, layers = scored
    others = stream_statistics(backbone, draw, pool, dataclasses.replace(CONFIG, batch_tokens=batch_tokens))
    for a, b in zip(layers, others):
        assert (a.dropped_first, a.dropped_norm, a.tokens) == (b.dropped_first, b.dropped_norm, b.tokens)
        assert a.threshold == pytest.approx(b.threshold, rel=1e-6)
        for name in ("raw", "rms"):
            one, two = a.kept[name].covariance, b.kept[name].covariance
            assert float((one - two).norm() / one.norm()) < 1e-6
        torch.testing.assert_close(a.pool, b.pool, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_states_that_are_not_finite_name_layer_and_count(bad: float) -> None:
    layer = LayerStatistics(5, 4, CONFIG)
    x = torch.randn(50, 8)
    first = torch.zeros(50, dtype=torch.bool)
    layer.prepare([x], [first])
    x[[3, 9]] = bad
    rows = torch.arange(4)
    with pytest.raises(UsageError, match=r"split 5 hold NaN or infinity in 2 of 50"):
        layer.add(x, first, rows, rows)
    with pytest.raises(UsageError, match="split 5"):
        LayerStatistics(5, 4, CONFIG).prepare([x], [first])


def test_nan_in_the_weights_is_reported_with_its_split() -> None:
    backbone = tiny_backbone(seed=4)
    with torch.no_grad():
        next(backbone.blocks[1].parameters())[0] = float("nan")
    draw = draw_documents(backbone, documents(), CONFIG)
    pool, _ = sample_pool(draw, CONFIG)
    with pytest.raises(UsageError, match="split 2 hold NaN"):
        stream_statistics(backbone, draw, pool, CONFIG)


def test_memory_does_not_grow_with_tokens(monkeypatch) -> None:
    # What outlives a chunk: count elements held by the statistics for two lengths of text.
    held = []
    for tokens in (3000, 6000):
        config = dataclasses.replace(CONFIG, tokens=tokens, pool=500)
        backbone = tiny_backbone()
        draw = draw_documents(backbone, documents(150), config)
        pool, _ = sample_pool(draw, config)
        layers = stream_statistics(backbone, draw, pool, config)
        held.append(
            sum(
                value.numel()
                for layer in layers
                for value in [layer.pool, layer.pool_norms]
                + [m._second for group in (layer.kept, layer.dropped) for m in group.values()]
            )
        )
        assert draw.tokens > tokens - 2
    assert held[0] == held[1]


@pytest.mark.parametrize("held", [1, 3 * 256 * 32 * 4, 2**29])
@pytest.mark.parametrize("batch_tokens", [256, 10**6])
def test_block_by_block_everything_is_as_pass_by_pass(scored, held: int, batch_tokens: int, monkeypatch) -> None:
    from dihal.geometry import streaming

    backbone, draw, pool, _, _ = scored
    config = dataclasses.replace(CONFIG, batch_tokens=batch_tokens)
    layers = stream_statistics(backbone, draw, pool, config)
    monkeypatch.setattr(streaming, "_block_by_block", lambda backbone: True)
    monkeypatch.setattr(streaming, "HELD_BYTES", held)
    told: list[tuple[int, int]] = []
    seen = [0]

    def advance(count: int) -> None:
        seen[0] += count

    again = stream_statistics(
        backbone, draw, pool, config, advance, whole=lambda layer: told.append((layer.split, layer.tokens))
    )
    assert told == [(split, draw.tokens) for split in range(backbone.num_blocks)]
    assert seen[0] == draw.tokens
    for one, two in zip(layers, again):
        assert (one.dropped_first, one.dropped_norm, one.tokens) == (two.dropped_first, two.dropped_norm, two.tokens)
        assert one.threshold == two.threshold
        assert torch.equal(one.pool, two.pool)
        assert torch.equal(one.pool_norms, two.pool_norms)
        for name in ("raw", "rms"):
            assert torch.equal(one.kept[name].covariance, two.kept[name].covariance)
            assert one.dropped[name].count == two.dropped[name].count


def test_layers_are_whole_while_blocks_above_are_still_to_run(scored, monkeypatch) -> None:
    from dihal.geometry import streaming

    backbone, draw, pool, _, _ = scored
    monkeypatch.setattr(streaming, "_block_by_block", lambda backbone: True)
    order: list[object] = []
    step = streaming.Walk.step
    monkeypatch.setattr(streaming.Walk, "step", lambda walk: (order.append(walk.split), step(walk))[1])
    stream_statistics(backbone, draw, pool, CONFIG, whole=lambda layer: order.append(f"whole {layer.split}"))
    assert order.index("whole 1") < len(order) - 1 - order[::-1].index(2)
    assert order.count("whole 1") == 1


@pytest.mark.parametrize("family", list(LAYOUTS))
@pytest.mark.parametrize("padded", [False, True])
def test_a_block_at_a_time_gives_the_states_of_one_pass(family: str, padded: bool) -> None:
    from dihal.backbone.steps import Walk

    attention = "eager" if LAYOUTS[family].eager_only else "sdpa"
    backbone = tiny_backbone(family, seed=5, attention=attention)
    ids = torch.randint(0, backbone.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(20) < torch.tensor([[20], [13], [7]])) if padded else None
    with torch.no_grad():
        states = backbone.states(ids, range(backbone.num_blocks), attention_mask=mask)
    real = torch.ones(3, 20, dtype=torch.bool) if mask is None else mask
    walk = Walk(backbone, ids, mask)
    for split in range(backbone.num_blocks):
        assert walk.split == split
        assert torch.equal(walk.state[real], states[split][real])
        if split + 1 < backbone.num_blocks:
            walk.step()
    with pytest.raises(UsageError, match="last state"):
        walk.step()


def test_states_in_half_precision_are_added_without_a_gather(monkeypatch) -> None:
    from dihal.geometry import moments, statistics

    half = lambda dtype, device: dtype == torch.bfloat16  # noqa: E731
    x = (torch.randn(900, 24, generator=torch.Generator().manual_seed(0)) + 0.5).bfloat16()
    x[[5, 300, 301]] *= 100
    x[77] = 0
    first = torch.arange(900) % 300 == 0
    rows, slots = torch.arange(10, 20), torch.arange(10)
    before = x.clone()

    def added() -> LayerStatistics:
        layer = LayerStatistics(0, 10, CONFIG)
        layer.prepare([x], [first])
        layer.add(x, first, rows, slots)
        return layer

    wide = added()
    for module in (moments, statistics):
        monkeypatch.setattr(module, "native_half", half)
    monkeypatch.setattr(moments, "half_product", lambda a, b: a.float() @ b.float())
    found = added()
    assert torch.equal(x, before)
    assert found.kept["raw"].unshifted
    assert not wide.kept["raw"].unshifted
    # 301 is large and not first; 300 is both, 0 and 600 are first.
    assert (found.dropped_first, found.dropped_norm) == (wide.dropped_first, wide.dropped_norm) == (3, 2)
    assert torch.equal(found.pool, wide.pool)
    for name, tolerance in (("raw", 1e-5), ("rms", 4e-3)):  # rms states are rounded to half precision
        one, two = wide.kept[name], found.kept[name]
        assert one.count == two.count == 895
        torch.testing.assert_close(two.covariance, one.covariance, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(two.mean, one.mean, rtol=tolerance, atol=tolerance)
        narrow, variance = two.narrow_covariance
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow.double(), two.covariance, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(variance, two.covariance.diagonal(), rtol=1e-9, atol=1e-12)
        assert found.dropped[name].count == wide.dropped[name].count == 5


def test_each_layer_is_handed_over_once_when_it_is_whole(scored) -> None:
    backbone, draw, pool, _, _ = scored
    told: list[int] = []
    stream_statistics(backbone, draw, pool, CONFIG, whole=lambda layer: told.append(layer.split))
    assert told == list(range(backbone.num_blocks))
