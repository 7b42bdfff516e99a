"""`dihal circuits compare` and `hybrid`: two runs, what running their circuits adds, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console

from dihal.circuits.compare import Comparison, compare_scores
from dihal.circuits.metrics import find_metric
from dihal.circuits.overlap import Estimate
from dihal.circuits.report import Run, compare_neurons, load_run, save_comparison
from dihal.circuits.run import progress_bar, run_on
from dihal.circuits.seam import perturbed, remembered, seam_error
from dihal.circuits.subject import Subject, open_subject, subject_of, task_for
from dihal.circuits.tasks import Task
from dihal.circuits.transfer import Party, Running, ablations, transfer
from dihal.circuits.verdict import Behaviour, Evidence, MatchedNull, judge
from dihal.config.circuits import (
    AttributionConfig,
    CircuitsCompareConfig,
    CircuitsHybridConfig,
    CircuitsRunConfig,
    OverlapConfig,
    VerdictConfig,
)
from dihal.config.convert import config_hash, from_dict, to_dict
from dihal.errors import UsageError
from dihal.geometry.intervals import resample_documents
from dihal.provenance import provenance

__all__ = ["compare", "contrast", "draw_comparison", "hybrid", "hybrid_on"]


def _seeds(attribution: AttributionConfig) -> tuple[int, ...]:
    return tuple(range(attribution.noise_seed, attribution.noise_seed + attribution.noise_seeds))


def _evidence(
    comparison: Comparison, runs: tuple[Run, Run], config: VerdictConfig, null: MatchedNull | None
) -> Evidence:
    """What the rule reads, at the verdict's budget."""
    k = max(1, round(config.fraction * comparison.edges))
    row, function = comparison.at(k), comparison.function

    def found(model: str, circuit: str) -> Estimate:
        return Estimate(**function[model][circuit])

    behaviours = [
        Behaviour(accuracy=part["accuracy"], clean=part["clean"], corrupted=part["empty"])
        for part in (function["in_first"], function["in_second"])
    ]
    # Between disjoint halves, as the ceiling is; the interval is that of the whole sample's overlap.
    whole, across = Estimate(**row["jaccard"]), row["halves"]["across"]
    shift = across - (whole.value or 0.0)
    halves = Estimate(value=across, low=whole.lower + shift, high=whole.upper + shift)
    depth = comparison.depth["writer"]
    return Evidence(
        reference=behaviours[0],
        other=behaviours[1],
        overlap=halves if null is None else whole,
        ceiling=row["ceiling"],
        own=(found("in_first", "first"), found("in_second", "second")),
        transfer=found("in_second", "first"),
        random=(found("in_first", "random like first"), found("in_second", "random like second")),
        shift=Estimate(**depth["change"]["center"]),
        distance=depth["wasserstein"],
        distance_null=max(depth["wasserstein_halves"]),
        null=null,
    )


def _lens(runs: tuple[Run, Run], config: OverlapConfig) -> dict[str, Any]:
    first, second = (run.details.get("lens") or {} for run in runs)
    if not first or not second:
        return {}
    medians = [part["median_specialisation"] for part in (first, second)]
    difference = Estimate(value=None)
    if all(value is not None for value in medians):
        # Over components, for the runs keep medians over prompts: how much the choice of components matters.
        drawn = [
            _medians(np.array(part["specialisation"]), config.resamples, config.seed + i)
            for i, part in enumerate((first, second))
        ]
        difference = Estimate.of(medians[1] - medians[0], drawn[1] - drawn[0], config.confidence)
    return {
        "first": first,
        "second": second,
        "median_specialisation": medians,
        "difference": difference.value,
        "difference_interval": [difference.low, difference.high],
    }


def _medians(values: Float[np.ndarray, " components"], resamples: int, seed: int) -> Float[np.ndarray, " resamples"]:
    counts = resample_documents(len(values), resamples, seed).long().numpy()
    return np.array([np.median(np.repeat(values, row)) for row in counts])


