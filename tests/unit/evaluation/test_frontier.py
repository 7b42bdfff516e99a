"""The frontier from checkpoints to files, on tiny random models."""

from __future__ import annotations

import dataclasses
import json
import math
import types

import numpy as np
import pytest
import torch

from dihal.backbone import load_backbone
from dihal.config.convert import from_dict
from dihal.config.frontier import FrontierConfig
from dihal.config.spaces import WritingConfig
from dihal.errors import UsageError
from dihal.evaluation.frontier import frontier, report
from dihal.evaluation.frontier.board import build_board, gather, require_comparable
from dihal.evaluation.frontier.plan import REAL_TEXT
from dihal.evaluation.frontier.prompts import choose_prompts
from dihal.evaluation.frontier.result import FrontierRow, read_row, write_row
from dihal.evaluation.frontier.run import measure_frontier
from dihal.evaluation.frontier.scoring import Grader
from dihal.evaluation.frontier.sources import BackboneSource, WriterSource, writing_cost
from dihal.evaluation.frontier.variants import parse_variant, parse_variants
from dihal.evaluation.generation import Prompts, Scorer
from dihal.evaluation.text import unigram_entropy
from dihal.io import read_json
from tests.kit import tiny_model, tiny_tokenizer
from tests.unit.evaluation.kit import make_run, train_config

PROMPT, NEW, SAMPLES = 8, 12, 9


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIHAL_CACHE", str(folder / "cache"))
        make_run(folder, "bridge", steps=15)
        make_run(folder, "regression", steps=8, split=1, method="regression")
        yield folder


@pytest.fixture(scope="module")
def config(root):
    return FrontierConfig(
        checkpoints=(str(root / "bridge"), str(root / "regression")),
        samples=SAMPLES,
        prompt_tokens=PROMPT,
        new_tokens=NEW,
        temperatures=(1.0, 0.0, 0.7),
        bridge_steps=(1, 2),
        ngrams=(1, 2),
        seeds=(0, 5),
        bootstrap=50,
        batch_size=5,
        texts=2,
        out=str(root / "out"),
    )


@pytest.fixture(scope="module")
def rows(config):
    frontier(config)
    return {row.name: row for row in (read_row(path) for path in measure_frontier(config))}


@pytest.fixture(scope="module")
def backbone(root):
    return load_backbone(train_config(root).backbone.id, device="cpu")


def point(row: FrontierRow, temperature: float, steps: int = 0):
    return next(item for item in row.points if (item.steps, item.temperature) == (steps, temperature))


def test_every_row_has_every_point(rows):
    three = [(0, 0.0), (0, 0.7), (0, 1.0)]
    assert {name: [(p.steps, p.temperature) for p in row.points] for name, row in rows.items()} == {
        REAL_TEXT: [(0, 0.0)],
        "backbone": three,
        "bridge": [(steps, t) for steps in (1, 2) for _, t in three],
        "regression": [(1, t) for _, t in three],
        "unigram": three,
        "bigram": three,
    }
    assert {row.kind for row in rows.values()} == {"text", "bound", "checkpoint", "control"}
    assert all(row.self_graded for row in rows.values())


def chosen_prompts(rows, backbone, config, root):
    """The prompts once more, from the data."""
    from dihal.evaluation.inputs import open_data

    data, _ = open_data(train_config(root).data, [], backbone)
    windows = data.evaluation_windows(seed=config.seed)
    return choose_prompts(windows, samples=SAMPLES, prompt_tokens=PROMPT, new_tokens=NEW), windows


def test_real_text_equals_a_direct_computation(rows, backbone, config, root):
    chosen, _ = chosen_prompts(rows, backbone, config, root)
    ids = torch.cat([chosen.prompts.prompts, chosen.prompts.real], 1)
    log_p = backbone.forward(ids).detach().double().log_softmax(-1)[:, PROMPT - 1 : -1]
    new = ids[:, PROMPT:]
    nll = -log_p.gather(-1, new.unsqueeze(-1)).squeeze(-1)
    found = point(rows[REAL_TEXT], 0.0)
    assert found.metrics["nll"].value == pytest.approx(float(nll.mean()), abs=1e-4)
    assert found.metrics["agreement"].value == pytest.approx(float((log_p.argmax(-1) == new).double().mean()), abs=1e-4)
    entropies = [unigram_entropy(text) for text in new.tolist()]
    assert found.metrics["entropy"].value == pytest.approx(np.mean(entropies), abs=1e-4)
    assert found.metrics["entropy_scorer"].value == found.metrics["entropy"].value
    assert rows[REAL_TEXT].document_keys == chosen.keys
    # The same text for every seed.
    assert found.per_sample["nll"][:SAMPLES] == found.per_sample["nll"][SAMPLES:]


