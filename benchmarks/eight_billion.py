"""What an 8B backbone costs: scoring, training, generation, memory, scaling; each beside its bar.

    python benchmarks/eight_billion.py [--sections scoring,training,...] [--shape llama-3.1-8b] [--tiny]
    python benchmarks/eight_billion.py --sections scaling --gpus 2

Random weights from the published configs, made on the device. Every figure of speed is a ratio of two
things measured in this process. Rows are printed and written as they are measured; a section that
fails or takes too long is a row, and the next one begins.
"""

from __future__ import annotations

import argparse
import importlib
import os
import warnings
from pathlib import Path

import torch
from eight_kit import Bench, sizes

SECTIONS = {
    "scoring": ("eight_scoring", "run", 330),
    "training": ("eight_training", "run_training", 320),
    "suffix": ("eight_training", "run_suffix", 150),
    "generation": ("eight_generation", "run", 240),
    "loop": ("eight_training", "run_loop", 200),
    "memory": ("eight_memory", "run", 200),
    "scaling": ("eight_scaling", "run", 400),
}
"""Name -> module, function, seconds it may take."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--sections", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    made.add_argument("--shape", default="llama-3.1-8b", help="llama-3.1-8b or qwen3-8b")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--tiny", action="store_true", help="a tiny model: only to see that everything runs")
    made.add_argument("--eager", action="store_true", help="compile nothing")
    made.add_argument("--intervals", action="store_true", help="scoring: also with bootstrap intervals")
    made.add_argument("--gpus", type=int, default=2, help="scaling: processes to compare with one")
    made.add_argument("--scaling", default="training,scoring,losses", help="scaling: which of these")
    made.add_argument("--limit", type=float, default=1.0, help="factor on every section's time limit")
    made.add_argument("--out", default="results/benchmark_eight_billion.json")
    return made


def main(arguments: list[str] | None = None) -> Bench:
    """Run the sections; return the table."""
    options = parser().parse_args(arguments)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    # A step allocates and frees tensors of many sizes: fragments would count as memory.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device = torch.device(options.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    chosen = [name for name in options.sections.split(",") if name]
    for name in chosen:
        if name not in SECTIONS:
            raise SystemExit(f"no section {name!r}: {', '.join(SECTIONS)}")
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        device=device, sizes=sizes(options.tiny, options.shape), compile=not options.eager, out=out, tiny=options.tiny
    )
    print("| section | what | value | bar | verdict |", flush=True)
    print("|---|---|---|---|---|", flush=True)
    for name in chosen:
        module, function, seconds = SECTIONS[name]
        with bench.guarded(name, max(1, int(seconds * options.limit))):
            getattr(importlib.import_module(module), function)(bench, options)
        bench.held = None
        torch._dynamo.reset()
    missed = [row["name"] for row in bench.rows if row["met"] is False]
    failed = [f"{row['section']}: {row['name']}" for row in bench.rows if row["name"].endswith("failed")]
    print(f"{sum(row['met'] is True for row in bench.rows)} bars met, missed: {missed}, failed: {failed}", flush=True)
    return bench


if __name__ == "__main__":
    main()
