"""Bars 4 and 5: one process beside several, through torchrun.

python benchmarks/eight_billion.py --sections scaling --gpus 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from eight_kit import ROOT, Bench, Step, make_batch, sizes
from torch import nn

from dihal.config import ScoreConfig


def launch(script: list[str], processes: int, timeout: float, *, device: str) -> None:
    """torchrun on this machine, on a port of its own."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        *script,
    ]
    search = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(search)}
    environment.setdefault("NCCL_NVLS_ENABLE", "0")
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, env=environment, timeout=timeout, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(script)} with {processes} processes ended with {done.returncode}: {done.stderr[-1500:]}"
        )


def run(bench: Bench, options: Any) -> None:
    many = options.gpus
    if bench.device.type == "cuda" and torch.cuda.device_count() < many:
        bench.row("skipped", f"{many} GPUs asked for, {torch.cuda.device_count()} there")
        many = torch.cuda.device_count()
    counts = [n for n in (1, 2, 4, 8) if n <= many]
    with tempfile.TemporaryDirectory() as temporary:
        for work in options.scaling.split(","):
            if work == "losses":
                with bench.part("equal losses"):
                    equal_losses(bench, counts, Path(temporary))
                continue
            found: dict[int, float] = {}
            for processes in counts:
                with bench.part(f"{work} on {processes}"):
                    out = f"{temporary}/{work}{processes}.json"
                    script = [__file__, "--work", work, "--out", out, "--shape", options.shape]
                    script += ["--tiny"] * bench.tiny + ["--eager"] * (not bench.compile)
                    launch(script, processes, 150, device=bench.device.type)
                    measured = json.loads(Path(out).read_text())
                    found[processes] = measured.pop("seconds")
                    bench.row(
                        f"{work}, {processes} processes, the same work for each", found[processes], "s", **measured
                    )
            for processes in counts[1:]:
                if 1 in found and processes in found:
                    gain = processes * found[1] / found[processes]
                    bar = {2: 1.92, 4: 3.8}.get(processes, 0.95 * processes)
                    bench.row(f"{work}: weak scaling on {processes}", gain, "x", bar=f">= {bar}", ok=gain >= bar)


def equal_losses(bench: Bench, counts: list[int], folder: Path) -> None:
    """The same global batch on 1, 2, ... processes: the loss of every step."""
    from eight_training import write_text

    from tests.kit import tiny_model, tiny_tokenizer

    steps = bench.sizes.equal_steps
    model = folder / "model"
    tiny_model(num_blocks=4, hidden_size=64, vocab=260).save_pretrained(model)
    tiny_tokenizer(260).save_pretrained(model)
    text = write_text(folder, 400_000)
    losses: dict[int, list[float]] = {}
    for processes in counts:
        out = folder / f"equal{processes}"
        words = {
            "backbone.id": model, "backbone.dtype": "float32", "data.source": text, "data.sequence_length": 64,
            "data.batch_size": 8 // processes, "method.split": 2, "method.denoiser.width": 64, "method.denoiser.depth": 2,
            "method.denoiser.heads": 2, "budget.tokens": steps * 8 * 64, "trainer.devices": processes,
            "trainer.accelerator": "gpu" if bench.device.type == "cuda" else "cpu", "trainer.precision": "32-true",
            "log.every": 1, "log.progress": "false", "trainer.validate_batches": 0, "out": out,
            "method.normalisation_tokens": 1024,
        }  # fmt: skip
        script = [str(ROOT / "train.py"), *(word for key, value in words.items() for word in (f"--{key}", str(value)))]
        launch(script, processes, 120, device=bench.device.type)
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[processes] = [record["loss"] for record in records if record["kind"] == "train"]
    for processes in counts[1:]:
        pairs = list(zip(losses[1], losses[processes], strict=True))
        worst = max(abs(a - b) / abs(a) for a, b in pairs)
        bench.row(
            f"loss per step on 1 and {processes}, {len(pairs)} steps, largest relative difference", worst,
            bar="<= 1e-3", ok=worst <= 1e-3,
        )  # fmt: skip


# -- a process of torchrun