def test_prompts_take_one_window_of_each_document_first(rows, backbone, config, root):
    chosen, windows = chosen_prompts(rows, backbone, config, root)
    long_enough = windows.attention_mask.sum(-1) >= PROMPT + NEW
    assert len(set(chosen.documents)) == min(SAMPLES, len(set(windows.document_ids[long_enough, 0].tolist())))
    with pytest.raises(UsageError, match="asked for"):
        choose_prompts(windows, samples=10_000, prompt_tokens=PROMPT, new_tokens=NEW)


def test_greedy_text_of_the_backbone_is_its_own_choice(rows):
    greedy, sampled = (point(rows["backbone"], t).metrics for t in (0.0, 1.0))
    # All but the forbidden end token.
    assert greedy["agreement"].value > 0.95
    assert sampled["agreement"].value < 0.6
    assert greedy["nll"].value < sampled["nll"].value
    assert all(row_point.metrics["ended"].value == 0 for row in rows.values() for row_point in row.points)


def test_seeds_give_other_text_and_one_draw_per_seed(rows):
    for name, steps in (("backbone", 0), ("bridge", 1), ("bigram", 0)):
        nll = point(rows[name], 1.0, steps).per_sample["nll"]
        assert nll[:SAMPLES] != nll[SAMPLES:]
        greedy = point(rows["backbone"], 0.0).per_sample["nll"]
        assert greedy[:SAMPLES] == greedy[SAMPLES:]


def test_metrics_are_ratios_of_the_stored_numbers(rows):
    for row in rows.values():
        for item in row.points:
            held = item.per_sample
            assert item.metrics["nll"].value == pytest.approx(sum(held["nll"]) / sum(held["scored"]))
            assert item.metrics["agreement"].value == pytest.approx(sum(held["agreement"]) / (2 * SAMPLES * NEW))
            assert item.metrics["rep_4"].value == pytest.approx(np.mean(held["rep_4"]))
            assert item.metrics["memorised"].value == pytest.approx(sum(held["memorised"]) / (2 * SAMPLES * (NEW - 3)))
            assert item.metrics["self_agreement"].value is None
            low, high = item.metrics["nll"].low, item.metrics["nll"].high
            assert low - 1e-9 <= item.metrics["nll"].value <= high + 1e-9


def test_distances_are_to_the_real_text(rows):
    assert point(rows[REAL_TEXT], 0.0).missing["frechet"] == "this row is the reference"
    assert all(value > 0 for item in rows["bridge"].points for value in item.set_metrics["frechet"])
    assert "100 texts" in rows["bridge"].points[0].missing["mauve"]


def test_costs(rows):
    bridge = {item.steps: item for item in rows["bridge"].points}
    assert bridge[1].nfe == NEW
    assert bridge[2].nfe == 2 * NEW
    assert bridge[1].flops_per_token < bridge[2].flops_per_token
    assert rows["unigram"].points[0].flops_per_token is None
    assert rows["bridge"].cost["trainable_parameters"] > 0
    assert "trainable_parameters" not in rows["backbone"].cost


def test_flops_are_those_of_the_passes_that_ran(backbone):
    prompts = Prompts(prompts=torch.full((3, PROMPT), 5), real=torch.full((3, NEW), 5))
    source = BackboneSource(backbone=backbone, batch_size=2)
    cost = writing_cost(source, prompts, new_tokens=NEW, steps=0, temperature=1.0)
    linear = backbone.flops_per_token(0, backbone.num_blocks, 0)
    attended = backbone.flops_per_token(0, backbone.num_blocks, 1) - linear
    seen = PROMPT * PROMPT + sum(PROMPT + new for new in range(1, NEW))
    total = linear * (PROMPT + NEW - 1) + attended * seen + backbone.head_flops_per_token() * NEW
    assert cost.flops_per_token == pytest.approx(total / NEW, rel=0.01)
    assert (cost.nfe, cost.encodes, cost.reads) == (0, NEW, NEW)


