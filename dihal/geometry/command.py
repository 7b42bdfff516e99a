"""`dihal score`: from a configuration to scores.json, by one process or by those that torchrun started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dihal.backbone import backbone_from_config
from dihal.config import ScoreRunConfig
from dihal.data import read_documents, split_documents
from dihal.errors import UsageError
from dihal.geometry.ranks import joined
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
        backbone_config = config.backbone
        if device is not None:
            if backbone_config.device.startswith("cuda:"):
                raise UsageError(
                    f"backbone.device={backbone_config.device} names one GPU, but there are {ranks.size} processes. "
                    "Set backbone.device=auto: each process takes its own GPU."
                )
            chosen = device if backbone_config.device in ("auto", "cuda") else backbone_config.device
            backbone_config = replace(backbone_config, device=chosen)
        train, _ = split_documents(read_documents(config.data), config.data)
        backbone = backbone_from_config(backbone_config)
        texts = [document.text for document in train]
        report = score_layers(backbone, texts, config.score, progress=ranks.rank == 0, ranks=ranks)
        return (report, report.save(config.out)) if ranks.rank == 0 else None
