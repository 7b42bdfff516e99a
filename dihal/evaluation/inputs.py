"""Backbone, text and scorer of an evaluation, checked against the checkpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dihal.config import BackboneConfig, DataConfig
from dihal.errors import UsageError
from dihal.evaluation.checkpoints import require_tokenizer
from dihal.restore import require_checkpoint_backbone

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.checkpoint import Checkpoint
    from dihal.data.module import TextDataModule

__all__ = ["open_backbone", "open_data", "open_scorer", "open_text"]


def open_backbone(
    chosen: BackboneConfig | None, checkpoints: list[Checkpoint], *, device: str | None = None
) -> Backbone:
    """Load the backbone (None: as the first checkpoint says) and check that it is every checkpoint's.

    Args:
        chosen: which, and how to hold it.
        checkpoints: opened checkpoints.
        device: of this process, where several share the work; None: there is one process.

    Raises:
        UsageError: weights or tokenizer that a checkpoint was not trained with; one GPU named for several processes.
    """
    from dihal.backbone import backbone_from_config
    from dihal.geometry.ranks import on_own_device

    if chosen is None:
        chosen = checkpoints[0].config.backbone if checkpoints else BackboneConfig()
        if device is not None and chosen.device != "cpu":
            chosen = replace(chosen, device="auto")  # the GPU that it was trained on is nobody's choice here
    backbone = backbone_from_config(on_own_device(chosen, device))
    for checkpoint in checkpoints:
        require_checkpoint_backbone(checkpoint, backbone)
        require_tokenizer(checkpoint, backbone)
    return backbone


def open_text(data: DataConfig, backbone: Backbone, *, progress: bool = True) -> TextDataModule:
    """Text as the backbone reads it; ``progress`` shows a bar while it is tokenised."""
    from dihal.data.module import TextDataModule

    return TextDataModule(
        data,
        tokenizer=backbone.tokenizer,
        tokenizer_fingerprint=backbone.tokenizer_fingerprint,
        start_token_id=backbone.start_token_id,
        end_token_id=backbone.end_token_id,
        progress=progress,
    )


def open_data(
    chosen: DataConfig | None, checkpoints: list[Checkpoint], backbone: Backbone
) -> tuple[TextDataModule, TextDataModule]:
    """Return the text of the prompts (None: the first checkpoint's), and the text the checkpoints were trained on.

    The second is the first without checkpoints; its training documents are what n-grams and memorisation mean.

    Raises:
        UsageError: the text changed since a checkpoint was trained, checkpoints were trained on unlike text, or
            held-out documents were trained on.
    """
    if chosen is None:
        chosen = checkpoints[0].config.data if checkpoints else DataConfig()
    data = open_text(chosen, backbone)
    trained = data
    for checkpoint in checkpoints:
        wanted, first = (item.manifest["data_fingerprint"]["train"] for item in (checkpoint, checkpoints[0]))
        if wanted != first:
            raise UsageError(
                f"the checkpoints differ in data_fingerprint.train: {first[:16]} ({checkpoints[0].path}) and "
                f"{wanted[:16]} ({checkpoint.path}). Evaluate them in separate calls; they share no table."
            )
    if checkpoints:
        wanted = checkpoints[0].manifest["data_fingerprint"]
        trained = data if data.fingerprint() == wanted else open_text(checkpoints[0].config.data, backbone)
        found = trained.fingerprint()
        changed = [name for name in ("validation", "train") if found[name] != wanted[name]]
        if changed:
            raise UsageError(
                f"the text changed since {str(checkpoints[0].path)!r} was trained: data_fingerprint.{changed[0]} is "
                f"{found[changed[0]][:16]}, the checkpoint says {wanted[changed[0]][:16]}. Restore the text."
            )
    if trained is not data:
        seen = {document.key for document in trained.train_documents}
        shared = sum(document.key in seen for document in data.validation_documents)
        if shared:
            raise UsageError(
                f"{shared} of {len(data.validation_documents)} held-out documents of `data` were training documents of "
                f"{str(checkpoints[0].path)!r}. Hold out other documents, or leave `data` out."
            )
    return data, trained


def open_scorer(chosen: str | None, backbone: Backbone) -> Backbone:
    """Load the scorer on the backbone's device; None: the backbone itself."""
    if chosen is None:
        return backbone
    from dihal.backbone import load_backbone

    return load_backbone(chosen, dtype="float32", device=str(backbone.device))