def test_a_second_call_measures_nothing(rows, config, monkeypatch):
    monkeypatch.setattr(
        "dihal.evaluation.frontier.run.TrainingGrams", lambda *_: pytest.fail("a measured frontier is measured again")
    )
    assert len(measure_frontier(config)) == len(rows)


def test_an_interrupted_call_goes_on_and_gives_the_same_numbers(rows, config, tmp_path, monkeypatch):
    few = {"checkpoints": config.checkpoints[:1], "bridge_steps": (1,), "ngrams": (2,)}
    config = dataclasses.replace(config, **few, out=str(tmp_path / "half"))
    written = []
    original = BackboneSource.write

    def write(self, prompts, **options):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(options)
        return original(self, prompts, **options)

    monkeypatch.setattr(BackboneSource, "write", write)
    with pytest.raises(KeyboardInterrupt):
        measure_frontier(config)
    half = read_row(tmp_path / "half" / "backbone.json")
    assert 0 < len(half.points) < half.planned == 3
    board = report([tmp_path / "half"], tmp_path / "half")
    assert "Interrupted, some points are missing: backbone." in (tmp_path / "half" / "frontier.md").read_text()
    assert [curve.label for curve in board.curves] == [REAL_TEXT, "backbone"]
    written.clear()
    monkeypatch.setattr(BackboneSource, "write", original)
    found = {row.name: row for row in map(read_row, measure_frontier(config))}
    assert {name: len(row.points) for name, row in found.items()} == {
        REAL_TEXT: 1, "backbone": 3, "bridge": 3, "bigram": 3,
    }  # fmt: skip
    for name, row in found.items():
        for one in row.points:
            other = point(rows[name], one.temperature, one.steps)
            assert one.per_sample == other.per_sample
            assert one.metrics == other.metrics
            assert one.set_metrics == other.set_metrics


def alone(config: FrontierConfig, root) -> FrontierConfig:
    """The same evaluation without checkpoints, which would name backbone and text."""
    run = train_config(root)
    return dataclasses.replace(config, checkpoints=(), backbone=run.backbone, data=run.data)


def test_a_wider_grid_keeps_what_is_there_and_other_options_do_not(config, root, tmp_path):
    config = alone(config, root)
    options = {"ngrams": (2,), "seeds": (0,), "out": str(tmp_path / "out")}
    first = dataclasses.replace(config, temperatures=(0.7,), **options)
    measure_frontier(first)
    before = read_json(tmp_path / "out" / "bigram.json")["points"][0]
    measure_frontier(dataclasses.replace(first, temperatures=(1.0,)))
    after = read_json(tmp_path / "out" / "bigram.json")["points"]
    assert [item["temperature"] for item in after] == [0.7, 1.0]
    assert after[0] == before, "measured again"
    measure_frontier(dataclasses.replace(first, temperatures=(1.0,), frechet_channels=2))
    assert [p["temperature"] for p in read_json(tmp_path / "out" / "bigram.json")["points"]] == [1.0]


def test_samples_do_not_depend_on_their_batch(rows, config, tmp_path):
    other = dataclasses.replace(
        config, checkpoints=config.checkpoints[:1], batch_size=7, temperatures=(1.0,), ngrams=()
    )
    for path in measure_frontier(dataclasses.replace(other, out=str(tmp_path / "out"))):
        row = read_row(path)
        for item in row.points:
            same = point(rows[row.name], item.temperature, item.steps)
            assert item.texts == same.texts
            assert item.per_sample["entropy"] == same.per_sample["entropy"]
            assert np.allclose(item.per_sample["nll"], same.per_sample["nll"], atol=2e-3)


# -- comparing rows


def changed(row: FrontierRow, name: str, value) -> FrontierRow:
    head, _, tail = name.partition(".")
    if head in ("confidence", "bootstrap", "bootstrap_seed"):
        return dataclasses.replace(row, **{name: value})
    if tail:
        group = dataclasses.replace(getattr(row.comparable, head), **{tail: value})
        return dataclasses.replace(row, comparable=dataclasses.replace(row.comparable, **{head: group}))
    return dataclasses.replace(row, comparable=dataclasses.replace(row.comparable, **{name: value}))


