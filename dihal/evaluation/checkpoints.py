"""Trained methods to evaluate, and what they must share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dihal.checkpoint import Checkpoint, load_checkpoint
from dihal.config import TrainConfig
from dihal.errors import UsageError
from dihal.evaluation.result import BudgetTerms, TextTerms
from dihal.io import hash_json, sha256_file
from dihal.methods import AnyMethod
from dihal.restore import restore_method

if TYPE_CHECKING:
    from dihal.backbone import Backbone

__all__ = ["Trained", "load_trained", "open_checkpoints", "require_tokenizer"]

_BACKBONE = ("family", "num_blocks", "hidden_size", "vocab_size", "config_hash")
"""Fields of the backbone's reference that checkpoints of one table share; its weights are checked when it is loaded."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A checkpoint with its method, ready to run on the backbone's device."""

    name: str
    """Name of the row: the run folder's, made longer where two would be equal."""
    checkpoint: Checkpoint
    config: TrainConfig
    method: AnyMethod
    weights: str
    """`ema` or `raw`, as loaded."""

    @property
    def budget(self) -> str:
        """Hash of what the budget allowed."""
        return hash_json(asdict(self.budget_terms))

    @property
    def budget_terms(self) -> BudgetTerms:
        """What the budget allowed; trials are shown, not compared."""
        budget = self.config.budget
        return BudgetTerms(
            name=budget.name,
            tokens=budget.tokens,
            seconds=budget.seconds,
            flops=budget.flops,
            hardware=None if budget.seconds is None else self.hardware,
        )

    @property
    def text_terms(self) -> TextTerms:
        """What was trained on, in which order."""
        data = self.config.data
        return TextTerms(
            data_fingerprint=self.checkpoint.manifest["data_fingerprint"]["train"],
            sequence_length=data.sequence_length,
            seed=data.seed,
            splice=data.splice,
            splice_length=data.splice_length,
        )

    @property
    def hardware(self) -> str | None:
        """What it was trained on, in words; None where the checkpoint does not say."""
        found = (self.checkpoint.manifest.get("provenance") or {}).get("hardware")
        if found is None:
            return None
        trainer = self.config.trainer
        if trainer.accelerator == "gpu" and found["gpus"]:
            return f"{int(trainer.devices) * trainer.nodes} x {found['gpus'][0]}"
        return f"{found['cpus']} CPU cores ({found['machine']}), {found['threads']} threads"

    def identity(self) -> dict[str, Any]:
        """What the result file says about the checkpoint."""
        state = self.checkpoint.state
        return {
            "path": str(self.checkpoint.path),
            "sha256": sha256_file(self.checkpoint.path / "manifest.json"),
            "weights": self.weights,
            **{name: state[name] for name in ("step", "tokens", "samples_seen", "seconds") if name in state},
        }


def open_checkpoints(paths: tuple[str, ...]) -> list[Checkpoint]:
    """Open and verify the checkpoints, and refuse those that cannot share a table.

    Raises:
        UsageError: a path that holds none, one named twice, or two whose backbone, tokenizer or validation text
            differ, naming the field, both values and both checkpoints.
    """
    found = [load_checkpoint(path) for path in paths]
    if len({item.path.resolve() for item in found}) < len(found):
        raise UsageError(f"a checkpoint is named twice: {', '.join(paths)}. Name each once.")
    for other in found[1:]:
        first = found[0]
        references = (first.manifest["backbone"], other.manifest["backbone"])
        pairs = [(f"backbone.{field}", *(reference[field] for reference in references)) for field in _BACKBONE]
        name = "tokenizer_fingerprint"
        pairs.append((name, first.manifest[name], other.manifest[name]))
        fingerprints = [item.manifest["data_fingerprint"] for item in (first, other)]
        pairs.append(("data_fingerprint.validation", *(value["validation"] for value in fingerprints)))
        pairs.append(("data.sequence_length", *(item.config.data.sequence_length for item in (first, other))))
        for field, left, right in pairs:
            if left != right:
                raise UsageError(
                    f"the checkpoints differ in {field}: {left!r} ({first.path}) and {right!r} ({other.path}). "
                    "Evaluate them in separate calls; they cannot be ranked together."
                )
    return found


def require_tokenizer(checkpoint: Checkpoint, backbone: Backbone) -> None:
    """Refuse a tokenizer that is not the one a checkpoint was trained with.

    Raises:
        UsageError: naming the field and both values.
    """
    wanted, given = checkpoint.manifest["tokenizer_fingerprint"], backbone.tokenizer_fingerprint
    if wanted != given:
        raise UsageError(
            f"checkpoint {str(checkpoint.path)!r} was trained with tokenizer_fingerprint {wanted!r}, the backbone "
            f"{backbone.reference.id!r} has {given!r}. Evaluate with the tokenizer it was trained with."
        )


def load_trained(checkpoints: list[Checkpoint], backbone: Backbone, *, weights: str) -> list[Trained]:
    """Build each checkpoint's method and load its weights.

    Args:
        checkpoints: opened checkpoints.
        backbone: the backbone, already checked.
        weights: ``ema`` (the last weights where there is no average) or ``raw``.
    """
    names = _names([item.path for item in checkpoints])
    loaded = []
    for name, checkpoint in zip(names, checkpoints, strict=True):
        method, held = restore_method(checkpoint, backbone, weights=weights)
        loaded.append(
            Trained(
                name=name,
                checkpoint=checkpoint,
                config=checkpoint.config,
                method=method,
                weights=held,
            )
        )
    return loaded


def _names(paths: list[Path]) -> list[str]:
    # <run>/checkpoints/step-N: the run's name, then as much more as tells them apart.
    runs = [path.resolve().parent.parent for path in paths]
    candidates = (
        [run.name for run in runs],
        [f"{run.parent.name}/{run.name}" for run in runs],
        [f"{run.name}:{path.name}" for run, path in zip(runs, paths, strict=True)],
        [f"{run.parent.name}/{run.name}:{path.name}" for run, path in zip(runs, paths, strict=True)],
    )
    for names in candidates:
        if len(set(names)) == len(names):
            return names
    return [str(path.resolve()) for path in paths]
