"""Which rows there are, with which points."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dihal.config.frontier import FrontierConfig
from dihal.errors import UsageError
from dihal.evaluation.checkpoints import Trained
from dihal.evaluation.frontier.sources import BackboneSource, BridgeSource, Made, NgramSource, Source, WriterSource
from dihal.evaluation.frontier.variants import Variant, parse_variants, variants_for
from dihal.evaluation.ngram import NgramModel
from dihal.io import hash_json
from dihal.masked import MaskedLM

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.data.module import TextDataModule

__all__ = ["NO_STEPS", "REAL_TEXT", "PlannedRow", "file_stem", "plan_rows", "row_hash", "targets"]

REAL_TEXT = "real text"
"""Name of the row of the real continuations."""

NO_STEPS = 0

_NGRAMS = {1: "unigram", 2: "bigram", 3: "trigram"}


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedRow:
    """A row to be made."""

    name: str
    method: str
    kind: str
    """See `result.KINDS`."""
    grid: list[tuple[int, float]]
    """(steps, temperature) of its points."""
    source: Source | None = None
    """None: the real continuations."""
    trained: Trained | None = None
    variant: Variant | None = None
    """How a `generate` checkpoint writes; None for any other row."""
    frozen_parameters: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """What else its file tells."""

    def identity(self) -> dict[str, Any]:
        """What decides its text, beside the prompts."""
        return {
            "name": self.name,
            "kind": self.kind,
            "checkpoint": None if self.trained is None else self.trained.identity()["sha256"],
            "weights": None if self.trained is None else self.trained.weights,
            "variant": None if self.variant is None else self.variant.options,
            **self.facts,
        }

    def cost(self) -> dict[str, Any]:
        """Parameters, and what training took as metered; null where it does not apply or was not metered."""
        trained = self.trained
        if trained is None:
            return {"frozen_parameters": self.frozen_parameters}
        state = trained.checkpoint.state
        return {
            "trainable_parameters": sum(weight.numel() for weight in trained.method.parameters()),
            "frozen_parameters": self.frozen_parameters,
            "diffused_tokens": state.get("tokens"),
            "unique_tokens": state.get("budget", {}).get("unique_tokens"),
            "train_flops": state.get("flops"),
            "train_seconds": state.get("seconds"),
            "train_peak_memory": state.get("peak_memory"),
            "train_hardware": trained.hardware,
            "tuning_trials": trained.config.budget.trials,
        }


def plan_rows(
    config: FrontierConfig, backbone: Backbone, trained: list[Trained], training: TextDataModule
) -> list[PlannedRow]:
    """Return the rows: real text first (the others are measured against it), backbone, checkpoints, n-grams.

    Raises:
        UsageError: a variant that cannot be read, or an n-gram order below 1.
    """
    temperatures = tuple(sorted(set(config.temperatures)))
    variants = parse_variants(config.variants)
    whole = backbone.parameter_count()
    rows = [
        PlannedRow(name=REAL_TEXT, method="text", kind="text", grid=[(NO_STEPS, 0.0)]),
        PlannedRow(
            name="backbone",
            method="backbone",
            kind="bound",
            grid=[(NO_STEPS, temperature) for temperature in temperatures],
            source=BackboneSource(backbone=backbone, batch_size=config.batch_size),
            frozen_parameters=whole,
        ),
    ]
    for item in trained:
        frozen = backbone.parameter_count(item.method.split)
        # A converted backbone is its own network: the original is not run beside it.
        own = isinstance(item.method, MaskedLM) and item.method.decoder is not None
        if item.config.method.regime == "replace":
            steps = (1,) if item.method.noise_scale == 0.0 else tuple(sorted(set(config.bridge_steps)))
            rows.append(
                PlannedRow(
                    name=item.name,
                    method=item.config.method.name,
                    kind="checkpoint",
                    grid=[(count, temperature) for count in steps for temperature in temperatures],
                    source=BridgeSource(backbone=backbone, trained=item, batch_size=config.batch_size),
                    trained=item,
                    frozen_parameters=frozen,
                )
            )
            continue
        read: dict[Hashable, Made] = {}
        rows += [
            PlannedRow(
                name=f"{item.name} {variant.label}".strip(),
                method=item.config.method.name,
                kind="checkpoint",
                grid=variant.grid(config.steps, config.temperatures),
                source=WriterSource(
                    backbone=backbone, writer=item.method, variant=variant, batch_size=config.batch_size, read=read
                ),
                trained=item,
                variant=variant,
                frozen_parameters=0 if own else whole,
            )
            for variant in variants_for(item.config.method.regime, variants)
        ]
    return rows + _ngrams(config, backbone, training, temperatures)


def _ngrams(
    config: FrontierConfig, backbone: Backbone, training: TextDataModule, temperatures: tuple[float, ...]
) -> list[PlannedRow]:
    if not config.ngrams:
        return []
    if min(config.ngrams) < 1:
        raise UsageError(f"ngrams are orders of at least 1, got {config.ngrams}.")
    text = training.train_tokens
    counted = NgramModel.fit(text.tokens, order=max(config.ngrams), vocab=backbone.vocab_size, ends=text.ends)
    return [
        PlannedRow(
            name=_NGRAMS.get(order, f"{order}-gram"),
            method="ngram",
            kind="control",
            grid=[(NO_STEPS, temperature) for temperature in temperatures],
            source=NgramSource(model=counted.of_order(order).to(backbone.device), banned=backbone.end_token_id),
            frozen_parameters=0,
            facts={"order": order, "training_text": training.fingerprint()["train"]},
        )
        for order in sorted(set(config.ngrams))
    ]


def file_stem(name: str) -> str:
    """What the file of a row of this name is called."""
    return re.sub(r"[^A-Za-z0-9._@=-]+", "-", name).strip("-.")


def targets(folder: Path, rows: list[PlannedRow]) -> dict[str, Path]:
    """Return the file of each row.

    Raises:
        UsageError: two rows would share one.
    """
    paths: dict[str, Path] = {}
    for row in rows:
        path = folder / f"{file_stem(row.name)}.json"
        if path in paths.values():
            raise UsageError(
                f"two rows would be written to {str(path)!r}. Give run folders and variants distinct names."
            )
        paths[row.name] = path
    return paths


def row_hash(config: FrontierConfig, row: PlannedRow, comparable: dict[str, Any]) -> str:
    """Hash of what decides the numbers of a row's points, apart from their steps and temperature."""
    measured = {
        name: getattr(config, name) for name in ("self_bleu_samples", "frechet_channels", "mauve", "seed", "weights")
    }
    intervals = {name: getattr(config, name) for name in ("bootstrap", "confidence")}
    return hash_json([row.identity(), comparable, measured, intervals])
