"""Commands end to end on small models: files, resuming, planted rewiring, refusals."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from dihal.backbone import load_backbone
from dihal.circuits import resumable
from dihal.circuits.attribute import attribute
from dihal.circuits.commands import plot, selftest
from dihal.circuits.contrast import compare, contrast, hybrid, hybrid_on
from dihal.circuits.metrics import logit_difference
from dihal.circuits.report import Run, load_comparison, load_run
from dihal.circuits.run import run, run_on
from dihal.circuits.subject import Subject, subject_of, task_for, task_options
from dihal.circuits.toy import ToyModel, induction_model
from dihal.circuits.transfer import Party, Running
from dihal.circuits.types import PairBatch
from dihal.config.circuits import (
    AttributionConfig,
    CircuitsCompareConfig,
    CircuitsHybridConfig,
    CircuitsPlotConfig,
    CircuitsRunConfig,
    LensConfig,
    OverlapConfig,
    RunningConfig,
    TaskConfig,
    VerdictConfig,
)
from dihal.controls import Identity
from dihal.errors import UsageError
from dihal.hybrid import HybridForCausalLM
from tests.kit import tiny_model

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def config() -> CircuitsRunConfig:
    return CircuitsRunConfig(
        task=TaskConfig(n=16, test=6, batch_size=4),
        attribution=AttributionConfig(parts=4, steps=2),
        running=RunningConfig(fractions=(0.05, 0.5, 1.0), signed=False, baseline=False),
        lens=LensConfig(prompts=4, components=3),
        bootstrap=50,
        save_every=1,
        progress=False,
    )


def _subject(word_tokenizer, seed: int = 0) -> Subject:
    tokenizer = word_tokenizer()
    model = tiny_model("llama", seed=seed, num_blocks=3, vocab=len(tokenizer))
    backbone = load_backbone(model, tokenizer=tokenizer)
    return subject_of(backbone, backbone, about={"model": f"tiny-{seed}"})


def _run(word_tokenizer, config: CircuitsRunConfig, out: Path, seed: int = 0) -> Run:
    subject = _subject(word_tokenizer, seed)
    return run_on(subject, task_for(subject, config.task, config.load), replace(config, out=str(out)), console=QUIET)


@pytest.fixture
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without figures and page, which take longer than the run: those of `finished` are looked at."""
    monkeypatch.setattr("dihal.circuits.run.draw_run", lambda found, **options: None)


