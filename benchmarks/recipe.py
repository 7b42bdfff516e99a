"""Which recipe of hidden states is trained at full size: NLL - SLOPE (entropy - 4) of the pilots, lower is better.

    python benchmarks/recipe.py [--rows results/h200/pilots/levels] [--out results/h200/pilots/recipe.json]

The mean over temperatures and over the fused and the projected row, for each recipe with each walk; slope: the
backbone's own, in nats per nat of entropy. The shipped recipe stays unless another is MARGIN better. Intervals are over
documents, the same resamples for all; one training seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from dihal.evaluation.frontier.matched import Bundle, interval
from dihal.evaluation.frontier.result import read_row
from dihal.io import write_json
from dihal.provenance import provenance

SLOPE = 4.8
MARGIN = 0.05
RECIPES = ("even", "levels", "wide", "scattered")
WALKS = {"even": ("fused", "projected-32-steps"), "levels": ("fused-levels", "projected-32-steps-levels")}
SHIPPED = ("even", "even")


def scores(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Score of each (recipe, walk), with its interval."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for recipe in RECIPES:
        for walk, readings in WALKS.items():
            values = []
            for reading in readings:
                row = read_row(folder / f"hidden16-{recipe}-{reading}.json")
                bundle = Bundle(row, row.points, "entropy")
                values.append((bundle.nll - SLOPE * (bundle.entropy - 4.0)).mean(1))
            each = np.mean(values, axis=0)
            mean = interval(float(each[0]), each[1:], row.confidence)
            found[recipe, walk] = {"value": mean.value, "low": mean.low, "high": mean.high}
    return found


def main() -> None:
    """Print the scores and what the rule takes; write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("results/h200/pilots/levels"))
    parser.add_argument("--out", type=Path, default=Path("results/h200/pilots/recipe.json"))
    arguments = parser.parse_args()
    found = scores(arguments.rows)
    least = min(found, key=lambda key: found[key]["value"])
    taken = least if found[least]["value"] < found[SHIPPED]["value"] - MARGIN else SHIPPED
    for (recipe, walk), score in found.items():
        print(f"{recipe:10} {walk:7} {score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]")
    print(f"taken: times {taken[0]}, walk {taken[1]}")
    rows = [{"recipe": recipe, "walk": walk, **score} for (recipe, walk), score in found.items()]
    taken_as = {"recipe": taken[0], "walk": taken[1]}
    found_at = {"scores": rows, "taken": taken_as, "slope": SLOPE, "margin": MARGIN, "provenance": provenance()}
    write_json(arguments.out, found_at)


if __name__ == "__main__":
    main()
