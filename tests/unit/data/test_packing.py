from __future__ import annotations

import numpy as np
import pytest
import torch

from dihal.data import Document
from dihal.data.packing import PackedStream, evaluation_windows
from dihal.data.text import document_key
from dihal.data.tokens import Tokenised, tokenise
from dihal.errors import UsageError

START, END = 900, 901


def _tokenised(lengths, seed=0):
    """Documents whose tokens are all different: document i holds 1000 i, 1000 i + 1, ..."""
    tokens = np.concatenate([1000 * (i + 1) + np.arange(n) for i, n in enumerate(lengths)]).astype(np.uint32)
    return Tokenised(tokens, np.cumsum(lengths), np.ones(len(tokens), dtype=np.uint32))


def _stream(lengths=(5, 17, 3, 30, 8), sequence_length=9, start=START, end=END, seed=0):
    return PackedStream(
        _tokenised(lengths), sequence_length=sequence_length, start_token_id=start, end_token_id=end, seed=seed
    )


def _epoch(stream, epoch=0):
    return stream.batch(np.arange(epoch * stream.windows, (epoch + 1) * stream.windows))


@pytest.mark.parametrize("start", [START, None])
@pytest.mark.parametrize("end", [END, None])
def test_each_token_once_per_epoch_but_for_less_than_a_window(start, end):
    stream = _stream(start=start, end=end)
    left_out = []
    for epoch in range(6):
        epochs = np.full(stream.windows, epoch)
        places = stream.positions(epochs, np.arange(stream.windows)).ravel()
        assert len(set(places.tolist())) == len(places)
        assert len(stream) - len(places) < stream.body
        left_out.append(frozenset(range(len(stream))) - frozenset(places.tolist()))
        batch = _epoch(stream, epoch)
        body = batch.input_ids[:, 1:] if start is not None else batch.input_ids
        # the shuffled batches hold the same tokens as the windows in order
        assert sorted(body.ravel().tolist()) == sorted(stream._tokens[places].tolist())
    # lengths add up to 63 and 68: a remainder in each case but (None, None), 63 = 7 windows of 9
    assert (len(set(left_out)) > 1) == (len(stream) % stream.body > 0)


def test_windows_are_cut_elsewhere_in_each_epoch():
    stream = _stream()
    cuts = [frozenset(_epoch(stream, epoch).input_ids[:, 1].tolist()) for epoch in range(8)]
    assert len(set(cuts)) > 4


def test_window_starts_with_the_start_token_and_holds_adjacent_tokens():
    stream = _stream()
    batch = _epoch(stream)
    assert batch.input_ids.shape == (stream.windows, 9)
    assert (batch.input_ids[:, 0] == START).all()
    assert batch.attention_mask.all()
    assert batch.full
    order = stream._tokens.tolist()
    ring = order + order
    for row in batch.input_ids[:, 1:].tolist():
        assert any(ring[i : i + 8] == row for i in range(len(order)))


