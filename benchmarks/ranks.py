"""One run on 1, 2 and 4 processes: the same samples, times, noise and losses; DDP beside FSDP2; one score.

    python benchmarks/ranks.py [--steps 100] [--ranks 1 2 4] [--gpu]

Tiny random backbone, equal global batch, gloo on a CPU or NCCL on GPUs (`--gpu`: as many GPUs as processes). Every
draw of training is recorded where it is made (step, purpose, sample, digest of the values) and compared as a set. Losses are compared step by step, scores number by number. Needs the repository:
the tiny runs are those of its tests.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from dihal.config import BackboneConfig, DataConfig, ScoreConfig, ScoreRunConfig, TrainConfig  # noqa: E402
from dihal.io import write_json  # noqa: E402
from dihal.provenance import provenance  # noqa: E402
from tests import jobs  # noqa: E402


def trained(prepared: Path, steps: int, ranks: int, gpu: bool, **changes: Any) -> TrainConfig:
    name = "-".join([str(ranks), *map(str, changes.values())])
    changes = {"method.objective.kl": 0.5, "method.denoiser.self_conditioning": 0.5, **changes}
    if gpu:
        changes |= {"backbone.device": "auto", "trainer.accelerator": "gpu", "trainer.precision": "32-true"}
    config = jobs.over_ranks(jobs.configuration(prepared, prepared / f"train-{name}", steps=steps, **changes), ranks)
    codes = jobs.finish(jobs.start(config, ("record_draws", (str(prepared / f"draws-{name}"),))), 1200)
    assert codes == [0] * ranks, Path(f"{config.out}.log").read_text()
    return config


def largest(one: list[tuple], two: list[tuple]) -> float:
    """Largest relative difference of the losses; infinite where the runs differ in steps or samples."""
    if [row[:2] for row in one] != [row[:2] for row in two]:
        return float("inf")
    return max(abs(a[2] - b[2]) / abs(a[2]) for a, b in zip(one, two, strict=True))


def leaves(value: Any) -> Iterator[Any]:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if items is None:
        yield value
        return
    for item in items:
        yield from leaves(item)


def scored(prepared: Path, ranks: int, gpu: bool) -> list[Any]:
    config = ScoreRunConfig(
        backbone=BackboneConfig(id=str(prepared / "backbone"), device="auto" if gpu else "cpu"),
        data=DataConfig(source=str(prepared / "text.jsonl"), validation_fraction=0.2),
        score=ScoreConfig(
            tokens=8_000, sequence_length=150, batch_tokens=400, anchors=64, neighbours=8, pool=800, bootstrap=50
        ),
        out=str(prepared / f"score-{ranks}"),
    )
    codes = jobs.finish(jobs.start_scoring(config, ranks), 1200)
    assert codes == [0] * ranks, Path(f"{config.out}.log").read_text()
    report = json.loads((prepared / f"score-{ranks}" / "scores.json").read_text())
    del report["provenance"]
    return list(leaves(report))


def difference(one: list[Any], two: list[Any]) -> float:
    """Largest difference of two reports, relative where numbers exceed 1; infinite where anything else differs."""
    worst = 0.0
    for a, b in zip(one, two, strict=True):
        if isinstance(a, float) and isinstance(b, float):
            worst = max(worst, abs(a - b) / max(1.0, abs(a)))
        elif a != b:
            return float("inf")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--out", default=str(ROOT / "results" / "benchmark_ranks.json"))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        prepared = jobs.prepare(Path(folder))
        first = arguments.ranks[0]
        reference: tuple[Any, Any, Any] | None = None
        for ranks in arguments.ranks:
            config = trained(prepared, arguments.steps, ranks, arguments.gpu)
            drawn, losses = jobs.draws(prepared / f"draws-{ranks}", ranks), jobs.losses(config.out)
            score = scored(prepared, ranks, arguments.gpu)
            reference = reference or (drawn, losses, score)
            rows.append(
                {
                    "ranks": ranks,
                    "strategy": "ddp",
                    "steps": len(losses),
                    "draws": len(drawn),
                    "draws_identical": drawn == reference[0],
                    "loss_difference": largest(reference[1], losses),
                    "score_difference": difference(reference[2], score),
                }
            )
        assert reference is not None
        for ranks in (r for r in arguments.ranks if r > 1):
            config = trained(prepared, arguments.steps, ranks, arguments.gpu, **{"trainer.strategy": "fsdp"})
            drawn = jobs.draws(prepared / f"draws-{ranks}-fsdp", ranks)
            rows.append(
                {
                    "ranks": ranks,
                    "strategy": "fsdp",
                    "steps": arguments.steps,
                    "draws": len(drawn),
                    "draws_identical": drawn == reference[0],
                    "loss_difference": largest(reference[1], jobs.losses(config.out)),
                    "score_difference": None,
                }
            )
    result = {"compared_with_ranks": first, "device": "gpu" if arguments.gpu else "cpu", "rows": rows}
    write_json(arguments.out, {**result, "provenance": provenance()})
    table = Table("ranks", "strategy", "steps", "draws", "identical", "loss, relative", "score", title="one run")
    for row in rows:
        score = "" if row["score_difference"] is None else f"{row['score_difference']:.1e}"
        identical = "yes" if row["draws_identical"] else "NO"
        table.add_row(
            str(row["ranks"]), row["strategy"], str(row["steps"]), f"{row['draws']:,}", identical,
            f"{row['loss_difference']:.1e}", score,
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