OTHER = {
    "metric_version": "0", "score_type": "teacher_forced", "tokenizer_fingerprint": "x", "backbone_fingerprint": "x",
    "scorer": "x", "scorer_fingerprint": "x", "samples": 3, "prompt_tokens": 3, "new_tokens": 3, "seeds": [1],
    "data_fingerprint": "x", "training_text": "x", "budget.name": "x", "budget.tokens": 7, "budget.seconds": 3.0,
    "budget.flops": 1e9, "budget.hardware": "x", "training.data_fingerprint": "x", "training.sequence_length": 5,
    "training.seed": 9, "training.splice": 0.5, "training.splice_length": 2, "confidence": 0.5, "bootstrap": 7,
    "bootstrap_seed": 3,
}  # fmt: skip


def test_the_list_of_facts_is_complete(rows):
    held = set(rows["bridge"].facts())
    assert held <= set(OTHER)
    assert set(OTHER) - held <= {"budget.seconds", "budget.flops", "budget.hardware"} | held


@pytest.mark.parametrize("name", OTHER)
def test_rows_that_differ_in_a_fact_are_refused_by_its_name(rows, tmp_path, name):
    one, other = rows["bridge"], changed(rows["regression"], name, OTHER[name])
    with pytest.raises(UsageError, match=rf"not comparable: {name} is .*bridge.*regression"):
        require_comparable([(tmp_path / "a", one), (tmp_path / "b", other)])


def test_budgets_do_not_separate_trained_rows_from_bounds(rows, tmp_path):
    require_comparable([(tmp_path / name, row) for name, row in rows.items()])


def test_checkpoints_of_unlike_budget_are_refused_before_anything_is_written(root, config, tmp_path):
    run = train_config(root, split=2)
    run = dataclasses.replace(run, budget=dataclasses.replace(run.budget, tokens=9))
    make_run(root, "richer", steps=1, config=run)
    twice = dataclasses.replace(
        config, checkpoints=(config.checkpoints[0], str(root / "richer")), out=str(tmp_path / "o")
    )
    with pytest.raises(UsageError, match=r"budget\.tokens is 4096 in 'bridge'.* and 9 in 'richer'"):
        measure_frontier(twice)
    assert not (tmp_path / "o").exists()


def test_board_compares_at_the_real_entropy_by_default(rows, config):
    found, _ = gather([config.out])
    board = build_board(found)
    own = point(rows[REAL_TEXT], 0.0).metrics["entropy"].value
    assert board.entropies == [own]
    assert board.range == (own - 1.0, own)
    kinds = [curve.row.kind for curve in board.curves]
    assert kinds == sorted(kinds, key=["text", "bound", "checkpoint", "control"].index)
    assert [curve.label for curve in board.curves][-2:] == ["unigram", "bigram"]


def test_matched_values_lie_on_the_curve(rows, config):
    found, _ = gather([config.out])
    low, high = (point(rows["backbone"], t).metrics for t in (0.0, 0.7))
    middle = (low["entropy"].value + high["entropy"].value) / 2
    board = build_board(found, entropies=[middle, 99.0], span=(1.0, 2.0))
    curve = next(curve for curve in board.curves if curve.label == "backbone")
    inside, outside = curve.matched
    for name, interval in (("nll", inside.nll), ("agreement", inside.agreement)):
        assert interval.value == pytest.approx((low[name].value + high[name].value) / 2)
    assert inside.behind.value == 0
    assert outside.nll.value is None
    assert outside.agreement.value is None


def test_report_says_what_the_files_say(rows, config, root):
    files = {path.name: path.read_bytes() for path in (root / "out").iterdir()}
    assert {"frontier.md", "frontier.csv", "curves.csv", "frontier.html", "frontier.png", "frontier.svg"} <= set(files)
    frontier(dataclasses.replace(config, measure=False))
    assert all((root / "out" / name).read_bytes() == content for name, content in files.items()), "not reproducible"
    table = files["frontier.csv"].decode().splitlines()
    head = table[0].split(",")
    line = next(
        text.split(",") for text in table if text.startswith("bridge,") and text.split(",")[5:7] == ["2", "0.7"]
    )
    assert float(line[head.index("nll")]) == point(rows["bridge"], 0.7, 2).metrics["nll"].value
    assert len(table) == 1 + sum(len(row.points) for row in rows.values())
    html = files["frontier.html"].decode()
    for name in rows:
        assert f"<summary>{name}</summary>" in html
    assert "self-graded" in html
    assert "**bridge**" in files["frontier.md"].decode()


