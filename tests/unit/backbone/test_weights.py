"""Fingerprints, counts and costs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dihal.backbone import load_backbone
from dihal.backbone.weights import fingerprint, named_weights
from tests.kit import FAMILIES, tiny_backbone, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_edited_tensor_is_seen(family: str) -> None:
    backbone = tiny_backbone(family, num_blocks=2)
    before = backbone.fingerprint()
    assert before == tiny_backbone(family, num_blocks=2).fingerprint()
    assert before != tiny_backbone(family, num_blocks=2, seed=1).fingerprint()
    covered = set()
    for name, parameter in backbone.model.named_parameters():
        flat = parameter.data.view(-1)
        old = flat[-1].item()
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))  # one bit
        assert backbone.fingerprint() != before, name
        flat[-1] = old
        covered.add(name)
    assert backbone.fingerprint() == before
    assert len(covered) > 10


@pytest.mark.parametrize("tied", [True, False])
def test_a_part_depends_on_its_own_weights_only(tied: bool) -> None:
    backbone = tiny_backbone(num_blocks=3, tied=tied)
    part = backbone.fingerprint(2, embedding=False)
    no_head = backbone.fingerprint(2, embedding=False, head=False)
    backbone.model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    assert backbone.fingerprint(2, embedding=False) == part
    backbone.model.model.embed_tokens.weight.data[0, 0] += 1
    # A tied head is the embedding.
    assert (backbone.fingerprint(2, embedding=False) != part) == tied
    assert backbone.fingerprint(2, embedding=False, head=False) == no_head
    backbone.model.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1
    assert backbone.fingerprint(2, embedding=False, head=False) != no_head


def test_fingerprint_sees_name_type_and_shape() -> None:
    zeros = torch.zeros(2, 6)
    prints = {
        fingerprint([("a", zeros)]),
        fingerprint([("b", zeros)]),
        fingerprint([("a", zeros.view(3, 4))]),
        fingerprint([("a", zeros.int())]),
        fingerprint([("a", zeros), ("a", zeros)]),
        fingerprint([("a", zeros.bfloat16())]),
    }
    assert len(prints) == 6
    assert fingerprint([("a", torch.arange(6.0).view(2, 3).T)]) == fingerprint(
        [("a", torch.arange(6.0).view(2, 3).T.contiguous())]
    )


def test_fingerprint_of_bfloat16() -> None:
    assert tiny_backbone(dtype="bfloat16").fingerprint() == tiny_backbone(dtype="bfloat16").fingerprint()
    assert tiny_backbone(dtype="bfloat16").fingerprint() != tiny_backbone().fingerprint()


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_adapters_leave_the_fingerprint_alone(family: str) -> None:
    import peft

    backbone = tiny_backbone(family)
    names, before = backbone.linear_names(2), backbone.fingerprint()
    config = peft.LoraConfig(
        r=2,
        target_modules=list(backbone.lora_targets),
        layers_to_transform=[2, 3],
        layers_pattern=backbone.layers_pattern,
        fan_in_fan_out=family == "gpt2",
    )
    peft.inject_adapter_in_model(config, backbone.model)
    wrapped = {name.split(".lora_A")[0] for name, _ in backbone.model.named_modules() if name.endswith("lora_A")}
    assert wrapped == set(names)  # every linear layer of the suffix, none of the prefix
    assert backbone.fingerprint() == before


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_targets_agree(family: str) -> None:
    backbone = tiny_backbone(family)
    names = backbone.linear_names(3)
    modules = dict(backbone.model.named_modules())
    assert all(name in modules for name in names)
    assert {name.rsplit(".", 1)[1] for name in names} == set(backbone.lora_targets)
    assert len(backbone.linear_names()) == 4 * len(names)
    assert f".{backbone.layers_pattern}.3." in names[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count(family: str, tied: bool) -> None:
    backbone = tiny_backbone(family, tied=tied)
    whole = sum(parameter.numel() for parameter in backbone.model.parameters())
    assert backbone.parameter_count() == whole
    assert backbone.weight_bytes == 4 * whole
    blocks = backbone.parameter_count(2, embedding=False, head=False)
    assert blocks == sum(p.numel() for block in backbone.blocks[2:] for p in block.parameters())
    head = backbone.parameter_count(4, embedding=False, head=True)
    assert head >= 97 * 32


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_against_torch(family: str) -> None:
    # Torch counts what the kernels do: eager attention multiplies the masked half too, as context = time says.
    time = 16
    more = {"sliding_window": None} if family in ("mistral", "phi3") else {}
    if family in ("gemma2", "gemma3_text", "qwen2"):
        more = {"sliding_window": 64}
    backbone = tiny_backbone(family, attention="eager", **more)
    state = torch.randn(1, time, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.suffix_features(state, 1)
    counted = counter.get_total_flops()
    # Rotary tables of 16 positions are the only products beyond the blocks.
    assert counted == pytest.approx(time * backbone.flops_per_token(1, 4, time), rel=1e-2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.head(state)
    assert counter.get_total_flops() == time * backbone.head_flops_per_token()


def test_windows_shorten_the_context() -> None:
    def attention(family: str, context: float) -> list[float]:
        backbone = tiny_backbone(family)
        return [backbone.flops_per_token(i, i + 1, context) - backbone.flops_per_token(i, i + 1, 0) for i in range(4)]

    assert attention("llama", 100) == [4 * 100 * 32] * 4
    assert attention("mistral", 100) == [4 * 5 * 32] * 4
    assert attention("mistral", 3.5) == [4 * 3.5 * 32] * 4
    assert attention("qwen2", 100) == [4 * 100 * 32] * 2 + [4 * 5 * 32] * 2
    assert attention("gemma2", 100) == [4 * 5 * 64, 4 * 100 * 64] * 2


def test_roles_do_not_name_the_library() -> None:
    for family in FAMILIES:
        backbone = load_backbone(tiny_model(family, num_blocks=2), device="cpu")
        roles = {name.split(".")[0] for name, _ in named_weights(backbone, 0, embedding=True, head=True)}
        assert roles == {"embedding", "block", "norm", "head"}
