"""Bar 8: writing, beside the backbone's own cached decoding and beside what bytes and FLOPs predict."""

from __future__ import annotations

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
    return Cost(matrices * 4 + cached, 2.0 * matrices * batch * new + 4.0 * net.depth * net.width * keys * batch * new)


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


def blocks(
    bench: Bench, backbone: Backbone, split: int, own: dict[tuple[int, bool], float], rates: tuple[float, float, float]
) -> None:
    """Regime `generate`: positions of a block denoised together; the passes that were made, as the writer counts them."""
    rate, slow, memory = rates
    size, whole, cuda = bench.sizes, backbone.num_blocks, bench.device.type == "cuda"
    net = replace(size.small, mask="mixed", norm="rms")
    config = MethodConfig(
        regime="generate", split=split, denoiser=net, time=TimeConfig(terminal_fraction=0.0),
        objective=ObjectiveConfig(own=0.2),
    )  # fmt: skip
    writer = build_method(config, backbone).to(bench.device).eval()
    writer.fit_normalisation(backbone, [make_batch(backbone.vocab_size, 2, size.length, bench.device)])
    steps = 16 if not bench.tiny else 2
    ways: dict[str, WritingConfig] = {
        "own readout": WritingConfig(steps=steps, readout="own", precision="bfloat16" if cuda else "float32"),
        "projected": WritingConfig(
            steps=steps, readout="fused", project=0.5, precision="bfloat16" if cuda else "float32"
        ),
    }
    # Room of fixed size: on a GPU every pass is a CUDA graph.
    ways |= {f"{name}, static": replace(way, static=True) for name, way in ways.items()}
    for batch in size.batches:
        for block in size.blocks:
            for name, writing in ways.items():
                with bench.part(f"generate, split {split}, batch {batch}, block {block}, {name}"):
                    new = max(block, 16 if bench.tiny else 64)
                    ids = make_batch(backbone.vocab_size, batch, size.prompt + new, bench.device).input_ids
                    known = (torch.arange(ids.shape[1], device=bench.device) < size.prompt).expand(ids.shape)
                    options = replace(writing, block=block)

                    def work(keep: list[Any] | None = None) -> None:
                        made = writer.write(backbone, ids, known, writing=options, end=False, compare=False)  # noqa: B023
                        if keep is not None:
                            keep.append(made)

                    kept: list[Any] = []
                    work(kept)
                    took = bench.seconds(work, repeats=2, warmup=0)
                    made, keys = kept[0], size.prompt + new // 2
                    prompt = blocks_cost(backbone, 0, split, batch, size.prompt, size.prompt)
                    bridge = made.nfe * bridge_cost(writer, batch, block, keys, 2 if cuda else 4)
                    lower = made.encodes * blocks_cost(backbone, 0, split, batch, block, keys)
                    upper = made.reads * blocks_cost(backbone, split, whole, batch, block, keys)
                    reads = max(made.blocks, made.encodes) * head_cost(backbone, batch * block)
                    frozen = prompt + lower + upper + reads
                    expected = seconds_of([(frozen, rate), (bridge, rate if cuda else slow)], memory)
                    base = own.get((batch, cuda))
                    label = f"generate, split {split}, batch {batch}, block {block}, {steps} steps, {name}"
                    bench.row(f"{label}: token", 1e3 * took / new, "ms", predicted=1e3 * expected / new, nfe=made.nfe)
                    if base:
                        bench.row(
                            f"{label}: x the backbone's speed", base * new / took, predicted=base * new / expected
                        )
                    share = expected / took
                    bench.row(f"{label}: share of predicted speed", share, bar=">= 0.6", ok=share >= 0.6)
