"""The truth under `generate`: what a trained method writes, and its likelihood at one entropy for all splits.

Everything here goes through the frontier evaluation (:mod:`dihal.evaluation.frontier`): its prompts, its writer
source, its scorer, its curve.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from dihal.config.sweep import SweepConfig
from dihal.errors import UsageError
from dihal.evaluation.frontier.curve import at_entropy
from dihal.evaluation.frontier.prompts import Chosen, choose_prompts
from dihal.evaluation.frontier.scoring import Grader
from dihal.evaluation.frontier.sources import WriterSource
from dihal.evaluation.frontier.variants import Variant, parse_variant
from dihal.evaluation.inputs import open_scorer
from dihal.evaluation.text import unigram_entropy
from dihal.restore import restore_method

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.checkpoint import Checkpoint
    from dihal.data.module import TextDataModule

__all__ = ["common_entropy", "prompts_of", "text_about", "text_truth", "variant_of", "write_texts"]

_SUMS = ("samples", "entropy", "nll", "scored")
"""Per document: continuations, their summed entropy (backbone's tokens), summed NLL, tokens that the scorer read."""
_INSIDE = 0.1
"""How far inside the common range splits are compared, as a share of the range: at an end itself half of the resamples
of some split would not reach it."""


def variant_of(writing: str) -> Variant:
    """The options of writing that differ from the method's own.

    Raises:
        UsageError: an unknown key or a wrong value; temperature or steps, which have fields of their own.
    """
    if not writing.strip():
        return Variant(label="", options={})
    variant = parse_variant(writing)
    for name in ("temperature", "steps"):
        if name in variant.options:
            raise UsageError(f"text.writing names {name}; it has a field of its own: text.{name.rstrip('s')}s.")
    return variant


def prompts_of(config: SweepConfig, data: TextDataModule) -> Chosen:
    """The held-out beginnings that every split continues.

    Raises:
        UsageError: too little held-out text.
    """
    return choose_prompts(
        data.evaluation_windows(seed=config.seed),
        samples=config.text.samples,
        prompt_tokens=config.text.prompt_tokens,
        new_tokens=config.text.new_tokens,
    )


def write_texts(
    config: SweepConfig, checkpoint: Checkpoint, backbone: Backbone, data: TextDataModule
) -> dict[str, Any]:
    """Write continuations of held-out prompts at every temperature and score them.

    Returns:
        ``documents`` (their keys), ``points`` (temperature and per-document sums, see ``_SUMS``), ``real_entropy`` (of the
        real continuations), ``scorer`` and ``self_graded``.

    Raises:
        UsageError: too little held-out text for the prompts.
    """
    text = config.text
    method, _ = restore_method(checkpoint, backbone, weights=config.weights)
    chosen = prompts_of(config, data)
    grader = Grader(open_scorer(text.scorer, backbone), backbone, batch_size=text.batch_size)
    source = WriterSource(
        backbone=backbone, writer=method, variant=variant_of(text.writing), batch_size=text.batch_size
    )
    owners, count = np.array(chosen.documents), len(chosen.keys)
    points = []
    for temperature in sorted(set(text.temperatures)):
        made = source.write(
            chosen.prompts, new_tokens=text.new_tokens, steps=text.steps, temperature=temperature, seed=text.seed
        )
        graded = grader.grade(chosen.prompts.prompts, made.tokens)
        entropy = [unigram_entropy(ids) for ids in made.tokens.tolist()]
        values = dict(zip(_SUMS, (np.ones(len(owners)), entropy, graded.nll, graded.scored), strict=True))
        sums = {name: np.bincount(owners, np.asarray(value, float), count).tolist() for name, value in values.items()}
        points.append({"temperature": temperature, "sums": sums, "nfe": made.nfe, "seconds": made.seconds})
    return {
        "documents": chosen.keys,
        "points": points,
        "real_entropy": float(np.mean([unigram_entropy(ids) for ids in chosen.prompts.real.tolist()])),
        "scorer": grader.id,
        "self_graded": grader.self_graded,
    }


def _curve(
    record: dict[str, Any], weights: Float[np.ndarray, "resamples documents"]
) -> tuple[Float[np.ndarray, "resamples points"], Float[np.ndarray, "resamples points"]]:
    """Entropy and NLL of each point in each resample."""
    drawn = [{name: weights @ np.array(values) for name, values in point["sums"].items()} for point in record["points"]]
    with np.errstate(invalid="ignore", divide="ignore"):
        entropy = np.stack([sums["entropy"] / sums["samples"] for sums in drawn], 1)
        nll = np.stack([sums["nll"] / sums["scored"] for sums in drawn], 1)
    return entropy, nll


def common_entropy(records: list[dict[str, Any]], given: float | None) -> float:
    """Entropy at which all splits are compared.

    Args:
        records: one per split and seed, from :func:`write_texts`.
        given: as configured; None: the real text's, or the nearest to it well within the range that all curves cover.

    Raises:
        UsageError: the curves have no range in common, or the given entropy is outside it, naming the split.
    """
    ranges = []
    for record in records:
        entropy, _ = _curve(record, np.ones((1, len(record["documents"]))))
        ranges.append((float(entropy.min()), float(entropy.max()), record["split"]))
    low, lowest = max((item[0], item[2]) for item in ranges)
    high, highest = min((item[1], item[2]) for item in ranges)
    if given is None:
        if not low < high:
            raise UsageError(
                f"the splits have no entropy in common: split {lowest} writes at {low:.2f} nats or more, split {highest} "
                f"at {high:.2f} or less. Widen text.temperatures, or leave one of these splits out."
            )
        real = min(record["real_entropy"] for record in records)
        margin = _INSIDE * (high - low)
        return min(max(real, low + margin), high - margin)
    if not low <= given <= high:
        worst = lowest if given < low else highest
        raise UsageError(
            f"text.entropy is {given:g}, which split {worst} does not write at: all splits cover {low:.2f} to {high:.2f} "
            "nats. Widen text.temperatures, or choose an entropy inside."
        )
    return given


def text_truth(
    record: dict[str, Any], weights: Float[np.ndarray, "resamples documents"], at: float
) -> Float[np.ndarray, " resamples"]:
    """NLL at entropy ``at`` in each resample of the documents; NaN where the resampled curve does not reach it."""
    entropy, nll = _curve(record, weights)
    return at_entropy(entropy, nll, nll, at)


def text_about(record: dict[str, Any], at: float) -> dict[str, str]:
    """Name, label, unit and definition of the truth."""
    graded = ", which favours its own kin" if record["self_graded"] else ""
    return {
        "name": "text_nll",
        "label": f"NLL at entropy {at:.2f}",
        "unit": "nats/token",
        "definition": (
            f"NLL of written text under {record['scorer']}{graded}, read off the curve over temperatures at a mean "
            f"unigram entropy of {at:.4g} nats per continuation (backbone's tokens); real text has "
            f"{record['real_entropy']:.4g}."
        ),
    }
