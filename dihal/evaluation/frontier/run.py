"""`dihal frontier`: sources of text at every temperature and number of steps -> one JSON per row, tables, figure, page."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dihal.config.frontier import FrontierConfig
from dihal.errors import UsageError
from dihal.evaluation.checkpoints import load_trained, open_checkpoints
from dihal.evaluation.frontier.assemble import Yardstick, per_sample, resample_weights, set_metrics, with_intervals
from dihal.evaluation.frontier.board import require_comparable
from dihal.evaluation.frontier.bound import has_bound, likelihood_bound
from dihal.evaluation.frontier.definitions import FRONTIER_VERSION, METRICS, SCORE_TYPE, SET_METRICS
from dihal.evaluation.frontier.plan import NO_STEPS, PlannedRow, file_stem, plan_rows, row_hash, targets
from dihal.evaluation.frontier.prompts import Chosen, choose_prompts
from dihal.evaluation.frontier.result import SCHEMA, Comparable, FrontierRow, Point, read_row, write_row
from dihal.evaluation.frontier.scoring import Grader
from dihal.evaluation.frontier.sources import Made, WritingCost, writing_cost
from dihal.evaluation.frontier.statistics import TrainingGrams
from dihal.evaluation.generation import SEPARATOR
from dihal.evaluation.inputs import open_backbone, open_data, open_scorer
from dihal.io import hash_json, output_dir
from dihal.provenance import provenance

if TYPE_CHECKING:
    from dihal.backbone import Backbone

__all__ = ["measure_frontier"]


def _check(config: FrontierConfig) -> None:
    for name in ("samples", "prompt_tokens", "new_tokens", "batch_size", "bootstrap", "frechet_channels"):
        if getattr(config, name) < 1:
            raise UsageError(f"{name} must be at least 1, got {getattr(config, name)}.")
    if not 0 < config.confidence < 1:
        raise UsageError(f"confidence must lie between 0 and 1, got {config.confidence}.")
    for name, least in (("steps", 1), ("bridge_steps", 1), ("temperatures", 0), ("seeds", 0)):
        values = getattr(config, name)
        if not values or min(values) < least:
            raise UsageError(f"{name} must name at least one value, each at least {least}; got {values}.")
    if len(set(config.seeds)) < len(config.seeds):
        raise UsageError(f"seeds names a value twice: {config.seeds}.")
    if config.bound_cuts < 0:
        raise UsageError(f"bound_cuts must not be negative, got {config.bound_cuts}; 0 leaves the bound out.")
    if config.self_bleu_samples < 2:
        raise UsageError(f"self_bleu_samples must be at least 2, got {config.self_bleu_samples}.")


class _Measurement:
    """What all rows of one call share."""

    def __init__(self, config: FrontierConfig, backbone: Backbone, chosen: Chosen, grader: Grader) -> None:
        self.config = config
        self.backbone = backbone
        self.chosen = chosen
        self.grader = grader
        self.yardstick: Yardstick | None = None
        self.costs: dict[tuple[str, int], WritingCost] = {}
        self.bounds: dict[tuple[str, str], dict[str, Any]] = {}

    def bound(self, row: PlannedRow, blank: FrontierRow) -> dict[str, Any]:
        """The likelihood bound of a row's checkpoint: one for all variants that read in the same precision."""
        assert row.trained is not None
        method, config = row.trained.method, self.config
        precision = _precision(row)
        key = (row.trained.name, precision)
        if key not in self.bounds:
            self.bounds[key] = likelihood_bound(
                method,
                self.backbone,
                self.chosen,
                cuts=config.bound_cuts,
                precision=precision,
                batch_size=config.batch_size,
                seed=config.seed,
                weights=resample_weights(blank),
                confidence=config.confidence,
            )
        return self.bounds[key]

    def remember(self, row: PlannedRow, bound: dict[str, Any]) -> None:
        """Take a bound that is there already; an empty one is none."""
        assert row.trained is not None
        if bound:
            self.bounds.setdefault((row.trained.name, _precision(row)), bound)

    def point(self, row: PlannedRow, steps: int, temperature: float) -> Point:
        """Write and grade the continuations of one point with every seed. Its metrics are filled in by the caller."""
        config, prompts = self.config, self.chosen.prompts
        assert self.yardstick is not None
        numbers: dict[str, list[float]] = {}
        sets: dict[str, list[float | None]] = {name: [] for name in SET_METRICS}
        missing: dict[str, str] = {}
        made_all: list[Made] = []
        for seed in config.seeds:
            made = self._write(row, steps, temperature, seed)
            graded = self.yardstick.real if row.source is None else self.grader.grade(prompts.prompts, made.tokens)
            for name, values in per_sample(made, graded, self.yardstick).items():
                numbers.setdefault(name, []).extend(values)
            found, why = set_metrics(made, graded, self.yardstick, config, seed=seed, reference=row.source is None)
            for name in SET_METRICS:
                sets[name].append(found[name])
            missing |= why
            made_all.append(made)
        seconds = None if row.source is None else sum(made.seconds for made in made_all)
        written = sum(made.tokens.numel() for made in made_all)
        return Point(
            steps=steps,
            temperature=temperature,
            metrics={},
            set_metrics=sets,
            missing=missing,
            per_sample=numbers,
            seconds=seconds,
            tokens_per_second=None if seconds is None else written / max(seconds, 1e-9),
            texts=self._texts(made_all[0].tokens),
            **asdict(self._cost(row, steps, temperature)),
        )

    def _write(self, row: PlannedRow, steps: int, temperature: float, seed: int) -> Made:
        prompts = self.chosen.prompts
        if row.source is None:
            return Made(tokens=prompts.real, seconds=0.0)
        made = row.source.write(
            prompts, new_tokens=self.config.new_tokens, steps=steps, temperature=temperature, seed=seed
        )
        wanted = (self.config.samples, self.config.new_tokens)
        assert tuple(made.tokens.shape) == wanted, f"{row.name} wrote {tuple(made.tokens.shape)} tokens, not {wanted}"
        return made

    def _cost(self, row: PlannedRow, steps: int, temperature: float) -> WritingCost:
        if row.source is None:
            return WritingCost(nfe=None, encodes=None, reads=None, flops_per_token=None)
        # Temperature changes no operation: counted once per number of steps.
        key = (row.name, steps)
        if key not in self.costs:
            self.costs[key] = writing_cost(
                row.source, self.chosen.prompts, new_tokens=self.config.new_tokens, steps=steps, temperature=temperature
            )
        return self.costs[key]

    def _texts(self, tokens: torch.Tensor) -> list[str]:
        decode = self.backbone.tokenizer.decode
        kept = self.config.texts
        return [
            decode(prompt, skip_special_tokens=True) + SEPARATOR + decode(new, skip_special_tokens=False)
            for prompt, new in zip(self.chosen.prompts.prompts[:kept].tolist(), tokens[:kept].tolist(), strict=True)
        ]


