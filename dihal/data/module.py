"""Text for training and evaluation as one LightningDataModule."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dihal.config.parts import DataConfig
from dihal.data.batch import Batch
from dihal.data.order import micro_batches
from dihal.data.packing import EvaluationWindows, PackedStream, evaluation_windows
from dihal.data.text import Corpus, Document, read_corpus, split_documents, texts_fingerprint
from dihal.data.tokens import Tokenised, tokenise
from dihal.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextDataModule"]


class _TrainBatches(IterableDataset):
    """The endless training stream of one rank; loader workers take turns."""

    def __init__(self, stream: PackedStream, *, start: int, batch_size: int, rank: int, world_size: int) -> None:
        self._stream = stream
        self._plan = {"start": start, "batch_size": batch_size, "rank": rank, "world_size": world_size}

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for sample_ids in micro_batches(**self._plan, first=first, stride=stride):
            yield self._stream.batch(sample_ids)


class _EvaluationBatches(IterableDataset):
    """Evaluation windows of one rank, in order."""

    def __init__(self, windows: EvaluationWindows, *, batch_size: int, rank: int, world_size: int) -> None:
        self._windows = windows
        self._plan = {"batch_size": batch_size, "rank": rank, "world_size": world_size}

    def __iter__(self) -> Iterator[Batch]:
        return self._windows.batches(**self._plan)


class TextDataModule(L.LightningDataModule):
    """Documents, split, tokens, windows and loaders of one `DataConfig`.

    Usable without a Trainer: everything is computed on first use, through the cache. Under a Trainer rank 0 of
    each node fills the cache first (`prepare_data`), and the loaders follow the Trainer's world size and rank.
    Training stops by budget: the training loader never ends.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        tokenizer: PreTrainedTokenizerBase,
        tokenizer_fingerprint: str,
        start_token_id: int | None,
        end_token_id: int | None,
        samples_seen: int = 0,
        world_size: int = 1,
        rank: int = 0,
        progress: bool = False,
    ) -> None:
        """Keep the options; nothing is read yet.

        Args:
            config: source, split, sequence length, batch size, order.
            tokenizer: the backbone's (fast) tokenizer.
            tokenizer_fingerprint: identity of the tokenizer; keys the token cache.
            start_token_id: token put first in each window; None: none.
            end_token_id: token put after each training document; None: none.
            samples_seen: sequences that all ranks together consumed before; assign to resume.
            world_size: processes that share the work, when no Trainer says so.
            rank: this process among them, when no Trainer says so.
            progress: show a bar while tokenising.

        Raises:
            UsageError: batch size or workers out of range.
        """
        super().__init__()
        if config.batch_size < 1:
            raise UsageError(f"data.batch_size must be at least 1, not {config.batch_size}.")
        if config.workers < 0:
            raise UsageError(f"data.workers must be 0 or more, not {config.workers}.")
        self.config = config
        self.tokenizer = tokenizer
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.start_token_id = start_token_id
        self.end_token_id = end_token_id
        self.samples_seen = samples_seen
        self._ranks = (world_size, rank)
        self._progress = progress

    # -- text and tokens, each computed once on first use

    @cached_property
    def corpus(self) -> Corpus:
        """The distinct documents of the source."""
        return read_corpus(self.config)

    @cached_property
    def _split(self) -> tuple[list[Document], list[Document]]:
        return split_documents(self.corpus.documents, self.config)

    @property
    def train_documents(self) -> list[Document]:
        """Documents trained on, in the order of the source."""
        return self._split[0]

    @property
    def validation_documents(self) -> list[Document]:
        """Documents held out, in the order of the source."""
        return self._split[1]

    def _tokenise(self, documents: list[Document]) -> Tokenised:
        return tokenise(documents, self.tokenizer, self.tokenizer_fingerprint, progress=self._progress)

    @cached_property
    def train_tokens(self) -> Tokenised:
        """Tokens of the training documents."""
        return self._tokenise(self.train_documents)

    @cached_property
    def validation_tokens(self) -> Tokenised:
        """Tokens of the validation documents."""
        return self._tokenise(self.validation_documents)

    @cached_property
    def stream(self) -> PackedStream:
        """The packed training windows."""
        return PackedStream(
            self.train_tokens,
            sequence_length=self.config.sequence_length,
            start_token_id=self.start_token_id,
            end_token_id=self.end_token_id,
            seed=self.config.seed,
            splice=self.config.splice,
            splice_length=self.config.splice_length,
            own=self.config.own,
        )

    def evaluation_windows(
        self, *, tokens: int | None = None, windows_per_document: int | None = None, seed: int = 0
    ) -> EvaluationWindows:
        """Windows of validation documents, at least `tokens` predicted tokens (None: all documents)."""
        return evaluation_windows(
            self.validation_documents,
            self.validation_tokens,
            sequence_length=self.config.sequence_length,
            start_token_id=self.start_token_id,
            end_token_id=self.end_token_id,
            tokens=tokens,
            windows_per_document=windows_per_document,
            seed=seed,
        )

    @cached_property
    def _validation(self) -> EvaluationWindows:
        return self.evaluation_windows(seed=self.config.seed)

    # -- identity and counts

    @cached_property
    def _fingerprint(self) -> dict[str, str]:
        # A validation score depends on no order, so neither does the identity of what was measured.
        by_key = sorted(self.validation_documents, key=lambda document: document.key)
        return {"train": texts_fingerprint(self.train_documents), "validation": texts_fingerprint(by_key)}

    def fingerprint(self) -> dict[str, str]:
        """Return the sha256 over the texts of `train` (in order) and of `validation` (in any order)."""
        return dict(self._fingerprint)

    def statistics(self) -> dict[str, int]:
        """Return counts: documents, duplicates, skipped, and tokens, bytes and windows of both splits."""
        counts = {
            "documents": len(self.corpus.documents),
            "duplicates": self.corpus.duplicates,
            "skipped": self.corpus.skipped,
        }
        for name, tokens, windows in (
            ("train", self.train_tokens, self.stream.windows),
            ("validation", self.validation_tokens, len(self._validation)),
        ):
            counts |= {
                f"{name}_documents": len(tokens),
                f"{name}_tokens": len(tokens.tokens),
                f"{name}_bytes": int(tokens.token_bytes.sum()),
                f"{name}_windows": windows,
            }
        return counts

    # -- Lightning

    def prepare_data(self) -> None:
        """Fill the caches; Lightning calls this on one process per node."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Read and check everything now instead of on first use. Calling it again costs nothing."""
        _ = self.stream, self._validation

    def _world(self) -> tuple[int, int]:
        return self._ranks if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _loader(self, batches: IterableDataset, *, workers: int) -> DataLoader:
        # Batches come ready-made (batch_size=None). A dataset without a length keeps Lightning from swapping in
        # a sampler of its own, which would break the order.
        return DataLoader(
            batches,
            batch_size=None,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )

    def train_dataloader(self) -> DataLoader:
        """Return the endless loader of this rank, starting after `samples_seen` samples of the run."""
        world_size, rank = self._world()
        plan = {"start": self.samples_seen, "batch_size": self.config.batch_size}
        batches = _TrainBatches(self.stream, **plan, rank=rank, world_size=world_size)
        return self._loader(batches, workers=self.config.workers)

    def val_dataloader(self) -> DataLoader:
        """Return this rank's share of all validation windows, documents in a fixed shuffled order.

        Raises:
            UsageError: fewer windows than processes.
        """
        world_size, rank = self._world()
        if len(self._validation) < world_size:
            raise UsageError(
                f"{len(self._validation)} validation windows cannot be shared by {world_size} processes. "
                "Raise data.validation_fraction or lower data.sequence_length."
            )
        batches = _EvaluationBatches(
            self._validation, batch_size=self.config.batch_size, rank=rank, world_size=world_size
        )
        return self._loader(batches, workers=0)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a `Batch` (overlapping with computation when it is pinned)."""
        if isinstance(batch, Batch):
            return batch.to(device, non_blocking=device.type == "cuda")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)
