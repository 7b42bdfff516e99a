"""A training run from configuration to checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dihal.backbone import Backbone, backbone_from_config
from dihal.backbone.weights import lower_fingerprint
from dihal.checkpoint import load_checkpoint
from dihal.config import MethodConfig, TrainConfig
from dihal.config.cli import config_hash, dump, to_dict
from dihal.data.batch import Batch
from dihal.data.module import TextDataModule
from dihal.errors import UsageError
from dihal.io import ensure_dir, write_json, write_text
from dihal.methods import AnyMethod, build_method
from dihal.provenance import provenance
from dihal.training.budget import Spent, plan_steps
from dihal.training.callbacks import RunCallback
from dihal.training.children import ending_with_parent, is_child, marked_as_parent
from dihal.training.guard import RunEnded
from dihal.training.ledger import preparation
from dihal.training.logs import Record, build_mirrors, write_csv
from dihal.training.memory import out_of_memory
from dihal.training.module import BridgeModule
from dihal.training.own_text import own_text, own_text_flops
from dihal.training.plan import flops_per_token, parameters, print_plan, require_affordable
from dihal.training.progress import TrainingProgress
from dihal.training.resume import check_resume, resume_notes
from dihal.training.saving import Saver
from dihal.training.setup import build_trainer, check_run_folder, deterministic, resolve
from dihal.training.signals import StopSignals, exit_code

__all__ = ["train"]

_NORMALISATION_BATCH = 4_096
"""Tokens per pass of the normalisation: fixed, so that it does not depend on the training batch."""


def train(config: TrainConfig, *, backbone: Backbone | None = None) -> Path:
    """Train a method; return the run folder.

    The folder receives ``config.yaml`` and ``config.json`` (resolved), ``metrics.jsonl`` and
    ``metrics.csv``, and ``checkpoints/``. With ``config.dry_run`` the plan is printed instead and
    nothing is written.

    Args:
        config: the run.
        backbone: an already loaded one that ``config.backbone`` describes, for many runs in one process; it is not
            compared with the description. Adapters stay on it; blocks compiled for the run are put back. None: loaded here.

    Raises:
        UsageError: options, data, backbone or file system; before training starts wherever possible.
        TrainingDiverged: loss or gradient was not finite for ``trainer.max_nonfinite`` steps in a row.
        SystemExit: stopped by a signal after saving; 143 for SIGTERM and SIGUSR1, 130 for SIGINT.
    """
    config = resolve(config)
    with deterministic(config.trainer.deterministic):
        return _train(config, backbone)


def _train(config: TrainConfig, backbone: Backbone | None) -> Path:
    """:func:`train` with resolved options."""
    plan = plan_steps(
        config.budget,
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size,
        accumulate=config.trainer.accumulate,
        world_size=int(config.trainer.devices) * config.trainer.nodes,
    )
    if config.dry_run:
        device = "cuda" if config.trainer.accelerator == "gpu" else "cpu"
        if backbone is None:
            backbone = _load(config, device)
        method = _build(config, backbone)
        print_plan(config, plan, backbone, method, flops_per_token(config, backbone, method))
        return Path(config.out)
    check_run_folder(config)
    folder = ensure_dir(config.out)
    signals = StopSignals()
    # The trainer comes first: it knows this process's rank and device.
    trainer = build_trainer(config, [])
    first = trainer.is_global_zero
    checkpoint = load_checkpoint(folder) if config.resume else None
    if backbone is None:
        backbone = _load(config, str(trainer.strategy.root_device))
    _check_length(config, backbone)
    data = TextDataModule(
        config.data,
        tokenizer=backbone.tokenizer,
        tokenizer_fingerprint=backbone.tokenizer_fingerprint,
        start_token_id=backbone.start_token_id,
        end_token_id=backbone.end_token_id,
        progress=first and config.log.progress,
    )
    data.setup()
    if config.data.own > 0:
        shown = first and config.log.progress
        data.stream.own_spans = own_text(backbone, config.data, write=trainer.local_rank == 0, progress=shown)
    manifest = _manifest(backbone, data, config.method)
    progress = TrainingProgress(first and config.log.progress, plan.steps)
    spent = Spent()
    if checkpoint is not None:
        check_resume(config, plan, checkpoint, manifest)
        spent = Spent.from_state(checkpoint.state, str(checkpoint.path))
        for note in resume_notes(config, checkpoint) if first else ():
            progress.note(note)
        if plan.is_spent(spent):
            if first:
                progress.note(
                    f"the budget of {str(folder)!r} is spent; raise budget.tokens (or .seconds, .flops) to go on."
                )
            return folder
    data.samples_seen = spent.samples_seen

    method = _build(config, backbone)
    if checkpoint is None:
        method.fit_normalisation(backbone, _normalisation_batches(data, config.method.normalisation_tokens))
    else:
        method.load_state_dict(checkpoint.tensors("model"))
    method.fit_metric(backbone, _normalisation_batches(data, config.method.objective.metric_tokens), seed=config.seed)
    spent.add_flops(
        preparation(
            config.method,
            backbone,
            length=config.data.sequence_length,
            normalisation=_windows(data, config.method.normalisation_tokens) if checkpoint is None else 0,
            metric=_windows(data, config.method.objective.metric_tokens),
            processes=trainer.world_size,
        )
    )
    if config.data.own > 0 and checkpoint is None:
        spent.add_flops({"preparation": own_text_flops(backbone, config.data)})
    step = sum(flops_per_token(config, backbone, method).values()) * plan.tokens_per_step
    require_affordable(plan, spent, step)
    module = BridgeModule(
        config,
        backbone=backbone,
        method=method,
        plan=plan,
        spent=spent,
        signals=signals,
        optimizer_state=None if checkpoint is None else checkpoint.tensors("optimizer"),
    )
    if checkpoint is not None and module.ema is not None and "ema" in checkpoint.names:
        module.ema.load_state_dict(checkpoint.tensors("ema"), updates=checkpoint.state["ema_updates"])
    if config.trainer.compile:
        method.compile_parts()

    if first:
        _write_config(folder, config)
    callback = RunCallback(
        saver=Saver(folder, manifest=manifest, keep=config.trainer.keep),
        record=Record(folder / "metrics.jsonl", resumed_step=spent.step) if first else None,
        mirrors=build_mirrors(config.log, folder, to_dict(config), step=spent.step) if first else [],
        progress=progress,
        quantities={**parameters(backbone, method), "hardware": manifest["provenance"]["hardware"]},
    )
    trainer.callbacks.append(callback)
    try:
        with (
            warnings.catch_warnings(),
            marked_as_parent(trainer),
            ending_with_parent(),
            _compiled(backbone.blocks if config.trainer.compile else ()),
        ):
            # Lightning against newer torch; nothing a user can act on
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            # A converted backbone trains without dropout, in evaluation mode
            warnings.filterwarnings("ignore", message="Found .* module.s. in eval mode")
            trainer.fit(module, datamodule=data)
    except torch.OutOfMemoryError as error:
        raise UsageError(_too_large(config, backbone, method)) from error
    except RunEnded:
        if is_child():
            raise SystemExit(0) from None  # the first process tells
        raise
    except SystemExit:
        if signals.received:  # the second interrupt, which Lightning turns into status 1
            raise SystemExit(exit_code(signals.received)) from None
        raise
    finally:
        signals.restore()
        callback.close()
        if first:
            with suppress(UsageError):  # the table can be made again from the record
                write_csv(folder / "metrics.jsonl", folder / "metrics.csv")
    if callback.signal:
        raise SystemExit(0 if is_child() else exit_code(callback.signal))
    return folder


@contextmanager
def _compiled(blocks: Iterable[torch.nn.Module]) -> Iterator[None]:
    # In place, and the backbone may be the caller's: left compiled, its next use would compile each of its shapes.
    before = [(block, block.__dict__.get("_compiled_call_impl")) for block in blocks]
    for block, _ in before:
        block.compile()
    try:
        yield
    finally:
        for block, was in before:
            block.__dict__["_compiled_call_impl"] = was


def _load(config: TrainConfig, device: str) -> Backbone:
    """The backbone, or as much of it as training reads."""
    blocks = config.method.split if config.trainer.partial_backbone else None
    return backbone_from_config(replace(config.backbone, device=device), blocks=blocks)


def _build(config: TrainConfig, backbone: Backbone) -> AnyMethod:
    """The method with weights drawn from the run's seed, on the backbone's device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        method = build_method(config.method, backbone)
        method.attach(backbone)
    return method.to(backbone.device)


