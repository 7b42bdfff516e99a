from __future__ import annotations

import gzip
import importlib.util
import json
import sys

import pytest

from dihal.config import DataConfig
from dihal.data.text import document_key, read_corpus, read_documents, split_documents, texts_fingerprint
from dihal.errors import UsageError

LONG = "some text that is long enough"


def _jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def _read(source, **options):
    return read_documents(DataConfig(source=str(source), **options))


# -- formats


def test_jsonl_gzip_parquet_and_text_agree(tmp_path):
    import pyarrow
    import pyarrow.parquet

    records = [{"text": f"{LONG} number {i} — naïve 日本", "origin": "a"} for i in range(5)]
    plain = _jsonl(tmp_path / "a.jsonl", records)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), table)
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, record in enumerate(records):
        (folder / f"{i}.txt").write_text(record["text"], encoding="utf-8")
    expected = [record["text"] for record in records]
    for source in (plain, packed, table, folder):
        assert [document.text for document in _read(source)] == expected, source


def test_folder_is_mixed_sorted_and_recursive(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_text(LONG + " from b", encoding="utf-8")
    _jsonl(tmp_path / "a.jsonl", [{"text": LONG + " from a", "folder": "records"}])
    (tmp_path / "image.png").write_bytes(b"\0\1")
    (tmp_path / ".hidden.txt").write_text(LONG + " hidden", encoding="utf-8")
    documents = _read(tmp_path, group_field="folder")
    assert [(d.text[-6:], d.group) for d in documents] == [("from a", "records"), ("from b", "b")]


def test_byte_order_mark_is_dropped_and_blank_lines_are_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": LONG}).encode() + b"\n\n  \n")
    assert [document.text for document in _read(path)] == [LONG]


def test_local_data_set_through_datasets(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    _jsonl(tmp_path / "train.jsonl", [{"text": f"{LONG} {i}"} for i in range(3)])
    # streaming (max_documents) avoids writing into the shared datasets cache
    assert len(_read(f"hf:{tmp_path}", max_documents=2)) == 2


def test_max_documents_takes_the_first(tmp_path):
    source = _jsonl(tmp_path / "a.jsonl", [{"text": f"{LONG} {i}"} for i in range(5)])
    assert [document.text[-1] for document in _read(source, max_documents=2)] == ["0", "1"]


def test_near_empty_and_null_documents_are_skipped_and_counted(tmp_path):
    source = _jsonl(tmp_path / "a.jsonl", [{"text": "  x  "}, {"text": None}, {"text": LONG}, {"text": ""}])
    corpus = read_corpus(DataConfig(source=source))
    assert (len(corpus.documents), corpus.skipped) == (1, 3)


# -- keys, duplicates, split


def test_keys_and_split_do_not_depend_on_order(tmp_path):
    records = [{"text": f"{LONG} {i}"} for i in range(200)]
    split = {}
    for name, some in (("a", records), ("b", records[::-1]), ("c", records[:100])):
        config = DataConfig(source=_jsonl(tmp_path / f"{name}.jsonl", some), validation_fraction=0.3)
        train, validation = split_documents(read_documents(config), config)
        split[name] = ({d.key for d in train}, {d.key for d in validation})
    assert split["a"] == split["b"]
    assert split["c"][0] <= split["a"][0]
    assert split["c"][1] <= split["a"][1]
    # binomial(200, 0.3): five standard deviations
    assert abs(len(split["a"][1]) - 60) < 33


def test_duplicates_are_dropped_and_counted(tmp_path):
    source = _jsonl(tmp_path / "a.jsonl", [{"text": LONG}, {"text": LONG + " b"}, {"text": LONG}])
    corpus = read_corpus(DataConfig(source=source))
    assert [document.text for document in corpus.documents] == [LONG, LONG + " b"]
    assert corpus.duplicates == 1


def test_copy_in_a_holdout_group_is_never_trained_on(tmp_path):
    records = [{"text": LONG, "g": "train"}, {"text": LONG + " b", "g": "train"}, {"text": LONG, "g": "held"}]
    config = DataConfig(source=_jsonl(tmp_path / "a.jsonl", records), group_field="g", holdout_groups=("held",))
    train, validation = split_documents(read_documents(config), config)
    assert [document.text for document in train] == [LONG + " b"]
    assert [document.text for document in validation] == [LONG]


def test_holdout_groups_and_number_groups(tmp_path):
    records = [{"text": f"{LONG} {i}", "g": i % 3} for i in range(9)]
    config = DataConfig(source=_jsonl(tmp_path / "a.jsonl", records), group_field="g", holdout_groups=("2",))
    train, validation = split_documents(read_documents(config), config)
    assert {document.group for document in train} == {"0", "1"}
    assert {document.group for document in validation} == {"2"}
    assert len(validation) == 3


def test_fingerprint_sees_text_order_and_boundaries():
    from dihal.data import Document

    def of(*texts):
        return texts_fingerprint([Document(text, None, document_key(text)) for text in texts])

    assert of("ab", "c") == of("ab", "c")
    assert len({of("ab", "c"), of("a", "bc"), of("c", "ab"), of("abc"), of("ab", "d")}) == 5


# -- bad input


def _truncated(path):
    path.write_bytes(gzip.compress(b'{"text": "' + bytes(range(65, 91)) * 400 + b'"}\n')[:60])


def _bad_files():
    return {
        "missing": ("no.jsonl", None, "no file or folder"),
        "empty": ("a.txt", lambda p: p.write_bytes(b""), "is empty"),
        "empty_gzip_member": ("a.jsonl.gz", lambda p: p.write_bytes(gzip.compress(b"")), "holds no text"),
        "only_short_text": ("a.txt", lambda p: p.write_text(" hi\n"), "holds no text"),
        "nul": ("a.txt", lambda p: p.write_bytes(b"text\0more and more"), "binary"),
        "nul_jsonl": ("a.jsonl", lambda p: p.write_bytes(b'{"text": "abc"}\n\0\0\n'), "line 2.*binary"),
        "not_utf8": ("a.txt", lambda p: p.write_bytes(b"caf\xe9 is latin-1 text"), "not UTF-8.*byte 3"),
        "json": (
            "a.jsonl",
            lambda p: p.write_text('{"text": "fine and long"}\n{"text": \n'),
            "line 2 .*not valid JSON",
        ),
        "json_list": ("a.jsonl", lambda p: p.write_text("[1, 2]\n"), "line 1 .*is a JSON list"),
        "field": (
            "a.jsonl",
            lambda p: p.write_text('{"txt": "fine and long", "id": 3}\n'),
            "Did you mean 'txt'.*id, txt",
        ),
        "type": ("a.jsonl", lambda p: p.write_text('{"text": 3}\n'), "holds a int"),
        "surrogate": ("a.jsonl", lambda p: p.write_text('{"text": "long enough \\ud800"}\n'), "surrogate"),
        "not_gzip": ("a.jsonl.gz", lambda p: p.write_bytes(b'{"text": "not compressed"}'), "not a valid gzip"),
        "truncated": ("a.jsonl.gz", _truncated, "truncated"),
        "parquet": ("a.parquet", lambda p: p.write_bytes(b"PAR1 nothing"), "not a readable Parquet"),
        "suffix": ("a.pdf", lambda p: p.write_bytes(b"%PDF"), r"\.txt, \.jsonl"),
    }


@pytest.mark.parametrize("case", _bad_files())
def test_bad_file(case, tmp_path):
    name, write, message = _bad_files()[case]
    path = tmp_path / name
    if write is not None:
        write(path)
    with pytest.raises(UsageError, match=message):
        _read(path)


def test_folder_without_text(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UsageError, match="holds no text"):
        _read(tmp_path)


def test_parquet_without_the_field(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"texts": LONG, "id": 1}]), path)
    with pytest.raises(UsageError, match=r"Did you mean 'texts'.*id, texts"):
        _read(path)


