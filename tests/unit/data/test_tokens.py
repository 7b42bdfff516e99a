from __future__ import annotations

import numpy as np
import pytest

from dihal.data import Document, tokens
from dihal.data.text import document_key
from dihal.data.tokens import token_bytes, tokenise
from dihal.errors import UsageError

TEXTS = [
    "the quick brown fox",
    "日本語 🙂🙂 naïve\ttabs",
    "e\u0301 combining, é composed",
    "  leading and trailing  \n",
]


def _documents(texts=TEXTS):
    return [Document(text, None, document_key(text)) for text in texts]


def test_bytes_of_tokens_add_up_on_every_document(tokenizer):
    done = tokenise(_documents(), tokenizer, "t")
    for i, text in enumerate(TEXTS):
        assert int(done.token_bytes[done.span(i)].sum()) == len(text.encode())


def test_bytes_up_to_a_character_boundary_are_exact(tokenizer):
    text = TEXTS[1]
    (ids,) = tokenizer([text], add_special_tokens=False)["input_ids"]
    counts = tokenise(_documents([text]), tokenizer, "t").token_bytes
    assert len(ids) > len(text)  # multi-byte characters are spread over tokens here
    checked = 0
    for n in range(1, len(ids) + 1):
        prefix = tokenizer.decode(ids[:n])
        if "\ufffd" not in prefix:
            assert int(counts[:n].sum()) == len(prefix.encode())
            checked += 1
    assert checked > 8


def test_bytes_with_gaps_and_shared_spans():
    # as a tokenizer that trims spaces gives it: "é" in two tokens, a space in no token, a trailing newline in none
    assert token_bytes("é a\n", [(0, 1), (0, 1), (2, 3)]) == [2, 0, 3]
    # spans out of order, as a normaliser that swaps marks may give them: nothing counts twice, nothing below zero
    assert token_bytes("abc", [(0, 2), (0, 1), (2, 3)]) == [2, 0, 1]
    assert token_bytes("", []) == []
    assert token_bytes("x🙂", [(0, 1), (1, 2), (1, 2), (1, 2), (1, 2)]) == [1, 4, 0, 0, 0]


@pytest.mark.parametrize("code", [0x7F, 0x80, 0x7FF, 0x800, 0xFFFF, 0x10000, 0x10FFFF])
def test_bytes_at_the_edges_of_utf8(code):
    text = "a" + chr(code) + "b"
    assert token_bytes(text, [(0, 1), (1, 2), (2, 3)]) == [1, len(chr(code).encode()), 1]


def test_tokens_are_the_tokenizers_own_without_special_tokens(tokenizer):
    done = tokenise(_documents(), tokenizer, "t")
    for i, text in enumerate(TEXTS):
        assert done.tokens[done.span(i)].tolist() == tokenizer.encode(text, add_special_tokens=False)
    assert len(done) == len(TEXTS)


def test_cache_is_used_and_keyed_by_tokenizer_and_texts(tokenizer, private_cache):
    first = tokenise(_documents(), tokenizer, "t")

    class Refuses:
        is_fast = True

        def __call__(self, *args, **options):
            raise AssertionError("tokenised again")

    again = tokenise(_documents(), Refuses(), "t")
    assert np.array_equal(again.tokens, first.tokens)
    assert np.array_equal(again.ends, first.ends)
    assert np.array_equal(again.token_bytes, first.token_bytes)
    for documents, name in ((_documents(), "other"), (_documents(TEXTS[:3]), "t"), (_documents(TEXTS[::-1]), "t")):
        with pytest.raises(AssertionError, match="again"):
            tokenise(documents, Refuses(), name)


def test_damaged_cache_is_made_again(tokenizer, private_cache, caplog):
    first = tokenise(_documents(), tokenizer, "t")
    (target,) = (private_cache / "tokens").glob("*.safetensors")
    whole = target.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 4
    for damage in (bytes(flipped), whole[:-5], b""):
        target.write_bytes(damage)
        caplog.clear()
        assert np.array_equal(tokenise(_documents(), tokenizer, "t").tokens, first.tokens)
        assert "damaged" in caplog.text
        assert target.read_bytes() == whole


def test_batches_do_not_change_the_result(tokenizer, monkeypatch):
    whole = tokenise(_documents(), tokenizer, "a")
    monkeypatch.setattr(tokens, "_BATCH_CHARACTERS", 5)
    pieces = tokenise(_documents(), tokenizer, "b", progress=True)
    assert np.array_equal(whole.tokens, pieces.tokens)
    assert np.array_equal(whole.ends, pieces.ends)


def test_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UsageError, match="slow tokenizer"):
        tokenise(_documents(), Slow(), "t")
