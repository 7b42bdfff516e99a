"""The truth: the same short training at every split, and what came of it on held-out text."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from dihal.checkpoint import Checkpoint, has_checkpoint, load_checkpoint
from dihal.config import TrainConfig, WritingConfig
from dihal.config.convert import to_dict
from dihal.config.sweep import SweepConfig
from dihal.errors import UsageError
from dihal.evaluation.bootstrap import Interval, document_weights
from dihal.evaluation.definitions import METRIC_VERSION, METRICS, ratio
from dihal.evaluation.measure import measure
from dihal.evaluation.rows import Row
from dihal.io import hash_json, read_json, write_json
from dihal.provenance import provenance
from dihal.restore import restore_method
from dihal.sweep.statistics import interval
from dihal.sweep.written import common_entropy, text_about, text_truth, write_texts
from dihal.training.run import train

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.data.module import TextDataModule

__all__ = ["REPLACE_TRUTHS", "SPLIT_SCHEMA", "Truth", "trained_split", "truth_record", "truths_of"]

SPLIT_SCHEMA = "dihal.sweep-split/1"
"""Format of the file of one trained split."""

REPLACE_TRUTHS = ("kl", "nll", "state_error")
"""Metrics of :data:`dihal.evaluation.definitions.METRICS` that are a split's truth under `replace`; all are losses."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """A loss per trained split."""

    name: str
    label: str
    unit: str
    definition: str
    values: Float[np.ndarray, " splits"]
    """Mean over seeds."""
    resampled: Float[np.ndarray, "resamples splits"]
    """The same in each resample of the held-out documents (of the seeds' mean; seeds are not resampled)."""
    per_seed: Float[np.ndarray, "seeds splits"]

    def intervals(self, confidence: float) -> list[Interval]:
        """One per split."""
        return [interval(value, self.resampled[:, i], confidence) for i, value in enumerate(self.values)]


def _train_config(config: SweepConfig, split: int, seed: int, folder: Path) -> TrainConfig:
    return replace(
        config.train,
        method=replace(config.train.method, split=split, split_from=None),
        seed=seed,
        out=str(folder),
        resume=has_checkpoint(folder),
        dry_run=False,
    )


def _identity(config: SweepConfig, run: TrainConfig, backbone: Backbone, data: TextDataModule) -> tuple[str, str]:
    """Hash of everything that decides the weights of a split, and of everything that decides its numbers."""
    plain = to_dict(run)
    for name in ("out", "resume", "dry_run", "log"):
        del plain[name]
    # Where things lie is not what they are; their fingerprints are below.
    del plain["backbone"]["id"], plain["backbone"]["device"], plain["data"]["source"]
    # How text is written decides no weight; and an option that nobody set is none, so that new ones change nothing.
    usual = to_dict(WritingConfig())
    writing = {name: value for name, value in plain["method"].pop("writing").items() if value != usual[name]}
    trained = hash_json(
        {
            "train": plain,
            "backbone": backbone.fingerprint(),
            "tokenizer": backbone.tokenizer_fingerprint,
            "data": data.fingerprint(),
        }
    )
    names = ("tokens", "windows_per_document", "steps", "seed")
    replaced = {name: getattr(config, name) for name in names}
    written = {name: value for name, value in to_dict(config.text).items() if name not in ("batch_size", "entropy")}
    written |= {"prompts": config.seed, "method": writing}
    measured = hash_json(
        {
            "schema": SPLIT_SCHEMA,
            "trained": trained,
            "evaluation": replaced if run.method.regime == "replace" else written,
            "weights": config.weights,
            "metric_version": METRIC_VERSION,
        }
    )
    return trained, measured


def _replaced(config: SweepConfig, checkpoint: Checkpoint, backbone: Backbone, data: TextDataModule) -> dict[str, Any]:
    """Per-document sums of the trained bridge."""
    method, _ = restore_method(checkpoint, backbone, weights=config.weights)
    windows = data.evaluation_windows(
        tokens=config.tokens, windows_per_document=config.windows_per_document, seed=config.seed
    )
    steps = 1 if method.noise_scale == 0.0 else config.steps
    row = Row(
        name=f"split {method.split}",
        method=checkpoint.config.method.name,
        kind="checkpoint",
        split=method.split,
        steps=(steps,),
        source=method,
    )
    found, facts = measure(backbone, windows, [row], batch_size=config.batch_size, sampler=None, seed=config.seed)
    sums = found[(row.name, steps)].sums
    needed = {name for metric in REPLACE_TRUTHS for name in (METRICS[metric].numerator, METRICS[metric].denominator)}
    return {
        "documents": [document.key for document in windows.documents],
        "sums": {name: sums[name].tolist() for name in sorted(needed)},
        "facts": facts,
    }


