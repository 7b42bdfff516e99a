"""Bar 10: the estimate before training beside the peak; and settings named after running out of memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from eight_kit import Bench, Step, free, make_batch

from dihal.backbone import Backbone
from dihal.config import (
    BackboneConfig,
    DataConfig,
    DenoiserConfig,
    MethodConfig,
    ObjectiveConfig,
    TrainConfig,
    TrainerConfig,
)
from dihal.training.memory import estimate_memory, out_of_memory, settings_that_fit


def config_of(
    bench: Bench, split: int, net: DenoiserConfig, batch: int, objective: ObjectiveConfig, compiled: bool
) -> TrainConfig:
    cuda = bench.device.type == "cuda"
    return TrainConfig(
        backbone=BackboneConfig(id="random", dtype=bench.sizes.dtype),
        data=DataConfig(sequence_length=bench.sizes.length, batch_size=batch),
        method=MethodConfig(split=split, denoiser=net, objective=objective),
        trainer=TrainerConfig(precision="bf16-mixed" if cuda else "32-true", compile=compiled),
    )


def peak_of(bench: Bench, backbone: Backbone, config: TrainConfig) -> tuple[Any, int]:
    """The largest memory of three optimiser steps of a configuration."""
    free()
    method = config.method
    step = Step(
        bench, backbone, int(method.split or 0), method.denoiser, objective=method.objective, compiled=config.trainer.compile
    )  # fmt: skip
    if config.optim.ema == 0:
        step.ema._averages, step.ema._parameters = [], []
    batch = make_batch(backbone.vocab_size, config.data.batch_size, bench.sizes.length, bench.device)
    step(batch)
    bench.reset_peak()
    for _ in range(2):
        accumulated(step, batch, config.trainer.accumulate)
    return step.method, bench.peak()


def accumulated(step: Step, batch: Any, times: int) -> None:
    """An optimiser step of several micro-batches."""
    bench = step.bench
    for _ in range(times - 1):
        with bench.autocast():
            out = step.method.loss(
                step.backbone, batch, seed=0, step=0, batch_index=torch.arange(len(batch), device=bench.device),
                global_batch=len(batch),
            )  # fmt: skip
        out.total.backward()
    step(batch)


def run(bench: Bench, options: Any) -> None:
    size = bench.sizes
    first, second = size.splits
    state, entropy = ObjectiveConfig(), ObjectiveConfig(cross_entropy=0.1, logit_chunk=512)
    cases = [
        (first, size.small, size.batch, state, False),
        (first, size.small, size.batch, state, bench.compile),
        (second, size.large, max(1, size.batch // 2), state, False),
        (first, size.small, max(1, size.suffix_batch // 2), entropy, bench.compile),
        (first, size.small, max(1, size.suffix_batch // 2), replace(entropy, kl=0.1), False),
    ]
    for split, net, batch, objective, compiled in cases:
        reads = objective.cross_entropy > 0
        what = "state, CE, KL" if objective.kl > 0 else "state, CE" if reads else "state"
        name = (
            f"split {split}, depth {net.depth}, {batch} x {size.length}, {what}, {'compiled' if compiled else 'eager'}"
        )
        with bench.part(name):
            backbone = bench.backbone(blocks=None if reads else split)
            config = config_of(bench, split, net, batch, objective, compiled)
            method, peak = peak_of(bench, backbone, config)
            estimate = estimate_memory(config, backbone, method)
            gib = {name: value / 2**30 for name, value in estimate.parts.items()}
            bench.row(f"{name}: peak", peak / 2**30, "GiB", parts=gib, estimate=estimate.total / 2**30)
            if bench.device.type == "cuda":
                ratio = estimate.total / peak
                bench.row(f"{name}: estimate over peak", ratio, bar="0.9-1.1", ok=0.9 <= ratio <= 1.1)
        # A backbone of all blocks, held on, would be most of what the next part is given.
        method = backbone = None
    with bench.part("out of memory"):
        too_little(bench, options)


def too_little(bench: Bench, options: Any) -> None:
    """Give the process less than a step needs; then do as the message says."""
    size = bench.sizes
    backbone = bench.backbone(blocks=size.splits[0])
    config = config_of(bench, size.splits[0], size.small, size.batch, ObjectiveConfig(), compiled=False)
    method = Step(bench, backbone, size.splits[0], size.small, compiled=False).method
    whole = estimate_memory(config, backbone, method)
    limit = int(0.75 * whole.total)
    fits = settings_that_fit(config, backbone, method, limit)
    message = out_of_memory(config, backbone, method, peak=limit, limit=limit)
    del method
    bench.row("settings named", "; ".join(map(str, fits)), message=message)
    if bench.device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(bench.device).total_memory
    free()
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), bench.device)
    try:
        failed = False
        try:
            peak_of(bench, backbone, config)
        except torch.OutOfMemoryError:
            failed = True
        bench.row(f"with {limit / 2**30:.1f} GiB the step runs out of memory", failed)
        for fit in fits:
            free()
            held = bench.allocated() / 2**30
            try:
                _, peak = peak_of(bench, backbone, fit.config)
                bench.row(f"then with {fit}", f"fits, peak {peak / 2**30:.1f} GiB", bar="fits", ok=True, held_gib=held)
            except torch.OutOfMemoryError as error:
                bench.row(f"then with {fit}", "out of memory", bar="fits", ok=False, held_gib=held, error=str(error))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, bench.device)
    for fit in fits:
        # Without the limit: what it really takes, allocated and reserved.
        free()
        _, peak = peak_of(bench, backbone, fit.config)
        reserved = torch.cuda.max_memory_reserved(bench.device) / 2**30
        bench.row(f"alone: {fit}", peak / 2**30, "GiB", reserved_gib=reserved)
