"""benchmarks/eight_billion.py runs from end to end on a tiny model: what it would say of an 8B is not known here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dihal.io import read_json

ROOT = Path(__file__).parents[2]
# Before every measurement all garbage is collected: half of the time, were what is imported not left out of it.
START = """
import gc, sys
import eight_generation, eight_memory, eight_scaling, eight_scoring, eight_training
from eight_billion import main
gc.freeze()
main(sys.argv[1:])
"""
SECTIONS = ("scoring", "training", "suffix", "generation", "loop", "memory")


def test_every_section_runs_and_writes_its_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    words = ["--tiny", "--eager", "--device", "cpu", "--sections", ",".join(SECTIONS), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", START, *words],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read_json(out)["rows"]
    failed = [row for row in rows if row["name"].endswith("failed")]
    assert failed == [], done.stderr[-2000:]
    assert {row["section"] for row in rows} == set(SECTIONS)
    assert all(row["met"] is None for row in rows), "a tiny model meets and misses no bar"
    bars = {row["bar"] for row in rows}
    assert {"<= 1.35", "<= 2.5", ">= 0.50", "<= 1.25", "<= 0.15", "<= 1.05", ">= 0.6"} <= bars
    assert done.stdout.count("| scoring |") > 10