class Loss(nn.Module):
    """What DistributedDataParallel wraps: parameters of the method, forward = its loss."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.method = step.method
        object.__setattr__(self, "step", step)

    def forward(self, batch: Any) -> torch.Tensor:
        step = self.step
        out = step.method.loss(
            step.backbone, batch, seed=0, step=step.number, global_batch=len(batch) * torch.distributed.get_world_size(),
            batch_index=torch.arange(len(batch), device=step.bench.device),
        )  # fmt: skip
        return out.total


def train_step(bench: Bench, step: Step, ddp: nn.Module, batch: Any) -> None:
    with bench.autocast():
        loss = ddp(batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(step.method.parameters(), step.optim.clip, foreach=True)
    step.optimizer.step()
    step.optimizer.zero_grad(set_to_none=True)
    step.ema.update()
    step.number += 1


def timed(bench: Bench, work: Any, repeats: int) -> float:
    """Median seconds of the slowest rank."""
    found = []
    for _ in range(repeats):
        torch.distributed.barrier()
        bench.sync()
        started = time.perf_counter()
        work()
        bench.sync()
        took = torch.tensor([time.perf_counter() - started], dtype=torch.float64, device=bench.device)
        torch.distributed.all_reduce(took, op=torch.distributed.ReduceOp.MAX)
        found.append(float(took))
    return statistics.median(found)


def worker(options: Any) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if cuda else "gloo", **({"device_id": device} if cuda else {}))
    bench = Bench(
        device=device, sizes=sizes(options.tiny, options.shape), compile=not options.eager and cuda,
        out=Path(options.out).with_suffix(f".{rank}.rows.json"), tiny=options.tiny,
    )  # fmt: skip
    found = {"training": training, "scoring": scoring}[options.work](bench)
    if torch.distributed.get_rank() == 0:
        Path(options.out).write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def training(bench: Bench) -> dict[str, Any]:
    """Seconds of a step of the slowest process; beside them, of each process alone and nothing exchanged.

    That the GPUs of a machine differ, and how much, is no matter of exchanging gradients.
    """
    from torch.nn.parallel import DistributedDataParallel

    size = bench.sizes
    backbone = bench.backbone(blocks=size.splits[0])
    step = Step(bench, backbone, size.splits[0], size.small)
    loss, ids = Loss(step), {"device_ids": [bench.device.index]} if bench.device.type == "cuda" else {}
    first = torch.distributed.get_rank() * size.batch
    batch = make_batch(backbone.vocab_size, size.batch, size.length, bench.device, first=first)
    for _ in range(4):
        train_step(bench, step, loss, batch)
    alone = timed(bench, lambda: train_step(bench, step, loss, batch), 8)
    ddp = DistributedDataParallel(loss, broadcast_buffers=False, gradient_as_bucket_view=True, **ids)
    for _ in range(4):
        train_step(bench, step, ddp, batch)
    return {"seconds": timed(bench, lambda: train_step(bench, step, ddp, batch), 12), "without_exchange": alone}


def scoring(bench: Bench) -> dict[str, Any]:
    """As many tokens for each process; the scorer itself divides them and merges the moments."""
    from eight_scoring import documents

    from dihal.geometry.ranks import Ranks
    from dihal.geometry.score import score_layers

    size, world = bench.sizes, torch.distributed.get_world_size()
    backbone = bench.backbone()
    if bench.compile:
        for block in backbone.blocks:
            block.compile(dynamic=False)
    tokens = world * (size.score_tokens // 2)
    texts = [text for part in range(world) for text in documents(bench, backbone)]
    # A document that is drawn twice is one document: make them differ.
    texts = [torch.roll(text, 7 * number) for number, text in enumerate(texts)]
    config = ScoreConfig(
        tokens=tokens, sequence_length=size.score_length, batch_tokens=size.score_batch, pool=size.pool,
        anchors=size.anchors, bootstrap=0, neighbours=8 if bench.tiny else 32, rank="participation",
    )  # fmt: skip
    ranks = Ranks(rank=torch.distributed.get_rank(), size=world)
    score_layers(backbone, texts, config, ranks=ranks)
    return {"seconds": timed(bench, lambda: score_layers(backbone, texts, config, ranks=ranks), 2)}


if __name__ == "__main__":
    made = argparse.ArgumentParser()
    made.add_argument("--work", required=True)
    made.add_argument("--out", required=True)
    made.add_argument("--shape", default="llama-3.1-8b")
    made.add_argument("--tiny", action="store_true")
    made.add_argument("--eager", action="store_true")
    worker(made.parse_args())
