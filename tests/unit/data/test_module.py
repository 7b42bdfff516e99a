from __future__ import annotations

import dataclasses
import itertools
import json

import lightning as L
import pytest
import torch

from dihal.config import DataConfig
from dihal.data import Batch
from dihal.data.module import TextDataModule
from dihal.errors import UsageError


@pytest.fixture
def make(tokenizer, corpus_file):
    def build(*, samples_seen=0, world_size=1, rank=0, **options):
        options = {"source": str(corpus_file), "sequence_length": 16, "validation_fraction": 0.3, **options}
        return TextDataModule(
            DataConfig(**options),
            tokenizer=tokenizer,
            tokenizer_fingerprint="tiny",
            start_token_id=0,
            end_token_id=1,
            samples_seen=samples_seen,
            world_size=world_size,
            rank=rank,
        )

    return build


def _take(module, n):
    return list(itertools.islice(module.train_dataloader(), n))


TENSORS = [f.name for f in dataclasses.fields(Batch) if f.name != "full"]


def _same(a: Batch, b: Batch):
    return a.full == b.full and all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)


def _cat(batches):
    return Batch(full=True, **{name: torch.cat([getattr(b, name) for b in batches]) for name in TENSORS})


def test_two_modules_give_the_same_batches(make):
    assert all(map(_same, _take(make(), 5), _take(make(), 5)))
    assert not _same(_take(make(), 1)[0], _take(make(seed=1), 1)[0])


def test_resume_continues_exactly(make):
    module = make(batch_size=4)
    windows = module.stream.windows
    n = windows // 4 + 3  # across an epoch boundary
    whole = _take(module, n)
    for seen in (4, 4 * (n // 2)):
        rest = _take(make(batch_size=4, samples_seen=seen), n - seen // 4)
        assert all(map(_same, whole[seen // 4 :], rest))
    module.samples_seen = 8
    assert _same(_take(module, 1)[0], whole[2])


@pytest.mark.parametrize("world", [2, 4])
def test_equal_global_batch_on_any_number_of_processes(make, world):
    one = _take(make(batch_size=8), 6)
    ranks = [_take(make(batch_size=8 // world, world_size=world, rank=r), 6) for r in range(world)]
    for step, expected in enumerate(one):
        assert _same(_cat([rank[step] for rank in ranks]), expected)


def test_loader_workers_change_nothing(make):
    assert all(map(_same, _take(make(workers=2), 7), _take(make(), 7)))


def test_train_and_validation_share_no_document(make):
    module = make()
    train = {document.key for document in module.train_documents}
    validation = {document.key for document in module.validation_documents}
    assert train
    assert validation
    assert not train & validation
    assert len(train) + len(validation) == 30


def test_validation_loader_goes_over_all_windows_once(make):
    module = make(batch_size=4)
    batches = list(module.val_dataloader())
    ids = torch.cat([b.sample_ids for b in batches])
    assert ids.tolist() == list(range(len(module.evaluation_windows(seed=0))))
    assert all(map(_same, batches, list(module.val_dataloader())))
    with pytest.raises(UsageError, match="cannot be shared by 10000"):
        make(world_size=10_000).val_dataloader()


def test_statistics_and_fingerprint(make, corpus_file):
    module = make()
    counts = module.statistics()
    assert counts["documents"] == counts["train_documents"] + counts["validation_documents"] == 30
    size = sum(len(json.loads(line)["text"].encode()) for line in corpus_file.read_text().splitlines())
    assert counts["train_bytes"] + counts["validation_bytes"] == size
    assert counts["train_windows"] == (counts["train_tokens"] + counts["train_documents"]) // 15
    assert (counts["duplicates"], counts["skipped"]) == (0, 0)
    assert make().fingerprint() == module.fingerprint()
    assert set(module.fingerprint()) == {"train", "validation"}
    # another sequence length is the same text
    assert make(sequence_length=8).fingerprint() == module.fingerprint()
    lines = corpus_file.read_text().splitlines(keepends=True)
    corpus_file.write_text("".join(lines[::-1]))
    turned = make().fingerprint()
    assert turned["validation"] == module.fingerprint()["validation"]
    assert turned["train"] != module.fingerprint()["train"]


def test_prepare_and_setup_are_idempotent(make):
    module = make()
    module.prepare_data()
    first = module.stream
    module.setup("fit")
    module.setup("validate")
    assert module.stream is first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"workers": -1}, "workers"),
        ({"sequence_length": 1}, "at least 2"),
        ({"sequence_length": 100_000}, "one sequence needs 99999"),
    ],
)
def test_bad_option(make, options, message):
    with pytest.raises(UsageError, match=message):
        make(**options).setup()


def test_batch_moves_and_counts(make):
    (batch,) = _take(make(batch_size=3), 1)
    assert len(batch) == 3
    moved = batch.to("meta")
    assert moved.input_ids.device.type == "meta"
    assert isinstance(make().transfer_batch_to_device(batch, torch.device("cpu"), 0), Batch)


class _Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_index):
        self.trained.append(batch.sample_ids.tolist())
        return self.weight * batch.loss_mask.sum()

    def validation_step(self, batch, batch_index):
        self.validated.append(batch.sample_ids.tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_trains_on_the_endless_stream_and_resumes(make, tmp_path):
    for seen in (0, 12):
        recorder, data = _Recorder(), make(batch_size=4, samples_seen=seen)
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=5,
            max_epochs=-1,
            val_check_interval=5,
            check_val_every_n_epoch=None,
            limit_val_batches=2,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(recorder, datamodule=data)
        assert recorder.trained == [list(range(seen + 4 * m, seen + 4 * m + 4)) for m in range(5)]
        assert recorder.validated == [[0, 1, 2, 3], [4, 5, 6, 7]]