def test_rows_of_other_folders_join_the_table_or_are_refused(rows, config, root, tmp_path):
    own = dataclasses.replace(alone(config, root), out=str(tmp_path / "own"), ngrams=(), temperatures=(1.0,))
    other = tmp_path / "other"
    other.mkdir()
    write_row(other / "bridge.json", rows["bridge"])
    frontier(dataclasses.replace(own, results=(str(other),)))
    assert "**bridge**" in (tmp_path / "own" / "frontier.md").read_text()
    # Rows of other folders alone make a table in a folder that is still to be made.
    frontier(
        dataclasses.replace(
            own, results=(str(other),), measure=False, entropies=(2.0,), area=(1.0, 2.0), out=str(tmp_path / "new")
        )
    )
    assert "**bridge**" in (tmp_path / "new" / "frontier.md").read_text()
    write_row(other / "bridge.json", changed(rows["bridge"], "scorer", "another"))
    with pytest.raises(UsageError, match="scorer is"):
        frontier(dataclasses.replace(own, results=(str(other),)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.update(extra=1), "unknown field 'extra'"),
        (lambda d: d.pop("documents"), "missing field 'documents'"),
        (lambda d: d["points"][0]["metrics"].pop("nll"), "missing field 'nll'"),
        (lambda d: d["points"][0]["per_sample"]["nll"].pop(), "has 17 numbers, not 18"),
        (lambda d: d["points"][0]["per_sample"]["nll"].__setitem__(0, math.inf), "not finite"),
        (lambda d: d["points"][0]["missing"].clear(), "does not say why"),
        (lambda d: d.update(kind="magic"), "kind 'magic'"),
        (lambda d: d["points"].append(d["points"][0]), "share steps and temperature"),
        (lambda d: d.update(schema="dihal.frontier/9"), "this version reads"),
        (lambda d: d.update(schema="dihal.result/2"), "not a frontier row"),
    ],
)
def test_a_damaged_row_is_refused_by_field(rows, config, tmp_path, damage, message):
    data = read_json(f"{config.out}/backbone.json")
    damage(data)
    (tmp_path / "row.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match=message):
        read_row(tmp_path / "row.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperatures": ()}, "temperatures must name"),
        ({"temperatures": (-1.0,)}, "temperatures must name"),
        ({"steps": (0,)}, "steps must name"),
        ({"seeds": (1, 1)}, "twice"),
        ({"confidence": 1.0}, "between 0 and 1"),
        ({"samples": 0}, "samples must be"),
        ({"ngrams": (0,)}, "orders of at least 1"),
        ({"variants": ("x: readut=own",)}, "readout"),
    ],
)
def test_wrong_options_say_so(config, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        measure_frontier(dataclasses.replace(config, out=str(tmp_path / "out"), **options))
    assert not (tmp_path / "out").exists()


# -- scorers


def test_a_scorer_with_another_tokenizer_reads_the_decoded_text(root, backbone):
    other = load_backbone(
        tiny_model("gpt_neox", seed=3, vocab=200), dtype="float32", device="cpu", tokenizer=tiny_tokenizer(200)
    )
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(4, 90, (5, 6), generator=generator)
    new = torch.randint(4, 90, (5, 7), generator=generator)
    new[3, 2:] = backbone.end_token_id  # decodes to less text
    graded = Grader(other, backbone, batch_size=2).grade(prompts, new)
    whole, count = Scorer(other, backbone).nll(prompts, new)
    assert graded.nll.sum() == pytest.approx(whole, rel=1e-5)
    assert graded.scored.sum() == count
    assert graded.scored[3] == 2
    assert not Grader(other, backbone, batch_size=2).self_graded
    own = Grader(backbone, backbone, batch_size=3).grade(prompts, new)
    assert (graded.agreement == own.agreement).all(), "agreement is the backbone's business, whoever scores"
    assert graded.mean.shape == (5, other.hidden_size)


def test_a_text_that_decodes_to_nothing_is_not_scored(backbone):
    other = load_backbone(
        tiny_model("gpt_neox", seed=3, vocab=200), dtype="float32", device="cpu", tokenizer=tiny_tokenizer(200)
    )
    prompts, new = torch.full((2, 4), 40), torch.full((2, 5), 41)
    new[1] = backbone.end_token_id
    graded = Grader(other, backbone, batch_size=2).grade(prompts, new)
    assert graded.scored.tolist() == [5, 0]
    assert graded.nll[1] == 0
    assert np.isfinite(graded.mean).all()


def test_grading_does_not_depend_on_the_batch_or_padding(backbone):
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(4, 90, (5, 6), generator=generator)
    new = torch.randint(4, 90, (5, 7), generator=generator)
    one, all_at_once = (Grader(backbone, backbone, batch_size=size).grade(prompts, new) for size in (1, 5))
    for name in ("nll", "mean", "last", "agreement"):
        assert np.allclose(getattr(one, name), getattr(all_at_once, name), atol=1e-4), name
    states = backbone.suffix_features(backbone.embed(torch.cat([prompts, new], 1)), 0).detach().numpy()
    assert np.allclose(one.last, states[:, -1], atol=1e-4)
    assert np.allclose(one.mean, states[:, 6:].mean(1), atol=1e-4)


# -- writers


def test_variants_win_over_the_grid_and_the_checkpoint():
    own = WritingConfig(readout="suffix", project=0.3)
    variant = parse_variant("half way: readout=fused project=0.5 steps=8")
    assert variant.label == "half way"
    assert variant.grid((64, 16), (1.0, 0.7)) == [(8, 0.7), (8, 1.0)]
    writing = variant.writing(own, steps=64, temperature=0.7, seed=4)
    assert (writing.readout, writing.project, writing.steps, writing.temperature, writing.seed) == (
        "fused", 0.5, 8, 0.7, 4,
    )  # fmt: skip
    (plain,) = parse_variants(())
    assert plain.grid((64, 16), (1.0,)) == [(16, 1.0), (64, 1.0)]
    assert plain.writing(own, steps=16, temperature=1.0, seed=0) == dataclasses.replace(own, steps=16, temperature=1.0)
    assert parse_variant("readout=own").label == "readout=own"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("a: readout=owm",), "own"),
        (("a:",), "expected `LABEL: KEY=VALUE"),
        (("words only",), "expected `LABEL: KEY=VALUE"),
        (("a: seed=1",), "leave `seed` out"),
        (("a: steps=2", "a: steps=3"), "share a label"),
    ],
)
def test_wrong_variants_say_so(texts, message):
    with pytest.raises(UsageError, match=message):
        parse_variants(texts)


