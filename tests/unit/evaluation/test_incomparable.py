"""Pairs of rows that must not share a table: each refused, the field named, with both values and both files."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dihal.config import BudgetConfig, LeaderboardConfig
from dihal.errors import UsageError
from dihal.evaluation.leaderboard import leaderboard
from dihal.evaluation.result import TEXT_FACTS, Result, facts, write_result
from tests.unit.evaluation.kit import TRAINING, budget_terms, make_result, text

BUDGET = budget_terms("shared")


def trained(name: str, *, seed: int = 1, **changes: Any) -> Result:
    texts = {1: dataclasses.replace(text(40.0, 3.0), **changes.pop("text", {}))}
    fields = {"budget": BUDGET, "training": TRAINING, **changes}
    return make_result(name, {1: 0.1}, texts=texts, seed=seed, parameters=10**6, **fields)


def budget(**changes: Any) -> dict[str, Any]:
    return {"budget": dataclasses.replace(BUDGET, **changes)}


def training(**changes: Any) -> dict[str, Any]:
    return {"training": dataclasses.replace(TRAINING, **changes)}


def of_result(**changes: Any) -> Any:
    return lambda name: dataclasses.replace(trained(name, seed=2), **changes)


# field named, what the second row has, the two values, and the metric that ranks
PAIRS: list[tuple[str, Any, tuple[Any, Any], str]] = [
    ("metric_version", {"metric_version": "0"}, ("1", "0"), "kl"),
    ("score_type", {"score_type": "likelihood_bound"}, ("teacher_forced", "likelihood_bound"), "nll"),
    ("score_type", {"score_type": "generated"}, ("teacher_forced", "generated"), "nll"),
    ("regime", of_result(regime="generate"), ("replace", "generate"), "kl"),
    ("tokenizer_fingerprint", {"tokenizer_fingerprint": "gpt2"}, ("tok", "gpt2"), "bits_per_byte"),
    ("backbone_fingerprint", {"backbone_fingerprint": "360m"}, ("bb", "360m"), "kl"),
    ("sequence_length", {"sequence_length": 512}, (256, 512), "nll"),
    ("tokens", {"tokens": 4096}, (8192, 4096), "kl"),
    ("data_fingerprint", {"data_fingerprint": "other"}, ("data", "other"), "kl"),
    ("budget.name", budget(name="long"), ("shared", "long"), "kl"),
    ("budget.tokens", budget(tokens=60_000_000), (30_000_000, 60_000_000), "kl"),
    ("budget.seconds", budget(seconds=600.0), (None, 600.0), "kl"),
    ("budget.flops", budget(flops=1e17), (None, 1e17), "kl"),
    ("budget.hardware", budget(hardware="8 x NVIDIA H200"), (None, "8 x NVIDIA H200"), "kl"),
    ("training.data_fingerprint", training(data_fingerprint="pydoc"), ("text", "pydoc"), "kl"),
    ("training.sequence_length", training(sequence_length=128), (256, 128), "kl"),
    ("training.seed", training(seed=1), (0, 1), "kl"),
    ("training.splice", training(splice=0.5), (0.0, 0.5), "kl"),
    ("training.splice_length", training(splice_length=8), (32, 8), "kl"),
    ("confidence", of_result(confidence=0.9), (0.95, 0.9), "kl"),
    ("bootstrap", of_result(bootstrap=100), (300, 100), "kl"),
    ("bootstrap_seed", of_result(bootstrap_seed=7), (0, 7), "kl"),
    ("text.scorer", {"text": {"scorer": "gpt2-large"}}, ("embedded", "gpt2-large"), "generative_perplexity"),
    ("text.samples", {"text": {"samples": 1024}}, (16, 1024), "entropy"),
    ("text.prompt_tokens", {"text": {"prompt_tokens": 8}}, (32, 8), "generative_nll"),
    ("text.new_tokens", {"text": {"new_tokens": 96}}, (32, 96), "degenerate_rate"),
    (
        "provenance.hardware",
        of_result(provenance={"hardware": {"gpus": ["NVIDIA H200"]}}),
        ({"cpus": 2, "gpus": []}, {"gpus": ["NVIDIA H200"]}),
        "tokens_per_second",
    ),
    ("text.temperature", {"text": {"temperature": 0.5}}, (1.0, 0.5), "generative_nll"),
]


def second(change: Any) -> Result:
    return change("two") if callable(change) else trained("two", seed=2, **change)


def test_the_list_is_long_and_complete() -> None:
    named = {field for field, *_ in PAIRS}
    assert len(PAIRS) >= 20
    assert named == set(facts(trained("one"))) | {
        "provenance.hardware",
        *(f"text.{name}" for name in TEXT_FACTS),
    }


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}:{pair[2][1]}")
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["", "reversed"])
def test_a_pair_is_refused(tmp_path, pair, order) -> None:
    field, change, values, metric = pair
    rows = [trained("one"), second(change)]
    for row in rows:
        write_result(tmp_path / f"{row.name}.json", row)
    files = [str(tmp_path / f"{rows[index].name}.json") for index in order]
    with pytest.raises(UsageError) as caught:
        leaderboard(LeaderboardConfig(results=tuple(files), sort_by=metric))
    message = str(caught.value)
    left, right = (values[index] for index in order)
    assert f"not comparable: {field} is {left!r} in {rows[order[0]].name!r}" in message
    assert f"and {right!r} in {rows[order[1]].name!r}" in message
    assert all(file in message for file in files)


def test_rows_that_agree_are_ranked(tmp_path) -> None:
    for row in (trained("one"), trained("two", seed=2), make_result("backbone", {0: 0.0}, kind="bound")):
        write_result(tmp_path / f"{row.name}.json", row)
    for metric in ("kl", "generative_nll"):
        assert leaderboard(LeaderboardConfig(results=(str(tmp_path),), sort_by=metric)).row_count == 3


def test_texts_made_otherwise_do_not_matter_to_teacher_forced_metrics(tmp_path) -> None:
    for row in (trained("one"), trained("two", seed=2, text={"temperature": 0.5})):
        write_result(tmp_path / f"{row.name}.json", row)
    assert leaderboard(LeaderboardConfig(results=(str(tmp_path),), sort_by="kl")).row_count == 2


def test_trials_are_shown_and_not_compared(tmp_path) -> None:
    assert {field.name for field in dataclasses.fields(BudgetConfig)} - {"trials"} == (
        {field.name for field in dataclasses.fields(BUDGET)} - {"hardware"}
    ), "a new option of the budget must be compared, or be named here"
    one, two = trained("one"), trained("two", seed=2)
    two = dataclasses.replace(two, cost=dataclasses.replace(two.cost, tuning_trials=40))
    for row in (one, two):
        write_result(tmp_path / f"{row.name}.json", row)
    assert leaderboard(LeaderboardConfig(results=(str(tmp_path),))).row_count == 2


def test_every_further_field_is_named(tmp_path) -> None:
    other = trained("two", seed=2, tokens=1, **budget(tokens=1, flops=1e9))
    for row in (trained("one"), other):
        write_result(tmp_path / f"{row.name}.json", row)
    with pytest.raises(UsageError, match=r"tokens is 8192 .* Also different: budget\.tokens, budget\.flops\. Rank"):
        leaderboard(LeaderboardConfig(results=(str(tmp_path),)))