def trained_split(
    config: SweepConfig,
    split: int,
    seed: int,
    folder: Path,
    backbone: Backbone,
    data: TextDataModule,
    *,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train and measure one split, or read its file where that is done.

    The run goes to ``folder/split-LL-seed-S/``, its numbers to the file of that name with ``.json``. An interrupted
    run goes on from its checkpoint. The checkpoint is deleted once it is measured, unless it is to be kept: then other
    options of the evaluation measure it again.

    Args:
        config: the sweep.
        split: blocks replaced.
        seed: of the training.
        folder: of the sweep.
        backbone: shared by all splits.
        data: of the template; its held-out documents are the truth's.
        say: told what happens.

    Raises:
        UsageError: from training or evaluation; an earlier run in the folder with other options.
    """
    name = f"split-{split:02d}-seed-{seed}"
    file, run_folder = folder / f"{name}.json", folder / name
    run = _train_config(config, split, seed, run_folder)
    trained, identity = _identity(config, run, backbone, data)
    if file.is_file():
        found = read_json(file)
        if isinstance(found, dict) and found.get("hash") == identity and found.get("schema") == SPLIT_SCHEMA:
            say(f"split {split}, seed {seed}: already measured, kept")
            return found
        if not (isinstance(found, dict) and found.get("train_hash") == trained and has_checkpoint(run_folder)):
            raise UsageError(
                f"{str(file)!r} was measured with other options, text, weights or version, and there is no checkpoint of "
                "this training to measure again (keep_checkpoints keeps them). Choose another out folder, or delete the "
                "file and the run folder beside it to train this split again."
            )
    else:
        train(run, backbone=backbone)
    checkpoint = load_checkpoint(run_folder)
    say(f"split {split}, seed {seed}: trained on {checkpoint.state['tokens']:,} tokens; measuring")
    measure_it = write_texts if run.method.regime == "generate" else _replaced
    measured = measure_it(config, checkpoint, backbone, data)
    record = {
        "schema": SPLIT_SCHEMA,
        "hash": identity,
        "train_hash": trained,
        "split": split,
        "seed": seed,
        "regime": run.method.regime,
        **measured,
        "training": dict(checkpoint.state),
        "trainable_parameters": sum(tensor.numel() for tensor in checkpoint.tensors("ema").values())
        if "ema" in checkpoint.names
        else None,
        "provenance": provenance(),
    }
    write_json(file, record)
    if not config.keep_checkpoints:
        shutil.rmtree(run_folder / "checkpoints")
    # One run's weights, optimiser and average must be gone before the next ones come.
    gc.collect()
    if backbone.device.type == "cuda":
        torch.cuda.empty_cache()
    return record


def truths_of(
    records: dict[tuple[int, int], dict[str, Any]], splits: list[int], seeds: list[int], config: SweepConfig
) -> list[Truth]:
    """The truths of all splits, on the same resamples of the held-out documents.

    Args:
        records: (split, seed) -> what :func:`trained_split` returned.
        splits: in the order of the result.
        seeds: training seeds.
        config: resamples and seed.

    Raises:
        UsageError: splits that were measured on different documents.
    """
    first = records[splits[0], seeds[0]]
    for (split, seed), record in records.items():
        if record["documents"] != first["documents"]:
            raise UsageError(
                f"split {split} (seed {seed}) was measured on other documents than split {splits[0]}. "
                "Delete its file in the out folder and sweep again."
            )
    weights = document_weights(len(first["documents"]), config.bootstrap, config.seed)
    if first["regime"] == "generate":
        at = common_entropy(list(records.values()), config.text.entropy)
        once = np.ones((1, weights.shape[1]))
        rows = {key: text_truth(record, np.concatenate([once, weights]), at) for key, record in records.items()}
        return [_truth(text_about(first, at), rows, splits, seeds)]
    found = []
    for name in REPLACE_TRUTHS:
        metric = METRICS[name]
        about = {"name": name, "label": metric.label, "unit": metric.unit, "definition": metric.definition}
        rows = {}
        for key, record in records.items():
            sums = {item: np.array(values, dtype=np.float64) for item, values in record["sums"].items()}
            rows[key] = np.concatenate([ratio(metric, sums), ratio(metric, sums, weights)])
        found.append(_truth(about, rows, splits, seeds))
    return found


def _truth(
    about: dict[str, str], rows: dict[tuple[int, int], np.ndarray], splits: list[int], seeds: list[int]
) -> Truth:
    """``rows``: value, then resamples, of each (split, seed)."""
    table = np.stack([[rows[split, seed] for split in splits] for seed in seeds])
    mean = table.mean(0)
    return Truth(**about, values=mean[:, 0], resampled=mean[:, 1:].T, per_seed=table[:, :, 0])


def truth_record(truth: Truth, confidence: float) -> dict[str, Any]:
    """A truth as plain data."""
    return {
        "label": truth.label,
        "unit": truth.unit,
        "definition": truth.definition,
        "values": truth.values.tolist(),
        "intervals": [asdict(item) for item in truth.intervals(confidence)],
        "per_seed": truth.per_seed.tolist(),
    }
