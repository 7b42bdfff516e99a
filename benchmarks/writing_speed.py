"""Speed of every space under `generate`, in one process: training, and writing against the backbone's own `generate`.

    python benchmarks/writing_speed.py [--methods configs/method/write-*.yaml] [--tiny]

Weights are random: speed does not depend on them. Training is a whole optimiser step at the shipped sizes, compiled,
as a ratio to the space `hidden`. Writing is blocks of a fixed length without an end token, with its number of function
evaluations (NFE) per block, as a ratio to the backbone's cached decoding of as many tokens, which is timed once per
batch. Each figure is the median of the rounds, those of training taken in turn. On a GPU blocks are CUDA graphs.
Rows are printed, and results/benchmark_writing.json is written, as they are measured, training first.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dihal.backbone import Backbone, load_backbone
from dihal.config import MethodConfig, OptimConfig, TrainConfig
from dihal.config.cli import parse
from dihal.data.batch import Batch
from dihal.io import write_json
from dihal.methods import build_method
from dihal.provenance import provenance
from dihal.training.optim import build_optimizer
from dihal.writer import Writer

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("hidden", "latent", "embedding", "simplex")


def random_batch(backbone: Backbone, count: int, length: int) -> Batch:
    """Random tokens without padding."""
    ids = torch.randint(4, backbone.vocab_size, (count, length), device=backbone.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    rows = torch.arange(count, device=backbone.device)
    owners = rows[:, None].expand(-1, length)
    return Batch(
        input_ids=ids, attention_mask=mask, document_ids=owners, loss_mask=mask, sample_ids=rows, full=True
    )  # fmt: skip


def seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """Wall time of one call, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def configuration(path: Path, tiny: bool) -> MethodConfig:
    """A shipped method at the size the comparison trains."""
    config = parse(TrainConfig, ["--method", str(path)], prog="writing_speed").method
    size = {"width": 64, "depth": 2, "heads": 4} if tiny else {"width": 576, "depth": 12, "heads": 9}
    return dataclasses.replace(
        config,
        split=0 if config.space == "embedding" or config.split == 0 else (2 if tiny else 3),
        denoiser=dataclasses.replace(config.denoiser, **size),
        latent=dataclasses.replace(config.latent, dim=16, hidden=32) if tiny else config.latent,
    )


def train_step(backbone: Backbone, method: Writer, batch: Batch) -> Callable[[], None]:
    """One optimiser step as training takes it, past the first stage of a space with two."""
    optimizer = build_optimizer(method, OptimConfig(name="muon", lr=1e-4))
    index = torch.arange(len(batch), device=backbone.device)
    step = 0

    def work() -> None:
        nonlocal step
        data = dataclasses.replace(batch, sample_ids=batch.sample_ids + len(batch) * step)
        with torch.autocast(backbone.device.type, torch.bfloat16, enabled=backbone.device.type == "cuda"):
            out = method.loss(
                backbone, data, seed=0, step=step, batch_index=index, global_batch=len(batch), progress=0.9
            )
        out.total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

    return work


Keep = Callable[[str, dict[str, Any]], None]
"""Prints and writes a row of a table."""


def training(backbone: Backbone, configs: dict[str, MethodConfig], arguments: argparse.Namespace, keep: Keep) -> None:
    """Tokens per second of every space, rounds in turn."""
    batch = random_batch(backbone, arguments.batch, arguments.length)
    works = {}
    for name, config in configs.items():
        method = build_method(config, backbone).to(backbone.device)
        method.fit_normalisation(backbone, [random_batch(backbone, 8, arguments.length)])
        if backbone.device.type == "cuda":
            method.compile_parts()
        works[name] = train_step(backbone, method.train(), batch)
        for _ in range(3):
            works[name]()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(arguments.rounds):
        for name, work in works.items():
            times[name].append(seconds(backbone.device, lambda work=work: [work() for _ in range(arguments.repeats)]))
    tokens = arguments.repeats * batch.input_ids.numel()
    first = statistics.median(times[next(iter(times))])
    for name, found in times.items():
        row = {
            "space": name,
            "tokens_per_second": tokens / statistics.median(found),
            "relative_to_hidden": first / statistics.median(found),
            "rounds": [tokens / one for one in found],
        }
        keep("training", row)