@pytest.fixture(scope="module")
def finished(word_tokenizer, config: CircuitsRunConfig, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    _run(word_tokenizer, config, out)
    return out


def test_files_of_a_run(finished: Path) -> None:
    found = load_run(finished)
    names = {path.name for path in finished.iterdir()}
    figures = ("curves", "components", "depth", "circuit", "lens", "neurons")
    assert {"run.json", "scores.npz", "neurons.npz", "index.html"} <= names
    assert {f"{name}.{kind}" for name in figures for kind in ("png", "svg")} <= names
    assert ".partial" not in names
    details = found.details
    assert details["curves"]["magnitude"]["faithfulness"][-1] == pytest.approx(1.0, abs=1e-4)
    assert len(details["top_edges"]) == 100
    sizes = [abs(row["score"]) for row in details["top_edges"]]
    assert sizes == sorted(sizes, reverse=True)
    first = details["top_edges"][0]
    assert first["score"] == pytest.approx(float(found.scores.scores[found.scores.spec.edge_index(first["edge"])]))
    assert details["task"]["template_hash"]
    assert details["provenance"]["versions"]["torch"]
    assert found.scores.passes["forward"] > 0
    page = (finished / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml") == len(figures)
    assert "http://" not in page.split("<main>")[1].replace("http://www.w3.org", "")


def test_damaged_files_are_refused(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    data = bytearray((copy / "neurons.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "neurons.npz").write_bytes(bytes(data))
    with pytest.raises(UsageError, match="Run it again"):
        load_run(copy)
    with pytest.raises(UsageError, match="holds no finished run"):
        load_run(tmp_path)


@pytest.mark.usefixtures("_undrawn")
def test_a_stopped_run_goes_on_to_the_same_bits(
    finished: Path, word_tokenizer, config: CircuitsRunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, bare = load_run(finished).scores, replace(config, lens=LensConfig(prompts=0))
    calls = itertools.count()

    def stopped(*arguments, **options):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return attribute(*arguments, **options)

    monkeypatch.setattr(resumable, "attribute", stopped)
    with pytest.raises(KeyboardInterrupt):
        _run(word_tokenizer, bare, tmp_path)
    assert not (tmp_path / "run.json").exists()
    assert len(list((tmp_path / ".partial" / "eap-ig-seed0").glob("piece-*"))) == 2
    monkeypatch.setattr(resumable, "attribute", lambda *a, **o: (next(calls), attribute(*a, **o))[1])
    again = _run(word_tokenizer, bare, tmp_path).scores
    pieces = len(task_for(_subject(word_tokenizer), config.task, config.load).pairs(16, seed=0))
    assert next(calls) == 3 + pieces - 2  # two finished pieces were not scored again
    for name in ("scores", "squares", "parts"):
        assert np.array_equal(getattr(whole, name), getattr(again, name))
    assert whole.passes == again.passes


def test_pieces_of_another_run_are_not_used(word_tokenizer, config: CircuitsRunConfig, tmp_path: Path) -> None:
    subject = _subject(word_tokenizer)
    pairs = task_for(subject, config.task, config.load).pairs(8, seed=0)
    options = {"every": 1, "parts": 4, "steps": 2}
    first = resumable.attribute_in_pieces(subject.adapter, pairs, tmp_path, identity={"seed": 0}, **options)
    other = resumable.attribute_in_pieces(
        subject.adapter, pairs, tmp_path, identity={"seed": 1}, **{**options, "steps": 1}
    )
    assert not np.array_equal(first.scores, other.scores)


def test_pieces_merge_to_the_scores_of_one_call(word_tokenizer, config: CircuitsRunConfig, tmp_path: Path) -> None:
    subject = _subject(word_tokenizer)
    pairs = task_for(subject, config.task, config.load).pairs(16, seed=0)
    whole = attribute(subject.adapter, pairs, parts=4, steps=2)
    merged = resumable.attribute_in_pieces(subject.adapter, pairs, tmp_path, identity={}, every=1, parts=4, steps=2)
    scale = np.abs(whole.scores).max()
    for name in ("scores", "parts"):
        assert np.abs(getattr(whole, name) - getattr(merged, name)).max() < 1e-5 * scale
    assert merged.part_counts == whole.part_counts
    assert (merged.n, merged.passes) == (whole.n, whole.passes)
    assert merged.clean == pytest.approx(whole.clean)
    assert merged.accuracy == pytest.approx(whole.accuracy)


def _toy_pairs(n: int = 48) -> list[PairBatch]:
    """A B C D E A -> B against D with all kinds of tokens; corrupted: the sixth token in the first A's place."""
    rows = list(itertools.permutations(range(6)))[:: 720 // n][:n]
    made = []
    for start in range(0, n, 16):
        part = rows[start : start + 16]
        clean = torch.tensor([[*row[:5], row[0]] for row in part])
        corrupted = clean.clone()
        corrupted[:, 0] = torch.tensor([row[5] for row in part])
        made.append(
            PairBatch(
                clean=clean,
                corrupted=corrupted,
                positions=torch.full((len(part), 1), 5),
                answers=clean[:, 1, None, None],
                foils=clean[:, 3, None, None],
                weights=torch.ones(len(part), 1),
                attention="causal",
                ids=torch.arange(start, start + len(part)),
            )
        )
    return made


def _toy(model: ToyModel, name: str) -> tuple[Run, Party]:
    pairs = _toy_pairs()
    adapter = model.adapter()
    scores = attribute(adapter, pairs, parts=8)
    scores.details = {"subject": {"name": name}, "task": {"task": "toy"}, "curves": {}}
    subject = Subject(adapter=adapter, tokenizer=None, kind="causal", mask_id=None, about={"name": name}, model=model)
    return Run(folder=Path(name), scores=scores, neurons={}), Party(subject=subject, scores=scores, pairs=pairs)


def _swapped(model: ToyModel) -> ToyModel:
    """The same function with the two heads of the upper block exchanged."""
    upper = model.decoder.blocks[1]
    with torch.no_grad():
        for linear in (upper.query, upper.key, upper.value):
            linear.weight.copy_(linear.weight.view(2, -1, linear.weight.shape[1]).flip(0).reshape(linear.weight.shape))
        weight = upper.output.weight
        weight.copy_(weight.view(len(weight), 2, -1).flip(1).reshape(weight.shape))
    return model


def _verdict(first: ToyModel, second: ToyModel):
    (one, a), (other, b) = _toy(first, "one"), _toy(second, "other")
    return contrast(
        (one, other),
        (a, b),
        overlap=OverlapConfig(ks=(3,), fractions=(0.2,), k=3, components=(2,), resamples=20, null_resamples=50),
        verdict=VerdictConfig(fraction=3 / 29),
        fractions=(0.2, 1.0),
        how=Running(metric=logit_difference, resamples=100),
    )


def test_planted_rewiring_is_called_and_realigning_restores_it() -> None:
    same = _verdict(induction_model(3.0), induction_model(3.0))
    assert same.at(3)["jaccard"]["value"] == 1.0
    assert same.verdict is not None
    assert same.verdict.call == "kept"
    assert same.function["in_second"]["first"]["value"] == pytest.approx(1.0)
    swapped = _verdict(induction_model(3.0), _swapped(induction_model(3.0)))
    # One of the three live edges does not touch the exchanged heads.
    assert swapped.at(3)["shared"] == 1
    assert swapped.verdict is not None
    assert swapped.verdict.call == "rewired"
    assert swapped.function["in_second"]["first"]["value"] == pytest.approx(0.0, abs=1e-9)
    assert swapped.function["in_second"]["second"]["value"] == pytest.approx(1.0)
    assert swapped.function["in_second"]["union"]["value"] == pytest.approx(1.0)
    back = _verdict(induction_model(3.0), _swapped(_swapped(induction_model(3.0))))
    assert back.at(3)["jaccard"]["value"] == 1.0
    assert back.verdict is not None
    assert back.verdict.call == "kept"


def test_a_task_that_no_model_solves_gets_no_claim() -> None:
    blind = induction_model(3.0)
    blind.head.weight.data.neg_()  # it prefers what is wrong
    found = _verdict(induction_model(3.0), blind)
    assert found.verdict is not None
    assert found.verdict.call == "not measurable"
    assert "does not solve the task" in found.verdict.rule


@pytest.mark.usefixtures("_undrawn")
def test_comparison_of_runs_writes_everything(
    finished: Path, word_tokenizer, config: CircuitsRunConfig, tmp_path: Path
) -> None:
    _run(word_tokenizer, config, tmp_path / "b", seed=1)
    options = CircuitsCompareConfig(
        runs=(str(finished), str(tmp_path / "b")),
        transfer=False,
        overlap=OverlapConfig(ks=(50,), fractions=(0.1,), k=50, resamples=10, null_resamples=20),
        progress=False,
        out=str(tmp_path / "both"),
    )
    found = compare(options, console=QUIET)
    assert found.verdict is None
    data = load_comparison(options.out)
    assert json.loads((tmp_path / "both" / "compare.json").read_text()) == data
    names = {path.name for path in (tmp_path / "both").iterdir()}
    assert {"overlap.png", "depth.svg", "components.png", "lens.png", "neurons.svg", "index.html"} <= names
    assert "No verdict" in (tmp_path / "both" / "index.html").read_text(encoding="utf-8")
    (tmp_path / "both" / "overlap.png").unlink()
    plot(CircuitsPlotConfig(folder=options.out), console=QUIET)
    assert (tmp_path / "both" / "overlap.png").is_file()
    with pytest.raises(UsageError, match="tiny-0"):
        # The model was a live one: it cannot be opened again by name, and the error names it.
        compare(replace(options, transfer=True), console=QUIET)


def test_runs_of_different_tasks_are_not_compared(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    record = json.loads((other / "run.json").read_text())
    record["details"]["comparable"]["template hash"] = "another"
    (other / "run.json").write_text(json.dumps(record))
    options = CircuitsCompareConfig(runs=(str(finished), str(other)), transfer=False, out=str(tmp_path / "c"))
    with pytest.raises(UsageError, match="template hash"):
        compare(options, console=QUIET)


@pytest.mark.usefixtures("_undrawn")
def test_an_identity_bridge_keeps_everything(word_tokenizer, config: CircuitsRunConfig, tmp_path: Path) -> None:
    plain = _subject(word_tokenizer).model
    bridge = Identity(1)
    opened = subject_of(HybridForCausalLM.from_method(bridge, plain), plain, kind="hybrid", about={"model": "identity"})
    options = CircuitsHybridConfig(
        checkpoint="identity",
        task=replace(config.task, n=8, test=4, solved=True, pool=6),
        attribution=AttributionConfig(path="seam", parts=4, steps=1, noise_seeds=2),
        running=RunningConfig(fractions=(0.2, 1.0), signed=False, random=0, baseline=False),
        lens=LensConfig(prompts=0),
        overlap=OverlapConfig(ks=(20,), fractions=(0.2,), k=20, components=(3,), resamples=5, null_resamples=10),
        ablations=1,
        bootstrap=20,
        progress=False,
        out=str(tmp_path),
    )
    found = hybrid_on(opened, options, console=QUIET)
    assert found.details["seam_error"] == pytest.approx([0.0] * len(found.details["seam_error"]))
    assert all(row["jaccard"]["value"] == 1.0 for row in found.overlap)
    names = [load_run(tmp_path / name).scores.spec.lower for name in ("backbone", "hybrid", "null")]
    assert names == ["lower", "bridge", "perturbed"]
    function = found.function
    assert function["in_second"]["first"] == function["in_second"]["second"] == function["in_first"]["first"]
    assert found.verdict is not None
    assert found.verdict.null.startswith("noise-matched")
    data = load_comparison(tmp_path)
    assert data["seam"] == 1
    assert data["noise_matched_null"]["overlap"][0]["jaccard"]["value"] == 1.0
    with pytest.raises(UsageError, match="is no hybrid"):
        hybrid_on(subject_of(plain, plain), options, console=QUIET)


def test_selected_pairs_are_solved(word_tokenizer, config: CircuitsRunConfig) -> None:
    subject = _subject(word_tokenizer)
    task = task_for(subject, replace(config.task, solved=True, pool=12), config.load)
    scores = attribute(subject.adapter, task.pairs(16, seed=0), parts=4, steps=1)
    assert scores.accuracy == 1.0
    with pytest.raises(UsageError, match="cannot be compared here"):
        task_for(subject, replace(config.task, solved=True, pool=1), config.load)


def test_selftest_holds() -> None:
    assert selftest(console=QUIET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attribution": AttributionConfig(parts=3)}, "parts must be even"),
        ({"attribution": AttributionConfig(steps=0)}, "steps"),
        ({"running": RunningConfig(fractions=(0.5, 0.1))}, "ascending"),
        ({"task": TaskConfig(name="io"), "model": "nowhere/at/all"}, "nowhere"),
    ],
)
def test_bad_options_are_refused_before_work(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        run(CircuitsRunConfig(out=str(tmp_path / "x"), progress=False, **change), console=QUIET)
    assert not (tmp_path / "x").exists()


def test_more_refusals(tmp_path: Path, word_tokenizer, config: CircuitsRunConfig) -> None:
    with pytest.raises(UsageError, match="takes two run folders"):
        compare(CircuitsCompareConfig(runs=("a",)), console=QUIET)
    with pytest.raises(UsageError, match="needs --checkpoint"):
        hybrid(CircuitsHybridConfig(), console=QUIET)
    with pytest.raises(UsageError, match="seam path"):
        hybrid(CircuitsHybridConfig(checkpoint="x", attribution=AttributionConfig()), console=QUIET)
    with pytest.raises(UsageError, match="holds neither"):
        plot(CircuitsPlotConfig(folder=str(tmp_path)), console=QUIET)
    with pytest.raises(UsageError, match="KEY=VALUE"):
        task_options(("corruption",))
    assert task_options(("shots=3", "corruption=operand")) == {"shots": 3, "corruption": "operand"}
    with pytest.raises(UsageError, match="at least 2"):
        task_for(_subject(word_tokenizer), replace(config.task, n=1), config.load)


def test_the_command_line_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    from dihal.cli import COMMANDS, main

    assert {name for name in COMMANDS if name.startswith("circuits ")} == {
        f"circuits {word}" for word in ("run", "compare", "hybrid", "plot", "selftest")
    }
    for words in (["circuits"], ["circuits", "rum"]):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 2
        assert "circuits run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["circuits", "compare", "--runs", "[a]"])
    assert left.value.code == 2
    assert "two run folders" in capsys.readouterr().err
