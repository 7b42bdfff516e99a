"""Bar 1: scoring an 8B beside the plain forward pass of the same tokens."""

from __future__ import annotations

import bisect
import contextlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from eight_kit import Bench

from dihal.backbone import Backbone
from dihal.config import ScoreConfig
from dihal.geometry import parallel, score, streaming
from dihal.geometry.functionals import entropy
from dihal.geometry.layer import Sampling, assess_layer
from dihal.geometry.moments import (
    Moments,
    _adds_in_place,
    add_upper_gram,
    correlation,
    covariance_of_both,
    cusolver,
    spectrum,
)
from dihal.geometry.neighbours import candidates, local_spread
from dihal.geometry.proxies import effective_rank
from dihal.geometry.score import score_layers
from dihal.geometry.statistics import LayerStatistics
from dihal.geometry.streaming import stream_statistics
from dihal.geometry.subspace import Size, _orthonormal, _products, _rough_product, _rounded, largest_values
from dihal.geometry.wide import extremes
from dihal.geometry.windows import draw_documents, plan_chunks, sample_pool


def documents(bench: Bench, backbone: Backbone) -> list[torch.Tensor]:
    """Random tokens in documents of four windows; a little more than is scored."""
    size = bench.sizes
    generator = torch.Generator().manual_seed(0)
    length = 4 * (size.score_length - 1)
    count = size.score_tokens // (4 * size.score_length)
    return [torch.randint(2, backbone.vocab_size, (length,), generator=generator) for _ in range(count)]


@torch.no_grad()
def plain_forward(backbone: Backbone, chunks: list[Any]) -> None:
    for chunk in chunks:
        backbone.decoder(input_ids=chunk.input_ids.to(backbone.device), use_cache=False)


def run(bench: Bench, options: Any) -> None:
    size = bench.sizes
    backbone = bench.backbone()
    weights = bench.allocated()
    texts = documents(bench, backbone)
    config = ScoreConfig(
        tokens=size.score_tokens, sequence_length=size.score_length, batch_tokens=size.score_batch, pool=size.pool,
        anchors=size.anchors, bootstrap=0, neighbours=8 if bench.tiny else 32, rank="participation",
    )  # fmt: skip
    draw = draw_documents(backbone, texts, config)
    chunks = plan_chunks(draw, config.batch_tokens)
    flops = backbone.flops_per_token(0, backbone.num_blocks, (size.score_length + 1) / 2) * draw.tokens
    bench.row("tokens", draw.tokens, windows=len(draw.windows), documents=draw.documents)

    rate = bench.matmul_rate()
    eager = bench.seconds(lambda: plain_forward(backbone, chunks), repeats=2)
    bench.row("plain forward, eager", eager, "s", share=flops / eager / rate)
    plain = eager
    if bench.compile:
        with bench.part("compile"):
            for block in backbone.blocks:
                block.compile(dynamic=False)
            started = time.perf_counter()
            plain_forward(backbone, chunks)
            bench.row("compile and warm up", time.perf_counter() - started, "s")
            plain = bench.seconds(lambda: plain_forward(backbone, chunks), repeats=3, warmup=0)
            bench.row("plain forward, compiled", plain, "s")
    rate = bench.matmul_rate()
    share = flops / plain / rate
    bench.row("frozen forward, share of matmul rate", share, bar=">= 0.65", ok=share >= 0.65)

    exact = replace(config, rank="entropy")
    runs: list[tuple[str, ScoreConfig, float]] = [
        ("without exact spectra", config, 1.35),
        ("exact spectra", exact, 2.5),
    ]
    # Everything once, in the shapes that are measured: kernels are loaded, blocks compiled for what they are given.
    score_layers(backbone, texts, config)
    for name, chosen, bar in runs:
        with bench.part(name):
            bench.reset_peak()
            found = bench.seconds(lambda: score_layers(backbone, texts, chosen), repeats=2, warmup=0)  # noqa: B023
            extra = bench.peak() - weights
            again = bench.seconds(lambda: plain_forward(backbone, chunks), repeats=2, warmup=0)
            ratio = found / again
            bench.row(f"scoring, {name}", found, "s", plain=again)
            bench.row(f"scoring, {name}, x plain", ratio, bar=f"<= {bar}", ok=ratio <= bar)
            bench.row(f"scoring, {name}, x eager plain", found / eager)
            bench.row(f"extra peak memory, {name}", extra / 1e9, "GB", bar="<= 12", ok=extra <= 12e9)
    with bench.part("breakdown"):
        breakdown(bench, backbone, texts, config, exact)
    if options.intervals:
        with bench.part("intervals"):
            found = bench.seconds(
                lambda: score_layers(backbone, texts, replace(exact, bootstrap=100 if bench.tiny else 1_000)),
                repeats=1, warmup=0,
            )  # fmt: skip
            bench.row("scoring, exact spectra and intervals, x plain", found / plain)
    with bench.part("eigenvalues"):
        eigenvalues(bench, backbone.hidden_size)


