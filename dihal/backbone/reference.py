"""A backbone by name: what is stored beside a bridge instead of the backbone's weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dihal.errors import UsageError
from dihal.io import hash_json

__all__ = ["BackboneReference", "hash_config"]

# The fields of the ten families' configs that change what the model computes. Everything else in a
# config (versions, token ids, initialisation, dropout) may differ between two loads of one model.
_DEFINING = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "n_inner",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "activation_function",
    "hidden_activation",
    "max_position_embeddings",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_parallel_residual",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings",
)


@dataclass(frozen=True, kw_only=True)
class BackboneReference:
    """Identity of a backbone. The weights themselves are identified by ``Backbone.fingerprint``."""

    id: str
    """`embedded`, a hub id, a path, or the name a live model carries."""
    revision: str | None
    """Commit of the hub repository, or version of the embedded package; null where there is none."""
    family: str
    """Key of the layout."""
    num_blocks: int
    """L."""
    hidden_size: int
    """d."""
    vocab_size: int
    """V, as held by the embedding."""
    dtype: str
    """Type in which the weights were held."""
    config_hash: str
    """Hash of the config fields that change what the model computes."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BackboneReference:
        """Inverse of `to_dict`.

        Raises:
            UsageError: a field is missing or unknown.
        """
        try:
            return cls(**data)
        except TypeError as error:
            names = ", ".join(field.name for field in dataclasses.fields(cls))
            raise UsageError(f"not a backbone reference ({error}); expected the fields {names}.") from error


def hash_config(config: Any) -> str:
    """Hash of the defining fields of a Hugging Face config; equal for two loads of one model."""
    return hash_json({name: value for name in _DEFINING if (value := getattr(config, name, None)) is not None})
