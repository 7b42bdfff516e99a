"""What scoring costs beside the plain forward pass of the same tokens, and its peak memory.

    python benchmarks/scoring.py [--backbone FOLDER] [--tokens 16384] [--device auto] [--threads N]

Cost: one process; the plain pass runs all blocks and the final norm on the very batches that are
scored, without the LM head, keeping nothing. Plain and scoring runs alternate, as many of each kind;
each is represented by its fastest run, because everything that disturbs a run makes it slower (so
the fastest of more runs would be faster). All runs are in the file. Wall seconds and process CPU seconds are both reported. Memory: one process per number of
tokens, a small random backbone, peak resident set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dihal import load_backbone, score_layers
from dihal.config import DataConfig, ScoreConfig
from dihal.data.text import read_documents
from dihal.geometry.windows import draw_documents, plan_chunks
from dihal.io import write_json
from dihal.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent


def documents() -> list[str]:
    return [document.text for document in read_documents(DataConfig())]


class Clock:
    """Wall and process CPU seconds of a block."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def _sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __enter__(self) -> Clock:
        self._sync()
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self._sync()
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu


@torch.no_grad()
def plain_forward(backbone: Any, chunks: list[Any]) -> None:
    for chunk in chunks:
        ids = chunk.input_ids.to(backbone.device)
        mask = None if bool(chunk.real.all()) else chunk.real.to(backbone.device)
        backbone.decoder(input_ids=ids, attention_mask=mask, use_cache=False)


def cost(arguments: argparse.Namespace) -> dict[str, Any]:
    backbone = load_backbone(arguments.backbone, device=arguments.device, dtype=arguments.dtype)
    texts = documents()
    config = ScoreConfig(tokens=arguments.tokens, batch_tokens=arguments.batch_tokens)
    draw = draw_documents(backbone, texts, config)
    chunks = plan_chunks(draw, config.batch_tokens)
    plain_forward(backbone, chunks[:1])
    if backbone.device.type == "cuda":
        score_layers(backbone, texts, dataclasses.replace(config, tokens=8 * config.sequence_length, bootstrap=10))
    modes = {"plain": None, "score, no intervals": 0, "score, intervals": config.bootstrap}
    runs: dict[str, list[Clock]] = {name: [] for name in modes}
    for name in [*modes] * arguments.repeats:
        bootstrap = modes[name]
        with Clock(backbone.device) as clock:
            if bootstrap is None:
                plain_forward(backbone, chunks)
            else:
                report = score_layers(backbone, texts, dataclasses.replace(config, bootstrap=bootstrap))
        runs[name].append(clock)
        print(f"{name}: {clock.wall:.1f} s wall, {clock.cpu:.1f} s CPU", file=sys.stderr, flush=True)
    best = {name: (min(c.wall for c in found), min(c.cpu for c in found)) for name, found in runs.items()}
    summary = {
        name: {
            "wall_s": best[name][0],
            "wall_ratio": best[name][0] / best["plain"][0],
            "cpu_s": best[name][1],
            "cpu_ratio": best[name][1] / best["plain"][1],
            "all_wall_s": [clock.wall for clock in found],
            "all_cpu_s": [clock.cpu for clock in found],
        }
        for name, found in runs.items()
    }
    padded = sum(chunk.input_ids.numel() for chunk in chunks)
    return {
        "backbone": backbone.reference.to_dict(),
        "tokens": draw.tokens,
        "documents": draw.documents,
        "padding_share": 1 - draw.tokens / padded,
        "config": dataclasses.asdict(config),
        "selected_split": report.selected_split,
        "peak_mib": peak_mib(),
        "runs": summary,
    }


def one_memory_run(tokens: int) -> None:
    """Score a small random backbone on random documents; print the peak resident set in MiB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    backbone = load_backbone(LlamaForCausalLM(shape).eval(), device="cpu")
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(4096, (400,), generator=generator).tolist() for _ in range(tokens // 400 + 1)]
    score_layers(backbone, texts, ScoreConfig(tokens=tokens, pool=8_192))
    print(json.dumps({"tokens": tokens, "peak_mib": peak_mib()}))


def peak_mib() -> float:
    """Peak resident set of this process. Not ru_maxrss where avoidable: a child inherits its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory() -> list[dict[str, Any]]:
    found = []
    for tokens in (8_192, 16_384, 32_768):
        command = [sys.executable, __file__, "--memory-tokens", str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(f"memory: {found[-1]}", file=sys.stderr, flush=True)
    return found


def show(result: dict[str, Any]) -> None:
    console = Console()
    if "runs" in result:
        table = Table(title=f"{result['backbone']['id']}, {result['tokens']:,} tokens, all splits")
        for header in ("run", "wall s", "x plain", "CPU s", "x plain"):
            table.add_column(header, justify="left" if header == "run" else "right")
        for name, run in result["runs"].items():
            table.add_row(
                name,
                f"{run['wall_s']:.1f}",
                f"{run['wall_ratio']:.2f}",
                f"{run['cpu_s']:.1f}",
                f"{run['cpu_ratio']:.2f}",
            )
        console.print(table)
    if "memory" in result:
        table = Table("tokens", "peak MiB", title="peak memory, pool 8,192, 8 blocks x 256 channels")
        for row in result["memory"]:
            table.add_row(f"{row['tokens']:,}", f"{row['peak_mib']:.0f}")
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--batch-tokens", type=int, default=ScoreConfig().batch_tokens)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's own")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; each runs plain and scoring both ways once")
    parser.add_argument("--only", choices=("cost", "memory"), default=None)
    parser.add_argument("--out", default=str(ROOT / "results" / "benchmark_scoring.json"))
    parser.add_argument("--memory-tokens", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_tokens is not None:
        one_memory_run(arguments.memory_tokens)
        return
    result: dict[str, Any] = {}
    if arguments.only != "memory":
        result.update(cost(arguments))
    if arguments.only != "cost":
        result["memory"] = memory()
    result["provenance"] = provenance()
    write_json(arguments.out, result)
    show(result)


if __name__ == "__main__":
    main()
