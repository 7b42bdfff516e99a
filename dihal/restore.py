"""From a checkpoint back to a method, and the check that a backbone is the one it was trained with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dihal.backbone.weights import lower_fingerprint
from dihal.checkpoint import Checkpoint, has_checkpoint, load_checkpoint
from dihal.errors import UsageError
from dihal.methods import AnyMethod, build_method

if TYPE_CHECKING:
    from dihal.backbone import Backbone

__all__ = [
    "is_checkpoint",
    "load_method",
    "require_backbone",
    "require_checkpoint_backbone",
    "restore_backbone",
    "restore_method",
]


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path is a run folder or one of its checkpoints."""
    path = Path(path)
    return has_checkpoint(path) or has_checkpoint(path.parent) or (path / "manifest.json").is_file()


def require_backbone(
    what: str,
    wanted: dict[str, Any],
    fingerprint: str,
    backbone: Backbone,
    split: int,
    *,
    found: str | None = None,
) -> None:
    """Refuse a backbone whose weights from ``split`` on are not the ones a bridge was trained with.

    Args:
        what: name of the bridge, for the message.
        wanted: the :class:`~dihal.backbone.BackboneReference` it was trained with, as a dict.
        fingerprint: ``Backbone.fingerprint(split)`` it was trained with.
        backbone: what is given. It may be held in more bits than in training: cast down, it must be the same.
        split: first block that the bridge's readers run.
        found: fingerprint to compare, if it is not that of the weights from ``split`` on.

    Raises:
        UsageError: naming the field that differs and both values.
    """
    given = dataclasses.asdict(backbone.reference)
    fields = ["family", "num_blocks", "hidden_size", "vocab_size", "config_hash"]
    if wanted.get("id") == given["id"]:
        fields.append("revision")
    for field in fields:
        if wanted.get(field) != given[field]:
            raise UsageError(
                f"{what} needs the backbone {wanted.get('id')!r} with {field} {wanted.get(field)!r}; {given['id']!r} has "
                f"{given[field]!r}. Give the backbone it was trained with."
            )
    found = backbone.fingerprint(split, dtype=wanted["dtype"]) if found is None else found
    if found != fingerprint:
        raise UsageError(
            f"the weights of the backbone {given['id']!r} are not those {what} was trained with: fingerprint "
            f"{found[:16]}, expected {fingerprint[:16]} ({wanted.get('id')!r}, revision {wanted.get('revision')!r}, "
            f"{wanted['dtype']}). Give that backbone, unedited."
        )


def restore_backbone(checkpoint: Checkpoint, *, device: str | None = None) -> Backbone:
    """Load the backbone as a checkpoint's configuration says, and check it."""
    from dihal.backbone import backbone_from_config

    config = checkpoint.config.backbone
    backbone = backbone_from_config(config if device is None else dataclasses.replace(config, device=device))
    require_checkpoint_backbone(checkpoint, backbone)
    return backbone


def require_checkpoint_backbone(checkpoint: Checkpoint, backbone: Backbone) -> None:
    """:func:`require_backbone` with what the checkpoint's manifest says."""
    if "reads_from" not in checkpoint.manifest:
        raise UsageError(
            f"checkpoint {str(checkpoint.path)!r} was written by an earlier version: its manifest lacks reads_from. Train again."
        )
    manifest = checkpoint.manifest
    what, split = f"checkpoint {str(checkpoint.path)!r}", int(manifest["reads_from"])
    if manifest["backbone_fingerprint"] is None:
        # Trained beside part of the backbone: what it vouches for lies below the split.
        found = lower_fingerprint(backbone, split, manifest["backbone"]["dtype"])
        require_backbone(
            what, manifest["backbone"], manifest["backbone_lower_fingerprint"], backbone, split, found=found
        )
    else:
        require_backbone(what, manifest["backbone"], manifest["backbone_fingerprint"], backbone, split)


def restore_method(checkpoint: Checkpoint, backbone: Backbone, *, weights: str = "ema") -> tuple[AnyMethod, str]:
    """Build a checkpoint's method on the backbone's device, frozen; return it and which weights it has.

    Args:
        checkpoint: an opened checkpoint.
        backbone: its backbone, already checked. LoRA adapters, if any, are injected.
        weights: ``ema``, or ``raw`` for the last ones; a checkpoint without an average has only those.

    Raises:
        UsageError: weights that do not fit the configuration.
    """
    config = checkpoint.config.method
    method = build_method(dataclasses.replace(config, split=int(checkpoint.manifest["split"])), backbone)
    method.attach(backbone, trainable=False)
    tensors = checkpoint.tensors("model")
    averaged = weights == "ema" and "ema" in checkpoint.names
    if averaged:
        # The average covers trainable weights; normalisation buffers are those of the model.
        tensors |= checkpoint.tensors("ema")
    try:
        method.load_state_dict(tensors)
    except RuntimeError as error:
        raise UsageError(
            f"the weights in {str(checkpoint.path)!r} do not fit its own configuration: {error}. Train it again."
        ) from error
    return method.to(backbone.device).eval().requires_grad_(False), "ema" if averaged else "raw"


def load_method(
    path: str | Path, *, backbone: Backbone | None = None, device: str | None = None, weights: str = "ema"
) -> tuple[AnyMethod, Backbone]:
    """Open a run or checkpoint folder and restore its method with its backbone.

    Raises:
        UsageError: no valid checkpoint, or a backbone that is not its own.
    """
    checkpoint = load_checkpoint(path)
    if backbone is None:
        backbone = restore_backbone(checkpoint, device=device)
    else:
        require_checkpoint_backbone(checkpoint, backbone)
    method, _ = restore_method(checkpoint, backbone, weights=weights)
    return method, backbone