class RecordingWriter:
    """Stands in for a writer: it notes what it is asked and writes the row's key and the position."""

    def __init__(self) -> None:
        self.config = types.SimpleNamespace(writing=WritingConfig(readout="fused"))
        self.calls: list[dict] = []

    def write(self, backbone, input_ids, known, **options):
        self.calls.append({"ids": input_ids, "known": known, **options})
        tokens = torch.where(known, input_ids, 10 + options["sample_ids"][:, None])
        share = torch.full((len(input_ids),), 0.25) if options["compare"] else None
        flops = {"bridge": 100.0 * len(input_ids), "suffix": 60.0 * len(input_ids)}
        return types.SimpleNamespace(
            tokens=tokens,
            own_tokens=tokens,
            suffix_tokens=tokens,
            agreement=share,
            nfe=3,
            encodes=1,
            reads=1 + options["compare"],
            flops=flops,
        )


def test_a_writer_is_given_the_prompt_only_and_the_samples_keys(backbone):
    writer = RecordingWriter()
    source = WriterSource(backbone=backbone, writer=writer, variant=parse_variants(())[0], batch_size=2)
    prompts = Prompts(prompts=torch.arange(15).reshape(3, 5) + 20, real=torch.full((3, 4), 99))
    made = source.write(prompts, new_tokens=4, steps=6, temperature=0.5, seed=7)
    assert made.tokens.tolist() == [[10] * 4, [11] * 4, [12] * 4]
    assert made.agreement.tolist() == [0.25] * 3
    assert [len(call["ids"]) for call in writer.calls] == [2, 1]
    for call in writer.calls:
        assert call["known"].tolist() == [[True] * 5 + [False] * 4] * len(call["ids"])
        assert 99 not in call["ids"], "the real continuation was handed over"
        assert call["end"] is False
        assert call["given"] is None
        assert call["writing"] == WritingConfig(readout="fused", steps=6, temperature=0.5, seed=7)
    cost = writing_cost(source, prompts, new_tokens=4, steps=6, temperature=0.5)
    assert (cost.nfe, cost.encodes, cost.reads) == (3, 1, 1), "the comparison of readouts is no part of the price"
    assert made.flops == 3 * 160.0
    assert cost.flops_per_token == 160.0 / 4


