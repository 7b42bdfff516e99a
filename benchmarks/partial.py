"""When does diffusion earn its place in `replace`? Where the state is no function of what the bridge is shown.

    python benchmarks/partial.py --bridge RUN --regression RUN [--shares 0 0.15 0.3 0.5] [--samples 1 4 16] [--steps 8]

Both runs replace the same blocks and were trained with `method.objective.hidden`. On held-out text a share of the
tokens is not shown to either. The regression puts one state in the place of the posterior: its mean. The bridge
draws K states per text; the next-token distribution is the mean over them (of probabilities, not of states). NLL of the
true next token and KL from the backbone reading the whole text, with document-bootstrap intervals; differences are
paired. Writes results/benchmark_partial.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from dihal.checkpoint import load_checkpoint
from dihal.data.module import TextDataModule
from dihal.errors import UsageError
from dihal.evaluation.bootstrap import difference, document_weights, estimate
from dihal.evaluation.definitions import METRICS
from dihal.io import write_json
from dihal.provenance import provenance
from dihal.random import uniform
from dihal.restore import restore_backbone, restore_method

ROOT = Path(__file__).resolve().parent.parent


@torch.no_grad()
def log_q(method: Any, backbone: Any, batch: Any, hidden: Tensor, steps: int, samples: int) -> list[Tensor]:
    """Log-probabilities of the next token after 1, 2, 4, ... up to ``samples`` draws, each (batch, time, vocab)."""
    found, total = [], None
    full = bool(batch.full)
    mask = None if full else batch.attention_mask
    for draw in range(samples):
        state = method.states(
            backbone,
            batch.input_ids,
            attention_mask=mask,
            steps=steps,
            seed=draw,
            sample_ids=batch.sample_ids,
            hidden=hidden,
        )
        with method.reading():
            one = backbone.suffix(state, method.split, attention_mask=mask).float().log_softmax(-1)
        total = one if total is None else torch.logaddexp(total, one)
        if (draw + 1) & draw == 0:
            found.append(total - np.log(draw + 1))
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Per-document sums by (share, row)."""
    checkpoints = {name: load_checkpoint(getattr(arguments, name)) for name in ("bridge", "regression")}
    backbone = restore_backbone(checkpoints["bridge"])
    methods = {name: restore_method(item, backbone)[0] for name, item in checkpoints.items()}
    for name, method in methods.items():
        if method.config.objective.hidden == 0:
            raise UsageError(f"{name}: train it with method.objective.hidden above 0.")
    config = checkpoints["bridge"].config.data
    data = TextDataModule(
        config,
        tokenizer=backbone.tokenizer,
        tokenizer_fingerprint=backbone.tokenizer_fingerprint,
        start_token_id=backbone.start_token_id,
        end_token_id=backbone.end_token_id,
    )
    windows = data.evaluation_windows(tokens=arguments.tokens, windows_per_document=2, seed=0)
    number = {document.index: place for place, document in enumerate(windows.documents)}
    sums: dict[str, dict[str, dict[str, np.ndarray]]] = {}

    def add(share: float, row: str, name: str, values: Tensor, documents: Tensor) -> None:
        kept = sums.setdefault(str(share), {}).setdefault(row, {})
        array = kept.setdefault(name, np.zeros(len(number)))
        np.add.at(array, [number[int(i)] for i in documents], values.double().cpu().numpy())

    for share in arguments.shares:
        for batch in track(list(windows.batches(arguments.batch_size)), description=f"{share:.0%} hidden"):
            batch = batch.to(backbone.device)
            place = torch.arange(batch.input_ids.shape[1], device=backbone.device)
            hidden = uniform(0, batch.sample_ids, "benchmark/hidden", (len(place),)) < share
            hidden &= (place > 0) & batch.attention_mask
            counted = batch.loss_mask
            documents = batch.document_ids[counted]
            targets = batch.input_ids.roll(-1, 1)
            with torch.no_grad():
                mask = None if batch.full else batch.attention_mask
                true = backbone.forward(batch.input_ids, attention_mask=mask).float().log_softmax(-1)[counted]
            rows = {"backbone, whole text": true}
            one = log_q(methods["regression"], backbone, batch, hidden, 1, 1)
            rows["regression"] = one[0][counted]
            for steps in arguments.steps:
                drawn = log_q(methods["bridge"], backbone, batch, hidden, steps, max(arguments.samples))
                for power, values in enumerate(drawn):
                    rows[f"bridge, {steps} steps, {2**power} draws"] = values[counted]
            for name, values in rows.items():
                nll = -values.gather(-1, targets[counted][:, None]).squeeze(-1)
                kl = (true.exp() * (true - values)).sum(-1)
                add(share, name, "nll", nll, documents)
                add(share, name, "kl", kl, documents)
                add(share, name, "tokens", torch.ones_like(nll), documents)
    weights = document_weights(len(number), 1_000, 0)
    out: dict[str, Any] = {}
    for share, rows in sums.items():
        for name, kept in rows.items():
            out.setdefault(share, {})[name] = {
                metric: {
                    **vars(estimate(METRICS[metric], kept, weights, 0.95)),
                    "minus_regression": vars(difference(METRICS[metric], kept, rows["regression"], weights, 0.95)),
                }
                for metric in ("kl", "nll")
            }
    return {
        "split": methods["bridge"].split,
        "documents": len(number),
        "tokens": int(next(iter(sums.values()))["regression"]["tokens"].sum()),
        "runs": {
            name: {"config": vars(item.config.budget), "manifest": item.manifest["provenance"]}
            for name, item in checkpoints.items()
        },
        "shares": out,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bridge", required=True)
    parser.add_argument("--regression", required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.15, 0.3, 0.5])
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--out", default=str(ROOT / "results" / "benchmark_partial.json"))
    arguments = parser.parse_args()
    found = measure(arguments)
    table = Table(title=f"split {found['split']}, {found['tokens']:,} tokens of {found['documents']} documents")
    for column in ("hidden", "row", "KL", "NLL", "NLL minus regression"):
        table.add_column(column)

    def shown(item: dict[str, float]) -> str:
        return f"{item['value']:.4f} [{item['low']:.4f}, {item['high']:.4f}]"

    for share, rows in found["shares"].items():
        for name, row in rows.items():
            table.add_row(
                f"{float(share):.0%}", name, shown(row["kl"]), shown(row["nll"]), shown(row["nll"]["minus_regression"])
            )
    Console().print(table)
    write_json(Path(arguments.out), {**found, "provenance": provenance()})


if __name__ == "__main__":
    main()
