"""What is measured of generated text, said once."""

from __future__ import annotations

from dihal.evaluation.definitions import Metric

__all__ = ["BOUND", "FRONTIER_VERSION", "METRICS", "SAMPLE_SUMS", "SCORE_TYPE", "SET_METRICS", "STATES"]

FRONTIER_VERSION = "1"
"""Raised whenever a definition below or the choice of prompts changes: unlike versions never share a table."""

SCORE_TYPE = "generated"
"""Likelihoods are those of the row's own text under the scorer, not of true text under the row."""

BOUND = Metric(
    label="bound of real text's NLL",
    unit="nats",
    definition=(
        "Upper bound of the negative log-likelihood of the real continuations given their prompts, nats per token: "
        "reading at one noise level, path up to it, prior (dihal/writing/bound.py). Level and reading are those that "
        "were best on the other half of the documents. The backbone's own, exact number is the NLL of the real text; "
        "no NLL of written text."
    ),
    lower_is_better=True,
    numerator="nats",
    denominator="tokens",
)
"""Of a row's checkpoint, however it writes: in the row's `details`, and in no `metrics` of its points."""

STATES = Metric(
    label="states explained",
    unit="share",
    definition=(
        "Explained variance of the clean states of the real continuations given their prompts, denoised in one step from "
        "each of 16 times of an even walk and averaged over these: 1 - sum |z - x0|^2 / sum |z|^2, states normalised by "
        "training text. Each space's own states: compare within a space."
    ),
    lower_is_better=False,
    numerator="state_squared_error",
    denominator="state_variance",
    scale=-1.0,
    offset=1.0,
)
"""Likewise, measured with the bound."""

SAMPLE_SUMS = (
    "nll",
    "scored",
    "entropy",
    "entropy_scorer",
    "agreement",
    "self_agreement",
    "memorised",
    "rep_2",
    "rep_3",
    "rep_4",
    "degenerate",
    "ended",
)
"""One number per continuation is stored of each; of ``self_agreement`` none where a row has one readout only.
``scored`` counts the scorer's own tokens for the new text. Added when they are summed: ``samples``, ``tokens`` (new
tokens), ``grams`` (4-grams of new tokens), ``self_samples``."""


def _metric(label: str, unit: str, definition: str, numerator: str, denominator: str, *, lower: bool) -> Metric:
    return Metric(
        label=label,
        unit=unit,
        lower_is_better=lower,
        definition=definition,
        numerator=numerator,
        denominator=denominator,
    )


METRICS: dict[str, Metric] = {
    "nll": _metric(
        "NLL",
        "nats/token",
        "Negative log-likelihood of the new tokens under the scorer given the prompt, mean over the scorer's tokens.",
        "nll",
        "scored",
        lower=True,
    ),
    "entropy": _metric(
        "entropy",
        "nats",
        "Entropy of the token frequencies within one continuation, in the backbone's tokens, mean over continuations.",
        "entropy",
        "samples",
        lower=False,
    ),
    "entropy_scorer": _metric(
        "entropy (scorer)",
        "nats",
        "The same in the scorer's tokens of the decoded continuation.",
        "entropy_scorer",
        "samples",
        lower=False,
    ),
    "agreement": _metric(
        "agreement",
        "share",
        "Share of new tokens that are the backbone's most likely token given the text before them.",
        "agreement",
        "tokens",
        lower=False,
    ),
    "self_agreement": _metric(
        "own = suffix",
        "share",
        "Share of new positions where own head and frozen stack, each alone reading the same last states with the "
        "same random numbers and temperature, give the same token.",
        "self_agreement",
        "self_samples",
        lower=False,
    ),
    "memorised": _metric(
        "memorised",
        "share",
        "Share of the 4-grams of new tokens that occur within a training document.",
        "memorised",
        "grams",
        lower=True,
    ),
    "rep_2": _metric(
        "rep-2",
        "share",
        "1 - distinct/all 2-grams of a continuation (Welleck et al. 2020), mean over continuations.",
        "rep_2",
        "samples",
        lower=True,
    ),
    "rep_3": _metric("rep-3", "share", "The same of 3-grams.", "rep_3", "samples", lower=True),
    "rep_4": _metric("rep-4", "share", "The same of 4-grams.", "rep_4", "samples", lower=True),
    "degenerate": _metric(
        "degenerate",
        "share",
        "Share of continuations where more than half of the 4-grams repeat an earlier one, or with fewer distinct "
        "tokens than an eighth of their length.",
        "degenerate",
        "samples",
        lower=True,
    ),
    "ended": _metric(
        "ended",
        "share",
        "Share of continuations that contain the end token although their length is fixed.",
        "ended",
        "samples",
        lower=True,
    ),
}
"""Ratios of sums over continuations, with intervals that resample documents."""

SET_METRICS: dict[str, tuple[str, str]] = {
    "entropy_pooled": ("entropy, pooled", "Entropy of the token frequencies of all continuations as one text, nats."),
    "dist_1": ("dist-1", "Distinct over all 1-grams, pooled over continuations (Li et al. 2016)."),
    "dist_2": ("dist-2", "The same of 2-grams."),
    "dist_3": ("dist-3", "The same of 3-grams."),
    "dist_4": ("dist-4", "The same of 4-grams."),
    "self_bleu": (
        "self-BLEU",
        "BLEU-4 of each of the first continuations with the others as references (Zhu et al. 2018), token ids, "
        "0.1 in the place of a zero count; mean.",
    ),
    "mauve": (
        "MAUVE",
        "MAUVE (Pillutla et al. 2021; library mauve-text) of the scorer's last state after the final norm, against "
        "the real continuations of the same prompts.",
    ),
    "frechet": (
        "Frechet",
        "Frechet distance of the scorer's state after the final norm, mean over new tokens, to that of the real "
        "continuations, in their leading principal directions, over the real features' variance there (0: alike).",
    ),
}
"""Statistics of a whole set of continuations -> label and definition: one value per sampling seed, no interval."""
