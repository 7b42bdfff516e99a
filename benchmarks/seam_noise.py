"""What noise of known size at a seam does to the circuit above it, on the real backbone and IOI.

    python benchmarks/seam_noise.py [--seam 2] [--prompts 32] [--test 16] [--device auto]

`dihal circuits hybrid` holds a bridge against noise of the bridge's own size; here the size is given. Noise is the same
in the clean and the corrupted run of a pair (shared), or drawn for each (independent). Overlap is the Jaccard index of
the top edges with those of the backbone without noise. Transfer runs the backbone's circuit in the model with noise;
own is the faithfulness of that model's own circuit, of as many edges.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dihal.backbone import load_backbone
from dihal.circuits.adapters import Adapter, open_model
from dihal.circuits.attribute import attribute
from dihal.circuits.evaluate import ends, faithfulness, run_circuits
from dihal.circuits.overlap import edge_values, jaccard, top_edges
from dihal.circuits.seam import perturbed
from dihal.circuits.tasks import build_task
from dihal.circuits.types import EdgeScores, PairBatch
from dihal.io import write_json
from dihal.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
SIZES = (0.03, 0.1, 0.3, 1.0)
KS = (100, 1_000)
FRACTION = 0.05


def overlaps(one: EdgeScores, other: EdgeScores) -> dict[str, float]:
    """Jaccard index at every K."""
    values = [edge_values(scores.spec, scores.scores) for scores in (one, other)]
    return {str(k): jaccard(*(top_edges(each, k) for each in values)) for k in KS}


def measured(
    adapter: Adapter, own: EdgeScores, pairs: Sequence[PairBatch], test: Sequence[PairBatch], batch_size: int
) -> dict[str, Any]:
    """A row: the model attributed, its circuit and the backbone's run in it."""
    found = attribute(adapter, pairs, path="seam", seam=own.spec.seam, batch_size=batch_size)
    circuits = [replace(scores.top(fraction=FRACTION), spec=found.spec) for scores in (own, found)]
    values = run_circuits(adapter, test, circuits, batch_size=batch_size)
    transfer, kept = faithfulness(values, ends(adapter, test, found.spec, batch_size=batch_size)).tolist()
    return {
        "clean": found.clean, "corrupted": found.corrupted, "accuracy": found.accuracy,
        "jaccard": overlaps(own, found), "transfer": transfer, "own": kept,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seam", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--test", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", default=str(ROOT / "results" / "benchmark_seam_noise.json"))
    arguments = parser.parse_args()
    backbone = load_backbone(arguments.backbone, device=arguments.device)
    task = build_task("ioi", [backbone.tokenizer], batch_size=arguments.batch_size)
    pairs = task.pairs(arguments.prompts, seed=0)
    test = task.pairs(arguments.test, seed=0, split="test")
    own = attribute(backbone, pairs, path="seam", seam=arguments.seam, batch_size=arguments.batch_size)
    one, two = own.halves
    rows = [
        {"size": 0.0, "noise": "none", **measured(open_model(backbone), own, pairs, test, arguments.batch_size)},
        *(
            {
                "size": size,
                "noise": "shared" if shared else "independent",
                **measured(
                    perturbed(backbone, arguments.seam, size, shared=shared), own, pairs, test, arguments.batch_size
                ),
            }
            for shared in (True, False)
            for size in SIZES
        ),
    ]
    result = {
        "backbone": backbone.reference.to_dict(),
        "device": str(backbone.device),
        "task": "ioi",
        "seam": arguments.seam,
        "prompts": arguments.prompts,
        "test_prompts": arguments.test,
        "edges": own.spec.n_edges,
        "fraction": FRACTION,
        "jaccard_of_halves": overlaps(replace(own, scores=one), replace(own, scores=two)),
        "rows": rows,
    }
    write_json(arguments.out, {**result, "provenance": provenance()})
    table = Table(
        "size", "noise", "gap", "solved", *(f"J({k:,})" for k in KS), "transfer", "own",
        title=f"noise at layer {arguments.seam}, circuits of {FRACTION:.0%} of {own.spec.n_edges:,} edges",
    )  # fmt: skip
    for row in rows:
        gap = row["clean"] - row["corrupted"]
        numbers = [gap, row["accuracy"], *row["jaccard"].values(), row["transfer"], row["own"]]
        table.add_row(f"{row['size']:g}", row["noise"], *(f"{number:.2f}" for number in numbers))
    Console().print(table)


if __name__ == "__main__":
    main()
