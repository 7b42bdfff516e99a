"""What a hybrid promises, on the real backbone: identity generation, size of the artefact, refusals.

    python benchmarks/hybrid.py [--checkpoint runs/demo/bridge] [--prompts 64]

Prints a table and writes results/benchmark_hybrid.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dihal.config import DataConfig
from dihal.controls import Identity
from dihal.data import read_documents
from dihal.errors import UsageError
from dihal.hybrid import HybridForCausalLM, load_hybrid
from dihal.io import write_json
from dihal.provenance import provenance

_LOAD = """
import sys, torch
from dihal import load_hybrid
torch.set_num_threads(int(sys.argv[3]))
kept = torch.load(sys.argv[2], weights_only=True)
print(float((load_hybrid(sys.argv[1], device="cpu")(kept["ids"]).logits - kept["logits"]).abs().max()))
"""


def batches(backbone, count: int, size: int):
    """Left-padded prompts of 8 to 39 tokens: beginnings of Python's own documentation."""
    texts = [d.text for d in read_documents(DataConfig())][:count]
    start, pad = backbone.start_token_id, backbone.end_token_id
    rows = [
        [start, *backbone.tokenizer(t, add_special_tokens=False).input_ids[: 7 + i % 32]] for i, t in enumerate(texts)
    ]
    for first in range(0, count, size):
        part = rows[first : first + size]
        longest = max(map(len, part))
        ids = torch.tensor([[pad] * (longest - len(r)) + r for r in part], device=backbone.device)
        mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in part], device=backbone.device)
        yield ids, mask


def identity(backbone, splits: tuple[int, ...], prompts: int, new_tokens: int) -> dict[str, int]:
    """Prompts on which the identity hybrid writes exactly what the backbone writes."""
    same = {}
    own = []
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": backbone.end_token_id}
    for ids, mask in batches(backbone, prompts, 16):
        own.append(backbone.model.generate(ids, attention_mask=mask, eos_token_id=None, **options))
    for split in splits:
        model = HybridForCausalLM.from_method(Identity(split), backbone)
        equal = 0
        for (ids, mask), expected in zip(batches(backbone, prompts, 16), own):
            found = model.generate(ids, attention_mask=mask, eos_token_id=None, **options)
            equal += int((found == expected).all(1).sum())
        same[str(split)] = equal
    return same


def refusals(folder: Path, backbone, split: int) -> tuple[int, int]:
    """(refused, tried): one edit in every tensor the hybrid needs, in its last place; then other references."""
    tried = refused = 0

    def attempt() -> None:
        nonlocal tried, refused
        tried += 1
        try:
            load_hybrid(folder, backbone=backbone)
        except UsageError:
            refused += 1

    prefix = tuple(f".layers.{i}." for i in range(split))
    for name, parameter in backbone.model.named_parameters():
        if any(part in name for part in prefix):
            continue
        flat = parameter.data.view(-1)
        before = flat[-1].clone()
        flat[-1] = torch.nextafter(before, before + 1)
        attempt()
        flat[-1] = before
    reference = backbone.reference
    for changes in ({"revision": "other"}, {"family": "qwen3"}, {"hidden_size": 1}, {"config_hash": "0"}):
        backbone.reference = dataclasses.replace(reference, **changes)
        attempt()
    backbone.reference = reference
    load_hybrid(folder, backbone=backbone)  # and the untouched one is taken
    return refused, tried


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="runs/demo/bridge")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=24)
    options = parser.parse_args()
    hybrid = load_hybrid(options.checkpoint, device="cpu")
    backbone = hybrid.backbone
    numbers: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "hybrid"
        hybrid.save_pretrained(folder)
        stored = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        own = sum(t.numel() * t.element_size() for t in hybrid.state_dict().values())
        numbers["artefact_ratio"] = stored / own
        ids, _ = next(batches(backbone, 4, 4))
        with torch.no_grad():
            torch.save({"ids": ids, "logits": hybrid(ids).logits}, Path(temporary) / "expected.pt")
        command = [sys.executable, "-c", _LOAD, str(folder), f"{temporary}/expected.pt", str(torch.get_num_threads())]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        numbers["new_process_max_logit_difference"] = float(done.stdout.strip().splitlines()[-1])
        numbers["refused"], numbers["tried"] = refusals(folder, backbone, hybrid.split)
    numbers["identity_equal_prompts"] = identity(backbone, (1, 10, 29), options.prompts, options.new_tokens)
    numbers["prompts"] = options.prompts
    numbers["provenance"] = provenance()
    table = Table("what", "found")
    for name, value in numbers.items():
        if name != "provenance":
            table.add_row(name, str(value))
    Console().print(table)
    write_json("results/benchmark_hybrid.json", numbers)


if __name__ == "__main__":
    main()