def measure_frontier(config: FrontierConfig, *, console: Console | None = None) -> list[Path]:
    """Measure every row and write one JSON per row into ``config.out``; return the files.

    A row's file is written again after every point. A later call keeps the points of a file that come from the same
    options, text, weights and checkpoint, also those its own grid does not name, and adds what is missing.

    Raises:
        UsageError: checkpoints that cannot share a table (unlike budget, text, tokenizer, backbone, ... named); a
            backbone or text that is not theirs; options out of range; an output folder that cannot be written.
    """
    _check(config)
    with output_dir(config.out) as folder:
        return _measure(config, folder, console or Console(stderr=True))


def _measure(config: FrontierConfig, folder: Path, console: Console) -> list[Path]:
    checkpoints = open_checkpoints(config.checkpoints)
    backbone = open_backbone(config.backbone, checkpoints)
    data, training = open_data(config.data, checkpoints, backbone)
    windows = data.evaluation_windows(windows_per_document=config.windows_per_document, seed=config.seed)
    chosen = choose_prompts(
        windows, samples=config.samples, prompt_tokens=config.prompt_tokens, new_tokens=config.new_tokens
    )
    grader = Grader(open_scorer(config.scorer, backbone), backbone, batch_size=config.batch_size)
    trained = load_trained(checkpoints, backbone, weights=config.weights)
    rows = plan_rows(config, backbone, trained, training)
    paths = targets(folder, rows)

    shared = Comparable(
        metric_version=FRONTIER_VERSION,
        score_type=SCORE_TYPE,
        tokenizer_fingerprint=backbone.tokenizer_fingerprint,
        backbone_fingerprint=backbone.fingerprint(),
        scorer=grader.id,
        scorer_fingerprint=grader.fingerprint(),
        data_fingerprint=chosen.fingerprint(),
        samples=config.samples,
        prompt_tokens=config.prompt_tokens,
        new_tokens=config.new_tokens,
        seeds=list(config.seeds),
        training_text=training.fingerprint()["train"],
        budget=None,
        training=None,
    )
    common = {
        "resolved": asdict(replace(config, data=data.config)),
        "provenance": provenance(),
        "details": {
            "documents": len(chosen.keys),
            "metrics": {name: metric.definition for name, metric in METRICS.items()},
            "set_metrics": {name: definition for name, (_, definition) in SET_METRICS.items()},
        },
    }
    blanks = {row.name: _blank(config, row, _terms(shared, row), backbone, chosen, grader, common) for row in rows}
    require_comparable([(paths[name], blank) for name, blank in blanks.items()])

    measurement = _Measurement(config, backbone, chosen, grader)
    found = {name: _existing(paths[name], blank) for name, blank in blanks.items()}
    kept = {name: [] if row is None else row.points for name, row in found.items()}
    # Bounds that are there already stay; those that are not are work to do, also for a row with all its points.
    unbound = {
        row.name for row in rows if config.bound_cuts > 0 and row.trained is not None and has_bound(row.trained.method)
    }
    for name, row in found.items():
        bound = {} if row is None else row.details.get("bound", {})
        if bound and (name not in unbound or bound["cuts"] == config.bound_cuts):
            blanks[name] = replace(blanks[name], details={**blanks[name].details, "bound": bound})
            unbound.discard(name)
    for row in rows:
        if row.name in unbound:
            measurement.remember(row, _bound_beside(folder, row, blanks[row.name], config))
    todo = {
        row.name: [key for key in row.grid if key not in {(p.steps, p.temperature) for p in kept[row.name]}]
        for row in rows
    }
    if any(kept.values()):
        console.print(
            f"[dim]already measured, kept: {sum(map(len, kept.values()))} points of {sum(map(bool, kept.values()))} rows[/dim]",
            highlight=False,
        )
    if not any(todo.values()) and not unbound:
        return list(paths.values())
    text = training.train_tokens
    measurement.yardstick = Yardstick(
        grams=TrainingGrams(text.tokens, text.ends),
        end_token_id=backbone.end_token_id,
        real=grader.grade(chosen.prompts.prompts, chosen.prompts.real),
        channels=config.frechet_channels,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("points", total=sum(map(len, todo.values())))
        for row in rows:
            blank, points = blanks[row.name], kept[row.name]
            weights = resample_weights(blank)
            if row.name in unbound:
                bar.update(task, description=f"{row.name}, likelihood bound")
                blank = replace(blank, details={**blank.details, "bound": measurement.bound(row, blank)})
                if points:
                    write_row(paths[row.name], replace(blank, points=points))
            for steps, temperature in todo[row.name]:
                bar.update(task, description=_label(row, steps, temperature))
                point = with_intervals(blank, measurement.point(row, steps, temperature), weights)
                points = sorted([*points, point], key=lambda item: (item.steps, item.temperature))
                write_row(paths[row.name], replace(blank, points=points))
                bar.advance(task)
    return list(paths.values())


def _terms(shared: Comparable, row: PlannedRow) -> Comparable:
    if row.trained is None:
        return shared
    return replace(shared, budget=row.trained.budget_terms, training=row.trained.text_terms)


def _label(row: PlannedRow, steps: int, temperature: float) -> str:
    if row.source is None:
        return row.name
    return f"{row.name}, T {temperature:g}" + (f", {steps} steps" if steps != NO_STEPS else "")


def _precision(row: PlannedRow) -> str:
    assert row.trained is not None
    assert row.variant is not None
    return str(row.variant.options.get("precision", row.trained.config.method.writing.precision))


def _bound_beside(folder: Path, row: PlannedRow, blank: FrontierRow, config: FrontierConfig) -> dict[str, Any]:
    """The bound of the row's checkpoint as another row's file has it, measured alike; empty: none does."""
    assert row.trained is not None
    alike = ("checkpoint", "comparable", "bootstrap", "bootstrap_seed", "confidence")
    for path in sorted(folder.glob("*.json")):
        if not path.name.startswith(file_stem(row.trained.name)):
            continue
        try:
            found = read_row(path)
        except UsageError:
            continue  # not a whole row: whose it is will measure it again
        bound = found.details.get("bound", {})
        how = tuple(bound.get(name) for name in ("cuts", "precision", "seed"))
        if how == (config.bound_cuts, _precision(row), config.seed) and all(
            getattr(found, name) == getattr(blank, name) for name in alike
        ):
            return bound
    return {}


def _existing(path: Path, blank: FrontierRow) -> FrontierRow | None:
    if not path.exists():
        return None
    try:
        found = read_row(path)
    except UsageError:
        return None  # not a whole row: measured again and replaced
    return found if found.row_hash == blank.row_hash else None


def _blank(
    config: FrontierConfig,
    row: PlannedRow,
    comparable: Comparable,
    backbone: Backbone,
    chosen: Chosen,
    grader: Grader,
    common: dict[str, Any],
) -> FrontierRow:
    """The row without its points."""
    trained = row.trained
    method = None if trained is None else trained.config.method
    train_config = None if trained is None else asdict(trained.config)
    return FrontierRow(
        schema=SCHEMA,
        name=row.name,
        method=row.method,
        kind=row.kind,
        regime=None if method is None else method.regime,
        space=None if method is None else method.space,
        split=None if trained is None else trained.method.split,
        writing=None if row.variant is None else dict(row.variant.options),
        points=[],
        planned=len(row.grid),
        documents=chosen.documents,
        document_keys=chosen.keys,
        confidence=config.confidence,
        bootstrap=config.bootstrap,
        bootstrap_seed=config.seed,
        self_graded=grader.self_graded,
        scorer_vocab=grader.vocab,
        comparable=comparable,
        cost=row.cost(),
        checkpoint=None if trained is None else trained.identity(),
        config=common["resolved"],
        row_hash=row_hash(config, row, asdict(comparable)),
        train_config=train_config,
        train_config_hash=None if train_config is None else hash_json(train_config),
        backbone=asdict(backbone.reference),
        details={**common["details"], **row.facts},
        provenance=common["provenance"],
        command=common["provenance"]["command"],
    )
