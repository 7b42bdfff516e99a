"""The verdict on planted evidence, one row per rule, and never from overlap alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dihal.circuits.overlap import Estimate
from dihal.circuits.verdict import Behaviour, Evidence, MatchedNull, judge
from dihal.config.circuits import VerdictConfig


def _sure(value: float, width: float = 0.02) -> Estimate:
    return Estimate(value=value, low=value - width, high=value + width)


GOOD = Behaviour(accuracy=0.9, clean=3.0, corrupted=-3.0)
KEPT = Evidence(
    reference=GOOD,
    other=GOOD,
    overlap=_sure(0.6),
    ceiling=0.75,
    own=(_sure(0.95), _sure(0.9)),
    transfer=_sure(0.88),
    random=(_sure(0.01), _sure(0.02)),
    shift=_sure(0.0, 0.3),
    distance=0.3,
    distance_null=0.3,
)
NULL = MatchedNull(overlap=_sure(0.5), transfer=_sure(0.85))
LOST = {"overlap": _sure(0.05), "transfer": _sure(0.1)}

TABLE = {
    "same circuit": (KEPT, "kept"),
    "few common edges, but they carry the task": (replace(KEPT, overlap=_sure(0.01)), "kept"),
    "other edges at the same depth": (replace(KEPT, **LOST), "rewired"),
    "other edges, three layers down": (replace(KEPT, **LOST, shift=_sure(-3.0, 0.4), distance=3.0), "moved"),
    "a shift within the noise of one model": (
        replace(KEPT, **LOST, shift=_sure(-0.6, 0.1), distance=0.55, distance_null=0.5),
        "rewired",
    ),
    "transfer fails, overlap does not": (replace(KEPT, transfer=_sure(0.1)), "not measurable"),
    "other model does not solve the task": (
        replace(KEPT, other=replace(GOOD, accuracy=0.5)),
        "not measurable",
    ),
    "neither solves it": (
        replace(KEPT, reference=replace(GOOD, accuracy=0.4), other=replace(GOOD, accuracy=0.5)),
        "not measurable",
    ),
    "gap of a fifth": (replace(KEPT, other=Behaviour(accuracy=0.9, clean=0.6, corrupted=-0.6)), "not measurable"),
    "no gap at all": (replace(KEPT, reference=Behaviour(accuracy=0.9, clean=1.0, corrupted=1.0)), "not measurable"),
    "own circuit carries nothing": (replace(KEPT, own=(_sure(0.95), _sure(0.2))), "not measurable"),
    "random circuits do as well": (replace(KEPT, random=(_sure(0.01), _sure(0.9))), "not measurable"),
    "accuracy unknown": (replace(KEPT, other=replace(GOOD, accuracy=float("nan"))), "not measurable"),
    "noise-matched: as the null": (replace(KEPT, null=NULL, overlap=_sure(0.49), transfer=_sure(0.84)), "kept"),
    "noise-matched: overlap below, transfer not": (replace(KEPT, null=NULL, overlap=_sure(0.2)), "kept"),
    "noise-matched: both below": (replace(KEPT, null=NULL, overlap=_sure(0.2), transfer=_sure(0.6)), "rewired"),
    "noise-matched null is low: the same numbers are no rewiring": (
        replace(
            KEPT,
            null=MatchedNull(overlap=_sure(0.2), transfer=_sure(0.6)),
            overlap=_sure(0.2),
            transfer=_sure(0.6),
        ),
        "kept",
    ),
    "wide intervals decide nothing against the null": (
        replace(KEPT, null=NULL, overlap=_sure(0.2), transfer=_sure(0.6, 0.4)),
        "kept",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_table(name: str) -> None:
    evidence, expected = TABLE[name]
    found = judge(evidence, VerdictConfig())
    assert found.call == expected, found.rule
    assert any(character.isdigit() for character in found.rule)
    assert found.null.startswith("noise-matched") == (evidence.null is not None)


def test_overlap_alone_never_changes_a_call() -> None:
    """Whatever the overlap is, a circuit that transfers is kept, and one that does not is never called rewired by it alone."""
    for value in (0.0, 0.05, 0.3, 0.6, 1.0):
        assert judge(replace(KEPT, overlap=_sure(value)), VerdictConfig()).call == "kept"
        calls = judge(replace(KEPT, overlap=_sure(value), transfer=_sure(0.1)), VerdictConfig()).call
        assert calls == ("rewired" if value < 0.375 else "not measurable")


def test_thresholds_are_read_from_the_configuration() -> None:
    weak = replace(KEPT, transfer=_sure(0.6))
    assert judge(weak, VerdictConfig(overlap_share=0.95)).call == "rewired"
    assert judge(weak, VerdictConfig(overlap_share=0.95, transfer_share=0.5)).call == "kept"
    assert judge(KEPT, VerdictConfig(accuracy=0.95)).call == "not measurable"
