"""Likelihood of held-out text under a masked diffusion LM: a bound, in nats per token, with intervals.

``python -m dihal.evaluation.masked --checkpoint runs/masked`` writes one JSON. Both numbers in it are about the same
tokens, those of each window after its first: the bound of the masked diffusion LM, and the backbone's own negative
log-likelihood (exact). A bound is no likelihood: rank it with bounds of masked diffusion LMs only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from dihal.config.convert import to_dict
from dihal.config.masked import BoundConfig
from dihal.errors import UsageError
from dihal.evaluation.bootstrap import Interval, difference, document_weights, estimate
from dihal.evaluation.checkpoints import load_trained, open_checkpoints
from dihal.evaluation.definitions import Metric
from dihal.evaluation.inputs import open_backbone, open_data
from dihal.io import output_dir, write_json
from dihal.masked import MaskedLM
from dihal.masked.bound import Bound, nll_bound
from dihal.provenance import provenance

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.data import Batch
    from dihal.data.packing import EvaluationWindows

__all__ = ["SCHEMA", "main", "measure_bound"]

SCHEMA = "dihal.masked-nll/1"
"""Written into every result."""


def _per_token(of: str) -> Metric:
    return Metric(label=of, unit="nats", lower_is_better=True, definition="", numerator=of, denominator="tokens")


def measure_bound(config: BoundConfig, *, console: Console | None = None) -> Path:
    """Measure a checkpoint and write the result file.

    Raises:
        UsageError: a checkpoint of another regime, a backbone or text that is not its own, options out of range, or a
            file that cannot be written.
    """
    for name in ("tokens", "draws", "batch_size", "bootstrap"):
        if getattr(config, name) < 1:
            raise UsageError(f"{name} must be at least 1, got {getattr(config, name)}.")
    if not 0 < config.confidence < 1:
        raise UsageError(f"confidence must lie between 0 and 1, got {config.confidence}.")
    if not config.checkpoint:
        raise UsageError("no checkpoint is named: give --checkpoint FOLDER.")
    checkpoints = open_checkpoints((config.checkpoint,))
    regime = checkpoints[0].config.method.regime
    if regime != "mask":
        raise UsageError(
            f"{config.checkpoint!r} was trained under the regime {regime!r}; only 'mask' has this bound. For the others "
            "use `dihal evaluate` (replace) or `dihal frontier` (generate)."
        )
    target = Path(config.out)
    with output_dir(target.parent):
        backbone = open_backbone(config.backbone, checkpoints)
        data, _ = open_data(config.data, checkpoints, backbone)
        (trained,) = load_trained(checkpoints, backbone, weights=config.weights)
        windows = data.evaluation_windows(
            tokens=config.tokens, windows_per_document=config.windows_per_document, seed=config.seed
        )
        assert isinstance(trained.method, MaskedLM)
        sums, error = _sums(config, trained.method, backbone, windows, console or Console(stderr=True))
        weights = document_weights(len(windows.documents), config.bootstrap, config.seed)

        def interval(name: str) -> Interval:
            return estimate(_per_token(name), sums, weights, config.confidence)

        paired = difference(_per_token("bound"), sums, {**sums, "bound": sums["backbone"]}, weights, config.confidence)
        write_json(
            target,
            {
                "schema": SCHEMA,
                "name": trained.name,
                "unit": "nats per token",
                "bound": asdict(interval("bound")),
                "monte_carlo_error": error,
                "backbone_nll": asdict(interval("backbone")),
                "bound_minus_backbone": asdict(paired),
                "tokens": int(sums["tokens"].sum()),
                "documents": len(windows.documents),
                "windows": len(windows),
                "draws": config.draws,
                "confidence": config.confidence,
                "data_fingerprint": data.fingerprint()["validation"],
                "checkpoint": trained.identity(),
                "backbone": asdict(backbone.reference),
                "config": to_dict(config),
                "provenance": provenance(),
            },
        )
    return target


def _sums(
    config: BoundConfig, method: MaskedLM, backbone: Backbone, windows: EvaluationWindows, console: Console
) -> tuple[dict[str, Float[np.ndarray, " documents"]], float]:
    """Per document: nats of bound and backbone, tokens; and the Monte Carlo error of the bound per token."""
    names = ("bound", "backbone", "tokens")
    sums = {name: np.zeros(len(windows.documents)) for name in names}
    variance = 0.0
    # Documents come by their windows, in order.
    rows = {int(i): n for n, i in enumerate(dict.fromkeys(windows.document_ids[:, 0].tolist()))}
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("windows", total=len(windows))
        for batch in windows.batches(config.batch_size):
            moved = batch.to(backbone.device)
            found = nll_bound(method, backbone, moved, draws=config.draws, seed=config.seed)
            own = _exact(backbone, moved, method)
            places = [rows[int(i)] for i in batch.document_ids[:, 0]]
            for name, values in zip(names, (found.nats, own, found.counted), strict=True):
                np.add.at(sums[name], places, values.double().cpu().numpy())
            variance += float(_variance(found))
            bar.advance(task, len(batch))
    return sums, variance**0.5 / float(sums["tokens"].sum())


def _variance(found: Bound) -> Tensor:
    return found.error.square().sum()


@torch.no_grad()
def _exact(backbone: Backbone, batch: Batch, method: MaskedLM) -> Float[Tensor, " windows"]:
    """The backbone's negative log-likelihood of the tokens that the bound counts."""
    ids, mask = batch.input_ids, batch.attention_mask
    logits = backbone.forward(ids, attention_mask=None if batch.full else mask)[:, :-1].float()
    nats = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (nats * (mask[:, 1:] & (ids[:, 1:] != method.mask_token_id))).double().sum(-1)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as the command line says; return the exit status."""
    from dihal.config.cli import parse
    from dihal.io import read_json

    console = Console(highlight=False)
    try:
        path = measure_bound(parse(BoundConfig, sys.argv[1:] if argv is None else argv, prog="dihal.evaluation.masked"))
    except UsageError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {error}", markup=False)
        return 2
    result: dict[str, Any] = read_json(path)
    for name in ("bound", "backbone_nll", "bound_minus_backbone"):
        value = result[name]
        console.print(
            f"{name:22} {value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}] nats per token", markup=False
        )
    console.print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
