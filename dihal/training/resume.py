"""Whether a run may go on from a checkpoint."""

from __future__ import annotations

from typing import Any

from dihal.checkpoint import Checkpoint
from dihal.config import TrainConfig
from dihal.config.convert import flatten, named_in, to_dict
from dihal.errors import UsageError
from dihal.training.budget import Plan

__all__ = ["check_resume", "resume_notes"]

# Another value would make the saved weights, or the order of samples and noise, mean something else.
_FIXED = ("method.", "seed", "data.seed", "data.sequence_length", "backbone.dtype", "trainer.precision")
# Changing these changes nothing about the result, or is checked by fingerprint.
_FREE = ("out", "resume", "dry_run", "log.", "data.", "backbone.", "trainer.")

# Those among them that do change the result.
_NOTED = ("trainer.skip_spike",)

_IDENTITIES = ("backbone_full_fingerprint", "backbone_lower_fingerprint", "tokenizer_fingerprint", "data_fingerprint")


def _changes(config: TrainConfig, checkpoint: Checkpoint) -> dict[str, tuple[Any, Any]]:
    before, now = dict(flatten(to_dict(checkpoint.config))), dict(flatten(to_dict(config)))
    return {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value}


def check_resume(config: TrainConfig, plan: Plan, checkpoint: Checkpoint, manifest: dict[str, Any]) -> None:
    """Refuse to go on where the rest of the run would not be the same run.

    Raises:
        UsageError: naming every option that differs, or the text or backbone that does.
    """
    differing = [
        f"{name} was {before!r}, is {now!r}"
        for name, (before, now) in _changes(config, checkpoint).items()
        if named_in(name, _FIXED)
    ]
    before = checkpoint.state["global_batch"]
    if before != plan.sequences_per_step:
        differing.append(f"sequences per optimiser step were {before}, are {plan.sequences_per_step}")
    if differing:
        raise UsageError(
            f"cannot go on from {str(checkpoint.path)!r}: {'; '.join(differing)}. "
            "Resume with the options of the run (config.yaml in its folder), or train into another folder."
        )
    for name in _IDENTITIES:
        before, now = checkpoint.manifest.get(name), manifest[name]
        # Where only part of the backbone was or is loaded, that part is compared.
        if None not in (before, now) and before != now:
            raise UsageError(
                f"cannot go on from {str(checkpoint.path)!r}: {name} was {before!r}, is {now!r}. Resume with the backbone and the text of the run."
            )


def resume_notes(config: TrainConfig, checkpoint: Checkpoint) -> list[str]:
    """What a person should know about how the rest of the run differs from its beginning."""
    changed = [
        f"{name} {before!r} -> {now!r}"
        for name, (before, now) in _changes(config, checkpoint).items()
        if named_in(name, _NOTED) or not (named_in(name, _FREE) or named_in(name, _FIXED))
    ]
    notes = [f"going on from {checkpoint.path.name}"]
    if changed:
        notes.append(f"changed since: {', '.join(changed)}")
    return notes
