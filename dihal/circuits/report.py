"""Files of a run and of a comparison: run.json with scores.npz, neurons.npz, compare.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dihal.circuits.compare import COMPARE_SCHEMA, Comparison
from dihal.circuits.neurons import concentration
from dihal.circuits.overlap import Estimate
from dihal.circuits.types import EdgeScores
from dihal.config.circuits import OverlapConfig
from dihal.errors import UsageError
from dihal.geometry.intervals import resample_documents
from dihal.io import atomic_path, ensure_dir, read_json, sha256_file, write_json

__all__ = ["Run", "compare_neurons", "load_comparison", "load_run", "save_comparison", "save_run", "top_edges_named"]

_NEURONS = "neurons.npz"


@dataclass(kw_only=True)
class Run:
    """A run as its folder holds it."""

    folder: Path
    scores: EdgeScores
    neurons: dict[int, np.ndarray]
    """Attribution of every MLP neuron, by layer; empty where none was made."""

    @property
    def details(self) -> dict[str, Any]:
        """Model, task, curves, lens, provenance."""
        return self.scores.details

    @property
    def label(self) -> str:
        """Name of the model."""
        return str(self.details["subject"]["name"])


def top_edges_named(scores: EdgeScores, count: int = 100) -> list[dict[str, Any]]:
    """The edges largest in magnitude, by name, with score and standard error over prompts."""
    spec = scores.spec
    chosen = scores.top(min(count, spec.n_edges))
    found = []
    for u, v in np.argwhere(chosen.edges):
        score = float(scores.scores[u, v])
        error = None
        if scores.squares is not None and scores.n > 1:
            spread = max(0.0, float(scores.squares[u, v]) - score**2)
            error = float(np.sqrt(spread / (scores.n - 1)))
        found.append({"edge": spec.edge_name(int(u), int(v)), "score": score, "standard_error": error})
    return sorted(found, key=lambda row: -abs(row["score"]))


def save_run(folder: str | Path, scores: EdgeScores, neurons: dict[int, np.ndarray]) -> None:
    """Write the files of a run; run.json last, so that it stands for a finished one."""
    target = ensure_dir(folder)
    if neurons:
        with atomic_path(target / _NEURONS) as staged, open(staged, "wb") as file:
            np.savez(file, **{str(layer): values.astype(np.float32) for layer, values in neurons.items()})
        scores.details["neurons"] = {
            "sha256": sha256_file(target / _NEURONS),
            "layers": {str(layer): concentration(values).record() for layer, values in neurons.items()},
        }
    scores.save(target)


def load_run(folder: str | Path) -> Run:
    """Read a run.

    Raises:
        UsageError: not the folder of a finished run, or files that do not belong together.
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise UsageError(
            f"{str(folder)!r} holds no finished run (run.json). Make one with `dihal circuits run --out {folder}`."
        )
    scores = EdgeScores.load(folder)
    neurons: dict[int, np.ndarray] = {}
    if "neurons" in scores.details:
        path = folder / _NEURONS
        if not path.is_file() or sha256_file(path) != scores.details["neurons"]["sha256"]:
            raise UsageError(f"{str(path)!r} is missing or is not the file run.json was written with. Run it again.")
        with np.load(path, allow_pickle=False) as held:
            neurons = {int(name): held[name] for name in held.files}
    return Run(folder=folder, scores=scores, neurons=neurons)


def save_comparison(folder: str | Path, comparison: Comparison) -> None:
    """Write compare.json."""
    write_json(ensure_dir(folder) / "compare.json", comparison.record())


def load_comparison(folder: str | Path) -> dict[str, Any]:
    """Read compare.json as plain data.

    Raises:
        UsageError: no such file, or of another format.
    """
    data = read_json(Path(folder) / "compare.json")
    if not isinstance(data, dict) or data.get("schema") != COMPARE_SCHEMA:
        raise UsageError(f"{str(folder)!r} was not written by this version of `dihal circuits compare`. Compare again.")
    return data


def compare_neurons(first: Run, second: Run, config: OverlapConfig) -> dict[str, Any]:
    """Concentration of both models by layer, and how many of the neurons that carry 80 % they share.

    ``change``: base-2 logarithm of the second participation ratio over the first, averaged over layers, with an interval
    over layers: above 0, the second model spreads a task over more neurons.
    """
    shared = sorted(set(first.neurons) & set(second.neurons))
    rows = []
    for layer in shared:
        a, b = first.neurons[layer], second.neurons[layer]
        if a.shape != b.shape:
            raise UsageError(f"the MLPs of block {layer} have {len(a)} and {len(b)} neurons: different models.")
        tops = []
        for values in (a, b):
            held = concentration(values).share_80
            tops.append(set(np.argsort(-np.abs(values), kind="stable")[:held].tolist()))
        union = len(tops[0] | tops[1])
        rows.append(
            {
                "layer": layer,
                "first": concentration(a).record(),
                "second": concentration(b).record(),
                "jaccard_80": len(tops[0] & tops[1]) / union if union else None,
            }
        )
    ratios = [row["second"]["participation"] / row["first"]["participation"] for row in rows]
    changes = np.log2(ratios)
    changes = changes[np.isfinite(changes)]
    change = Estimate(value=None)
    if len(changes):
        counts = resample_documents(len(changes), config.resamples, config.seed).double().numpy()
        drawn = counts @ changes / counts.sum(1)
        change = Estimate.of(float(changes.mean()), drawn, config.confidence)
    return {"layers": rows, "change": change.record()}
