"""The truth of the regime `generate` from records made by hand; writing itself is in the integration test."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dihal.errors import UsageError
from dihal.sweep.written import common_entropy, text_about, text_truth, variant_of


def record(split: int, curve: list[tuple[float, float]], *, documents: int = 3, real: float = 4.0) -> dict[str, Any]:
    """A curve of (entropy, NLL per token) points: every document has two continuations of ten tokens."""
    points = []
    for entropy, nll in curve:
        sums = {"samples": 2.0, "entropy": 2 * entropy, "nll": 20 * nll, "scored": 20.0}
        points.append({"temperature": entropy, "sums": {name: [value] * documents for name, value in sums.items()}})
    return {
        "split": split,
        "documents": [f"d{i}" for i in range(documents)],
        "points": points,
        "real_entropy": real,
        "scorer": "judge",
        "self_graded": False,
    }


ONCE = np.ones((1, 3))


def test_the_value_lies_on_the_curve() -> None:
    found = record(3, [(3.0, 4.0), (4.0, 6.0)])
    assert text_truth(found, ONCE, 3.25)[0] == pytest.approx(4.5)
    assert np.isnan(text_truth(found, ONCE, 4.5)[0])


def test_documents_are_resampled() -> None:
    found = record(3, [(3.0, 4.0), (4.0, 6.0)])
    found["points"][1]["sums"]["entropy"] = [2 * 4.0, 2 * 5.0, 2 * 3.6]
    weights = np.array([[3.0, 0, 0], [0, 3, 0], [0, 0, 3]])
    expected = [4 + 2 * 0.5 / (end - 3) for end in (4.0, 5.0, 3.6)]
    assert text_truth(found, weights, 3.5) == pytest.approx(expected)


def test_the_common_entropy_is_inside_all_curves() -> None:
    records = [record(3, [(3.0, 4.0), (4.0, 6.0)]), record(6, [(2.0, 4.0), (3.8, 6.0)])]
    assert common_entropy(records, None) == pytest.approx(3.8 - 0.1 * 0.8)
    assert common_entropy([*records, record(9, [(2.0, 1.0), (5.0, 2.0)], real=3.4)], None) == pytest.approx(3.4)
    assert common_entropy([*records, record(9, [(2.0, 1.0), (5.0, 2.0)], real=2.5)], None) == pytest.approx(3.0 + 0.08)
    assert common_entropy(records, 3.3) == 3.3
    for outside, split in ((2.9, 3), (3.9, 6)):
        with pytest.raises(UsageError, match=f"split {split}"):
            common_entropy(records, outside)
    with pytest.raises(UsageError, match=r"no entropy in common: split 9 .* split 6"):
        common_entropy([*records, record(9, [(4.5, 1.0), (5.0, 2.0)])], None)


def test_the_definition_names_the_scorer() -> None:
    about = text_about(record(3, [(3.0, 4.0)]), 3.25)
    assert about["name"] == "text_nll"
    assert "3.25" in about["label"]
    assert "judge" in about["definition"]


def test_ways_of_writing() -> None:
    assert variant_of("").options == {}
    assert variant_of("readout=fused project=0.5").options == {"readout": "fused", "project": 0.5}
    with pytest.raises(UsageError, match=r"text\.temperatures"):
        variant_of("temperature=0.5")
    with pytest.raises(UsageError, match=r"text\.steps"):
        variant_of("steps=5")
    with pytest.raises(UsageError, match="readout"):
        variant_of("readuot=own")
