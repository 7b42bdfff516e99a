"""Training runs opened as subjects."""

from __future__ import annotations

import torch

from dihal.circuits.subject import open_subject
from dihal.config import DenoiserConfig
from dihal.config.circuits import LoadConfig
from dihal.config.convert import to_dict
from dihal.masked.attention import full
from dihal.restore import load_method
from dihal.training.run import train
from tests.unit.training.conftest import Make, _quiet, make, model_folder, text_file  # noqa: F401 (fixtures)


def test_a_masked_diffusion_run_is_the_model_it_trained(make: Make) -> None:  # noqa: F811
    regime = {"method.name": "masked", "method.regime": "mask", "method.space": "tokens", "method.split": 0}
    usual = {"method.denoiser": to_dict(DenoiserConfig()), "method.time.terminal_fraction": 0.0}
    folder = train(make(steps=3, **regime, **usual))
    subject = open_subject(str(folder), LoadConfig(device="cpu"))
    method, backbone = load_method(folder, device="cpu")
    assert subject.kind == "masked"
    assert subject.mask_id == method.mask_token_id
    assert subject.about["name"] == subject.adapter.name == folder.name
    assert subject.about["backbone"] == backbone.reference.to_dict()
    ids = torch.tensor([[0, 5, 6, method.mask_token_id, 8, 9]])
    positions = torch.tensor([[1, 2]])
    with torch.no_grad():
        state = subject.adapter.states(ids, 0, sample_ids=torch.zeros(1, dtype=torch.int64), attention="full")
        found = subject.adapter.logits(state, 0, positions, attention="full")
        features = method.features(backbone, ids, full(torch.ones_like(ids, dtype=torch.bool)))
        expected = method.head(backbone, features[0, positions[0]][None])
    words = [i for i in range(backbone.vocab_size) if i != method.mask_token_id]
    torch.testing.assert_close(found[..., words], expected[..., words], atol=1e-5, rtol=1e-4)


def test_a_bridge_trained_beside_bfloat16_is_looked_at_in_float32(make: Make) -> None:  # noqa: F811
    folder = train(make(steps=2, **{"backbone.dtype": "bfloat16"}))
    subject = open_subject(str(folder), LoadConfig(device="cpu"))
    assert subject.kind == "hybrid"
    assert subject.adapter.dtype == torch.float32
    ids = torch.tensor([[0, 5, 6, 7]])
    state = subject.adapter.states(ids, subject.adapter.seam, sample_ids=torch.zeros(1, dtype=torch.int64))
    assert state.dtype == torch.float32