def test_document_ids_and_loss_mask_respect_boundaries():
    batch = _epoch(_stream())
    ids, owners, loss = (x.numpy() for x in (batch.input_ids, batch.document_ids, batch.loss_mask))
    text = ids >= 1000
    assert (owners[text] == ids[text] // 1000 - 1).all()
    assert (ids == END).any()
    for row in range(len(ids)):
        assert owners[row, 0] == owners[row, 1]
        for i in range(ids.shape[1]):
            if ids[row, i] == END and i > 1:
                assert owners[row, i] == owners[row, i - 1]  # the end token belongs to the document it ends
            expected = i + 1 < ids.shape[1] and (i == 0 or ids[row, i] != END)
            assert loss[row, i] == expected
    same = owners[:, 1:] == owners[:, :-1]
    assert same[loss[:, :-1]].all()


def test_without_end_token_the_last_token_of_a_document_predicts_nothing():
    batch = _epoch(_stream(end=None))
    same = batch.document_ids[:, 1:] == batch.document_ids[:, :-1]
    assert torch.equal(batch.loss_mask[:, :-1], same)
    assert not batch.loss_mask[:, -1].any()


def test_the_ring_closes_with_a_boundary_even_on_one_document():
    stream = _stream(lengths=(10,), sequence_length=6)
    for epoch in range(20):
        batch = _epoch(stream, epoch)
        ends = batch.input_ids == END
        assert not batch.loss_mask[ends].any()
        assert batch.loss_mask[:, 0].all()


def test_batch_is_a_function_of_the_sample_ids():
    stream = _stream()
    whole = stream.batch(np.arange(40))
    some = np.array([39, 3, 3, 20])
    part = stream.batch(some)
    for name in ("input_ids", "document_ids", "loss_mask"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[some])
    assert part.sample_ids.tolist() == some.tolist()
    assert not torch.equal(whole.input_ids, _stream(seed=1).batch(np.arange(40)).input_ids)


def test_text_shorter_than_a_sequence():
    with pytest.raises(UsageError, match="7 tokens, one sequence needs 63"):
        _stream(lengths=(6,), sequence_length=64)
    assert _stream(lengths=(6,), sequence_length=8).windows == 1


def test_sequence_length_below_two():
    with pytest.raises(UsageError, match="at least 2"):
        _stream(sequence_length=1)


# -- evaluation


def _documents(n):
    return [Document(f"text {i}", None, document_key(f"text {i}")) for i in range(n)]


def _windows(lengths=(5, 17, 3, 30, 8), start=START, **options):
    options = {"sequence_length": 9, "end_token_id": END, **options}
    return evaluation_windows(_documents(len(lengths)), _tokenised(lengths), start_token_id=start, **options)


@pytest.mark.parametrize("start", [START, None])
def test_evaluation_windows_hold_one_document_and_predict_its_tokens_once(start):
    lengths = (5, 17, 3, 30, 8, 1)
    windows = _windows(lengths, start=start)
    predicted = []
    for ids, owners, real, loss in zip(
        windows.input_ids, windows.document_ids, windows.attention_mask, windows.loss_mask
    ):
        assert len(set(owners[real].tolist())) == 1
        assert (owners[~real] == -1).all()
        length = int(real.sum())
        assert real[:length].all()  # padding on the right only
        assert loss.tolist() == [i < length - 1 for i in range(9)]
        if start is not None:
            assert ids[0] == START
        predicted += ids[1:][loss[:-1]].tolist()
    assert len(set(predicted)) == len(predicted)
    everything = set(_tokenised(lengths).tokens.tolist())
    if start is not None:
        assert set(predicted) == everything
    else:
        assert set(predicted) < everything
    assert sum(document.tokens for document in windows.documents) == len(predicted)


def test_documents_are_drawn_whole_until_enough_tokens():
    lengths = (20,) * 12
    few = _windows(lengths, tokens=50, seed=3)
    assert [document.tokens for document in few.documents] == [20, 20, 20]
    assert len(_windows(lengths, tokens=60, seed=3).documents) == 3
    more = _windows(lengths, tokens=100, seed=3)
    assert more.documents[:3] == few.documents
    assert torch.equal(more.input_ids[: len(few)], few.input_ids)
    assert {d.index for d in few.documents} == {int(i) for i in few.document_ids.unique() if i >= 0}
    draws = {tuple(d.key for d in _windows(lengths, tokens=50, seed=s).documents) for s in range(5)}
    assert len(draws) > 1
    assert len(_windows(lengths, tokens=10**9).documents) == 12


def test_draw_depends_on_no_order_of_the_source(tokenizer):
    texts = [f"document number {i} with some text" for i in range(20)]
    keys = []
    for some in (texts, texts[::-1]):
        documents = [Document(text, None, document_key(text)) for text in some]
        done = evaluation_windows(
            documents,
            tokenise(documents, tokenizer, "t"),
            sequence_length=8,
            start_token_id=0,
            end_token_id=1,
            tokens=60,
        )
        keys.append([(document.key, document.tokens, document.bytes) for document in done.documents])
    assert keys[0] == keys[1]


@pytest.mark.parametrize("start", [0, None])
def test_predicted_bytes_are_exact(tokenizer, start):
    texts = ["日本語 🙂 naïve café, the fox " * 4, "plain text, the quick brown fox", "ééééééé 🙂🙂🙂🙂"]
    documents = [Document(text, None, document_key(text)) for text in texts]
    done = evaluation_windows(
        documents, tokenise(documents, tokenizer, "t"), sequence_length=7, start_token_id=start, end_token_id=1
    )
    assert not done.predicted_bytes[~done.loss_mask].any()
    for document in done.documents:
        rows = (done.document_ids == document.index).any(dim=1)
        assert int(done.predicted_bytes[rows].sum()) == document.bytes
        if start is not None:
            assert document.bytes == len(texts[document.index].encode())
        else:
            assert 0 < document.bytes < len(texts[document.index].encode())


def test_nothing_to_predict():
    with pytest.raises(UsageError, match="nothing to predict"):
        _windows((1, 1), start=None)
    with pytest.raises(UsageError, match="at least 1"):
        _windows(tokens=0)


def test_batches_share_windows_evenly():
    windows = _windows((20,) * 7)  # 21 windows, every third padded
    assert [windows.select(torch.tensor(rows)).full for rows in ([0, 1], [1, 2])] == [True, False]
    assert [len(b) for b in windows.batches(8)] == [8, 8, 5]
    shares = [[int(i) for b in windows.batches(4, rank=r, world_size=2) for i in b.sample_ids] for r in range(2)]
    assert [len(share) for share in shares] == [10, 10]
    assert sorted(shares[0] + shares[1]) == list(range(20))
    # round m of two ranks with batch 4 is round m of one rank with batch 8
    assert sorted(shares[0][:4] + shares[1][:4]) == next(iter(windows.batches(8))).sample_ids.tolist()


def test_few_windows_of_many_documents():
    lengths = (50, 17, 3, 60, 80)
    everything, few = _windows(lengths), _windows(lengths, windows_per_document=2)
    assert len(few) < len(everything)
    assert {d.key for d in few.documents} == {d.key for d in everything.documents}
    assert max(d.tokens for d in few.documents) == 2 * max(int(m.sum()) for m in few.loss_mask)
    assert int(few.predicted_bytes.sum()) == sum(d.bytes for d in few.documents)
    with pytest.raises(UsageError, match="at least 1"):
        _windows(lengths, windows_per_document=0)


def test_spliced_windows_are_spans_of_text_keyed_by_sample():
    lengths = (40, 170, 90, 300)
    options = {"sequence_length": 60, "start_token_id": START, "end_token_id": END, "seed": 3}
    plain = PackedStream(_tokenised(lengths), **options)
    stream = PackedStream(_tokenised(lengths), **options, splice=1.0, splice_length=8)
    some = stream.batch(np.array([4, 0, 7]))
    again = stream.batch(np.array([7]))
    assert torch.equal(some.input_ids[2], again.input_ids[0])
    assert not torch.equal(some.input_ids, plain.batch(np.array([4, 0, 7])).input_ids)
    # A position counts exactly where the next token continues the same document.
    ids = some.input_ids[:, 1:]
    continues = (ids[:, 1:] == ids[:, :-1] + 1) | ((ids[:, 1:] == END) & (ids[:, :-1] != END))
    counted = some.loss_mask[:, 1:-1]
    assert bool((continues | ~counted).all())
    assert 0.7 < counted.float().mean() < 0.95  # spans of about 8 tokens
    half = PackedStream(_tokenised(lengths), **options, splice=0.5, splice_length=8).batch(np.arange(64))
    same = (half.input_ids == plain.batch(np.arange(64)).input_ids).all(1)
    assert 16 < int(same.sum()) < 48


def test_splice_out_of_range_is_refused():
    with pytest.raises(UsageError, match=r"data\.splice"):
        PackedStream(_tokenised((50,)), sequence_length=9, start_token_id=START, end_token_id=END, seed=0, splice=1.5)


def test_own_text_replaces_a_share_of_the_sequences_and_leaves_the_others() -> None:
    tokens = np.arange(1000, dtype=np.uint32)
    documents = Tokenised(tokens=tokens, ends=np.array([1000]), token_bytes=np.ones(1000, dtype=np.uint32))
    options = {"sequence_length": 20, "start_token_id": 5000, "end_token_id": None, "seed": 3}
    plain, mixed = PackedStream(documents, **options), PackedStream(documents, **options, own=0.4)
    mixed.own_spans = (10_000 + np.arange(700, dtype=np.uint32)).reshape(100, 7)
    samples = np.arange(400)
    batch, reference = mixed.batch(samples), plain.batch(samples)
    own = batch.input_ids[:, 1] >= 10_000
    assert 120 < int(own.sum()) < 200
    assert torch.equal(batch.input_ids[~own], reference.input_ids[~own])
    assert torch.equal(batch.loss_mask[~own], reference.loss_mask[~own])
    ids = batch.input_ids[own][:, 1:]
    assert bool((ids >= 10_000).all())
    starts = ids[:, ::7]
    assert bool(((starts - 10_000) % 7 == 0).all())
    inner = batch.loss_mask[own][:, 1:-1]
    assert torch.equal(inner, (ids[:, 1:] == ids[:, :-1] + 1) & ((ids[:, 1:] - 10_000) % 7 != 0))
    assert not bool(batch.loss_mask[own][:, -1].any())
    assert torch.equal(mixed.batch(samples[7:9]).input_ids, batch.input_ids[7:9])
