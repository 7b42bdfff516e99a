"""`dihal circuits run` and what it is made of: score, run circuits, look, write."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dihal.circuits.evaluate import Curve, curve, curve_of
from dihal.circuits.lens import logit_lens
from dihal.circuits.metrics import find_metric
from dihal.circuits.neurons import neuron_attribution
from dihal.circuits.passes import Room
from dihal.circuits.profile import component_scores
from dihal.circuits.random_circuits import random_circuit
from dihal.circuits.report import Run, load_run, save_run, top_edges_named
from dihal.circuits.resumable import attribute_in_pieces, discard
from dihal.circuits.seam import average
from dihal.circuits.subject import Subject, open_subject, task_for
from dihal.circuits.tasks import Task
from dihal.circuits.types import EdgeScores, PairBatch
from dihal.config.circuits import AttributionConfig, CircuitsRunConfig
from dihal.config.convert import config_hash, to_dict
from dihal.errors import UsageError
from dihal.io import ensure_dir, hash_json, read_json, write_json
from dihal.provenance import provenance

__all__ = ["progress_bar", "run", "run_on"]

Advance = Callable[[int], None]


@contextmanager
def progress_bar(show: bool, what: str, total: int) -> Iterator[Advance]:
    """A function that is told of progress, and a bar where one is wanted."""
    if not show:
        yield lambda count: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def _check(config: CircuitsRunConfig) -> None:
    """Everything that can be refused before a model is loaded."""
    attribution, running = config.attribution, config.running
    if attribution.parts < 2 or attribution.parts % 2:
        raise UsageError(f"attribution.parts must be even and at least 2 (halves!), got {attribution.parts}.")
    if attribution.steps < 1 or attribution.noise_seeds < 1 or config.save_every < 1 or config.bootstrap < 2:
        raise UsageError("attribution.steps, attribution.noise_seeds and save_every must be at least 1, bootstrap 2.")
    if running.random < 0:
        raise UsageError(f"running.random must not be negative, got {running.random}.")
    shares = running.fractions
    if len(shares) < 2 or list(shares) != sorted(set(shares)) or not 0 < shares[0] <= shares[-1] <= 1:
        raise UsageError(f"running.fractions must be at least two ascending shares in (0, 1], got {list(shares)}.")


def _scores(
    subject: Subject,
    task: Task,
    pairs: Sequence[PairBatch],
    config: CircuitsRunConfig,
    attribution: AttributionConfig,
    folder: Path,
) -> tuple[EdgeScores, list[EdgeScores]]:
    """Scores averaged over noise seeds, and those of every seed."""
    source = subject.adapter.source is not None
    seeds = range(attribution.noise_seed, attribution.noise_seed + (attribution.noise_seeds if source else 1))
    identity = {
        "subject": {name: value for name, value in subject.about.items() if name not in ("model", "device")},
        "prompts": hash_json([[batch.clean.tolist(), batch.corrupted.tolist(), batch.ids.tolist()] for batch in pairs]),
        "attribution": asdict(attribution),
        "metric": config.task.metric,
    }
    what, total = f"{attribution.method}: pairs scored", len(seeds) * sum(len(batch) for batch in pairs)
    room = Room(subject.adapter)
    with progress_bar(config.progress, what, total) as advance:
        runs = [
            attribute_in_pieces(
                subject.adapter,
                pairs,
                folder / f"{attribution.method}-seed{seed}",
                identity={**identity, "noise_seed": seed},
                every=config.save_every,
                progress=advance,
                method=attribution.method,
                steps=attribution.steps,
                rule=attribution.rule,
                path=attribution.path if not source else "seam",
                kv=attribution.kv,
                seam=None if source and attribution.seam == 0 else attribution.seam,
                noise_seed=seed,
                metric=find_metric(config.task.metric),
                batch_size=config.task.batch_size,
                parts=attribution.parts,
                room=room,
            )
            for seed in seeds
        ]
    return average(runs), runs


def _kept(path: Path, identity: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A finished part of an unfinished run, read again if it is of this run."""
    if path.is_file():
        found = read_json(path)
        if found.get("identity") == identity:
            return found["data"]
    data = make()
    write_json(path, {"identity": identity, "data": data})
    return data


