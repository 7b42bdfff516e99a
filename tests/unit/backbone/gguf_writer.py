"""Write a tiny Llama as a GGUF file, the way llama.cpp lays it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.kit import tiny_tokenizer

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    # llama.cpp rotates neighbouring channels, transformers the two halves of a head.
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: Any) -> None:
    """Float32 weights and the tiny byte-level tokenizer."""
    import gguf

    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    vocab = tiny_tokenizer(config.vocab_size).get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    # A GGUF tokenizer has at least one merge: its token takes the last id.
    writer.add_token_list([*sorted(vocab, key=vocab.__getitem__)[:-1], "ab"])
    writer.add_token_types([3] * 4 + [1] * (len(vocab) - 4))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(3)

    def add(name: str, tensor: torch.Tensor) -> None:
        writer.add_tensor(name, tensor.float().contiguous().numpy())

    add("token_embd.weight", weights["model.embed_tokens.weight"])
    add("output_norm.weight", weights["model.norm.weight"])
    add("output.weight", weights["lm_head.weight"])
    for block in range(config.num_hidden_layers):
        for theirs, name in _NAMES.items():
            tensor = weights[f"model.layers.{block}.{theirs}.weight"]
            if name in ("attn_q", "attn_k"):
                tensor = _interleave(
                    tensor, config.num_attention_heads if name == "attn_q" else config.num_key_value_heads
                )
            add(f"blk.{block}.{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