def _too_large(config: TrainConfig, backbone: Backbone, method: AnyMethod) -> str:
    """What to tell somebody whose GPU is too small."""
    peak, limit = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(backbone.device).total_memory
    return out_of_memory(config, backbone, method, peak=peak, limit=limit)


def _check_length(config: TrainConfig, backbone: Backbone) -> None:
    longest = backbone.max_positions
    if longest is not None and config.data.sequence_length > longest:
        raise UsageError(
            f"data.sequence_length is {config.data.sequence_length}; this backbone has {longest} positions. Lower it."
        )


def _windows(data: TextDataModule, tokens: int) -> int:
    """Windows of at least ``tokens`` tokens, or of one epoch."""
    return min(max(1, -(-tokens // data.config.sequence_length)), data.stream.windows)


def _normalisation_batches(data: TextDataModule, tokens: int) -> Iterator[Batch]:
    """The first training windows, at least ``tokens`` tokens of them or one epoch."""
    length = data.config.sequence_length
    wanted = _windows(data, tokens)
    size = max(1, _NORMALISATION_BATCH // length)
    for start in range(0, wanted, size):
        yield data.stream.batch(np.arange(start, min(start + size, wanted), dtype=np.int64))


def _manifest(backbone: Backbone, data: TextDataModule, method: MethodConfig) -> dict[str, Any]:
    """Origin of the numbers.

    A hybrid needs the weights from the split on (``reads_from``), training and writing text all of them. Those that were
    not loaded have no fingerprint.
    """
    split = int(method.split or 0)
    reads_from = split if method.regime == "replace" else 0
    whole = backbone.held is None
    return {
        "backbone": asdict(backbone.reference),
        "split": split,
        "reads_from": reads_from,
        "backbone_fingerprint": backbone.fingerprint(reads_from) if whole else None,
        "backbone_full_fingerprint": backbone.fingerprint() if whole else None,
        "backbone_lower_fingerprint": lower_fingerprint(backbone, split),
        "tokenizer_fingerprint": backbone.tokenizer_fingerprint,
        "data_fingerprint": data.fingerprint(),
        "data_statistics": data.statistics(),
        "provenance": provenance(),
    }


def _write_config(folder: Path, config: TrainConfig) -> None:
    plain = to_dict(config)
    write_text(folder / "config.yaml", dump(config))
    write_json(folder / "config.json", {"hash": config_hash(config), "config": plain})
