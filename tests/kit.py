"""Tiny random backbones and a real little tokenizer: no test needs files or a network for them."""

from __future__ import annotations

import functools
from typing import Any

import torch

from dihal.backbone import Backbone, load_backbone

__all__ = ["FAMILIES", "tiny_backbone", "tiny_config", "tiny_model", "tiny_tokenizer"]

_WINDOW = 5

# What makes a family itself, beside the sizes every entry shares.
_SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": _WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 2},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": _WINDOW, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": _WINDOW,
        "query_pre_attn_scalar": 16,
        "sliding_window_pattern": 2,
    },
    "gpt2": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "olmo2": {},
    "phi3": {"sliding_window": _WINDOW},
}
FAMILIES = tuple(_SPECIAL)


def tiny_config(
    family: str = "llama",
    *,
    num_blocks: int = 4,
    hidden_size: int = 32,
    vocab: int = 97,
    tied: bool | None = None,
    **more: Any,
) -> Any:
    """A config of the family; ``more`` overrides its own field names."""
    from transformers import AutoConfig

    sizes: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if family == "gpt2":
        del sizes["num_key_value_heads"], sizes["intermediate_size"]
    if family == "gpt_neox":
        del sizes["num_key_value_heads"]
    if tied is not None:
        sizes["tie_word_embeddings"] = tied
    return AutoConfig.for_model(family, **{**sizes, **_SPECIAL[family], **more})


def tiny_model(family: str = "llama", *, seed: int = 0, **sizes: Any) -> Any:
    """A live random causal LM; the seed decides the weights, whatever was drawn before."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            # The library's initial weights are so small that every block is nearly the identity: parity would be easy.
            scale = 0.3 if parameter.ndim > 1 else 0.1
            parameter.data.add_(scale * torch.randn_like(parameter))
    return model.eval()


@functools.cache
def _tokenizer_json(vocab: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<s>", "</s>", "<pad>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Space, newline and common ASCII first, so that a small vocabulary still reads English; the rest becomes <unk>.
    letters.sort(key=lambda letter: (letter not in "ĠĊ", not letter.isascii(), letter in "`~|^", letter))
    tokens = [*special, "<unk>", *letters][:vocab]
    model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


def tiny_tokenizer(vocab: int = 97) -> Any:
    """A byte-level tokenizer with <s> 0, </s> 1, <pad> 2, <unk> 3; at most ``vocab`` ids (260 hold every byte)."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json(vocab)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def tiny_backbone(
    family: str = "llama",
    num_blocks: int = 4,
    hidden_size: int = 32,
    vocab: int = 97,
    seed: int = 0,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    attention: str = "sdpa",
    **more: Any,
) -> Backbone:
    """A random backbone of the family with a byte-level tokenizer."""
    model = tiny_model(family, seed=seed, num_blocks=num_blocks, hidden_size=hidden_size, vocab=vocab, **more)
    return load_backbone(model, dtype=dtype, device=device, attention=attention, tokenizer=tiny_tokenizer(vocab))
