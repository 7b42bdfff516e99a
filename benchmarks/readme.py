"""Write the README's tables from result files; with --check, fail if they are not what the files say.

    python benchmarks/readme.py [--check]

A table stands between `<!-- results: FILE.json ... -->` and `<!-- end results -->`; the files are results of
`dihal evaluate`, one row each, at the number of steps with the lowest KL.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from dihal.evaluation.result import Estimate, Result, read_result

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- results: ([^>]*?) -->\n).*?(<!-- end results -->)", re.DOTALL)
HEAD = (
    "| split | method | training | best steps | KL, nats | top-1 agreement | NLL, nats | NLL of the backbone | tokens x window | file |\n"
    "|---|---|---|---|---|---|---|---|---|---|\n"
)


def _shown(estimate: Estimate) -> str:
    if estimate.value is None:
        return "-"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def row(path: str) -> str:
    """One line of the table."""
    result: Result = read_result(ROOT / path)
    steps = min(result.metrics, key=lambda key: (result.metrics[key]["kl"].value, int(key)))
    block = result.metrics[steps]
    cost = result.cost
    trained = f"{cost.train_seconds:.0f} s, {cost.diffused_tokens / 1e6:.0f}M tokens"
    nll = block["nll"]
    return (
        f"| {result.split} | {result.method}, {cost.trainable_parameters / 1e6:.0f}M | {trained} | {steps} | {_shown(block['kl'])} "
        f"| {block['agreement'].value:.3f} | {nll.value:.3f} | {nll.value - nll.difference:.3f} "
        f"| {result.comparable.tokens // 1000}k x {result.comparable.sequence_length} | `{path}` |\n"
    )


def filled(text: str) -> str:
    """The README with every table made anew."""
    return BLOCK.sub(lambda found: found[1] + HEAD + "".join(map(row, found[2].split())) + found[3], text)


def main() -> None:
    """Rewrite, or check."""
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv[1:]:
        if before != after:
            sys.exit("README.md is not what the result files say: run `python benchmarks/readme.py`.")
        return
    readme.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