def breakdown(
    bench: Bench, backbone: Backbone, texts: list[torch.Tensor], config: ScoreConfig, exact: ScoreConfig
) -> None:
    """Where the time goes: the pass with its moments, then the layers' assessment."""
    started = time.perf_counter()
    draw = draw_documents(backbone, texts, config)
    bench.row("part: draw", time.perf_counter() - started, "s")
    pool, preference = sample_pool(draw, config, backbone.device)
    bench.row("part: draw and pool", time.perf_counter() - started, "s")
    bench.sync()
    started = time.perf_counter()
    layers = stream_statistics(backbone, draw, pool, config)
    bench.sync()
    bench.row("part: forward and moments", time.perf_counter() - started, "s", held_gb=bench.allocated() / 1e9)
    sampling = Sampling(
        pool_document=torch.zeros(len(pool), dtype=torch.int64), anchor_preference=preference, counts=None
    )
    few = layers[-min(8, len(layers)) :]

    def assess(chosen: ScoreConfig) -> None:
        with parallel.layer_workers(bench.device) as over:
            list(over(lambda layer: assess_layer(layer, sampling, chosen), few))

    for name, chosen in (("no spectra", config), ("exact spectra", exact)):
        for streams in (1, 2, 3) if bench.device.type == "cuda" else (1,):
            parallel.STREAMS, before = streams, parallel.STREAMS
            try:
                took = bench.seconds(lambda: assess(chosen), repeats=1)  # noqa: B023
            finally:
                parallel.STREAMS = before
            bench.row(f"part: assessment, {name}, {streams} streams, per layer", 1e3 * took / len(few), "ms")
    # As in the product, where all layers are assessed inside one such scope, by workers of one thread each.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad(), cusolver(bench.device):
        pieces(bench, layers, config)
        for name, chosen in (("no spectra", config), ("exact spectra", exact)):
            with bench.part(f"kernels, {name}"):
                kernels(bench, name, lambda: assess_layer(few[-1], sampling, chosen))  # noqa: B023
        counted = torch.zeros(config.batch_tokens, dtype=torch.bool)
        counted[:: config.sequence_length] = True
        x = torch.randn(len(counted), backbone.hidden_size, device=bench.device).to(backbone.dtype)
        slots = torch.arange(8, device=bench.device)
        with bench.part("kernels, statistics"):
            kernels(bench, "statistics of a chunk", lambda: few[-1].add(x, counted, slots, slots))
    torch.set_num_threads(threads)
    del layers, few, x
    with bench.part("whole"):
        whole(bench, lambda: score_layers(backbone, texts, config))


def standard(layer: LayerStatistics) -> list[torch.Tensor]:
    """Covariances of a layer's kept tokens in the three kinds of coordinates, as the product makes them."""
    raw, variance = layer.kept["raw"].narrow_covariance
    return [raw, layer.kept["rms"].narrow_covariance[0], correlation(raw, variance)[0]]


def filters(bench: Bench, name: str, layer: LayerStatistics, three: list[torch.Tensor]) -> None:
    """How much of each matrix is read for its e_1, without sinks and with them."""
    both = [covariance_of_both(m, layer.kept[k], layer.dropped[k]) for m, k in zip(three, ("raw", "rms"))]
    for error in (None, 5e-5):
        found = largest_values(three, error=error)
        bench.row(
            f"filters for e_1 to {error or 1e-6}, {name}", found.filters, products=found.products,
            residual=float((found.residuals[:, 0] / found.values[:, 0]).max()),
        )  # fmt: skip
    error = float(found.values[0, 0] / spectrum(three[0].double())[0]) - 1
    bench.row(f"error of e_1 to 5e-05, {name}", error, bar="<= 1e-4", ok=abs(error) <= 1e-4)
    again = largest_values(both, found.block[:2], error=5e-4)
    bench.row(f"filters for e_1 with sinks, {name}", again.filters, products=again.products)


