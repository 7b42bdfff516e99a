"""Published shapes of backbones, so that one can be made at random without its files."""

from __future__ import annotations

from typing import Any

from dihal.errors import unknown_name

__all__ = ["SHAPES", "make_config"]

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4_096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8_192,
        },
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 4_096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
        "tie_word_embeddings": False,
    },
}
"""Name -> fields of the Hugging Face config."""


def make_config(config: Any) -> tuple[Any, str]:
    """A Hugging Face config, and a name for it, from a config, its fields, or a name in `SHAPES`.

    Raises:
        UsageError: an unknown name.
    """
    from transformers import AutoConfig

    if isinstance(config, str):
        if config not in SHAPES:
            raise unknown_name("shape", config, SHAPES)
        return AutoConfig.for_model(**SHAPES[config]), f"random:{config}"
    if isinstance(config, dict):
        return AutoConfig.for_model(**config), f"random:{config['model_type']}"
    return config, f"random:{config.model_type}"
