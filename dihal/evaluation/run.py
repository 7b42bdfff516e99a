"""`dihal evaluate`: checkpoints and the rows that are always there -> one JSON per row.

Under torchrun all processes open the same things and share the batches; the first one writes and prints.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dihal.config import DataConfig, EvalConfig
from dihal.errors import UsageError, unknown_name
from dihal.evaluation.assemble import Context, assemble, context_of
from dihal.evaluation.checkpoints import load_trained, open_checkpoints
from dihal.evaluation.definitions import METRIC_VERSION
from dihal.evaluation.generation import Scorer, generate_row, pick_prompts, text_result
from dihal.evaluation.inputs import open_backbone, open_scorer, open_text
from dihal.evaluation.measure import Measured, measure
from dihal.evaluation.ngram import NgramModel
from dihal.evaluation.result import Comparable, Result, TextResult, read_result, write_result
from dihal.evaluation.rows import NGRAMS, NO_SAMPLING, Row, build_rows, other_documents, unigram_log_probabilities
from dihal.evaluation.sharing import everywhere, on_first
from dihal.geometry.ranks import Ranks, joined
from dihal.io import hash_json, output_dir

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.checkpoint import Checkpoint
    from dihal.data.module import TextDataModule
    from dihal.data.packing import EvaluationWindows
    from dihal.evaluation.generation import Prompts

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


def _data(config: EvalConfig, checkpoints: list[Checkpoint], backbone: Backbone, *, progress: bool) -> TextDataModule:
    wanted = config.data
    if wanted is None:
        wanted = checkpoints[0].config.data if checkpoints else DataConfig()
    chosen = open_text(wanted, backbone, progress=progress)
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
        _require_unseen(chosen, open_text(checkpoint.config.data, backbone, progress=progress), checkpoint)
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


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """What is measured, on what."""

    backbone: Backbone
    data: TextDataModule
    windows: EvaluationWindows
    prompts: Prompts | None
    """None: nothing is generated."""
    rows: list[Row]
    comparable: dict[str, Comparable]
    paths: dict[str, Path]
    hashes: dict[str, str]


def evaluate(config: EvalConfig, *, console: Console | None = None) -> list[Path]:
    """Measure every row and write one JSON per row into ``config.out``; return the files.

    A row whose file already holds the result of the same options, text, weights and checkpoint is not measured
    again. An interrupted call loses at most the rows it had not finished.

    Called in every process that torchrun started, it shares the work; the files, which the first process writes, are
    those of one process, but for seconds of work.

    Raises:
        UsageError: checkpoints that cannot share a table; a backbone, tokenizer or text that is not theirs; options
            out of range; an output folder that cannot be written. Nothing is half-written.
        SystemExit: the same on another process than the first.
    """
    with joined() as (ranks, device), contextlib.ExitStack() as stack:
        if ranks.rank > 0:  # the first process says it all
            console = Console(quiet=True)
            stack.enter_context(warnings.catch_warnings(action="ignore"))
        console = console or Console(stderr=True)

        def begin() -> Path:
            _check(config)
            return stack.enter_context(output_dir(config.out))

        folder = on_first(ranks, begin)
        opened = everywhere(ranks, lambda: _open(config, folder, console, device=device, progress=ranks.rank == 0))
        return _evaluate(config, opened, console, ranks)


def _open(config: EvalConfig, folder: Path, console: Console, *, device: str | None, progress: bool) -> _Opened:
    checkpoints = open_checkpoints(config.checkpoints)
    for checkpoint in checkpoints:
        if checkpoint.config.method.regime != "replace":
            raise UsageError(
                f"checkpoint {str(checkpoint.path)!r} was trained under the regime {checkpoint.config.method.regime!r}: it "
                "writes text and has no next-token distribution to measure. Use `dihal frontier`."
            )
    backbone = open_backbone(config.backbone, checkpoints, device=device)
    data = _data(config, checkpoints, backbone, progress=progress)
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
    counted_text = data.fingerprint()["train"]
    return _Opened(
        backbone=backbone,
        data=data,
        windows=windows,
        prompts=prompts,
        rows=rows,
        comparable=comparable,
        paths=_targets(folder, rows),
        hashes={row.name: _row_hash(config, row, comparable[row.name], counted_text) for row in rows},
    )


def _kept(opened: _Opened) -> dict[str, Result]:
    """Rows that were measured before."""
    found = {name: _existing(path, opened.hashes[name], opened.comparable[name]) for name, path in opened.paths.items()}
    return {name: result for name, result in found.items() if result is not None}


def _evaluate(config: EvalConfig, opened: _Opened, console: Console, ranks: Ranks) -> list[Path]:
    files = list(opened.paths.values())
    # The files of another machine may not be there to see.
    done = on_first(ranks, lambda: _kept(opened))
    pending = [row for row in opened.rows if row.name not in done]
    if done:
        console.print(f"[dim]already measured, kept: {', '.join(done)}[/dim]", highlight=False)
    if not pending:
        return files

    measured, facts = _measure(config, opened, pending, console, ranks)
    context = context_of(
        config,
        backbone=opened.backbone,
        data=opened.data,
        windows=opened.windows,
        facts=facts,
        reference=_reference(config.reference, measured, done),
    )
    scorer = None
    if opened.prompts is not None:
        scorer = everywhere(ranks, lambda: Scorer(open_scorer(config.scorer, opened.backbone), opened.backbone))
    for row in pending:
        text: dict[str, TextResult] = {}
        if opened.prompts is not None and scorer is not None:
            text = _texts(config, row, opened.backbone, opened.prompts, scorer, console, ranks)
        sums = {str(steps): found for (name, steps), found in measured.items() if name == row.name}
        on_first(ranks, partial(_write, opened, row, sums, text, context))
        console.print(f"{row.name}: written {opened.paths[row.name]}", highlight=False)
    return files


def _write(
    opened: _Opened, row: Row, measured: dict[str, Measured], text: dict[str, TextResult], context: Context
) -> None:
    result = assemble(row, measured, text, opened.comparable[row.name], opened.hashes[row.name], context)
    write_result(opened.paths[row.name], result)


def _reference(name: str, measured: dict[tuple[str, int], Measured], done: dict[str, Result]) -> dict[str, np.ndarray]:
    """Per-document sums of the reference row (at its fewest steps)."""
    fresh = {steps: found.sums for (row, steps), found in measured.items() if row == name}
    if fresh:
        return fresh[min(fresh)]
    kept = done[name].per_document
    return {key: np.array(values) for key, values in kept[min(kept, key=int)].items()}


def _measure(
    config: EvalConfig, opened: _Opened, pending: list[Row], console: Console, ranks: Ranks
) -> tuple[dict[tuple[str, int], Measured], dict[str, Any]]:
    total = sum(document.tokens for document in opened.windows.documents)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"tokens x {len(pending)} rows", total=total)
        advance: Callable[[int], None] = lambda tokens: bar.advance(task, tokens)  # noqa: E731
        return measure(
            opened.backbone,
            opened.windows,
            [row for row in pending if row.kind != "text"],
            batch_size=config.batch_size,
            sampler=config.sampler,
            seed=config.seed,
            advance=advance,
            ranks=ranks,
        )


def _texts(
    config: EvalConfig, row: Row, backbone: Backbone, prompts: Prompts, scorer: Scorer, console: Console, ranks: Ranks
) -> dict[str, TextResult]:
    """Generate where it makes sense: backbone, n-grams, checkpoints; and score the real continuations."""
    if row.kind == "text":
        real = text_result(
            prompts.real, prompts, scorer, backbone, temperature=config.temperature, seconds=None, ranks=ranks
        )
        return {str(NO_SAMPLING): real}
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
                ranks=ranks,
            )
            found[str(steps)] = text_result(
                made, prompts, scorer, backbone, temperature=config.temperature, seconds=seconds, ranks=ranks
            )
    return found