def pieces(bench: Bench, layers: list[LayerStatistics], config: ScoreConfig) -> None:
    """What each step of a layer takes by itself, the device idle before and after."""
    layer = layers[1]
    dim = layer.pool.shape[1]
    x = torch.randn(bench.sizes.score_batch, dim, device=bench.device).to(layer.pool.dtype)
    moments = Moments(layer.kept["raw"].shift.float(), layer.kept["raw"]._dtype)
    where = torch.tensor([0], device=bench.device)
    first = torch.zeros(len(x), dtype=torch.bool)
    points = layer.pool.float()
    anchors = torch.arange(min(config.anchors, len(points) // 2), device=bench.device)
    found = candidates(points, anchors, min(config.neighbours + 4, len(points) - 1))
    assert len(found) == len(anchors)
    # The first, a middle and the last layer: embeddings are even, deep states are not.
    names = ("first", "middle", "last")
    of_layers = [layers[0], layers[len(layers) // 2], layers[-1]]
    wide = [standard(item) for item in of_layers]
    known = [extremes(three) for three in wide]
    for name, item, three in zip(names, of_layers, wide):
        filters(bench, f"{name} layer", item, three)
    for name, three, item in zip(names, wide, known):
        reach = item.largest[0] * dim / item.traces[0]
        residuals = item.found.residuals[:, 0] / item.found.values[:, 0]
        bench.row(f"e_1 / mean eigenvalue, {name} layer", reach, residual=float(residuals.max()))
        exact = float(effective_rank(spectrum(three[0].double())))
        determinants = entropy(three[0], reach)
        error = float("nan") if determinants is None else float(determinants) - exact
        bench.row(
            f"log effective rank by determinants, error, {name} layer",
            error,
            "nats",
            bar="<= 1e-3",
            ok=abs(error) <= 1e-3,
        )
    small = torch.randn(3, 32, 32, dtype=torch.float64)
    small = small + small.mT
    matrix = wide[-1][0] / wide[-1][0].diagonal().mean()
    matrix.diagonal().add_(0.01)
    works: list[tuple[str, Callable[[], Any]]] = [
        ("moments of a chunk, one kind", lambda: moments.add(x)),
        ("rms of a chunk", lambda: F.rms_norm(x, (dim,), eps=torch.finfo(torch.float32).tiny)),
        ("sum of a chunk", lambda: x.sum(0, dtype=torch.float32)),
        ("products of a chunk", lambda: add_upper_gram(x, moments._recent if moments._recent is not None else moments._second)),
        ("statistics of a chunk, whole", lambda: layer.add(x, first, where, where)),
        ("covariance, fp32", lambda: layer.kept["raw"].narrow_covariance),
        ("candidates of one kind", lambda: candidates(points, anchors, config.neighbours + 4)),
        ("neighbours of one kind", lambda: local_spread(points, anchors, config.neighbours)),
        *((f"largest of three to 5e-5, {n} layer", lambda w=w: extremes(w, error=5e-5)) for n, w in zip(names, wide)),
        *((f"largest of three to 1e-6, {n} layer", lambda w=w: extremes(w)) for n, w in zip(names, wide)),
        ("largest of three, again from what was found", lambda: extremes(wide[-1], known[-1].found, error=5e-4)),
        ("traces and norms of three", lambda: Size(wide[-1])),
        ("orthonormal blocks of three", lambda: _orthonormal(known[-1].found.block)),
        ("eigenvalues of three small matrices on the host", lambda: torch.linalg.eigh(small)),
        ("one product of three matrices with a block", lambda: _products(wide[-1], known[-1].found.block)),
        ("entropy by determinants", lambda: entropy(wide[-1][0], known[-1].largest[0] * dim / known[-1].traces[0])),
        ("one Cholesky factorisation, float32", lambda: torch.linalg.cholesky_ex(matrix)),
    ]  # fmt: skip
    if bench.device.type == "cuda":
        bench.row("products are added in place", float(_adds_in_place(x.device)))
        rounded = _rounded(wide[-1])
        works.append(("rounding of three matrices", lambda: _rounded(wide[-1])))
        works.append(("one product with a block, rounded", lambda: _rough_product(rounded, known[-1].found.block)))
    for name, work in works:
        with bench.part(name):
            bench.row(f"part: {name}", 1e3 * bench.seconds(work, repeats=5), "ms")


def kernels(bench: Bench, name: str, work: Callable[[], Any]) -> None:
    """Launches, waits of the host, and the kernels that take longest."""
    from torch.profiler import ProfilerActivity, profile

    cuda = bench.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as trace:
        work()
        bench.sync()
    events = trace.key_averages()
    names = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
    waits = ("cudaStreamSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense", "aten::nonzero")
    bench.row(
        f"{name}: launches", sum(event.count for event in events if event.key in names),
        operations=sum(event.count for event in events if event.key.startswith("aten::")),
        waits={event.key: event.count for event in events if event.key in waits},
    )  # fmt: skip
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    for event in sorted(events, key=lambda event: -getattr(event, key))[:12]:
        if getattr(event, key) > 0:
            bench.row(f"{name}: {event.key[:70]}", getattr(event, key) / 1e3, "ms", calls=event.count)


_GROUPS = ("forward", "moments", "assessment", "sampling")
"""What kernels are counted as, by the thread that launched them and the function of the product around it."""


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """Names in the trace around blocks, what the pass does for the statistics, and the draw of the pool."""
    places = [
        (LayerStatistics, "prepare", "moments"), (LayerStatistics, "begin", "moments"), (LayerStatistics, "finish", "moments"),
        (streaming.Walk, "step", "forward"), (streaming.Walk, "__init__", "forward"), (score, "sample_pool", "sampling"), (score, "draw_documents", "sampling"),
    ]  # fmt: skip
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in places]

    def mark(function: Callable[..., Any], group: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            with torch.profiler.record_function(f"group {group}"):
                return function(*arguments, **named)

        return call

    for (holder, name, function), (_, _, group) in zip(before, places):
        setattr(holder, name, mark(function, group))
    try:
        yield
    finally:
        for holder, name, function in before:
            setattr(holder, name, function)


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, -math.inf
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def whole(bench: Bench, work: Callable[[], Any]) -> None:
    """Where the time of one call goes: the share in which the GPU is busy, kernel time by group, waits of the host.

    Written to a trace and read from there: kernels belong to the innermost group whose span on their thread holds
    their launch.
    """
    from torch.profiler import ProfilerActivity, profile

    cuda = bench.device.type == "cuda"
    bench.sync()
    started = time.perf_counter()
    with marked(), profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as trace:
        work()
        bench.sync()
    bench.row("whole: seconds under the profiler", time.perf_counter() - started, "s")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    spans: dict[Any, list[tuple[float, float, str]]] = {}
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"].startswith("group "):
            spans.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"], event["name"][6:]))
    for found in spans.values():
        found.sort()

    main = next(thread for thread, found in spans.items() if any(name == "sampling" for _, _, name in found))

    def group_of(event: dict[str, Any]) -> str:
        if event["tid"] != main:  # nothing else is done by other threads, and their own names are not in the trace
            return "assessment"
        of_thread = spans[main]
        place = bisect.bisect_right(of_thread, (event["ts"], math.inf, "")) - 1
        return of_thread[place][2] if place >= 0 and event["ts"] <= of_thread[place][1] else "other"

    launches = {
        e["args"]["correlation"]: e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }  # fmt: skip
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    by_group: dict[str, float] = dict.fromkeys((*_GROUPS, "other"), 0.0)
    by_kernel: dict[tuple[str, str], float] = {}
    for event in device:
        launch = launches.get(event.get("args", {}).get("correlation"))
        group = "other" if launch is None else group_of(launch)
        by_group[group] += event["dur"]
        key = (group, event["name"][:60])
        by_kernel[key] = by_kernel.get(key, 0.0) + event["dur"]
    if device:
        first, last = min(e["ts"] for e in device), max(e["ts"] + e["dur"] for e in device)
        busy = _covered([(e["ts"], e["ts"] + e["dur"]) for e in device])
        bench.row("whole: first to last kernel", (last - first) / 1e6, "s")
        bench.row("whole: share in which the GPU is busy", busy / (last - first))
    for group, took in by_group.items():
        bench.row(f"whole: kernels of {group}", took / 1e3, "ms")
    for (group, name), took in sorted(by_kernel.items(), key=lambda item: -item[1])[:40]:
        bench.row(f"whole: {group}: {name}", took / 1e3, "ms")
    for name in (
        "cudaStreamSynchronize",
        "cudaEventSynchronize",
        "cudaDeviceSynchronize",
        "cudaMalloc",
        "cudaHostAlloc",
        "cudaMemcpyAsync",
    ):
        calls = [e for e in events if e["name"] == name]
        if calls:
            by_host = {g: sum(e["dur"] for e in calls if group_of(e) == g) / 1e3 for g in (*_GROUPS, "other")}
            bench.row(f"whole: host in {name}", sum(e["dur"] for e in calls) / 1e3, "ms", calls=len(calls), by=by_host)
    for group in ("forward", "moments", "sampling"):
        inside = sum(stop - start for found in spans.values() for start, stop, name in found if name == group)
        bench.row(f"whole: host inside {group}", inside / 1e3, "ms")


def eigenvalues(bench: Bench, dim: int) -> None:
    """What an eigenvalue problem would cost on one GPU."""
    x = torch.randn(2 * dim, dim, device=bench.device, dtype=torch.float64)
    cov = x.mT @ x / len(x)
    for dtype in (torch.float64, torch.float32):
        matrix = cov.to(dtype)
        with cusolver(bench.device):
            took = bench.seconds(lambda: torch.linalg.eigvalsh(matrix), repeats=3)  # noqa: B023
        bench.row(f"part: eigvalsh {dim}, {str(dtype)[6:]}", 1e3 * took, "ms")
