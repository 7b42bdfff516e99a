"""The schema: written files read back equal; anything else is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from dihal.errors import UsageError
from dihal.evaluation.result import read_result, write_result
from tests.unit.evaluation.kit import demo_results, make_result, text


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "row.json"
    write_result(path, make_result("row", {1: 0.1, 4: 0.2}, error={1: 0.1, 4: 0.2}, texts={1: text(40.0, 3.0)}))
    return path


def edit(path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("index", range(len(demo_results())))
def test_a_result_reads_back_equal(tmp_path, index):
    result = demo_results()[index]
    write_result(tmp_path / "r.json", result)
    assert read_result(tmp_path / "r.json") == result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("cost"), "missing field 'cost'"),
        (lambda d: d["comparable"].pop("budget"), "comparable: missing field 'budget'"),
        (lambda d: d.update(comment="mine"), "unknown field 'comment'"),
        (lambda d: d["metrics"]["1"]["kl"].update(note=1), r"metrics.1.kl: unknown field 'note'"),
        (lambda d: d["metrics"]["1"].pop("kl"), r"metrics.1: missing field 'kl'"),
        (lambda d: d["metrics"]["1"].update(kll=d["metrics"]["1"]["kl"]), r"metrics.1: unknown field 'kll'"),
        (lambda d: d["metrics"]["1"]["kl"].update(value="low"), r"metrics.1.kl.value: expected a number, found 'low'"),
        (lambda d: d.update(split=True), "split: expected a whole number, found True"),
        (lambda d: d.update(split=2.5), "split: expected a whole number, found 2.5"),
        (lambda d: d.update(documents="d1"), "documents: expected a list"),
        (lambda d: d.update(metrics={}), "metrics is empty"),
        (lambda d: d["metrics"].update({"one": d["metrics"]["1"]}), "'one' is not a number of steps"),
        (lambda d: d["per_document"]["1"]["kl"].pop(), "23 numbers for 24 documents"),
        (lambda d: d["per_document"]["1"].pop("kl"), "per_document.1: missing field 'kl'"),
        (lambda d: d["per_document"]["1"]["kl"].__setitem__(0, None), r"per_document.1.kl\[0\]: expected a number"),
        (lambda d: d.update(kind="winner"), "kind 'winner' is none of"),
        (lambda d: d.update(schema="dihal.result/1"), "schema is 'dihal.result/1', this version reads"),
        (lambda d: d["cost"].pop("train_flops"), "cost: missing field 'train_flops'"),
        (lambda d: d["cost"].update(train_flops={"coffee": 1.0}), "cost.train_flops: unknown part 'coffee'"),
        (lambda d: d["comparable"].update(budget="b1"), "comparable.budget: expected an object"),
        (lambda d: d.update(schema="other"), "not a DiHAL result"),
        (lambda d: d["text"]["1"].pop("scorer"), r"text.1: missing field 'scorer'"),
    ],
)
def test_every_breach_is_named(file, change, message):
    edit(file, change)
    with pytest.raises(UsageError, match=message) as caught:
        read_result(file)
    assert str(file) in str(caught.value), "the message names the file"


def test_truncated_and_missing_files(file, tmp_path):
    file.write_text(file.read_text()[:500])
    with pytest.raises(UsageError, match="not valid JSON"):
        read_result(file)
    with pytest.raises(UsageError, match="no file"):
        read_result(tmp_path / "absent.json")


def test_a_bad_result_is_not_written(tmp_path):
    path = tmp_path / "r.json"
    good = make_result("row", {1: 0.1})
    write_result(path, good)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="kind"):
        write_result(path, dataclasses.replace(good, kind="winner"))
    broken = dataclasses.replace(good, per_document={"1": {**good.per_document["1"], "kl": [math.inf] * 24}})
    with pytest.raises(UsageError, match=r"per_document.1.kl"):
        write_result(path, broken)
    assert path.read_bytes() == before