def contrast(
    runs: tuple[Run, Run],
    parties: tuple[Party, Party] | None,
    *,
    overlap: OverlapConfig,
    verdict: VerdictConfig,
    fractions: Sequence[float],
    how: Running | None = None,
    count: int = 0,
    null: MatchedNull | None = None,
    progress: bool = False,
) -> Comparison:
    """The comparison of two runs; with both models at hand also what running circuits tells, and the verdict.

    Args:
        runs: the reference and the other.
        parties: the two models; None: structure only, and no verdict.
        overlap: budgets, resamples, nulls.
        verdict: thresholds.
        fractions: budgets of the transfer curves.
        how: how circuits are run.
        count: components ablated; 0: none.
        null: what noise of the same size does; None: ceilings stand in.
        progress: show a bar.

    Raises:
        UsageError: runs that cannot be compared.
    """
    shares = tuple(sorted({*overlap.fractions, verdict.fraction}))
    scores = [run.scores for run in runs]
    comparison = compare_scores(scores[0], scores[1], replace(overlap, fractions=shares))
    comparison.lens, comparison.neurons = _lens(runs, overlap), compare_neurons(*runs, overlap)
    if parties is not None:
        assert how is not None
        circuits = 2 * len({*fractions, verdict.fraction}) + 4
        total = sum(
            circuits * sum(-(-len(batch) // how.batch_size) for batch in p.pairs) * len(p.seeds) for p in parties
        )
        with progress_bar(progress, "circuits run", total) as step:
            comparison.function = transfer(*parties, fractions, verdict.fraction, how, progress=step)
        if count:
            comparison.function["ablations"] = ablations(parties, count, how)
        comparison.verdict = judge(_evidence(comparison, runs, verdict, null), verdict)
    comparison.details = {
        "models": [run.details["subject"] for run in runs],
        "labels": [run.label for run in runs],
        "spec": scores[0].spec.record(),
        "runs": [str(run.folder) for run in runs],
        "task": runs[0].details["task"],
        "behaviour": [
            {"accuracy": one.accuracy, "clean": one.clean, "corrupted": one.corrupted, "n": one.n} for one in scores
        ],
        "own_curves": [run.details["curves"] for run in runs],
    }
    return comparison


def _finish(comparison: Comparison, config: Any, runs: Sequence[Run], console: Console) -> None:
    comparison.details |= {"config": {**to_dict(config), "hash": config_hash(config)}, "provenance": provenance()}
    save_comparison(config.out, comparison)
    draw_comparison(config.out)
    row = comparison.overlap[-1] if not any(r["k"] == 1_000 for r in comparison.overlap) else comparison.at(1_000)
    console.print(
        f"J({row['k']}) = {row['jaccard']['value']:.3f}, chance {row['chance']:.4f}, ceiling {row['ceiling']:.3f}"
    )
    if comparison.verdict is not None:
        console.print(f"verdict: {comparison.verdict.call} ({comparison.verdict.rule})")
    else:
        console.print("no verdict: circuits were not run in each other's model (transfer is off)")
    console.print(f"wrote compare.json, figures and index.html to {config.out}")


def draw_comparison(folder: str | Path) -> None:
    """Figures and page of a comparison, from its file."""
    from dihal.circuits.figures import comparison_figures
    from dihal.circuits.page import comparison_page
    from dihal.circuits.report import load_comparison
    from dihal.io import write_text

    data = load_comparison(folder)
    write_text(Path(folder) / "index.html", comparison_page(data, comparison_figures(data, Path(folder))))


def _party(run: Run, config: CircuitsCompareConfig) -> tuple[Party, CircuitsRunConfig]:
    plain = {name: value for name, value in run.details["config"].items() if name != "hash"}
    made = from_dict(CircuitsRunConfig, plain)
    if run.details["subject"].get("perturbed"):
        raise UsageError(f"{str(run.folder)!r} is a perturbed model made by `hybrid`; compare with transfer=false.")
    # By the name it was opened with: a run of `hybrid` has the backbone's own.
    name = run.details["subject"]["model"]
    subject = open_subject(name, made.load)
    if subject.about["backbone_fingerprint"] != run.details["subject"]["backbone_fingerprint"]:
        raise UsageError(
            f"the model {name!r} is not the one that {str(run.folder)!r} was made with: its weights differ. "
            "Run it again."
        )
    task = task_for(subject, made.task, made.load)
    pairs = task.pairs(config.prompts or made.task.test, seed=made.task.seed, split="test")
    return Party(subject=subject, scores=run.scores, pairs=pairs, noise_seeds=_seeds(made.attribution)), made


def compare(config: CircuitsCompareConfig, *, console: Console | None = None) -> Comparison:
    """Compare two runs and write compare.json, figures and page into ``config.out``.

    Raises:
        UsageError: not two runs, runs that cannot be compared, or models that are no longer those of the runs.
    """
    console = Console(highlight=False) if console is None else console
    if len(config.runs) != 2:
        raise UsageError(f"compare takes two run folders, got {len(config.runs)}: --runs '[runs/a, runs/b]'.")
    runs = (load_run(config.runs[0]), load_run(config.runs[1]))
    parties, how, fractions = None, None, ()
    if config.transfer:
        (first, made), (second, _) = _party(runs[0], config), _party(runs[1], config)
        parties, fractions = (first, second), made.running.fractions
        how = Running(
            metric=find_metric(made.task.metric),
            ablation=made.running.ablation,
            batch_size=made.task.batch_size,
            resamples=config.bootstrap,
            confidence=config.overlap.confidence,
            seed=config.overlap.seed,
        )
    comparison = contrast(
        runs,
        parties,
        overlap=config.overlap,
        verdict=config.verdict,
        fractions=fractions,
        how=how,
        count=config.ablations,
        progress=config.progress,
    )
    _finish(comparison, config, runs, console)
    return comparison


def _run_config(config: CircuitsHybridConfig, name: str, seam: int) -> CircuitsRunConfig:
    return CircuitsRunConfig(
        model=config.checkpoint,
        load=config.load,
        task=config.task,
        attribution=replace(config.attribution, seam=seam),
        running=config.running,
        lens=config.lens,
        bootstrap=config.bootstrap,
        save_every=config.save_every,
        progress=config.progress,
        out=str(Path(config.out) / name),
    )


def hybrid(config: CircuitsHybridConfig, *, console: Console | None = None) -> Comparison:
    """Backbone against its hybrid, beside the backbone with noise of the bridge's size at the seam.

    Raises:
        UsageError: no bridge of the regime `replace`, or options that do not fit.
    """
    console = Console(highlight=False) if console is None else console
    if not config.checkpoint:
        raise UsageError("dihal circuits hybrid needs --checkpoint FOLDER: a bridge's run, checkpoint or saved folder.")
    if config.attribution.path != "seam":
        raise UsageError("a hybrid is compared on the seam path: set attribution.path to seam.")
    return hybrid_on(open_subject(config.checkpoint, config.load), config, console=console)


def hybrid_on(opened: Subject, config: CircuitsHybridConfig, *, console: Console) -> Comparison:
    """`hybrid` with a model that is open already.

    Raises:
        UsageError: no hybrid, or options that do not fit.
    """
    if opened.kind != "hybrid":
        raise UsageError(f"{config.checkpoint!r} is no hybrid. Use `dihal circuits run` and `compare`.")
    seam, backbone = opened.adapter.seam, opened.model.backbone
    plain = subject_of(backbone, backbone, about={"model": backbone.reference.id})
    task = task_for(opened, config.task, config.load)
    test = task.pairs(config.task.test, seed=config.task.seed, split="test")
    opened = replace(opened, adapter=remembered(opened.adapter))
    error = seam_error(
        opened.adapter,
        plain.adapter,
        test,
        noise_seeds=_seeds(config.attribution),
        batch_size=config.task.batch_size,
    )
    console.print(f"relative error at layer {seam}: {float(error[1:].mean() if len(error) > 1 else error.mean()):.3f}")
    noisy = replace(
        plain,
        adapter=remembered(perturbed(plain.adapter, seam, error, shared=config.null == "shared")),
        about={**plain.about, "name": f"{plain.adapter.name} with noise at {seam}", "perturbed": error.tolist()},
    )
    subjects: dict[str, tuple[Subject, Task]] = {
        "backbone": (plain, task),
        "hybrid": (opened, task),
        "null": (noisy, task),
    }
    runs = {
        name: run_on(subject, one, _run_config(config, name, seam), console=console)
        for name, (subject, one) in subjects.items()
    }
    parties = {
        name: Party(
            subject=subjects[name][0], scores=runs[name].scores, pairs=test, noise_seeds=_seeds(config.attribution)
        )
        for name in runs
    }
    how = Running(
        metric=find_metric(config.task.metric),
        ablation=config.running.ablation,
        batch_size=config.task.batch_size,
        resamples=config.bootstrap,
        confidence=config.overlap.confidence,
        seed=config.overlap.seed,
    )
    options: dict[str, Any] = {
        "overlap": config.overlap,
        "verdict": config.verdict,
        "fractions": config.running.fractions,
        "how": how,
        "progress": config.progress,
    }
    against = contrast((runs["backbone"], runs["null"]), (parties["backbone"], parties["null"]), **options)
    k = max(1, round(config.verdict.fraction * against.edges))
    null = MatchedNull(
        overlap=Estimate(**against.at(k)["jaccard"]),
        transfer=Estimate(**against.function["in_second"]["first"]),
    )
    comparison = contrast(
        (runs["backbone"], runs["hybrid"]),
        (parties["backbone"], parties["hybrid"]),
        count=config.ablations,
        null=null,
        **options,
    )
    comparison.details |= {
        "seam": seam,
        "seam_error": error.tolist(),
        "noise_matched_null": {
            "noise": config.null,
            "overlap": against.overlap,
            "function": against.function,
            "depth": against.depth,
            "whole": against.whole,
        },
    }
    _finish(comparison, config, list(runs.values()), console)
    return comparison
