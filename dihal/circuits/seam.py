"""Comparing a backbone with its hybrid: one graph, one path, one noise, and the null they are held against.

Everything below the seam acts on the upper blocks through h^s only; as one writer it exists in both models.
A bridge's error alone lowers the overlap of circuits, whatever its cause: so the hybrid is compared with a
backbone whose h^s carries noise of the same size per position (`perturbed`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dihal.circuits.adapters import Adapter, open_model
from dihal.circuits.attribute import attribute
from dihal.circuits.types import EdgeScores, PairBatch
from dihal.errors import UsageError
from dihal.random import normal

__all__ = ["attribute_over_seeds", "average", "perturbed", "remembered", "seam_error", "states_at_seam"]


def states_at_seam(
    model: Any,
    input_ids: Int[Tensor, "batch time"],
    seam: int,
    *,
    sample_ids: Int[Tensor, " batch"],
    noise_seed: int = 0,
) -> Float[Tensor, "batch time dim"]:
    """h^seam as the model has it: its own, or its bridge's sample, keyed by (noise seed, sample id)."""
    adapter = open_model(model)
    with adapter.session():
        return adapter.states(
            input_ids.to(adapter.device), seam, sample_ids=sample_ids.to(adapter.device), noise_seed=noise_seed
        )


@torch.no_grad()
def seam_error(
    model: Any, backbone: Any, pairs: Sequence[PairBatch], *, noise_seeds: Sequence[int] = (0,), batch_size: int = 16
) -> Float[Tensor, " time"]:
    """Relative error of a model's state at its seam, per position: root mean square over prompts of |h_model - h| / |h|.

    Both runs of every pair count. Positions up to the longest prompt; later positions average over fewer prompts.

    Args:
        model: a hybrid, entered at its seam.
        backbone: whose own state is the reference.
        noise_seeds: averaged over.
    """
    adapter, own = open_model(model), open_model(backbone)
    longest = max(batch.time for batch in pairs)
    total, count = torch.zeros(longest, dtype=torch.float64), torch.zeros(longest, dtype=torch.float64)
    for whole in pairs:
        for first in range(0, len(whole), batch_size):
            batch = whole.rows(first, first + batch_size)
            for ids in (batch.clean, batch.corrupted):
                truth = states_at_seam(own, ids, adapter.seam, sample_ids=batch.ids).double()
                for seed in noise_seeds:
                    found = states_at_seam(adapter, ids, adapter.seam, sample_ids=batch.ids, noise_seed=seed)
                    ratio = (found.double() - truth).square().sum(-1) / truth.square().sum(-1)
                    total[: batch.time] += ratio.sum(0).cpu()
                    count[: batch.time] += len(batch)
    return (total / count).sqrt()


def perturbed(
    model: Any,
    seam: int,
    relative_error: float | Float[Tensor, " time"],
    *,
    shared: bool = True,
    name: str | None = None,
) -> Adapter:
    """The model with Gaussian noise added to its own h^seam: the noise-matched null.

    At position i the noise has an expected norm of ``relative_error[i]`` times that of the state.

    Args:
        model: a backbone.
        seam: where.
        relative_error: one for all positions, or one per position (the last one counts for all later ones), as
            `seam_error` measures.
        shared: the same noise in the clean and the corrupted run of a pair, as with common random numbers.
        name: for messages and files.

    Raises:
        UsageError: a model that is entered by a bridge already, a negative error, a seam out of range.
    """
    base = open_model(model)
    if base.source is not None:
        raise UsageError(f"{base.name} is entered by its own state at layer {base.seam}; perturb the backbone instead.")
    base.require_seam(seam)
    size = torch.atleast_1d(torch.as_tensor(relative_error, dtype=torch.float64))
    if not bool((size >= 0).all()):
        raise UsageError("the relative error at the seam must be 0 or more at every position.")

    def source(input_ids: Tensor, sample_ids: Tensor, noise_seed: int, role: Literal["clean", "corrupted"]) -> Tensor:
        state = base.states(input_ids, seam, sample_ids=sample_ids)
        purpose = "seam perturbation" if shared else f"seam perturbation {role}"
        dtype = base.work_dtype
        noise = normal(noise_seed, sample_ids, purpose, tuple(state.shape[1:]), dtype=dtype, device=state.device)
        places = torch.arange(state.shape[1]).clamp_max(len(size) - 1)
        scale = size[places].to(state.device, dtype)[:, None] / state.shape[-1] ** 0.5
        return (state.to(dtype) + noise * scale * state.to(dtype).norm(dim=-1, keepdim=True)).to(state.dtype)

    return Adapter(
        base.model,
        base.layout,
        name=name or f"{base.name} perturbed at {seam}",
        seam=seam,
        lower="perturbed",
        source=source,
    )


def remembered(adapter: Adapter, most: int = 1 << 30) -> Adapter:
    """The same model, which keeps the states it has drawn: scores, curves and transfer start from the same ones.

    Args:
        adapter: entered by a source.
        most: bytes of states that are kept; what was drawn first goes first.
    """
    draw = adapter.source
    assert draw is not None
    kept: dict[tuple[bytes, bytes, torch.Size, int, str], Tensor] = {}

    def source(input_ids: Tensor, sample_ids: Tensor, noise_seed: int, role: Literal["clean", "corrupted"]) -> Tensor:
        words, samples = (value.cpu().numpy().tobytes() for value in (input_ids, sample_ids))
        key = (words, samples, input_ids.shape, noise_seed, role)
        if key not in kept:
            kept[key] = draw(input_ids, sample_ids, noise_seed, role)
            while len(kept) > 1 and sum(state.nbytes for state in kept.values()) > most:
                del kept[next(iter(kept))]
        return kept[key]

    out = copy.copy(adapter)
    out.source = source
    return out


def average(runs: Sequence[EdgeScores]) -> EdgeScores:
    """Mean of runs on the same prompts with different noise seeds.

    Raises:
        UsageError: no runs, or runs on different graphs or numbers of prompts.
    """
    if not runs or len({(run.spec, run.n, run.part_counts) for run in runs}) != 1:
        raise UsageError("runs to average must have the same graph and the same prompts.")

    def mean(name: str) -> Any:
        values = [getattr(run, name) for run in runs]
        return None if values[0] is None else np.mean(values, axis=0).astype(np.asarray(values[0]).dtype)

    numbers = {name: float(mean(name)) for name in ("clean", "corrupted", "accuracy")}
    return replace(
        runs[0],
        scores=mean("scores"),
        squares=mean("squares"),
        parts=mean("parts"),
        **numbers,
        passes={name: sum(run.passes[name] for run in runs) for name in runs[0].passes},
        seconds=sum(run.seconds for run in runs),
        peak_bytes=max((run.peak_bytes for run in runs if run.peak_bytes is not None), default=None),
        residuals={name: max(run.residuals[name] for run in runs) for name in runs[0].residuals},
        details={**runs[0].details, "noise_seed": [run.details.get("noise_seed") for run in runs]},
    )


def attribute_over_seeds(
    model: Any, pairs: Sequence[PairBatch], noise_seeds: Sequence[int] = (0, 1, 2, 3), **options: Any
) -> tuple[EdgeScores, list[EdgeScores]]:
    """`attribute` once per noise seed: the average, and every run, whose disagreement is part of the noise ceiling.

    A model without noise is attributed once.
    """
    adapter = open_model(model)
    seeds = noise_seeds if adapter.source is not None else noise_seeds[:1]
    runs = [attribute(adapter, pairs, noise_seed=seed, **options) for seed in seeds]
    return average(runs), runs
