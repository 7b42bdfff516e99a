"""Bar 8: writing, beside the backbone's own cached decoding and beside what bytes and FLOPs predict."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from eight_kit import Bench, make_batch
from torch import nn

from dihal.backbone import Backbone
from dihal.config import MethodConfig, ObjectiveConfig, TimeConfig
from dihal.config.spaces import WritingConfig
from dihal.decoding import StaticDecoder
from dihal.methods import build_method
from dihal.writing.static import room_of


@dataclass(frozen=True)
class Cost:
    """A pass over the positions of one token (or block): weights and keys read once, products made."""

    bytes: float
    flops: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def __rmul__(self, times: float) -> Cost:
        return Cost(times * self.bytes, times * self.flops)


def module_bytes(*modules: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def blocks_cost(backbone: Backbone, first: int, last: int, batch: int, new: int, keys: int) -> Cost:
    config = backbone.config
    channels = config.num_key_value_heads * config.head_dim
    cached = 2 * channels * backbone.dtype.itemsize * keys * batch * (last - first)
    weights = module_bytes(*backbone.blocks[first:last])
    return Cost(weights + cached, backbone.flops_per_token(first, last, keys) * batch * new)


def head_cost(backbone: Backbone, positions: int) -> Cost:
    return Cost(module_bytes(backbone.output_embedding), backbone.head_flops_per_token() * positions)


def bridge_cost(method: Any, batch: int, new: int, keys: int, size: int = 4) -> Cost:
    net = method.config.denoiser
    matrices = sum(p.numel() for p in method.denoiser.parameters())
    cached = 2 * net.width * size * keys * batch * net.depth
    return Cost(
        matrices * size + cached, 2.0 * matrices * batch * new + 4.0 * net.depth * net.width * keys * batch * new
    )


def seconds_of(parts: list[tuple[Cost, float]], memory: float) -> float:
    """Each part as long as the slower of its bytes and its products."""
    return sum(max(cost.bytes / memory, cost.flops / rate) for cost, rate in parts)


def fp32_rate(bench: Bench) -> float:
    size = bench.sizes.product // 2
    a = torch.randn(size, size, device=bench.device)
    rate = 2.0 * size**3 * 5 / bench.seconds(lambda: [torch.mm(a, a) for _ in range(5)], repeats=2)
    bench.row("matmul rate, fp32", rate / 1e12, "TFLOP/s")
    return rate


def decode(bench: Bench, decoder: StaticDecoder, prompt: torch.Tensor) -> float:
    """Seconds per token, the prompt not counted."""
    new = bench.sizes.new_tokens
    decoder.prefill(prompt)
    decoder.write(2)  # captures the graph
    half = (new - 2) // 2
    return bench.seconds(lambda: decoder.write(half), repeats=2, warmup=0) / half


def run(bench: Bench, options: Any) -> None:
    size = bench.sizes
    backbone = bench.backbone()
    rate, memory, slow = bench.matmul_rate(), bench.copy_rate(), fp32_rate(bench)
    length = size.prompt + size.new_tokens
    keys = size.prompt + size.new_tokens // 2
    vocab, whole = backbone.vocab_size, backbone.num_blocks
    graph = bench.device.type == "cuda"
    with bench.part("noise"):
        bench.fuse_noise()
    own: dict[tuple[int, bool], float] = {}
    for batch in size.batches:
        prompt = make_batch(vocab, batch, size.prompt, bench.device).input_ids
        predicted = seconds_of(
            [(blocks_cost(backbone, 0, whole, batch, 1, keys), rate), (head_cost(backbone, batch), rate)], memory
        )
        for captured in (True, False) if graph else (False,):
            with bench.part(f"backbone, batch {batch}"):
                decoder = StaticDecoder(backbone, batch=batch, length=length, graph=captured)
                own[batch, captured] = decode(bench, decoder, prompt)
                bench.row(
                    f"backbone, batch {batch}, {'graph' if captured else 'no graph'}: token", 1e3 * own[batch, captured], "ms",
                    predicted=1e3 * predicted,
                )  # fmt: skip
                del decoder
        if batch > min(size.batches):
            continue
        with bench.part(f"backbone by generate(), batch {batch}"):
            few = min(16, size.new_tokens)
            arguments = {"max_new_tokens": few, "min_new_tokens": few, "do_sample": False, "pad_token_id": 0}
            mask = torch.ones_like(prompt)
            took = bench.seconds(lambda: backbone.model.generate(prompt, attention_mask=mask, **arguments), repeats=1)  # noqa: B023
            bench.row(f"backbone, batch {batch}, transformers' generate(): token", 1e3 * took / few, "ms")

    for split in size.splits:
        method = build_method(MethodConfig(split=split, denoiser=size.small), backbone).to(bench.device).eval()
        method.fit_normalisation(backbone, [make_batch(vocab, 2, size.length, bench.device)])
        for batch in size.batches:
            prompt = make_batch(vocab, batch, size.prompt, bench.device).input_ids
            for steps in size.steps:
                with bench.part(f"replace, split {split}, batch {batch}, {steps} steps"):
                    hybrid_row(bench, backbone, method, prompt, steps, own, (rate, slow, memory), keys, graph)
        del method
    for split in size.splits:
        with bench.part(f"generate, split {split}"):
            blocks(bench, backbone, split, own, (rate, slow, memory))


def hybrid_row(
    bench: Bench, backbone: Backbone, method: Any, prompt: torch.Tensor, steps: int,
    own: dict[tuple[int, bool], float], rates: tuple[float, float, float], keys: int, graph: bool,
) -> None:  # fmt: skip
    rate, slow, memory = rates
    split, whole, batch = method.split, backbone.num_blocks, len(prompt)
    suffix = blocks_cost(backbone, split, whole, batch, 1, keys) + head_cost(backbone, batch)
    bridge = steps * bridge_cost(method, batch, 1, keys)
    base = seconds_of(
        [(blocks_cost(backbone, 0, whole, batch, 1, keys), rate), (head_cost(backbone, batch), rate)], memory
    )
    predicted = base / seconds_of([(suffix, rate), (bridge, slow)], memory)
    length = prompt.shape[1] + bench.sizes.new_tokens
    decoder = StaticDecoder(backbone, method, batch=batch, length=length, steps=steps, graph=graph)
    token = decode(bench, decoder, prompt)
    found = own[batch, graph] / token
    label = f"replace, split {split}, batch {batch}, {steps} steps"
    bench.row(f"{label}: token", 1e3 * token, "ms")
    bench.row(f"{label}: x the backbone's speed, predicted", predicted)
    bench.row(
        f"{label}: x the backbone's speed", found, bar=f">= {0.6 * predicted:.3f} (0.6 of predicted)",
        ok=found >= 0.6 * predicted,
    )  # fmt: skip


def _ways(bench: Bench, split: int, steps: int) -> list[tuple[str, WritingConfig, int, int]]:
    """(name, how, batch, block). Pass by pass only once; of the second split only two corners, the larger one compiled."""
    size, cuda = bench.sizes, bench.device.type == "cuda"
    own = WritingConfig(steps=steps, readout="own", precision="bfloat16" if cuda else "float32")
    both = {"own readout": own, "projected": replace(own, readout="fused", project=0.5)}
    first, smallest = split == size.splits[0], (min(size.batches), min(size.blocks))
    corners = (smallest, (max(size.batches), max(size.blocks)))
    found = [("own readout", own, *smallest)] if first else []
    for cell in [(batch, block) for batch in size.batches for block in size.blocks]:
        for name, way in both.items():
            static = replace(way, static=True)
            if first or cell == smallest or (cell in corners and not bench.compile):
                found.append((f"{name}, static", static, *cell))
            if bench.compile and (first or cell in corners):
                found.append((f"{name}, static, compiled", replace(static, compile=True), *cell))
    return found


def writing_parts(
    bench: Bench, backbone: Backbone, writer: Any, made: Any, batch: int, block: int, new: int, reads_suffix: bool,
    rates: tuple[float, float, float],
) -> list[tuple[Cost, float]]:  # fmt: skip
    """What a text must cost, and at which rate: the passes that were made, as the writer counts them, and what takes text in."""
    rate, slow, _ = rates
    cuda = bench.device.type == "cuda"
    split, whole, prompt = writer.split, backbone.num_blocks, bench.sizes.prompt
    keys, fast = prompt + new // 2, rate if cuda else slow
    size = 2 if cuda else 4  # the denoiser's weights are cast once per text

    def taken_in(positions: int, keys: int) -> list[tuple[Cost, float]]:
        """Known text: keys and values of blocks below the split, of the denoiser and, where it is read, of the suffix."""
        upto = whole if reads_suffix else split
        return [
            (blocks_cost(backbone, 0, upto, batch, positions, keys), rate),
            (bridge_cost(writer, batch, positions, keys, size), fast),
        ]

    readings = made.reads if reads_suffix else made.blocks
    head = head_cost(backbone, batch * block)
    # The own head: a map in fp32, then the backbone's table, which the suffix's reading needs once more.
    table = backbone.hidden_size**2
    own_map = Cost(4.0 * table, 2.0 * table * batch * block)
    return [
        *taken_in(prompt, prompt),
        *(made.blocks - 1) * taken_in(block, keys),
        *made.nfe * [(bridge_cost(writer, batch, block, keys, size), fast)],
        *made.encodes * [(blocks_cost(backbone, 0, split, batch, block, keys), rate)],
        *made.reads * [(blocks_cost(backbone, split, whole, batch, block, keys), rate)],
        *readings * (1 + reads_suffix) * [(head, rate)],
        *readings * [(own_map, slow)],
    ]


def graph_rows(bench: Bench, writer: Any, label: str, replays: Counter[Any], took: float, profiled: bool) -> None:
    """Where the time of a text goes: in the graphs that it replays, and outside of them."""
    room = room_of(writer)
    if room is None or room.graphs is None:
        return
    if room.graphs.failed:
        bench.row(f"{label}: graphs", "a capture failed", bar="captured", ok=False)
        return
    inside = 0.0
    for key, times in replays.items():
        kind, shapes, replay = key[0], key[-4], room.graphs.captured[key]
        given = [torch.zeros(shape, dtype=dtype, device=bench.device) for shape, dtype in shapes]
        seconds = bench.seconds(lambda: replay(*given), repeats=1)  # noqa: B023
        columns = shapes[0][0][1]
        inside += times * seconds
        bench.row(f"{label}: graph of {kind}, {columns} columns", 1e3 * seconds, "ms", replays=times)
        if profiled and kind == "block":
            kernel_rows(bench, f"{label}: graph of {kind}", lambda: replay(*given))  # noqa: B023
    bench.row(f"{label}: outside of graphs", 1e3 * (took - inside), "ms", share=(took - inside) / took)


def kernel_rows(bench: Bench, label: str, work: Any) -> None:
    """Kernels of one replay: how many, and which take longest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        bench.sync()
    events = sorted(found.key_averages(), key=lambda event: -event.device_time_total)
    longest = [f"{event.device_time_total / 1e3:.3f} ms, {event.count} x {event.key[:70]}" for event in events[:12]]
    bench.row(f"{label}: kernels", sum(event.count for event in events), longest=longest)
    for line in longest:
        print(f"    {line}", flush=True)


