"""The pass over the backbone against all states held at once, in fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dihal.config import ScoreConfig
from dihal.errors import UsageError
from dihal.geometry.layer import Sampling, assess_layer
from dihal.geometry.moments import correlation, spectrum
from dihal.geometry.proxies import effective_rank, global_stiffness
from dihal.geometry.streaming import LayerStatistics, stream_statistics
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


def test_states_added_one_block_late_are_the_same_and_layers_are_told_in_order(scored) -> None:
    from dihal.geometry import streaming
    from dihal.geometry.windows import plan_chunks

    backbone, draw, pool, _, layers = scored
    plan = plan_chunks(draw, CONFIG.batch_tokens)
    again = [LayerStatistics(split, len(pool), CONFIG) for split in range(backbone.num_blocks)]
    pilot = [(chunk, streaming._states(backbone, chunk)) for chunk in plan if chunk.pilot]
    for layer in again:
        layer.prepare([held[layer.split] for _, held in pilot], [chunk.first for chunk, _ in pilot])
    told: list[int] = []
    for number, chunk in enumerate(plan):
        places = streaming._Places.of(chunk, pool, backbone.device)
        last = number + 1 == len(plan)
        streaming._stream(backbone, chunk, again, places, (lambda layer: told.append(layer.split)) if last else None)
    assert told == list(range(backbone.num_blocks))
    for one, two in zip(layers, again):
        assert (one.dropped_first, one.dropped_norm, one.tokens) == (two.dropped_first, two.dropped_norm, two.tokens)
        assert torch.equal(one.pool, two.pool)
        for name in ("raw", "rms"):
            torch.testing.assert_close(one.kept[name].covariance, two.kept[name].covariance)


def test_each_layer_is_handed_over_once_when_it_is_whole(scored) -> None:
    backbone, draw, pool, _, _ = scored
    told: list[int] = []
    stream_statistics(backbone, draw, pool, CONFIG, whole=lambda layer: told.append(layer.split))
    assert told == list(range(backbone.num_blocks))
