"""Which models are taken, and what is refused with which reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from dihal.circuits.adapters import open_model
from dihal.circuits.attribute import attribute
from dihal.circuits.evaluate import curve
from dihal.circuits.linear import effective_linear
from dihal.controls import Identity
from dihal.errors import UsageError
from dihal.hybrid import HybridForCausalLM
from tests.kit import FAMILIES, tiny_backbone, tiny_model
from tests.unit.circuits.models import float64_model, random_pairs

REFUSED = {
    "gemma2": "post-norm",
    "gemma3_text": "post-norm",
    "olmo2": "post-norm",
    "gpt_neox": "parallel",
}
PAIRS = [random_pairs()]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_or_says_why_not(family: str) -> None:
    model = tiny_model(family)
    if family in REFUSED:
        with pytest.raises(UsageError, match=REFUSED[family]):
            open_model(model)
        return
    adapter = open_model(model)
    batch = random_pairs(2, 9, targets=2)
    with adapter.session(), torch.no_grad():
        expected = model(batch.clean).logits[:, 7:]
        for seam in range(adapter.layers):
            state = adapter.states(batch.clean, seam, sample_ids=batch.ids)
            assert torch.equal(adapter.logits(state, seam, batch.positions), expected)
    spec = adapter.spec()
    assert (spec.layers, spec.heads) == (4, 4)


def test_mixed_projections_are_refused() -> None:
    with pytest.raises(UsageError, match="splitter"):
        open_model(tiny_model("gpt_neox", use_parallel_residual=False))


def test_gated_queries_are_refused() -> None:
    model = tiny_model()
    for block in model.model.layers:
        block.self_attn.q_proj = nn.Linear(32, 64, bias=False)
    with pytest.raises(UsageError, match="gate"):
        open_model(model).projections(0, "grouped")


def test_quantised_weights_are_refused() -> None:
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "some"}
    with pytest.raises(UsageError, match="quantised"):
        open_model(model)
    model = tiny_model()
    output = model.model.layers[0].self_attn.o_proj
    output.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UsageError, match="quantised"):
        open_model(model)


def test_unknown_families_and_other_things_are_refused() -> None:
    model = tiny_model()
    model.config.model_type = "qwen3_next"
    with pytest.raises(UsageError, match="backbone family"):
        open_model(model)
    with pytest.raises(UsageError, match="not a Hugging Face causal LM"):
        open_model(nn.Linear(2, 2))


def test_training_mode_is_refused() -> None:
    with pytest.raises(UsageError, match=r"eval\(\)"):
        attribute(tiny_model().train(), PAIRS)


def test_unequal_lengths_are_refused() -> None:
    batch = random_pairs()
    with pytest.raises(UsageError, match="equal lengths"):
        dataclasses.replace(batch, corrupted=batch.corrupted[:, 1:])
    with pytest.raises(UsageError, match="positions"):
        dataclasses.replace(batch, positions=batch.positions + 1)


def test_models_of_different_structure_are_refused() -> None:
    scores = attribute(tiny_model(num_blocks=3), PAIRS)
    with pytest.raises(UsageError, match="different graphs"):
        curve(tiny_model(num_blocks=4), scores, PAIRS)


def test_a_backbone_and_its_live_model_are_the_same() -> None:
    backbone = tiny_backbone()
    own, live = attribute(backbone, PAIRS), attribute(backbone.model, PAIRS)
    assert (own.scores == live.scores).all()
    assert open_model(open_model(backbone)).name == backbone.reference.id


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_of_peft_count(family: str) -> None:
    """Scores of a model with active adapters are those of the merged model; switched off, of the bare one."""
    import peft

    from tests.unit.circuits.models import exact_norms

    bare, wrapped = float64_model(family), float64_model(family)
    targets = ["c_attn", "c_proj"] if family == "gpt2" else ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    lora = peft.get_peft_model(wrapped, config)
    exact_norms(wrapped)
    lora.eval()
    with_adapters = attribute(wrapped, PAIRS)
    with lora.disable_adapter():
        without = attribute(wrapped, PAIRS)
    merged = attribute(exact_norms(lora.merge_and_unload().eval()), PAIRS)
    assert abs(with_adapters.scores - merged.scores).max() < 1e-12 * abs(merged.scores).max() * 100
    assert abs(without.scores - attribute(bare, PAIRS).scores).max() < 1e-10
    assert abs(without.scores - merged.scores).max() > 1e-3


def test_a_hybrid_has_one_seam_and_no_path_through_its_inputs() -> None:
    hybrid = HybridForCausalLM.from_method(Identity(2), tiny_backbone())
    adapter = open_model(hybrid)
    assert adapter.spec().writers[0] == "bridge"
    assert adapter.spec().seam == 2
    with pytest.raises(UsageError, match="path=seam"):
        attribute(hybrid, PAIRS)
    with pytest.raises(UsageError, match="entered at layer 2"):
        attribute(hybrid, PAIRS, path="seam", seam=1)
    with pytest.raises(UsageError, match="full attention"):
        attribute(hybrid, [random_pairs(attention="full")], path="seam")


def test_effective_weight_is_what_the_layer_applies() -> None:
    x = torch.randn(4, 8)
    layer = nn.Linear(8, 5)
    weight, bias = effective_linear(layer, False, "model")
    assert torch.allclose(x @ weight.T + bias, layer(x))