def blocks(
    bench: Bench, backbone: Backbone, split: int, own: dict[tuple[int, bool], float], rates: tuple[float, float, float]
) -> None:
    """Regime `generate`: positions of a block denoised together."""
    size = bench.sizes
    net = replace(size.small, mask="mixed", norm="rms")
    config = MethodConfig(
        regime="generate", split=split, denoiser=net, time=TimeConfig(terminal_fraction=0.0),
        objective=ObjectiveConfig(own=0.2),
    )  # fmt: skip
    writer = build_method(config, backbone).to(bench.device).eval()
    writer.fit_normalisation(backbone, [make_batch(backbone.vocab_size, 2, size.length, bench.device)])
    steps = 16 if not bench.tiny else 2
    for name, writing, batch, block in _ways(bench, split, steps):
        label = f"generate, split {split}, batch {batch}, block {block}, {steps} steps, {name}"
        with bench.part(label):
            written(bench, backbone, writer, writing, batch, block, label, own, rates)


def replayed(writer: Any) -> Counter[Any]:
    """Replays of each graph so far."""
    room = room_of(writer)
    return Counter() if room is None or room.graphs is None else Counter(room.graphs.replays)


def written(
    bench: Bench, backbone: Backbone, writer: Any, writing: WritingConfig, batch: int, block: int, label: str,
    own: dict[tuple[int, bool], float], rates: tuple[float, float, float],
) -> None:  # fmt: skip
    size, cuda = bench.sizes, bench.device.type == "cuda"
    # Four blocks of 16; two of them where a block takes long by itself. One of 64.
    new = max(block, 16 if bench.tiny else (64 if batch == min(size.batches) else 32))
    ids = make_batch(backbone.vocab_size, batch, size.prompt + new, bench.device).input_ids
    known = (torch.arange(ids.shape[1], device=bench.device) < size.prompt).expand(ids.shape)
    options = replace(writing, block=block)

    def work() -> Any:
        return writer.write(backbone, ids, known, writing=options, end=False, compare=False)

    # The first text runs as it is (and compiles), the second captures what came once in the first.
    first = bench.seconds(work, repeats=1, warmup=0)
    second = bench.seconds(work, repeats=1, warmup=0)
    before = replayed(writer)
    bench.sync()
    started = time.perf_counter()
    made = work()
    bench.sync()
    took = time.perf_counter() - started
    replays = replayed(writer) - before
    if took < 0.5:
        took = min(took, bench.seconds(work, repeats=3, warmup=0))
    reads_suffix = writing.readout != "own"
    parts = writing_parts(bench, backbone, writer, made, batch, block, new, reads_suffix, rates)
    expected = seconds_of(parts, rates[2])
    base = own.get((batch, cuda))
    counted, predicted = sum(made.flops.values()), sum(cost.flops for cost, _ in parts)
    bench.row(
        f"{label}: token", 1e3 * took / new, "ms", predicted=1e3 * expected / new, nfe=made.nfe,
        first_texts=[first, second], step_predicted=1e3 * expected / made.nfe, flops_over_counted=predicted / counted,
    )  # fmt: skip
    bench.row(f"{label}: token, predicted", 1e3 * expected / new, "ms")
    if base:
        bench.row(f"{label}: x the backbone's speed", base * new / took, predicted=base * new / expected)
    share = expected / took
    bench.row(
        f"{label}: share of predicted speed", share, bar=">= 0.6", ok=share >= 0.6, predicted_ms=1e3 * expected,
        measured_ms=1e3 * took,
    )  # fmt: skip
    if writing.static:
        room = room_of(writer)
        if writing.compile and room is not None:
            bench.row(f"{label}: compiled", room.compiles, bar="True", ok=room.compiles)
        graph_rows(
            bench, writer, label, replays, took, profiled=(batch, block) == (min(size.batches), min(size.blocks))
        )