def test_configuration_survives_its_file(config):
    from dihal.config.cli import dump, parse

    assert from_dict(FrontierConfig, dataclasses.asdict(config)) == config
    words = ["--variants", "own: readout=own", "fused: readout=fused project=0.5", "--temperatures", "0.7", "1.0"]
    parsed = parse(FrontierConfig, words, prog="frontier")
    assert parsed.variants == ("own: readout=own", "fused: readout=fused project=0.5")
    assert parsed.temperatures == (0.7, 1.0)
    assert "own: readout=own" in dump(parsed)


def real_writer(backbone, **space):
    from dihal.config import DenoiserConfig, MethodConfig, ObjectiveConfig
    from dihal.data.batch import Batch
    from dihal.writer import Writer

    config = MethodConfig(
        regime="generate",
        denoiser=DenoiserConfig(width=32, depth=1, heads=2, mask="mixed"),
        objective=ObjectiveConfig(own=0.2, own_time="uniform"),
        **space,
    )
    writer = Writer(config, dim=backbone.hidden_size, vocab=backbone.vocab_size)
    ids = torch.randint(4, 90, (4, 20), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids, dtype=torch.bool)
    writer.fit_normalisation(
        backbone,
        [Batch(input_ids=ids, attention_mask=real, document_ids=ids * 0, loss_mask=real, sample_ids=torch.arange(4), full=True)],
    )  # fmt: skip
    return writer, Prompts(prompts=ids[:, :8], real=ids[:, 8:])


@pytest.mark.parametrize(
    "options", ["readout=own", "readout=fused project=0.5 temperature_start=0.7", "steps=2 block=4"]
)
def test_a_real_writer_continues_prompts_without_the_end_token(backbone, options):
    writer, prompts = real_writer(backbone, split=2)
    made = [
        WriterSource(backbone=backbone, writer=writer, variant=parse_variant(options), batch_size=size).write(
            prompts, new_tokens=12, steps=4, temperature=1.0, seed=0
        )
        for size in (4, 3)
    ]
    assert made[0].tokens.shape == (4, 12)
    assert torch.equal(made[0].tokens, made[1].tokens)
    assert made[0].agreement.shape == (4,)
    assert not (made[0].tokens == backbone.end_token_id).any()


@pytest.mark.parametrize("space", ["hidden", "simplex"])
def test_what_other_readouts_make_of_the_same_states_is_not_written_again(backbone, space, monkeypatch):
    split = 2 if space == "hidden" else 0
    writer, prompts = real_writer(backbone, split=split, space=space)
    calls, write = [], writer.write
    monkeypatch.setattr(writer, "write", lambda *args, **options: calls.append(1) or write(*args, **options))
    how = {"new_tokens": 12, "steps": 3, "seed": 0}

    def made(options, temperature=1.0, *, read):
        variant = parse_variant(options)
        source = WriterSource(backbone=backbone, writer=writer, variant=variant, batch_size=3, read=read)
        before = len(calls)
        found = source.write(prompts, temperature=temperature, **how)
        return found, (len(calls) - before) // 2

    read: dict = {}
    fused, walks = made("readout=fused", read=read)
    assert walks == 1
    for readout in ("own", "suffix"):
        alone, walks = made(f"readout={readout}", read={})
        assert walks == 1
        assert not torch.equal(alone.tokens, fused.tokens)
        kept, walks = made(f"readout={readout}", read=read)
        assert walks == 0
        assert torch.equal(kept.tokens, alone.tokens)
        assert torch.equal(kept.agreement, alone.agreement)
        assert kept.seconds == fused.seconds
    assert not read, "kept until asked for"
    for options in ("readout=fused block=4", "readout=fused project=0.5", "readout=fused steps=2"):
        made(options, read=read)
        assert made("readout=own", read=read)[1] == 1, "other states"
    assert made("readout=own", 0.5, read=read)[1] == 1, "another temperature"
