"""Causal LMs from GGUF files, dequantised; with the tokenizer that is written in the file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from dihal.backbone.files import Loaded, explained, quiet, require_complete
from dihal.backbone.layout import find_layout

__all__ = ["load_gguf", "read_tokenizer"]

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# `tokenizer.ggml.pre` -> how text is cut before the merges: None is GPT-2's own pattern, "digits"
# that pattern after cutting out every digit, anything else a pattern of its own.
_CUTS: dict[str, str | None] = {
    "default": None,
    "gpt-2": None,
    "smollm": "digits",
    "llama-bpe": _LETTERS + r"|\p{N}{1,3}" + _REST,
    "qwen2": _LETTERS + r"|\p{N}" + _REST,
}
# Token types of the format.
_CONTROL, _USER_DEFINED = 3, 4


def load_gguf(path: Path, source: str, *, dtype: torch.dtype, tokenizer: Any | None) -> Loaded:
    """Weights dequantised to ``dtype``; the quantisation config is dropped, so that the model can be saved.

    Raises:
        UsageError: a damaged file or an unknown family.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, name = str(path.parent), path.name
    with quiet(), explained(source):
        config = AutoConfig.from_pretrained(folder, gguf_file=name)
        find_layout(config)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, config=config, dtype=dtype, output_loading_info=True
        )
        if tokenizer is None:
            tokenizer = read_tokenizer(path)
    require_complete(source, report)
    model.hf_quantizer = None
    model.is_quantized = False
    for holder in (model, model.config):
        if hasattr(holder, "quantization_config"):
            delattr(holder, "quantization_config")
    return Loaded(model, tokenizer, source, None)


def read_tokenizer(path: Path) -> Any:
    """The tokenizer in the file.

    Byte-level BPE is built here from the file's own words: the library ignores how the file says
    text is cut, adds GPT-2's special token to any vocabulary, and takes the start token for the end
    token in some releases. Other kinds (SentencePiece) go through the library, special tokens corrected.
    """
    from gguf import GGUFReader

    fields = GGUFReader(path).fields

    def read(name: str) -> Any:
        field = fields.get(f"tokenizer.{name}")
        return None if field is None else field.contents()

    tokens = read("ggml.tokens")
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {f"{role}_token": read(f"ggml.{name}_token_id") for role, name in roles.items()}
    special = {role: tokens[index] for role, index in ids.items() if index is not None and index < len(tokens)}
    if read("ggml.model") == "gpt2":
        tokenizer = _byte_level(tokens, read("ggml.token_type"), read("ggml.merges"), read("ggml.pre"), special)
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        for role, token in special.items():
            setattr(tokenizer, role, token)
    tokenizer.chat_template = read("chat_template")
    return tokenizer


def _byte_level(
    tokens: list[str], types: list[int] | None, merges: list[str], pre: str | None, special: dict[str, str]
) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if pre is not None and pre not in _CUTS:
        warnings.warn(
            f"the GGUF file cuts text by rule {pre!r}, which is not known here; GPT-2's rule is used. Token counts may "
            "differ from the original: give load_backbone(..., tokenizer=...) to be exact.",
            stacklevel=2,
        )
    cut = _CUTS.get(pre or "default")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)}, merges=pairs, ignore_merges=pre == "llama-bpe"
    )
    tokenizer = Tokenizer(model)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut in (None, "digits"))
    if cut is not None:
        first = pre_tokenizers.Digits(individual_digits=True) if cut == "digits" else None
        first = first or pre_tokenizers.Split(Regex(cut), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types or ()) if kind == _CONTROL]
    defined = [token for token, kind in zip(tokens, types or ()) if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in defined])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
