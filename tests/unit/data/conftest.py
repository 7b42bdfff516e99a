"""A byte-level tokenizer, a private cache and a small corpus."""

from __future__ import annotations

import json

import pytest


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["the quick brown fox jumps over the lazy dog, the fox and the dog"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIHAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def corpus_file(tmp_path):
    """Thirty documents of unlike length in three groups, some with multi-byte characters."""
    path = tmp_path / "corpus.jsonl"
    words = ["the quick brown fox", "jumps über the lazy dog", "日本語 and 🙂 emoji", "naïve café"]
    with path.open("w", encoding="utf-8") as file:
        for i in range(30):
            text = f"document {i}: " + " ".join(words[(i + j) % 4] for j in range(1 + i % 7))
            file.write(json.dumps({"text": text, "origin": f"group{i % 3}", "n": i}) + "\n")
    return path
