"""Where each family keeps its parts: one entry of data per family, no code per family.

Masks, rotary tables, embedding scales, layer types and caches are *not* listed: the model's own
decoder forward runs them (``views.py``), so they cannot drift from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dihal.errors import UsageError, unknown_name

__all__ = ["LAYOUTS", "Layout", "find_layout"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names of the parts of one family. Dotted names are relative to what the field says."""

    decoder: str = "model"
    """The module that holds embedding, blocks and final norm; relative to the causal LM."""
    embeddings: tuple[str, ...] = ("embed_tokens",)
    """Everything added up to h^0; relative to the decoder."""
    blocks: str = "layers"
    """The list of blocks; relative to the decoder."""
    norm: str = "norm"
    """The final norm; relative to the decoder."""
    softcap: str | None = None
    """Config field c of the logit soft-cap c tanh(logits / c); null there: no cap."""
    attention_output: str = "self_attn.o_proj"
    """Linear layer after attention, whose input is heads * head size wide; relative to a block."""
    windows: str | None = None
    """Config field that holds the sliding window's length in tokens."""
    eager_only: bool = False
    """The library has no SDPA for the family (Gemma 2 soft-caps attention scores): eager is used."""
    linears: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Last name of every linear layer of attention and MLP: the LoRA targets."""
    projections: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Linear layers of queries, keys and values, or one that gives the three one after the other; relative to a block."""
    interleaved: bool = False
    """The one layer of queries, keys and values mixes them head by head."""
    transposed: bool = False
    """Linear layers hold (in, out) instead of (out, in)."""
    attention_norm: str = "input_layernorm"
    """What the projections read; relative to a block."""
    mlp: str | None = "mlp"
    """The MLP; relative to a block. Null: blocks have none."""
    mlp_norm: str = "post_attention_layernorm"
    """What the MLP reads; relative to a block."""
    norm_kind: Literal["rms", "layer", "none"] = "rms"
    """RMSNorm, LayerNorm, or no norm."""
    norm_eps: str = "variance_epsilon"
    """Attribute of a norm that is added to the mean square."""
    post_norm: bool = False
    """Outputs of attention and MLP pass a norm before they are added."""
    parallel: str | None = None
    """Config field; true there: attention and MLP of a block read the same state. Null: never."""


LAYOUTS: dict[str, Layout] = {
    "llama": Layout(),
    "mistral": Layout(windows="sliding_window"),
    "qwen2": Layout(windows="sliding_window"),
    "qwen3": Layout(windows="sliding_window"),
    "olmo2": Layout(post_norm=True),
    "gemma2": Layout(windows="sliding_window", softcap="final_logit_softcapping", eager_only=True, post_norm=True),
    "gemma3_text": Layout(windows="sliding_window", softcap="final_logit_softcapping", post_norm=True),
    "phi3": Layout(
        windows="sliding_window",
        linears=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        projections=("self_attn.qkv_proj",),
    ),
    "gpt2": Layout(
        decoder="transformer",
        embeddings=("wte", "wpe"),
        blocks="h",
        norm="ln_f",
        attention_output="attn.c_proj",
        linears=("c_attn", "c_proj", "c_fc"),
        projections=("attn.c_attn",),
        transposed=True,
        attention_norm="ln_1",
        mlp_norm="ln_2",
        norm_kind="layer",
        norm_eps="eps",
    ),
    "gpt_neox": Layout(
        decoder="gpt_neox",
        embeddings=("embed_in",),
        norm="final_layer_norm",
        attention_output="attention.dense",
        linears=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        projections=("attention.query_key_value",),
        interleaved=True,
        norm_kind="layer",
        norm_eps="eps",
        parallel="use_parallel_residual",
    ),
}


def find_layout(config: Any) -> tuple[str, Layout]:
    """Return the family's name and layout for a Hugging Face config.

    Raises:
        UsageError: the family is unknown, multi-modal, or not causal.
    """
    family = getattr(config, "model_type", None)
    if family == "gemma3":
        raise UsageError(
            "this Gemma 3 checkpoint is multi-modal (model_type 'gemma3'). Load a text-only one (model_type "
            "'gemma3_text', e.g. google/gemma-3-1b-pt), or pass the live text model as a Gemma3ForCausalLM."
        )
    if family not in LAYOUTS:
        raise unknown_name(
            "backbone family",
            family,
            LAYOUTS,
            hint="To add one: an entry in LAYOUTS of dihal/backbone/layout.py and a tiny config in tests/kit.py; "
            "the parity tests then cover it.",
        )
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        raise UsageError(f"this {family} model attends in both directions; a causal language model is needed.")
    return family, LAYOUTS[family]
