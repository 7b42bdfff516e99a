"""`dihal evaluate`: checkpoints and the rows that are always there -> one JSON per row."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dihal.config import DataConfig, EvalConfig
from dihal.errors import UsageError, unknown_name
from dihal.evaluation.assemble import assemble, context_of
from dihal.evaluation.checkpoints import load_trained, open_checkpoints
from dihal.evaluation.definitions import METRIC_VERSION
from dihal.evaluation.generation import Scorer, generate_row, pick_prompts, text_result
from dihal.evaluation.inputs import open_backbone, open_scorer, open_text
from dihal.evaluation.measure import Measured, measure
from dihal.evaluation.ngram import NgramModel
from dihal.evaluation.result import Comparable, Result, TextResult, read_result, write_result
from dihal.evaluation.rows import NGRAMS, NO_SAMPLING, Row, build_rows, other_documents, unigram_log_probabilities
from dihal.io import hash_json, output_dir

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.checkpoint import Checkpoint
    from dihal.data.module import TextDataModule
    from dihal.data.packing import EvaluationWindows

__all__ = ["SCORE_TYPE", "evaluate"]

SCORE_TYPE = "teacher_forced"
"""Every token is predicted given the true tokens before it."""

REAL_TEXT = "real-text"
"""Name of the row that holds the real continuations of the prompts."""


def _check(config: EvalConfig) -> None:
    if not config.steps or min(config.steps) < 1:
        raise UsageError(f"steps must name at least one number of sampling steps, each at least 1; got {config.steps}.")
    for name in ("tokens", "batch_size", "bootstrap"):
        if getattr(config, name) < 1:
            raise UsageError(f"{name} must be at least 1, got {getattr(config, name)}.")
    if not 0 < config.confidence < 1:
        raise UsageError(f"confidence must lie between 0 and 1, got {config.confidence}.")
    if config.samples < 0 or config.temperature < 0:
        raise UsageError("samples and temperature must not be negative.")
    if config.scorer is not None and config.samples == 0:
        raise UsageError("a scorer is given but samples is 0: nothing would be scored. Raise samples or drop scorer.")


def _data(config: EvalConfig, checkpoints: list[Checkpoint], backbone: Backbone) -> TextDataModule:
    if config.data is not None:
        chosen = open_text(config.data, backbone)
    else:
        chosen = open_text(checkpoints[0].config.data if checkpoints else DataConfig(), backbone)
    for checkpoint in checkpoints:
        trained_on = checkpoint.manifest["data_fingerprint"]
        found = chosen.fingerprint()
        if found == trained_on:
            continue
        if config.data is None:
            field = next(name for name in ("validation", "train") if found[name] != trained_on[name])
            raise UsageError(
                f"the text changed since {str(checkpoint.path)!r} was trained: data_fingerprint.{field} is "
                f"{found[field][:16]}, the checkpoint says {trained_on[field][:16]}. Restore the text, or name another "
                "with `data`."
            )
        _require_unseen(chosen, open_text(checkpoint.config.data, backbone), checkpoint)
    return chosen


def _require_unseen(chosen: TextDataModule, trained: TextDataModule, checkpoint: Checkpoint) -> None:
    # Other text than the checkpoint's own validation documents: none of it may have been trained on.
    if trained.fingerprint() != checkpoint.manifest["data_fingerprint"]:
        raise UsageError(
            f"cannot tell whether the given data holds text {str(checkpoint.path)!r} was trained on: its own training "
            "text changed since. Restore it, or leave `data` out."
        )
    seen = {document.key for document in trained.train_documents}
    shared = [document.key for document in chosen.validation_documents if document.key in seen]
    if shared:
        raise UsageError(
            f"{len(shared)} of {len(chosen.validation_documents)} validation documents of `data` were training "
            f"documents of {str(checkpoint.path)!r}. Hold out other documents, or leave `data` out."
        )


def _windows_fingerprint(windows: EvaluationWindows) -> str:
    import hashlib

    digest = hashlib.sha256()
    for tensor in (windows.input_ids, windows.document_ids.ge(0), windows.loss_mask, windows.predicted_bytes):
        digest.update(tensor.contiguous().numpy().tobytes())
    digest.update("\n".join(document.key for document in windows.documents).encode())
    return digest.hexdigest()


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._@-]+", "-", name).strip("-.")


def _targets(folder: Path, rows: list[Row]) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for row in rows:
        path = folder / f"{_slug(row.name)}.json"
        if path in paths.values():
            raise UsageError(f"two rows would be written to {str(path)!r}. Give the run folders distinct names.")
        paths[row.name] = path
    return paths


def _existing(path: Path, config_hash: str, comparable: Comparable) -> Result | None:
    if not path.exists():
        return None
    try:
        found = read_result(path)
    except UsageError:
        return None  # not a whole result: measured again and replaced
    return found if found.config_hash == config_hash and found.comparable == comparable else None


def _row_hash(config: EvalConfig, row: Row, comparable: Comparable, counted_text: str) -> str:
    decides = asdict(replace(config, checkpoints=(), backbone=None, data=None, out="", leaderboard=True, batch_size=1))
    del decides["controls"]  # which other rows there are
    stands_on = row.trained or row.basis
    basis = None if stands_on is None else stands_on.identity()["sha256"]
    if row.logits is not None or row.ngram is not None:
        basis = counted_text
    return hash_json([decides, row.name, row.kind, row.split, row.steps, basis, asdict(comparable)])


def _rows(
    config: EvalConfig,
    backbone: Backbone,
    checkpoints: list[Checkpoint],
    data: TextDataModule,
    windows: EvaluationWindows,
    console: Console,
) -> list[Row]:
    trained = load_trained(checkpoints, backbone, weights=config.weights)
    text, vocab = data.train_tokens, backbone.vocab_size
    counts = np.bincount(text.tokens, minlength=vocab)
    wanted = {name: order for name, order in NGRAMS.items() if name in config.controls}
    ngrams = {}
    if wanted:
        model = NgramModel.fit(text.tokens, order=max(wanted.values()), vocab=vocab, ends=text.ends)
        ngrams = {name: model.of_order(order).to(backbone.device) for name, order in wanted.items()}
    other = other_documents(windows) if "shuffled" in config.controls else None
    if trained and other is None and "shuffled" in config.controls:
        console.print("[dim]no shuffled rows: all windows are of one document[/dim]", highlight=False)
    return build_rows(
        backbone,
        trained,
        steps=config.steps,
        sampler=config.sampler,
        unigram=unigram_log_probabilities(torch.from_numpy(counts).double()).to(backbone.device),
        ngrams=ngrams,
        other=other,
        controls=config.controls,
        seed=config.seed,
    )


def _scorer(config: EvalConfig, backbone: Backbone) -> Scorer:
    return Scorer(open_scorer(config.scorer, backbone), backbone)


def evaluate(config: EvalConfig, *, console: Console | None = None) -> list[Path]:
    """Measure every row and write one JSON per row into ``config.out``; return the files.

    A row whose file already holds the result of the same options, text, weights and checkpoint is not measured
    again. An interrupted call loses at most the rows it had not finished.

    Raises:
        UsageError: checkpoints that cannot share a table; a backbone, tokenizer or text that is not theirs; options
            out of range; an output folder that cannot be written. Nothing is half-written.
    """
    _check(config)
    with output_dir(config.out) as folder:
        return _evaluate(config, folder, console or Console(stderr=True))


def _evaluate(config: EvalConfig, folder: Path, console: Console) -> list[Path]:
    checkpoints = open_checkpoints(config.checkpoints)
    for checkpoint in checkpoints:
        if checkpoint.config.method.regime != "replace":
            raise UsageError(
                f"checkpoint {str(checkpoint.path)!r} was trained under the regime {checkpoint.config.method.regime!r}: it "
                "writes text and has no next-token distribution to measure. Use `dihal frontier`."
            )
    backbone = open_backbone(config.backbone, checkpoints)
    data = _data(config, checkpoints, backbone)
    windows = data.evaluation_windows(
        tokens=config.tokens, windows_per_document=config.windows_per_document, seed=config.seed
    )
    prompts = None
    if config.samples > 0:
        prompts = pick_prompts(
            windows, samples=config.samples, prompt_tokens=config.prompt_tokens, new_tokens=config.new_tokens
        )
    rows = _rows(config, backbone, checkpoints, data, windows, console)
    if prompts is not None:
        rows.append(Row(name=REAL_TEXT, method=REAL_TEXT, kind="text"))
    if config.reference not in {row.name for row in rows if row.kind != "text"}:
        raise unknown_name("reference row", config.reference, [row.name for row in rows if row.kind != "text"])

    shared = Comparable(
        metric_version=METRIC_VERSION,
        score_type=SCORE_TYPE,
        tokenizer_fingerprint=backbone.tokenizer_fingerprint,
        backbone_fingerprint=backbone.fingerprint(),
        sequence_length=data.config.sequence_length,
        tokens=config.tokens,
        data_fingerprint=_windows_fingerprint(windows),
        budget=None,
        training=None,
    )
    comparable = {
        row.name: replace(shared, budget=row.trained.budget_terms, training=row.trained.text_terms)
        if row.trained
        else shared
        for row in rows
    }
    paths = _targets(folder, rows)
    counted_text = data.fingerprint()["train"]
    hashes = {row.name: _row_hash(config, row, comparable[row.name], counted_text) for row in rows}
    pending, done = [], {}
    for row in rows:
        found = _existing(paths[row.name], hashes[row.name], comparable[row.name])
        if found is None:
            pending.append(row)
        else:
            done[row.name] = found
    if done:
        console.print(f"[dim]already measured, kept: {', '.join(done)}[/dim]", highlight=False)
    if not pending:
        return list(paths.values())

    measured, facts = _measure(config, backbone, windows, pending, console)
    context = context_of(
        config,
        backbone=backbone,
        data=data,
        windows=windows,
        facts=facts,
        reference=_reference(config.reference, measured, done),
    )
    scorer = _scorer(config, backbone) if prompts is not None else None
    for row in pending:
        text: dict[str, TextResult] = {}
        if prompts is not None and scorer is not None:
            text = _texts(config, row, backbone, prompts, scorer, console)
        sums = {str(steps): found for (name, steps), found in measured.items() if name == row.name}
        result = assemble(row, sums, text, comparable[row.name], hashes[row.name], context)
        write_result(paths[row.name], result)
        console.print(f"{row.name}: written {paths[row.name]}", highlight=False)
    return list(paths.values())


def _reference(name: str, measured: dict[tuple[str, int], Measured], done: dict[str, Result]) -> dict[str, np.ndarray]:
    """Per-document sums of the reference row (at its fewest steps)."""
    fresh = {steps: found.sums for (row, steps), found in measured.items() if row == name}
    if fresh:
        return fresh[min(fresh)]
    kept = done[name].per_document
    return {key: np.array(values) for key, values in kept[min(kept, key=int)].items()}


def _measure(
    config: EvalConfig, backbone: Backbone, windows: EvaluationWindows, pending: list[Row], console: Console
) -> tuple[dict[tuple[str, int], Measured], dict[str, Any]]:
    total = sum(document.tokens for document in windows.documents)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"tokens x {len(pending)} rows", total=total)
        advance: Callable[[int], None] = lambda tokens: bar.advance(task, tokens)  # noqa: E731
        return measure(
            backbone,
            windows,
            [row for row in pending if row.kind != "text"],
            batch_size=config.batch_size,
            sampler=config.sampler,
            seed=config.seed,
            advance=advance,
        )


def _texts(
    config: EvalConfig, row: Row, backbone: Backbone, prompts: Any, scorer: Scorer, console: Console
) -> dict[str, TextResult]:
    """Generate where it makes sense: backbone, n-grams, checkpoints; and score the real continuations."""
    if row.kind == "text":
        return {
            str(NO_SAMPLING): text_result(
                prompts.real, prompts, scorer, backbone, temperature=config.temperature, seconds=None
            )
        }
    if row.trained is None and row.source is not None:
        return {}
    found = {}
    for steps in row.steps:
        with console.status(f"{row.name}: generating {config.samples} x {config.new_tokens} tokens, {steps} steps"):
            made, seconds = generate_row(
                row,
                steps,
                backbone,
                prompts,
                new_tokens=config.new_tokens,
                temperature=config.temperature,
                seed=config.seed,
                batch_size=config.batch_size,
                sampler=config.sampler,
            )
            found[str(steps)] = text_result(
                made, prompts, scorer, backbone, temperature=config.temperature, seconds=seconds
            )
    return found