@pytest.mark.parametrize(
    ("module", "source", "extra"), [("pyarrow", "a.parquet", "parquet"), ("datasets", "hf:name", "datasets")]
)
def test_missing_extra_names_the_extra(module, source, extra, tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf'pip install "dihal\[{extra}\]"'):
        _read(source)


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")
def test_data_set_without_network(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="network"):
        _read("hf:dihal-tests/there-is-no-such-data-set")


@pytest.mark.parametrize("source", ["hf:", "hf:a:b:c:d", ""])
def test_malformed_source(source):
    with pytest.raises(UsageError, match="hf:NAME"):
        _read(source)


def test_misspelt_pydoc():
    with pytest.raises(UsageError, match="Did you mean 'pydoc'"):
        _read("pydocs")


def test_group_field_missing_and_null(tmp_path):
    source = _jsonl(tmp_path / "a.jsonl", [{"text": LONG, "source": "x"}])
    with pytest.raises(UsageError, match=r"group_field.*Did you mean 'source'"):
        _read(source, group_field="sources")
    source = _jsonl(tmp_path / "b.jsonl", [{"text": LONG, "source": None}])
    with pytest.raises(UsageError, match="is null"):
        _read(source, group_field="source")


def test_unknown_holdout_group_lists_the_groups(tmp_path):
    records = [{"text": f"{LONG} {i}", "g": name} for i, name in enumerate(["octave", "maxima", "r"])]
    config = DataConfig(source=_jsonl(tmp_path / "a.jsonl", records), group_field="g", holdout_groups=("octav",))
    with pytest.raises(UsageError, match=r"Did you mean 'octave'.*maxima, octave, r"):
        split_documents(read_documents(config), config)