def _curves(
    subject: Subject,
    scores: EdgeScores,
    task: Task,
    config: CircuitsRunConfig,
    pieces: Path,
    pairs: Sequence[PairBatch],
) -> dict[str, Any]:
    running, batches = config.running, config.task.batch_size
    test = task.pairs(config.task.test, seed=config.task.seed, split="test")
    runs_per_curve = len(running.fractions) * sum(-(-len(batch) // batches) for batch in test)
    options: dict[str, Any] = {
        "ablation": running.ablation,
        "metric": find_metric(config.task.metric),
        "batch_size": batches,
        "noise_seed": config.attribution.noise_seed,
        "resamples": config.bootstrap,
    }
    shares = running.fractions
    wanted: dict[str, Callable[[Advance], Curve]] = {
        "magnitude": lambda step: curve(subject.adapter, scores, test, shares, progress=step, **options)
    }
    if running.signed:
        wanted["signed"] = lambda step: curve(
            subject.adapter, scores, test, shares, by="signed", progress=step, **options
        )
    if running.random:
        spec = scores.spec
        seeds = range(config.task.seed, config.task.seed + running.random)
        circuits = [random_circuit(spec, round(share * spec.n_edges), seed=seed) for seed in seeds for share in shares]
        wanted["random"] = lambda step: curve_of(
            subject.adapter, circuits, test, shares, by="random", progress=step, **options
        )
    if running.baseline and config.attribution.method != "eap":
        from dataclasses import replace

        plain, _ = _scores(subject, task, pairs, config, replace(config.attribution, method="eap"), pieces)
        wanted["eap"] = lambda step: curve(subject.adapter, plain, test, shares, progress=step, **options)
    identity = hash_json(
        {
            "scores": hashlib.sha256(scores.scores.tobytes()).hexdigest(),
            "running": to_dict(config.running),
            "task": to_dict(config.task),
            "bootstrap": config.bootstrap,
        }
    )
    found = {}
    for name, make in wanted.items():

        def made(name: str = name, make: Callable[[Advance], Curve] = make) -> dict[str, Any]:
            total = runs_per_curve * (running.random if name == "random" else 1)
            with progress_bar(config.progress, f"circuits run: {name}", total) as step:
                return make(step).record()

        found[name] = _kept(pieces / f"curve-{name}.json", identity, made)
    return found


def _look(
    subject: Subject, scores: EdgeScores, task: Task, config: CircuitsRunConfig
) -> tuple[dict[str, Any], dict[int, np.ndarray]]:
    """Logit lens of layers and top components; neurons."""
    if config.lens.prompts < 1:
        return {}, {}
    pairs = task.pairs(min(config.lens.prompts, config.task.test), seed=config.task.seed, split="test")
    spec = scores.spec
    sizes = np.abs(component_scores(spec, scores.scores))
    order = [spec.writers[int(i)] for i in np.argsort(-sizes, kind="stable") if i > 0]
    seed = config.attribution.noise_seed
    chosen = order[: config.lens.components]
    lens = logit_lens(subject.adapter, pairs, chosen, spec=spec, noise_seed=seed)
    layers = config.lens.layers or tuple(range(spec.seam, spec.layers))
    metric = find_metric(config.task.metric)
    return lens.record(), neuron_attribution(subject.adapter, pairs, layers, metric=metric, noise_seed=seed)


def _comparable(task: Task, config: CircuitsRunConfig, scores: EdgeScores) -> dict[str, Any]:
    """What two runs must have in common for their edges to be compared."""
    return {
        "task": task.name,
        "template hash": task.template_hash,
        "pairs": config.task.n,
        "test pairs": config.task.test,
        "seed": config.task.seed,
        "metric": config.task.metric,
        "method": config.attribution.method,
        "steps": config.attribution.steps,
        "rule": config.attribution.rule,
        "path": scores.path,
        "selected": None if task.subset is None else hash_json({k: list(v) for k, v in task.subset.items()}),
    }


def run_on(subject: Subject, task: Task, config: CircuitsRunConfig, *, console: Console | None = None) -> Run:
    """`run` with a model and a task that are open already.

    Raises:
        UsageError: options, or a task the model's graph cannot be scored on.
    """
    _check(config)
    console = Console(highlight=False) if console is None else console
    started = time.perf_counter()
    folder = ensure_dir(config.out)
    pieces = folder / ".partial"
    pairs = task.pairs(config.task.n, seed=config.task.seed)
    scores, seeds = _scores(subject, task, pairs, config, config.attribution, pieces)
    curves = _curves(subject, scores, task, config, pieces, pairs)
    lens, neurons = _look(subject, scores, task, config)
    scores.details |= {
        "subject": subject.about,
        "task": {**task.provenance(), "n": config.task.n, "test": config.task.test, "seed": config.task.seed},
        "metric": config.task.metric,
        "comparable": _comparable(task, config, scores),
        "edges": scores.spec.n_edges,
        "curves": curves,
        "top_edges": top_edges_named(scores),
        "seed_spread": _spread(seeds),
        "lens": lens,
        "config": {**to_dict(config), "hash": config_hash(config)},
        "provenance": {**provenance(), "total_seconds": time.perf_counter() - started},
    }
    save_run(folder, scores, neurons)
    discard(pieces)
    found = load_run(folder)
    draw_run(found)
    _say(console, found)
    return found


def _spread(runs: Sequence[EdgeScores]) -> dict[str, Any]:
    """Overlap between noise seeds at 1,000 edges: part of the ceiling."""
    from dihal.circuits.overlap import edge_values, jaccard, top_edges

    k = min(1_000, runs[0].spec.n_edges)
    tops = [top_edges(edge_values(one.spec, one.scores), k) for one in runs]
    values = [jaccard(tops[i], tops[j]) for i in range(len(tops)) for j in range(i)]
    return {} if not values else {"k": k, "mean": float(np.mean(values)), "lowest": float(min(values))}


def draw_run(found: Run, *, edges: int = 40) -> None:
    """Figures and page of a run, from its files."""
    from dihal.circuits.figures import run_figures
    from dihal.circuits.page import run_page
    from dihal.io import write_text

    write_text(found.folder / "index.html", run_page(found, run_figures(found, edges=edges)))


def _say(console: Console, found: Run) -> None:
    scores = found.scores
    console.print(
        f"{found.label} on {found.details['task']['task']}: accuracy {scores.accuracy:.2f}, metric clean "
        f"{scores.clean:.2f}, corrupted {scores.corrupted:.2f}; {scores.spec.n_edges:,} edges, {scores.n} pairs, "
        f"{scores.seconds:.0f} s"
    )
    for name, row in found.details["curves"].items():
        console.print(f"  {name:10} CPR {row['cpr']:.3f}   CMD {row['cmd']:.3f}")
    console.print(f"wrote run.json, scores.npz, figures and index.html to {found.folder}")


def run(config: CircuitsRunConfig, *, console: Console | None = None) -> Run:
    """Score the edges of a model on a task, run its circuits, and write everything into ``config.out``.

    A stopped run goes on with the same command; its scores are the same to the bit.

    Raises:
        UsageError: options, a model or task that cannot be used.
    """
    _check(config)
    subject = open_subject(config.model, config.load)
    return run_on(subject, task_for(subject, config.task, config.load), config, console=console)