def decoding(backbone: Backbone, count: int, arguments: argparse.Namespace) -> float:
    """Seconds of the backbone's own cached decoding."""
    prompt = torch.randint(4, backbone.vocab_size, (count, arguments.prompt), device=backbone.device)
    options = {"do_sample": False, "min_new_tokens": arguments.new, "max_new_tokens": arguments.new}
    attention, end = torch.ones_like(prompt), backbone.end_token_id
    decode = partial(backbone.model.generate, prompt, attention_mask=attention, pad_token_id=end, **options)
    decode()
    return statistics.median(seconds(backbone.device, decode) for _ in range(arguments.rounds))


@torch.no_grad()
def writing(backbone: Backbone, configs: dict[str, MethodConfig], arguments: argparse.Namespace, keep: Keep) -> None:
    """Tokens per second of writing, at several batch and block sizes and numbers of steps."""
    plain = {count: decoding(backbone, count, arguments) for count in arguments.batches}
    for name, config in configs.items():
        method = build_method(config, backbone).to(backbone.device).eval()
        method.fit_normalisation(backbone, [random_batch(backbone, 8, arguments.length)])
        for count in arguments.batches:
            for block in arguments.blocks:
                for steps in arguments.steps:
                    keep("writing", written(backbone, name, method, (count, block, steps), plain[count], arguments))
        del method
        gc.collect()


def written(
    backbone: Backbone,
    name: str,
    method: Writer,
    size: tuple[int, int, int],
    plain: float,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """A row of writing: ``size`` is batch, positions of a block, steps; ``plain`` seconds of the backbone's decoding."""
    count, block, steps = size
    ids = torch.randint(4, backbone.vocab_size, (count, arguments.prompt + arguments.new), device=backbone.device)
    known = torch.arange(ids.shape[1], device=ids.device).expand(count, -1) < arguments.prompt
    how = dataclasses.replace(
        method.config.writing,
        steps=steps,
        block=block,
        precision="bfloat16" if backbone.device.type == "cuda" else method.config.writing.precision,
        static=arguments.static,
        compile=arguments.compile,
    )
    rows = torch.arange(count, device=ids.device)
    write = partial(method.write, backbone, ids, known, writing=how, sample_ids=rows, end=False, compare=False)
    # The first text runs as it is, the second captures what came once in the first.
    for _ in range(1 + arguments.static):
        write()
    own = statistics.median(seconds(backbone.device, write) for _ in range(arguments.rounds))
    tokens = count * arguments.new
    return {
        "space": name,
        "batch": count,
        "block": block,
        "steps": steps,
        "evaluations_per_block": method.evaluations(how),
        "evaluations_per_token": method.evaluations(how) / block,
        "tokens_per_second": tokens / own,
        "backbone_tokens_per_second": tokens / plain,
        "ratio": plain / own,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [ROOT / "configs" / "method" / f"write-{name}.yaml" for name in METHODS]
    parser.add_argument("--methods", type=Path, nargs="+", default=default, help="hidden first: ratios are to it")
    parser.add_argument("--batch", type=int, default=256, help="sequences of a training step")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64], help="texts written at once")
    parser.add_argument("--blocks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--steps", type=int, nargs="+", default=[16])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="steps per round of training")
    parser.add_argument(
        "--static",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="room of fixed size; on a GPU a block is a CUDA graph (default there)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="with --static: on compiled blocks; minutes of compiling"
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmark_writing.json")
    arguments = parser.parse_args()
    if arguments.tiny:
        sys.path.insert(0, str(ROOT))  # the tests are not installed
        from tests.kit import tiny_backbone

        backbone = tiny_backbone()
        arguments.batch, arguments.length, arguments.new, arguments.repeats = 4, 32, 16, 1
        arguments.blocks, arguments.steps, arguments.batches, arguments.prompt = [8], [2], [2], 8
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        backbone = load_backbone("embedded", device=device, dtype="bfloat16" if device == "cuda" else "float32")
    configs = {path.stem.removeprefix("write-"): configuration(path, arguments.tiny) for path in arguments.methods}
    options = {name: value for name, value in vars(arguments).items() if name not in ("methods", "out")}
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {"training": [], "writing": []}
    begin = time.perf_counter()

    def keep(table: str, row: dict[str, Any]) -> None:
        found[table].append(row)
        shown = (f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        print(f"{time.perf_counter() - begin:.0f} s: {table}:", ", ".join(shown), flush=True)
        write_json(arguments.out, {**found, "options": options, "hardware": hardware, "provenance": provenance()})

    with torch.random.fork_rng():
        torch.manual_seed(0)
        training(backbone, configs, arguments, keep)
        writing(backbone, configs, arguments, keep)


if __name__ == "__main__":
    main()