def test_unknown_holdout_group_among_many_stays_short(tmp_path):
    records = [{"text": f"{LONG} {i}", "g": f"name{i}"} for i in range(500)]
    config = DataConfig(source=_jsonl(tmp_path / "a.jsonl", records), group_field="g", holdout_groups=("nam3",))
    with pytest.raises(UsageError, match="of 500 values") as error:
        split_documents(read_documents(config), config)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout_groups": ("a",)}, "needs data.group_field"),
        ({"validation_fraction": 0.0}, "between 0 and 1"),
        ({"validation_fraction": 1.0}, "between 0 and 1"),
        ({"validation_fraction": float("nan")}, "between 0 and 1"),
        ({"max_documents": 0}, "at least 1"),
    ],
)
def test_bad_option(options, message, corpus_file):
    with pytest.raises(UsageError, match=message):
        _read(corpus_file, **options)


def test_one_split_empty_and_the_suggested_fraction_works(tmp_path):
    source = _jsonl(tmp_path / "a.jsonl", [{"text": f"{LONG} {i}"} for i in range(4)])
    for fraction, side, empty in ((1e-9, "above", "validation"), (1 - 1e-9, "below", "training")):
        config = DataConfig(source=source, validation_fraction=fraction)
        with pytest.raises(UsageError, match=f"{empty} split is empty") as error:
            split_documents(read_documents(config), config)
        bound = float(str(error.value).split(f"{side} ")[1].rstrip("."))
        better = DataConfig(source=source, validation_fraction=bound + (1e-6 if side == "above" else -1e-6))
        assert all(split_documents(read_documents(better), better))
    config = DataConfig(source=source, max_documents=1)
    with pytest.raises(UsageError, match="several documents"):
        split_documents(read_documents(config), config)


def test_all_groups_held_out(tmp_path):
    source = _jsonl(tmp_path / "a.jsonl", [{"text": LONG, "g": "a"}])
    config = DataConfig(source=source, group_field="g", holdout_groups=("a",))
    with pytest.raises(UsageError, match="training split is empty"):
        split_documents(read_documents(config), config)
