"""What importing DiHAL costs beside importing torch, and which packages come with it.

    python benchmarks/import_time.py [--repeats 9]

Every import runs in a fresh interpreter, kinds alternating; each kind is represented by its fastest run. `dihal` is
what `import dihal` loads; `dihal, core` adds every module a library user touches without loading a model (spaces,
methods, schedules, checkpoints, scoring), on top of torch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dihal.io import write_json
from dihal.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "torch": "torch",
    "dihal": "dihal",
    "dihal, command line": "dihal, dihal.cli, dihal.config.cli",
    "dihal, core": "torch, dihal.methods, dihal.checkpoint, dihal.geometry, dihal.diffusion, dihal.nn, dihal.spaces",
}
OPTIONAL = ("datasets", "pyarrow", "mauve", "faiss", "sklearn", "tensorboard", "wandb", "matplotlib", "gguf", "pandas")
"""Packages of the extras, and those that one command or format needs."""
PROGRAM = """
import time
before = time.perf_counter()
import {modules}
seconds = time.perf_counter() - before
import json, sys
print(json.dumps({{"seconds": seconds, "loaded": [name for name in {optional} if name in sys.modules]}}))
"""


def run(modules: str) -> dict[str, Any]:
    program = PROGRAM.format(modules=modules, optional=list(OPTIONAL))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", default=str(ROOT / "results" / "benchmark_import_time.json"))
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in KINDS}
    for name in [*KINDS] * (1 + arguments.repeats):  # the first round fills the page cache
        found[name].append(run(KINDS[name]))
    torch = min(item["seconds"] for item in found["torch"][1:])
    rows = {}
    for name, items in found.items():
        seconds = [item["seconds"] for item in items[1:]]
        rows[name] = {"modules": KINDS[name], "seconds": min(seconds), "ratio": min(seconds) / torch, "all": seconds}
        rows[name]["optional_packages"] = items[-1]["loaded"]
    write_json(arguments.out, {"rows": rows, "optional": OPTIONAL, "provenance": provenance()})
    table = Table("import", "seconds", "x torch", "optional packages", title="importing, fresh interpreters")
    for name, row in rows.items():
        table.add_row(
            name, f"{row['seconds']:.3f}", f"{row['ratio']:.2f}", ", ".join(row["optional_packages"]) or "none"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
