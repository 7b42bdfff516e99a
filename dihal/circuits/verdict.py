"""Kept, moved, rewired, or not measurable: a rule on evidence, and never on overlap alone.

The rule, in this order:

1. *Not measurable*: a model does not solve the task, or its gap between clean and corrupted prompts is too small
   against the reference's; its own circuit at this budget does not carry the task; or a random circuit of the same
   size and layers does as well as its own.
2. *Kept*: the reference's circuit, run in the other model, carries the task as far as the null allows. This holds at
   any overlap: circuits of few common edges may do the same.
3. *Not measurable*: transfer fails and overlap does not: the evidence disagrees.
4. *Moved*: both fail, and the depth profile has shifted by more than the same model's does between its halves.
5. *Rewired*: both fail, at the same depths.

The null is measured where there is one: the reference with noise of the bridge's size at the seam. Without it, the
null of overlap is a share of the split-half ceiling and that of transfer a share of the model's own faithfulness.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dihal.circuits.overlap import Estimate
from dihal.config.circuits import VerdictConfig

__all__ = ["Behaviour", "Evidence", "MatchedNull", "Verdict", "judge"]

Call = Literal["kept", "moved", "rewired", "not measurable"]


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """How a model solves the task."""

    accuracy: float
    clean: float
    """Mean metric of the clean prompts."""
    corrupted: float
    """Mean metric of the corrupted prompts."""

    @property
    def gap(self) -> float:
        """Clean minus corrupted."""
        return self.clean - self.corrupted


@dataclass(frozen=True, kw_only=True)
class MatchedNull:
    """What a perturbation of known size does to overlap and transfer without any change of mechanism."""

    overlap: Estimate
    transfer: Estimate


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything the rule reads; all at one budget."""

    reference: Behaviour
    other: Behaviour
    overlap: Estimate
    """Overlap of the two models; without a matched null between disjoint halves, as its ceiling is."""
    ceiling: float
    """Split-half ceiling of the overlap."""
    own: tuple[Estimate, Estimate]
    """Faithfulness of each model's own circuit in it."""
    transfer: Estimate
    """Faithfulness of the reference's circuit in the other model."""
    random: tuple[Estimate, Estimate]
    """Faithfulness of a random circuit of the same size and layers in each."""
    shift: Estimate
    """Change of the centre of mass in depth, other minus reference, in layers."""
    distance: float
    """Wasserstein-1 distance of the depth profiles, in layers."""
    distance_null: float
    """The larger distance between halves of one model's prompts."""
    null: MatchedNull | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A call with the rule that gave it."""

    call: Call
    rule: str
    """The rule's name in words, with the numbers it compared."""
    null: str
    """Which null was used."""

    def record(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"call": self.call, "rule": self.rule, "null": self.null}


def _unmeasurable(evidence: Evidence, config: VerdictConfig) -> str | None:
    for name, model in (("reference", evidence.reference), ("other model", evidence.other)):
        # Written so that a missing number fails the gate too.
        if not model.accuracy >= config.accuracy:
            return f"the {name} does not solve the task: accuracy {model.accuracy:.2f}, needed {config.accuracy:.2f}"
    if not evidence.reference.gap > 0:
        return f"the reference's metric does not fall under corruption: gap {evidence.reference.gap:.3g}"
    share = evidence.other.gap / evidence.reference.gap
    if not share >= config.gap:
        return (
            f"the other model's gap between clean and corrupted prompts is {share:.2f} of the reference's, "
            f"needed {config.gap:.2f}"
        )
    for name, own, random in zip(("reference", "other model"), evidence.own, evidence.random, strict=True):
        if not own.lower >= config.faithful:
            return (
                f"the {name}'s own circuit does not carry the task at this budget: faithfulness "
                f"{_said(own)}, needed {config.faithful:.2f}"
            )
        if not random.upper < own.lower:
            return f"a random circuit of the same size does as well in the {name}: {_said(random)} against {_said(own)}"
    return None


def _said(estimate: Estimate) -> str:
    if estimate.value is None:
        return "unknown"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def judge(evidence: Evidence, config: VerdictConfig) -> Verdict:
    """Apply the rule of this module's docstring."""
    if evidence.null is not None:
        null = "noise-matched: the reference with noise of the same size at the seam"
        overlap_floor, transfer_floor = evidence.null.overlap.lower, evidence.null.transfer.lower
    else:
        null = (
            f"split-half ceiling x {config.overlap_share:g} for overlap, own faithfulness x "
            f"{config.transfer_share:g} for transfer"
        )
        overlap_floor = config.overlap_share * evidence.ceiling
        transfer_floor = config.transfer_share * evidence.own[1].lower
    reason = _unmeasurable(evidence, config)
    if reason is not None:
        return Verdict(call="not measurable", rule=reason, null=null)
    moved = f"overlap {_said(evidence.overlap)} against {overlap_floor:.2f}"
    carried = f"transfer {_said(evidence.transfer)} against {transfer_floor:.2f}"
    if not evidence.transfer.upper < transfer_floor:
        return Verdict(
            call="kept",
            rule=f"the reference's circuit carries the task in the other model: {carried}; {moved}",
            null=null,
        )
    if not evidence.overlap.upper < overlap_floor:
        return Verdict(
            call="not measurable", rule=f"transfer fails but overlap does not: {carried}; {moved}", null=null
        )
    depth = (
        f"depth profiles {evidence.distance:.2f} layers apart against {evidence.distance_null:.2f} within one model, "
        f"centre of mass moved by {_said(evidence.shift)} layers"
    )
    if _shifted(evidence, config):
        return Verdict(
            call="moved", rule=f"overlap and transfer fail, depth shifts: {carried}; {moved}; {depth}", null=null
        )
    return Verdict(
        call="rewired", rule=f"overlap and transfer fail at the same depths: {carried}; {moved}; {depth}", null=null
    )


def _shifted(evidence: Evidence, config: VerdictConfig) -> bool:
    known = evidence.shift.low is not None and evidence.shift.high is not None
    beyond_zero = known and (evidence.shift.lower > 0 or evidence.shift.upper < 0)
    beyond_noise = evidence.distance > max(config.depth * evidence.distance_null, config.depth_layers)
    return beyond_zero and beyond_noise
