"""Can every space learn? Each writer of configs/method learns sequences by heart and regenerates them from a prefix.

    python benchmarks/rivals.py [--methods configs/method/write-*.yaml] [--sequences 64] [--tiny]

Real text through the embedded backbone (--tiny: random tokens through a random one), the shipped options of each
space but for dropout of the condition and infilling (off), and the own head's loss (at weight 1 at least, for it is
what is read); the same network, optimiser and steps for all.
Read by the own head, greedily, and counted over every token after the prefix. A space that stays below 95 % is no
rival. Writes results/benchmark_rivals.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dihal.backbone import Backbone, load_backbone
from dihal.config import DataConfig, MethodConfig, OptimConfig, TrainConfig
from dihal.config.cli import parse
from dihal.data.batch import Batch
from dihal.data.module import TextDataModule
from dihal.io import write_json
from dihal.methods import build_method
from dihal.provenance import provenance
from dihal.training.optim import build_optimizer

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("hidden", "latent", "embedding", "simplex")


def sequences(backbone: Backbone, count: int, length: int, *, tiny: bool) -> Batch:
    """The sequences to be learned: windows of Python's documentation, or random tokens."""
    if tiny:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(4, backbone.vocab_size, (count, length), generator=generator)
        mask = torch.ones(count, length, dtype=torch.bool)
        rows = torch.arange(count)
        return Batch(
            input_ids=ids, attention_mask=mask, document_ids=rows[:, None].expand(-1, length), loss_mask=mask,
            sample_ids=rows, full=True,
        )  # fmt: skip
    data = TextDataModule(
        DataConfig(sequence_length=length),
        tokenizer=backbone.tokenizer,
        tokenizer_fingerprint=backbone.tokenizer_fingerprint,
        start_token_id=backbone.start_token_id,
        end_token_id=backbone.end_token_id,
    )
    return data.stream.batch(torch.arange(count).numpy())


def configuration(path: Path, *, split: int, tiny: bool) -> MethodConfig:
    """The shipped method, on a small network, without what makes a task harder than learning by heart."""
    config = parse(TrainConfig, ["--method", str(path)], prog="rivals").method
    size = {"width": 128, "depth": 3, "heads": 4} if tiny else {"width": 384, "depth": 6, "heads": 6}
    return dataclasses.replace(
        config,
        split=0 if config.space == "embedding" or config.split == 0 else split,
        denoiser=dataclasses.replace(config.denoiser, **size),
        objective=dataclasses.replace(config.objective, condition_dropout=0.0, own=max(config.objective.own, 1.0)),
        known=dataclasses.replace(config.known, infill=0.0),
        latent=dataclasses.replace(config.latent, dim=16, hidden=32) if tiny else config.latent,
    )


def learn(backbone: Backbone, config: MethodConfig, batch: Batch, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train on the sequences and write them again."""
    torch.manual_seed(0)
    method = build_method(config, backbone).to(backbone.device)
    method.fit_normalisation(backbone, [batch])
    optimizer = build_optimizer(method, OptimConfig(name="adamw", lr=arguments.lr, weight_decay=0.0))
    begin, count, steps = time.monotonic(), len(batch), arguments.steps
    method.train()
    for step in track(range(steps), description=config.space):
        share = step / steps
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * min(1.0, 10 * (step + 1) / steps, 2 * (1 - share))
        data = dataclasses.replace(batch, sample_ids=batch.sample_ids + count * step)
        index = torch.arange(count, device=backbone.device)
        with torch.autocast(backbone.device.type, torch.bfloat16, enabled=backbone.device.type == "cuda"):
            out = method.loss(backbone, data, seed=0, step=step, batch_index=index, global_batch=count, progress=share)
        optimizer.zero_grad()
        out.total.backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        optimizer.step()
    known = (torch.arange(batch.input_ids.shape[1], device=backbone.device) < arguments.prefix).expand(count, -1)
    writing = dataclasses.replace(
        config.writing, steps=arguments.write_steps, readout="own", project=0.0, temperature=0.0, temperature_start=0.0
    )
    written = method.write(backbone, batch.input_ids, known, writing=writing, sample_ids=batch.sample_ids)
    right = (written.tokens == batch.input_ids)[~known].view(count, -1).double().mean(1)
    return {
        "space": config.space,
        "split": config.split,
        "token_accuracy": right.mean().item(),
        "worst_sequence": right.min().item(),
        "sequences": count,
        "seconds": time.monotonic() - begin,
        "terms": {name: float(value) for name, value in out.terms.items()},
    }


def main() -> None:
    """Learn in every space, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [ROOT / "configs" / "method" / f"write-{name}.yaml" for name in METHODS]
    parser.add_argument("--methods", type=Path, nargs="+", default=default)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--prefix", type=int, default=16)
    parser.add_argument("--split", type=int, default=3, help="of the spaces that have one")
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--write-steps", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmark_rivals.json")
    arguments = parser.parse_args()
    if arguments.tiny:
        sys.path.insert(0, str(ROOT))  # the tests are not installed
        from tests.kit import tiny_backbone

        backbone, arguments.split = tiny_backbone(), 2
    else:
        backbone = load_backbone("embedded", device="cuda" if torch.cuda.is_available() else "cpu")
    batch = sequences(backbone, arguments.sequences, arguments.length, tiny=arguments.tiny).to(backbone.device)
    rows = []
    table = Table("space", "split", "tokens right", "worst sequence", "seconds", title="learned by heart, own head")
    for path in arguments.methods:
        found = learn(backbone, configuration(path, split=arguments.split, tiny=arguments.tiny), batch, arguments)
        rows.append({"method": path.stem, **found})
        table.add_row(
            found["space"], str(found["split"]), f"{found['token_accuracy']:.1%}", f"{found['worst_sequence']:.1%}",
            f"{found['seconds']:.0f}",
        )  # fmt: skip
        options = {name: value for name, value in vars(arguments).items() if name not in ("methods", "out")}
        write_json(arguments.out, {"rows": rows, "options": options, "provenance": provenance()})
    Console().print(table)


if __name__ == "__main__":
    main()
