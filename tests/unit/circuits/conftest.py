"""Tokenizers of whole words, and score tables with known truth: no test here needs a trained model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dihal.circuits.graph import GraphSpec
from dihal.circuits.tasks.greater_than import CENTURIES, NOUNS
from dihal.circuits.tasks.greater_than import TEMPLATES as YEARS
from dihal.circuits.tasks.infill import FAMILIES, QUESTIONS
from dihal.circuits.tasks.ioi import NAMES, PLACES, THINGS
from dihal.circuits.tasks.ioi import TEMPLATES as GIVING
from dihal.circuits.types import EdgeScores
from dihal.random import normal


def _vocabulary() -> list[str]:
    texts = [*NAMES, *PLACES, *THINGS, *NOUNS, *CENTURIES, *YEARS.values(), *GIVING.values(), *QUESTIONS.values()]
    for sentence, cues in FAMILIES.values():
        texts += [sentence, *cues, *cues.values()]
    texts += [
        "The word is",
        "The words are",
        "Input Output Use on the numbers in their order to reach last one Combine",
    ]
    words = {word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)}
    words |= {f"w{chr(97 + i)}{chr(97 + j)}" for i in range(12) for j in range(12)}
    return sorted(words | set('0123456789,:+-*/=."?_') | {f"{n:02d}" for n in range(100)} | {"___"})


@pytest.fixture(scope="session")
def word_tokenizer() -> Callable[..., Any]:
    """A tokenizer of whole words and single digits (`digits=2`: pairs of digits), without the words in `missing`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def build(missing: tuple[str, ...] = (), digits: int = 1, first: str = "<unk>") -> Any:
        words = [word for word in _vocabulary() if word not in missing]
        vocab = {
            token: i
            for i, token in enumerate(
                [first, "<mask>", *words] if first == "<unk>" else [first, "<unk>", "<mask>", *words]
            )
        }
        tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
        number = Regex(r"\d{1,2}" if digits == 2 else r"\d")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Whitespace(), pre_tokenizers.Split(number, "isolated")]
        )
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", mask_token="<mask>")

    return build


@pytest.fixture
def make_scores() -> Callable[..., EdgeScores]:
    """Scores drawn around a given table: `noise` is the standard deviation of one prompt's score."""

    def make(
        spec: GraphSpec, truth: np.ndarray, *, noise: float, n: int = 64, parts: int = 8, seed: int = 0
    ) -> EdgeScores:
        draws = normal(seed, torch.arange(n), "test-scores", truth.shape, dtype=torch.float64).numpy()
        per_prompt = np.where(spec.edge_mask, truth + noise * draws, 0.0)
        kept = np.stack([per_prompt[part::parts].mean(0) for part in range(parts)]).astype(np.float32)
        return EdgeScores(
            spec=spec,
            scores=per_prompt.mean(0).astype(np.float32),
            n=n,
            squares=(per_prompt**2).mean(0).astype(np.float32),
            parts=kept,
            part_counts=tuple(len(range(part, n, parts)) for part in range(parts)),
            clean=3.0,
            corrupted=-3.0,
            accuracy=0.9,
            method="eap-ig",
        )

    return make


@pytest.fixture
def heavy_tail() -> Callable[..., np.ndarray]:
    """A table of scores like those of a model: a few large, most small, signs mixed."""

    def make(spec: GraphSpec, seed: int = 0, power: float = 3.0) -> np.ndarray:
        draws = normal(seed, torch.arange(spec.n_writers), "test-truth", (spec.n_readers,), dtype=torch.float64).numpy()
        return np.where(spec.edge_mask, np.sign(draws) * np.abs(draws) ** power, 0.0)

    return make
