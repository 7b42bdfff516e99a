"""benchmarks/attribution.py runs from end to end on a tiny model; of its figures, those that are no matter of cost are checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dihal.io import read_json

ROOT = Path(__file__).parents[3]


def test_every_row_is_measured_and_written(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    words = ["--tiny", "--stability", "--device", "cpu", "--rounds", "2", "--threads", "1", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "attribution.py"), *words],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = read_json(out)
    rows = {row["name"]: row for row in result["rows"]}
    bars = {name: row["bar"] for name, row in rows.items() if row["bar"] is not None}
    passes, time = ("forward passes", "backward passes"), "attribution, x plain forward"
    memory, batches = "peak memory, x weights + one point + writers", "scores between batch sizes, relative"
    assert bars == {passes[0]: 7, passes[1]: 5, time: 16.0, memory: 1.2, batches: 1e-5}
    assert [rows[name]["value"] for name in passes] == [7, 5]
    assert 0 <= rows[batches]["value"] < 1e-5
    assert {name for name, row in rows.items() if row["met"] is not None} == {*passes, batches}, (
        "a tiny one has no cost"
    )
    assert rows[memory]["value"] == "not measured on a CPU"
    assert result["memory"] is None
    # Seven passes and more: it cannot be cheaper than they are.
    assert rows[time]["value"] > 2
    assert all(len(values) == 2 and min(values) > 0 for values in result["seconds"].values())
    assert rows["edges"]["value"] == 784
    assert rows["bf16: share of the fp32 top 196"]["value"] > 0.8
    assert rows["bf16: Spearman on the union"]["value"] > 0.8
    assert 0 < result["stability"]["relative_difference"] < 0.2
    assert result["provenance"]["command"].startswith("attribution.py --tiny")
    assert "EAP-IG" in done.stdout
