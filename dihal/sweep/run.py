"""`dihal sweep`: train every split, measure every predictor, compare."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console

from dihal.config.convert import config_hash, to_dict
from dihal.config.sweep import SweepConfig
from dihal.errors import UsageError
from dihal.io import ensure_dir
from dihal.methods import build_method
from dihal.provenance import provenance
from dihal.sweep.assess import assess, check_predictors
from dihal.sweep.report import DEFINITIONS, SweepReport, predictor_record, related, truth_baseline
from dihal.sweep.table import build_table
from dihal.sweep.transfer import fitted_predictors
from dihal.sweep.truth import REPLACE_TRUTHS, Truth, trained_split, truth_record, truths_of
from dihal.sweep.written import prompts_of, variant_of
from dihal.training.run import train

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.data.module import TextDataModule

__all__ = ["sweep"]

_FEWEST = 3
"""Candidates below which a rank correlation says nothing."""


def _check(config: SweepConfig) -> None:
    """Everything that can be refused before the backbone is loaded."""
    method, trainer = config.train.method, config.train.trainer
    for name, wrong in (("train.method.split", method.split), ("train.method.split_from", method.split_from)):
        if wrong is not None:
            raise UsageError(f"{name} is {wrong!r}: a sweep trains the splits named by `splits`. Leave it out.")
    if method.space == "embedding":
        raise UsageError(
            "train.method.space is 'embedding', which has no split to sweep over. Choose hidden or latent."
        )
    if method.lora.rank > 0:
        raise UsageError(
            "train.method.lora.rank is above 0: adapters would stay in the backbone that all splits share. Set it to 0."
        )
    if trainer.nodes != 1 or trainer.devices not in (1, "auto"):
        raise UsageError("a sweep trains in one process: set train.trainer.devices and train.trainer.nodes to 1.")
    if config.train.resume:
        raise UsageError("train.resume has no meaning here: the same `dihal sweep` command goes on by itself.")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise UsageError(f"seeds must name at least one training seed, each once; got {list(config.seeds)}.")
    for name in ("tokens", "batch_size", "steps", "bootstrap"):
        if getattr(config, name) < 1:
            raise UsageError(f"{name} must be at least 1, got {getattr(config, name)}.")
    if not 0 < config.confidence < 1:
        raise UsageError(f"confidence must lie between 0 and 1, got {config.confidence}.")
    text = config.text
    if not text.temperatures or min(text.temperatures) < 0:
        raise UsageError("text.temperatures must name temperatures that are not negative.")
    for name in ("samples", "prompt_tokens", "new_tokens", "steps", "batch_size"):
        if getattr(text, name) < 1:
            raise UsageError(f"text.{name} must be at least 1, got {getattr(text, name)}.")
    variant_of(text.writing)
    _main_truth(config)
    check_predictors(config.score, config.predictors)


def _main_truth(config: SweepConfig) -> str:
    generate = config.train.method.regime == "generate"
    known = ("text_nll",) if generate else REPLACE_TRUTHS
    chosen = config.truth or known[0]
    if chosen not in known:
        raise UsageError(
            f"truth is {chosen!r}, which is not measured under the regime {config.train.method.regime!r}. "
            f"Choose {' or '.join(known)}."
        )
    return chosen


def _splits(config: SweepConfig, layers: int) -> list[int]:
    splits = sorted(config.splits) if config.splits else list(range(layers))
    for split in splits:
        if not 0 <= split < layers:
            raise UsageError(f"splits names {split}; this backbone has splits 0 to {layers - 1}.")
    if len(set(splits)) < len(splits):
        raise UsageError(f"splits names one twice: {splits}.")
    if config.report and sum(split > 0 for split in splits) < _FEWEST:
        raise UsageError(
            f"{sum(split > 0 for split in splits)} splits above 0 are to be trained; ranks of fewer than {_FEWEST} say "
            "nothing. Name more `splits`."
        )
    return splits


def _data(config: SweepConfig, backbone: Backbone, progress: bool) -> TextDataModule:
    from dihal.data.module import TextDataModule

    return TextDataModule(
        config.train.data,
        tokenizer=backbone.tokenizer,
        tokenizer_fingerprint=backbone.tokenizer_fingerprint,
        start_token_id=backbone.start_token_id,
        end_token_id=backbone.end_token_id,
        progress=progress,
    )


def _backbone(config: SweepConfig) -> Backbone:
    from dihal.backbone import backbone_from_config
    from dihal.training.setup import resolve

    # The same choice of device as training makes, so that it can use this one.
    run = resolve(replace(config.train, method=replace(config.train.method, split=0)))
    device = config.train.backbone.device
    if device == "auto":
        device = "cuda" if run.trainer.accelerator == "gpu" else "cpu"
    return backbone_from_config(replace(config.train.backbone, device=device))


def _try(config: SweepConfig, backbone: Backbone, data: TextDataModule, splits: list[int]) -> None:
    """What only training or measuring the first split would find out."""
    with torch.random.fork_rng(devices=[]):
        build_method(replace(config.train.method, split=splits[-1]), backbone)
    if config.train.method.regime == "generate":
        prompts_of(config, data)
    else:
        data.evaluation_windows(
            tokens=config.tokens, windows_per_document=config.windows_per_document, seed=config.seed
        )


def sweep(
    config: SweepConfig, *, backbone: Backbone | None = None, console: Console | None = None
) -> SweepReport | None:
    """Train the method at every split, measure the predictors, and write the report into ``config.out``.

    The predictors come first: they take a minute, and text that is too short for them should say so before hours of
    training. A finished split is kept (its file says what it was made with), an interrupted one goes on.

    Args:
        config: the sweep.
        backbone: an already loaded one that ``config.train.backbone`` describes; None: loaded here, once.
        console: told what happens; None: a new one.

    Returns:
        The report; None without ``config.report``, or where ``config.train.dry_run`` only prints the plan of the deepest split.

    Raises:
        UsageError: options, text, or files of another sweep in the folder.
        SystemExit: stopped by a signal, after saving; the same command goes on.
    """
    started = time.perf_counter()
    console = Console(highlight=False) if console is None else console
    _check(config)
    config = replace(
        config,
        train=replace(config.train, trainer=replace(config.train.trainer, devices=1)),
        # Resamples of predictors and of truths are paired, so there are equally many.
        score=replace(config.score, bootstrap=config.bootstrap, confidence=config.confidence),
    )
    others = [SweepReport.load(path) for path in config.beside]
    sources = [SweepReport.load(path) for path in config.fitted_on]
    backbone = _backbone(config) if backbone is None else backbone
    splits = _splits(config, backbone.num_blocks)
    if config.train.dry_run:
        run = replace(config.train, method=replace(config.train.method, split=splits[-1]))
        console.print(f"{len(splits)} splits x {len(config.seeds)} seeds of this run:")
        train(run, backbone=backbone)
        return None
    data = _data(config, backbone, config.train.log.progress)
    _try(config, backbone, data, splits)
    folder = ensure_dir(config.out)
    assessed = None
    if config.report:
        texts = [document.text for document in data.train_documents]
        assessed = assess(backbone, texts, config.score, config.predictors, progress=config.train.log.progress)

    records = {}
    for index, (seed, split) in enumerate([(seed, split) for seed in config.seeds for split in splits], start=1):
        console.print(f"[dim]{index} of {len(splits) * len(config.seeds)}[/dim]")
        records[split, seed] = trained_split(
            config, split, seed, folder, backbone, data, say=lambda text: console.print(text)
        )
    if assessed is None:
        return None
    truths = truths_of(records, splits, list(config.seeds), config)
    report = _report(config, backbone, splits, truths, assessed, records, sources)
    report = replace(report, provenance={**report.provenance, "seconds": time.perf_counter() - started})
    report.save(folder, others)
    console.print(build_table(report, console.width))
    console.print(f"wrote sweep.json, sweep.md, predictors.md and the figure to {folder}")
    return report


def _report(
    config: SweepConfig,
    backbone: Backbone,
    splits: list[int],
    truths: list[Truth],
    assessed: Any,
    records: dict[tuple[int, int], dict[str, Any]],
    sources: list[SweepReport],
) -> SweepReport:
    candidates = [split for split in splits if split > 0]
    main = _main_truth(config)
    predictors, transfer = list(assessed.predictors), None
    if sources:
        more, transfer = fitted_predictors(
            predictors,
            candidates,
            sources,
            regime=config.train.method.regime,
            truth=main,
            fingerprint=backbone.fingerprint(),
            penalty=config.predictors.transfer_ridge,
        )
        predictors += more
    for truth in truths:
        if not np.isfinite(truth.values).all():
            missing = [split for split, value in zip(splits, truth.values) if not np.isfinite(value)]
            raise UsageError(f"the truth {truth.name} is not defined at splits {missing}. Leave them out of `splits`.")
    method = to_dict(config.train.method)
    del method["split"], method["split_from"]
    plain = to_dict(config)
    first = records[splits[0], config.seeds[0]]
    spent = {f"{split}/{seed}": record["training"] for (split, seed), record in records.items()}
    return SweepReport(
        regime=config.train.method.regime,
        truth=main,
        splits=splits,
        candidates=candidates,
        seeds=list(config.seeds),
        truths={
            truth.name: {
                **truth_record(truth, config.confidence),
                **truth_baseline(truth, splits, candidates, config.confidence),
            }
            for truth in truths
        },
        predictors={item.name: predictor_record(item, config.confidence) for item in predictors},
        relations={truth.name: related(predictors, truth, splits, candidates, config.confidence) for truth in truths},
        transfer=transfer,
        backbone=backbone.reference.to_dict(),
        backbone_fingerprint=backbone.fingerprint(),
        method=method,
        budget={**to_dict(config.train.budget), "spent": spent},
        data={"scored": assessed.data, "held_out_documents": len(first["documents"])},
        confidence=config.confidence,
        bootstrap=config.bootstrap,
        definitions=DEFINITIONS,
        config={**plain, "hash": config_hash(config)},
        provenance=provenance(),
    )
