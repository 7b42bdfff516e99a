"""The likelihood bound of a writer on the real continuations, and how well it denoises their states.

Numbers about given text, beside those about its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from dihal.backbone import Backbone
from dihal.evaluation.bootstrap import estimate
from dihal.evaluation.frontier.definitions import BOUND, STATES
from dihal.evaluation.frontier.prompts import Chosen
from dihal.spaces.hidden_state import VectorSpace
from dihal.writer import Writer
from dihal.writing.bound import nll_bound, state_errors

__all__ = ["has_bound", "likelihood_bound"]

_TIMES = [(step + 0.5) / 16 for step in range(16)]


def has_bound(method: Any) -> bool:
    """Whether the bound is defined: a writer whose states are vectors."""
    return isinstance(method, Writer) and isinstance(method.space, VectorSpace)


def likelihood_bound(
    writer: Writer,
    backbone: Backbone,
    chosen: Chosen,
    *,
    cuts: int,
    precision: str,
    batch_size: int,
    seed: int,
    weights: Float[np.ndarray, "resamples documents"],
    confidence: float,
) -> dict[str, Any]:
    """Measure it on every prompt's real continuation.

    Cut and reading are chosen on the documents of even number for those of odd number, and the other way round, so that
    the choice is not made on the text that it is measured on. One document alone is both.

    Args:
        writer, backbone: with :func:`has_bound`.
        chosen: prompts, real continuations and their documents.
        cuts: noise levels tried.
        precision: of the denoiser.
        batch_size: texts at once.
        seed: of the noise.
        weights: of the document resamples. confidence: of the intervals.

    Returns:
        JSON: ``value, low, high`` (nats per token) with the reading left open; the same, its terms and the log-SNR of
        its cut for each reading; the curves over cuts; ``states``: explained variance of denoised states
        (`definitions.STATES`) and, over times, their cosine; what it was measured with.
    """
    prompts = chosen.prompts
    ids = torch.cat([prompts.prompts, prompts.real], 1)
    known = (torch.arange(ids.shape[1]) < prompts.prompts.shape[1]).expand_as(ids)
    batches = torch.arange(len(ids)).split(batch_size)
    how = {"seed": seed, "precision": precision}
    parts = [nll_bound(writer, backbone, ids[rows], known[rows], cuts=cuts, sample_ids=rows, **how) for rows in batches]
    states = [
        state_errors(writer, backbone, ids[rows], known[rows], times=_TIMES, sample_ids=rows, **how) for rows in batches
    ]
    owners, count = np.array(chosen.documents), len(chosen.keys)

    def per_document(values: list[torch.Tensor]) -> np.ndarray:
        stacked = torch.cat(values).double().cpu().numpy()
        return np.stack([np.bincount(owners, column, count) for column in np.atleast_2d(stacked.T)], 1)

    levels = parts[0].log_snr.tolist()
    tokens = per_document([part.tokens for part in parts])[:, 0]
    terms = {name: per_document([part.reading[name] for part in parts]) for name in parts[0].reading}
    path = per_document([part.path for part in parts])
    prior = per_document([part.prior for part in parts])
    totals = {name: reading + path + prior for name, reading in terms.items()}
    fold = np.arange(count) % 2 if count > 1 else np.zeros(1, dtype=int)

    def best(names: list[str], half: int) -> tuple[str, int]:
        judged = fold != half if count > 1 else fold == half
        means = {name: totals[name][judged].sum(0) for name in names}
        name = min(names, key=lambda item: means[item].min())
        return name, int(means[name].argmin())

    def measured(names: list[str]) -> dict[str, Any]:
        picks = [best(names, half) for half in sorted(set(fold.tolist()))]
        rows = range(count)
        place = [picks[half if len(picks) > 1 else 0] for half in fold]
        nats = np.array([totals[name][row, cut] for row, (name, cut) in zip(rows, place, strict=True)])
        found = estimate(BOUND, {"nats": nats, "tokens": tokens}, weights, confidence)
        shares = {
            "reading": sum(terms[name][row, cut] for row, (name, cut) in zip(rows, place, strict=True)),
            "path": sum(path[row, cut] for row, (_, cut) in zip(rows, place, strict=True)),
            "prior": prior.sum(),
        }
        return {
            "value": found.value,
            "low": found.low,
            "high": found.high,
            "chosen": [{"reading": name, "log_snr": levels[cut]} for name, cut in picks],
            "terms": {name: float(value / tokens.sum()) for name, value in shares.items()},
        }

    whole = tokens.sum()
    error = per_document([part.squared_error for part in states])
    variance = per_document([part.variance for part in states])[:, 0]
    explained = estimate(
        STATES, {"state_squared_error": error.mean(1), "state_variance": variance}, weights, confidence
    )
    cosine = per_document([part.cosine for part in states]).sum(0) / whole
    times = torch.tensor(_TIMES, dtype=torch.float64, device=backbone.device)
    return {
        **measured(list(terms)),
        "readings": {name: measured([name]) for name in terms},
        "curves": {
            "log_snr": levels,
            "path": (path.sum(0) / whole).tolist(),
            **{name: (values.sum(0) / whole).tolist() for name, values in terms.items()},
        },
        "states": {
            "value": explained.value,
            "low": explained.low,
            "high": explained.high,
            "times": _TIMES,
            "log_snr": writer.process.schedule.log_snr(times).tolist(),
            "explained_variance": (1 - error.sum(0) / variance.sum()).tolist(),
            "cosine": cosine.tolist(),
            "definition": STATES.definition,
        },
        "cuts": cuts,
        "precision": precision,
        "seed": seed,
        "tokens": int(whole),
        "definition": BOUND.definition,
    }
