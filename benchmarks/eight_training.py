"""Bars 2, 3 and 9: the training step, cross-entropy through the suffix, the loop."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from eight_kit import Bench, Step, make_batch, measured

from dihal.backbone import Backbone
from dihal.config import ObjectiveConfig
from dihal.spaces.recovery import divergence, suffix_loss


def with_full_forward(backbone: Backbone) -> Any:
    """A ``prefix`` that runs the whole model to its logits and keeps one state: what a step costs that does not stop."""

    def prefix(input_ids: torch.Tensor, split: int, **_: Any) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        hook = backbone.blocks[split].register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
        try:
            logits = backbone.model(input_ids=input_ids, use_cache=False).logits
        finally:
            hook.remove()
        assert logits.shape[-1] == backbone.vocab_size
        return kept[0]

    return prefix


def run_training(bench: Bench, options: Any) -> None:
    size = bench.sizes
    first, second = size.splits
    with bench.part("noise"):
        bench.fuse_noise()
    for split, net in ((first, size.small), (first, size.large), (second, size.small), (second, size.large)):
        with bench.part(f"split {split}"):
            backbone = bench.backbone(blocks=split)
            step = Step(bench, backbone, split, net)
            batch = make_batch(backbone.vocab_size, size.batch, size.length, bench.device)
            label = f"split {split}, {step.parameters / 1e9:.2f}B bridge, {batch.input_ids.numel()} tokens"
            rate = bench.matmul_rate()
            seconds, peak = measured(bench, step, batch)
            share = step.counted_flops(batch) / seconds / rate
            bench.row(f"{label}: step", 1e3 * seconds, "ms", tflop=step.counted_flops(batch) / 1e12)
            bench.row(f"{label}: counted FLOP/s over matmul rate", share, bar=">= 0.50", ok=share >= 0.50)
            limit = {"bar": "<= 30", "ok": peak <= 30e9} if (split, net) == (first, size.small) else {}
            bench.row(f"{label}: peak memory", peak / 1e9, "GB", **limit)
            if split == first and net is size.small:
                with bench.part("pieces"):
                    pieces(bench, step, batch)
            del step
    with bench.part("full forward"):
        backbone = bench.backbone()
        step = Step(bench, backbone, second, size.small)
        batch = make_batch(backbone.vocab_size, size.batch, size.length, bench.device)
        stopped, _ = measured(bench, step, batch)
        backbone.prefix = with_full_forward(backbone)  # type: ignore[method-assign]
        whole, peak = measured(bench, step, batch)
        bench.row(f"split {second}: step with full forward and logits", 1e3 * whole, "ms", peak_gb=peak / 1e9)
        ratio = stopped / whole
        bench.row(f"split {second}: step, x the same with full forward", ratio, bar="<= 0.5", ok=ratio <= 0.5)


def pieces(bench: Bench, step: Step, batch: Any) -> None:
    """Where a step goes, so that a miss can be explained."""
    from dihal.random import normal

    backbone, method = step.backbone, step.method
    shape = (bench.sizes.length, backbone.hidden_size)

    def prefix() -> None:
        with torch.no_grad():
            backbone.prefix(batch.input_ids, method.split)

    def forward() -> torch.Tensor:
        with bench.autocast():
            return method.loss(
                backbone, batch, seed=0, step=0, batch_index=torch.arange(len(batch), device=bench.device), global_batch=len(batch)
            ).total  # fmt: skip

    def both() -> None:
        forward().backward()

    bench.row("piece: frozen prefix", 1e3 * bench.seconds(prefix), "ms")
    bench.row("piece: noise", 1e3 * bench.seconds(lambda: normal(0, batch.sample_ids, "noise", shape, device=bench.device)), "ms")  # fmt: skip
    bench.row("piece: loss, forward (all)", 1e3 * bench.seconds(forward), "ms")
    bench.row("piece: loss, forward and backward (all)", 1e3 * bench.seconds(both), "ms")

    def optimise() -> None:
        torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0, foreach=True)
        step.optimizer.step()
        step.ema.update()

    bench.row("piece: clip, AdamW, average", 1e3 * bench.seconds(optimise), "ms")
    step.optimizer.zero_grad(set_to_none=True)
    if bench.device.type == "cuda":
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
            step(batch)
            bench.sync()
        table = trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=14, max_name_column_width=60)
        print(table[:4500], flush=True)


def run_suffix(bench: Bench, options: Any) -> None:
    size = bench.sizes
    split = size.splits[0]
    backbone = bench.backbone()
    batch = make_batch(backbone.vocab_size, size.suffix_batch, size.length, bench.device)
    found = {}
    for name, objective in (
        ("state", ObjectiveConfig()),
        ("cross-entropy", ObjectiveConfig(cross_entropy=0.1, logit_chunk=512)),
    ):
        with bench.part(name):
            step = Step(bench, backbone, split, size.small, objective=objective)
            seconds, peak = measured(bench, step, batch)
            found[name] = seconds, step.counted_flops(batch)
            bench.row(
                f"split {split}, {batch.input_ids.numel()} tokens, {name}: step",
                1e3 * seconds,
                "ms",
                peak_gb=peak / 1e9,
            )
            del step
    if len(found) == 2:
        predicted = found["cross-entropy"][1] / found["state"][1]
        ratio = found["cross-entropy"][0] / found["state"][0]
        bench.row("ratio of steps, predicted by FLOPs", predicted)
        bench.row("ratio of steps, measured", ratio)
        bench.row("measured over predicted", ratio / predicted, bar="<= 1.25", ok=ratio <= 1.25 * predicted)
    for tokens in (batch.input_ids.numel(), 2 * batch.input_ids.numel()):
        with bench.part("memory of the loss"):
            memory_of_loss(bench, backbone, tokens)


def memory_of_loss(bench: Bench, backbone: Backbone, tokens: int) -> None:
    dim, vocab = backbone.hidden_size, backbone.vocab_size
    features = torch.randn(tokens, dim, device=bench.device).to(backbone.dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,), device=bench.device)
    weight = torch.full((tokens,), 1.0 / tokens, device=bench.device)
    kernels = {"eager": divergence}
    if bench.compile:
        kernels["compiled"] = torch.compile(divergence, dynamic=False)
    for name, kernel in kernels.items():

        def work() -> None:
            loss = suffix_loss(
                features, targets, backbone.head, weight_ce=weight, weight_kl=torch.zeros_like(weight), chunk=512,
                kernel=kernel,  # noqa: B023
            )  # fmt: skip
            loss.total.backward()
            features.grad = None

        work()
        bench.reset_peak()
        before = bench.allocated()
        work()
        extra = bench.peak() - before
        share = extra / (tokens * vocab * 4)
        bench.row(
            f"{tokens} tokens, {name}: extra memory of the loss over T*V*4", share, bar="<= 0.15", ok=share <= 0.15
        )
        bench.row(f"{tokens} tokens, {name}: loss and gradient", 1e3 * bench.seconds(work), "ms")


def write_text(folder: Path, tokens: int) -> Path:
    generator = torch.Generator().manual_seed(0)
    path = folder / "text.jsonl"
    letters = torch.tensor(list(b"abcdefghijklmnopqrstuvwxyz      "))
    lines = []
    for _ in range(max(8, tokens // 4000)):
        drawn = letters[torch.randint(len(letters), (4096,), generator=generator)]
        lines.append(json.dumps({"text": bytes(drawn.tolist()).decode()}))
    path.write_text("\n".join(lines) + "\n")
    return path


def run_loop(bench: Bench, options: Any) -> None:
    """Lightning's loop beside a bare one, and compiled beside eager."""
    from dihal.config import (
        BackboneConfig,
        BudgetConfig,
        DataConfig,
        LogConfig,
        MethodConfig,
        TrainConfig,
        TrainerConfig,
    )
    from dihal.training.logs import read_records
    from dihal.training.run import train
    from tests.kit import tiny_tokenizer

    size, split = bench.sizes, bench.sizes.splits[0]
    steps = size.loop_steps
    per_step = size.batch * size.length
    eager, compiled = None, None
    for name in ("eager", "compiled") if bench.compile else ("eager",):
        with bench.part(name):
            backbone = bench.backbone(blocks=split)
            step = Step(bench, backbone, split, size.small, compiled=name == "compiled")
            batch = make_batch(backbone.vocab_size, size.batch, size.length, bench.device)
            seconds, _ = measured(bench, step, batch, repeats=8)
            bench.row(f"bare step, {name}", 1e3 * seconds, "ms")
            eager, compiled = (seconds, compiled) if name == "eager" else (eager, seconds)
            del step
    if eager and compiled:
        ratio = eager / compiled
        bench.row("eager over compiled", ratio, bar=">= 1.1", ok=ratio >= 1.1)

    with bench.part("lightning"), tempfile.TemporaryDirectory() as temporary:
        text = write_text(Path(temporary), 2 * steps * per_step)
        # The loop writes a manifest with fingerprints of all weights, so that it needs them all.
        backbone = bench.backbone(tokenizer=tiny_tokenizer(260))
        found = {}
        for every in (1, steps):
            config = TrainConfig(
                backbone=BackboneConfig(id="random", dtype=size.dtype, device=str(bench.device)),
                data=DataConfig(source=str(text), sequence_length=size.length, batch_size=size.batch),
                method=MethodConfig(split=split, denoiser=size.small, normalisation_tokens=4 * size.length),
                budget=BudgetConfig(tokens=steps * per_step),
                trainer=TrainerConfig(
                    accelerator="gpu" if bench.device.type == "cuda" else "cpu", compile=bench.compile, validate_batches=1,
                    precision="bf16-mixed" if bench.device.type == "cuda" else "32-true",
                ),
                log=LogConfig(every=1, progress=False),
                out=f"{temporary}/run{every}",
            )  # fmt: skip
            train(config, backbone=backbone)
            records = [r for r in read_records(Path(config.out) / "metrics.jsonl") if r["kind"] == "train"]
            half = len(records) // 2
            found[every] = (records[-1]["seconds"] - records[half]["seconds"]) / (
                records[-1]["step"] - records[half]["step"]
            )
            break
        loop = found[1]
        bench.row("step in Lightning's loop", 1e3 * loop, "ms")
        bare = bare_loop(bench, backbone, text, steps)
        bench.row("step in a bare loop doing the same", 1e3 * bare, "ms")
        bench.row("Lightning over bare", loop / bare, bar="<= 1.05", ok=loop <= 1.05 * bare)


def bare_loop(bench: Bench, backbone: Backbone, text: Path, steps: int) -> float:
    """The same batches from the same files, the same step, the loss read by the host after each."""
    from dihal.config import DataConfig
    from dihal.data.module import TextDataModule

    size = bench.sizes
    data = TextDataModule(
        DataConfig(source=str(text), sequence_length=size.length, batch_size=size.batch),
        tokenizer=backbone.tokenizer, tokenizer_fingerprint=backbone.tokenizer_fingerprint,
        start_token_id=backbone.start_token_id, end_token_id=backbone.end_token_id, progress=False,
    )  # fmt: skip
    data.setup()
    step = Step(bench, backbone, size.splits[0], size.small)
    times = []
    for number in range(steps):
        import numpy as np

        index = np.arange(number * size.batch, (number + 1) * size.batch, dtype=np.int64) % data.stream.windows
        batch = data.stream.batch(index).to(bench.device)
        float(step(batch))
        times.append(time.perf_counter())
    half = len(times) // 2
    return (times[-1] - times[half]) / (len(times) - 1 - half)
