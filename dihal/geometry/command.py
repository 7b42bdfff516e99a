"""`dihal score`: from a configuration to scores.json, by one process or by those that torchrun started."""

from __future__ import annotations

from pathlib import Path

from dihal.backbone import backbone_from_config
from dihal.config import ScoreRunConfig
from dihal.data import read_documents, split_documents
from dihal.geometry.ranks import joined, on_own_device
from dihal.geometry.report import ScoreReport
from dihal.geometry.score import score_layers
from dihal.io import output_dir

__all__ = ["run_score"]


def run_score(config: ScoreRunConfig) -> tuple[ScoreReport, Path] | None:
    """Score a backbone on the training documents and write the report.

    Returns:
        The report and its folder on the first process; None on the others.

    Raises:
        UsageError: options, text, backbone or file system.
    """
    with joined() as (ranks, device), output_dir(config.out):
        backbone_config = on_own_device(config.backbone, device)
        train, _ = split_documents(read_documents(config.data), config.data)
        backbone = backbone_from_config(backbone_config)
        texts = [document.text for document in train]
        report = score_layers(backbone, texts, config.score, progress=ranks.rank == 0, ranks=ranks)
        return (report, report.save(config.out)) if ranks.rank == 0 else None
