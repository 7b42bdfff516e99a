"""What is asked of a tokenizer."""

from __future__ import annotations

import json
from typing import Any

from dihal.errors import UsageError
from dihal.io import hash_json

__all__ = ["fingerprint_tokenizer", "require_fit", "special_id"]


def special_id(name: str, tokenizer: Any | None, config: Any) -> int | None:
    """A special token's id: the tokenizer's word, or the config's where there is no tokenizer."""
    value = getattr(tokenizer if tokenizer is not None else config, name, None)
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return None if value is None else int(value)


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Digest of vocabulary, merges, normalisation and special tokens.

    Padding and truncation are left out: a call with ``padding=True`` changes them in place.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any
    if backend is None:
        rules = {"vocab": sorted(tokenizer.get_vocab().items())}
    else:
        rules = json.loads(backend.to_str())
        rules.pop("padding", None)
        rules.pop("truncation", None)
    special = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")}
    return hash_json({"rules": rules, "special": special})


def require_fit(tokenizer: Any, vocab_size: int) -> None:
    """Refuse a tokenizer that makes ids the embedding does not have.

    Raises:
        UsageError: the largest id is outside the embedding.
    """
    vocab = tokenizer.get_vocab()
    largest = max(vocab.values()) if vocab else -1
    if largest >= vocab_size:
        raise UsageError(
            f"the tokenizer has ids up to {largest}, the backbone's embedding has {vocab_size} rows. "
            "Use the tokenizer that belongs to the backbone, or resize the embedding before loading."
        )
